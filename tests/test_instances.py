# SPDX-License-Identifier: Apache-2.0
"""Instances made elsewhere come back as they were, with their labels, and negatives of them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import check_batch, originals, same, split_of

from lmjax.examples.instances import LABEL, Instances
from lmjax.examples.masks import ErnieMasks

pairs = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.booleans()), min_size=1, max_size=12
)


def split_of_pairs(drawn):
    """[CLS] A [SEP] B [SEP], of tokens that are all different."""
    ids, marks = [], []
    for a, b, label in drawn:
        first = 100 + len(ids)
        ids += [1, *range(first, first + a), 2, *range(first + a, first + a + b), 2]
        row = [3 * (i % 3 == 0) for i in range(a + b + 3)]
        row[0] |= LABEL * label
        marks += row
    lengths = [[a + 2, b + 1] for a, b, _ in drawn]
    return split_of(lengths, ids, np.array(marks, np.uint8), vocab=5000)


def stored(split, number: int) -> list[int]:
    """The tokens of an instance."""
    return split.tokens[split.starts[number] + 1 : split.starts[number + 1]].tolist()


@settings(max_examples=100, deadline=None)
@given(pairs, st.integers(0, 2**40), st.booleans())
def test_each_pass_shows_every_instance_once_as_stored(drawn, seed: int, pack: bool):
    split, maker = split_of_pairs(drawn), Instances(64, pack=pack)
    n = maker.held_out_count(split)
    seen = []
    for batch in (maker.held_out(split, np.arange(n)), maker.train(split, seed, np.arange(n) + n)):
        check_batch(batch, n, 64, maker.masks.slots(64))
        found = []
        for row, tokens in enumerate(originals(batch)):
            for c in np.flatnonzero(batch["pair_weights_BC"][row]):
                here = batch["segments_BL"][row] == c + 1
                second = batch["types_BL"][row][here]
                found.append((tokens[here].tolist(), int(batch["pairs_BC"][row, c]), second.sum()))
                assert np.flatnonzero(here)[0] == batch["firsts_BC"][row, c]
        seen.append(sorted(found))
    expected = [(stored(split, i), int(label), b + 1) for i, (_, b, label) in enumerate(drawn)]
    assert seen[0] == seen[1] == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(pairs, st.integers(0, 2**40))
def test_negatives_join_an_a_to_the_b_of_another(drawn, seed: int):
    split = split_of_pairs([(a, b, True) for a, b, _ in drawn])
    maker = Instances(43, negatives=True)
    variant = maker.variant(split, seed, 3)
    label = variant.ranges.label_n
    assert label.sum() == len(drawn)
    whole = {(r[0], r[2]) for r in zip(*(c.tolist() for c in variant.ranges), strict=True) if r[4]}
    negative = [r for r in zip(*(c.tolist() for c in variant.ranges), strict=True) if not r[4]]
    assert len(negative) == (len(drawn) if len(drawn) > 1 else 0)  # each fits in 43
    assert len({r[0] for r in negative}) == len({r[2] for r in negative}) == len(negative)
    assert not whole & {(r[0], r[2]) for r in negative}


def test_negatives_that_are_too_long_are_left_out():
    split = split_of_pairs([(20, 1, True), (1, 20, True)])
    ranges = Instances(30, negatives=True).variant(split, 0, 0).ranges
    assert sorted(ranges.sizes().tolist()) == [5, 24, 24]


def test_masks_are_drawn_at_each_pass_and_read_the_stored_words():
    split = split_of_pairs([(9, 8, True), (7, 12, False), (20, 20, True)] * 20)
    maker = Instances(64)
    one, two = (maker.train(split, 1, np.arange(60) + 60 * p) for p in (0, 1))
    assert sorted(map(bytes, originals(one))) == sorted(map(bytes, originals(two)))
    assert sorted(map(bytes, one["tokens_BL"])) != sorted(map(bytes, two["tokens_BL"]))
    scored = np.zeros((60, 64), bool)
    rows, slots = np.nonzero(one["weights_BP"])
    scored[rows, one["masked_BP"][rows, slots]] = True
    for row, tokens in enumerate(originals(one)):
        place = {t: int(split.marks[p]) for p, t in enumerate(split.tokens.tolist()) if t > 3}
        for column in range(1, 63):
            follows = tokens[column] > 3 and tokens[column - 1] > 3
            if follows and not place[int(tokens[column])] & 1:
                assert scored[row, column] == scored[row, column - 1]  # a word is whole
    again = maker.train(replace(split, memo={}), 1, np.array([7, 3]))
    assert same(again, one, [7, 3])


def test_what_is_no_store_of_instances_is_refused():
    split = split_of_pairs([(9, 8, True), (7, 12, False)])
    with pytest.raises(ValueError, match=r"1 of the 2 instances .*length=21; the longest has 22"):
        Instances(21).held_out_count(split)
    with pytest.raises(ValueError, match="1 instances of the train split are negatives already"):
        Instances(64, negatives=True).held_out_count(split)
    with pytest.raises(ValueError, match=r"not hold instances, two sentences a document.*Pairs"):
        Instances(64).held_out_count(split_of([[5, 3, 2]]))
    with pytest.raises(ValueError, match=r"document 1 of the train split is not \[CLS\] A"):
        Instances(64).held_out_count(split_of([[5, 3]]))
    missing = replace(split, marks=None, memo={})
    with pytest.raises(ValueError, match="no marks of words, which ErnieMasks reads"):
        Instances(64).held_out_count(missing)
    with pytest.raises(ValueError, match="not hold instances"):
        Instances(64, masks=ErnieMasks(characters=1, words=0)).held_out_count(missing)
