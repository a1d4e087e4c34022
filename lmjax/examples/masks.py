# SPDX-License-Identifier: Apache-2.0
"""Which tokens of an encoder's input are hidden, and what stands in their place.

One frozen dataclass a published scheme, of plain fields. Shapes: N instances, W columns (the
longest of them), P scored slots a row. All draws are functions of the instances' streams.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmjax.examples import draws
from lmjax.tokenizer import ENTITY, WORD

# Numbers of the draws in an instance's stream: one block a purpose, a draw for every column.
_CHOICE, _ACTION, _TOKEN, _SPAN = (block << 24 for block in range(4))


class Text(NamedTuple):
    """Instances to mask, one a row.

    tokens_NW: int32. sizes_N: tokens of each, controls included; the rest is padding.
    hidden_NW: bool, the tokens that may be hidden: all but [CLS], [SEP] and padding.
    marks_NW: uint8, the store's marks; None where the scheme asks for none. states_N: streams.
    length: of the rows that the instances will be put in.
    """

    tokens_NW: np.ndarray
    sizes_N: np.ndarray
    hidden_NW: np.ndarray
    marks_NW: np.ndarray | None
    states_N: np.ndarray
    length: int
    vocab: int
    controls: dict[str, int]


class Masked(NamedTuple):
    """tokens_NW: int32, what the model reads. weights_NW: uint8, how often each is scored."""

    tokens_NW: np.ndarray
    weights_NW: np.ndarray


@dataclass(frozen=True)
class BertMasks:
    """BERT (arXiv:1810.04805, create_pretraining_data) and ALBERT (arXiv:1909.11942).

    `rate` of the tokens, controls counted and never chosen, at most `predictions` and at least
    one; of the chosen, 80 % become [MASK] and 10 % any token of the vocabulary, each on its own.
    whole_word: words are chosen whole, and one that would exceed the count is passed over.
    ngram: spans of up to `ngram` whole words, n of them with probability in proportion to 1/n; a
    span that would exceed the count is shortened, and one that touches another is passed over.
    """

    rate: float = 0.15
    predictions: int = 20
    whole_word: bool = False
    ngram: int = 1

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        for name in ("predictions", "ngram"):
            if getattr(self, name) < 1:
                raise ValueError(f"masks.{name}={getattr(self, name)}: must be at least 1")

    @property
    def reads_marks(self) -> bool:
        """Whether words are asked for."""
        return self.whole_word or self.ngram > 1

    def slots(self, length: int) -> int:
        """Scored slots of a row of `length`."""
        return min(self.predictions, length)

    def most(self, sizes: np.ndarray) -> np.ndarray:
        """Tokens that are chosen at most in instances of these sizes."""
        return np.minimum(self.predictions, np.maximum(1, np.rint(sizes * self.rate))).astype(int)

    def draw(self, text: Text) -> Masked:
        """Masks every instance."""
        if self.reads_marks:
            chosen = _choose_words(text, self.most(text.sizes_N), self.ngram)
        else:
            chosen = _choose(text, text.hidden_NW, self.most(text.sizes_N))
        return _replace(text, chosen, 0.8, 0.9)


@dataclass(frozen=True)
class RobertaMasks:
    """RoBERTa (arXiv:1907.11692, fairseq mask_tokens_dataset).

    `rate` of all tokens, <s> and </s> among them, rounded up or down at random; 80 % become
    <mask>, 10 % any token that is no control.
    """

    rate: float = 0.15

    reads_marks = False

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def slots(self, length: int) -> int:
        """Scored slots of a row of `length`."""
        return min(length, int(self.rate * length) + 1)

    def most(self, sizes: np.ndarray) -> np.ndarray:
        """Tokens that are chosen at most in instances of these sizes."""
        return np.minimum(sizes, (sizes * self.rate).astype(int) + 1)

    def draw(self, text: Text) -> Masked:
        """Masks every instance."""
        real_NW = np.arange(text.tokens_NW.shape[1]) < text.sizes_N[:, None]
        count = text.sizes_N * self.rate + draws.uniform(text.states_N, _SPAN)
        chosen = _choose(text, real_NW, np.floor(count).astype(int))
        return _replace(text, chosen, 0.8, 0.9, free_of_controls=True)


@dataclass(frozen=True)
class ElectraMasks:
    """ELECTRA (arXiv:2003.10555, pretrain_helpers.mask).

    `rate` of the tokens, controls counted and never chosen, drawn with replacement: one drawn
    twice is scored once, at double weight. Each draw makes it [MASK] with probability 0.85.
    """

    rate: float = 0.15

    reads_marks = False

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def slots(self, length: int) -> int:
        """Scored slots of a row of `length`."""
        return max(1, int((self.rate + 0.005) * length))

    def most(self, sizes: np.ndarray) -> np.ndarray:
        """Draws in instances of these sizes."""
        return np.maximum(1, np.rint(sizes * self.rate)).astype(int)

    def draw(self, text: Text) -> Masked:
        """Masks every instance."""
        n, width = text.tokens_NW.shape
        count = np.minimum(self.most(text.sizes_N), self.slots(text.length))
        number = np.arange(count.max(initial=0))
        candidates = text.hidden_NW.sum(1)
        place = draws.integers(
            text.states_N[:, None], _CHOICE + number, 0, candidates[:, None]
        )  # among the candidates, then the column of that candidate
        columns = np.argsort(~text.hidden_NW, axis=1, kind="stable")
        column = np.take_along_axis(columns, place, axis=1) + np.arange(n)[:, None] * width
        drawn = column[(number < count[:, None]) & (candidates > 0)[:, None]]
        times = np.bincount(drawn, minlength=n * width).reshape(n, width).astype(np.uint8)
        rows, columns = np.nonzero(times)
        unchanged = 0.15 ** times[rows, columns].astype(np.float64)
        masked = draws.uniform(text.states_N[rows], _ACTION + columns) >= unchanged
        tokens = text.tokens_NW.copy()
        tokens[rows[masked], columns[masked]] = text.controls["mask"]
        return Masked(tokens, times)


@dataclass(frozen=True)
class ErnieMasks:
    """ERNIE 1.0 (arXiv:1904.09223, Baidu's batching.mask).

    Units are chosen at `rate`, each on its own, with no bound on their number but the slots. An
    example's units are characters, words or entities with these shares (the paper's three stages
    are runs that go on from each other with other shares; the released code draws word or
    character mode). A chosen unit's first token is hidden by the draw that chose it and every
    later one by a draw of its own: 80 % [MASK], 10 % any id but 0. together: the first token's
    draw decides for the whole unit, which is the paper's masking of a phrase.
    """

    rate: float = 0.15
    characters: float = 0.0
    words: float = 1.0
    entities: float = 0.0
    together: bool = False

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        shares = {name: getattr(self, name) for name in ("characters", "words", "entities")}
        if min(shares.values()) < 0 or sum(shares.values()) <= 0:
            raise ValueError(f"masks: the shares {shares} must be 0 or more, and not all 0")

    @property
    def reads_marks(self) -> bool:
        """Whether words or entities are asked for."""
        return self.words + self.entities > 0

    def slots(self, length: int) -> int:
        """Scored slots of a row of `length`: five standard deviations above the mean of words."""
        return min(length, int(np.ceil(self.rate * length + 8 * np.sqrt(self.rate * length))))

    def most(self, sizes: np.ndarray) -> np.ndarray:
        """Nothing: the number has no bound, and tokens beyond the slots are left as they were."""
        return np.zeros(len(sizes), int)

    def draw(self, text: Text) -> Masked:
        """Masks every instance."""
        n, width = text.tokens_NW.shape
        columns = np.arange(width)
        u_NW = draws.uniform(text.states_N[:, None], _CHOICE + columns)
        head_NW = _last_true(text.hidden_NW & self._begins(text))
        first_NW = np.take_along_axis(u_NW, head_NW, axis=1)
        chosen = (first_NW < self.rate) & text.hidden_NW
        rows, columns = np.nonzero(chosen)
        is_first = head_NW[rows, columns] == columns
        # The original compares raw draws; over `rate`, both kinds have the thresholds 0.1 and 0.2.
        action = np.where(is_first, u_NW[rows, columns] / self.rate, u_NW[rows, columns])
        if self.together:
            action = first_NW[rows, columns] / self.rate
        token = draws.integers(text.states_N[rows], _TOKEN + columns, 1, text.vocab)
        tokens = text.tokens_NW.copy()
        hidden = np.where(action >= 0.2, text.controls["mask"], token)
        tokens[rows, columns] = np.where(action < 0.1, tokens[rows, columns], hidden)
        return Masked(tokens, chosen.astype(np.uint8))

    def _begins(self, text: Text) -> np.ndarray:
        """Where a unit of the example's kind begins, (N, W)."""
        if text.marks_NW is None:
            return np.ones(text.tokens_NW.shape, bool)
        shares = np.cumsum([self.characters, self.words, self.entities])
        kind = draws.uniform(text.states_N, _SPAN)[:, None] * shares[-1]
        bit = np.where(kind < shares[1], WORD, ENTITY)
        return (kind < shares[0]) | (text.marks_NW & bit > 0)


