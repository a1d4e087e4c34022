# SPDX-License-Identifier: Apache-2.0
"""Words from characters: plain convolutions over every place of every word are the reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import characters, sharding, spelling_cpu
from lmjax.characters import ALPHABET, CharacterEncoder
from lmjax.sharding import Layout

FILTERS = ((1, 8), (2, 8), (4, 16))
TOP, LETTERS, WIDTH = 32, 12, 8
PAD = ALPHABET - 1
MESHES = [Layout(1, 1, 1), Layout(8, 1, 1), Layout(1, 8, 1), Layout(2, 2, 2)]


def words(count: int, longest: int = LETTERS) -> np.ndarray:
    """Words of random bytes: short ones, one of every length up to the longest, one of padding."""
    random = np.random.default_rng(count)
    found = np.full((count, LETTERS), PAD, np.int16)
    for n, word in enumerate(found):
        size = n if n <= longest else int(random.integers(3, min(7, longest)))
        word[:size] = random.integers(0, 256, size)
    return found


def batch(distinct: int, rows: int = 8, length: int = 4) -> tuple[jax.Array, jax.Array]:
    """Characters (B, X, L, C) and spellings (B, X, L) of words that recur in every row."""
    random = np.random.default_rng(distinct)
    spellings_BXL = np.stack([random.integers(0, distinct, (2, length)) for _ in range(rows)])
    return jnp.asarray(words(distinct)[spellings_BXL]), jnp.asarray(spellings_BXL * 7)


def encoder(distinct: float = 0.5, activation: Any = "relu", highways: int = 2) -> Any:
    return CharacterEncoder(6, FILTERS, highways, WIDTH, activation, distinct, name="characters")


def parameters(module: Any) -> Any:
    """Not the initial ones, whose biases are 0 and whose gates are all nearly shut."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *batch(3), jnp.float32))
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape) * 0.4, jnp.float32), shapes["params"]
    )


def plain(params: Any, characters_BXLC: Any, activation: str) -> jax.Array:
    """The formulas of the paper, one place of one filter after another."""
    letters = params["table"][characters_BXLC.astype(int)]
    tops = []
    for i, (wide, _) in enumerate(FILTERS):
        kernel, bias = params[f"conv_{i}"]["kernel"], params[f"conv_{i}"]["bias"]
        places = [
            jnp.einsum("...CE,CEF->...F", letters[..., p : p + wide, :], kernel)
            for p in range(LETTERS - wide + 1)
        ]
        tops.append(jnp.stack(places).max(0) + jnp.expand_dims(bias, (0, 1, 2)))
    x = jnp.concatenate(tops, -1)
    x = jnp.maximum(x, 0) if activation == "relu" else jnp.tanh(x)
    affine = lambda x, w: x @ w["kernel"] + jnp.expand_dims(w["bias"], (0, 1, 2))  # noqa: E731
    for k in range(sum(name.startswith("highway") for name in params)):
        highway = params[f"highway_{k}"]
        gate = jax.nn.sigmoid(affine(x, highway["carry"]))
        x = gate * jnp.maximum(affine(x, highway["transform"]), 0) + (1 - gate) * x
    return affine(x, params["project"])


def value_and_gradient(function: Any, params: Any) -> Any:
    def loss(params):
        y = function(params)
        return (jnp.sin(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)) * y).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return y, gradients


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


# Of 64 words 12 fit into a share of a half, 40 do not; no share computes every word.
@pytest.mark.parametrize("distinct, share", [(12, 0.5), (40, 0.5), (12, 0.0), (12, 1.0)])
@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_every_mesh_and_share_gives_the_plain_formulas(layout: Layout, distinct: int, share: float):
    chars, spellings = batch(distinct)
    module = encoder(share)
    params = parameters(module)
    wanted = value_and_gradient(lambda params: plain(params, chars, "relu"), params)
    count = layout.data * layout.fsdp * layout.tensor
    with sharding.use(layout.mesh(jax.devices()[:count])):
        found = value_and_gradient(
            lambda params: module.apply({"params": params}, chars, spellings, jnp.float32), params
        )
    close(found, wanted)


@pytest.mark.parametrize("highways", [0, 1])
def test_tanh_and_other_depths(highways: int):
    module = encoder(0.0, "tanh", highways)
    chars, spellings = batch(30)
    params = parameters(module)
    wanted = value_and_gradient(lambda params: plain(params, chars, "tanh"), params)
    found = value_and_gradient(
        lambda params: module.apply({"params": params}, chars, spellings, jnp.float32), params
    )
    close(found, wanted)


