# SPDX-License-Identifier: Apache-2.0
"""One step: the same numbers on every mesh and for any microbatches, its state donated."""

import dataclasses
import math
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax import sharding
from lmjax.batches import Plan, batches
from lmjax.layers import Outputs
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.optim import AdamW
from lmjax.sharding import Layout, path_of
from lmjax.step import (
    State,
    abstract_state,
    create_state,
    init_params,
    jit_train_step,
    make_eval_step,
    make_train_step,
)

BATCH, LENGTH, VOCAB, SEED = 16, 12, 100, 7
MODEL = GPT(vocab=VOCAB, context=LENGTH, depth=2, width=16, heads=2, unroll=1)
# The epsilon is large, or Adam would make steps of the rounding where a gradient is zero.
OPTIM = AdamW(peak=1e-2, warmup=3, epsilon=1e-3)
SCHEDULE = OPTIM.schedule(10, lambda step: step)
MESHES = {
    "8x1x1": Layout(8, 1, 1),
    "1x8x1": Layout(1, 8, 1),
    "2x2x2": Layout(2, 2, 2),
    "1x2x2x2": Layout(1, 2, 2, 2),
}


def make(examples: np.ndarray) -> dict[str, np.ndarray]:
    """Examples of uneven weight, so that a mean of means is not the mean."""
    rows = [np.random.default_rng(int(i)) for i in examples]
    tokens = np.stack([r.integers(0, 9, LENGTH + 1) for r in rows]).astype(np.int32)
    weights = np.stack([np.arange(LENGTH) < r.integers(1, LENGTH + 1) for r in rows])
    places = np.tile(np.arange(LENGTH, dtype=np.int32), (len(rows), 1))
    return {
        "tokens_BL": tokens[:, :-1],
        "targets_BL": tokens[:, 1:],
        "weights_BL": weights.astype(np.float32),
        "segments_BL": np.ones_like(places),
        "positions_BL": places,
    }


def jitted_step(state, accumulate: int = 1):
    step = make_train_step(MODEL, next_token, OPTIM.transform(SCHEDULE), SCHEDULE, SEED, accumulate)
    return jit_train_step(step, state)


@cache
def train(layout: Layout, steps: int, accumulate: int = 1):
    """(initial parameters, metrics of every step, last parameters, compilations) of a short run."""
    size = math.prod(dataclasses.astuple(layout))
    with sharding.use(layout.mesh(jax.devices()[:size])):
        state = create_state(MODEL, OPTIM.transform(SCHEDULE), SEED)
        first, step = jax.device_get(state.params), jitted_step(state, accumulate)
        metrics = []
        for batch in batches((make,), Plan(BATCH, LENGTH), 0, steps):
            state, values = step(state, batch)
            metrics.append(values)
        return first, jax.device_get(metrics), jax.device_get(state.params), step._cache_size()


ONE_DEVICE = Layout(1, 1, 1)


def assert_close(tree, other, tolerance: float):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())))


# --- meshes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES.keys())
def test_every_mesh_has_the_numbers_of_one_device(layout: Layout):
    first, expected, last, _ = train(ONE_DEVICE, 10)
    born, metrics, params, compilations = train(layout, 10)
    assert_close(born, first, 1e-7)
    for name in ("loss", "accuracy", "gradient_norm", "learning_rate"):
        got = np.array([m[name] for m in metrics])
        want = np.array([m[name] for m in expected])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert_close(params, last, 1e-5)
    assert compilations == 1
    assert metrics[9]["loss"] < metrics[0]["loss"] - 0.2  # it learns


def test_on_several_cpu_devices_a_loss_adds_up_the_batch_after_the_model_ran():
    """Or devices may begin with either, and wait for each other for ever (`cpu.after`)."""

    def weights(outputs, batch):
        return {"loss": (batch["weights_BL"].sum(), batch["segments_BL"].sum())}

    sums = {}
    for size in (1, 8):
        with sharding.use(Layout(size, 1, 1).mesh(jax.devices()[:size])):
            params = create_state(MODEL, OPTIM.transform(SCHEDULE), SEED).params
            batch = next(iter(batches((make,), Plan(BATCH, LENGTH), 0, 1)))
            step = jax.jit(make_eval_step(MODEL, weights))
            sums[size] = jax.device_get(step(params, batch)["loss"])
            # What depends on the model is no number where its output is none.
            nowhere = jax.tree.map(lambda x: x * jnp.nan, params)
            seen = float(step(nowhere, batch)["loss"][0])
        assert np.isnan(seen) == (size == 8)
    assert sums[1] == sums[8]


