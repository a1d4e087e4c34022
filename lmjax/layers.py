# SPDX-License-Identifier: Apache-2.0
"""Parts that model families share, and the contract between a model and a loss.

Shapes: B batch, L length, D width, H heads, K head width, F inner width, V vocabulary.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lmjax import cpu, sharding
from lmjax.attention import Kernel, attention

Batch = Mapping[str, jax.Array]
Remat = Literal["none", "names", "full"]
Dtype = Literal["auto", "float32", "bfloat16"]


@flax.struct.dataclass
class Readout:
    """What turns hidden states into scores: the table at rest, never the scores themselves.

    Rows of `table_VD` from `rows` on are padding and get no probability.
    """

    table_VD: jax.Array
    bias_V: jax.Array | None = None
    rows: int = flax.struct.field(pytree_node=False, default=0)

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """float32 scores (B, L, rows): for a few positions, as in generation."""
        table_VD = self.table_VD[: self.rows].astype(hidden_BLD.dtype)
        scores = jnp.einsum(
            "...D,VD->...V", hidden_BLD, table_VD, preferred_element_type=jnp.float32
        )
        return scores if self.bias_V is None else scores + self.bias_V[None, None, : self.rows]


@flax.struct.dataclass
class Outputs:
    """What a model returns: final hidden states, a readout, and on request the rest."""

    hidden_BLD: jax.Array
    readout: Readout
    states_NBLD: jax.Array | None = None  # embeddings and every layer's output
    cache: Any = None


def compute_dtype(dtype: Dtype) -> jnp.dtype:
    """The dtype of matrix products: "auto" is bfloat16 on accelerators, float32 on CPU."""
    if dtype == "auto":
        dtype = "float32" if sharding.platform() == "cpu" else "bfloat16"
    return jnp.dtype(dtype)


def padded(rows: int, multiple: int = 128) -> int:
    """`rows` rounded up: an even split over devices and whole tiles of the matrix unit."""
    return -(-rows // multiple) * multiple


def padded_normal(std: float, rows: int) -> nn.initializers.Initializer:
    """N(0, std²) in the first `rows` rows and zeros in the padding after them."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        values = std * jax.random.normal(key, shape, dtype)
        return jnp.where(jnp.arange(shape[0])[:, None] < rows, values, 0)

    return init


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_VD: jax.Array, tokens_BL: jax.Array, dtype: Any) -> Any:
    """Rows of a table at rest, in `dtype` (B, L, D); the table's gradient is summed in float32."""
    return sharding.for_compute({"embedding": table_VD}, dtype)["embedding"][tokens_BL]


def _embed_forward(table_VD: jax.Array, tokens_BL: jax.Array, dtype: Any) -> Any:
    return embed(table_VD, tokens_BL, dtype), (tokens_BL, table_VD.shape)


def _embed_backward(dtype: Any, saved: Any, gradient_BLD: jax.Array) -> Any:
    tokens_BL, shape = saved
    rows_spec = P(sharding.BATCH_AXES)
    summed = sharding.map_shards(
        partial(_sum_by_token, vocab=shape[0]),
        (rows_spec, rows_spec),
        sharding.spec("embedding", shape),
    )
    return summed(tokens_BL, gradient_BLD), None


def _sum_by_token(tokens_BL: jax.Array, gradient_BLD: jax.Array, vocab: int) -> jax.Array:
    """One device's rows and columns of the table's gradient.

    Devices of an fsdp group trade rows of the batch for columns, which is less to send than their
    whole tables.
    """
    tokens_BL = sharding.gather_over(tokens_BL, sharding.FSDP, dim=0)
    gradient_BLD = sharding.exchange_over(gradient_BLD, sharding.FSDP, split=2, join=0)
    vocab //= sharding.axis_size(sharding.TENSOR)
    row_BL = tokens_BL - sharding.index_on(sharding.TENSOR) * vocab
    row_BL = jnp.where(row_BL < 0, vocab, row_BL)  # negative indices would count from the end
    zeros_VD = jnp.zeros((vocab, gradient_BLD.shape[-1]), jnp.float32)
    table_VD = zeros_VD.at[row_BL].add(gradient_BLD.astype(jnp.float32), mode="drop")
    return sharding.sum_over(table_VD, sharding.DATA)


embed.defvjp(_embed_forward, _embed_backward)


