# SPDX-License-Identifier: Apache-2.0
"""Layers that model families share, and the contract between a model and a loss.

Shapes: B batch, L length, D width, V vocabulary; N layers and one.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lmjax import cpu, sharding

Batch = Mapping[str, jax.Array]
Activation = Literal["gelu_tanh", "gelu_erf", "relu"]
Dtype = Literal["auto", "float32", "bfloat16"]

# Beyond these the compiler's counts of elements overflow, and it aborts.
_MOST_ROWS, _WIDEST, _DEEPEST = 1 << 30, 1 << 20, 10_000


@flax.struct.dataclass
class Readout:
    """What turns hidden states into scores: the table at rest, never the scores themselves.

    Rows of `table_VD` from `rows` on are padding and get no probability. With `negatives`
    (lmjax/sampled.py), a sampled softmax scores these alone, and the table may have no other rows.
    """

    table_VD: jax.Array
    bias_V: jax.Array | None = None
    rows: int = flax.struct.field(pytree_node=False, default=0)
    negatives: Any = None

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """float32 scores (B, L, rows): for a few positions, as in generation."""
        table_VD = self.table_VD[: self.rows].astype(hidden_BLD.dtype)
        scores = jnp.einsum(
            "...D,VD->...V", hidden_BLD, table_VD, preferred_element_type=jnp.float32
        )
        return scores if self.bias_V is None else scores + self.bias_V[None, None, : self.rows]


@flax.struct.dataclass
class Outputs:
    """What a model returns: final hidden states, a readout, and on request the rest.

    `heads` holds what a family computes beside them, by name; of encoders: masked_BPE (what the
    readout scores), pooled_BCD and pair_BCT of sentence pairs, sequence_BCT, token_BLT of
    classifiers, replaced_BL and is_replaced_BL of ELECTRA (T classes).
    """

    hidden_BLD: jax.Array
    readout: Readout
    states_NBLD: jax.Array | None = None  # embeddings and every layer's output
    cache: Any = None
    heads: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


def compute_dtype(dtype: Dtype) -> jnp.dtype:
    """The dtype of matrix products: "auto" is bfloat16 on accelerators, float32 on CPU."""
    if dtype == "auto":
        dtype = "float32" if sharding.platform() == "cpu" else "bfloat16"
    return jnp.dtype(dtype)


def check_sizes(model: Any, *names: str) -> None:
    """Raises ValueError for sizes (and `names`) below 1, rates outside [0, 1), heads that do not
    divide the width, and what `check_ranges` refuses."""
    check_ranges(model, "vocab", "context", "depth", "width", "heads", *names)
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(model, name) < 1:
            raise ValueError(f"model.{name}={getattr(model, name)}: a rate from 0 up to 1")
    if model.width % model.heads:
        raise ValueError(f"model.width={model.width} is not a multiple of heads={model.heads}")


def check_ranges(model: Any, *names: str) -> None:
    """Raises ValueError for `names` below 1, other whole numbers and deviations of a model below 0,
    sizes that no array has, and depths that no compiler ends with."""
    for name in names:
        if getattr(model, name) < 1:
            raise ValueError(f"model.{name}={getattr(model, name)}: must be at least 1")
    for field in dataclasses.fields(model):
        name, value = field.name, getattr(model, field.name)
        if type(value) is int:
            rows = _MOST_ROWS if name in ("vocab", "context") else _WIDEST
            if value > (most := _DEEPEST if name.endswith(("depth", "highways")) else rows):
                raise ValueError(f"model.{name}={value}: must be at most {most:,}")
        elif not (type(value) is float and name.endswith(("_std", "epsilon"))):
            continue
        if value < 0:
            raise ValueError(f"model.{name}={value}: must be 0 or more")


def padded(rows: int, multiple: int = 128) -> int:
    """`rows` rounded up: an even split over devices and whole tiles of the matrix unit."""
    return -(-rows // multiple) * multiple


def normal(std: float, truncated: bool = False) -> nn.initializers.Initializer:
    """N(0, std²); truncated at 2 std as TensorFlow does, which leaves a deviation of 0.88 std."""
    # JAX's truncated_normal, too, takes the deviation of the normal that is cut.
    kind = nn.initializers.truncated_normal if truncated else nn.initializers.normal
    return kind(std)


def padded_normal(std: float, rows: int, truncated: bool = False) -> nn.initializers.Initializer:
    """`normal` in the first `rows` rows and zeros in the padding after them."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        values = normal(std, truncated)(key, shape, dtype)
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
    summed = sharding.map_shards(
        partial(_sum_by_token, vocab=shape[0]),
        (sharding.TOKENS, sharding.TOKENS),
        sharding.spec("embedding", shape),
    )
    return summed(sharding.pad_tokens(tokens_BL), sharding.pad_tokens(gradient_BLD)), None


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
    return sharding.sum_over(table_VD, *sharding.COPIES)


embed.defvjp(_embed_forward, _embed_backward)


class Dense(nn.Module):
    """x W + b over the last `contract` dimensions of x, which become `features`.

    Heads and their width are one dimension of W and b as they are kept, which is whole lanes of a
    TPU's memory where a head is half of them.

    `at_rest`: the weights are as they rest on the mesh; a stack hands out gathered ones.
    """

    features: tuple[int, ...]
    init_std: float
    contract: int = 1
    truncated: bool = False
    at_rest: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., *inputs) to (..., *features), in the dtype of x."""
        rows, inputs = x.shape[: -self.contract], x.shape[-self.contract :]
        kept = (math.prod(inputs), *self.features[:-2], math.prod(self.features[-2:]))
        init = normal(self.init_std, self.truncated)
        kernel = self.param("kernel", init, kept)
        bias = self.param("bias", nn.initializers.zeros, kept[1:]).astype(x.dtype)
        if self.at_rest:
            name = f"{self.name}/kernel"
            kernel = sharding.for_compute({name: kernel}, x.dtype)[name]
        kernel = kernel.astype(x.dtype)
        if cpu.alone():
            y = cpu.product(cpu.hold(x).reshape(-1, kept[0]), kernel.reshape(kept[0], -1))
            y = y.reshape(*rows, *self.features)
        else:
            if kernel.shape != (shape := (*inputs, *self.features)):
                # Or the compiler moves the reshape behind the product, which is larger to copy.
                kernel = jax.lax.optimization_barrier(kernel.reshape(shape))
            y = jnp.tensordot(x, kernel, self.contract)
        return y + bias.reshape((1,) * len(rows) + self.features)


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


def _gelu(approximate: bool, docstring: str) -> Callable[[jax.Array], jax.Array]:
    """A GELU whose backward pass keeps x alone, where JAX's would keep every intermediate."""
    plain = partial(nn.gelu, approximate=approximate)
    gelu = jax.custom_vjp(lambda x: plain(x))
    gelu.defvjp(lambda x: (plain(x), x), lambda x, gradient: jax.vjp(plain, x)[1](gradient))
    gelu.__doc__ = docstring
    return gelu


gelu_tanh = _gelu(True, "x Φ(x) by the tanh formula (Hendrycks & Gimpel 2016).")
gelu_erf = _gelu(False, "x Φ(x) to the letter.")

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "relu": nn.relu,
}
