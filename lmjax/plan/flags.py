# SPDX-License-Identifier: Apache-2.0
"""The flags of `plan`, and what they ask for."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Where, at what price, what to vary, and how it is told."""
    add = parser.add_argument
    about = "v5e:4x4, v5p:2x2x2 …; several: repeat it, or put commas between"
    add("--topology", action="append", required=True, metavar="CHIP:SHAPE", help=about)
    add("--price", type=float, metavar="USD", help="per chip and hour (default: a list price)")
    about = "look for the fastest mesh, remat policy, microbatches and unrolling"
    add("--search", action="store_true", help=about)
    about = "of --search, combinations to compile for a topology, at most (default: 6)"
    add("--compile", type=int, metavar="N", help=about)
    about = "a JSON object a topology and nothing else; of --search an object a combination that"
    add("--json", action="store_true", help=f"{about} was compiled, the fastest last")
    about = "leave out the largest batch, which takes another compilation"
    add("--quick", action="store_true", help=about)
    about = "also write the compiled steps there, for `train --compiled=DIR` on such devices"
    add("--save", metavar="DIR", help=about)


def plan_by_flags(run: Any, flags: argparse.Namespace) -> None:
    """Prints a table, or JSON.

    Raises:
      ValueError: a flag, or what `plan` and `search` raise; before anything is compiled where it
        can be.
    """
    from lmjax.data import local_folder
    from lmjax.executables import prepare
    from lmjax.plan.chips import split_name
    from lmjax.plan.plan import check

    names = [name for group in flags.topology for name in group.split(",") if name]
    topologies = list(dict.fromkeys(names))
    if not topologies:
        raise ValueError("--topology needs a value, as v5e:4x4")
    if flags.price is not None and not 0 <= flags.price < math.inf:
        raise ValueError(f"--price={flags.price}: dollars, 0 or more")
    if flags.compile is not None and not flags.search:
        raise ValueError("--compile is of --search, which is not asked for")
    if flags.compile is not None and flags.compile < 1:
        raise ValueError(f"--compile={flags.compile}: must be at least 1")
    if flags.quick and flags.search:
        raise ValueError("--quick: --search looks for no largest batch; leave one of the two out")
    folder = None if flags.save is None else local_folder("save", flags.save)
    if folder and flags.search:
        raise ValueError("--save writes the steps of one mesh: choose it first, without --search")
    for topology in topologies:
        split_name(topology)
    for topology in topologies:
        check(run, topology, any_mesh=flags.search)
    if folder:
        prepare(folder)
    if flags.search:
        _search(run, topologies, flags)
    else:
        _plan(run, topologies, flags, folder)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _plan(run: Any, topologies: list[str], flags: argparse.Namespace, folder: Path | None) -> None:
    from lmjax.plan.plan import plan
    from lmjax.plan.program import save
    from lmjax.plan.table import table

    results = []
    for topology in topologies:
        results.append(plan(run, topology, flags.price, not flags.quick, _say))
        if flags.json:
            print(json.dumps(results[-1]), flush=True)
    if not flags.json:
        print(table(results))
    if folder:
        for topology in topologies:
            for path in save(run, topology, folder, _say):
                _say(f"saved {path}, for {topology}")


def _search(run: Any, topologies: list[str], flags: argparse.Namespace) -> None:
    from lmjax.plan.search import search
    from lmjax.plan.winners import winners

    for topology in topologies:
        found = search(run, topology, flags.price, flags.compile or 6, _say)
        if flags.json:
            for one in reversed(found):
                print(json.dumps(one), flush=True)
        else:
            print(winners(found), flush=True)
