# SPDX-License-Identifier: Apache-2.0
"""Permutations are bijections, and windows show every token exactly as often as they promise."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.document import Document
from lmjax.examples.permutation import mix, permute
from lmjax.examples.windows import Windows
from lmjax.store import Split, build_store, open_store
from lmjax.tokenizer import ByteBPE, load_tokenizer

# Pinned: another order would give a resumed run other batches than it was promised.
GOLDEN_ORDER = [5, 4, 7, 6, 2, 0, 8, 3, 9, 1]
GOLDEN_SEED = 3_576_551_030_862_603_118

ARRAYS = {"tokens_BL", "targets_BL", "weights_BL", "segments_BL", "positions_BL"}


def split_of_lengths(lengths: list[int], eot: int | None = 0, name: str = "train") -> Split:
    """A split whose token at place p is p, so that a window shows where it was cut."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(starts[-1], dtype=np.uint32)
    sizes = np.asarray(lengths, np.int64)
    return Split(name, tokens, starts, sizes, Path("unused"), int(sizes.sum()), eot)


def by_hand(split: Split, start: int, length: int) -> dict[str, list[int]]:
    """One window by a loop over its tokens."""
    total, begins = len(split.tokens), set(split.starts[:-1].tolist())
    segment, since = 1, 0
    rows: dict[str, list[int]] = {key: [] for key in ARRAYS - {"weights_BL"}}
    for column in range(length):
        place = (start + column) % total
        if column and place in begins:
            segment, since = segment + 1, 0
        rows["tokens_BL"].append(int(split.tokens[place]))
        rows["targets_BL"].append(int(split.tokens[(place + 1) % total]))
        rows["segments_BL"].append(segment)
        rows["positions_BL"].append(since)
        since += 1
    return rows


# Documents shorter and longer than the windows, always with enough tokens for one window.
lengths_and_window = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 24)
).filter(lambda drawn: sum(drawn[0]) >= drawn[1] + 1)


# --- permutations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4096, 70_001])
def test_permutation_is_a_bijection(n: int):
    for seed in (0, 1, mix(7, 3)):
        image = permute(np.arange(n), n, seed)
        assert image.dtype == np.int64
        assert np.array_equal(np.sort(image), np.arange(n))


def test_permutation_is_the_same_one_element_at_a_time():
    whole = permute(np.arange(1000), 1000, 5)
    alone = [int(permute(np.array([i]), 1000, 5)[0]) for i in range(1000)]
    assert whole.tolist() == alone
    assert np.array_equal(permute(np.arange(1000).reshape(50, 20), 1000, 5).reshape(-1), whole)


def test_permutation_of_a_set_too_large_to_list():
    n = 10**12 + 39
    image = permute(np.arange(n - 20_000, n), n, 1)
    assert len(np.unique(image)) == 20_000 and image.min() >= 0 and image.max() < n
    assert abs(image.mean() / n - 0.5) < 0.02


def test_permutation_differs_by_seed_and_shuffles():
    orders = [permute(np.arange(500), 500, seed) for seed in range(8)]
    for i, order in enumerate(orders):
        assert (order == np.arange(500)).sum() < 10
        assert all((order == other).sum() < 15 for other in orders[:i])
    # Neighbours must not stay neighbours, or a batch would be a run of text.
    assert (np.abs(np.diff(orders[0])) == 1).sum() < 15


def test_seeds_are_mixed_by_every_word_and_its_place():
    seeds = [mix(*words) for words in [(0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**63,), (1, 1)]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_order_of_examples_is_pinned():
    assert permute(np.arange(10), 10, 0).tolist() == GOLDEN_ORDER
    assert mix(0, 1, 2) == GOLDEN_SEED


# --- training windows -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(lengths_and_window, st.integers(0, 2**40), st.integers(0, 5))
def test_each_token_is_a_target_at_most_once_an_epoch(drawn, seed: int, epoch: int):
    lengths, length = drawn
    split, windows = split_of_lengths(lengths), Windows(length)
    n, total = windows.epoch(split), sum(lengths)
    assert n == total // length
    targets = windows.train(split, seed, np.arange(n) + epoch * n)["targets_BL"].reshape(-1)
    assert len(np.unique(targets)) == len(targets) == n * length
    assert 0 <= total - len(targets) < length


def test_every_token_is_a_target_over_several_epochs():
    split, windows = split_of_lengths([13, 2, 30, 7]), Windows(10)  # 52 tokens: 2 left out
    targets = windows.train(split, 3, np.arange(12 * windows.epoch(split)))["targets_BL"]
    assert set(targets.reshape(-1).tolist()) == set(range(52))


@settings(max_examples=60, deadline=None)
@given(lengths_and_window, st.integers(0, 2**40), st.sampled_from([0, None]))
def test_windows_equal_a_slow_loop(drawn, seed: int, eot: int | None):
    lengths, length = drawn
    split, windows = split_of_lengths(lengths, eot), Windows(length)
    batch = windows.train(split, seed, np.arange(2 * windows.epoch(split)))
    assert set(batch) == ARRAYS
    assert all(a.dtype == np.int32 for key, a in batch.items() if key != "weights_BL")
    assert batch["weights_BL"].dtype == np.float32 and (batch["weights_BL"] == 1).all()
    for row, start in enumerate(batch["tokens_BL"][:, 0].tolist()):
        for key, expected in by_hand(split, start, length).items():
            assert batch[key][row].tolist() == expected, key


def test_a_window_wraps_round_into_the_first_document():
    split = split_of_lengths([5, 4])
    examples = Windows(6).train(split, 0, np.arange(40))
    wrapped = (np.diff(examples["tokens_BL"], axis=1) < 0).any(axis=1)
    assert wrapped.any()
    row = int(np.argmax(wrapped))
    column = examples["tokens_BL"][row].tolist().index(0)
    assert examples["positions_BL"][row, column] == 0
    assert examples["segments_BL"][row, column] == examples["segments_BL"][row, column - 1] + 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(0, 2**40))
