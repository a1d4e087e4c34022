# SPDX-License-Identifier: Apache-2.0
"""Schedules, decay masks and updates equal their definitions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.batches import Plan, Ramp
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.optim import AdamW
from lmjax.sharding import path_of
from lmjax.step import abstract_params, init_state, make_train_step

COSINE = AdamW(peak=1e-3, warmup=10, decay="cosine", floor=0.1)


def rates(optim: AdamW, updates: list[int], steps: int = 110, tokens=lambda s: s * 512):
    """Rate of the n-th update (n from 1), as a Python list."""
    schedule = jax.jit(jax.vmap(optim.schedule(steps, tokens)))
    return np.asarray(schedule(jnp.asarray(updates) - 1), np.float64).tolist()


# --- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_rate_rises_linearly_to_the_peak(decay):
    got = rates(replace(COSINE, decay=decay), [1, 2, 5, 10])
    np.testing.assert_allclose(got, [1e-4, 2e-4, 5e-4, 1e-3], rtol=1e-6)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [  # after 25, 50, 75 and 100 % of the decay, and long after the end
        ("cosine", [0.1 + 0.9 * (0.5 + 0.5 * np.cos(np.pi * p)) for p in (0.25, 0.5, 0.75, 1, 1)]),
        ("linear", [0.775, 0.55, 0.325, 0.1, 0.1]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_rate_falls_to_the_floor_and_stays(decay, expected):
    got = rates(replace(COSINE, decay=decay), [35, 60, 85, 110, 5000])
    np.testing.assert_allclose(got, [1e-3 * e for e in expected], rtol=1e-5)


def test_the_decay_ends_where_the_recipe_says():
    got = rates(replace(COSINE, decay="linear", decay_until=60, floor=0.0), [10, 35, 60, 100])
    np.testing.assert_allclose(got, [1e-3, 5e-4, 0, 0], atol=1e-9)


def test_without_a_warm_up_the_first_update_has_the_peak():
    got = rates(AdamW(peak=3e-4, warmup=0, decay="constant"), [1, 2])
    np.testing.assert_allclose(got, [3e-4, 3e-4], rtol=1e-6)
    assert rates(AdamW(peak=3e-4, warmup=0, decay="linear"), [1], 100)[0] < 3e-4


def test_tokens_are_counted_where_the_recipe_says():
    """GPT-3: 375 M tokens of warm-up, cosine to 10 % at 260 B, under the batch ramp."""
    optim = AdamW(peak=6e-4, warmup=375e6, decay_until=260e9, unit="tokens")
    plan = Plan(256, 2048, Ramp(16, 16, 4e9))
    steps = [100, 2000, 11_445, 11_446, 100_000, 300_000, 600_000]
    got = rates(optim, steps, 600_000, plan.tokens_after)
    for n, rate in zip(steps, got, strict=True):
        tokens = plan.tokens_after(n)
        done = min(max((tokens - 375e6) / (260e9 - 375e6), 0), 1)
        expected = tokens / 375e6 if tokens < 375e6 else 0.1 + 0.45 * (1 + np.cos(np.pi * done))
        np.testing.assert_allclose(rate, 6e-4 * expected, rtol=1e-4)
    assert got[-1] == pytest.approx(6e-5)


def test_the_end_of_a_run_may_lie_beyond_32_bits_of_tokens():
    optim = AdamW(peak=1e-3, warmup=0, decay="linear", floor=0.0, unit="tokens")
    plan = Plan(256, 2048)
    steps = 600_000  # 315 billion tokens
    got = rates(optim, [1, steps // 2, steps], steps, plan.tokens_after)
    np.testing.assert_allclose(got, [1e-3, 5e-4, 0], rtol=1e-4, atol=1e-9)


# --- decay ----------------------------------------------------------------------------------------


def gpt_params(**options):
    model = GPT(vocab=50, context=8, depth=2, width=8, heads=2, **options)
    return jax.tree.map(lambda x: np.ones(x.shape, np.float32), abstract_params(model))


def decayed(params, optim: AdamW) -> set[str]:
    """Paths that move although their gradient is zero."""
    transform = optim.transform(lambda step: jnp.float32(0.5))

    @jax.jit
    def update(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return transform.update(zeros, transform.init(params), params)[0]

    updates = update(params)
    moved = jax.tree_util.tree_leaves_with_path(updates)
    for _, update in moved:  # −rate · decay · 1
        assert np.allclose(update, 0) or np.allclose(update, -0.5 * optim.weight_decay)
    return {path_of(path) for path, update in moved if np.asarray(update).any()}


MATRICES = {
    "embedding",
    "blocks/attention/qkv/kernel",
    "blocks/attention/out/kernel",
    "blocks/mlp/up/kernel",
    "blocks/mlp/down/kernel",
}


def test_matrices_and_embeddings_are_decayed_and_nothing_else():
    params = gpt_params()
    assert decayed(params, COSINE) == MATRICES | {"positions"}
    rest = {path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)} - MATRICES
    assert rest - {"positions"} == {
        *(f"blocks/norm_{n}/{part}" for n in (1, 2) for part in ("scale", "bias")),
        *(f"blocks/{layer}/bias" for layer in ("attention/qkv", "attention/out")),
        *(f"blocks/mlp/{layer}/bias" for layer in ("up", "down")),
        *("final_norm/scale", "final_norm/bias"),
    }
    assert decayed(gpt_params(norm="post", one_table=True), COSINE) == MATRICES


def test_the_recipe_chooses_what_is_decayed():
    assert decayed(gpt_params(), replace(COSINE, decay_parameters="kernel$")) == (
        MATRICES - {"embedding"}
    )
    assert decayed(gpt_params(), replace(COSINE, weight_decay=0.0)) == set()


# --- updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_updates_equal_adamw_by_hand(clip: float | None):
    optim = AdamW(
        peak=1e-2, warmup=2, clip=clip, b1=0.8, b2=0.95, epsilon=1e-3, weight_decay=0.3,
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = {"a": {"kernel": random.normal(size=(3, 4))}, "b": {"bias": random.normal(size=4)}}
    theirs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    schedule = optim.schedule(5, lambda s: s)
    transform = optim.transform(schedule)
    state = transform.init(theirs)
    names = [("a", "kernel"), ("b", "bias")]
    first = {n: 0.0 for n in names}
    second = {n: 0.0 for n in names}
    for step in range(5):
        gradients = {
            "a": {"kernel": random.normal(size=(3, 4))},
            "b": {"bias": random.normal(size=4)},
        }
        low = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients)
        updates, state = transform.update(low, state, theirs)
        theirs = optax.apply_updates(theirs, updates)

        norm = np.sqrt(sum((gradients[a][b] ** 2).sum() for a, b in names))
        rate = float(schedule(jnp.int32(step)))
        for a, b in names:
            g = gradients[a][b] * (1 if clip is None else min(1, clip / norm))
            first[a, b] = 0.8 * first[a, b] + 0.2 * g
            second[a, b] = 0.95 * second[a, b] + 0.05 * g**2
            m, v = first[a, b] / (1 - 0.8 ** (step + 1)), second[a, b] / (1 - 0.95 ** (step + 1))
            decay = 0.3 * params[a][b] if b == "kernel" else 0
            params[a][b] = params[a][b] - rate * (m / (np.sqrt(v) + 1e-3) + decay)
            np.testing.assert_allclose(theirs[a][b], params[a][b], rtol=1e-6, atol=1e-6)


def test_padding_rows_stay_exactly_zero():
    model = GPT(vocab=50, context=8, depth=1, width=8, heads=2)
    transform = COSINE.transform(COSINE.schedule(10, lambda s: s))
    state = jax.jit(lambda: init_state(model, transform, 0))()
    step = jax.jit(make_train_step(model, next_token, transform, lambda s: s, 0))
    tokens = np.random.default_rng(0).integers(0, 50, (2, 8)).astype(np.int32)
    weights = np.ones((2, 8), np.float32)
    batch = {"tokens_BL": tokens, "targets_BL": tokens, "weights_BL": weights}
    for _ in range(3):
        state, _ = step(state, batch)
    table = np.asarray(state.params["embedding"])
    assert table.shape[0] == 128
    assert not table[model.rows :].any() and table[: model.rows].any(axis=1).all()
    for moments in jax.tree.leaves(state.opt_state):
        if moments.shape == table.shape:
            assert not np.asarray(moments)[model.rows :].any()
