# SPDX-License-Identifier: Apache-2.0
"""The scalar mix of layers: its equation, its norm and what padding does to it."""

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.mix import ScalarMix


def states(*shape: int) -> np.ndarray:
    scale = np.arange(1, shape[0] + 1).reshape(-1, 1, 1, 1)
    return (np.random.default_rng(0).standard_normal(shape) * scale + scale).astype(np.float32)


def params(weights, gamma):
    return {"params": {"weights": jnp.asarray(weights), "gamma": jnp.asarray(gamma)}}


def test_a_new_mix_is_the_mean_of_the_layers():
    states_NBLD = states(3, 2, 5, 4)
    drawn = ScalarMix().init(jax.random.key(0), states_NBLD)
    assert jax.tree.map(jnp.shape, drawn) == {"params": {"weights": (3,), "gamma": ()}}
    mixed_BLD = ScalarMix().apply(drawn, states_NBLD)
    np.testing.assert_allclose(mixed_BLD, states_NBLD.mean(0), rtol=1e-6, atol=1e-6)


def test_weights_pass_a_softmax_and_gamma_scales():
    states_NBLD = states(3, 2, 5, 4)
    shares = np.exp([1.0, 0.0, -2.0])
    shares /= shares.sum()
    wanted = 1.5 * sum(s * h for s, h in zip(shares, states_NBLD.astype(np.float64), strict=True))
    mixed_BLD = ScalarMix().apply(params([1.0, 0.0, -2.0], 1.5), states_NBLD)
    np.testing.assert_allclose(mixed_BLD, wanted, rtol=2e-6, atol=2e-6)


def test_a_norm_has_one_mean_and_variance_a_layer_and_does_not_see_padding():
    states_NBLD = states(3, 2, 5, 4)
    mask_BL = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    wanted = np.zeros((2, 5, 4))
    for share, layer in zip((0.25, 0.25, 0.5), states_NBLD.astype(np.float64), strict=True):
        counted = layer[mask_BL == 1]
        assert counted.shape == (7, 4)
        wanted += share * (layer - counted.mean()) / np.sqrt(counted.var() + 1e-12)
    states_NBLD[:, 1, 2:] = np.nan
    mixed = params(np.log([0.25, 0.25, 0.5]), 1.0)
    mixed_BLD = ScalarMix(normalise=True).apply(mixed, states_NBLD, mask_BL)
    seen = mask_BL == 1
    np.testing.assert_allclose(mixed_BLD[seen], wanted[seen], rtol=2e-5, atol=2e-5)
    plain_BLD = ScalarMix().apply(mixed, states_NBLD, mask_BL)
    assert np.abs(mixed_BLD[seen] - plain_BLD[seen]).max() > 0.5


def test_all_positions_count_without_a_mask():
    states_NBLD = states(2, 2, 3, 4)
    drawn = params([0.0, 0.0], 1.0)
    ones = ScalarMix(normalise=True).apply(drawn, states_NBLD, np.ones((2, 3), bool))
    none = ScalarMix(normalise=True).apply(drawn, states_NBLD)
    np.testing.assert_array_equal(ones, none)
    layers = [ScalarMix(normalise=True).apply(params([0.0], 1.0), h[None]) for h in states_NBLD]
    for layer in layers:
        assert abs(layer.mean()) < 1e-6 and abs(layer.std() - 1) < 1e-5


def test_both_parameters_learn():
    states_NBLD = states(3, 2, 5, 4)
    drawn = params([0.1, 0.2, 0.3], 1.0)
    gradient = jax.grad(lambda p: (ScalarMix().apply(p, states_NBLD) ** 2).sum())(drawn)
    assert all(jnp.abs(x).min() > 0 for x in jax.tree.leaves(gradient))


def test_half_precision_is_mixed_in_single():
    states_NBLD = states(3, 1, 2, 4).astype(jnp.bfloat16)
    assert ScalarMix().apply(params([0.0] * 3, 1.0), states_NBLD).dtype == jnp.float32
