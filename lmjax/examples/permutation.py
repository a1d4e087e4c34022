# SPDX-License-Identifier: Apache-2.0
"""Seekable shuffling: the i-th element of a permutation, without the others.

A Feistel network on the smallest even number of bits that holds n is a bijection; walking a cycle
until it re-enters [0, n) makes it one of [0, n) (Black & Rogaway 2002, "Ciphers with arbitrary
finite domains"). It is exact for every n, vectorised, and needs no memory.
"""

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*words: int) -> int:
    """A 63-bit hash of integers: seeds for independent uses of one seed."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = _scramble_word((state ^ word) & _MASK)
    return state >> 1


def scramble(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, on a uint64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def _scramble_word(x: int) -> int:
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def permute(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Images of `index` (any shape, each in [0, n)) under the permutation of [0, n) of `seed`."""
    assert n > 0 and (len(index) == 0 or (index.min() >= 0 and index.max() < n))
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = [np.uint64(mix(seed, round_)) for round_ in range(_ROUNDS)]
    out = index.astype(np.uint64).reshape(-1)
    outside = np.arange(out.size)
    while outside.size:
        image = _feistel(out[outside], half, keys)
        out[outside] = image
        outside = outside[image >= n]
    return out.astype(np.int64).reshape(index.shape)


def _feistel(x: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = x >> np.uint64(half), x & mask
    for key in keys:
        left, right = right, left ^ (scramble(right + key) & mask)
    return (left << np.uint64(half)) | right
