# SPDX-License-Identifier: Apache-2.0
"""RoBERTa's FULL-SENTENCES: rows filled with whole sentences, across the ends of documents."""

from dataclasses import dataclass

import numpy as np

from lmjax.examples import draws
from lmjax.examples.masks import Masks, RobertaMasks
from lmjax.examples.rows import Ranges, Rows
from lmjax.examples.sentences import sentences, walk
from lmjax.store import Split


@dataclass(frozen=True)
class FullSentences(Rows):
    """<s> sentences </s>: as many of the next sentences as fit in `length` (arXiv:1907.11692).

    The store's </s> before each document is the extra separator where a row crosses into it; a
    row never begins with one. A sentence longer than a row is cut into pieces. A pass begins its
    first full row at another sentence than the last; masks are drawn at each.
    """

    length: int = 512
    masks: Masks = RobertaMasks()

    typed = False

    def __post_init__(self) -> None:
        if self.length < 3:
            raise ValueError(f"data.examples.length={self.length}: must be at least 3")

    def ranges(self, split: Split, key: int) -> Ranges:
        """Every row of one pass over the split."""
        text, room = sentences(split), self.length - 2
        pieces = -(-(text.ends_S - text.begins_S) // room)
        sentence = np.repeat(np.arange(len(pieces)), pieces)
        within = np.arange(len(sentence)) - (np.cumsum(pieces) - pieces)[sentence]
        begins = text.begins_S[sentence] + within * room
        ends = np.minimum(begins + room, text.ends_S[sentence])
        after = np.searchsorted(ends, begins + room, side="right")
        start = draws.integers(draws.states(key, np.zeros(1)), 0, 0, after[0])[0]
        firsts = walk(after, int(start))
        if start:
            firsts = np.concatenate([[0], firsts])
        last = np.append(firsts[1:], len(begins)) - 1
        a_from = begins[firsts]
        nothing = np.zeros(len(firsts))
        return Ranges.of(a_from, ends[last] - a_from, nothing, nothing, nothing)
