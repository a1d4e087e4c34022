# SPDX-License-Identifier: Apache-2.0
"""Compiles the real train step with the real TPU compiler, on a machine without a TPU.

libtpu compiles for a topology that is only named. What it answers exactly: memory, aliasing, and
the operations and collectives of the program. Its cycle estimates rank variants of one program;
they leave out kernels (Mosaic) and the time on the wires, and are no measured speed.
"""

import contextlib
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Read when libtpu loads, which the first topology makes happen: there is no metadata server to
# wait for, and several test processes compile at once.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_ID", "0")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from lmjax import sharding  # noqa: E402
from lmjax.run import Run  # noqa: E402
from lmjax.step import abstract_state, jit_train_step, make_train_step  # noqa: E402

MISSING = "no TPU compiler here: pip install 'lmjax[tpu-compile]'"
CLOCK_HZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_LOOP = ("condition", "body")


def installed() -> bool:
    """Whether libtpu, the package with the compiler, is here."""
    return importlib.util.find_spec("libtpu") is not None


@functools.cache
def devices(topology: str) -> list[Any]:
    """The devices of a topology such as "v5e:4x4", good for compiling only."""
    shape = [int(n) for n in topology.split(":")[1].split("x")]
    bounds = {} if math.prod(shape) > 1 else {"chips_per_host_bounds": [1, 1, 1]}
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds)
    return list(described.devices)


@dataclass(frozen=True)
class Op:
    """One operation of the compiled program.

    Attributes:
      times: executions per step, loops counted.
      shapes: (dtype, dimensions) of its results, per device.
      cycles: the compiler's estimate for one execution; 0 where it gives none.
      source: path of the traced operation that it came from.
      fused: a part of a fusion, whose result need not exist in memory.
    """

    kind: str
    times: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    cycles: int
    source: str
    fused: bool
    text: str


@dataclass(frozen=True)
class Collective:
    """A collective of the program.

    Attributes:
      bytes: of one execution, at full size: gathered, or before scattering.
      devices: how many take part in one group.
    """

    kind: str
    bytes: int
    times: int
    devices: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    source: str


class Program:
    """A compiled train step: what it keeps in memory, computes and sends."""

    def __init__(self, compiled: Any, topology: str) -> None:
        self.memory = compiled.memory_analysis()
        self.text = compiled.as_text()
        self._clock_hz = CLOCK_HZ[topology.split(":")[0]]
        computations, entry = _computations(self.text)
        ops = list(_walk(computations, entry, 1))
        self.ops = [op for op in ops if not op.fused]
        # The start of an asynchronous collective, the work beside it and its end are fusions that
        # all name it, under one chain.
        chains: dict[str, Collective] = {}
        for op in ops:
            if collective := _collective(op):
                chain = re.search(r'chain_id="(\d+)"', op.text) if op.fused else None
                chains.setdefault(chain[0] if chain else op.text, collective)
        self._collectives = list(chains.values())

    @property
    def peak_gib(self) -> float:
        """Arguments, results that are not arguments, and temporaries: all that a chip must hold."""
        m = self.memory
        total = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return (total + m.temp_size_in_bytes) / 2**30

    @property
    def milliseconds(self) -> float:
        """Estimated time of a step without kernels and transfers."""
        return 1e3 * sum(op.cycles * op.times for op in self.ops) / self._clock_hz

    def kernels(self) -> list[Op]:
        """Mosaic kernels, such as splash attention."""
        return [op for op in self.ops if 'custom_call_target="tpu_custom_call"' in op.text]

    def collectives(self, kind: str = "") -> list[Collective]:
        """Everything that devices send each other, or one kind of it."""
        return [c for c in self._collectives if c.kind.startswith(kind)]

    def buffers(self, dtype: str) -> set[tuple[int, ...]]:
        """Dimensions of all results of one dtype that lie in memory."""
        return {dims for op in self.ops for found, dims in op.shapes if found == dtype}


def bytes_of(dtype: str, dims: tuple[int, ...]) -> int:
    """Bytes of an array, without the padding of its layout."""
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(dims) * bits // 8


def _collective(op: Op) -> Collective | None:
    kind = next((k for k in _COLLECTIVES if op.kind in (k, f"{k}-start")), None)
    if kind is None:
        return None
    sizes = [bytes_of(*shape) for shape in op.shapes]
    devices = _group_size(op.text)
    # An asynchronous start returns operand and result; the larger is the full size.
    size = max(sizes) if op.kind.endswith("-start") else sum(sizes)
    if kind == "reduce-scatter":
        size *= devices
    return Collective(kind, size, op.times, devices, op.shapes, op.source)


