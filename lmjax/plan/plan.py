# SPDX-License-Identifier: Apache-2.0
"""Fit, speed and price of a recipe on TPUs that nobody has rented yet.

Each answer says what it rests on: "compiler" is exact, or adds up what the compiler estimates;
"roofline" divides by the peaks of the chip; "line" goes through two compilations.
"""

import math
from collections.abc import Sequence
from typing import Any

from lmjax.plan import chips, memory
from lmjax.plan.facts import Facts, Say, find
from lmjax.plan.predict import Times, roofline, times

from lmjax import sharding  # isort: skip
from lmjax.attention import causal_share
from lmjax.run import Run, replace
from lmjax.sharding import Layout

Result = dict[str, Any]


def check(run: Run, topology: str, any_mesh: bool = False) -> None:
    """Whether a run can be planned for a topology; at once, before anything is compiled.

    Args:
      any_mesh: whatever mesh the run names, another will be looked for.

    Raises:
      ValueError: the topology, or a mesh or batch that it cannot have.
    """
    devices = chips.devices(topology)
    if not any_mesh:
        with sharding.use(run.mesh.mesh(devices)):
            run.check()


def plan(
    run: Run, topology: str, price: float | None = None, largest: bool = True, say: Say = print
) -> Result:
    """What `train` would need and take on a topology; compiles each phase, and once more smaller.

    Args:
      price: dollars per chip and hour; default: the table's, which is a list price.
      largest: also find the largest batch that fits, for one more compilation.
      say: told before each compilation, which takes minutes.

    Raises:
      ValueError: the topology, or a mesh or batch that it cannot have.
    """
    chip, torus = chips.split_name(topology)
    check(run, topology)
    count = len(chips.devices(topology))
    on_it = replace(run, mesh=Layout(*run.mesh.sizes(count)))
    phases = [_phase(on_it, topology, phase, say) for phase in range(len(run.makers()))]
    first = phases[0]
    result = {
        "topology": topology,
        "chips": math.prod(torus),
        "devices": count,
        "mesh": {name: getattr(on_it.mesh, name) for name in sharding.AXES},
        "batch": run.batch,
        "accumulate": run.accumulate,
        "remat": getattr(run.model, "remat", None),
        "hbm_bytes": chip.memory,
        **first,
        "fits": all(phase["fits"] for phase in phases),
        "peak_hbm_bytes": max(phase["peak_hbm_bytes"] for phase in phases),
    }
    if len(phases) > 1:
        result["phases"] = phases
    if largest:
        result |= _largest(on_it, topology, first, chip.memory, say)
    return result | _cost(run, phases, math.prod(torus), chip.price if price is None else price)


def _phase(run: Run, topology: str, phase: int, say: Say) -> Result:
    """One phase of a run on one topology. What surely does not fit is not compiled: that would
    take longer the larger it is.
    """
    found: Result = {"examples_length": run.makers()[phase].length}
    unknown = dict.fromkeys(("step_seconds", "mfu", "tokens_per_second"))
    rests = memory.resting_bytes(run, topology, phase)
    least = memory.least(run, topology, phase)
    if least > chips.split_name(topology)[0].memory:
        found |= {"fits": False, "peak_hbm_bytes": least, "memory_from": "line"}
        known = {"parameters_bytes": rests.parameters, "optimizer_bytes": rests.optimiser}
        return found | known | unknown
    facts = find(run, topology, phase, say)
    found |= _memory(facts, topology)
    if not found["fits"]:
        return found | unknown
    return found | _speed(run, topology, facts, phase)


def _memory(facts: Facts, topology: str) -> Result:
    """Bytes of one device."""
    found: Result = {
        "fits": facts.compiled and facts.peak <= chips.split_name(topology)[0].memory,
        "peak_hbm_bytes": facts.peak,
        "memory_from": "compiler",
        "parameters_bytes": facts.parameters,
        "optimizer_bytes": facts.optimiser,
    }
    if facts.compiled:
        rest = facts.arguments - facts.parameters - facts.optimiser
        found |= {
            "batch_and_padding_bytes": max(0, rest),
            "temporaries_bytes": facts.temporaries,
            "compile_seconds": facts.seconds,
        }
    return found


