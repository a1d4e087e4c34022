# SPDX-License-Identifier: Apache-2.0
"""Schedules, decay masks and updates equal their definitions."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.batches import Plan, Ramp
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.optim import LAMB, AdamW
from lmjax.sharding import path_of
from lmjax.step import abstract_params, init_state, make_train_step

COSINE = AdamW(peak=1e-3, warmup=10, decay="cosine", floor=0.1)
BERT = AdamW(
    peak=1e-3, warmup=10, decay="linear", floor=0.0, count="before", decay_from="start",
    b2=0.999, epsilon=1e-6, bias_correction=False, weight_decay=0.01,
)  # fmt: skip
SHARED = Path(__file__).parents[2] / "shared/data/fixtures/golden/bert_tf_tiny"


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


def test_the_rate_of_bert_is_counted_before_the_update_and_from_the_start():
    got = rates(BERT, [1, 2, 10, 11, 12, 40, 41, 50], steps=40)
    expected = [0, 1e-4, 9e-4, 1e-3 * 30 / 40, 1e-3 * 29 / 40, 1e-3 / 40, 0, 0]
    np.testing.assert_allclose(got, expected, rtol=3e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [  # updates 5, 11 and 21 of 40; x = 5, 11, 21 or 4, 10, 20
        ({"count": "before"}, [0.4, 1, 2 / 3]),
        ({"decay_from": "start"}, [0.5, 29 / 40, 19 / 40]),
        ({"decay_from": "start", "floor": 0.2}, [0.5, 0.2 + 0.8 * 29 / 40, 0.2 + 0.8 * 19 / 40]),
        ({"decay_from": "start", "decay_until": 20}, [0.5, 9 / 20, 0]),
        ({"decay_from": "start", "decay": "constant"}, [0.5, 1, 1]),
        ({"count": "before", "warmup": 0}, [36 / 40, 30 / 40, 20 / 40]),
    ],
)
def test_each_way_to_count_works_alone(options, expected):
    optim = AdamW(**{"peak": 1.0, "warmup": 10, "decay": "linear", "floor": 0.0} | options)
    np.testing.assert_allclose(rates(optim, [5, 11, 21], steps=40), expected, rtol=1e-6, atol=1e-7)


def test_tokens_are_counted_before_the_update_where_the_recipe_says():
    optim = replace(BERT, warmup=10 * 64, unit="tokens")
    plan = Plan(4, 16)
    updates = [1, 2, 10, 11, 12, 40, 41]
    got = rates(optim, updates, 40, plan.tokens_after)
    np.testing.assert_allclose(got, rates(BERT, updates, 40), rtol=1e-6)


def test_rates_equal_those_that_trained_the_original_bert():
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    golden = json.loads((SHARED / "train_trajectory.json").read_text("utf-8"))
    optim = replace(BERT, peak=golden["lr"], warmup=golden["num_warmup_steps"])
    steps = golden["num_train_steps"]
    expected = [step["lr"] for step in golden["steps"]]
    assert len(expected) == steps == 40
    updates = [step["step"] + 1 for step in golden["steps"]]
    np.testing.assert_allclose(rates(optim, updates, steps), expected, rtol=3e-6)
    with jax.enable_x64(True):  # the formula itself, without the rounding of float32
        np.testing.assert_allclose(rates(optim, updates, steps), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("count", "befor", "optim.count=befor: allowed are after, before; did you mean before?"),
        ("decay_from", "star", "optim.decay_from=star: allowed are .*; did you mean start?"),
        ("decay", "polynomial", "optim.decay=polynomial: allowed are cosine, linear, constant$"),
        ("unit", "step", "optim.unit=step: allowed are steps, tokens; did you mean steps?"),
    ],
)
@pytest.mark.parametrize("optim", [COSINE, LAMB(peak=1e-3, warmup=10)])
def test_unknown_choices_are_refused(optim, key, value, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        replace(optim, **{key: value})


def test_lamb_checks_its_numbers_too():
    with pytest.raises(ValueError, match="optim.epsilon=-1"):
        LAMB(peak=1e-3, warmup=10, epsilon=-1)


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


def test_the_recipe_lists_what_it_decays():
    params = gpt_params()
    listed = COSINE.decayed(params)
    assert listed[0] == "blocks/attention/out/kernel" and set(listed) == decayed(params, COSINE)
    everything = replace(COSINE, decay_parameters="")
    assert len(everything.decayed(params)) == len(jax.tree.leaves(params)) > len(listed)


def test_types_are_decayed_like_the_other_tables():
    names = ("embedding", "positions", "types", "norm/scale", "norm/bias")
    params = {"embeddings": {n: np.ones(2) for n in names}, "masked": {"output_bias": np.ones(2)}}
    assert COSINE.decayed(params) == [f"embeddings/{n}" for n in names[:3]]


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


# Names and shapes of both kinds: decayed (large for its gradients) and not.
SMALL = {"embeddings": {"embedding": (5, 4)}, "pooler": {"kernel": (4, 4), "bias": (4,)}}


def draw(shapes, seed: int, scale: float = 1.0):
    """A tree of float64 arrays."""
    random = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: scale * random.normal(size=s), shapes, is_leaf=is_shape)


def descend(transform, shapes, steps: int):
    """Float32 parameters after `steps` updates with gradients `draw(shapes, 1 + step, 0.5)`."""
    params = jax.tree.map(jnp.float32, draw(shapes, 0))
    state, update = transform.init(params), jax.jit(transform.update)
    for step in range(steps):
        gradients = jax.tree.map(jnp.float32, draw(shapes, 1 + step, 0.5))
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_hand(change, shapes, steps: int, clip: float = 1.0):
    """What `descend` should give: {path: float64 array}.

    Args:
      change: (step, path, weight, gradient, [m, v]) to the new weight; writes the moments.
    """
    flat = lambda tree: {  # noqa: E731
        path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    weights = flat(draw(shapes, 0))
    moments = {path: [np.zeros_like(w), np.zeros_like(w)] for path, w in weights.items()}
    for step in range(steps):
        gradients = flat(draw(shapes, 1 + step, 0.5))
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        for path, g in gradients.items():
            clipped = g * min(1, clip / norm)
            weights[path] = change(step, path, weights[path], clipped, moments[path])
    return weights


def assert_same(params, expected, atol=1e-6):
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        np.testing.assert_allclose(x, expected[path_of(path)], rtol=1e-6, atol=atol)


def bert_rate(step: int, peak: float = 1e-3, warmup: int = 10, steps: int = 40) -> float:
    return peak * step / warmup if step < warmup else peak * (1 - step / steps)


def test_updates_equal_those_of_berts_adam():
    def change(step, path, w, g, moments):
        moments[0] = 0.9 * moments[0] + 0.1 * g
        moments[1] = 0.999 * moments[1] + 0.001 * g**2
        update = moments[0] / (np.sqrt(moments[1]) + 1e-6)
        if not path.endswith("bias"):
            update = update + 0.01 * w
        return w - bert_rate(step) * update

    transform = BERT.transform(BERT.schedule(40, lambda s: s))
    assert_same(descend(transform, SMALL, 40), by_hand(change, SMALL, 40))


def test_updates_equal_those_of_ernies_adam():
    """Paddle: correction in the rate, decay subtracted afterwards but from the weight before."""

    def change(step, path, w, g, moments):
        moments[0] = 0.9 * moments[0] + 0.1 * g
        moments[1] = 0.999 * moments[1] + 0.001 * g**2
        rate = bert_rate(step)
        corrected = rate * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        new = w - corrected * moments[0] / (np.sqrt(moments[1]) + 1e-8)
        return new if path.endswith("bias") else new - w * 0.01 * rate

    optim = replace(BERT, bias_correction=True, epsilon=1e-8)
    transform = optim.transform(optim.schedule(40, lambda s: s))
    assert_same(descend(transform, SMALL, 40), by_hand(change, SMALL, 40))


def test_with_bias_correction_updates_equal_optax():
    optim = replace(BERT, bias_correction=True, clip=None)
    schedule = optim.schedule(40, lambda s: s)
    mask = {"embeddings": {"embedding": True}, "pooler": {"kernel": True, "bias": False}}
    theirs = optax.adamw(schedule, 0.9, 0.999, 1e-6, weight_decay=0.01, mask=mask)
    got = descend(optim.transform(schedule), SMALL, 40)
    jax.tree.map(np.testing.assert_array_equal, got, descend(theirs, SMALL, 40))
    plain = replace(optim, bias_correction=False)
    first, second = (descend(o.transform(schedule), SMALL, 5) for o in (optim, plain))
    moved = abs(np.asarray(first["pooler"]["bias"] - second["pooler"]["bias"]))
    assert moved.min() > 1e-4  # early updates are three times as long without it


def test_with_and_without_bias_correction_the_state_is_the_same():
    params = {"kernel": jnp.ones(2)}
    states = [replace(BERT, bias_correction=b).transform(bert_rate).init(params) for b in (0, 1)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    transform = BERT.transform(lambda _: jnp.float32(0.1))
    _, state = transform.update(params, states[0], params)
    _, state = transform.update(params, state, params)
    assert optax.tree.get(state[1], "count") == 2


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
