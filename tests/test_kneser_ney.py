# SPDX-License-Identifier: Apache-2.0
"""The n-gram baseline, against the definition written out with dictionaries."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kneser_ney import END, START, KneserNey, discounts_of, perplexities, stream_of
from lmjax.data import Data
from lmjax.examples.streams import Streams
from lmjax.text import Files
from lmjax.vocabulary import Vocabulary

SIZE = 30


def sentences(seed: int, count: int) -> list[list[int]]:
    """Sentences of words 3 to SIZE - 4, the frequent ones first; the last three never occur."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, SIZE - 5)
    sizes = rng.integers(1, 9, count)
    return [list(rng.choice(np.arange(3, SIZE - 3), n, p=share / share.sum())) for n in sizes]


def stream(found: list[list[int]]) -> np.ndarray:
    return np.array([i for sentence in found for i in (START, *sentence, END)])


class Naive:
    """The definition, a word at a time."""

    def __init__(self, found: list[list[int]], order: int):
        plain: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        for sentence in found:
            words = (START, *sentence, END)
            for k in range(1, order + 1):
                plain[k].update(words[i : i + k] for i in range(len(words) - k + 1))
        before = defaultdict(set)
        for k in range(2, order + 1):
            for words in plain[k]:
                before[words[1:]].add(words[0])
        self.counts, self.discounts = [{}], [[]]
        for k in range(1, order + 1):
            counts = {
                words: n if k == order or words[0] == START else len(before[words])
                for words, n in plain[k].items()
                if words != (START,)
            }
            self.counts.append(counts)
            self.discounts.append(self._discounts(list(counts.values())))

    def _discounts(self, counts: list[int]) -> list[float]:
        n1, n2, n3, n4 = (counts.count(j) for j in (1, 2, 3, 4))
        if 0 in (n1, n2, n3, n4):
            return [0, 0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        ok = all(0 <= d <= j for j, d in enumerate(found, 1))
        return [0, *found] if ok else [0, 0.5, 1.0, 1.5]

    def probability(self, context: tuple[int, ...], word: int) -> float:
        k = len(context) + 1
        lower = self.probability(context[1:], word) if context else 1 / (SIZE - 1)
        same = {words: n for words, n in self.counts[k].items() if words[:-1] == context}
        if not same:
            return lower
        total, take = sum(same.values()), self.discounts[k]
        left = sum(take[min(n, 3)] for n in same.values()) / total
        own = same.get((*context, word), 0)
        return (own - take[min(own, 3)]) / total + left * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_definition(order: int):
    train, test = sentences(0, 300), sentences(1, 20)
    naive = Naive(train, order)
    wanted = []
    for sentence in test:
        words = (START, *sentence, END)
        for i in range(1, len(words)):
            wanted.append(naive.probability(words[max(0, i - order + 1) : i], words[i]))
    found = KneserNey(stream(train), SIZE, order).probabilities(stream(test))
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    # The discounts were not all the fixed ones of small texts.
    assert order == 1 or any(d != [0, 0.5, 1.0, 1.5] for d in naive.discounts[1:])


def test_probabilities_sum_to_one():
    train = sentences(0, 300)
    model = KneserNey(stream(train), SIZE, 5)
    rng = np.random.default_rng(2)
    seen = [s[: rng.integers(0, len(s) + 1)] for s in train[:30]]
    contexts = [*seen, *(list(rng.integers(2, SIZE, rng.integers(0, 7))) for _ in range(30))]
    for context in contexts:
        words = np.arange(1, SIZE)  # <S> is never predicted
        rows = np.array([[START, *context, word] for word in words])
        p = model.probabilities(rows.reshape(-1)).reshape(len(words), -1)[:, -1]
        assert p.min() > 0
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)


def test_discounts_by_hand():
    counts = np.repeat([0, 1, 2, 3, 4, 9], [7, 10, 5, 3, 2, 1])
    y = 10 / 20
    wanted = [0, 1 - 2 * y * 5 / 10, 2 - 3 * y * 3 / 5, 3 - 4 * y * 2 / 3]
    np.testing.assert_allclose(discounts_of(counts), wanted)
    np.testing.assert_allclose(discounts_of(np.array([1, 1, 2])), [0, 0.5, 1, 1.5])


def test_a_stored_stream_is_read_both_ways():
    tokens = np.array([3, 4, 9 + 5, 9 + 256 + 7, END, 5, END], np.uint16)  # one word is spelt
    assert stream_of(tokens, 9).tolist() == [START, 3, 4, 2, END, START, 5, END]
    assert stream_of(tokens, 9, True).tolist() == [START, 5, END, START, 2, 4, 3, END]


def test_it_scores_the_targets_of_streams(tmp_path: Path):
    rng = np.random.default_rng(0)
    for name, count in (("a", 200), ("b", 30)):
        lines = [
            " ".join(f"w{i}" for i in rng.zipf(1.5, rng.integers(1, 9)) if i < 60)
            for _ in range(count)
        ]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), "utf-8")
    maker = Streams(characters=0, streams=1)
    data = Data(
        Files(str(tmp_path / "*.txt")), Vocabulary(size=20), maker,
        validation=0.0, test=0.0, held_out="b.txt:*",
    )  # fmt: skip
    prepared = data.prepare(tmp_path / "run", say=lambda line: None)
    splits, size = prepared.store.splits, 20
    held = maker.held_out(
        splits["validation"], np.arange(maker.held_out_count(splits["validation"]))
    )
    scored = held["weights_BXL"] > 0
    for direction, backward in enumerate((False, True)):
        wanted = held["targets_BXL"][:, direction][scored[:, direction]]
        ours = stream_of(splits["validation"].tokens, size, backward)
        # A sentence backward ends in <S> there, in the mark of an end here: in <S> nothing begins.
        ends = START if backward else END
        assert sorted(np.where(wanted == ends, END, wanted)) == sorted(ours[ours != START])
    found = perplexities(splits["train"].tokens, splits["validation"].tokens, size, 3)
    assert found["words"] == scored[:, 0].sum()
    assert found["unknown_words"] > 0
    assert 1 < found["forward_perplexity"] < size - 1
    assert found["forward_perplexity"] != found["backward_perplexity"]
