# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks: attention, MLP, the two around norms and residuals, and a stack of them.

Shapes: B batch, L length, D width, H heads, K head width, F inner width, N layers.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmjax import cpu, sharding
from lmjax.attention import Kernel, attention
from lmjax.layers import ACTIVATIONS, Activation, Dense, LayerNorm

Remat = Literal["none", "names", "full"]


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with one fused projection to q, k and v."""

    heads: int
    causal: bool
    init_std: float
    out_std: float
    dropout: float = 0.0
    kernel: Kernel = "auto"
    truncated: bool = False

    @nn.compact
    def __call__(
        self,
        hidden_BLD: jax.Array,
        cache: Any = None,
        *,
        segments_BL: jax.Array | None = None,
        offset: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Returns the mixed states (B, L, D) and the cache with this call's keys and values."""
        width = hidden_BLD.shape[-1]
        sharding.check_even("attention", "heads", self.heads, sharding.TENSOR)
        # A plain matrix product to (B, L, 3, H, K): moving the heads out is cheaper apart.
        features = (3, self.heads, width // self.heads)
        into = Dense(features, self.init_std, truncated=self.truncated, name="qkv")
        qkv = jnp.moveaxis(into(hidden_BLD), (2, 3), (0, 2))
        query, key, value = checkpoint_name(qkv, "qkv")
        if cache is not None:
            assert offset is not None, "a cache comes with the place of its next key"
            at = (0, 0, offset, 0)
            key = jax.lax.dynamic_update_slice(cache[0], key.astype(cache[0].dtype), at)
            value = jax.lax.dynamic_update_slice(cache[1], value.astype(cache[1].dtype), at)
            cache = (key, value)
        mixed_BHLK = attention(
            query,
            key,
            value,
            causal=self.causal,
            segments_BL=segments_BL,
            offset=offset,
            dropout=self.dropout,
            dropout_key=self.make_rng("dropout") if train and self.dropout else None,
            kernel=self.kernel,
        )
        out = Dense((width,), self.out_std, 2, self.truncated, name="out")
        return out(jnp.moveaxis(mixed_BHLK, 1, 2)), cache


class MLP(nn.Module):
    """Two dense layers with an activation between: D → F → D."""

    inner: int
    activation: Activation
    init_std: float
    out_std: float
    truncated: bool = False

    @nn.compact
    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        """(B, L, D) to (B, L, D)."""
        up = Dense((self.inner,), self.init_std, truncated=self.truncated, name="up")
        down = Dense(hidden_BLD.shape[-1:], self.out_std, truncated=self.truncated, name="down")
        return down(ACTIVATIONS[self.activation](checkpoint_name(up(hidden_BLD), "up")))


class Block(nn.Module):
    """Attention and MLP, each with a residual and a norm before (GPT-2) or after it (BERT)."""

    heads: int
    inner: int
    activation: Activation
    causal: bool
    norm: Literal["pre", "post"]
    epsilon: float
    init_std: float
    out_std: float
    dropout: float = 0.0
    attention_dropout: float = 0.0
    kernel: Kernel = "auto"
    truncated: bool = False

    @nn.compact
    def __call__(
        self, hidden_BLD: jax.Array, cache: Any = None, *, train: bool = False, **places: Any
    ) -> tuple[jax.Array, Any]:
        """(B, L, D) to (B, L, D), with the cache that attention was given."""
        norm_1 = LayerNorm(self.epsilon, name="norm_1")
        norm_2 = LayerNorm(self.epsilon, name="norm_2")
        drop = nn.Dropout(self.dropout, deterministic=not train)
        stds = (self.init_std, self.out_std)
        attend = SelfAttention(
            self.heads, self.causal, *stds, self.attention_dropout, self.kernel, self.truncated,
            name="attention",
        )  # fmt: skip
        mlp = MLP(self.inner, self.activation, *stds, self.truncated, name="mlp")

        first_BLD = norm_1(hidden_BLD) if self.norm == "pre" else hidden_BLD
        mixed_BLD, cache = attend(first_BLD, cache, train=train, **places)
        hidden_BLD = hidden_BLD + drop(mixed_BLD)
        if self.norm == "pre":
            return hidden_BLD + drop(mlp(norm_2(hidden_BLD))), cache
        hidden_BLD = norm_1(hidden_BLD)
        return norm_2(hidden_BLD + drop(mlp(hidden_BLD))), cache


_POLICIES = {
    "names": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "up"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack_init(block: nn.Module, depth: int, width: int) -> Any:
    """An initialiser of `depth` blocks whose parameters carry a leading dimension of that size."""
    hidden_BLD = jnp.zeros((1, 1, width))

    def init(key: jax.Array) -> Any:
        one = lambda key: block.init(key, hidden_BLD)["params"]  # noqa: E731
        return jax.vmap(one)(jax.random.split(key, depth))

    return init


def stack_apply(
    block: nn.Module,
    params: Any,
    hidden_BLD: jax.Array,
    caches: Any = None,
    *,
    dropout_key: jax.Array | None = None,
    states: bool = False,
    remat: Remat = "none",
    unroll: int = 0,
    repeat: int = 0,
    **shared: Any,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """Runs a stack of blocks as one scan, so that compile time does not grow with depth.

    Args:
      block: `block.apply({"params": …}, hidden, cache, **shared) → (hidden, cache)`.
      params: of all blocks, with a leading depth dimension; of the one block with `repeat`.
      caches: per-layer caches with a leading depth dimension, or None.
      states: also return the input and every block's output, (depth + 1, B, L, D).
      remat: what the backward pass recomputes: nothing, all but named tensors, or everything.
      unroll: blocks per loop iteration; 0 chooses (all of them on a CPU, where loops cost).
      repeat: how often one block is applied with the same parameters; 0 for a stack.
    """
    depth = repeat or jax.tree.leaves(params)[0].shape[0]
    # Keys of a cache lie whole, and so do the few tokens that are added to it.
    split = sharding.split_tokens if caches is None else sharding.split_batch
    hidden_BLD = split(hidden_BLD)
    keys = None if dropout_key is None else jax.random.split(dropout_key, depth)

    def layer(hidden_BLD: jax.Array, inputs: Any) -> Any:
        weights, cache, key = inputs
        weights = sharding.for_compute(params if repeat else weights, hidden_BLD.dtype)
        rngs = None if key is None else {"dropout": key}
        variables = {"params": weights}
        hidden_BLD, cache = block.apply(variables, hidden_BLD, cache, rngs=rngs, **shared)
        hidden_BLD = split(hidden_BLD)
        hidden_BLD = cpu.hold(hidden_BLD)
        return hidden_BLD, (hidden_BLD if states else None, cache)

    unroll = unroll or (1 if sharding.platform() == "tpu" else min(depth, 12))
    if remat != "none":
        layer = jax.checkpoint(layer, policy=_POLICIES[remat], prevent_cse=False)
    final_BLD, (each, caches) = jax.lax.scan(
        layer,
        hidden_BLD,
        (None if repeat else params, caches, keys),
        length=depth,
        unroll=min(unroll, depth),
    )
    states_NBLD = jnp.concatenate([hidden_BLD[None], each]) if states else None
    return final_BLD, states_NBLD, caches
