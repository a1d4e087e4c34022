# SPDX-License-Identifier: Apache-2.0
"""LAMB equals ALBERT's, which keeps apart the variables that our arrays stack and fuse."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax import recipe, sharding
from lmjax.models.gpt import GPT
from lmjax.optim import LAMB
from lmjax.sharding import path_of
from lmjax.step import abstract_params, abstract_state

OPTIM = LAMB(
    peak=1e-2, warmup=5, decay="linear", floor=0.0, count="before", decay_from="start"
)  # fmt: skip
ATTENTION = {"qkv": {"kernel": (4, 3, 4), "bias": (3, 4)}, "out": {"kernel": (4, 4)}}
LAYER = {
    "attention": ATTENTION,
    "mlp": {"up": {"kernel": (4, 8), "bias": (8,)}},
    "norm_1": {"scale": (4,), "bias": (4,)},
}
STACK = jax.tree.map(lambda s: (2, *s), LAYER, is_leaf=lambda x: isinstance(x, tuple))
SHAPES = {
    "embeddings": {"embedding": (6, 4), "positions": (5, 4), "norm": {"scale": (4,)}},
    "block": LAYER,  # ALBERT: one layer, not stacked
    "blocks": STACK,
    "generator": {"blocks": STACK},
    "masked": {"output_bias": (6,)},
}


def draw(seed: int, scale: float = 1.0, shapes=SHAPES):
    """A tree of float64 arrays whose size differs from array to array and from layer to layer."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: scale * random.uniform(0.1, 3, (s[0],) + (1,) * (len(s) - 1)) * random.normal(
            size=s
        ),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip


def apart(tree) -> dict[str, np.ndarray]:
    """The variables as ALBERT's checkpoint keeps them, by path, layer and projection."""
    found = {}
    for key_path, x in jax.tree_util.tree_leaves_with_path(tree):
        path, x = path_of(key_path), np.asarray(x)
        layers = dict(enumerate(x)) if "blocks" in path.split("/") else {"only": x}
        for layer, values in layers.items():
            parts = {"all": values}
            if "qkv" in path:  # (D, 3, D) and (3, D)
                parts = {name: values[..., i, :] for i, name in enumerate("qkv")}
            found |= {f"{path} {layer} {name}": part for name, part in parts.items()}
    return found


def descend(optim: LAMB, steps: int, shapes=SHAPES):
    """Float32 parameters after `steps` updates with gradients `draw(1 + step, 0.3)`."""
    params = jax.tree.map(jnp.float32, draw(0, shapes=shapes))
    transform = optim.transform(optim.schedule(steps, lambda s: s))
    state, update = transform.init(params), jax.jit(transform.update)
    for step in range(steps):
        gradients = jax.tree.map(jnp.float32, draw(1 + step, 0.3, shapes))
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def port(optim: LAMB, steps: int, excluded=("bias", "scale")) -> dict[str, np.ndarray]:
    """ALBERT's optimiser, one variable at a time, in float64."""
    weights = apart(draw(0))
    moments = {path: (np.zeros_like(w), np.zeros_like(w)) for path, w in weights.items()}
    for step in range(steps):
        gradients = apart(draw(1 + step, 0.3))
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        rate = optim.peak * (step / 5 if step < 5 else 1 - step / steps)
        for path, w in weights.items():
            g = gradients[path] * min(1, 1 / norm)
            m, v = moments[path]
            m, v = moments[path] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            if optim.bias_correction:
                m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            update, ratio = m / (np.sqrt(v) + 1e-6), 1.0
            if not path.split()[0].endswith(excluded):
                update = update + optim.weight_decay * w
                ratio = np.linalg.norm(w) / np.linalg.norm(update)
            weights[path] = w - rate * ratio * update
    return weights


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias_correction": True},
        {"weight_decay": 0.0},  # the ratio stays
        {"weight_decay": 0.3},
        {"decay_parameters": ""},  # biases and scales as well
    ],
)
def test_updates_equal_those_of_alberts_lamb(options):
    optim = replace(OPTIM, **options)
    excluded = ("none",) if "decay_parameters" in options else ("bias", "scale")
    got, expected = apart(descend(optim, 20)), port(optim, 20, excluded)
    assert got.keys() == expected.keys() and len(got) > 40
    for path, x in got.items():
        np.testing.assert_allclose(x, expected[path], rtol=2e-6, atol=2e-6, err_msg=path)


