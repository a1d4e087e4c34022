# SPDX-License-Identifier: Apache-2.0
"""Packed rows hold every instance once, exactly as it would be alone, within all bounds."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import check_batch, documents, originals, same, split_of

from lmjax.examples.masks import BertMasks, ElectraMasks, ErnieMasks
from lmjax.examples.packing import SEQUENCES, pack
from lmjax.examples.pairs import SentencePairs

schemes = st.sampled_from([BertMasks(), BertMasks(predictions=2), ElectraMasks(), ErnieMasks()])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=60),
    st.integers(0, 2**40),
)
def test_rows_keep_every_bound_and_every_instance(drawn, seed: int):
    sizes, costs = np.array(drawn).T
    packing = pack(sizes, costs, 30, 6, seed)
    assert np.array_equal(np.sort(packing.instances_n), np.arange(len(drawn)))
    assert packing.starts_R[0] == 0 and packing.starts_R[-1] == len(drawn)
    rows = np.split(packing.instances_n, packing.starts_R[1:-1])
    for row in rows:
        assert 1 <= len(row) <= SEQUENCES
        assert sizes[row].sum() <= 30 and costs[row].sum() <= 6
    again = pack(sizes, costs, 30, 6, seed)
    assert all(map(np.array_equal, packing, again))


def test_rows_are_nearly_full():
    sizes = np.random.default_rng(0).integers(10, 90, 20_000)
    packing = pack(sizes, np.zeros(20_000, int), 128, 20, 1)
    assert sizes.sum() / 128 / (len(packing.starts_R) - 1) > 0.97
    other = pack(sizes, np.zeros(20_000, int), 128, 20, 2)
    assert not np.array_equal(packing.instances_n, other.instances_n)
    # More than SEQUENCES would fit: the bound holds, and leaves rows open to no one.
    tiny = pack(np.full(100, 2), np.zeros(100, int), 128, 20, 1)
    assert np.diff(tiny.starts_R).tolist() == [8] * 12 + [4]


def sequences(batch) -> list[tuple]:
    """Every sequence of a batch as it would be alone: tokens, targets, types, places, label."""
    found = []
    for row in range(len(batch["tokens_BL"])):
        segments = batch["segments_BL"][row]
        scored = np.zeros(segments.shape)
        used = batch["weights_BP"][row] > 0
        scored[batch["masked_BP"][row][used]] = batch["weights_BP"][row][used]
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            label = batch["pairs_BC"][row, segment - 1] if "pairs_BC" in batch else 0
            arrays = [batch["tokens_BL"], originals(batch), batch["types_BL"]]
            found.append((*(a[row][here].tobytes() for a in arrays), scored[here].tobytes(), label))
    return sorted(found)


@settings(max_examples=100, deadline=None)
@given(documents, schemes, st.integers(0, 2**40), st.sampled_from(["next", "segments"]))
def test_packing_moves_instances_and_changes_none(lengths, masks, seed: int, pairing: str):
    split = split_of(lengths * 3)
    alone = SentencePairs(64, pairing, short=0.8, masks=masks)
    packed = replace(alone, pack=True)
    counts = [m.variant(split, seed, 0).count() for m in (alone, packed)]
    assert counts[1] <= counts[0]
    one = alone.train(split, seed, np.arange(counts[0]))
    other = packed.train(split, seed, np.arange(counts[1]))
    check_batch(other, counts[1], 64, masks.slots(64))
    if not isinstance(masks, ErnieMasks):  # whose rows may run out of slots
        assert sequences(one) == sequences(other)
    segments, positions = other["segments_BL"], other["positions_BL"]
    for row in range(counts[1]):
        size = int((segments[row] > 0).sum())
        assert (np.diff(segments[row][:size]) >= 0).all() and not segments[row][size:].any()
        begins = np.flatnonzero(np.diff(segments[row][:size], prepend=0))
        since = np.arange(size) - begins[segments[row][:size] - 1]
        assert np.array_equal(positions[row][:size], since) and not positions[row][size:].any()
        if pairing == "next":
            n = len(begins)
            assert other["firsts_BC"].shape == (counts[1], SEQUENCES)
            assert other["firsts_BC"][row, :n].tolist() == begins.tolist()
            assert other["pair_weights_BC"][row].tolist() == [1] * n + [0] * (SEQUENCES - n)
            assert (other["tokens_BL"][row, begins] == 1).all()
            assert not other["firsts_BC"][row, n:].any() and not other["pairs_BC"][row, n:].any()


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_find_no_slot_are_left_as_they_were(monkeypatch, packed: bool):
    split = split_of([[9, 8, 12, 5] * 10] * 5)
    maker = SentencePairs(40, masks=ErnieMasks(0.9, together=True), pack=packed)
    full = maker.train(split, 0, np.arange(50))
    monkeypatch.setattr(ErnieMasks, "slots", lambda *_: 4)
    few = maker.train(replace(split, memo={}), 0, np.arange(50))
    check_batch(few, 50, 40, 4)
    assert np.array_equal(originals(few), originals(full))
    assert np.array_equal(few["masked_BP"], full["masked_BP"][:, :4])
    assert (few["tokens_BL"] != full["tokens_BL"]).any()


@pytest.mark.parametrize("pairing", ["next", "order", "segments"])
def test_whole_passes_come_in_another_order_each(pairing: str):
    split, maker = split_of([[9, 8, 12, 5]] * 30), SentencePairs(80, pairing, 0, 1, pack=True)
    n = maker.variant(split, 0, 0).count()
    one, two = (maker.train(split, 0, np.arange(n) + n * p) for p in (0, 1))
    assert not same(one, two)
    assert sorted(map(bytes, originals(one))) == sorted(map(bytes, originals(two)))
