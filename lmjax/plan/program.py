# SPDX-License-Identifier: Apache-2.0
"""Compiles the real train step of a recipe with the real TPU compiler, on a machine without a TPU.

libtpu compiles for a topology that is only named. What it answers exactly: memory, aliasing, and
the operations and collectives of the program. Its cycle estimates rank variants of one program;
they leave out kernels (Mosaic) and the time on the wires, and are no measured speed.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax.plan import chips, hlo  # first: it sets what libtpu reads  # isort: skip

import jax
from jax.sharding import Mesh

from lmjax import programs, sharding
from lmjax.compilation import without_cache
from lmjax.plan.hlo import Collective, Op
from lmjax.run import Run
from lmjax.step import State, abstract_state


class TooLarge(Exception):
    """The compiler found no room: `needed` and `available` bytes of a device's memory."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"{needed:,} bytes needed, {available:,} available")
        self.needed, self.available = needed, available


class Program:
    """A compiled train step: what it keeps in memory, computes and sends.

    Attributes:
      step: what was compiled.
      text: the program, or "" where the compiler cannot write it down.
      seconds: that compiling took.
    """

    def __init__(self, compiled: Any, step: "Step", seconds: float) -> None:
        self.memory, self.step, self.seconds = compiled.memory_analysis(), step, seconds
        self.topology, self.state = step.topology, step.state
        try:
            self.text = compiled.as_text()
        except Exception:  # libtpu fails its own check on some programs for v6e
            self.text = ""
        ops = hlo.operations(self.text) if self.text else []
        self.ops = [op for op in ops if not op.fused]
        self._collectives = hlo.collectives(ops, dict(step.mesh.shape))

    @property
    def peak_bytes(self) -> int:
        """Arguments, results that are not arguments, and temporaries: all that a device holds."""
        m = self.memory
        total = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return total + m.temp_size_in_bytes

    @property
    def cycles(self) -> int:
        """Estimated, of a step without kernels and transfers."""
        return hlo.cycles(self.ops)

    @property
    def compute_seconds(self) -> float:
        """The time that they take."""
        return self.cycles / chips.split_name(self.topology)[0].clock

    def kernels(self) -> list[Op]:
        """Mosaic kernels, such as splash attention."""
        return [op for op in self.ops if 'custom_call_target="tpu_custom_call"' in op.text]

    def collectives(self, kind: str = "") -> list[Collective]:
        """Everything that devices send each other, or one kind of it."""
        return [c for c in self._collectives if c.kind.startswith(kind)]

    def buffers(self, dtype: str) -> set[tuple[int, ...]]:
        """Dimensions of all results of one dtype that lie in memory."""
        return {dims for op in self.ops for found, dims in op.shapes if found == dtype}


@dataclass(frozen=True)
class Step:
    """A train step as it goes into the compiler.

    Attributes:
      state: shapes and shardings of the state before and after.
      mesh: what it is laid out on.
      lowered: the program, for `compiled`.
    """

    topology: str
    state: State
    mesh: Mesh
    lowered: Any

    @property
    def text(self) -> str:
        """The program that the compiler is given."""
        return self.lowered.as_text()

    @property
    def places(self) -> list[int]:
        """Which device of the topology stands where on the mesh."""
        return [device.id for device in self.mesh.devices.flat]


def lower_step(run: Run, topology: str, phase: int = 0) -> Step:
    """The train step of a phase of `run`, as `train` builds it, for a TPU topology; seconds.

    Raises:
      ValueError: the topology, or the mesh and batch on it.
    """
    with sharding.use(run.mesh.mesh(chips.devices(topology))) as mesh:
        run.check()
        rows = run.batch_sizes()[phase]
        state = abstract_state(run.model, run.optimiser(), rows)
        lowered = programs.lower(run, phase, state, programs.batch_shapes(run, phase, rows))
    return Step(topology, state, mesh, lowered)


def compile_step(step: Step, options: dict[str, Any] | None = None) -> Program:
    """Compiled, which takes minutes.

    Raises:
      TooLarge: it does not fit.
    """
    began = time.monotonic()
    with sharding.use(step.mesh), without_cache():
        return Program(compiled(step.lowered, options), step, time.monotonic() - began)


def save(run: Run, topology: str, folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Writes every step of a run, compiled for a TPU topology, for `train` to load on one.

    Raises:
      ValueError: as `compile_step`; or the folder is not the user's alone.
    """
    with sharding.use(run.mesh.mesh(chips.devices(topology))):
        return programs.save(run, folder, say)


# How the compiler says so: of everything, or of what a program needs beside its arguments.
_NO_ROOM = (
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compiled(lowered: Any, options: dict[str, Any] | None) -> Any:
    """`lowered`, compiled. Errors: TooLarge where the compiler finds no room."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        found = next(filter(None, (re.search(form, str(error)) for form in _NO_ROOM)), None)
        if not found:
            raise
        needed, available = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
        raise TooLarge(needed, available) from None
