# SPDX-License-Identifier: Apache-2.0
"""From a compiled program to the time of a step, with the band that the estimates deserve.

Three parts. Operations: the compiler's cycles over the clock. Kernels have no cycles, and transfers
neither: both are counted at the peak of what they use, which is a roofline. Transfers may hide
behind the rest or not.

The band is what published measurements ask for (`benchmarks/plan_accuracy.py`): of large matrix
products and wide layers the compiler's time is nearly the measured one, of the fastest narrow model
it was twice that. So the band begins at half of it with all transfers hidden, but not below the
model's FLOPs at the chip's peak, and ends a little above it with none hidden. The number in the
middle is the geometric mean of two thirds of it with all hidden and of it with none.

Shapes: B rows, H heads, T length, K width of a head.
"""

import math
from dataclasses import dataclass

from lmjax.plan import chips
from lmjax.plan.facts import Facts

PESSIMISM = 2.0  # most that the compiler's time was found above a measured one
OPTIMISM = 1.05  # and most that it may be below
_USUAL = 1.5


@dataclass(frozen=True)
class Times:
    """Seconds of one step.

    Attributes:
      compute: of the compiler's cycles.
      kernels: of Mosaic kernels, a roofline.
      transfers: over each set of mesh axes, a roofline.
      least: the model's FLOPs at the peak of the chip.
    """

    compute: float
    kernels: float
    transfers: dict[tuple[str, ...], float]
    least: float = 0.0

    @property
    def low(self) -> float:
        """If the compiler is as pessimistic as it ever was, and all transfers hide."""
        return max(self._worked / PESSIMISM, self._sent, self.least)

    @property
    def high(self) -> float:
        """If the compiler is a little too optimistic, and no transfer hides."""
        return max(OPTIMISM * self._worked + self._sent, self.low)

    @property
    def step(self) -> float:
        """The prediction."""
        hidden, none = max(self._worked / _USUAL, self._sent), self._worked + self._sent
        return min(max(math.sqrt(hidden * none), self.low), self.high)

    @property
    def _worked(self) -> float:
        return self.compute + self.kernels

    @property
    def _sent(self) -> float:
        return sum(self.transfers.values())


def times(facts: Facts, topology: str, seen: float = 1.0, flops: float = 0.0) -> Times:
    """Of a program that the compiler could write down.

    Args:
      seen: share of queries × keys that its attention kernels compute.
      flops: of the model in a step, for each chip.
    """
    assert facts.cycles is not None, "a program that was not written down has no times"
    chip, torus = chips.split_name(topology)
    kernels = sum(
        seen * flops * executions / (chip.flops / chip.devices * min(1.0, width / chip.matrix))
        for flops, width, executions in facts.kernels
        if flops
    )
    sent: dict[tuple[str, ...], float] = {}
    for kind, axes, size, devices, executions in facts.collectives:
        seconds = executions * transfer_seconds(kind, size, devices, chip, torus)
        sent[axes] = sent.get(axes, 0.0) + seconds
    return Times(facts.cycles / chip.clock, kernels, sent, flops / chip.flops)


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
