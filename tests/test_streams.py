# SPDX-License-Identifier: Apache-2.0
"""Parallel streams: rows that go on from step to step, in both directions, as bilm-tf reads."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.batches import Plan, Share, host_batches
from lmjax.document import Document
from lmjax.examples.streams import Streams
from lmjax.store import Split, build_store, open_store
from lmjax.tokenizer import Characters, load_tokenizer
from lmjax.vocabulary import Vocabulary, character_ids

SHARED = Path(__file__).parents[2] / "shared" / "data" / "fixtures"
WORDS = [f"w{i}" for i in range(30)]
TOYS = "a b zebra\nd e\n"


def split_of(folder: Path, documents: list[str], vocabulary: list[str]) -> Split:
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "listed.txt"
    listed.write_text("\n".join(["<S>", "</S>", "<UNK>", *vocabulary, ""]), "utf-8")
    Vocabulary(path=str(listed)).build(iter([]), folder / "t")
    found = [Document(f"d{i}", text.encode()) for i, text in enumerate(documents)]
    build_store(folder / "s", found, load_tokenizer(folder / "t"), {}, lambda _: "train")
    return open_store(folder / "s").splits["train"]


def random_documents(seed: int, sentences: int, per: int = 3) -> list[str]:
    """Documents of sentences of 1 to 12 words, no two alike; some unknown words, long and short."""
    rng = np.random.default_rng(seed)
    unknown = ["x", "yy", "é" * 30, "é" * 30 + "!", "q" * 70]
    lines = [
        " ".join([f"n{i}", *rng.choice(WORDS + unknown, rng.integers(0, 12)).tolist()])
        for i in range(sentences)
    ]
    return ["\n".join(lines[i : i + per]) for i in range(0, sentences, per)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Split:
    """a 3, b 4, d 5, e 6; zebra is unknown."""
    return split_of(tmp_path_factory.mktemp("toys"), [TOYS], ["a", "b", "d", "e"])


@pytest.fixture(scope="module")
def sixty(tmp_path_factory) -> Split:
    folder = tmp_path_factory.mktemp("sixty")
    return split_of(folder, random_documents(1, 60), [*WORDS, *[f"n{i}" for i in range(50)]])


def word(row: np.ndarray) -> str:
    """What a row of characters spells."""
    inside = {256: "<S>", 257: "</S>"}
    return inside.get(int(row[1])) or bytes(int(c) for c in row if c < 256).decode(errors="ignore")


def text_of(split: Split) -> list[list[str]]:
    """The sentences of a split."""
    assert split.tokenizer
    text = load_tokenizer(split.tokenizer).decode(split.tokens)
    return [line.split(" ") for line in text.split("\n")[:-1]]


def streams(maker: Streams, split: Split, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Each row's steps one behind the other: arrays (B, X, steps * L, …)."""
    rows = maker.streams
    parts = [maker.train(split, seed, np.arange(s * rows, (s + 1) * rows)) for s in range(steps)]
    return {name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}


def bilm_stream(sentences: list[list[str]], backward: bool) -> tuple[list[str], list[str]]:
    """Inputs and targets of one stream of bilm-tf's reader (FACTS 2.2): of each sentence
    [<S>, w…, </S>], turned round for the backward one, all but the last and all but the first."""
    inputs, targets = [], []
    for sentence in sentences:
        ids = ["<S>", *sentence, "</S>"][:: -1 if backward else 1]
        inputs += ids[:-1]
        targets += ids[1:]
    return inputs, targets


def test_a_small_text_is_read_as_derived_by_hand(toys: Split):
    maker = Streams(length=2, held_out_length=7, characters=8)
    assert maker.held_out_count(toys) == 1
    batch = maker.held_out(toys, np.arange(1))
    forward, backward = batch["words_BXL"][0, :, 2:]
    assert forward.tolist() == [0, 3, 4, 2, 0, 5, 6]
    assert backward.tolist() == [1, 2, 4, 3, 1, 6, 5]
    forward, backward = batch["targets_BXL"][0, :, 2:]
    assert forward.tolist() == [3, 4, 2, 1, 5, 6, 1]
    assert backward.tolist() == [2, 4, 3, 0, 6, 5, 0]
    spelt = [[word(c) for c in row] for row in batch["characters_BXLC"][0, :, 2:]]
    assert spelt == [
        ["<S>", "a", "b", "zebra", "<S>", "d", "e"],
        ["</S>", "zebra", "b", "a", "</S>", "e", "d"],
    ]
    assert batch["characters_BXLC"][0, 0, 5].tolist() == [258, *b"zebra", 259, 260]
    types = {name: (array.dtype, array.shape) for name, array in batch.items()}
    assert types == {
        "words_BXL": (np.int32, (1, 2, 9)),
        "targets_BXL": (np.int32, (1, 2, 9)),
        "weights_BXL": (np.float32, (1, 2, 9)),
        "spellings_BXL": (np.int32, (1, 2, 9)),
        "characters_BXLC": (np.int16, (1, 2, 9, 8)),
    }
    weights = batch["weights_BXL"]
    assert not weights[..., :2].any() and weights[..., 2:].all()


