# SPDX-License-Identifier: Apache-2.0
"""What is hidden, how often, and what stands in its place: the originals' rates on any text."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import CONTROLS

from lmjax.examples import draws
from lmjax.examples.masks import (
    ENTITY,
    WORD,
    BertMasks,
    ElectraMasks,
    ErnieMasks,
    Masks,
    RobertaMasks,
    Text,
)

FIXTURES = Path(__file__).parents[2] / "shared/data/fixtures"
VOCAB = 1000
schemes = st.sampled_from(
    [
        BertMasks(), BertMasks(0.4, 7), BertMasks(1.0, 99), BertMasks(whole_word=True),
        BertMasks(0.3, ngram=3), RobertaMasks(), RobertaMasks(0.5), ElectraMasks(),
        ElectraMasks(0.25), ErnieMasks(), ErnieMasks(words=0, characters=1),
        ErnieMasks(characters=1, entities=2, together=True),
    ]
)  # fmt: skip


def text_of(sizes, width: int = 0, seed: int = 0, word: float = 0.6, entity: float = 0.5) -> Text:
    """Rows [CLS] ... [SEP] ... [SEP] of these sizes; words begin with probability `word`."""
    rng = np.random.default_rng(seed)
    sizes = np.asarray(sizes)
    n, width = len(sizes), width or int(sizes.max())
    tokens = rng.integers(4, VOCAB, (n, width)).astype(np.int32)
    column = np.arange(width)
    tokens[:, 0] = CONTROLS["cls"]
    tokens[np.arange(n), sizes - 1] = tokens[np.arange(n), sizes // 2] = CONTROLS["sep"]
    real = column < sizes[:, None]
    tokens[~real] = 0
    hidden = real & (tokens > 3)
    begins = rng.random((n, width)) < word
    begins[:, 1:] |= ~hidden[:, :-1]
    marks = (begins * WORD | (begins & (rng.random((n, width)) < entity)) * ENTITY).astype(np.uint8)
    marks[:, 1:][~hidden[:, :-1]] |= ENTITY
    streams = draws.states(seed, np.arange(n))
    return Text(tokens, sizes, hidden, marks * hidden, streams, width, VOCAB, CONTROLS)


def units(text: Text, bit: int) -> np.ndarray:
    """The number of each token's unit, -1 for controls, (N, W)."""
    n, width = text.tokens_NW.shape
    number = np.cumsum(text.hidden_NW & (text.marks_NW & bit > 0), axis=1) - 1
    return np.where(text.hidden_NW, number + np.arange(n)[:, None] * width, -1)


def take(text: Text, rows) -> Text:
    arrays = [x[rows] if isinstance(x, np.ndarray) else x for x in text]
    return Text(*arrays)


def actions(text: Text, masked) -> dict[str, float]:
    """Shares of what became of the scored tokens."""
    chosen = masked.weights_NW > 0
    now, was = masked.tokens_NW[chosen], text.tokens_NW[chosen]
    return {
        "mask": (now == CONTROLS["mask"]).mean(),
        "keep": (now == was).mean(),
        "random": ((now != was) & (now != CONTROLS["mask"])).mean(),
    }


def near(share: float, expected: float, n: int, extra: float = 0) -> bool:
    """Within 4.5 standard deviations of a share of n draws."""
    return abs(share - expected) <= 4.5 * (expected * (1 - expected) / n) ** 0.5 + extra