@pytest.mark.parametrize("share, calls", [(0.5, [32, 32]), (0.25, [16, 48]), (0.0, [64])])
def test_a_word_that_recurs_is_spelt_once(monkeypatch: Any, share: float, calls: list[int]):
    sizes = []
    spell = characters._spell

    def counted(weights: Any, characters_NC: jax.Array, activation: str) -> jax.Array:
        sizes.append(len(characters_NC))
        # What only the head may compute: the rest would come out as zeros.
        return spell(weights, characters_NC, activation) * (len(sizes) == 1)

    monkeypatch.setattr(characters, "_spell", counted)
    module = encoder(share)
    params = parameters(module)
    sizes.clear()
    chars, spellings = batch(12)
    found = module.apply({"params": params}, chars, spellings, jnp.float32)
    assert sizes == calls
    close(found, plain(params, chars, "relu"))


def test_words_on_the_order_of_whole_chunks_and_one_more():
    table, kernels = pieces()
    for count in (1, spelling_cpu.WORDS, spelling_cpu.WORDS + 1):
        chars = jnp.asarray(words(count))
        letters = table[chars.astype(int)]
        wanted = [characters._convolution(letters, kernel).max(1) for kernel in kernels]
        close(spelling_cpu.strongest(table, kernels, chars), jnp.concatenate(wanted, -1))


def pieces() -> tuple[jax.Array, list[jax.Array]]:
    params = parameters(encoder())
    return params["table"], [params[f"conv_{i}"]["kernel"] for i in range(len(FILTERS))]


def test_the_place_of_the_maximum_gets_the_gradient_as_jax_has_it():
    table, kernels = pieces()
    letters = table[jnp.asarray(words(20)).astype(int)]
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(20, 16)), jnp.float32)

    def own(letters, kernel):
        return (weight * characters._strongest(letters, kernel)).sum()

    def jax_own(letters, kernel):
        return (weight * characters._convolution(letters, kernel).max(1)).sum()

    found = jax.grad(own, (0, 1))(letters, kernels[-1])
    wanted = jax.grad(jax_own, (0, 1))(letters, kernels[-1])
    # Places that see the same share a gradient in JAX's; what they add up to is the same.
    close(found[1], wanted[1])
    close(found[0].sum(1), wanted[0].sum(1))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_filter_that_is_not_a_number_is_not_hidden(devices: int):
    module = encoder()
    params = parameters(module)
    params["conv_1"]["kernel"] = params["conv_1"]["kernel"].at[0, 0, 0].set(jnp.nan)
    with sharding.use(Layout(devices, 1, 1).mesh(jax.devices()[:devices])):
        y = jax.jit(lambda: module.apply({"params": params}, *batch(12), jnp.float32))()
    assert jnp.isnan(y).all()


def test_a_filter_wider_than_a_word_is_refused():
    module = CharacterEncoder(6, ((1, 8), (13, 8)), 1, WIDTH, name="characters")
    with pytest.raises(ValueError, match="model.filters: a filter of 13 characters, but words"):
        module.init(jax.random.key(0), *batch(3), jnp.float32)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_weights_begin_as_the_original_begins_them(activation: Any):
    filters = ((1, 64), (3, 192))
    module = CharacterEncoder(16, filters, 1, 64, activation, name="characters")
    params: Any = module.init(jax.random.key(0), *batch(3), jnp.float32)["params"]
    # A weak type would change after the first step, which would be compiled again.
    assert not any(x.weak_type for x in jax.tree.leaves(params))
    assert 0.99 < float(jnp.abs(params["table"]).max()) <= 1
    for i, (wide, _) in enumerate(filters):
        kernel = params[f"conv_{i}"]["kernel"]
        if activation == "relu":
            assert 0.045 < float(jnp.abs(kernel).max()) <= 0.05
        else:
            np.testing.assert_allclose(kernel.std(), (wide * 16) ** -0.5, rtol=0.1)
    for part, bias in (("carry", -2), ("transform", 0)):
        np.testing.assert_allclose(params["highway_0"][part]["kernel"].std(), 1 / 16, rtol=0.05)
        assert (params["highway_0"][part]["bias"] == bias).all()
    np.testing.assert_allclose(params["project"]["kernel"].std(), 1 / 16, rtol=0.05)
