# SPDX-License-Identifier: Apache-2.0
"""Instances that were made elsewhere: pairs that the store holds with their controls and labels."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmjax.examples.masks import ErnieMasks, Masks
from lmjax.examples.permutation import permute
from lmjax.examples.rows import Ranges, Rows
from lmjax.store import Split
from lmjax.tokenizer import LABEL


class _Stored(NamedTuple):
    """Ranges of the instances' texts, without controls, and labels; int64[instances]."""

    a_from: np.ndarray
    a_size: np.ndarray
    b_from: np.ndarray
    b_size: np.ndarray
    label: np.ndarray

    def sizes(self) -> np.ndarray:
        """Tokens, controls included."""
        return self.a_size + self.b_size + 3


@dataclass(frozen=True)
class Instances(Rows):
    """Baidu's pre-tokenised pairs: each document of the store is one, [CLS] A [SEP] B [SEP].

    The label is the stored one (ERNIE: 1 where B follows A), the masks are drawn at each pass.
    negatives: all stored pairs are positive, and each pass adds as many negatives, A of one and B
    of the next in an order of the pass (`generate_neg_sample`; Baidu shuffles 1,000 at a time).
    Those that would be longer than `length` are left out.
    """

    length: int = 512
    masks: Masks = ErnieMasks()
    negatives: bool = False
    pack: bool = False

    paired = True

    @property
    def duplicates(self) -> int:
        """Passes with negatives of their own."""
        return 10 if self.negatives else 1

    def ranges(self, split: Split, key: int) -> Ranges:
        """Every instance of one pass over the split.

        Errors: ValueError for a store of something else, and instances longer than `length`.
        """
        stored = _read(split)
        over = stored.sizes() > self.length
        if over.any():
            raise ValueError(
                f"{over.sum():,} of the {len(over):,} instances of the {split.name} split are "
                f"longer than data.examples.length={self.length}; the longest has "
                f"{stored.sizes().max():,} tokens, and cutting it would take away a [SEP]"
            )
        if self.negatives:
            stored = _with_negatives(stored, split.name, self.length, key)
        return Ranges.of(*stored)


def _read(split: Split) -> _Stored:
    begins = split.sentences
    if begins is None or split.marks is None or len(begins) != 2 * split.n_documents:
        raise ValueError(
            f"the {split.name} split does not hold instances, two sentences a document; text is "
            "for SentencePairs()"
        )
    first, second, end = begins[0::2], begins[1::2], split.starts[1:]
    cls, sep = split.controls["cls"], split.controls["sep"]
    whole = (split.starts[:-1] <= first) & (first + 1 < second) & (second + 1 < end)
    edges = (first, second - 1, end - 1)
    for edge, control in zip(edges, (cls, sep, sep), strict=True):
        whole[whole] &= split.tokens[edge[whole]] == control
    if not whole.all():
        number = int(np.argmin(whole))
        raise ValueError(
            f"document {number + 1:,} of the {split.name} split is not [CLS] A [SEP] B [SEP]"
        )
    label = (split.marks[first] & LABEL > 0).astype(np.int64)
    return _Stored(first + 1, second - first - 2, second, end - second - 1, label)


def _with_negatives(stored: _Stored, name: str, length: int, key: int) -> _Stored:
    if not stored.label.all():
        raise ValueError(
            f"negatives=True makes negatives of positives, and {(stored.label == 0).sum():,} "
            f"instances of the {name} split are negatives already"
        )
    order = permute(np.arange(len(stored.label)), len(stored.label), key)
    other = np.roll(order, -1)
    made = _Stored(
        stored.a_from[order],
        stored.a_size[order],
        stored.b_from[other],
        stored.b_size[other],
        np.zeros(len(order), np.int64),
    )
    fits = (made.sizes() <= length) & (order != other)
    columns = zip(stored, made, strict=True)
    return _Stored(*(np.concatenate([kept, new[fits]]) for kept, new in columns))
