# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by Orbax, with the recipe and the shapes of all arrays as JSON beside them.

The only file that names Orbax. A step is a directory `checkpoints/<step>`, which appears whole or
not at all; what a restore finds must have exactly the shapes and dtypes that the model wants.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lmjax import sharding
from lmjax.step import State

_policies = ocp.training.preservation_policies
Say = Callable[[str], None]


class Checkpoints:
    """The checkpoints of one run, saved in the background."""

    def __init__(self, workdir: Path, recipe: Any, keep: int, say: Say) -> None:
        """`recipe` is the JSON to record; `keep` newest steps stay; `say` reports what is safe."""
        _quiet()
        self._recipe, self._say = recipe, say
        self._manager = ocp.training.Checkpointer(
            str(folder(workdir)),
            preservation_policy=_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=jax.process_index() == 0,
        )
        self._pending: tuple[int, Any] | None = None

    def latest(self) -> int | None:
        """The newest step on disk."""
        newest = self._manager.latest
        return None if newest is None else int(newest.step)

    def restore(self, target: State) -> State:
        """The newest state, with the shardings of `target`.

        Raises:
          ValueError: an array of the checkpoint is missing, extra, or of another shape or dtype.
        """
        step = self.latest()
        assert step is not None, "restore is called where a step exists"
        metadata: Any = self._manager.metadata(step).custom_metadata
        check_shapes((metadata or {}).get("arrays"), _arrays(target), f"checkpoint {step}")
        return self._manager.load(step, target)

    def save(self, step: int, state: State) -> None:
        """Starts to save; the arrays are copied before this returns, so they may be donated."""
        self.finish()
        metadata = {"recipe": self._recipe, "arrays": _arrays(state)}
        answer = self._manager.save_async(step, state, force=True, custom_metadata=metadata)
        if answer is None:
            raise ValueError(f"step {step} was not saved: Orbax declined")
        self._pending = (step, answer)

    def check(self) -> None:
        """Says that a save is complete once it is, without waiting for it."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.finish()

    def finish(self) -> None:
        """Waits for the save under way, and only then says that it is saved."""
        if self._pending is not None:
            step, answer = self._pending
            self._pending = None
            if not answer.result():
                raise ValueError(f"step {step} was not saved: Orbax declined")
            self._say(f"saved step {step:,}")

    def close(self) -> None:
        """Finishes and lets go of the directory."""
        self.finish()
        self._manager.close()


def folder(workdir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return workdir.absolute() / "checkpoints"


def newest_step(workdir: Path) -> int | None:
    """The newest finished step of a run directory."""
    names = [p.name for p in folder(workdir).glob("*") if p.is_dir()]
    return max((int(n) for n in names if n.isdigit()), default=None)


def load_params(workdir: Path, target: Any) -> tuple[int, Any]:
    """(step, parameters) of the newest checkpoint, without its optimiser state.

    Raises:
      ValueError: there is no checkpoint, or its parameters are not those of `target`.
    """
    _quiet()
    step = newest_step(workdir)
    if step is None:
        raise ValueError(f"{workdir} holds no checkpoint yet; train first")
    path = str(folder(workdir) / str(step))
    metadata: Any = ocp.metadata(path).custom_metadata or {}
    stored = {k: v for k, v in (metadata.get("arrays") or {}).items() if k.startswith("params/")}
    check_shapes(stored, _arrays({"params": target}), f"checkpoint {path}")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return step, ocp.load(path, {"params": target})["params"]


def check_shapes(stored: Any, wanted: dict[str, Any], name: str) -> None:
    """Raises ValueError with every array that differs in presence, shape or dtype."""
    stored = stored or {}
    lines = [
        f"  {key}: checkpoint {_show(stored.get(key))}, model {_show(wanted.get(key))}"
        for key in sorted(set(stored) | set(wanted))
        if stored.get(key) != wanted.get(key)
    ]
    if lines:
        more = [f"  … and {len(lines) - 10} more"] if len(lines) > 10 else []
        head = f"{name} does not fit the model:"
        raise ValueError("\n".join([head, *lines[:10], *more]))


def _show(array: Any) -> str:
    return "nothing" if array is None else f"{array[1]}{array[0]}"


def _arrays(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_of(path): [list(x.shape), str(x.dtype)] for path, x in leaves}


def _quiet() -> None:
    for name in ("orbax", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
