# SPDX-License-Identifier: Apache-2.0
"""Pairs are as frequent, as long and as often random as those of the originals' loops."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from splits import split_of

from lmjax.examples.pairs import SentencePairs

FIXTURES = Path(__file__).parents[2] / "shared/data/fixtures"
PAIRINGS = ("next", "order", "segments")


def create_instances(lengths, length: int, pairing: str, short: float, rng: random.Random):
    """(A, B, label) of one pass, token by token, as the originals go about it."""
    place, stream = 0, []
    for document in lengths:
        stream.append([])
        for size in document:
            stream[-1].append(list(range(place, place + size)))
            place += size
    made = []
    for index, document in enumerate(stream):
        most = length - 3
        target = rng.randint(2, most) if rng.random() < short else most
        chunk, size, i = [], 0, 0
        while i < len(document):
            chunk.append(document[i])
            size += len(document[i])
            if i == len(document) - 1 or size >= target:
                cut = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
                a, b = sum(chunk[:cut], []), sum(chunk[cut:], [])
                changed = len(chunk) == 1 or rng.random() < 0.5
                if len(chunk) == 1 or (changed and pairing == "next"):
                    for _ in range(10):
                        other = rng.randint(0, len(stream) - 1)
                        if other != index:
                            break
                    b, room = [], target - len(a)
                    for sentence in stream[other][rng.randint(0, len(stream[other]) - 1) :]:
                        b = b + sentence
                        if len(b) >= room:
                            break
                    i -= len(chunk) - cut
                elif changed:
                    a, b = b, a
                while len(a) + len(b) > most:
                    longer = a if len(a) > len(b) else b
                    longer.pop(0 if rng.random() < 0.5 else -1)
                made.append((a, b, int(changed)))
                chunk, size = [], 0
            i += 1
    return made


def electra_examples(lengths, length: int, short: float, rng: random.Random):
    """(A, B, 0) of one pass; a sentence that crosses the first target ends or begins a segment."""
    made = []
    for document in lengths:
        chunk, size = [], 0
        target = length if rng.random() >= short else rng.randint(5, length)
        for i, sentence in enumerate(document):
            chunk.append(sentence)
            size += sentence
            if size < target and i < len(document) - 1:
                continue
            first_target = 10**6 if rng.random() < 0.1 else (target - 3) // 2
            a = b = 0
            for sentence in chunk:
                fits = a == 0 or a + sentence < first_target
                crosses = b == 0 and a < first_target and not fits and rng.random() < 0.5
                if b == 0 and (fits or crosses):
                    a += sentence
                else:
                    b += sentence
            a = min(a, length - 2)
            b = min(b, max(0, length - a - 3))
            made.append(([0] * a, [0] * b, 0))
            chunk, size = [], 0
            target = length if rng.random() >= short else rng.randint(5, length)
    return made


def figures(made) -> list[float]:
    """What is compared of a pass: count, labels, sizes of A and B, both full, first places."""
    a, b = (np.array([len(pair[side]) for pair in made]) for side in (0, 1))
    label = np.array([pair[2] for pair in made])
    first = np.array([pair[0][0] for pair in made])
    return [
        len(made), label.mean(), a.mean(), b.mean(), (a + b).mean(), (a + b).std(), (b == 0).mean(),
        (a > b).mean(), a.std(), b.std(), (a * label).mean(), (first % 7).mean(),
    ]  # fmt: skip


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("short", [0.1, 0.9])
def test_rates_are_those_of_the_original_loops(pairing: str, short: float):
    draw = random.Random(3)
    lengths = [
        [draw.choice([3, 9, 14, 25, 60]) for _ in range(draw.choice([1, 2, 5, 12, 40]))]
        for _ in range(25)
    ]
    split, maker = split_of(lengths), SentencePairs(64, pairing, short=short)
    loops, ours = [], []
    for seed in range(150):
        rng = random.Random(seed)
        if pairing == "segments":
            made = electra_examples(lengths, 64, short, rng)
        else:
            made = create_instances(lengths, 64, pairing, short, rng)
        loops.append(figures(made))
        r = maker.ranges(split, seed)
        # The loops number the tokens without the [SEP] before each document.
        first = r.a_from_n - np.searchsorted(split.starts, r.a_from_n, side="right")
        if pairing == "segments":
            first[:] = 0
        ours.append(
            figures(
                [
                    ([f] * a, [0] * b, label)
                    for f, a, b, label in zip(first, r.a_size_n, r.b_size_n, r.label_n, strict=True)
                ]
            )
        )
    loops, ours = np.array(loops), np.array(ours)
    error = np.sqrt((loops.var(0) + ours.var(0)) / 150) + 1e-9
    assert (np.abs(loops.mean(0) - ours.mean(0)) < 4 * error).all()
    assert (loops.std(0) < 1.4 * ours.std(0) + 1e-9).all()
    assert (ours.std(0) < 1.4 * loops.std(0) + 1e-9).all()


def test_rates_are_those_of_bert_on_its_sample_text():
    if not (FIXTURES / "bert_google").is_dir():
        pytest.skip("../shared/data is absent: BERT's sample text and its figures are there")
    from tokenizers import BertWordPieceTokenizer

    golden = json.loads((FIXTURES / "golden/bert_pretrain_stats.json").read_text("utf-8"))
    golden = golden["sample_text L128 P20 dupe5 seed12345"]
    vocab = FIXTURES / "vocabs/bert_uncased_en_vocab.txt"
    tokenizer = BertWordPieceTokenizer(str(vocab), lowercase=True)
    text = (FIXTURES / "bert_google/sample_text.txt").read_text("utf-8").strip()
    encoded = [
        [tokenizer.encode(line, add_special_tokens=False).ids for line in lines.splitlines()]
        for lines in text.split("\n\n")
    ]
    lengths = [[len(ids) for ids in document if ids] for document in encoded]
    ids = [i for document in encoded for sentence in document for i in sentence]
    controls = {"pad": 0, "cls": 101, "sep": 102, "mask": 103}
    split = split_of(lengths, ids, vocab=tokenizer.get_vocab_size(), controls=controls)
    maker, runs = SentencePairs(128, duplicates=5), []
    for seed in range(60):
        count = sum(maker.variant(split, seed, v).count() for v in range(5))
        runs.append(statistics(maker.train(split, seed, np.arange(count)), count))
    for key in runs[0]:
        values = np.array([run[key] for run in runs])
        assert abs(values.mean() - golden[key]) <= 4 * values.std(), key
    assert runs[0]["max_pred"] == golden["max_pred"]


def statistics(batch, count: int) -> dict[str, float]:
    """The figures of bert_pretrain_stats.json."""
    sizes, second = batch["segments_BL"].sum(1), batch["types_BL"].sum(1)
    masked = batch["weights_BP"].sum(1)
    rows, slots = np.nonzero(batch["weights_BP"])
    now = batch["tokens_BL"][rows, batch["masked_BP"][rows, slots]]
    was = batch["targets_BP"][rows, slots]
    return {
        "instances": count,
        "tokens": sizes.sum(),
        "mean_len": sizes.mean(),
        "full_len": (sizes == 128).mean(),
        "masked": masked.sum(),
        "masked_per_token": masked.sum() / sizes.sum(),
        "frac_mask": (now == 103).mean(),
        "frac_keep": (now == was).mean(),
        "frac_random": ((now != was) & (now != 103)).mean(),
        "random_next": batch["pairs_BC"].mean(),
        "max_pred": masked.max(),
        "mean_a": (sizes - second - 2).mean(),
        "mean_b": (second - 1).mean(),
    }
