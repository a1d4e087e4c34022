# SPDX-License-Identifier: Apache-2.0
"""The cross-entropy over a target and some drawn words, on any mesh (see lmjax/sampled.py).

As in the full cross-entropy, gradients are formed chunk by chunk in the forward pass, and the
scores of a chunk are all that exists. Over `tensor`, each device scores a part of the negatives.

Shapes: B batch, X directions, L length, D width, S negatives, R rows of the table; of one shard,
direction and chunk: N tokens.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmjax import sharding
from lmjax.layers import Readout
from lmjax.sampled import EMPTY, Negatives, log_expected_counts


def sampled_cross_entropy(
    hidden_BXLD: jax.Array,
    readout: Readout,
    targets_BXL: jax.Array,
    weights_BXL: jax.Array,
    chunks: int,
) -> jax.Array:
    """Σ weight · −log p(target) for each direction (X,), where p is over target and negatives.

    Args:
      readout: with `negatives`; its table has the rows of all words, or of those that it names.
      chunks: parts of equal length that a device's tokens go through in; divides L.
    """
    negatives: Negatives = readout.negatives
    table_RD, bias_R = readout.table_VD, readout.bias_V
    if bias_R is None:
        bias_R = jnp.zeros(table_RD.shape[:1], jnp.float32)
    tries_X = negatives.tries_X.astype(jnp.float32)
    log_counts_XS = log_expected_counts(negatives.ids_XS, tries_X[:, None], negatives.vocab)
    log_counts_BXL = log_expected_counts(targets_BXL, tries_X[None, :, None], negatives.vocab)
    return _sampled(
        hidden_BXLD,
        table_RD,
        bias_R,
        (negatives.ids_XS, negatives.places_XS, log_counts_XS),
        (targets_BXL, negatives.place(targets_BXL), log_counts_BXL),
        weights_BXL.astype(jnp.float32),
        chunks,
        table_RD.shape,
    )


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _sampled(hidden_BXLD, table_RD, bias_R, negatives, targets, weights_BXL, chunks, shape) -> Any:
    given = (hidden_BXLD, table_RD, bias_R, negatives, targets, weights_BXL)
    return _in_shards(given, chunks, shape, gradients=False)[0]


def _forward(*arguments):
    *given, chunks, shape = arguments
    nll_X, grads = _in_shards(given, chunks, shape, gradients=True)
    hidden_BXLD, _, _, (_, places_XS, _), (_, places_BXL, _), _ = given
    return nll_X, (hidden_BXLD, places_XS, places_BXL, grads)


def _backward(_, shape, saved, scale_X):
    hidden_BXLD, places_XS, places_BXL, (grad_BXLD, *grads) = saved
    rows, table, bias = _specs(shape)
    table_RD, bias_R = sharding.map_shards(
        partial(_table_gradients, shape=shape),
        (P(), rows, P(), rows, *_GRADS[1:]),
        (table, bias),
    )(scale_X, hidden_BXLD, places_XS, places_BXL, *grads)
    grad_BXLD = grad_BXLD * scale_X.astype(grad_BXLD.dtype)[None, :, None, None]
    return grad_BXLD, table_RD, bias_R, None, None, None


_sampled.defvjp(_forward, _backward)

# Gradients of hidden states and of the targets' scores; of the negatives' rows and their biases,
# of which each device of the batch axes has its own until `_table_gradients`.
_GRADS = (
    P(sharding.BATCH_AXES),
    P(sharding.BATCH_AXES),
    P(sharding.DATA, None, sharding.TENSOR, sharding.FSDP),
    P(sharding.BATCH_AXES, None, sharding.TENSOR),
)


def _specs(shape: tuple[int, ...]) -> tuple[P, P, P]:
    """Of the batch, of a table and of its bias."""
    table = sharding.spec("embedding", shape)
    return P(sharding.BATCH_AXES), table, P(table[0])


def _in_shards(given, chunks: int, shape: tuple[int, ...], gradients: bool):
    rows, table, bias = _specs(shape)
    return sharding.map_shards(
        partial(_local, chunks=chunks, gradients=gradients),
        (rows, table, bias, P(), rows, rows),
        (P(), _GRADS if gradients else None),
    )(*given)


def _local(
    hidden_BXLD, table_RD, bias_R, negatives, targets, weights_BXL, *, chunks: int, gradients: bool
):
    """(X,) sums, and the gradients that `_GRADS` names."""
    ids_BXL, places_BXL, log_counts_BXL = targets
    rows_BXLD, bias_BXL = _target_rows(table_RD, bias_R, places_BXL, hidden_BXLD.dtype)
    tokens_BXL = (hidden_BXLD, rows_BXLD, bias_BXL - log_counts_BXL, ids_BXL, weights_BXL)
    negatives, tokens = list(zip(*negatives, strict=True)), []
    for x, (id_S, place_S, log_count_S) in enumerate(negatives):
        rows_SD, bias_S = _negative_rows(table_RD, bias_R, place_S, hidden_BXLD.dtype)
        part = jnp.arange(len(bias_S)) + sharding.index_on(sharding.TENSOR) * len(bias_S)
        id_S, log_count_S = id_S[part], log_count_S[part]
        negatives[x] = (rows_SD, jnp.where(id_S < EMPTY, bias_S - log_count_S, -jnp.inf), id_S)
        tokens.append([a[:, x].reshape(chunks, -1, *a.shape[3:]) for a in tokens_BXL])
    totals, found = _in_chunks(tokens, negatives, gradients)
    nll_X = sharding.sum_over(jnp.stack([nll for nll, *_ in totals]), *sharding.BATCH_AXES)
    if not gradients:
        return nll_X, None
    hidden, pull = zip(*found, strict=True)
    _, rows, bias = zip(*totals, strict=True)
    shape = (len(hidden_BXLD), hidden_BXLD.shape[2])
    return nll_X, (
        jnp.stack([a.reshape(*shape, -1) for a in hidden], 1),
        jnp.stack([a.reshape(shape) for a in pull], 1),
        sharding.scatter_over(jnp.stack(rows), sharding.FSDP, dim=2)[None],
        jnp.stack(bias)[None],
    )


def _in_chunks(tokens, negatives, gradients: bool) -> Any:
    """`_chunk`'s totals and finds of each direction; `tokens` are (chunks, N, ...).

    Directions share the loop: two loops could not be told apart by devices that send each other
    something in them.
    """

    def chunk(totals, tokens):
        parts = zip(totals, tokens, negatives, strict=True)
        results = [_chunk(*part, gradients=gradients) for part in parts]
        totals, found = zip(*results, strict=True)
        return totals, found

    totals = tuple(
        (jnp.zeros(()), jnp.zeros(rows_SD.shape), jnp.zeros(id_S.shape))[: 3 if gradients else 1]
        for rows_SD, _, id_S in negatives
    )
    if len(tokens[0][0]) == 1:
        return chunk(totals, jax.tree.map(lambda a: a[0], tokens))
    return jax.lax.scan(chunk, totals, tokens)


def _chunk(totals, tokens, negatives, *, gradients: bool):
    """Adds one chunk's sum and the negatives' gradients; returns those of tokens and targets."""
    rows_SD, offset_S, id_S = negatives
    hidden_ND, rows_ND, offset_N, id_N, weight_N = tokens
    scores_NS = jnp.einsum("ND,SD->NS", hidden_ND, rows_SD, preferred_element_type=jnp.float32)
    is_hit_NS = id_S[None, :] == id_N[:, None]
    scores_NS = jnp.where(is_hit_NS, -jnp.inf, scores_NS + offset_S[None, :])
    right_N = jnp.einsum("ND,ND->N", hidden_ND, rows_ND, preferred_element_type=jnp.float32)
    right_N = right_N + offset_N
    top_N = jnp.maximum(right_N, sharding.max_over(scores_NS.max(-1), sharding.TENSOR))
    exp_NS = jnp.exp(scores_NS - top_N[:, None])
    exp_N = jnp.exp(right_N - top_N)
    norm_N = exp_N + sharding.sum_over(exp_NS.sum(-1), sharding.TENSOR)
    nll = totals[0] + jnp.dot(jnp.log(norm_N) + top_N - right_N, weight_N)
    if not gradients:
        return (nll,), None

    # Products are formed of exp(scores) before the division by their sum, which is of one token:
    # so the scores are read once.
    exp_NS, norm_N = jax.lax.optimization_barrier((exp_NS.astype(hidden_ND.dtype), norm_N))
    scale_N = weight_N / norm_N
    pull_N = exp_N * scale_N - weight_N
    sums_ND = jnp.einsum("NS,SD->ND", exp_NS, rows_SD, preferred_element_type=jnp.float32)
    sums_ND = sharding.sum_over(sums_ND, sharding.TENSOR)
    hidden_grad_ND = scale_N[:, None] * sums_ND + pull_N[:, None] * rows_ND
    ones_ND = jnp.concatenate([hidden_ND, jnp.ones((len(hidden_ND), 1), hidden_ND.dtype)], 1)
    scaled_ND = (scale_N[:, None] * ones_ND).astype(hidden_ND.dtype)
    rows_grad_SD = jnp.einsum("NS,ND->SD", exp_NS, scaled_ND, preferred_element_type=jnp.float32)
    bias_grad_S = totals[2] + rows_grad_SD[:, -1]
    rows_grad_SD = totals[1] + rows_grad_SD[:, :-1]
    return (nll, rows_grad_SD, bias_grad_S), (hidden_grad_ND.astype(hidden_ND.dtype), pull_N)


# --- rows of the table, of which each device has some rows and columns ----------------------------


def _here(places: jax.Array, rows: int) -> jax.Array:
    """Places on this device: those on others are below 0, or beyond its last."""
    return places - sharding.index_on(sharding.TENSOR) * rows


def _rows(table_RD: jax.Array, places: jax.Array, dtype: Any) -> jax.Array:
    """This device's part of some rows or biases: zeros where others have them."""
    found = table_RD.at[_here(places, len(table_RD))].get(
        mode="fill", fill_value=0, wrap_negative_indices=False
    )
    return found.astype(dtype)