def _speed(run: Run, topology: str, facts: Facts, phase: int) -> Result:
    chip, torus = chips.split_name(topology)
    maker = run.makers()[phase]
    tokens = run.batch_sizes()[phase] * maker.length
    flops = run.model.flops_per_token(maker.length) * tokens / math.prod(torus)
    if facts.cycles is not None:
        causal = not hasattr(maker, "masks")
        seen = causal_share(maker.length, run.mesh.sequence) if causal else 1.0
        found: Times = times(facts, topology, seen, flops)
        low, step, high = found.low, found.step, found.high
        parts = {
            "step_from": "compiler",
            "compute_seconds": found.compute,
            "kernel_seconds": found.kernels,
            "transfer_seconds": sum(found.transfers.values()),
            "collectives": _collectives(facts),
        }
    else:  # the compiler could not write the program down
        low, high = roofline(flops, facts.peak, chip)
        step, parts = math.sqrt(low * high), {"step_from": "roofline"}
    return {
        "step_seconds": step,
        "step_seconds_low": low,
        "step_seconds_high": high,
        **parts,
        "mfu": flops / (step * chip.flops),
        "tokens_per_second": tokens / step,
    }


def _collectives(facts: Facts) -> list[Result]:
    """By kind and axes: how many a step, and bytes at full size."""
    found: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for kind, axes, size, _, executions in facts.collectives:
        sums = found.setdefault((kind, axes), [0, 0])
        sums[0] += executions
        sums[1] += executions * size
    return [
        {"kind": kind, "axes": list(axes), "count": count, "bytes": size}
        for (kind, axes), (count, size) in sorted(found.items())
    ]


def _largest(run: Run, topology: str, first: Result, room: int, say: Say) -> Result:
    """The largest batch that fits, on a line through the peaks of two that were compiled."""
    unit = run.mesh.data * run.mesh.fsdp * run.accumulate
    none: Result = {"largest_batch": None, "largest_batch_from": "line"}
    known = {run.batch: first} if first["memory_from"] == "compiler" else {}
    # Far below what does not fit: halving it would compile the largest programs first.
    start = run.batch if first["fits"] else _likely(run, topology, room)
    while len(known) < 2 or not any(found["fits"] for found in known.values()):
        smaller = min([*(n // 2 for n in known), start]) // unit * unit
        if smaller in known:
            smaller = smaller // 2 // unit * unit
        other = smaller or (max(known) + unit if known and first["fits"] else 0)
        if not other or other in known:
            return none
        known[other] = _phase(replace(run, batch=other), topology, 0, say)
        if known[other]["memory_from"] != "compiler":
            return none
    (less, low), (more, high) = sorted(known.items())[-2:]
    slope = (high["peak_hbm_bytes"] - low["peak_hbm_bytes"]) / (more - less)
    if slope <= 0:
        return none
    most = less + (room - low["peak_hbm_bytes"]) / slope
    return {
        "largest_batch": int(most // unit * unit),
        "largest_batch_from": "line",
        "activations_bytes": int(slope * run.batch),
    }


def _likely(run: Run, topology: str, room: int) -> int:
    """A batch that fits with room to spare, by what its rows leave for the backward pass."""
    rests = memory.resting_bytes(run, topology)
    a_row = memory.line(run, topology) - rests.always - rests.gradients
    spare = 0.5 * (room - rests.always - rests.gradients)
    return int(max(0.0, spare) * run.batch / max(1, a_row))


def _cost(run: Run, phases: Sequence[Result], count: int, price: float | None) -> Result:
    """Hours and dollars of the whole run; a batch that grows is paid by its tokens."""
    if any(phase["step_seconds"] is None for phase in phases):
        return {"hours": None, "cost": None, "price_per_chip_hour": price}
    tokens = [0, 0]
    steps = [*(stage.first_step for stage in run.plan().stages[1:]), run.steps]
    for stage, end in zip(run.plan().stages, steps, strict=True):
        tokens[stage.phase] += (end - stage.first_step) * stage.size * stage.example_tokens
    rates = [phase["tokens_per_second"] for phase in phases]
    hours = sum(n / rate for n, rate in zip(tokens, rates, strict=False)) / 3600
    return {
        "hours": hours,
        "cost": None if price is None else hours * count * price,
        "price_per_chip_hour": price,
    }