def test_parameters_and_moments_are_born_sharded():
    with sharding.use(Layout(1, 8, 1).mesh()):
        state = create_state(MODEL, OPTIM.transform(SCHEDULE), SEED)
        wanted = abstract_state(MODEL, OPTIM.transform(SCHEDULE))
        metrics_step = jitted_step(state)
        batch = next(iter(batches((make,), Plan(BATCH, LENGTH), 0, 1)))
        after, _ = metrics_step(state, batch)
    split = 0
    for (path, x), w in zip(
        jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(wanted), strict=True
    ):
        assert (x.shape, x.dtype, x.sharding) == (w.shape, w.dtype, w.sharding), path_of(path)
        if path_of(path).endswith(("kernel", "embedding", "positions")):
            shards = [s.data.size for s in x.addressable_shards]
            assert shards == [x.size // 8] * 8, path_of(path)
            split += 1
    assert split == 3 * 6  # parameters and two moments of six matrices


class OneLayer(nn.Module):
    @nn.compact
    def __call__(self, batch):
        return nn.Dense(4)(batch["tokens_BL"].astype(jnp.float32))


def test_initial_parameters_follow_the_seed():
    values = [init_params(OneLayer(), seed)["Dense_0"]["kernel"] for seed in (0, 0, 1)]
    assert np.array_equal(values[0], values[1]) and not np.allclose(values[0], values[2])


# --- accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 4])
def test_microbatches_change_no_number(accumulate: int):
    """Uneven weights: the mean of the microbatches' means would be another number."""
    _, expected, last, _ = train(ONE_DEVICE, 3)
    _, metrics, params, _ = train(ONE_DEVICE, 3, accumulate)
    for got, want in zip(metrics, expected, strict=True):
        for name in ("loss", "accuracy", "gradient_norm", "learning_rate"):
            np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-7)
    assert_close(params, last, 1e-6)


def test_microbatches_change_no_number_on_a_mesh():
    _, expected, last, _ = train(ONE_DEVICE, 3)
    _, metrics, params, _ = train(Layout(2, 2, 2), 3, 4)
    for got, want in zip(metrics, expected, strict=True):
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)
    assert_close(params, last, 1e-5)


class Linear:
    """Stands for a model where the step's arithmetic is at stake: a product and some noise."""

    def __init__(self, noise: float = 0.0):
        self.noise = noise

    def apply(self, variables, batch, train=False, rngs=None):
        assert train and rngs is not None
        noise = self.noise * jax.random.normal(rngs["dropout"], batch["x"].shape)
        return Outputs(batch["x"] * variables["params"]["w"] + noise, None)  # type: ignore[arg-type]


def linear_state(step: int = 0) -> State:
    params = {"w": jnp.float32(0.5)}
    return State(jnp.int32(step), params, optax.sgd(0.1).init(params))


def linear_step(accumulate: int = 1, seed: int = 0, noise: float = 0.0, loss=None):
    """A step of plain gradient descent at rate 0.1."""
    return jax.jit(
        make_train_step(
            Linear(noise),
            loss or two_losses,
            optax.sgd(0.1),
            lambda s: 0.1 + s,
            seed,
            accumulate,  # type: ignore[arg-type]
        )
    )


def two_losses(outputs, batch):
    error = (outputs.hidden_BLD - batch["y"]) ** 2
    other = jnp.abs(outputs.hidden_BLD)
    return {
        "squares_loss": ((error * batch["a"]).sum(), batch["a"].sum()),
        "sizes_loss": ((other * batch["b"]).sum(), batch["b"].sum()),
        "only_reported": ((other * batch["a"]).sum(), batch["a"].sum()),
    }


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_the_objective_is_the_sum_of_means_over_the_whole_batch(accumulate: int):
    random = np.random.default_rng(0)
    batch = {name: random.normal(size=(8, 3)).astype(np.float32) for name in "xy"}
    # Whole rows without weight, and different weights for the two losses.
    batch["a"] = (random.integers(0, 3, (8, 1)) * np.ones((8, 3))).astype(np.float32)
    batch["b"] = (np.arange(8)[:, None] < 3).astype(np.float32) * np.ones((8, 3), np.float32)
    x, y, a, b = (batch[k].astype(np.float64) for k in "xyab")
    squares = ((x * 0.5 - y) ** 2 * a).sum() / a.sum()
    sizes = (np.abs(x * 0.5) * b).sum() / b.sum()
    gradient = (2 * x * (x * 0.5 - y) * a).sum() / a.sum() + (np.abs(x) * b).sum() / b.sum()

    after, metrics = linear_step(accumulate)(linear_state(), batch)
    np.testing.assert_allclose(metrics["squares_loss"], squares, rtol=1e-6)
    np.testing.assert_allclose(metrics["sizes_loss"], sizes, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], squares + sizes, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], abs(gradient), rtol=1e-6)
    np.testing.assert_allclose(after.params["w"], 0.5 - 0.1 * gradient, rtol=1e-6)
    assert after.step == 1 and metrics["learning_rate"] == np.float32(0.1)


