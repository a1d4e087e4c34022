# SPDX-License-Identifier: Apache-2.0
"""What a verb of the command line is, and what several of them do: find the run, and speak once."""

import argparse
import contextlib
import os
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax import hosts, recipe

Assignments = list[tuple[str, str]]


@dataclass(frozen=True)
class Verb:
    """A command: what it does, its own flags, and a function (arguments, recipe keys) → None.

    of_experiment: its first argument is an experiment file, whose keys may follow.
    """

    summary: str
    example: str
    act: Callable[[argparse.Namespace, Assignments], None]
    flags: Callable[[argparse.ArgumentParser], None]
    of_experiment: bool = True
    caches: bool = True  # what it compiles is worth keeping; JAX loads before `act`, to be told


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """The flag of verbs that read or write a run."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's directory")


def folder(key: str, text: str) -> Path:
    """A folder that was typed. Errors: ValueError where it cannot be one, as for buckets."""
    from lmjax.data import local_folder

    return local_folder(key, text)


def load_run(arguments: argparse.Namespace, keys: Assignments) -> Any:
    """The run of an experiment file with the keys that were typed. Errors: ValueError."""
    run = recipe.load(arguments.experiment, arguments.tiny)
    _check_flags(arguments, keys, run)
    return recipe.override(run, keys)


def _check_flags(arguments: argparse.Namespace, keys: Assignments, run: Any) -> None:
    """Raises ValueError for a key that looks more like a flag of the verb than like a key."""
    names = [f.name for f in recipe.fields(run)]
    typed = {"source": "from", "target": "to"}  # `from` is no name in Python
    flags = [typed.get(n, n) for n in vars(arguments) if n not in ("verb", "experiment")]
    for key, _ in keys:
        near = recipe.nearest(key, [*names, *flags])
        if key not in names and near in flags:
            raise ValueError(f"unknown key --{key}; did you mean --{near}?")


def load_recorded(arguments: argparse.Namespace, keys: Assignments) -> Any:
    """The experiment as the run directory recorded it, then the keys that were typed."""
    from lmjax.checkpoint import saved_recipe
    from lmjax.workdir import recorded_run, refuse_edited_recipe

    run = recipe.load(arguments.experiment, arguments.tiny)
    _check_flags(arguments, keys, run)
    workdir = folder("workdir", arguments.workdir)
    recorded = recorded_run(workdir)
    refuse_edited_recipe(workdir, *saved_recipe(workdir))
    for part in ("model", "loss"):
        mine = recipe.to_json(getattr(run, part))
        kind = mine.get("class", mine.get("function"))
        theirs = recorded[part].get("class", recorded[part].get("function"))
        if kind != theirs:
            raise ValueError(
                f"{arguments.workdir} holds a run with {part} {theirs}, "
                f"{arguments.experiment} has {kind}: another experiment file"
            )
    return recipe.override(recipe.from_json(run, recorded), keys)


def about(arguments: argparse.Namespace) -> dict[str, str]:
    """Name and description of an experiment file, for the records of a run."""
    bound = runpy.run_path(arguments.experiment)
    name = Path(arguments.experiment).stem + (" (tiny)" if arguments.tiny else "")
    return {"name": name, "description": (bound.get("__doc__") or "").strip()}


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes only the first is heard."""
    if hosts.is_first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
