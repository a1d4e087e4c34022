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
from dataclasses import dataclass

from lmjax.plan import chips
from lmjax.plan.facts import Facts

PESSIMISM = 1.5


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


def times(facts: Facts, topology: str, causal: bool) -> Times:
    """Of a program that the compiler could write down; causal: whether its attention is."""
    assert facts.cycles is not None, "a program that was not written down has no times"
    chip, torus = chips.split_name(topology)
    seen = 0.5 if causal else 1.0
    kernels = sum(
        seen * flops * executions / (chip.flops / chip.devices * min(1.0, width / chip.matrix))
        for flops, width, executions in facts.kernels
        if flops
    )
    sent: dict[tuple[str, ...], float] = {}
    for kind, axes, size, devices, executions in facts.collectives:
        seconds = executions * transfer_seconds(kind, size, devices, chip, torus)
        sent[axes] = sent.get(axes, 0.0) + seconds
    return Times(facts.cycles / chip.clock, kernels, sent)


def transfer_seconds(
    kind: str, size: float, devices: int, chip: chips.Chip, torus: tuple[int, ...]
) -> float:
    """One collective of `size` bytes, gathered or before scattering, among groups of `devices`: at
    the bandwidth of a ring in both directions over the axes of the torus.

    A group as large as several axes together uses the links of them all. An axis whose ends are
    not linked is a line, half as fast.
    """
    n = devices
    if n <= 1:
        return 0.0
    used, left = [], max(1, n // chip.devices)
    for length in sorted(torus, reverse=True):
        if length > 1 and left > 1:
            used.append(length)
            left = -(-left // length)
    rate = sum(chip.link * (2 if length % chip.wraps == 0 else 1) for length in used or [1])
    share = size * (n - 1) / n
    passes = {"all-reduce": 2.0, "all-to-all": 0.25, "collective-permute": n / (n - 1)}
    return share * passes.get(kind, 1.0) / rate


def roofline(flops: float, moved: float, chip: chips.Chip) -> tuple[float, float]:
    """Ends of the band (seconds) where the compiler wrote no program: FLOPs of the model and bytes
    of one device at the peaks, and at a fifth of the FLOPs' peak.
    """
    return max(flops / chip.flops, moved / chip.hbm), flops / chip.flops / 0.2
