# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, each with a sealed manifest and verified when it is read.

A step is a directory `checkpoints/<step>`, which appears whole or not at all; what a restore finds
must have exactly the shapes and dtypes that the model wants and the fingerprints that were saved.
Where the newest step is damaged, the newest one that verifies is taken; never none of them.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lmjax import disk, hosts, manifest, sharding
from lmjax.fingerprint import fingerprints, shards
from lmjax.hardware import devices_of
from lmjax.manifest import Damaged, Manifest
from lmjax.step import State
from lmjax.steps import (
    Retention,
    all_steps,
    clean,
    damaged_folders,
    folder,
    is_there,
    newest_in_words,
    newest_step,
    set_aside,
)

Say = Callable[[str], None]
_SLICE = 1 << 30  # bytes that `examine` holds at a time, unless one array is larger
_MISFIT = "misfit: "


class Checkpoints:
    """The checkpoints of one run, saved in the background."""

    def __init__(self, workdir: Path, recipe: Any, keep: int, say: Say) -> None:
        """`recipe` is the JSON to record; `keep` newest steps stay; `say` reports what is safe."""
        self._workdir, self._recipe, self._say = workdir, recipe, say
        self._pending: tuple[int, Any] | None = None
        self._retention = Retention(workdir, keep)
        if hosts.is_first():
            folder(workdir).mkdir(parents=True, exist_ok=True)
            clean(workdir)

    def latest(self) -> int | None:
        """The newest step on disk, the same on all processes.

        Raises:
          ValueError: there is none, but there were some.
        """
        return _newest_step(self._workdir)

    def restore(self, target: State) -> State:
        """The newest state that verifies, with the shardings of `target`.

        Damaged steps that are newer are set aside, each with a line.

        Raises:
          ValueError: an array of the checkpoint is missing, extra, or of another shape or dtype;
            or no step verifies.
        """
        _, state, damaged = _newest_good(self._workdir, target, self._say)
        for step, reason in damaged.items():
            if hosts.is_first():
                name = set_aside(self._workdir, step).name
                self._say(f"step {step:,} is damaged, {reason}: set aside as checkpoints/{name}")
        return state

    def save(self, step: int, state: State) -> None:
        """Starts to save; the arrays are copied before this returns, so they may be donated.

        Raises:
          ValueError: it cannot be saved, or the save before could not be finished.
        """
        self.finish()
        for path, _ in jax.tree_util.tree_leaves_with_path(state):
            for key in path:
                manifest.check_name(sharding.path_of((key,)))
        found = shards(state)
        if odd := found.odd_replicas():
            self._say(
                f"step {step:,}: replicas of {odd[0][0]} differ: {devices_of(odd)};"
                " --check_every=1 stops the run where they begin to"
            )
        arrays, prints = disk.arrays_of(state), found.fingerprints()
        content = manifest.seal(step, self._recipe, arrays, prints)
        try:
            answer = disk.start_save(folder(self._workdir) / str(step), state, content)
        except Exception as error:
            raise self._failed(step, error) from None
        self._pending = (step, answer)

    def check(self) -> None:
        """Says that a save is complete once it is, without waiting for it."""
        if self._pending is not None:
            with contextlib.suppress(TimeoutError):
                self._finish(timeout=0)

    def finish(self) -> None:
        """Waits for the save under way, and only then says that it is saved.

        Raises:
          ValueError: it failed; names the newest step that is there.
        """
        self._finish(timeout=None)

    def _finish(self, timeout: float | None) -> None:
        if self._pending is None:
            return
        step, answer = self._pending
        try:
            answer.result(timeout=timeout)
        except TimeoutError:
            if timeout == 0:
                raise
            self._pending = None
            raise self._failed(step, TimeoutError("it took too long")) from None
        except Exception as error:
            self._pending = None
            raise self._failed(step, error) from None
        self._pending = None
        self._say(f"saved step {step:,}")
        if hosts.is_first():
            self._retention.apply()

    def _failed(self, step: int, error: Exception) -> ValueError:
        if hosts.is_first():
            clean(self._workdir)
        way = "; make space, then start again" if "space" in disk.short(error).lower() else ""
        newest = newest_in_words(self._workdir)
        return ValueError(f"step {step:,} was not saved: {disk.short(error)}; {newest}{way}")

    def close(self) -> None:
        """Finishes and lets go of the directory."""
        try:
            self.finish()
        finally:
            self._retention.close()
            if hosts.is_first():  # a save that failed may have been written on until now
                clean(self._workdir)


