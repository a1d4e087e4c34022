# SPDX-License-Identifier: Apache-2.0
"""Sampled softmax: a word is scored beside some thousand drawn ones, not all of the vocabulary.

The draw is the one of TensorFlow's log-uniform sampler: word k, by falling frequency, comes with
probability log((k+2) / (k+1)) / log(V+1), and words are drawn until S different ones are found.
How often a word is then expected among them is subtracted from its score as a logarithm, so that
the few stand for all (Jean et al. 2015); where a drawn word is the right one, it does not count.

The rows of the table that a step needs are few, so the table may be cut down to them (`draw`,
lmjax/sparse.py): a word then has a place among the rows beside its id.

Shapes: B batch, X directions, L length, V vocabulary, S negatives, R rows of the table; M proposals
of a draw, K some ids.
"""

import functools
import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lmjax import sharding
from lmjax.layers import padded
from lmjax.sparse import Drawn

EMPTY = 2**30  # ids from here on name no word
_TABLES = r"softmax/(embedding|output_bias)$"
_LOG_RARE = -30.0  # log-probability with which a draw may find fewer words than asked for


@flax.struct.dataclass
class Negatives:
    """The words that a step scores beside the right ones, for each direction.

    Args:
      ids_XS: ascending and distinct; `EMPTY` fills up.
      places_XS: the rows of the table in which they lie, ascending; from `EMPTY` on for `EMPTY`.
      tries_X: how many draws it took to find so many different words.
      rows_R: ids of the table's rows, ascending; None for the whole table.
      vocab: words that are drawn from.
    """

    ids_XS: jax.Array
    places_XS: jax.Array
    tries_X: jax.Array
    rows_R: jax.Array | None
    vocab: int = flax.struct.field(pytree_node=False)

    def place(self, ids: jax.Array) -> jax.Array:
        """The rows of the table in which words lie."""
        return place(ids, self.rows_R)


def draw(
    targets_BXL: jax.Array,
    key: jax.Array,
    count: int,
    vocab: int,
    words_BXL: jax.Array | None = None,
) -> Drawn:
    """`count` negatives for each direction of a step, shared by its positions, and the rows used.

    Args:
      words_BXL: the words that are read, where their vectors are rows of the softmax, too.
    """
    directions = targets_BXL.shape[1]
    keys = jax.random.split(jax.random.fold_in(key, 2), directions)
    ids_XS, tries_X = jax.vmap(partial(draw_log_uniform, count=count, vocab=vocab))(keys)
    used = [ids_XS, targets_BXL, *([] if words_BXL is None else [words_BXL])]
    cap = min(padded(vocab), padded(sum(x.size for x in used)))
    rows_R = touched_rows(cap, *used)
    drawn: Any = {"negatives": placed(ids_XS, tries_X, vocab, rows_R)}
    return Drawn(drawn, _TABLES, rows_R)


def placed(
    ids_XS: jax.Array, tries_X: jax.Array, vocab: int, rows_R: jax.Array | None = None
) -> Negatives:
    """Negatives in a table of `rows_R` or of all words, as many as devices of `tensor` divide."""
    spare = -ids_XS.shape[1] % sharding.axis_size(sharding.TENSOR)
    ids_XS = jnp.pad(ids_XS, ((0, 0), (0, spare)), constant_values=EMPTY)
    far_XS = jnp.broadcast_to(EMPTY + jnp.arange(ids_XS.shape[1])[None, :], ids_XS.shape)
    places_XS = jnp.where(ids_XS < EMPTY, place(ids_XS, rows_R), far_XS)
    return Negatives(ids_XS, places_XS, tries_X, rows_R, vocab)


def touched_rows(cap: int, *ids: jax.Array) -> jax.Array:
    """The distinct ids (cap,), ascending; `EMPTY`, `EMPTY` + 1, … fill up."""
    id_K = jnp.sort(jnp.concatenate([x.reshape(-1) for x in ids]))
    id_K = jnp.sort(jnp.where(_is_first(id_K), id_K, EMPTY))[:cap]
    id_R = jnp.pad(id_K, (0, cap - id_K.size), constant_values=EMPTY)
    return jnp.where(id_R < EMPTY, id_R, EMPTY + jnp.arange(cap))


def place(ids: jax.Array, rows_R: jax.Array | None) -> jax.Array:
    """Where ids lie in ascending `rows_R`, or in the whole table."""
    if rows_R is None:
        return ids
    if sharding.platform() == "cpu":
        return jnp.searchsorted(rows_R, ids).astype(jnp.int32)
    # Sorted together: a binary search is one small step after the other.
    count = rows_R.size
    nth_K = jnp.arange(count + ids.size)
    both_K = jnp.concatenate([rows_R, ids.reshape(-1)])
    _, nth_K = jax.lax.sort((both_K, nth_K), num_keys=1, is_stable=True)
    row_K = jnp.cumsum((nth_K < count).astype(jnp.int32)) - 1
    return jax.lax.sort((nth_K, row_K), num_keys=1)[1][count:].reshape(ids.shape)


