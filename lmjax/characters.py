# SPDX-License-Identifier: Apache-2.0
"""Words from their characters: convolutions, highway layers and a projection (Kim et al. 2016).

Of all places of a filter in a word only the best counts, so its place is kept and the gradient goes
there; what a filter gives at the other places is never stored.

Shapes: B rows, X directions, L words, C characters, N words in one row, U distinct words, P places
of a filter, E numbers of a character, F filters, D width.
"""

import math
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmjax import cpu, sharding, spelling_cpu
from lmjax.layers import normal

ALPHABET = 261  # bytes, both ends of a sentence, both ends of a word, padding


class CharacterEncoder(nn.Module):
    """A vector of each word, in the dtype asked for.

    Args:
      embedding: numbers of a character.
      filters: (characters, how many) of each convolution.
      highways: layers after them.
      width: numbers of a word.
      distinct: share of a device's words up to which each distinct one is computed only once; if
        more are distinct the time is that of all words, as it is at 0.
    """

    embedding: int
    filters: tuple[tuple[int, int], ...]
    highways: int
    width: int
    activation: Literal["relu", "tanh"] = "relu"
    distinct: float = 0.5

    @nn.compact
    def __call__(
        self, characters_BXLC: jax.Array, spellings_BXL: jax.Array, dtype: Any
    ) -> jax.Array:
        """(B, X, L, D): words with the same number in `spellings_BXL` are spelt the same."""
        weights = self._weights(characters_BXLC.shape[-1], dtype)
        characters_BXLC, spellings_BXL = jnp.asarray(characters_BXLC), jnp.asarray(spellings_BXL)
        spell = partial(_spell, activation=self.activation)
        y_BXLD = _once_each(spell, weights, characters_BXLC, spellings_BXL, self.distinct)
        return sharding.split_batch(y_BXLD)

    def _weights(self, letters: int, dtype: Any) -> dict[str, Any]:
        """Parameters by name in `dtype`, matrices gathered."""
        top = sum(count for _, count in self.filters)

        def affine(name: str, init: Any, shape: tuple[int, ...]) -> Any:
            make = lambda key: {"kernel": init(key, shape), "bias": jnp.zeros(shape[-1:])}  # noqa: E731
            return self.param(name, make)

        found: dict[str, Any] = {
            "table": self.param("table", _uniform(1.0), (ALPHABET, self.embedding))
        }
        for i, (wide, count) in enumerate(self.filters):
            if wide > letters:
                raise ValueError(
                    f"model.filters: a filter of {wide} characters, but words have {letters}"
                )
            std = math.sqrt(1 / (wide * self.embedding))
            init = _uniform(0.05) if self.activation == "relu" else normal(std)
            found[f"conv_{i}"] = affine(f"conv_{i}", init, (wide, self.embedding, count))
        for k in range(self.highways):
            found[f"highway_{k}"] = self.param(f"highway_{k}", partial(_highway_init, width=top))
        found["project"] = affine("project", normal(1 / math.sqrt(top)), (top, self.width))
        prepared = sharding.for_compute({self.name: found}, dtype)[self.name]
        return jax.tree.map(lambda x: x.astype(dtype), prepared)


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def _highway_init(key: jax.Array, width: int) -> Any:
    """A gate that is mostly closed: −2 lets 12 % of the new value through."""
    keys = jax.random.split(key)
    init = normal(math.sqrt(1 / width))
    return {
        name: {"kernel": init(k, (width, width)), "bias": jnp.full(width, bias, jnp.float32)}
        for name, k, bias in zip(("carry", "transform"), keys, (-2.0, 0.0), strict=True)
    }


def _spell(weights: Any, characters_NC: jax.Array, activation: str) -> jax.Array:
    """Vectors (N, D) of words (N, C)."""
    convolutions = [weights[f"conv_{i}"] for i in range(_count(weights, "conv_"))]
    kernels = [w["kernel"] for w in convolutions]
    if cpu.alone():
        top_NF = spelling_cpu.strongest(weights["table"], kernels, characters_NC)
    else:
        letters_NCE = _letters(weights["table"], characters_NC)
        top_NF = jnp.concatenate([_strongest(letters_NCE, kernel) for kernel in kernels], -1)
    # The bias does not move the maximum, nor does the activation.
    act = nn.relu if activation == "relu" else jnp.tanh
    x_NF = act(top_NF + jnp.concatenate([w["bias"] for w in convolutions])[None])
    for k in range(_count(weights, "highway_")):
        x_NF = _highway(x_NF, weights[f"highway_{k}"])
    return _affine(x_NF, weights["project"])


