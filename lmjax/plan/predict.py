# SPDX-License-Identifier: Apache-2.0
"""From a compiled program to the time of a step, with the band that the estimates deserve.

Three parts. Operations: the compiler's cycles over the clock. Against published measurements they
are too long by a factor of 1.0 to 1.5 (`benchmarks/plan_accuracy.py`), so the band begins at a
1.5th of them. Kernels have no cycles, and transfers neither: both are counted at the peak of what
they use, which is a roofline. Transfers may hide behind the rest or not: the band begins with all
of them hidden and ends with none. The number in the middle is the geometric mean of both ends.

Shapes: B rows, H heads, T length, K width of a head.
"""

import math
import re
from dataclasses import dataclass

from lmjax.plan import chips
from lmjax.plan.hlo import Collective, Op
from lmjax.plan.program import Program

PESSIMISM = 1.5
_MXU = 128  # narrower heads leave a part of the matrix unit idle
# Products of attention per kernel: scores and values forward; five in the fused backward pass.
_PRODUCTS = {"fwd": 2, "dkv": 5, "dq": 3}


@dataclass(frozen=True)
class Times:
    """Seconds of one step.

    Attributes:
      compute: of the compiler's cycles.
      kernels: of Mosaic kernels, a roofline.
      transfers: over each set of mesh axes, a roofline.
    """

    compute: float
    kernels: float
    transfers: dict[tuple[str, ...], float]

    @property
    def low(self) -> float:
        """If the compiler is as pessimistic as it ever was, and all transfers hide."""
        return max((self.compute + self.kernels) / PESSIMISM, self._sent)

    @property
    def high(self) -> float:
        """If the compiler is right, and no transfer hides."""
        return self.compute + self.kernels + self._sent

    @property
    def step(self) -> float:
        """The prediction."""
        return math.sqrt(self.low * self.high)

    @property
    def _sent(self) -> float:
        return sum(self.transfers.values())


def times(program: Program, causal: bool) -> Times:
    """Of a program that the compiler could write down; causal: whether its attention is."""
    chip, torus = chips.split_name(program.topology)
    seen = 0.5 if causal else 1.0
    kernels = sum(seen * kernel_flops(op) * op.times / _rate(op, chip) for op in program.kernels())
    sent: dict[tuple[str, ...], float] = {}
    for collective in program.collectives():
        seconds = collective.times * transfer_seconds(collective, chip, torus)
        sent[collective.axes] = sent.get(collective.axes, 0.0) + seconds
    return Times(program.compute_seconds, kernels, sent)


def kernel_flops(op: Op) -> float:
    """FLOPs of one execution of an attention kernel on all pairs, by the shapes of its results."""
    products = next((n for part, n in _PRODUCTS.items() if f"_{part}" in _name(op)), 0)
    wide = [dims for _, dims in op.shapes if len(dims) >= 3]
    if not products or not wide:
        return 0.0
    *rows, length, width = max(wide, key=math.prod)
    return products * 2 * math.prod(rows) * length * length * width


def _rate(op: Op, chip: chips.Chip) -> float:
    widths = [dims[-1] for _, dims in op.shapes if len(dims) >= 3]
    return chip.flops / chip.devices * min(1.0, max(widths, default=_MXU) / _MXU)


def _name(op: Op) -> str:
    found = re.search(r"%([\w.\-]+) =", op.text)
    return found[1] if found else ""


def transfer_seconds(collective: Collective, chip: chips.Chip, torus: tuple[int, ...]) -> float:
    """One execution, at the bandwidth of a ring in both directions over the axes of the torus.

    A group as large as several axes together uses the links of them all. An axis whose ends are
    not linked is a line, half as fast.
    """
    n = collective.devices
    if n <= 1:
        return 0.0
    used, left = [], max(1, n // chip.devices)
    for size in sorted(torus, reverse=True):
        if size > 1 and left > 1:
            used.append(size)
            left = -(-left // size)
    rate = sum(chip.link * (2 if size % chip.wraps == 0 else 1) for size in used or [1])
    share = collective.bytes * (n - 1) / n
    passes = {"all-reduce": 2.0, "all-to-all": 0.25, "collective-permute": n / (n - 1)}
    return share * passes.get(collective.kind, 1.0) / rate


def roofline(flops: float, moved: float, chip: chips.Chip) -> tuple[float, float]:
    """Ends of the band (seconds) where the compiler wrote no program: FLOPs of the model and bytes
    of one device at the peaks, and at a fifth of the FLOPs' peak.
    """
    return max(flops / chip.flops, moved / chip.hbm), flops / chip.flops / 0.2
