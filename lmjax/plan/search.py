# SPDX-License-Identifier: Apache-2.0
"""Which mesh, remat policy, microbatches and unrolling a recipe wants on a topology.

Every combination that `train` accepts is ranked without a compiler: a line says what cannot fit
(`memory.py`), a roofline what is slow. The compiler then sees a few: the first of them, and around
the fastest so far its neighbours, one thing changed at a time.
"""

import dataclasses
import math
from typing import Any, get_args, get_type_hints

from lmjax.plan import chips, memory, roofline
from lmjax.plan.facts import Crashed, Say, described
from lmjax.plan.plan import Result, plan

from lmjax.run import Run, replace  # isort: skip
from lmjax.sharding import AXES, Layout

_UNROLLED = 4  # layers of one iteration of the loop, at most: compiling takes that much longer
_ROOM = 0.9  # of the memory: the compiler holds temporaries beside what the line counts
_MESHES = 2  # the first by the roofline that are compiled, beside the plainest


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a recipe, with what is expected of it before it is compiled.

    Attributes:
      seconds: of the whole run, by the roofline.
      memory: bytes of one device, by the line.
    """

    run: Run
    seconds: float
    memory: int


@dataclasses.dataclass(frozen=True)
class Considered:
    """What became of all combinations.

    Attributes:
      ranked: those that may fit, fastest first; of a mesh and policy, the fewest microbatches.
      refused: how many `train` refuses; `reason` is why, of the first.
      large: how many do not fit by the line.
    """

    ranked: list[Candidate]
    refused: int
    large: int
    reason: str


def search(
    run: Run, topology: str, price: float | None = None, most: int = 6, say: Say = print
) -> list[Result]:
    """Plans of the combinations that were compiled, at most `most`, fastest first; beside what
    `plan` says: "rank", "unroll", "line" and "model_line" (for the experiment file), "flags", and
    what was expected.

    Raises:
      ValueError: the topology, or no combination that `train` accepts, that fits by the line and
        that the compiler survives.
    """
    considered = consider(run, topology)
    say(
        f"{topology}: {len(considered.ranked)} combinations may fit, {considered.large} do not by "
        f"the line, {considered.refused} are refused; compiling at most {most}"
    )
    if not considered.ranked:
        why = "it fits none of them, by the line" if considered.large else considered.reason
        raise ValueError(f"--search: no mesh of {topology} takes this recipe: {why}")
    tried: dict[str, tuple[Run, Result]] = {}
    crashed: dict[str, str] = {}

    def attempt(one: Run) -> None:
        name = described(one)
        if len(tried) == most or name in tried or name in crashed:
            return
        try:
            found = plan(one, topology, price, largest=False, say=say)
        except Crashed as error:
            crashed[name] = str(error)
            say(f"left out: {error}")
        else:
            tried[name] = one, found | _told(run, one, topology)

    def best() -> Run:
        return min(tried.values(), key=lambda pair: _slowness(pair[1]))[0]

    for candidate in considered.ranked:
        if not tried:
            attempt(candidate.run)
    if not tried:
        raise Crashed(next(iter(crashed.values())))
    while len(tried) < most and not any(found["fits"] for _, found in tried.values()):
        smaller = _more_parts(list(tried.values())[-1][0], topology)
        if smaller is None:
            break
        attempt(smaller)
    for neighbours in (_other_policies, _other_meshes, _unrolled, _smaller_parts):
        for one in neighbours(best(), considered.ranked, topology):
            attempt(one)
    found = sorted((found for _, found in tried.values()), key=_slowness)
    return [{"rank": rank, **one} for rank, one in enumerate(found, 1)]


def _slowness(found: Result) -> tuple[bool, float]:
    return not found["fits"], found["hours"] or math.inf


def _told(run: Run, one: Run, topology: str) -> Result:
    """What a combination is called, how to choose it, and what was expected of it."""
    return {
        "unroll": getattr(one.model, "unroll", None),
        "line": _experiment_line(run, one),
        "model_line": _model_line(run, one),
        "flags": _flags(run, one),
        "line_bytes": max(memory.line(one, topology, p) for p in range(len(one.makers()))),
        "roofline_seconds": roofline.step_seconds(one, topology),
    }


# --- combinations ---------------------------------------------------------------------------------


def consider(run: Run, topology: str) -> Considered:
    """Every combination for a recipe; compiles none.

    Raises:
      ValueError: the topology.
    """
    ranked, refused, large, reason = [], 0, 0, ""
    room = _ROOM * chips.split_name(topology)[0].memory
    sequence = max(1, run.mesh.sequence)
    for layout in layouts(len(chips.devices(topology)), sequence):
        for policy in _policies(run):
            for parts in _parts(run, layout):
                one = _variant(run, layout, policy, parts)
                try:
                    needed = max(memory.line(one, topology, p) for p in range(len(one.makers())))
                except ValueError as error:
                    refused, reason = refused + 1, reason or str(error)
                    continue
                if needed > room:
                    large += 1
                    continue
                ranked.append(Candidate(one, roofline.run_seconds(one, topology), needed))
                break  # more microbatches only send more
    ranked.sort(key=lambda candidate: candidate.seconds)
    return Considered(ranked, refused, large, reason)


def layouts(devices: int, sequence: int = 1) -> list[Layout]:
    """All meshes of so many devices that split each row's tokens in `sequence` parts."""
    left = devices // sequence if devices % sequence == 0 else 0
    sizes = [n for n in range(1, left + 1) if left % n == 0]
    return [
        Layout(left // (fsdp * tensor), fsdp, tensor, sequence)
        for tensor in sizes
        for fsdp in sizes
        if left % (fsdp * tensor) == 0
    ]


def _policies(run: Run) -> tuple[str | None, ...]:
    if not hasattr(run.model, "remat"):
        return (None,)
    return get_args(get_type_hints(type(run.model))["remat"])


def _parts(run: Run, layout: Layout) -> list[int]:
    """Numbers of microbatches: the powers of two that leave every device rows."""
    rows = max(run.batch_sizes()) // (layout.data * layout.fsdp)
    return [2**n for n in range(max(rows, 1).bit_length())]


def _variant(run: Run, layout: Layout, policy: str | None, parts: int) -> Run:
    model = run.model if policy is None else run.model.clone(remat=policy)
    return replace(_with_parts(run, parts), model=model, mesh=layout)


def _with_parts(run: Run, parts: int) -> Run:
    second = run.phase2 and replace(run.phase2, accumulate=0)
    return replace(run, accumulate=parts, phase2=second)


# --- neighbours -----------------------------------------------------------------------------------


def _other_policies(best: Run, ranked: list[Candidate], _: str) -> list[Run]:
    return [candidate.run for candidate in ranked if candidate.run.mesh == best.mesh]


def _other_meshes(best: Run, ranked: list[Candidate], _: str) -> list[Run]:
    """The next by the roofline, and the plainest, which sends gradients alone."""
    policy = getattr(best.model, "remat", None)
    alike = [c.run for c in ranked if getattr(c.run.model, "remat", None) == policy]
    plain = [run for run in alike if run.mesh.fsdp == run.mesh.tensor == 1]
    return [*alike[:_MESHES], *plain]


def _unrolled(best: Run, ranked: list[Candidate], _: str) -> list[Run]:
    """With several layers in an iteration of the loop over them, where a model has such a key."""
    depth = getattr(best.model, "depth", 1)
    layers = max(n for n in range(1, _UNROLLED + 1) if depth % n == 0)
    if not hasattr(best.model, "unroll") or layers == 1:
        return []
    return [replace(best, model=best.model.clone(unroll=layers))]


def _smaller_parts(best: Run, ranked: list[Candidate], topology: str) -> list[Run]:
    smaller = _more_parts(best, topology)
    return [smaller] if smaller else []


def _more_parts(run: Run, topology: str) -> Run | None:
    """With twice the microbatches; None where the batch has no more rows."""
    more = _with_parts(run, 2 * run.accumulate)
    try:
        memory.resting_bytes(more, topology)
    except ValueError:
        return None
    return more


# --- words ----------------------------------------------------------------------------------------


def _run_changes(run: Run, one: Run) -> list[tuple[str, Any]]:
    """Keys of the recipe, beside the mesh and inside no other key, that a combination sets."""
    return [("accumulate", one.accumulate)] if one.accumulate != run.accumulate else []


def _model_changes(run: Run, one: Run) -> list[tuple[str, Any]]:
    pairs = [(name, getattr(one.model, name, None)) for name in ("remat", "unroll")]
    return [(name, value) for name, value in pairs if value != getattr(run.model, name, None)]


def _sizes(one: Run) -> list[tuple[str, int]]:
    """The axes of a mesh: the first two, and what else is not 1."""
    sizes = [(axis, getattr(one.mesh, axis)) for axis in AXES]
    return sizes[:2] + [(axis, size) for axis, size in sizes[2:] if size > 1]


def _experiment_line(run: Run, one: Run) -> str:
    """What to write into Run(…) of the experiment file."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in _sizes(one))
    mesh = f"mesh=Layout({sizes})"
    return ", ".join([mesh, *(f"{key}={value}" for key, value in _run_changes(run, one))])


def _model_line(run: Run, one: Run) -> str:
    """What to write into its model."""
    quoted = [(key, f'"{v}"' if isinstance(v, str) else v) for key, v in _model_changes(run, one)]
    return ", ".join(f"{key}={value}" for key, value in quoted)


def _flags(run: Run, one: Run) -> str:
    """The same on the command line."""
    found: list[tuple[str, Any]] = [(f"mesh.{axis}", size) for axis, size in _sizes(one)]
    found += _run_changes(run, one)
    found += [(f"model.{key}", value) for key, value in _model_changes(run, one)]
    if run.phase2 and run.phase2.accumulate:
        found.append(("phase2.accumulate", 0))
    return " ".join(f"--{key}={value}" for key, value in found)