def _count(weights: Any, prefix: str) -> int:
    return sum(name.startswith(prefix) for name in weights)


def _highway(x_NF: jax.Array, weights: Any) -> jax.Array:
    """g · relu(x W + b) + (1 − g) · x (Srivastava et al. 2015)."""
    gate_NF = jax.nn.sigmoid(_affine(x_NF, weights["carry"]))
    return gate_NF * nn.relu(_affine(x_NF, weights["transform"])) + (1 - gate_NF) * x_NF


def _affine(x_NF: jax.Array, weights: Any) -> jax.Array:
    kernel = weights["kernel"]
    y = cpu.product(cpu.hold(x_NF), kernel) if cpu.alone() else x_NF @ kernel
    return y + weights["bias"][None]


@jax.custom_vjp
def _letters(table_VE: jax.Array, characters_NC: jax.Array) -> jax.Array:
    """Rows of the table (N, C, E), whose gradient is summed as a product in float32."""
    return table_VE[characters_NC.astype(jnp.int32)]


def _letters_backward(saved: Any, gradient_NCE: jax.Array) -> Any:
    table_VE, characters_NC = saved
    one_hot_NCV = jax.nn.one_hot(characters_NC, len(table_VE), dtype=gradient_NCE.dtype)
    return _sums(one_hot_NCV, gradient_NCE).astype(table_VE.dtype), None


_letters.defvjp(lambda table, at: (_letters(table, at), (table, at)), _letters_backward)


def _convolution(letters_NCE: jax.Array, kernel_WEF: jax.Array) -> jax.Array:
    """What each filter gives at each place (N, P, F)."""
    return jax.lax.conv_general_dilated(
        letters_NCE, kernel_WEF, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")
    )


@jax.custom_vjp
def _strongest(letters_NCE: jax.Array, kernel_WEF: jax.Array) -> jax.Array:
    """The most that each filter gives (N, F), at places of padding as well, as in the original."""
    return _convolution(letters_NCE, kernel_WEF).max(1)


def _strongest_forward(letters_NCE: jax.Array, kernel_WEF: jax.Array) -> Any:
    places_NPF = _convolution(letters_NCE, kernel_WEF)
    place_NPF = jax.lax.broadcasted_iota(jnp.int32, places_NPF.shape, 1)

    def better(a: Any, b: Any) -> Any:
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1])) | (a[0] != a[0])  # NaN stays
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])

    least = (jnp.array(-jnp.inf, places_NPF.dtype), jnp.array(places_NPF.shape[1], jnp.int32))
    top_NF, place_NF = jax.lax.reduce((places_NPF, place_NPF), least, better, (1,))
    return top_NF, (letters_NCE, kernel_WEF, place_NF.astype(jnp.int16))


def _strongest_backward(saved: Any, gradient_NF: jax.Array) -> Any:
    letters_NCE, kernel_WEF, place_NF = saved
    _, pull = jax.vjp(_convolution, letters_NCE, kernel_WEF)
    places = letters_NCE.shape[1] - kernel_WEF.shape[0] + 1
    here_NPF = place_NF[:, None] == jnp.arange(places, dtype=place_NF.dtype)[None, :, None]
    return pull(jnp.where(here_NPF, gradient_NF[:, None], 0))


_strongest.defvjp(_strongest_forward, _strongest_backward)


