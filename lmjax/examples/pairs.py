# SPDX-License-Identifier: Apache-2.0
"""Pairs of text segments: next sentence (BERT, ERNIE), sentence order (ALBERT), two (ELECTRA).

The chunk that would begin at each sentence is worked out for all sentences of a block of
documents at once (S sentences, D documents), and the chunks of a pass are found by following them;
what does not decide where the next chunk begins is then drawn for the M chunks alone.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmjax.examples import draws
from lmjax.examples.masks import BertMasks, Masks
from lmjax.examples.rows import Ranges, Rows
from lmjax.examples.sentences import Sentences, blocks, sentences, walk
from lmjax.store import Split

# Numbers of the draws in the stream of a chunk's first sentence; those of documents and of the
# coins of a truncation, which are many, have streams of their own.
_CUT, _KIND, _TARGET, _SHORT, _START, _TRIES = range(6)
_OF_SENTENCES, _OF_DOCUMENTS, _OF_COINS = range(3)
_TRIES_MOST = 10


@dataclass(frozen=True)
class SentencePairs(Rows):
    """[CLS] A [SEP] B [SEP] of at most `length` tokens, A and B of whole sentences, then cut.

    pairing:
      "next": B follows A, or comes from another document in half of the chunks and in every chunk
        of one sentence (create_pretraining_data of BERT, arXiv:1810.04805).
      "order": B follows A, or A follows B; a chunk of one sentence takes its B from another
        document (create_pretraining_data of ALBERT, arXiv:1909.11942).
      "segments": two halves of a chunk, or one segment; nothing to tell apart
        (build_pretraining_dataset of ELECTRA, arXiv:2003.10555).
    positive: the label, if any, where B truly follows A: 0 of BERT and ALBERT, 1 of ERNIE.
    duplicates: passes over the data that are cut anew; the next ones repeat their pairs.
    static: masks are repeated too, as in files that are made once.
    short: share of the documents that are cut to a shorter length, drawn for each; with
      "segments" of the chunks, and 0.05 in ELECTRA.
    pack: several short pairs a row.
    """

    length: int
    pairing: Literal["next", "order", "segments"] = "next"
    positive: int = 0
    duplicates: int = 10
    static: bool = False
    short: float = 0.1
    masks: Masks = BertMasks()
    pack: bool = False

    def __post_init__(self) -> None:
        kinds = ("next", "order", "segments")
        if self.pairing not in kinds:
            raise ValueError(f"data.examples.pairing={self.pairing}: one of {', '.join(kinds)}")
        if self.length < 5:
            raise ValueError(f"data.examples.length={self.length}: must be at least 5")
        if self.positive not in (0, 1) or self.duplicates < 1 or not 0 <= self.short <= 1:
            raise ValueError(
                f"data.examples: positive={self.positive} must be 0 or 1, duplicates="
                f"{self.duplicates} at least 1 and short={self.short} between 0 and 1"
            )

    @property
    def paired(self) -> bool:
        """Whether the pairs have labels."""
        return self.pairing != "segments"

    def ranges(self, split: Split, key: int) -> Ranges:
        """Every pair of one pass over the split."""
        everything = sentences(split)
        parts = []
        for text in blocks(everything):
            if self.pairing == "segments":
                parts.append(self._segments(text, key))
            else:
                parts.append(self._pairs(text, everything, key))
        return Ranges(*map(np.concatenate, zip(*parts, strict=True)))

    def _pairs(self, text: Sentences, everything: Sentences, key: int) -> Ranges:
        streams_S = draws.states(key + _OF_SENTENCES, text.begins_S)
        target_D = self._targets(text, key)
        last_S = _chunk_ends(text, target_D[text.document_S])
        first_S = np.arange(len(last_S))
        cut_S = np.where(
            last_S - first_S > 1,
            draws.integers(streams_S, _CUT, first_S + 1, last_S),
            first_S + 1,
        )
        alone_S = last_S - first_S == 1
        changed_S = alone_S | (draws.uniform(streams_S, _KIND) < 0.5)
        # The rest of a chunk whose B comes from elsewhere is given back to the next chunk.
        other_S = changed_S if self.pairing == "next" else alone_S
        after_S = np.where(other_S, cut_S, last_S)
        chunk = walk(after_S)
        cut, last, other, streams = cut_S[chunk], last_S[chunk], other_S[chunk], streams_S[chunk]
        a_from, b_from = text.begins_S[chunk], text.begins_S[np.minimum(cut, last - 1)]
        a_size, b_size = text.ends_S[cut - 1] - a_from, text.ends_S[last - 1] - b_from
        # A text elsewhere fills what A leaves of the target.
        left = target_D[text.document_S[chunk]] - a_size
        own = text.document_S[chunk[other]] + text.before
        found, size = _elsewhere(everything, own, left[other], streams[other])
        b_from[other], b_size[other] = found, size
        swap = changed_S[chunk] & ~other
        a_from, b_from = np.where(swap, b_from, a_from), np.where(swap, a_from, b_from)
        a_size, b_size = np.where(swap, b_size, a_size), np.where(swap, a_size, b_size)
        coins = draws.states(key + _OF_COINS, text.begins_S[chunk])
        a_from, a_size, b_from, b_size = _truncate(
            a_from, a_size, b_from, b_size, self.length - 3, coins
        )
        label = np.where(changed_S[chunk], 1 - self.positive, self.positive)
        return Ranges.of(a_from, a_size, b_from, b_size, label)

    def _targets(self, text: Sentences, key: int) -> np.ndarray:
        """Tokens that the pairs of each document are to have; drawn once a document."""
        streams = draws.states(key + _OF_DOCUMENTS, text.begins_S[text.firsts_D])
        most = self.length - 3
        short = draws.integers(streams, _TARGET, 2, most + 1)
        return np.where(draws.uniform(streams, _SHORT) < self.short, short, most)

    def _segments(self, text: Sentences, key: int) -> Ranges:
        streams_S = draws.states(key + _OF_SENTENCES, text.begins_S)
        drawn = draws.integers(streams_S, _TARGET, 5, self.length + 1)
        target_S = np.where(draws.uniform(streams_S, _SHORT) < self.short, drawn, self.length)
        last_S = _chunk_ends(text, target_S)
        chunk = walk(last_S)
        last, streams = last_S[chunk], streams_S[chunk]
        a_from, end = text.begins_S[chunk], text.ends_S[last - 1]
        # The first segment ends before or behind the sentence that crosses its target.
        crossing = np.searchsorted(text.ends_S, a_from + (target_S[chunk] - 3) // 2)
        behind = crossing + (draws.uniform(streams, _CUT) < 0.5)
        cut = np.clip(behind, chunk + 1, last)
        cut = np.where(draws.uniform(streams, _KIND) < 0.1, last, cut)
        a_size = text.ends_S[cut - 1] - a_from
        b_from, b_size = a_from + a_size, end - a_from - a_size
        a_size = np.minimum(a_size, self.length - 2)
        b_size = np.minimum(b_size, np.maximum(0, self.length - a_size - 3))
        return Ranges.of(a_from, a_size, b_from, b_size, np.zeros(len(chunk)))


def _chunk_ends(text: Sentences, target_S: np.ndarray) -> np.ndarray:
    """The sentence after the chunk from each sentence: `target` tokens, or the document's rest."""
    last_S = 1 + np.searchsorted(text.ends_S, text.begins_S + target_S)
    return np.minimum(last_S, text.lasts_D[text.document_S])