def _is_first(sorted_K: jax.Array) -> jax.Array:
    """Whether an element differs from the one before it."""
    return jnp.concatenate([jnp.ones(1, bool), sorted_K[1:] != sorted_K[:-1]])


# --- the draw -------------------------------------------------------------------------------------


def draw_log_uniform(key: jax.Array, count: int, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Words drawn with P(k) = log((k+2) / (k+1)) / log(V+1) until `count` different ones came.

    All draws are made at once, more than will be needed. Should fewer words be found all the same
    (probability e⁻³⁰), ids are `EMPTY`, and `tries` counts all draws: expected counts stay right.

    Returns:
      The words (S,), ascending, and how many draws it took.

    Raises:
      ValueError: the vocabulary has fewer words.
    """
    if not 0 < count <= vocab:
        raise ValueError(f"{count} negatives of a vocabulary of {vocab}: from 1 to {vocab} can be")
    id_M, nth_M = _draws(key, _proposals(count, vocab), vocab)
    id_M, nth_M, is_new_M = _firsts(id_M, nth_M, vocab)
    last = jnp.sort(jnp.where(is_new_M, nth_M, EMPTY))[count - 1]
    tries = jnp.minimum(last, nth_M.max())
    return jnp.sort(jnp.where(is_new_M & (nth_M <= tries), id_M, EMPTY))[:count], tries


def _firsts(id_M: jax.Array, nth_M: jax.Array, vocab: int) -> tuple[jax.Array, ...]:
    """Draws in some order, and whether each is the first of its word."""
    if sharding.platform() == "cpu":  # where to sort pairs takes 30 times as long
        first_V = jnp.full(vocab, EMPTY).at[id_M].min(nth_M, mode="drop")
        return id_M, nth_M, first_V.at[id_M].get(mode="fill", fill_value=EMPTY) == nth_M
    id_M, nth_M = jax.lax.sort((id_M, nth_M), num_keys=2)
    return id_M, nth_M, _is_first(id_M) & (id_M < EMPTY)


def _draws(key: jax.Array, proposals: int, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Words (M,), `EMPTY` where a proposal was refused, and how many draws there were until then.

    Rounding in exp(u log(V+1)) would give rare words uneven chances. Instead, of the blocks
    2ʲ ≤ k+1 < 2ʲ⁺¹, each as likely, one is drawn, in it a word evenly, and what is too much of
    that is refused.
    """
    shape = (proposals,)
    of_block, of_word, of_refusal = jax.random.split(key, 3)
    block_M = jax.random.randint(of_block, shape, 0, vocab.bit_length())
    first_M = jnp.left_shift(1, block_M)
    bits_M = jax.random.bits(of_word, shape, jnp.uint32).astype(jnp.int32)
    rank_M = first_M + (bits_M & (first_M - 1))  # k+1
    chance_M = first_M * jnp.log1p(1 / rank_M)
    taken_M = (jax.random.uniform(of_refusal, shape) < chance_M) & (rank_M <= vocab)
    return jnp.where(taken_M, rank_M - 1, EMPTY), jnp.cumsum(taken_M.astype(jnp.int32))


@functools.cache
def _proposals(count: int, vocab: int) -> int:
    """Proposals among which `count` different words are, but for a probability of about e⁻³⁰.

    By Chernoff's bound on the number of words that were found, or of those that were missed:
    they depend on each other negatively, which keeps the bound (Dubhashi & Ranjan 1998).
    """
    others_V = 1 - _probability(np.arange(vocab), vocab, np)

    def enough(tries: int) -> bool:
        missed = max((others_V**tries).sum(), 1e-300)
        found = vocab - missed
        few, many = max(count - 1, 1e-9), vocab - count + 1
        low = few < found and few - found + few * math.log(found / few) < _LOG_RARE
        return low or (missed < many and many - missed + many * math.log(missed / many) < _LOG_RARE)

    above = count
    while not enough(above):
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (below, middle) if enough(middle) else (middle, above)
    spare = -2 * _LOG_RARE
    rate = math.log(vocab + 1) / vocab.bit_length()  # of proposals that are not refused
    return math.ceil((above + math.sqrt(spare * above) + spare) / rate)


def _probability(ids: Any, vocab: int, numpy: Any) -> Any:
    return numpy.log1p(1 / (ids + 1)) / math.log(vocab + 1)


def log_expected_counts(ids: jax.Array, tries: jax.Array, vocab: int) -> jax.Array:
    """log of the probability with which a word is among the different ones of `tries` draws."""
    missed = tries * jnp.log1p(-_probability(ids, vocab, jnp))
    return jnp.log(-jnp.expm1(missed))