def test_the_batches_of_bilm_tf_itself(tmp_path: Path):
    path = SHARED / "golden" / "bilm_tf_train" / "io.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    golden = np.load(path)
    lines = (SHARED / "elmo_bilm" / "train" / "data.txt").read_text("utf-8").split("\n")
    vocabulary = (SHARED / "elmo_bilm" / "train" / "vocab.txt").read_text("utf-8").split()[3:]
    maker = Streams(length=7, held_out_length=42, characters=12)
    names = {"words": "token_ids", "targets": "next_token_id", "characters": "tokens_characters"}
    # Each reader takes the next line when it has finished one; after the fifth, the first again.
    for row, read in enumerate(([0, 4, 0], [1, 3, 1], [2])):
        text = "\n".join(lines[i] for i in read)
        split = split_of(tmp_path / str(row), [text], vocabulary)
        batch = maker.held_out(split, np.arange(1))
        for direction, suffix in enumerate(("", "_reverse")):
            for ours, theirs in names.items():
                wanted = np.concatenate([golden[f"b{b}_{theirs}{suffix}"][row] for b in range(6)])
                name = f"{ours}_BXL" + "C" * (ours == "characters")
                assert np.array_equal(batch[name][0, direction, 7:], wanted), (row, theirs)


@pytest.mark.parametrize("shuffle", ["sentences", "documents", "none"])
@pytest.mark.parametrize("backward", ["own", "same"])
def test_every_sentence_is_read_once_an_epoch_as_the_original_reads(
    sixty: Split, shuffle: Any, backward: Any
):
    # One row: no sentence is torn but the last, and the order of sentences shows.
    maker = Streams(5, backward, shuffle, streams=1)
    steps = maker.epoch(sixty)
    total = sum(len(s) + 1 for s in text_of(sixty))
    assert total - 5 < steps * 5 <= total
    batch = streams(maker, sixty, steps)
    text = {sentence[0]: sentence for sentence in text_of(sixty)}
    orders = []
    for direction in range(2):
        spelt = [word(c) for c in batch["characters_BXLC"][0, direction]]
        heads = [w for w in spelt if w.startswith("n")]
        assert len(set(heads)) == len(heads) >= len(text) - 6  # the dropped tail may hold some
        if shuffle == "none":
            continue  # it begins within a sentence
        inputs, _ = bilm_stream([text[h] for h in heads], bool(direction))
        size = min(len(inputs), len(spelt) - 12)  # a torn last one has lost its head backward
        assert [w.encode()[:48] for w in inputs[:size]] == [w.encode()[:48] for w in spelt[:size]]
        orders.append(heads[:-2])
    if shuffle != "none":
        assert (orders[0][:40] == orders[1][:40]) == (backward == "same")
        assert orders[0] != sorted(orders[0], key=lambda h: int(h[1:]))
    if shuffle == "documents":
        numbers = [int(h[1:]) for h in orders[0]]
        assert all(b == a + 1 for a, b in zip(numbers, numbers[1:], strict=False) if a % 3 != 2)


@pytest.mark.parametrize("shuffle", ["sentences", "documents", "none"])
def test_rows_go_on_where_they_stopped_and_cover_the_text_together(sixty: Split, shuffle: Any):
    one, many = (Streams(4, "own", shuffle, streams=n) for n in (1, 4))
    steps = many.epoch(sixty) // 4
    alone = streams(one, sixty, one.epoch(sixty))
    together = streams(many, sixty, steps)
    for name in ("words_BXL", "targets_BXL", "characters_BXLC", "weights_BXL"):
        rows = np.swapaxes(together[name], 0, 1).reshape(
            2, 4 * steps * 4, *together[name].shape[3:]
        )
        assert np.array_equal(rows, alone[name][0][:, : rows.shape[1]]), name


@pytest.mark.parametrize("direction", [0, 1])
def test_what_is_read_next_is_what_was_predicted(sixty: Split, direction: int):
    batch = streams(Streams(3, streams=2), sixty, 30)
    inputs, targets = batch["words_BXL"][:, direction], batch["targets_BXL"][:, direction]
    begin, end = (0, 1) if direction == 0 else (1, 0)
    after = np.where(targets[:, :-1] == end, begin, targets[:, :-1])
    assert np.array_equal(inputs[:, 1:], after)
    assert not (inputs == end).any() and not (targets == begin).any()