# --- all schemes ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(schemes, st.lists(st.integers(4, 70), min_size=1, max_size=12), st.integers(0, 99))
def test_only_the_scored_tokens_change_and_only_text_is_scored(scheme: Masks, sizes, seed: int):
    text = text_of(sizes, 70, seed)
    before = text.tokens_NW.copy()
    masked = scheme.draw(text)
    assert np.array_equal(text.tokens_NW, before)
    chosen = masked.weights_NW > 0
    assert (masked.tokens_NW[~chosen] == before[~chosen]).all()
    assert (0 <= masked.tokens_NW).all() and (masked.tokens_NW < VOCAB).all()
    allowed = np.arange(70) < text.sizes_N[:, None]
    if not isinstance(scheme, RobertaMasks):
        allowed &= text.hidden_NW
    assert not chosen[~allowed].any()
    if not isinstance(scheme, ErnieMasks):
        assert (masked.weights_NW.sum(1) <= scheme.most(text.sizes_N)).all()
        assert masked.weights_NW.sum(1).max() <= scheme.slots(70)


@settings(max_examples=100, deadline=None)
@given(schemes, st.lists(st.integers(4, 40), min_size=2, max_size=9), st.integers(0, 99))
def test_a_row_is_masked_alike_alone_and_in_any_width(scheme: Masks, sizes, seed: int):
    text = text_of(sizes, 60, seed)
    whole = scheme.draw(text)
    for row in range(len(sizes)):
        width = sizes[row]
        arrays = [x[:, :width] if np.ndim(x) == 2 else x for x in take(text, [row])]
        alone = scheme.draw(Text(*arrays)._replace(length=60))
        for one, other in zip(alone, whole, strict=True):
            assert np.array_equal(one[0], other[row, :width])
            assert not other[row, width:].any()