def _once_each(
    spell: Any, weights: Any, characters_BXLC: jax.Array, spellings_BXL: jax.Array, share: float
) -> jax.Array:
    """`spell` of all words (B, X, L, D), computed once for each distinct one of a device."""
    *shape, letters = characters_BXLC.shape
    shards = sharding.axis_size(*sharding.BATCH_AXES)
    words = math.prod(shape) // shards
    cap = -(-math.ceil(share * words) // 8) * 8
    rows = P(sharding.BATCH_AXES)
    on_each = partial(sharding.map_shards, out_specs=rows)

    flat = on_each(lambda x: x.reshape(words, letters), rows)
    restore = on_each(lambda y: y.reshape(shape[0] // shards, *shape[1:], -1), rows)
    if not 0 < cap < words:
        return restore(spell(weights, flat(characters_BXLC)))
    find = on_each(_distinct, rows)
    first_N, place_N, count_1 = find(spellings_BXL)
    take = on_each(lambda x, at: x[at], (rows, rows))
    words_NC = take(flat(characters_BXLC), first_N)
    head = on_each(lambda x: x[:cap], rows)(words_NC)
    rest = on_each(lambda x: x[cap:], rows)(words_NC)
    parts: Any = _head_first(spell, weights, head, rest, (count_1 > cap).any())
    join = on_each(lambda a, b: jnp.concatenate([a, b]), (rows, rows))
    pick = on_each(_rows, (rows, rows))
    return restore(pick(join(*parts), place_N))


def _distinct(spellings_BXL: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where each distinct spelling stands first (N, zeros after the last of them), which of them
    each word is (N), and how many there are (1)."""
    spelling_N = spellings_BXL.reshape(-1)
    order_N = jnp.argsort(spelling_N)
    sorted_N = spelling_N[order_N]
    new_N = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])
    rank_N = jnp.cumsum(new_N) - 1
    place_N = jnp.zeros_like(rank_N).at[order_N].set(rank_N, unique_indices=True)
    first_N = (
        jnp.zeros_like(order_N).at[jnp.where(new_N, rank_N, len(rank_N))].set(order_N, mode="drop")
    )
    return first_N, place_N, rank_N[-1:] + 1


@jax.custom_vjp
def _rows(y_ND: jax.Array, at_N: jax.Array) -> jax.Array:
    """y[at], whose gradient is summed in float32."""
    return y_ND[at_N]


def _rows_backward(saved: Any, gradient_ND: jax.Array) -> Any:
    at_N, rows = saved
    if sharding.platform() == "cpu":
        grad = jax.ops.segment_sum(gradient_ND.astype(jnp.float32), at_N, len(rows))
    else:
        # A scatter takes row after row, or any order; this product is small.
        grad = _sums(jax.nn.one_hot(at_N, len(rows), dtype=gradient_ND.dtype), gradient_ND)
    return grad.astype(gradient_ND.dtype), None


def _sums(one_hot_NV: jax.Array, x_ND: jax.Array) -> jax.Array:
    """Sums of the rows that belong together (V, D), float32."""
    return jnp.einsum(
        "...V,...D->VD", one_hot_NV, x_ND,
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip


_rows.defvjp(lambda y, at: (y[at], (at, y[:, 0])), _rows_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_first(
    spell: Any, weights: Any, head_UC: jax.Array, rest_NC: jax.Array, more: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`spell` of the head, and of the rest if there is `more` than the head."""
    return _head_first_forward(spell, weights, head_UC, rest_NC, more)[0]


def _head_first_forward(spell, weights, head_UC, rest_NC, more):
    y_head, pull = jax.vjp(lambda weights: spell(weights, head_UC), weights)
    zeros = jnp.zeros((len(rest_NC), y_head.shape[-1]), y_head.dtype)
    y_rest = jax.lax.cond(more, lambda: spell(weights, rest_NC), lambda: zeros)
    return (y_head, y_rest), (pull, weights, rest_NC, more)


def _head_first_backward(spell, saved, gradients):
    pull, weights, rest_NC, more = saved
    (of_head,) = pull(gradients[0])

    def both() -> Any:
        # What the rest would have kept for this is computed again: it is the rare case.
        _, pull_rest = jax.vjp(lambda weights: spell(weights, rest_NC), weights)
        return jax.tree.map(jnp.add, of_head, pull_rest(gradients[1])[0])

    return jax.lax.cond(more, both, lambda: of_head), None, None, None


_head_first.defvjp(_head_first_forward, _head_first_backward)