def test_an_example_is_the_same_in_any_batch(examples: list[int], seed: int):
    split, windows = split_of_lengths([9, 31, 2, 17]), Windows(8)
    whole = windows.train(split, seed, np.arange(61))
    part = windows.train(split, seed, np.asarray(examples))
    for key in ARRAYS:
        assert np.array_equal(part[key], whole[key][examples]), key


def test_order_differs_by_seed_and_epoch():
    split, windows = split_of_lengths([640]), Windows(4)
    n = windows.epoch(split)
    firsts = [
        windows.train(split, seed, np.arange(n) + epoch * n)["tokens_BL"][:, 0]
        for seed, epoch in [(0, 0), (0, 1), (0, 2), (1, 0)]
    ]
    for i, first in enumerate(firsts):
        assert (np.diff(first) == 4).sum() < n / 4  # shuffled
        assert all((first == other).sum() < n / 4 for other in firsts[:i])
    assert len({int(first[0]) % 4 for first in firsts}) > 1  # cut from another offset


def test_a_split_shorter_than_a_window_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"validation split has 1,024 tokens.*1,024 \+ 1") as error:
        Windows(1024).epoch(split_of_lengths([1000, 24], name="validation"))
    assert "--data.examples.length" in str(error.value)
    with pytest.raises(ValueError, match="validation"):
        Windows(1024).held_out_count(split_of_lengths([10], name="validation"))
    assert Windows(1023).epoch(split_of_lengths([1024])) == 1


# --- held-out windows -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(lengths_and_window, st.sampled_from([0, None]), st.integers(1, 9))
def test_held_out_windows_show_every_target_exactly_once(drawn, eot: int | None, batch: int):
    lengths, length = drawn
    split, windows = split_of_lengths(lengths, eot), Windows(length)
    total, count = sum(lengths), windows.held_out_count(split)
    seen = np.zeros(total, int)
    for first in range(0, count, batch):  # the last batch runs past the end
        cut = windows.held_out(split, np.arange(first, first + batch))
        assert set(np.unique(cut["weights_BL"])) <= {0.0, 1.0}
        np.add.at(seen, cut["targets_BL"].reshape(-1), cut["weights_BL"].reshape(-1).astype(int))
    # Token 0 is the first end-of-text id: as a target, it closes the last document.
    expected = np.ones(total, int)
    expected[0] = 0 if eot is None else 1
    assert np.array_equal(seen, expected)


def test_held_out_windows_come_in_order_and_end_in_weight_zero():
    split, windows = split_of_lengths([5, 6]), Windows(4)
    assert windows.held_out_count(split) == 3
    batch = windows.held_out(split, np.arange(5))
    assert batch["tokens_BL"][:3].reshape(-1).tolist() == [*range(11), 0]
    assert batch["weights_BL"].sum(1).tolist() == [4, 4, 3, 0, 0]
    assert batch["weights_BL"][2].tolist() == [1, 1, 1, 0]
    for row, start in enumerate([0, 4, 8]):
        expected = by_hand(split, start, 4)
        assert all(batch[key][row].tolist() == value for key, value in expected.items())
    without = windows.held_out(split_of_lengths([5, 6], eot=None), np.arange(3))
    assert without["weights_BL"].sum() == 10


# --- a real store ---------------------------------------------------------------------------------


def test_windows_of_a_store_read_its_text_and_travel_to_workers(tmp_path: Path):
    texts = ["abcabc", "a", "bcbcbcbcbcbcbc", "cab" * 20]
    ByteBPE(vocab=260).build((t.encode() for t in texts), tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    documents = [Document(f"d{i}", text.encode()) for i, text in enumerate(texts)]
    build_store(tmp_path / "store", documents, tokenizer, {}, lambda _: "train")
    split = open_store(tmp_path / "store").splits["train"]
    make = partial(Windows(7).train, split, 11)
    examples = np.arange(Windows(7).epoch(split) * 2)
    batch = make(examples)
    stream = np.asarray(split.tokens).tolist() * 2
    for tokens, target in zip(batch["tokens_BL"].tolist(), batch["targets_BL"][:, -1], strict=True):
        window = [*tokens, int(target)]
        assert any(stream[i : i + 8] == window for i in range(len(stream) // 2))
    again = pickle.loads(pickle.dumps(make))(examples)
    assert all(np.array_equal(again[key], batch[key]) for key in ARRAYS)
    held_out = Windows(7).held_out(split, np.arange(Windows(7).held_out_count(split)))
    ends = (held_out["targets_BL"] == tokenizer.eot) & (held_out["weights_BL"] == 1)
    assert ends.sum() == len(texts)  # every document's end is predicted, the last one's too
    assert len(pickle.dumps(make)) < 10_000  # it travels as a path, not as tokens
