# SPDX-License-Identifier: Apache-2.0
"""The scalar mix: one vector of all layers of a pretrained model (Peters et al. 2018, equation 1).

A task learns how much of each layer it wants and one scale for all, and reads γ Σ softmax(s)_n h_n.

Shapes: N layers, B rows, L length, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

_EPSILON = 1e-12


class ScalarMix(nn.Module):
    """γ Σ softmax(s)_n h_n with `weights` s, zeros at first (the mean of the layers), and `gamma`.

    normalise: brings each layer to mean 0 and variance 1 before, both taken over all elements of
      the layer in the batch, which is worth it where layers differ much in scale.
    """

    normalise: bool = False

    @nn.compact
    def __call__(self, states_NBLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
        """(N, B, L, D) to (B, L, D) in float32; positions with mask 0 do not count in a norm."""
        weights_N = self.param("weights", nn.initializers.zeros, states_NBLD.shape[:1])
        gamma = self.param("gamma", nn.initializers.ones, ())
        states_NBLD = states_NBLD.astype(jnp.float32)
        if self.normalise:
            states_NBLD = normalised(states_NBLD, mask_BL)
        return gamma * jnp.einsum("N,NBLD->BLD", jax.nn.softmax(weights_N), states_NBLD)


def normalised(states_NBLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """Each layer with mean 0 and variance 1 over the D elements of all positions that count."""
    if mask_BL is None:
        mask_BL = jnp.ones(states_NBLD.shape[1:3])
    mask_BL = jnp.broadcast_to(mask_BL != 0, states_NBLD.shape[1:3])
    counts_NBLD = jnp.broadcast_to(mask_BL[None, :, :, None], states_NBLD.shape)
    # Padding may hold anything, numbers that are none included: it is left out, not multiplied.
    mean_N111 = states_NBLD.mean((1, 2, 3), where=counts_NBLD, keepdims=True)
    variance_N111 = states_NBLD.var((1, 2, 3), where=counts_NBLD, keepdims=True)
    return (states_NBLD - mean_N111) * jax.lax.rsqrt(variance_N111 + _EPSILON)
