# SPDX-License-Identifier: Apache-2.0
"""Scores of encoders: one token at a time, areas under curves, baselines, labels."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from splits import split_of

from lmjax import sharding
from lmjax.masked_scores import COMPARABLE, area_under_curve, lines, pseudo_scores
from lmjax.models.bert import BERT
from lmjax.pseudo import masked_rows, pseudo_likelihood, windows
from lmjax.sharding import Layout
from lmjax.step import init_params

MODEL = BERT(120, 64, 2, 16, 2, "gelu_tanh", 1e-12, pair=False, dropout=0.0, attention_dropout=0.0)
PARAMS = jax.tree.map(lambda x: 8 * x, init_params(MODEL, 0))
LENGTHS = [[5, 3, 7], [2], [25, 4], []]


@pytest.fixture
def split():
    """Four documents of 46 tokens in sentences, one sentence longer than a window."""
    return split_of(LENGTHS, vocab=120)


def plain(split: Any, start: int, end: int, place: int) -> float:
    """−log p of one token of a window, from a row of its own without padding."""
    ids = [1, *split.tokens[start:end].tolist(), 2]
    target, ids[place + 1] = ids[place + 1], 3
    batch = {"tokens_BL": jnp.array([ids]), "masked_BP": jnp.array([[place + 1]])}
    outputs: Any = MODEL.apply({"params": PARAMS}, batch)
    scores = outputs.readout.logits(outputs.heads["masked_BPE"])[0, 0]
    return -float(jax.nn.log_softmax(scores)[target])


def score(split: Any, limit: int, rows: int = 8) -> Any:
    with sharding.use(Layout().mesh()):
        return pseudo_likelihood(MODEL, PARAMS, split, 14, rows, limit)


def test_windows_hold_whole_sentences_of_one_document_and_every_token_once(split):
    starts, ends = windows(split, 12)
    sizes = (ends - starts).tolist()
    assert sizes == [8, 7, 2, 12, 12, 5]  # 5 + 3 | 7 | 2 | 25 cut twice, its rest with 4
    covered = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
    ordinary = np.delete(np.arange(len(split.tokens)), split.starts[:-1])
    assert covered.tolist() == ordinary.tolist()


def test_all_tokens_are_scored_exactly_where_they_are_few(split):
    found = score(split, 1000)
    starts, ends = windows(split, 12)
    nll = [plain(split, a, b, i) for a, b in zip(starts, ends, strict=True) for i in range(b - a)]
    assert found.tokens == found.scored == len(nll) == 46 and found.error == 0
    assert found.loss == pytest.approx(np.mean(nll), rel=1e-5)


def test_a_sample_is_near_and_says_how_near(split):
    exact = score(split, 1000).loss
    errors, hits = [], 0
    for limit in range(12, 44, 2):
        found = score(split, limit)
        assert found.scored == limit
        errors.append(found.error)
        hits += abs(found.loss - exact) <= found.error
    assert hits >= 13  # of 16, at 95 %
    assert errors[-1] < errors[0] / 2


def test_the_split_must_have_something_to_score(split):
    with pytest.raises(ValueError, match="no tokens to score"):
        score(split_of([[]], vocab=120), 10)


def test_a_row_is_a_window_between_controls_with_one_mask(split):
    starts, ends = windows(split, 12)
    rows = masked_rows(split, starts[:2], ends[:2], np.array([0, 6]), 14)
    a, b = split.tokens[starts[0] : ends[0]].tolist(), split.tokens[starts[1] : ends[1]].tolist()
    assert rows["wanted_BP"].tolist() == [[a[0]], [b[6]]]
    a[0] = b[6] = 3
    assert rows["tokens_BL"].tolist() == [[1, *a, 2] + [0] * 4, [1, *b, 2] + [0] * 5]
    assert rows["segments_BL"].sum(1).tolist() == [10, 9]


def test_pseudo_scores_share_the_nats_among_bytes_and_tokens(split):
    found = score(split, 20)
    scores = pseudo_scores(found, n_bytes=230)
    assert scores["pseudo_perplexity"] == pytest.approx(math.exp(found.loss))
    bits = found.loss * 46 / math.log(2) / 230
    assert scores["pseudo_bits_per_byte"] == pytest.approx(bits)
    assert scores["pseudo_bits_per_byte_error"] / bits == pytest.approx(found.error / found.loss)
    assert not scores["pseudo_exact"] and scores["pseudo_scored"] == 20


def test_the_area_is_the_share_of_pairs_in_order_ties_half():
    random = np.random.default_rng(0)
    scores = random.integers(0, 6, (7, 9)).astype(np.float32)
    labels, counted = random.integers(0, 2, (7, 9)), random.random((7, 9)) < 0.8
    up, down = scores[counted & (labels == 1)], scores[counted & (labels == 0)]
    pairs = (up[:, None] > down).mean() + 0.5 * (up[:, None] == down).mean()
    assert area_under_curve(scores, labels, counted) == pytest.approx(pairs)
    assert area_under_curve(scores, 0 * labels, counted) is None


def test_every_number_that_is_shown_says_what_to_compare_it_with():
    result = {
        "split": "test", "step": 3, "documents": 2, "bytes": 10, "length": 9, "masked_count": 5,
        "masked_loss": 1.0, "masked_accuracy": 0.5, "pair_count": 2, "pair_accuracy": 0.5,
        "replaced_count": 9, "replaced_accuracy": 0.9, "replaced_share": 0.1,
        "replaced_auc": 0.7, "baselines": {"unigram_masked_loss": 2.0},
        **pseudo_scores(score(split_of(LENGTHS, vocab=120), 20), 230),
    }  # fmt: skip
    result["comparable_with"] = {k: v for k, v in COMPARABLE.items() if k in result}
    shown = "\n".join(lines(result))
    for key in COMPARABLE:
        assert f"{key}: " in shown
    for figure in ("1.0000", "unigram 2.0000", "0.7000", "20 of 46", "±"):
        assert figure in shown