def test_another_epoch_and_another_seed_bring_another_order(sixty: Split):
    for shuffle in ("sentences", "documents", "none"):
        maker = Streams(5, "own", shuffle, streams=2)
        per_epoch = maker.epoch(sixty)
        first = np.arange(20)
        batches = [
            maker.train(sixty, seed, first + start)["words_BXL"]
            for seed, start in ((0, 0), (0, per_epoch), (1, 0), (0, 5 * per_epoch))
        ]
        assert not any(
            np.array_equal(batches[i], batches[j]) for i in range(4) for j in range(i)
        ), shuffle
        both = maker.train(sixty, 0, np.concatenate([first, first + per_epoch]))["words_BXL"]
        assert np.array_equal(both, np.concatenate(batches[:2]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), first=st.integers(0, 10**9), cut=st.integers(0, 8))
def test_any_split_of_the_rows_over_hosts_gives_the_same(sixty: Split, seed, first, cut):
    maker = Streams(length=4, streams=8)
    examples = first * 8 + np.arange(8)
    whole = maker.train(sixty, seed, examples)
    parts = [maker.train(sixty, seed, part) for part in (examples[:cut], examples[cut:])]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    for name, array in whole.items():
        assert np.array_equal(array, joined[name]), name


def _equal_as(values, other) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs of positions have the same value, and which the same rows of `other`."""
    flat = other.reshape(-1, other.shape[-1])
    same = (flat[:, None] == flat[None]).all(-1)
    return values.reshape(-1, 1) == values.reshape(1, -1), same


def test_spellings_are_equal_where_the_characters_are(sixty: Split):
    maker = Streams(length=20, streams=8)
    batch = maker.train(sixty, 3, np.arange(8))
    spellings, words = batch["spellings_BXL"], batch["words_BXL"]
    size = sixty.vocab - 512
    equal, same = _equal_as(spellings, batch["characters_BXLC"])
    assert (same | ~equal).all()  # never shared by other characters
    for row, letters in zip(spellings, batch["characters_BXLC"], strict=True):
        assert np.array_equal(*_equal_as(row, letters))  # and always in a row
    assert np.array_equal(spellings >= size, words == 2) and (words == 2).sum() > 20
    assert np.array_equal(spellings[words != 2], words[words != 2])
    later = maker.train(sixty, 3, np.arange(8) + 8 * (10**12))["spellings_BXL"]
    assert (later >= 0).all()


def test_unknown_words_keep_their_first_48_bytes(sixty: Split):
    batch = streams(Streams(5, streams=1), sixty, Streams(5, streams=1).epoch(sixty))
    forward = batch["characters_BXLC"][0, 0]
    rows = {word(c): c for c in forward[batch["words_BXL"][0, 0] == 2]}
    assert {"x", "yy", "é" * 24, "q" * 48} <= set(rows) and "n55" in rows
    for spelling in ("x", "yy", "n55"):
        assert np.array_equal(rows[spelling], character_ids(spelling))
    assert np.array_equal(rows["q" * 48], character_ids("q" * 70))
    targets = batch["targets_BXL"][0]
    assert targets.max() < sixty.vocab - 512 and (targets == 2).any()


def test_without_characters_there_are_only_words(sixty: Split):
    with_, without = (Streams(5, streams=2, characters=c) for c in (50, 0))
    batch = without.train(sixty, 0, np.arange(2))
    assert set(batch) == {"words_BXL", "targets_BXL", "weights_BXL"}
    assert np.array_equal(batch["words_BXL"], with_.train(sixty, 0, np.arange(2))["words_BXL"])


@pytest.mark.parametrize("length, held", [(3, 1), (4, 7), (2, 400), (20, 30)])
def test_held_out_text_is_scored_once_in_order(sixty: Split, length: int, held: int):
    maker = Streams(length=length, held_out_length=held, characters=0)
    count = maker.held_out_count(sixty)
    rows = np.arange(count + 2)
    batch = maker.held_out(sixty, rows)
    assert batch["words_BXL"].shape == (count + 2, 2, length + held)
    scored = batch["weights_BXL"] > 0
    assert not batch["weights_BXL"][count:].any() and not scored[:, :, :length].any()
    text = [[w if w.startswith(("w", "n")) else "?" for w in s] for s in text_of(sixty)]
    assert sixty.tokenizer
    names = load_tokenizer(sixty.tokenizer).spellings  # pyright: ignore
    known = {name: i for i, name in enumerate(names)}
    for direction in range(2):
        wanted = bilm_stream(text, bool(direction))
        found = (batch[name][:, direction] for name in ("words_BXL", "targets_BXL"))
        for side, array in zip(wanted, found, strict=True):
            order = array[scored[:, direction]].tolist()
            assert order == [known.get(w, 2) for w in side]
            # What stands before the scored words of a row is what the row before ended with.
            ends, begins = array[: count - 1, held:], array[1:count, :length]
            begun = np.arange(1, count) * held - length >= 0
            assert np.array_equal(ends[begun], begins[begun])
    for row in (0, count // 2, count + 1):
        alone = maker.held_out(sixty, np.array([row]))
        assert all(np.array_equal(alone[name][0], batch[name][row]) for name in batch)


def test_what_lies_outside_of_the_text_is_blank(toys: Split):
    batch = Streams(length=3, held_out_length=5).held_out(toys, np.arange(4))
    for name in ("words_BXL", "spellings_BXL", "targets_BXL", "weights_BXL"):
        assert not batch[name][0, :, :3].any() and not batch[name][3].any(), name
    assert (batch["characters_BXLC"][3] == character_ids("<S>")).all()


def test_a_document_of_one_long_line_is_read_to_the_end(tmp_path: Path):
    rng = np.random.default_rng(0)
    words = rng.choice([*WORDS, "zebra", "é" * 40], 30_000).tolist()
    split = split_of(tmp_path, ["", " ".join(words), "\n"], WORDS)
    maker = Streams(length=50, streams=3, characters=4)
    batch = streams(maker, split, maker.epoch(split) // 3)
    assert split.n_documents == 3 and batch["words_BXL"].shape[2] == 30_001 // 150 * 50
    wanted = [WORDS.index(w) + 3 if w in WORDS else 2 for w in words]
    for direction in range(2):
        read = batch["targets_BXL"][:, direction].reshape(-1)[:30_000].tolist()
        assert read == wanted[:: 1 - 2 * direction][: len(read)]


def test_stores_of_more_than_one_chunk_are_indexed_alike(sixty: Split, monkeypatch):
    whole = Streams(5, "own", "documents", streams=2).train(sixty, 0, np.arange(60))
    fresh = pickle.loads(pickle.dumps(sixty))
    monkeypatch.setattr("lmjax.examples.streams._CHUNK", 64)
    again = Streams(5, "own", "documents", streams=2).train(fresh, 0, np.arange(60))
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_workers_read_from_small_pickles(sixty: Split):
    maker = Streams(length=4, streams=4)
    here = maker.train(sixty, 0, np.arange(4))
    assert sixty.memo  # which stays here
    packed = pickle.dumps((maker, sixty))
    assert len(packed) < 4000
    other, split = pickle.loads(packed)
    assert all(np.array_equal(here[n], a) for n, a in other.train(split, 0, np.arange(4)).items())


def test_batches_do_not_depend_on_hosts_or_workers(sixty: Split):
    maker = Streams(length=4, streams=4)
    make, plan = partial(maker.train, sixty, 7), Plan(4, 4)
    whole = list(host_batches([make], plan, 0, 6))
    halves = [list(host_batches([make], plan, 2, 6, Share((h,), 2), workers=h)) for h in (0, 1)]
    for step in range(2, 6):
        for name in ("words_BXL", "characters_BXLC", "targets_BXL"):
            parts = [half[step - 2][name] for half in halves]
            assert np.array_equal(np.concatenate(parts), whole[step][name])


def test_what_cannot_be_is_refused(toys: Split, tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.examples.length=0: at least 1"):
        Streams(length=0)
    with pytest.raises(ValueError, match=r"backward='mine': one of own, same"):
        Streams(backward="mine")  # pyright: ignore
    with pytest.raises(ValueError, match=r"shuffle='document': .*did you mean 'documents'"):
        Streams(shuffle="document")  # pyright: ignore
    with pytest.raises(ValueError, match=r"characters=2: 0 for none, or at least 3"):
        Streams(characters=2)
    with pytest.raises(ValueError, match=r"streams=3: .* must be batch=4"):
        Streams(streams=3).of_batch(4)
    assert Streams().of_batch(4) == Streams(streams=4) == Streams(streams=4).of_batch(4)
    with pytest.raises(ValueError, match=r"the train split has 7 words .* the 8 of one step"):
        Streams(length=2, streams=4).epoch(toys)
    empty = split_of(tmp_path / "e", ["", "\n"], ["a"])
    with pytest.raises(ValueError, match=r"the train split has no words"):
        Streams().held_out_count(empty)
    Characters().build(iter([b"abc"]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    build_store(tmp_path / "s", [Document("a", b"abc")], tokenizer, {}, lambda _: "train")
    other = open_store(tmp_path / "s").splits["train"]
    with pytest.raises(ValueError, match=r"set data.tokenizer=Vocabulary\(\) .*CharacterTok"):
        Streams(streams=1).epoch(other)