Masks = BertMasks | RobertaMasks | ElectraMasks | ErnieMasks


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"masks.rate={rate}: must be above 0 and at most 1")


def _choose(text: Text, candidates_NW: np.ndarray, count_N: np.ndarray) -> np.ndarray:
    """`count_N` of the candidates of each row, without replacement; bool (N, W)."""
    keys = _order_keys(text, candidates_NW.shape[1])
    keys[~candidates_NW] = np.iinfo(np.uint64).max
    count = np.minimum(count_N, candidates_NW.sum(1))
    at = np.maximum(count - 1, 0)[:, None]
    last = np.take_along_axis(np.sort(keys, axis=1), at, axis=1)
    return candidates_NW & (keys <= last) & (count > 0)[:, None]


def _order_keys(text: Text, width: int) -> np.ndarray:
    """Random keys whose order is a shuffle of the columns, all different in a row; (N, W)."""
    column = np.arange(width, dtype=np.uint64)
    low = np.uint64(16)  # the lowest bits hold the column
    return (draws.bits(text.states_N[:, None], _CHOICE + column) >> low << low) | column


def _replace(
    text: Text, chosen: np.ndarray, mask: float, random: float, free_of_controls: bool = False
) -> Masked:
    """Each chosen token on its own: [MASK] below `mask`, any token below `random`, else kept."""
    rows, columns = np.nonzero(chosen)
    states = text.states_N[rows]
    action = draws.uniform(states, _ACTION + columns)
    controls = sorted(set(text.controls.values())) if free_of_controls else []
    token = draws.integers(states, _TOKEN + columns, 0, text.vocab - len(controls))
    for control in controls:
        token += token >= control
    tokens = text.tokens_NW.copy()
    hidden = np.where(action < mask, text.controls["mask"], token)
    tokens[rows, columns] = np.where(action < random, hidden, tokens[rows, columns])
    return Masked(tokens, chosen.astype(np.uint8))