def _negative_rows(table_RD, bias_R, place_S, dtype):
    """Rows and biases of this device's part of the negatives."""
    rows_SD = sharding.gather_over(_rows(table_RD, place_S, dtype), sharding.FSDP, dim=1)
    rows_SD = sharding.scatter_over(rows_SD, sharding.TENSOR, dim=0)
    bias_S = sharding.scatter_over(_rows(bias_R, place_S, jnp.float32), sharding.TENSOR, dim=0)
    return rows_SD, bias_S


def _target_rows(table_RD, bias_R, places_BXL, dtype):
    """Rows and biases of the targets of this device's tokens."""
    bias_BXL = sharding.sum_over(_rows(bias_R, places_BXL, jnp.float32), sharding.TENSOR)
    # Devices of an fsdp group have columns of the table and rows of the batch: they trade.
    places_BXL = sharding.gather_over(places_BXL, sharding.FSDP, dim=0)
    rows_BXLD = sharding.sum_over(_rows(table_RD, places_BXL, dtype), sharding.TENSOR)
    return sharding.exchange_over(rows_BXLD, sharding.FSDP, split=0, join=3), bias_BXL


def _table_gradients(
    scale_X, hidden_BXLD, places_XS, places_BXL, pull_BXL, rows_XSD, bias_XS, *, shape
):
    """This device's part of the gradients of the table and of its bias."""
    rows = shape[0] // sharding.axis_size(sharding.TENSOR)
    here_XS, here_BXL = _here(places_XS, rows), _here(places_BXL, rows)
    pull_BXL = pull_BXL * scale_X[None, :, None]
    bias_XS = sharding.gather_over(bias_XS[0] * scale_X[:, None], sharding.TENSOR, dim=1)
    rows_XSD = sharding.gather_over(rows_XSD[0] * scale_X[:, None, None], sharding.TENSOR, dim=1)
    rows_BXLD = pull_BXL[..., None] * hidden_BXLD.astype(jnp.float32)
    rows_BXLD = sharding.exchange_over(rows_BXLD, sharding.FSDP, split=3, join=0)
    far_BXL = sharding.gather_over(here_BXL, sharding.FSDP, dim=0)

    put = partial(_add, here_XS=here_XS)
    bias_R = put(jnp.zeros(rows), bias_XS, here_BXL, pull_BXL)
    table_RD = put(jnp.zeros((rows, rows_XSD.shape[-1])), rows_XSD, far_BXL, rows_BXLD)
    return (
        sharding.sum_over(table_RD, sharding.DATA),
        sharding.sum_over(bias_R, *sharding.BATCH_AXES),
    )


def _add(table_R, values_XS, here_BXL, values_BXL, here_XS):
    """The table with gradients added to the negatives' rows and to the targets'."""
    for here_S, values_S in zip(here_XS, values_XS, strict=True):
        table_R = table_R.at[here_S].add(
            values_S, mode="drop", wrap_negative_indices=False,
            indices_are_sorted=True, unique_indices=True,
        )  # fmt: skip
    return table_R.at[here_BXL].add(values_BXL, mode="drop", wrap_negative_indices=False)