def _elsewhere(text: Sentences, own, tokens, streams) -> tuple[np.ndarray, np.ndarray]:
    """Where a text of another document begins, and its size: whole sentences of `tokens` or more.

    own: the documents to avoid. The text has one sentence at least, and ends with its document.
    """
    documents = len(text.firsts_D)
    other = own.copy()
    for attempt in range(_TRIES_MOST):  # a lone document is its own other
        drawn = draws.integers(streams, _TRIES + attempt, 0, documents)
        other = np.where(other == own, drawn, other)
    first = draws.integers(streams, _START, text.firsts_D[other], text.lasts_D[other])
    begin = text.begins_S[first]
    last = 1 + np.searchsorted(text.ends_S, begin + tokens)
    last = np.clip(last, first + 1, text.lasts_D[other])
    return begin, text.ends_S[last - 1] - begin


def _truncate(a_from, a_size, b_from, b_size, most: int, coins):
    """Pops tokens from the longer (B of equals) until both fit, each from a random end."""
    b_kept = np.minimum(b_size, np.maximum(most - a_size, most // 2))
    a_kept = np.minimum(a_size, most - b_kept)
    a_popped, b_popped = a_size - a_kept, b_size - b_kept
    a_front = draws.heads(coins, 0, a_popped)
    b_front = draws.heads(coins, 1 << 32, b_popped)
    return a_from + a_front, a_kept, b_from + b_front, b_kept
