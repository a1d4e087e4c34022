# SPDX-License-Identifier: Apache-2.0
"""The sentences of a split as ranges of its token stream.

A document's sentences lie one after the other without a gap, so whole sentences of one document
are one range, and how many fit is a search in the stream, not a sum.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lmjax.store import Split

_BLOCK = 1 << 20


class Sentences(NamedTuple):
    """S sentences of D documents that have any.

    begins_S, ends_S: int64, their ranges of the token stream. firsts_D, lasts_D: int64, each
    document's first sentence and the one after its last. document_S: int64, in [0, D).
    before: documents of the split that come before these.
    """

    begins_S: np.ndarray
    ends_S: np.ndarray
    firsts_D: np.ndarray
    lasts_D: np.ndarray
    document_S: np.ndarray
    before: int = 0


def sentences(split: Split) -> Sentences:
    """The sentences of a split, kept with it.

    Errors: ValueError for a split without sentences.
    """
    if "sentences" not in split.memo:
        split.memo["sentences"] = _read(split)
    return split.memo["sentences"]


def _read(split: Split) -> Sentences:
    begins = split.sentences
    if begins is None:
        raise ValueError(
            f"the {split.name} split has no sentences, which these examples are made of: set "
            "data.units=Units() in the experiment file"
        )
    if not len(begins):
        raise ValueError(f"the {split.name} split has no text, so not even one example")
    document = np.searchsorted(split.starts, begins, side="right") - 1
    is_first = np.diff(document, prepend=-1) > 0
    firsts = np.flatnonzero(is_first)
    lasts = np.append(firsts[1:], len(begins))
    ends = np.append(begins[1:], 0)
    ends[lasts - 1] = split.starts[document[firsts] + 1]
    return Sentences(begins, ends, firsts, lasts, np.cumsum(is_first) - 1)


def blocks(text: Sentences) -> Iterator[Sentences]:
    """The documents in blocks of some _BLOCK sentences, numbered from 0 in each."""
    first = 0
    while first < len(text.firsts_D):
        at = text.firsts_D[first]
        last = max(first + 1, int(np.searchsorted(text.lasts_D, at + _BLOCK, side="right")))
        end = text.lasts_D[last - 1]
        yield Sentences(
            text.begins_S[at:end],
            text.ends_S[at:end],
            text.firsts_D[first:last] - at,
            text.lasts_D[first:last] - at,
            text.document_S[at:end] - first,
            first,
        )
        first = last


def walk(after_S: np.ndarray, first: int = 0) -> np.ndarray:
    """first, after[first], after[after[first]] and so on, int64; each is after its predecessor."""
    steps, found, at = after_S.tolist(), [], first
    while at < len(steps):
        found.append(at)
        at = steps[at]
    return np.asarray(found, np.int64)
