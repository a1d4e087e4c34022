# SPDX-License-Identifier: Apache-2.0
"""Pairs: what holds for them on any text, and that each is a function of its index alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import ORDINARY, check_batch, documents, originals, same, split_of

from lmjax.examples import draws, rows
from lmjax.examples.masks import BertMasks, ElectraMasks
from lmjax.examples.pairs import SentencePairs

BITS = [13572837776801163602, 17832304155157781687]
TOKENS = [
    [1, 13, 14, 15, 16, 17, 18, 3, 20, 21, 2, 3, 37, 38, 39, 2],
    [1, 22, 23, 3, 2, 40, 41, 3, 43, 2, 0, 0, 0, 0, 0, 0],
]
PAIRINGS = ("next", "order", "segments")

makers = st.builds(
    SentencePairs,
    length=st.integers(5, 60),
    pairing=st.sampled_from(PAIRINGS),
    positive=st.integers(0, 1),
    duplicates=st.integers(1, 3),
    static=st.booleans(),
    short=st.sampled_from([0.0, 0.1, 1.0]),
    masks=st.sampled_from([BertMasks(), ElectraMasks(), BertMasks(ngram=3), BertMasks(0.9, 4)]),
    pack=st.booleans(),
)


# --- the draws ------------------------------------------------------------------------------------


def test_draws_are_uniform_and_the_same_one_at_a_time():
    streams = draws.states(5, np.arange(100_000))
    u = draws.uniform(streams, 3)
    assert abs(u.mean() - 0.5) < 0.004 and abs((u < 0.1).mean() - 0.1) < 0.004
    assert 0 <= u.min() and u.max() < 1
    assert abs(np.corrcoef(u, draws.uniform(streams, 4))[0, 1]) < 0.015
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.015
    assert abs(np.corrcoef(u, draws.uniform(draws.states(6, np.arange(100_000)), 3))[0, 1]) < 0.015
    assert draws.uniform(draws.states(5, np.array([77])), 3)[0] == u[77]
    numbers = draws.integers(streams, 0, 2, 7)
    assert set(numbers.tolist()) == {2, 3, 4, 5, 6}
    assert draws.integers(streams[:3], 0, 4, 4).tolist() == [4, 4, 4]


@pytest.mark.parametrize("flips", [0, 1, 5, 63, 64, 65, 300])
def test_heads_are_binomial(flips: int):
    streams = draws.states(9, np.arange(20_000))
    heads = draws.heads(streams, 0, np.full(20_000, flips))
    assert heads.min() >= 0 and heads.max() <= flips
    assert abs(heads.mean() - flips / 2) <= 4 * (flips / 4 / 20_000) ** 0.5
    assert abs(heads.var() - flips / 4) <= 0.05 * flips / 4


def test_the_draws_are_pinned():  # others would give a resumed run other examples
    state = draws.states(7, np.array([0, 1]))
    assert draws.bits(state, 0).tolist() == BITS
    batch = SentencePairs(16).train(split_of([[5, 6, 3], [9], [4, 4]]), 1, np.arange(2))
    assert batch["tokens_BL"].tolist() == TOKENS


# --- invariants on any text -----------------------------------------------------------------------


def parts(batch, row: int) -> tuple[list[int], list[int], int]:
    """(places of A, places of B, label) of an unpacked row."""
    tokens, types = originals(batch)[row], batch["types_BL"][row]
    size = int(batch["segments_BL"][row].sum())
    assert tokens[0] == 1 and tokens[size - 1] == 2
    second = np.flatnonzero(types)
    first_end = int(second[0]) if len(second) else size
    assert tokens[first_end - 1] == 2 and (len(second) == 0 or second[-1] == size - 1)
    a = (tokens[1 : first_end - 1] - ORDINARY).tolist()
    b = (tokens[first_end : size - 1] - ORDINARY).tolist() if len(second) else []
    label = int(batch["pairs_BC"][row, 0]) if "pairs_BC" in batch else -1
    return a, b, label


@settings(max_examples=150, deadline=None)
@given(documents, makers, st.integers(0, 2**40))
def test_every_row_is_made_of_ranges_of_the_text(lengths, maker, seed: int):
    split, maker = split_of(lengths), replace(maker, pack=False)
    n = maker.held_out_count(split)
    batch = maker.train(split, seed, np.arange(2 * n))
    check_batch(batch, 2 * n, maker.length, maker.masks.slots(maker.length))
    document = np.searchsorted(split.starts, np.arange(len(split.tokens)), side="right")
    for row in range(2 * n):
        a, b, label = parts(batch, row)
        assert a and (b or maker.pairing == "segments")
        for places in (a, b):
            assert places == list(range(places[0], places[-1] + 1)) if places else True
            assert len({document[place] for place in places}) <= 1
        if maker.pairing == "segments":
            assert label == -1 and (not b or b[0] > a[-1])
        elif label == maker.positive:  # B follows A, but for what a truncation took
            assert document[a[0]] == document[b[0]] and b[0] > a[-1]
            assert b[0] == a[-1] + 1 or len(a) + len(b) == maker.length - 3
        elif maker.pairing == "next" and sum(map(bool, lengths)) > 1:
            # Ten tries may all find the same of two documents, one time in a thousand.
            assert sum(map(bool, lengths)) == 2 or document[a[0]] != document[b[0]]


@settings(max_examples=100, deadline=None)
@given(documents, makers, st.integers(0, 2**40))
def test_every_sentence_is_used_in_order_or_given_back(lengths, maker, seed: int):
    # Nothing is truncated, so the texts show the sentences that they were made of.
    split, maker = split_of(lengths), replace(maker, length=700, short=0.0, pack=False)
    ranges = maker.ranges(split, seed)
    true = ranges.label_n == maker.positive
    swapped = ~true & (maker.pairing == "order") & (ranges.b_from_n < ranges.a_from_n)
    swapped &= ranges.b_from_n + ranges.b_size_n == ranges.a_from_n
    own = []  # what each chunk used of its own document
    for i in range(len(true)):
        a = range(ranges.a_from_n[i], ranges.a_from_n[i] + ranges.a_size_n[i])
        b = range(ranges.b_from_n[i], ranges.b_from_n[i] + ranges.b_size_n[i])
        if maker.pairing == "segments" or true[i]:
            own += [*a, *b]
        elif swapped[i]:
            own += [*b, *a]
        else:
            own += a
        assert a.start in split.sentences and (not b or b.start in split.sentences)
    ordinary = np.ones(len(split.tokens), bool)
    ordinary[split.starts[:-1]] = False
    if maker.pairing == "order" and len(lengths) > 0:
        assert set(own) <= set(np.flatnonzero(ordinary))  # a lone B may look swapped
    if maker.pairing != "order":
        assert own == np.flatnonzero(ordinary).tolist()


@settings(max_examples=100, deadline=None)
@given(documents, makers, st.integers(0, 2**40), st.lists(st.integers(0, 10**7), max_size=9))
def test_an_example_is_the_same_in_any_batch(lengths, maker, seed: int, far):
    split = split_of(lengths)
    n = maker.held_out_count(split)
    order = np.asarray([3, 0, 2 * n, 1, *far], np.int64)
    whole = maker.train(split, seed, order)
    again = replace(split, memo={})  # and needs nothing that came before
    for i, example in enumerate(order.tolist()):
        assert same(maker.train(again, seed, np.array([example])), whole, slice(i, i + 1))
    held_out = maker.held_out(split, np.arange(n + 2))
    assert same(maker.held_out(again, np.arange(n)), held_out, slice(n))


def test_single_sentences_always_take_a_random_second_text():
    split = split_of([[7], [8], [9]] * 40)
    batch = SentencePairs(128).train(split, 0, np.arange(1000))
    assert batch["pairs_BC"].all()
    mixed = split_of([[40], [40, 41, 30, 42, 30]] * 40)
    batch = SentencePairs(128).train(mixed, 0, np.arange(4000))
    assert 0.6 < batch["pairs_BC"].mean() < 0.9  # so more than half are random
    order = SentencePairs(128, "order", short=0).train(mixed, 0, np.arange(4000))
    # Of the five sentences, four fill a pair and the last is alone.
    assert abs(order["pairs_BC"].mean() - (1 + 1 + 0.5) / 3) < 0.04


def test_a_pass_shows_each_pair_once_and_variants_repeat():
    split = split_of([[9, 8, 7, 12, 3, 8]] * 20)
    maker = SentencePairs(40, duplicates=2, static=True)
    counts = [maker.variant(split, 5, v).count() for v in range(2)]
    cycle = sum(counts)
    two = maker.train(split, 5, np.arange(2 * cycle))
    first, second = ([row.tobytes() for row in two["tokens_BL"][i : i + cycle]] for i in (0, cycle))
    assert sorted(first) == sorted(second) and first != second
    assert sorted(first[: counts[0]]) != sorted(first[counts[0] :])
    dynamic = replace(maker, static=False)
    other = dynamic.train(split, 5, np.arange(2 * cycle))
    first, second = (
        [row.tobytes() for row in other["tokens_BL"][i : i + cycle]] for i in (0, cycle)
    )
    assert sorted(first) != sorted(second)
    first, second = (sorted(map(bytes, originals(other)[i : i + cycle])) for i in (0, cycle))
    assert first == second


def test_examples_far_into_a_run_cost_no_more_than_the_variants(monkeypatch):
    split, made = split_of([[9, 8, 7, 12]] * 9), []
    ranges = SentencePairs.ranges
    monkeypatch.setattr(SentencePairs, "ranges", lambda *a: made.append(0) or ranges(*a))
    maker = SentencePairs(40, duplicates=4)
    maker.train(split, 0, np.array([10**9, 2 * 10**9, 5]))
    assert len(made) == 4
    split.memo.clear()
    maker.train(split, 0, np.arange(3))
    assert len(made) == 5
    monkeypatch.setattr(rows, "_KEPT_BYTES", 0)  # a text too large to keep
    split.memo.clear()
    maker.train(split, 0, np.array([10**9]))
    assert len(made) <= 10 and len(split.memo[maker, 0]._kept) == 2


def test_short_targets_reach_both_their_ends():
    split = split_of([[1] * 40] * 300)
    ranges = SentencePairs(8, short=1.0).ranges(split, 1)
    true = ranges.label_n == 0  # a chunk of single tokens has exactly its target
    tokens = (ranges.a_size_n + ranges.b_size_n)[true]
    assert set(tokens.tolist()) == {1 + 1, 3, 4, 5}


def test_a_first_segment_is_half_of_what_the_controls_leave():
    ranges = SentencePairs(20, "segments", short=0.05).ranges(split_of([[1] * 20] * 400), 1)
    full = (ranges.a_size_n + ranges.b_size_n == 17) & (ranges.b_size_n > 0)
    usual = np.isin(ranges.a_size_n[full], [7, 8])  # below 8, or the token that reaches it
    assert usual.mean() > 0.97 and 0.4 < (ranges.a_size_n[full][usual] == 8).mean() < 0.6


def test_a_text_that_was_cut_at_the_front_begins_with_a_word():
    split = split_of([[50, 60]] * 20)
    split.marks[:] = 0
    split.marks[split.sentences] = 3
    masks = BertMasks(rate=1.0, predictions=30, whole_word=True)
    batch = SentencePairs(30, masks=masks).train(split, 0, np.arange(40))
    assert (batch["weights_BP"].sum(1) == batch["segments_BL"].sum(1) - 3).all()


def test_blocks_of_documents_change_nothing(monkeypatch):
    split = split_of([[9, 8, 7, 12], [3], [5, 5], [], [30, 2, 2]] * 9)
    for pairing in PAIRINGS:
        maker = SentencePairs(40, pairing)
        whole = maker.ranges(split, 3)
        monkeypatch.setattr("lmjax.examples.sentences._BLOCK", 5)
        assert all(map(np.array_equal, maker.ranges(split, 3), whole))
        monkeypatch.undo()


def test_positive_flips_the_labels_alone():
    split = split_of([[9, 8, 7, 12, 3, 8]] * 20)
    bert, ernie = (SentencePairs(40, positive=p).train(split, 0, np.arange(99)) for p in (0, 1))
    assert np.array_equal(bert.pop("pairs_BC"), 1 - ernie.pop("pairs_BC"))
    assert same(bert, ernie)


# --- what is refused ------------------------------------------------------------------------------


def test_splits_that_cannot_make_pairs_are_refused():
    split, maker = split_of([[5, 6]]), SentencePairs(32)
    with pytest.raises(ValueError, match=r"train split has no sentences.*data.units=Units"):
        maker.train(replace(split, sentences=None, memo={}), 0, np.arange(1))
    with pytest.raises(ValueError, match="no text, so not even one example"):
        maker.held_out_count(replace(split, sentences=np.zeros(0, np.int64), memo={}))
    with pytest.raises(ValueError, match=r"SentencePairs needs .*has no cls, mask"):
        maker.train(replace(split, controls={"sep": 2}, memo={}), 0, np.arange(1))
    words = SentencePairs(32, masks=BertMasks(whole_word=True))
    with pytest.raises(ValueError, match="no marks of words, which BertMasks reads"):
        words.train(replace(split, marks=None, memo={}), 0, np.arange(1))
    maker.train(replace(split, marks=None, memo={}), 0, np.arange(1))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"length": 4}, "length=4: must be at least 5"),
        ({"length": 9, "pairing": "nxt"}, "pairing=nxt: one of next, order, segments"),
        ({"length": 9, "positive": 2}, "positive=2"),
        ({"length": 9, "duplicates": 0}, "duplicates=0"),
        ({"length": 9, "short": 1.5}, "short=1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message: str):
    with pytest.raises(ValueError, match=message):
        SentencePairs(**fields)