def load_params(workdir: Path, target: Any, say: Say | None = None) -> tuple[int, Any]:
    """(step, parameters) of the newest checkpoint that verifies, without its optimiser state.

    Args:
      say: hears of steps that are damaged and passed over; by default standard error.

    Raises:
      ValueError: there is no checkpoint, its parameters are not those of `target`, or all are
        damaged.
    """
    say = say or (lambda line: print(line, file=sys.stderr) if hosts.is_first() else None)
    if _newest_step(workdir) is None:
        raise ValueError(f"{workdir} holds no checkpoint yet; train first")
    step, tree, damaged = _newest_good(workdir, {"params": target}, say)
    for other, reason in damaged.items():
        say(f"step {other:,} is damaged, {reason}: taking step {step:,}")
    return step, tree["params"]


@dataclass(frozen=True)
class Finding:
    """What `examine` found of a step: how many arrays and bytes, and what is wrong with it.

    reason: None where nothing is. verified: whether there are fingerprints at all.
    """

    arrays: int
    size: int
    reason: str | None
    verified: bool


def examine(workdir: Path, step: int) -> Finding:
    """Reads a whole step, some of its arrays at a time, and holds it against its manifest."""
    path = folder(workdir) / str(step)
    device = jax.local_devices(backend="cpu")[0]
    here = jax.sharding.SingleDeviceSharding(device)
    try:
        stored, tree = _described(path, step)
        leaves, form = jax.tree_util.tree_flatten_with_path(tree)
        wanted = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for _, x in leaves]
        size = sum(x.size * x.dtype.itemsize for x in wanted)
        for part in _slices([x.size * x.dtype.itemsize for x in wanted]):
            some = [x if i in part else None for i, x in enumerate(wanted)]
            found = disk.read(path, jax.tree.unflatten(form, some), partial=True)
            _compare(stored, found)
    except Damaged as error:
        return Finding(0, 0, str(error), True)
    return Finding(len(leaves), size, None, stored.fingerprints is not None)


def saved_recipe(workdir: Path) -> tuple[int, dict[str, Any]]:
    """(step, recipe as JSON) of the newest step whose manifest can be read; (0, {}) of none."""
    for step in reversed(all_steps(workdir)):
        with contextlib.suppress(Damaged):
            return step, _described(folder(workdir) / str(step), step)[0].recipe
    return 0, {}


def stored_fingerprints(workdir: Path, step: int) -> dict[str, str]:
    """Fingerprints by path as a step's manifest has them.

    Raises:
      ValueError: the manifest is damaged, or older than fingerprints.
    """
    try:
        found = _described(folder(workdir) / str(step), step)[0].fingerprints
    except Damaged as error:
        raise ValueError(f"step {step:,} of {workdir} is damaged, {error}") from None
    if found is None:
        raise ValueError(f"step {step:,} of {workdir} was saved without fingerprints")
    return found


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


def _newest_step(workdir: Path) -> int | None:
    newest, aside = hosts.of_first([newest_step(workdir), damaged_folders(workdir)])
    if newest is None and aside:
        raise ValueError(
            f"{folder(workdir)} holds only steps that were set aside ({', '.join(aside[:5])});"
            " bring back a good one, or move them away to start over"
        )
    return newest