@pytest.mark.parametrize(
    "scheme, message",
    [
        (lambda: BertMasks(rate=0), "masks.rate=0: must be above 0"),
        (lambda: RobertaMasks(1.5), "masks.rate=1.5"),
        (lambda: BertMasks(predictions=0), "masks.predictions=0: must be at least 1"),
        (lambda: BertMasks(ngram=0), "masks.ngram=0"),
        (lambda: ErnieMasks(words=0), "the shares .* not all 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(scheme, message: str):
    with pytest.raises(ValueError, match=message):
        scheme()


# --- BERT -----------------------------------------------------------------------------------------


def test_bert_counts_controls_rounds_half_to_even_and_is_bounded():
    sizes = np.array([5, 10, 30, 50, 64, 128, 128])  # 0.75, 1.5, 4.5, 7.5, 9.6, 19.2
    counts = BertMasks().draw(text_of(sizes)).weights_NW.sum(1)
    assert counts.tolist() == [1, 2, 4, 8, 10, 19, 19]
    assert BertMasks(predictions=6).draw(text_of(sizes)).weights_NW.sum(1).max() == 6
    assert (BertMasks(1.0, 200).draw(text_of(sizes)).weights_NW.sum(1) == sizes - 3).all()


@pytest.mark.parametrize("scheme", [BertMasks(), BertMasks(ngram=3), BertMasks(whole_word=True)])
def test_bert_replaces_each_token_on_its_own(scheme):
    text = text_of(np.full(4000, 128), seed=1)
    masked = scheme.draw(text)
    chosen = masked.weights_NW > 0
    n, shares = chosen.sum(), actions(text, masked)
    assert near(shares["mask"], 0.8 + 0.1 / VOCAB, n) and near(shares["keep"], 0.1, n, 2e-4)
    assert near(shares["random"], 0.1, n, 4e-4)
    # Any id of the vocabulary, controls too, and whatever the neighbours became.
    other = masked.tokens_NW[chosen & (masked.tokens_NW != text.tokens_NW)]
    assert len(np.unique(other)) > 0.99 * VOCAB and {0, 1, 2} <= set(other.tolist())
    kept = chosen & (masked.tokens_NW == text.tokens_NW)
    both = chosen[:, 1:] & chosen[:, :-1]
    assert near((kept[:, 1:] & kept[:, :-1])[both].mean(), 0.01, both.sum(), 1e-3)


def test_bert_chooses_every_place_alike():
    text = text_of(np.full(6000, 20))
    chosen = (BertMasks().draw(text).weights_NW > 0)[:, text.hidden_NW[0]]
    assert (np.abs(chosen.mean(0) - 3 / 17) < 4.5 * (3 / 17 * 14 / 17 / 6000) ** 0.5).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(6, 60), min_size=1, max_size=9), st.integers(0, 99), st.floats(0.2, 1))
def test_whole_words_are_taken_whole_and_passed_over_beyond_the_count(sizes, seed, word):
    text = text_of(sizes, 0, seed, word)
    scheme = BertMasks(whole_word=True)
    chosen = scheme.draw(text).weights_NW > 0
    unit, left = units(text, WORD), scheme.most(text.sizes_N) - chosen.sum(1)
    for row in range(len(sizes)):
        lengths = Counter(unit[row][text.hidden_NW[row]].tolist())
        taken = Counter(unit[row][chosen[row]].tolist())
        assert all(lengths[u] == size for u, size in taken.items())
        untaken = [size for u, size in lengths.items() if u not in taken]
        assert left[row] >= 0 and all(size > left[row] for size in untaken) or left[row] == 0


def albert(cells: list[list[int]], count: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Words taken by ALBERT's loop, as spans."""
    taken, spans, size = set(), [], 0
    places = list(range(len(cells)))
    rng.shuffle(places)
    for place in places:
        if size >= count:
            break
        n = rng.choices([1, 2, 3], [6, 3, 2])[0]
        while n > 1 and size + len(sum(cells[place : place + n], [])) > count:
            n -= 1
        span = cells[place : place + n]
        words = tuple(range(place, place + len(span)))
        if size + len(sum(span, [])) > count or taken & {*words}:
            continue
        taken |= {*words}
        spans.append(words)
        size += len(sum(span, []))
    return spans


def test_spans_are_those_of_alberts_loop():
    row = text_of([44], 0, 4)
    n = 12_000
    text = take(row, np.zeros(n, int))._replace(states_N=draws.states(1, np.arange(n)))
    chosen = BertMasks(0.25, ngram=3).draw(text).weights_NW > 0
    assert (chosen.sum(1) <= 11).all()
    columns = np.flatnonzero(row.hidden_NW[0])
    unit = units(row, WORD)[0]
    cells = [[c for c in columns if unit[c] == u] for u in dict.fromkeys(unit[columns])]
    loops = np.zeros((n, 44))
    rng = random.Random(5)
    for i in range(n):
        words = [w for span in albert(cells, 11, rng) for w in span]
        loops[i, sum((cells[w] for w in words), [])] = 1
    # The same places, the same neighbours, the same counts.
    for ours, theirs in [
        (chosen.mean(0), loops.mean(0)),
        ((chosen[:, 1:] & chosen[:, :-1]).mean(0), (loops[:, 1:] * loops[:, :-1]).mean(0)),
        ((chosen[:, 4:] & chosen[:, :-4]).mean(0), (loops[:, 4:] * loops[:, :-4]).mean(0)),
        ((chosen.sum(1)[:, None] == np.arange(12)).mean(0),
         (loops.sum(1)[:, None] == np.arange(12)).mean(0)),
    ]:  # fmt: skip
        error = np.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / n) + 1e-9
        assert (np.abs(ours - theirs) < 4.5 * error).all()


# --- RoBERTa and ELECTRA --------------------------------------------------------------------------


def test_roberta_rounds_at_random_and_hides_the_ends_too():
    text = text_of(np.full(5000, 50))
    masked = RobertaMasks().draw(text)
    counts = masked.weights_NW.sum(1)
    assert set(counts.tolist()) == {7, 8} and near((counts == 8).mean(), 0.5, 5000)
    assert near((masked.weights_NW[:, 0] > 0).mean(), 0.15, 5000)
    chosen = masked.weights_NW > 0
    shares = actions(text, masked)
    assert near(shares["mask"], 0.8, chosen.sum()) and near(shares["random"], 0.1, chosen.sum())
    became = masked.tokens_NW[chosen & (masked.tokens_NW != text.tokens_NW)]
    drawn = became[became != CONTROLS["mask"]]
    assert drawn.min() >= 4 and len(np.unique(drawn)) > 0.95 * (VOCAB - 4)
    last = text._replace(controls={"cls": 0, "pad": 1, "sep": 2, "mask": VOCAB - 1})
    became = RobertaMasks().draw(last).tokens_NW[chosen]
    changed = became[(became != text.tokens_NW[chosen]) & (became != VOCAB - 1)]
    assert 3 in changed and not np.isin(changed, [0, 1, 2]).any()


def test_electra_draws_with_replacement_and_merges():
    text = text_of(np.full(8000, 40))
    masked = ElectraMasks(0.3).draw(text)
    weights = masked.weights_NW
    assert (weights.sum(1) == 12).all()  # of 37 candidates
    expected = 37 * (1 - (36 / 37) ** 12)
    assert abs((weights > 0).sum(1).mean() - expected) < 0.05
    once, twice = weights == 1, weights == 2
    is_mask = masked.tokens_NW == CONTROLS["mask"]
    assert near(is_mask[once].mean(), 0.85, once.sum())
    assert near(is_mask[twice].mean(), 1 - 0.15**2, twice.sum())
    assert (masked.tokens_NW == text.tokens_NW)[~is_mask].all()
    assert [ElectraMasks().slots(length) for length in (128, 512)] == [19, 79]
    assert [RobertaMasks().slots(length) for length in (128, 512)] == [20, 77]


# --- ERNIE ----------------------------------------------------------------------------------------


def ernie_figures(text: Text, masked, bit: int = WORD) -> dict[str, float]:
    """The figures of ernie_masking_stats_trainset.json."""
    chosen = masked.weights_NW > 0
    unit = units(text, bit)[text.hidden_NW]
    _, unit = np.unique(unit, return_inverse=True)
    size, taken = np.bincount(unit), np.bincount(unit, chosen[text.hidden_NW])
    special = (np.arange(chosen.shape[1]) < text.sizes_N[:, None]) & ~text.hidden_NW
    return actions(text, masked) | {
        "selected_per_body_token": chosen.sum() / text.hidden_NW.sum(),
        "words_full": (taken == size).mean(),
        "words_partial": ((taken > 0) & (taken < size)).mean(),
        "multi_full": (taken == size)[size > 1].mean(),
        "special_selected": chosen[special].mean(),
    }


def test_ernie_chooses_words_whole_and_hides_each_character_on_its_own():
    text = text_of(np.full(4000, 100), seed=2)
    masked = ErnieMasks().draw(text)
    found, n = ernie_figures(text, masked), masked.weights_NW.sum()
    assert found["words_partial"] == found["special_selected"] == 0
    assert abs(found["words_full"] - 0.15) < 0.003 and abs(found["multi_full"] - 0.15) < 0.003
    assert near(found["mask"], 0.8, n, 2e-3) and near(found["keep"], 0.1, n, 2e-3)
    # Heads and later characters apart, and a word's characters independent.
    is_mask, chosen = masked.tokens_NW == CONTROLS["mask"], masked.weights_NW > 0
    begins = text.marks_NW & WORD > 0
    for part in (chosen & begins, chosen & ~begins):
        assert near(is_mask[part].mean(), 0.8, part.sum(), 1e-3)
    second = chosen[:, 1:] & ~begins[:, 1:]
    pairs = is_mask[:, 1:][second].mean(), (is_mask[:, 1:] & is_mask[:, :-1])[second].mean()
    assert near(pairs[1], 0.64, second.sum(), 2e-3)
    drawn = masked.tokens_NW[chosen & (masked.tokens_NW != text.tokens_NW)]
    assert drawn.min() == 1 and drawn.max() == VOCAB - 1


def test_ernie_characters_entities_and_their_shares():
    text = text_of(np.full(6000, 80), seed=3)
    found = ernie_figures(text, ErnieMasks(characters=1, words=0).draw(text))
    assert abs(found["selected_per_body_token"] - 0.15) < 0.003 and found["words_partial"] > 0.05
    entities = ErnieMasks(words=0, entities=1).draw(text)
    assert ernie_figures(text, entities, ENTITY)["words_partial"] == 0
    assert abs(ernie_figures(text, entities, ENTITY)["words_full"] - 0.15) < 0.004
    mixed = ErnieMasks(characters=1, words=1, entities=2).draw(text)
    partial = {}
    for bit in (WORD, ENTITY):  # examples that break up units of each kind
        unit = units(text, bit)
        whole = [
            all(
                (mixed.weights_NW[row][unit[row] == u] > 0).all()
                for u in np.unique(unit[row][mixed.weights_NW[row] > 0])
            )
            for row in range(800)
        ]
        partial[bit] = 1 - np.mean(whole)
    assert near(partial[WORD], 0.25, 800, 0.01)  # only characters break words up
    assert near(partial[ENTITY], 0.5, 800, 0.03)


def test_ernie_together_hides_a_unit_as_one():
    text = text_of(np.full(3000, 80), seed=4, word=0.3)
    masked = ErnieMasks(together=True).draw(text)
    unit, chosen = units(text, WORD), masked.weights_NW > 0
    is_mask = masked.tokens_NW == CONTROLS["mask"]
    shares = {}
    for u, m in zip(unit[chosen].tolist(), is_mask[chosen].tolist(), strict=True):
        shares.setdefault(u, set()).add(m)
    assert all(len(kinds) == 1 for kinds in shares.values())
    assert near(np.mean([kinds == {True} for kinds in shares.values()]), 0.8, len(shares))
    separate = ErnieMasks().draw(text)
    assert np.array_equal(separate.weights_NW, masked.weights_NW)
    assert not np.array_equal(separate.tokens_NW, masked.tokens_NW)


def test_ernie_slots_are_rarely_reached():
    for length in (128, 512):
        counts = ErnieMasks().draw(text_of(np.full(2000, length))).weights_NW.sum(1)
        assert counts.max() <= ErnieMasks().slots(length) < 0.43 * length


def test_ernie_figures_are_baidus():
    if not (FIXTURES / "ernie/demo_train_set.gz").is_file():
        pytest.skip("../shared/data is absent: Baidu's instances and their figures are there")
    with gzip.open(FIXTURES / "ernie/demo_train_set.gz", "rt", encoding="utf-8") as file:
        lines = [line.strip().split(";") for line in file]
    golden = json.loads((FIXTURES / "golden/ernie_masking_stats_trainset.json").read_text("utf-8"))
    sizes = np.array([line[0].count(" ") + 1 for line in lines])
    real = np.arange(sizes.max()) < sizes[:, None]
    tokens, marks = np.zeros(real.shape, np.int32), np.zeros(real.shape, np.uint8)
    tokens[real] = np.fromstring(" ".join(line[0] for line in lines), np.int32, sep=" ")
    kinds = np.fromstring(" ".join(line[3] for line in lines), np.int32, sep=" ")
    marks[real] = kinds == 0
    hidden = real.copy()
    hidden[real] = kinds >= 0
    for name, scheme in [
        ("mask_word=False", ErnieMasks(characters=1, words=0)),
        ("mask_word=True", ErnieMasks()),
    ]:
        runs = []
        for seed in range(5):
            streams = draws.states(seed, np.arange(len(lines)))
            text = Text(tokens, sizes, hidden, marks, streams, 512, 18_000, CONTROLS | ERNIE)
            runs.append(ernie_figures(text, scheme.draw(text)))
        for key, (mean, deviation) in golden[name].items():
            ours = np.array([run[key] for run in runs])
            assert abs(ours.mean() - mean) <= 4 * max(deviation, ours.std()) / 5**0.5, (name, key)


ERNIE = {"mask": 3}