def one_update(optim: LAMB, params, gradients, rate: float = 0.01):
    """Updates of the first step, as a tree of numpy arrays."""
    transform = optim.transform(lambda _: jnp.float32(rate))
    return jax.jit(lambda p, g: transform.update(g, transform.init(p), p)[0])(params, gradients)


def test_each_variable_moves_by_the_rate_times_its_length():
    params = jax.tree.map(jnp.float32, draw(0))
    updates = apart(one_update(OPTIM, params, jax.tree.map(jnp.float32, draw(1))))
    for path, weight in apart(params).items():
        if "kernel" in path or "embedding" in path.split()[0].rpartition("/")[2]:
            length = 0.01 * np.linalg.norm(weight)
            np.testing.assert_allclose(np.linalg.norm(updates[path]), length, rtol=1e-5)


def test_the_ratio_is_one_where_either_length_is_zero():
    optim = replace(OPTIM, weight_decay=0.0, clip=None)
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    params = {"blocks": {"kernel": np.stack([zeros, 2 * ones, ones, 2 * ones])}}
    faint = 1e-30 * ones  # its square is 0 in float32, and so is the length of the update
    gradients = {"blocks": {"kernel": np.stack([ones, zeros, ones, faint])}}
    updates = np.asarray(one_update(optim, params, gradients, rate=0.5)["blocks"]["kernel"])
    adam = 0.1 / (np.sqrt(0.001) + 1e-6)  # of a first gradient of 1
    np.testing.assert_allclose(updates[0], -0.5 * adam * ones, rtol=1e-5)
    np.testing.assert_array_equal(updates[1], zeros)
    np.testing.assert_allclose(updates[2], -0.5 * ones, rtol=1e-5)
    np.testing.assert_allclose(updates[3], -0.5 * 0.1 * faint / 1e-6, rtol=1e-5)


def test_zero_padding_rows_stay_exactly_zero():
    rows = np.arange(8).reshape(4, 2) * np.array([[1], [1], [0], [0]], np.float32)
    table = {"embedding": jnp.float32(rows)}
    updates = one_update(OPTIM, table, {"embedding": jnp.float32(rows)})
    moved = np.asarray(updates["embedding"])
    assert not moved[2:].any() and moved[:2].any()


def test_the_defaults_are_alberts():
    assert (OPTIM.b1, OPTIM.b2, OPTIM.epsilon, OPTIM.weight_decay, OPTIM.clip) == (
        0.9, 0.999, 1e-6, 0.01, 1.0,
    )  # fmt: skip
    assert not OPTIM.bias_correction


def test_lamb_is_typed_recorded_and_read_like_adamw():
    typed = recipe.override(
        OPTIM, [("count", "after"), ("decay_from", "warmup"), ("bias_correction", "true")]
    )
    assert typed == replace(OPTIM, count="after", decay_from="warmup", bias_correction=True)
    assert recipe.from_json(OPTIM, recipe.to_json(typed)) == typed
    with pytest.raises(ValueError, match="did you mean start"):
        recipe.override(OPTIM, [("decay_from", "stat")])


def test_on_a_mesh_moments_rest_like_parameters_and_updates_are_the_same():
    model = GPT(vocab=50, context=8, depth=2, width=8, heads=2)
    shapes = jax.tree.map(lambda x: x.shape, abstract_params(model))
    optim = replace(OPTIM, warmup=0)
    expected = descend(optim, 3, shapes)
    transform = optim.transform(lambda s: s)
    with sharding.use(sharding.Layout(2, 2, 2).mesh()):
        state = abstract_state(model, transform)
        rest = jax.tree.map(lambda x: x.sharding, state.params)
        for moments in ("mu", "nu"):
            tree = optax.tree.get(state.opt_state, moments)
            assert jax.tree.map(lambda x: x.sharding, tree) == rest

        params = jax.device_put(jax.tree.map(jnp.float32, draw(0, shapes=shapes)), rest)
        assert len(params["embedding"].sharding.device_set) == 8
        transform = optim.transform(optim.schedule(3, lambda s: s))
        state, update = transform.init(params), jax.jit(transform.update)
        for step in range(3):
            gradients = jax.tree.map(jnp.float32, draw(1 + step, 0.3, shapes))
            updates, state = update(jax.device_put(gradients, rest), state, params)
            params = optax.apply_updates(params, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected
    )