class Dense(nn.Module):
    """x W + b over the last `contract` dimensions of x, which become `features`."""

    features: tuple[int, ...]
    init_std: float
    contract: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., *inputs) to (..., *features), in the dtype of x."""
        rows, inputs = x.shape[: -self.contract], x.shape[-self.contract :]
        init = nn.initializers.normal(self.init_std)
        kernel = self.param("kernel", init, (*inputs, *self.features)).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, self.features).astype(x.dtype)
        if cpu.alone():
            flat = (math.prod(inputs), math.prod(self.features))
            y = cpu.product(cpu.hold(x).reshape(-1, flat[0]), kernel.reshape(flat))
            y = y.reshape(*rows, *self.features)
        else:
            y = jnp.tensordot(x, kernel, self.contract)
        return y + jnp.expand_dims(bias, tuple(range(len(rows))))


class LayerNorm(nn.Module):
    """Layer norm over the last dimension (Ba et al. 2016), in float32 whatever comes in."""

    epsilon: float

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """(B, L, D) to (B, L, D), in the dtype of x."""
        scale_D = self.param("scale", nn.initializers.ones, x_BLD.shape[-1:])
        bias_D = self.param("bias", nn.initializers.zeros, x_BLD.shape[-1:])
        wide_BLD = x_BLD.astype(jnp.float32)
        y_BLD: Any
        if cpu.alone():
            y_BLD = cpu.layer_norm(wide_BLD, scale_D, bias_D, self.epsilon)
        else:
            y_BLD, _ = cpu.layer_norm_forward(wide_BLD, scale_D, bias_D, self.epsilon)
        return y_BLD.astype(x_BLD.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with one fused projection to q, k and v."""

    heads: int
    causal: bool
    init_std: float
    out_std: float
    dropout: float = 0.0
    kernel: Kernel = "auto"

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
        # A plain matrix product to (B, L, 3, H, K): moving the heads out is cheaper apart.
        into = Dense((3, self.heads, width // self.heads), self.init_std, name="qkv")
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
        out = Dense((width,), self.out_std, contract=2, name="out")
        return out(jnp.moveaxis(mixed_BHLK, 1, 2)), cache


class MLP(nn.Module):
    """Two dense layers with an activation between: D → F → D."""

    inner: int
    activation: Literal["gelu_tanh", "gelu_erf", "relu"]
    init_std: float
    out_std: float

    @nn.compact
    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        """(B, L, D) to (B, L, D)."""
        up_BLF = Dense((self.inner,), self.init_std, name="up")(hidden_BLD)
        up_BLF = ACTIVATIONS[self.activation](checkpoint_name(up_BLF, "up"))
        return Dense(hidden_BLD.shape[-1:], self.out_std, name="down")(up_BLF)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """x Φ(x) by the tanh formula (Hendrycks & Gimpel 2016); its backward pass keeps x alone."""
    return nn.gelu(x, approximate=True)


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return jax.vjp(partial(nn.gelu, approximate=True), x)[1](gradient)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_backward)

ACTIVATIONS = {
    "gelu_tanh": gelu_tanh,
    "gelu_erf": partial(nn.gelu, approximate=False),
    "relu": nn.relu,
}

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
    **shared: Any,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """Runs a stack of blocks as one scan, so that compile time does not grow with depth.

    Args:
      block: `block.apply({"params": …}, hidden, cache, **shared) → (hidden, cache)`.
      caches: per-layer caches with a leading depth dimension, or None.
      states: also return the input and every block's output, (depth + 1, B, L, D).
      remat: what the backward pass recomputes: nothing, all but named tensors, or everything.
      unroll: blocks per loop iteration; 0 chooses (all of them on a CPU, where loops cost).
    """
    depth = jax.tree.leaves(params)[0].shape[0]
    keys = None if dropout_key is None else jax.random.split(dropout_key, depth)

    def layer(hidden_BLD: jax.Array, inputs: Any) -> Any:
        weights, cache, key = inputs
        weights = sharding.for_compute(weights, hidden_BLD.dtype)
        rngs = None if key is None else {"dropout": key}
        variables = {"params": weights}
        hidden_BLD, cache = block.apply(variables, hidden_BLD, cache, rngs=rngs, **shared)
        hidden_BLD = sharding.split_batch(hidden_BLD)
        hidden_BLD = cpu.hold(hidden_BLD)
        return hidden_BLD, (hidden_BLD if states else None, cache)

    unroll = unroll or (1 if sharding.platform() == "tpu" else min(depth, 12))
    if remat != "none":
        layer = jax.checkpoint(layer, policy=_POLICIES[remat], prevent_cse=False)
    final_BLD, (each, caches) = jax.lax.scan(
        layer, hidden_BLD, (params, caches, keys), unroll=min(unroll, depth)
    )
    states_NBLD = jnp.concatenate([hidden_BLD[None], each]) if states else None
    return final_BLD, states_NBLD, caches
