# SPDX-License-Identifier: Apache-2.0
"""The CPU's own matrix product: plain numbers, in a program that keeps its barriers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import cpu, sharding
from lmjax.layers import Dense, LayerNorm, gelu_tanh
from lmjax.sharding import Layout


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("inputs, features", [(3, 5), (5, 3)])
def test_the_product_has_the_gradients_of_a_plain_one(inputs: int, features: int):
    x, kernel, weights = draw(7, inputs), draw(inputs, features), draw(7, features)
    value, pull = jax.vjp(cpu.product, x, kernel)
    np.testing.assert_allclose(value, x @ kernel, rtol=1e-6)
    x_grad, kernel_grad = pull(weights)
    np.testing.assert_allclose(x_grad, weights @ kernel.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kernel_grad, x.T @ weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rows, contract, features", [((2, 4), 1, (3, 2, 5)), ((2, 4, 5), 2, (6,)), ((2, 4), 1, (6,))]
)
def test_dense_is_the_same_on_one_cpu_and_on_a_mesh(rows, contract: int, features):
    x = draw(*rows, 8)
    dense = Dense(features, 0.5, contract)
    params = dense.init(jax.random.key(0), x)
    params["params"]["bias"] += draw(*params["params"]["bias"].shape)

    def value_and_gradients(params, x):
        loss = lambda params, x: (jnp.sin(dense.apply(params, x))).sum()  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    with sharding.use(Layout(1, 1, 1).mesh(jax.devices()[:1])):
        assert cpu.alone()
        one = jax.jit(value_and_gradients)(params, x)
    with sharding.use(Layout(2, 1, 1).mesh(jax.devices()[:2])):
        assert not cpu.alone()
        two = jax.jit(value_and_gradients)(params, x)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    # Heads and their width are kept as one dimension.
    whole = [math.prod(dims) for dims in (x.shape[-contract:], features[-2:])]
    assert kernel.shape == (whole[0], *features[:-2], whole[1]) and bias.shape == kernel.shape[1:]
    kernel, bias = kernel.reshape(*x.shape[-contract:], *features), bias.reshape(features)
    np.testing.assert_allclose(
        dense.apply(params, x), np.tensordot(x, kernel, contract) + np.asarray(bias), atol=1e-5
    )


def test_layer_norm_is_the_same_on_one_cpu_and_on_a_mesh():
    x, norm = draw(2, 4, 16), LayerNorm(1e-5)
    params = {"params": {"scale": 1 + draw(16), "bias": draw(16)}}

    def value_and_gradients(params, x):
        loss = lambda params, x: jnp.sin(norm.apply(params, x)).sum()  # noqa: E731
        return norm.apply(params, x), jax.grad(loss, argnums=(0, 1))(params, x)

    found = []
    for size in (1, 2):
        with sharding.use(Layout(size, 1, 1).mesh(jax.devices()[:size])):
            found.append(jax.jit(value_and_gradients)(params, x))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    theirs = standardised(np.asarray(x, np.float64), 1e-5)
    wanted = theirs * np.asarray(params["params"]["scale"]) + np.asarray(params["params"]["bias"])
    np.testing.assert_allclose(found[0][0], wanted, atol=1e-5)


def standardised(x: np.ndarray, epsilon: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


def test_barriers_reach_the_program_that_runs():
    def twice(x):
        return jax.lax.optimization_barrier(x + 1) * 2

    with sharding.use(Layout(1, 1, 1).mesh(jax.devices()[:1])):
        options = cpu.compiler_options()
    program = jax.jit(twice, compiler_options=options).lower(draw(4)).compile().as_text()
    assert "opt-barrier" in program


def test_gelu_is_the_tanh_formula_and_keeps_its_input_alone():
    x = jnp.linspace(-4, 4, 41)
    plain = lambda x: 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    np.testing.assert_allclose(gelu_tanh(x), plain(x), atol=1e-6)
    ours, theirs = (jax.grad(lambda x, f=f: f(x).sum())(x) for f in (gelu_tanh, plain))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    _, pull = jax.vjp(gelu_tanh, x)
    assert [leaf.shape for leaf in jax.tree.leaves(pull)] == [x.shape]
