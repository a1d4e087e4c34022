# SPDX-License-Identifier: Apache-2.0
"""FULL-SENTENCES: whole sentences in order, as many as fit, across documents, none left out."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import ORDINARY, documents, originals, same, split_of

from lmjax.examples.full_sentences import FullSentences
from lmjax.examples.masks import BertMasks


def rows_of(batch) -> list[list[int]]:
    """The tokens of each row, masks undone, without padding."""
    sizes = batch["segments_BL"].sum(1)
    return [row[:size].tolist() for row, size in zip(originals(batch), sizes, strict=True)]


def filled(split, length: int, start: int) -> list[list[int]]:
    """All rows by a loop over the sentences' pieces, the first row ending before piece `start`."""
    pieces = []
    for document in range(split.n_documents):
        end = int(split.starts[document + 1])
        begins = [int(s) for s in split.sentences if split.starts[document] <= s < end]
        for begin, after in zip(begins, [*begins[1:], end], strict=False):
            for at in range(begin, after, length - 2):
                pieces.append((at, min(at + length - 2, after)))
    rows, row = [], []
    for number, (begin, end) in enumerate(pieces):
        if row and (number == start or end - row[0][0] > length - 2):
            rows.append(row)
            row = []
        row.append((begin, end))
    rows.append(row)
    return [[1, *split.tokens[row[0][0] : row[-1][1]].tolist(), 2] for row in rows]


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(3, 60), st.integers(0, 2**40), st.integers(0, 12))
def test_a_pass_is_the_text_cut_into_full_rows(lengths, length: int, seed: int, pass_: int):
    split, maker = split_of(lengths), FullSentences(length)
    counts = [maker.variant(split, seed, v).count() for v in range(10)]
    before = sum(counts) * (pass_ // 10) + sum(counts[: pass_ % 10])
    batch = maker.train(split, seed, before + np.arange(counts[pass_ % 10]))
    assert set(batch) == {"tokens_BL", "segments_BL", "masked_BP", "targets_BP", "weights_BP"}
    assert set(np.unique(batch["segments_BL"])) <= {0, 1}
    found = sorted(rows_of(batch))
    assert any(found == sorted(filled(split, length, start)) for start in range(length))
    assert all(row[0] == 1 and row[1] != 2 and 3 <= len(row) <= length for row in found)


def test_passes_begin_elsewhere_and_come_in_another_order():
    split, maker = split_of([[5, 4, 6, 7, 3, 9, 5] * 30]), FullSentences(40)
    counts = [maker.variant(split, 1, v).count() for v in range(10)]
    ends = np.cumsum(counts)
    passes = [
        rows_of(maker.train(split, 1, np.arange(end - n, end)))
        for end, n in zip(ends, counts, strict=True)
    ]
    assert len({min(len(row) for row in rows if row[1] == 1 + ORDINARY) for rows in passes}) > 3
    assert all(rows != sorted(rows) for rows in passes)
    first = passes[0]
    again = maker.train(split, 1, ends[-1] + np.arange(counts[0]))
    assert sorted(rows_of(again)) == sorted(first) and rows_of(again) != first


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(3, 60), st.lists(st.integers(0, 10**6), min_size=1, max_size=9))
def test_an_example_is_the_same_in_any_batch(lengths, length: int, examples):
    split, maker = split_of(lengths), FullSentences(length)
    whole = maker.train(split, 4, np.asarray(examples))
    again = replace(split, memo={})
    for i, example in enumerate(examples):
        assert same(maker.train(again, 4, np.array([example])), whole, slice(i, i + 1))
    n = maker.held_out_count(split)
    held_out = maker.held_out(split, np.arange(n + 1))
    assert same(maker.held_out(again, np.arange(n)), held_out, slice(n))
    firsts = [row[1] for row in rows_of(held_out)[:n]]
    assert firsts == sorted(firsts)


def test_the_ends_of_rows_are_hidden_as_often_as_the_text():
    split, maker = split_of([[9, 8, 12, 5] * 10] * 20), FullSentences(40)
    batch = maker.train(split, 0, np.arange(4000))
    used = batch["weights_BP"] > 0
    assert abs((batch["masked_BP"][used] == 0).sum() / 4000 - 0.15) < 0.025
    assert 2 in batch["targets_BP"][used]
    never = FullSentences(40, BertMasks()).train(split, 0, np.arange(400))
    assert not np.isin(never["targets_BP"][never["weights_BP"] > 0], [1, 2]).any()


def test_rows_too_short_for_text_are_refused():
    with pytest.raises(ValueError, match="length=2: must be at least 3"):
        FullSentences(2)
    with pytest.raises(ValueError, match="train split has no sentences"):
        FullSentences(9).held_out_count(replace(split_of([[3]]), sentences=None))