def _newest_good(workdir: Path, target: Any, say: Say) -> tuple[int, Any, dict[int, str]]:
    """(step, tree, reasons by newer step) of the newest step that verifies.

    The first process lists the steps; all try the same ones.
    """
    tried: dict[int, str] = {}
    while True:
        steps = [s for s in hosts.of_first(all_steps(workdir)) if s not in tried]
        damaged = {s: why for s, why in tried.items() if is_there(workdir, s)}
        if not steps:
            lines = "".join(f"\n  step {s:,}: {why}" for s, why in damaged.items())
            raise ValueError(
                f"{folder(workdir)} holds steps, but all are damaged:{lines}\n"
                "Nothing was changed. Bring back a good one, or move them away to start over"
            )
        try:
            stored, tree = _verified(workdir, steps[-1], target)
        except Damaged as error:
            tried[steps[-1]] = str(error)
            continue
        if stored.fingerprints is None:
            say(f"step {steps[-1]:,} was saved without fingerprints: its values are not verified")
        return steps[-1], tree, damaged


def _verified(workdir: Path, step: int, target: Any) -> tuple[Manifest, Any]:
    """The manifest of a step, and of its arrays those of `target`.

    Each process reads alone, without waiting for others that may have failed; what one of them
    cannot read is damaged for all.

    Raises:
      ValueError: its arrays are not those of `target`.
      Damaged: they are not what was saved.
    """
    reason, stored, tree = "", None, None
    try:
        stored, tree = _matched(workdir, step, target)
    except Damaged as error:
        reason = str(error)
    except ValueError as error:
        reason = f"{_MISFIT}{error}"
    reason = next((r for r in hosts.gathered(reason) if r), "")
    if reason.startswith(_MISFIT):
        raise ValueError(reason[len(_MISFIT) :])
    if reason or stored is None:
        raise Damaged(reason)
    _compare(stored, tree)
    return stored, tree


def _matched(workdir: Path, step: int, target: Any) -> tuple[Manifest, Any]:
    """The manifest of a step, and of its arrays those of `target`, not yet verified."""
    path = folder(workdir) / str(step)
    stored, _ = _described(path, step)
    partial = isinstance(target, dict)
    arrays = stored.arrays
    if partial:
        arrays = {k: v for k, v in arrays.items() if k.split("/")[0] in target}
    name = f"checkpoint {path}" if partial else f"checkpoint {step}"
    check_shapes(arrays, disk.arrays_of(target), name)
    return stored, disk.read(path, target, partial)


def _compare(stored: Manifest, tree: Any) -> None:
    """Raises Damaged for arrays of `tree` that are not what was saved."""
    if stored.fingerprints is None:
        return
    found = fingerprints(tree)
    odd = [path for path, value in found.items() if stored.fingerprints[path] != value]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise Damaged(f"the values of {odd[0]}{more} are not those that were saved")


def _described(path: Path, step: int) -> tuple[Manifest, Any]:
    """The manifest of a step, and the tree of shapes and dtypes that is really stored.

    Raises:
      Damaged: one cannot be read, or they are not of each other.
    """
    content, tree = disk.describe(path)
    stored, arrays = manifest.opened(content, step), disk.arrays_of(tree)
    odd = [k for k in sorted({*arrays, *stored.arrays}) if arrays.get(k) != stored.arrays.get(k)]
    if odd:
        there, saved = (_show(x.get(odd[0])) for x in (arrays, stored.arrays))
        raise Damaged(f"of {odd[0]}, {there} is stored and {saved} was saved")
    return stored, tree


def _slices(sizes: list[int]) -> Iterator[set[int]]:
    """Consecutive indices whose sizes stay within a slice together."""
    part: set[int] = set()
    held = 0
    for index, size in enumerate(sizes):
        if part and held + size > _SLICE:
            yield part
            part, held = set(), 0
        part.add(index)
        held += size
    if part:
        yield part


def _show(array: Any) -> str:
    return "nothing" if array is None else f"{array[1]}{array[0]}"