class Weighted:
    """Two losses that say themselves how they are weighed."""

    def __call__(self, outputs, batch):
        return two_losses(outputs, batch)

    def total(self, means):
        return 50 * means["squares_loss"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_may_weigh_its_means(accumulate: int):
    x = np.arange(1.0, 13.0, dtype=np.float32).reshape(4, 3)
    batch = {"x": x, "y": 2 * x, "a": np.ones_like(x), "b": np.ones_like(x)}
    _, metrics = linear_step(accumulate, loss=Weighted())(linear_state(), batch)
    squares, gradient = (1.5 * x) ** 2, 2 * x * -1.5 * x
    np.testing.assert_allclose(metrics["squares_loss"], squares.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 50 * squares.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], 50 * abs(gradient.mean()), rtol=1e-6)


def test_a_batch_of_weight_zero_gives_no_number_that_is_not_one():
    batch = {k: np.zeros((4, 3), np.float32) for k in "xyab"}
    after, metrics = linear_step()(linear_state(), batch)
    assert (
        after.params["w"] == 0.5 and metrics["squares_loss"] == 0 and metrics["gradient_norm"] == 0
    )


# --- the state ------------------------------------------------------------------------------------


def test_the_state_is_donated_and_the_step_needs_no_transfer():
    with sharding.use(Layout(2, 2, 2).mesh()):
        state = create_state(MODEL, OPTIM.transform(SCHEDULE), SEED)
        step = jitted_step(state)
        for batch in batches((make,), Plan(BATCH, LENGTH), 0, 3):
            before = state
            with jax.transfer_guard("disallow"):
                state, _ = step(before, batch)
            assert all(x.is_deleted() for x in jax.tree.leaves(before))
        assert int(state.step) == 3 and step._cache_size() == 1
        compiled = step.lower(state, batch).compile().memory_analysis()
        arguments = sum(
            x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state, batch))
        )
        given = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        assert compiled.alias_size_in_bytes >= given > arguments / 2


def test_randomness_follows_the_seed_and_the_step():
    batch = {k: np.ones((4, 3), np.float32) for k in "xyab"}

    def loss(step: int, seed: int = 0) -> float:
        return float(
            linear_step(seed=seed, noise=1.0)(linear_state(step), batch)[1]["squares_loss"]
        )

    assert loss(0) == loss(0) and len({loss(0), loss(1), loss(2), loss(0, seed=1)}) == 4


def test_microbatches_draw_their_own_randomness():
    batch = {k: np.ones((4, 3), np.float32) for k in "xy"}

    def noise_of_rows(outputs, batch):
        rows = outputs.hidden_BLD.sum(axis=1)
        return {"third_loss": ((rows**3).sum(), jnp.float32(rows.size))}

    alike = linear_step(2, noise=1.0, loss=noise_of_rows)(linear_state(), batch)[1]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)
    rows = [(0.5 + jax.random.normal(key, (2, 3))).sum(axis=1) for key in keys]
    assert not np.allclose(rows[0], rows[1])
    np.testing.assert_allclose(alike["third_loss"], (np.stack(rows) ** 3).mean(), rtol=1e-5)


def test_evaluation_gives_sums_and_weights_without_dropout():
    model = MODEL.clone(dropout=0.5)
    params, metrics, _, _ = train(ONE_DEVICE, 3)
    batch = make(np.arange(BATCH))
    sums = jax.jit(make_eval_step(model, next_token))(params, batch)
    assert set(sums) == {"loss", "accuracy"}
    assert sums["loss"][1] == batch["weights_BL"].sum()
    mean = float(sums["loss"][0]) / float(sums["loss"][1])
    assert mean == pytest.approx(float(metrics[0]["loss"]), rel=1e-5)