def _last_true(begins_NW: np.ndarray) -> np.ndarray:
    """The column of the last True up to each column (0 where there is none yet)."""
    columns = np.where(begins_NW, np.arange(begins_NW.shape[1]), 0)
    return np.maximum.accumulate(columns, axis=1)


def _choose_words(text: Text, count_N: np.ndarray, ngram: int) -> np.ndarray:
    """Spans of whole words in random order until the counts are reached; bool (N, W).

    All rows take their j-th step together. Words are numbered along the row, controls left out.
    """
    assert text.marks_NW is not None
    begins = text.hidden_NW & (text.marks_NW & WORD > 0)
    word_NW = np.cumsum(begins, axis=1) - 1
    words_N = begins.sum(1)
    n, most = len(words_N), int(words_N.max(initial=0))
    rows = np.arange(n)
    inside = (text.hidden_NW & (word_NW >= 0)).nonzero()
    size = np.bincount(inside[0] * most + word_NW[inside], minlength=n * most).reshape(n, most)
    # ends[:, w] tokens lie before word w; `ngram` columns more, so that w + ngram is inside.
    ends = np.zeros((n, most + ngram + 1), np.int64)
    np.cumsum(size, axis=1, out=ends[:, 1 : most + 1])
    ends[:, most + 1 :] = ends[:, most : most + 1]
    keys = _order_keys(text, most)
    keys[np.arange(most) >= words_N[:, None]] = np.iinfo(np.uint64).max
    order = np.argsort(keys, axis=1)
    spans = _span_sizes(text, order, words_N, ngram)
    taken = np.zeros((n, most + ngram), bool)
    left = count_N.astype(np.int64)
    for step in range(most):
        word, span = order[:, step], spans[:, step].copy()
        for shorter in range(ngram - 1, 0, -1):
            span -= (span > shorter) & (ends[rows, word + span] - ends[rows, word] > left)
        cost = ends[rows, word + span] - ends[rows, word]
        free = (cost <= left) & (step < words_N)
        for i in range(ngram):
            free &= ~(taken[rows, word + i] & (i < span))
        for i in range(ngram):
            taken[rows, word + i] |= free & (i < span)
        left -= np.where(free, cost, 0)
        if not left.any():
            break
    chosen = np.zeros(text.hidden_NW.shape, bool)
    chosen[inside] = taken[inside[0], word_NW[inside]]
    return chosen


def _span_sizes(text: Text, order: np.ndarray, words_N: np.ndarray, ngram: int) -> np.ndarray:
    """Words of the span from each word of `order`: n with p ~ 1/n, cut at the last word."""
    shares = np.cumsum(1 / np.arange(1, ngram + 1))
    u = draws.uniform(text.states_N[:, None], _SPAN + 1 + order) * shares[-1]
    size = 1 + np.searchsorted(shares[:-1], u, side="right")
    return np.clip(size, 1, np.maximum(words_N[:, None] - order, 1))
