# SPDX-License-Identifier: Apache-2.0
"""Several short instances in one row: best fit by length, window by window."""

from typing import NamedTuple

import numpy as np

from lmjax.examples.permutation import permute

SEQUENCES = 8  # at most so many instances a row
_WINDOW = 1024


class Packing(NamedTuple):
    """R rows of n instances: row r holds instances[starts[r] : starts[r + 1]], all int64."""

    starts_R: np.ndarray
    instances_n: np.ndarray


def pack(sizes: np.ndarray, costs: np.ndarray, length: int, slots: int, seed: int) -> Packing:
    """Rows of at most `length` tokens, `slots` scored tokens and SEQUENCES instances.

    sizes and costs are the tokens and scored tokens of each instance. The instances come in an
    order of `seed`, and each window of that order is packed by itself, longest first: the time is
    in proportion to the instances, some microseconds each.
    """
    assert sizes.max(initial=0) <= length and costs.max(initial=0) <= slots
    order = permute(np.arange(len(sizes)), len(sizes), seed)
    rows: list[list[int]] = []
    for at in range(0, len(order), _WINDOW):
        window = order[at : at + _WINDOW]
        longest = window[np.argsort(-sizes[window], kind="stable")]
        rows += _best_fit(longest, sizes[longest], costs[longest], length, slots)
    starts = np.cumsum([0, *map(len, rows)])
    return Packing(starts, np.asarray([i for row in rows for i in row], np.int64))


def _best_fit(instances, sizes, costs, length: int, slots: int) -> list[list[int]]:
    rows: list[list[int]] = []
    spent: list[int] = []
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]  # by the tokens still free
    rooms = 0  # bit i is set while open_rows[i] holds a row
    for instance, size, cost in zip(
        instances.tolist(), sizes.tolist(), costs.tolist(), strict=True
    ):
        room = _smallest_room(open_rows, rooms, size, lambda row, c=cost: spent[row] + c <= slots)
        if room < 0:
            row = len(rows)
            rows.append([])
            spent.append(0)
            room = length
        else:
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        rows[row].append(instance)
        spent[row] += cost
        if len(rows[row]) < SEQUENCES:
            open_rows[room - size].append(row)
            rooms |= 1 << (room - size)
    return rows


def _smallest_room(open_rows, rooms: int, size: int, fits) -> int:
    """The least free room of `size` or more whose newest row fits; -1 where none does."""
    left = rooms >> size << size
    while left:
        room = (left & -left).bit_length() - 1
        if fits(open_rows[room][-1]):
            return room
        left &= left - 1
    return -1
