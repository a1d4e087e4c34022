# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are a function of where they are used, not of how many came before.

A draw is named by a key, a counter and its own number: splitmix64 (Steele, Lea & Flood 2014,
"Fast splittable pseudorandom number generators") started at a hash of key and counter. Any draw
can be had without the others, so an example never depends on the batch that it is in.
"""

import numpy as np

from lmjax.examples.permutation import scramble

_STEP = np.uint64(0x9E3779B97F4A7C15)
_STRIDE = np.uint64(0xD1342543DE82EF95)
_ONE = np.uint64(1)


def states(key: int | np.ndarray, counters: np.ndarray) -> np.ndarray:
    """One stream of draws for each counter, uint64 of the shape of `counters`."""
    start = np.atleast_1d(np.asarray(key)).astype(np.uint64)
    return scramble(scramble(counters.astype(np.uint64) * _STRIDE + start) + _STEP)


def bits(state: np.ndarray, draw: int | np.ndarray) -> np.ndarray:
    """64 random bits: number `draw` of each stream (the two broadcast), uint64."""
    number = np.atleast_1d(draw).astype(np.uint64)  # numpy warns where a scalar wraps round
    return scramble((number + _ONE) * _STEP + state)


def uniform(state: np.ndarray, draw: int | np.ndarray) -> np.ndarray:
    """Uniform in [0, 1), float64 with 53 random bits."""
    return (bits(state, draw) >> np.uint64(11)) * 2.0**-53


def integers(
    state: np.ndarray, draw: int | np.ndarray, low: int | np.ndarray, high: int | np.ndarray
) -> np.ndarray:
    """Uniform in [low, high), int64; low where that is empty."""
    return low + (uniform(state, draw) * np.maximum(np.subtract(high, low), 0)).astype(np.int64)


def heads(state: np.ndarray, draw: int, flips: np.ndarray) -> np.ndarray:
    """How many of `flips` fair coins show heads, int64; numbers from `draw` on are used up.

    A binomial number without its table: the bits set among as many random bits.
    """
    total = np.zeros(flips.shape, np.int64)
    left = flips.astype(np.int64)
    while (left > 0).any():
        unused = (64 - np.clip(left, 1, 64)).astype(np.uint64)
        counted = np.bitwise_count(bits(state, draw) >> unused)
        total += np.where(left > 0, counted, 0)
        left, draw = left - 64, draw + 1
    return total
