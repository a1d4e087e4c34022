# SPDX-License-Identifier: Apache-2.0
"""Reads a program that the TPU compiler wrote down: its operations, how often each runs, and what
devices send each other.

The text carries an estimate of cycles for most operations. Mosaic kernels and collectives have
none. Of a conditional the cheaper branch is counted: ours stand before rare cases.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BRANCHES = r"(?:true_computation|false_computation)=%([\w.\-]+)|branch_computations=\{([^}]*)\}"


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
      axes: mesh axes that it goes over.
    """

    kind: str
    bytes: int
    times: int
    devices: int
    axes: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    source: str


def operations(text: str) -> list[Op]:
    """Everything that a program executes, in the order of its text."""
    computations, entry = _computations(text)
    return list(_walk(computations, entry, 1))


def collectives(ops: Sequence[Op], mesh: dict[str, int]) -> list[Collective]:
    """What the devices of a mesh, its axes with their sizes, send each other."""
    # The start of an asynchronous collective, the work beside it and its end are fusions that all
    # name it, under one chain.
    chains: dict[str, Collective] = {}
    for op in ops:
        if collective := _collective(op, mesh):
            chain = re.search(r'chain_id="(\d+)"', op.text) if op.fused else None
            chains.setdefault(chain[0] if chain else op.text, collective)
    return list(chains.values())


def bytes_of(dtype: str, dims: tuple[int, ...]) -> int:
    """Bytes of an array, without the padding of its layout."""
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(dims) * bits // 8


def _collective(op: Op, mesh: dict[str, int]) -> Collective | None:
    kind = next((k for k in COLLECTIVES if op.kind in (k, f"{k}-start")), None)
    if kind is None:
        return None
    sizes = [bytes_of(*shape) for shape in op.shapes]
    group, axes = _group(op.text, mesh)
    # An asynchronous start returns operand and result; the larger is the full size.
    size = max(sizes) if op.kind.endswith("-start") else sum(sizes)
    if kind == "reduce-scatter":
        size *= group
    return Collective(kind, size, op.times, group, axes, op.shapes, op.source)


def _group(text: str, mesh: dict[str, int]) -> tuple[int, tuple[str, ...]]:
    """Devices in one group of a collective, and the axes in which they differ."""
    members = _members(text)
    if not members:
        return 1, ()
    if max(members) >= math.prod(mesh.values()):
        return len(members), ()
    places = np.stack(np.unravel_index(members, tuple(mesh.values())))
    differ = (places != places[:, :1]).any(1)
    return len(members), tuple(axis for axis, found in zip(mesh, differ, strict=True) if found)


def _members(text: str) -> list[int]:
    """The first group's devices, as numbers in the mesh; of permutes, the first pair of two."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        # A mesh of the compiler's own, over the same devices in the same order.
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        over = re.findall(r"'(\w+)'", named[2])
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in over else 0 for name in sizes)
        return places[first].reshape(-1).tolist()
    if sent := re.search(r"source_target_pairs=\{([\d,{}]*)\}", text):
        pairs = [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", sent[1])]
        return next((pair for pair in pairs if pair[0] != pair[1]), [])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return [int(n) for n in listed[1].split(",") if n]
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not counted:
        return []
    dims = [int(n) for n in counted[2].split(",")]
    order = [int(n) for n in counted[3].split(",")] if counted[3] else range(len(dims))
    every = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1)
    return every[: int(counted[1])].tolist()


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
            condition, body = _called(line, "condition"), _called(line, "body")
            yield from _walk(computations, body, times * _trips(computations[condition]), fused)
        elif op.kind == "conditional":
            branches = [
                list(_walk(computations, branch, times, fused))
                for found in re.findall(_BRANCHES, line)
                for branch in re.findall(r"[\w.\-]+", found[0] or found[1])
            ]
            yield from min(branches, key=cycles, default=[])
        else:
            inside = fused or op.kind == "fusion"
            for called in re.findall(r"\b(?:calls|called_computations=\{)=?%([\w.\-]+)", line):
                yield from _walk(computations, called, times, inside)


def cycles(ops: Sequence[Op]) -> int:
    """Estimated cycles of all of them."""
    return sum(op.cycles * op.times for op in ops if not op.fused)


def _called(line: str, part: str) -> str:
    found = re.search(rf"{part}=%([\w.\-]+)", line)
    assert found, line
    return found[1]


def _parse(line: str, times: int, fused: bool) -> Op:
    right = line.split(" = ", 1)[1]
    kind = re.search(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(", right)
    assert kind, line
    shapes = tuple(
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", right[: kind.start()])
    )
    counted = re.search(r'"estimated_cycles":"(\d+)"', right)
    source = re.search(r'op_name="([^"]*)"', right)
    return Op(
        kind[1], times, shapes, int(counted[1]) if counted else 0, source[1] if source else "",
        fused, line,
    )  # fmt: skip


def _trips(condition: list[str]) -> int:
    """Iterations of a loop that counts from 0 by 1 while `counter < constant`."""
    bounds = [int(n) for line in condition for n in re.findall(r" constant\((\d+)\)", line)]
    return max(bounds, default=1)
