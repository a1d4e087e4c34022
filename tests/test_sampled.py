# SPDX-License-Identifier: Apache-2.0
"""Negatives are drawn as TensorFlow draws them, and a step's rows are found again."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sampled, sharding
from lmjax.sampled import EMPTY, draw_log_uniform, touched_rows


def probability(vocab: int) -> np.ndarray:
    """TensorFlow's log-uniform distribution, as its documentation has it."""
    k = np.arange(vocab, dtype=np.float64)
    return (np.log(k + 2) - np.log(k + 1)) / np.log(vocab + 1)


def expected_counts(vocab: int, tries: float) -> np.ndarray:
    return -np.expm1(tries * np.log1p(-probability(vocab)))


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Distinct words are found in another way on a CPU than on accelerators."""
    monkeypatch.setattr(sharding, "platform", lambda: request.param)
    return request.param


def many_draws(count: int, vocab: int, times: int) -> tuple[np.ndarray, np.ndarray]:
    keys = jax.random.split(jax.random.key(5), times)
    run = jax.jit(jax.vmap(partial(draw_log_uniform, count=count, vocab=vocab)))
    return jax.device_get(run(keys))


def by_rejection(random: np.random.Generator, count: int, vocab: int) -> tuple[set[int], int]:
    """What TensorFlow's sampler does, to the letter."""
    found: set[int] = set()
    tries = 0
    while len(found) < count:
        found.add(int(np.exp(random.random() * np.log(vocab + 1))) - 1)
        tries += 1
    return found, tries


@pytest.mark.parametrize(("count", "vocab"), [(5, 40), (30, 37)])
def test_words_are_drawn_as_by_rejecting_repeats_one_by_one(platform: str, count: int, vocab: int):
    times = 4000
    ids, tries = many_draws(count, vocab, times)
    random = np.random.default_rng(0)
    plain = [by_rejection(random, count, vocab) for _ in range(times)]
    share = np.bincount(ids.reshape(-1), minlength=vocab) / times
    wanted = np.bincount([k for found, _ in plain for k in found], minlength=vocab) / times
    deviation = np.sqrt((share * (1 - share) + wanted * (1 - wanted) + 1e-3) / times)
    assert np.abs((share - wanted) / deviation).max() < 4.5
    plain_tries = np.array([n for _, n in plain])
    deviation = np.sqrt((tries.var() + plain_tries.var()) / times)
    assert abs(tries.mean() - plain_tries.mean()) < 4.5 * deviation
    assert 0.9 < tries.std() / plain_tries.std() < 1.1
    # What TensorFlow takes for the expected count is close to the truth, not equal to it.
    formula = np.mean([expected_counts(vocab, n) for n in tries], axis=0)
    np.testing.assert_allclose(share, formula, atol=0.04)


@pytest.mark.parametrize("vocab", [7, 64, 1000])
def test_a_single_draw_is_log_uniform(vocab: int):
    ids, nth = jax.device_get(sampled._draws(jax.random.key(1), 2**20, vocab))
    taken = ids[ids < EMPTY]
    assert nth[-1] == taken.size and np.array_equal(np.diff(nth, prepend=0) > 0, ids < EMPTY)
    wanted = probability(vocab) * taken.size
    counts = np.bincount(taken, minlength=vocab)
    assert counts.size == vocab  # none beyond
    assert np.sum((counts - wanted) ** 2 / wanted) < vocab + 6 * math.sqrt(2 * vocab)


def test_rare_words_of_a_large_vocabulary_have_even_chances():
    vocab = 793_471
    ids, _ = jax.device_get(sampled._draws(jax.random.key(2), 2**22, vocab))
    taken = ids[ids < EMPTY]
    assert taken.max() < vocab
    edges = np.array([0, 10, 1000, 100_000, 524_287, 650_000, vocab])
    sums = np.concatenate([[0], np.cumsum(probability(vocab))])
    wanted = np.diff(sums[edges]) * taken.size
    counts = np.histogram(taken, edges)[0]
    assert np.abs((counts - wanted) / np.sqrt(wanted)).max() < 4.5
    # In float32, exp(u log(V+1)) would miss some words and hit others twice as often.
    tail = taken[taken >= 524_287]
    twice = tail.size - np.unique(tail).size
    pairs = tail.size**2 * np.sum(probability(vocab)[524_287:] ** 2)
    pairs /= 2 * probability(vocab)[524_287:].sum() ** 2
    assert abs(twice - pairs) < 0.1 * pairs


def test_the_original_size_is_always_filled(platform: str):
    ids, tries = many_draws(8192, 793_471, 4)
    assert (np.diff(ids, axis=1) > 0).all() and ids.max() < 793_471 and ids.min() >= 0
    assert (np.abs(tries - 16_200) < 1000).all()


def test_both_ways_of_finding_distinct_words_find_the_same(monkeypatch: pytest.MonkeyPatch):
    found = []
    for name in ("cpu", "tpu"):
        monkeypatch.setattr(sharding, "platform", lambda name=name: name)
        found.append(many_draws(20, 50, 50))
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("vocab", [1, 2, 33])
def test_all_words_can_be_drawn(platform: str, vocab: int):
    ids, tries = many_draws(vocab, vocab, 20)
    assert (ids == np.arange(vocab)[None, :]).all() and (tries >= vocab).all()


@pytest.mark.parametrize("count", [0, 11])
def test_more_words_than_there_are_cannot_be_drawn(count: int):
    with pytest.raises(ValueError, match=f"{count} negatives of a vocabulary of 10: from 1 to 10"):
        draw_log_uniform(jax.random.key(0), count, 10)


def test_too_few_draws_leave_places_empty_and_count_themselves(
    platform: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampled, "_proposals", lambda count, vocab: 40)
    ids, tries = many_draws(30, 32, 500)
    found = (ids < EMPTY).sum(1)
    assert (found < 30).all() and (found > 5).all() and (np.diff(ids, axis=1) >= 0).all()
    # Of n draws, a word is among the distinct ones with exactly the probability that is assumed.
    share = np.bincount(ids[ids < EMPTY], minlength=32) / 500
    formula = np.mean([expected_counts(32, n) for n in tries], axis=0)
    assert np.abs(share - formula).max() < 4.5 * math.sqrt(0.25 / 500)


def test_expected_counts_are_tensorflow_s_to_the_rarest_word():
    ids = np.array([0, 1, 7, 5000, 793_470])
    for tries in (1, 16_260):
        ours = sampled.log_expected_counts(jnp.asarray(ids), jnp.float32(tries), 793_471)
        np.testing.assert_allclose(
            ours, np.log(expected_counts(793_471, tries))[ids], rtol=2e-6, atol=2e-6
        )


def test_rows_are_distinct_ascending_and_found_again(platform: str):
    random = np.random.default_rng(3)
    first, second = random.integers(0, 60, (4, 5)), random.integers(0, 60, 17)
    second[3] = EMPTY
    distinct = np.unique(np.concatenate([first.reshape(-1), second]))[:-1]
    for cap in (37, 64):
        rows = np.asarray(touched_rows(cap, jnp.asarray(first), jnp.asarray(second)))
        assert rows.shape == (cap,) and np.array_equal(rows[: distinct.size], distinct)
        assert (np.diff(rows) > 0).all() and (rows[distinct.size :] >= EMPTY).all()
        assert np.array_equal(rows[sampled.place(jnp.asarray(first), jnp.asarray(rows))], first)