def _group_size(text: str) -> int:
    """Devices in one group of a collective; groups are listed, or named by the axes of a mesh."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(counted[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return listed[1].count(",") + 1 if listed else 1


def compile_step(run: Run, topology: str, options: dict[str, Any] | None = None) -> Program:
    """The train step of `run`, as `train` builds it, compiled for a TPU topology."""
    with sharding.use(run.mesh.mesh(devices(topology))):
        optimiser = run.optimiser()
        state = abstract_state(run.model, optimiser, run.batch)
        step = make_train_step(
            run.model, run.loss, optimiser, run.schedule(), run.seed, run.accumulate
        )
        jitted = jit_train_step(step, state)
        with _no_cache():
            compiled = jitted.lower(state, _batch(run)).compile(compiler_options=options)
    return Program(compiled, topology)


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Without JAX's compilation cache, whose programs need a device to be read back."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def _batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of the run, as its example maker lays it out."""
    maker, rows = run.data.examples, sharding.batch_sharding()
    if hasattr(maker, "streams"):
        return _words(run.batch, maker, rows)
    if not hasattr(maker, "masks"):
        names = ("tokens_BL", "targets_BL", "segments_BL", "positions_BL", "weights_BL")
    else:
        names = ("tokens_BL", "segments_BL", "masked_BP", "targets_BP", "weights_BP")
        names += ("types_BL",) * maker.typed
        names += ("firsts_BC", "pairs_BC", "pair_weights_BC") * maker.paired
    columns = {"BL": maker.length, "BC": 1}
    if hasattr(maker, "masks"):
        columns["BP"] = maker.masks.slots(maker.length)
    return {
        name: jax.ShapeDtypeStruct(
            (run.batch, columns[name[-2:]]),
            jnp.float32 if "weights" in name else jnp.int32,
            sharding=rows,
        )
        for name in names
    }


def _words(batch: int, maker: Any, rows: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of both directions' words."""
    both = (batch, 2, maker.length)
    dtypes = {"words": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    found = {f"{name}_BXL": (both, dtype) for name, dtype in dtypes.items()}
    if maker.characters:
        found["spellings_BXL"] = (both, jnp.int32)
        found["characters_BXLC"] = ((*both, maker.characters), jnp.int16)
    return {k: jax.ShapeDtypeStruct(s, d, sharding=rows) for k, (s, d) in found.items()}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation of an HLO module by its name, and the name of the first to run."""
    # A Mosaic call carries metadata over several lines, whose last would end its computation.
    text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", text, flags=re.DOTALL)
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.split("\n"):
        head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
        if head:
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif " = " in line:
            lines.append(line)
    return found, entry


def _walk(
    computations: dict[str, list[str]], name: str, times: int, fused: bool = False
) -> Iterator[Op]:
    for line in computations[name]:
        op = _parse(line, times, fused)
        yield op
        if op.kind == "while":
            condition, body = (re.search(rf"{part}=%([\w.\-]+)", line)[1] for part in _LOOP)
            yield from _walk(computations, body, times * _trips(computations[condition]), fused)
        else:
            inside = fused or op.kind == "fusion"
            for called in re.findall(r"\b(?:calls|called_computations=\{)=?%([\w.\-]+)", line):
                yield from _walk(computations, called, times, inside)


def _parse(line: str, times: int, fused: bool) -> Op:
    right = line.split(" = ", 1)[1]
    kind = re.search(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(", right)
    shapes = tuple(
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", right[: kind.start()])
    )
    cycles = re.search(r'"estimated_cycles":"(\d+)"', right)
    source = re.search(r'op_name="([^"]*)"', right)
    return Op(
        kind[1], times, shapes, int(cycles[1]) if cycles else 0, source[1] if source else "",
        fused, line,
    )  # fmt: skip


def _trips(condition: list[str]) -> int:
    """Iterations of a loop that counts from 0 by 1 while `counter < constant`."""
    bounds = [int(n) for line in condition for n in re.findall(r" constant\((\d+)\)", line)]
    assert len(bounds) == 1, f"a loop of unknown length: {condition}"
    return bounds[0]
