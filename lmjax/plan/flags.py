# SPDX-License-Identifier: Apache-2.0
"""The flags of `plan`, and what they ask for."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Where, at what price, and how it is told."""
    add = parser.add_argument
    about = "v5e:4x4, v5p:2x2x2 …; several: repeat it, or put commas between"
    add("--topology", action="append", required=True, metavar="CHIP:SHAPE", help=about)
    add("--price", type=float, metavar="USD", help="per chip and hour (default: a list price)")
    add("--json", action="store_true", help="a JSON object a topology and nothing else")
    about = "leave out the largest batch, which takes another compilation"
    add("--quick", action="store_true", help=about)
    about = "also write the compiled steps there, for `train --compiled=DIR` on such devices"
    add("--save", metavar="DIR", help=about)


def plan_by_flags(run: Any, flags: argparse.Namespace) -> None:
    """Prints a table, or JSON.

    Raises:
      ValueError: a flag, or what `plan` raises; before anything is compiled where it can be.
    """
    from lmjax.plan.chips import devices
    from lmjax.plan.plan import plan
    from lmjax.plan.program import save
    from lmjax.plan.table import table

    topologies = [name for group in flags.topology for name in group.split(",") if name]
    if flags.price is not None and flags.price < 0:
        raise ValueError(f"--price={flags.price}: dollars, 0 or more")
    for topology in topologies:
        devices(topology)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    results = []
    for topology in dict.fromkeys(topologies):
        results.append(plan(run, topology, flags.price, not flags.quick, say))
        if flags.json:
            print(json.dumps(results[-1]), flush=True)
    if not flags.json:
        print(table(results))
    if flags.save:
        for topology in dict.fromkeys(topologies):
            for path in save(run, topology, Path(flags.save), say):
                say(f"saved {path}, for {topology}")
