# SPDX-License-Identifier: Apache-2.0
"""What is known of a train step once it is compiled, as JSON; kept, so that it is compiled once.

What was kept is found by the program that goes into the compiler, not by the recipe: the same
program has the same answer whatever code wrote it, and another program never has it.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from lmjax.plan import crashes, kept
from lmjax.plan.hlo import Op

from lmjax.plan.program import Program, Step, TooLarge, compile_step, lower_step  # isort: skip

import jax
import numpy as np

from lmjax import sharding
from lmjax.run import Run

Say = Callable[[str], None]
# Products of attention per kernel: scores and values forward; five in the fused backward pass.
_PRODUCTS = {"fwd": 2, "dkv": 5, "dq": 3}


class Crashed(ValueError):
    """The compiler cannot compile a program that is not at fault."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one device and step, except where it is said otherwise.

    Attributes:
      peak: bytes in memory; of a program without room, what the compiler would need.
      compiled: whether it is a program, which the compiler found room for.
      parameters, optimiser: bytes that rest; the second with what a recurrent model carries.
      arguments, temporaries: bytes, by the compiler.
      cycles: estimated, without kernels and transfers; None where no program was written down.
      kernels: (FLOPs on all pairs of positions, width of a head, executions) of attention's.
      collectives: (kind, mesh axes, bytes at full size, devices of a group, executions).
      seconds: that compiling took.
    """

    peak: int
    compiled: bool
    parameters: int
    optimiser: int
    arguments: int = 0
    temporaries: int = 0
    cycles: int | None = None
    kernels: tuple[tuple[float, int, int], ...] = ()
    collectives: tuple[tuple[str, tuple[str, ...], int, int, int], ...] = ()
    seconds: float = 0.0


def find(run: Run, topology: str, phase: int, say: Say) -> Facts:
    """Of a phase of a run on a topology, from what is kept or from the compiler, which takes
    minutes and is announced.

    Raises:
      Crashed: the compiler ended its process over this program before.
      ValueError: the topology, or a mesh or batch that it cannot have.
    """
    step = lower_step(run, topology, phase)
    key = kept.key(topology, step.places, step.text)
    if (found := kept.read(key)) is not None:
        if crash := found.get("crash"):
            raise Crashed(
                f"{topology}, {described(run)}: this TPU compiler ends with {crash} on this"
                " program; choose another mesh, batch or --model.remat, or another version of"
                f" libtpu (to try again: rm {kept.path(key)})"
            )
        return from_json(found)
    rows, length = run.batch_sizes()[phase], run.makers()[phase].length
    say(f"compiling for {topology}, batch {rows:,} × {length}, {described(run)} …")
    with crashes.compiling(key):
        facts = compiled_facts(step)
    kept.write(key, dataclasses.asdict(facts))
    return facts


def described(run: Run) -> str:
    """The mesh and what else a search varies, in a few words."""
    parts = [f"{axis} {getattr(run.mesh, axis)}" for axis in sharding.AXES]
    if getattr(run.model, "remat", None):
        parts.append(f"remat {run.model.remat}")
    if getattr(run.model, "unroll", 0) > 1:
        parts.append(f"unroll {run.model.unroll}")
    return ", ".join([*parts, f"accumulate {run.accumulate}"])


def from_json(found: dict[str, Any]) -> Facts:
    """What `dataclasses.asdict` made of them, after JSON."""
    kernels = tuple((flops, width, times) for flops, width, times in found["kernels"])
    sent = tuple((kind, tuple(axes), *rest) for kind, axes, *rest in found["collectives"])
    return Facts(**{**found, "kernels": kernels, "collectives": sent})


def compiled_facts(step: Step) -> Facts:
    """By compiling."""
    parameters = resting(step.state.params)
    optimiser = resting((step.state.opt_state, step.state.carry))
    try:
        program = compile_step(step)
    except TooLarge as error:
        return Facts(error.needed, False, parameters, optimiser)
    return Facts(
        peak=program.peak_bytes,
        compiled=True,
        parameters=parameters,
        optimiser=optimiser,
        arguments=program.memory.argument_size_in_bytes,
        temporaries=program.memory.temp_size_in_bytes,
        cycles=program.cycles if program.text else None,
        kernels=tuple(kernel(op) for op in program.kernels()),
        collectives=_collectives(program),
        seconds=round(program.seconds, 1),
    )


def resting(tree: Any) -> int:
    """Bytes of a device's parts of arrays, or of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def _collectives(program: Program) -> tuple[tuple[str, tuple[str, ...], int, int, int], ...]:
    sums: dict[tuple[str, tuple[str, ...], int, int], int] = {}
    for c in program.collectives():
        if c.devices > 1:
            alike = (c.kind, c.axes, c.bytes, c.devices)
            sums[alike] = sums.get(alike, 0) + c.times
    return tuple((*alike, times) for alike, times in sorted(sums.items()))


def kernel(op: Op) -> tuple[float, int, int]:
    """FLOPs of one execution of an attention kernel on all pairs of its queries and keys, which are
    its first operands; the width of a head; executions.
    """
    named = re.search(r"%([\w.\-]+) =", op.text)
    name = named[1] if named else ""
    products = next((n for part, n in _PRODUCTS.items() if f"_{part}" in name), 0)
    operands = re.findall(
        r"\b(?:bf16|f16|f32)\[([\d,]+)\]", op.text.partition("operand_layout_constraints=")[2]
    )
    if not products or len(operands) < 2:
        return 0.0, 0, op.times
    query, key = ([int(n) for n in dims.split(",")] for dims in operands[:2])
    *rows, length, width = query
    return products * 2.0 * math.prod(rows) * length * key[-2] * width, width, op.times
