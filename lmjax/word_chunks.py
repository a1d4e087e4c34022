# SPDX-License-Identifier: Apache-2.0
"""The full cross-entropy with the vocabulary in chunks, for very many words.

Every token's highest score and the sum of exponentials below it grow chunk by chunk; for the
gradients, the scores are computed a second time. A fourth matrix product, but the table and its
gradient are gone through once, where chunks of tokens would go through them every time.

Shapes: B batch, L length, D width, V vocabulary; of one device: N tokens, W words of a chunk.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmjax import sharding


def cross_entropies(
    hidden_BLD: jax.Array,
    table_VD: jax.Array,
    bias_V: jax.Array,
    targets_BL: jax.Array,
    rows: int,
    chunks: int,
) -> tuple[jax.Array, jax.Array]:
    """−log p(target) (B, L), and 1 where the target has the highest score, else 0.

    Args:
      rows: words; rows of the table from here on are padding.
      chunks: equal parts that each device's words go through in.
    """
    length = targets_BL.shape[1]
    hidden_BLD, targets_BL = sharding.pad_tokens(hidden_BLD), sharding.pad_tokens(targets_BL)
    found: Any = _cross_entropies(hidden_BLD, table_VD, bias_V, targets_BL, rows, chunks)
    nll_BL, hits_BL = found
    return nll_BL[:, :length], hits_BL[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropies(hidden_BLD, table_VD, bias_V, targets_BL, rows, chunks):
    return _forward(hidden_BLD, table_VD, bias_V, targets_BL, rows, chunks)[0]


def _forward(hidden_BLD, table_VD, bias_V, targets_BL, rows, chunks):
    given = (hidden_BLD, table_VD, bias_V, targets_BL)
    batch, table = sharding.TOKENS, sharding.spec("embedding", table_VD.shape)
    nll_BL, hits_BL, log_norm_BL = sharding.map_shards(
        partial(_score_words, rows=rows, chunks=chunks),
        (batch, table, P(table[0]), batch),
        (batch, batch, batch),
    )(*given)
    return (nll_BL, hits_BL), (*given, log_norm_BL)


def _backward(rows, chunks, saved, cotangents):
    batch, table = sharding.TOKENS, sharding.spec("embedding", saved[1].shape)
    gradients = sharding.map_shards(
        partial(_word_gradients, rows=rows, chunks=chunks),
        (batch, table, P(table[0]), batch, batch, batch),
        (batch, table, P(table[0])),
    )(*saved, cotangents[0])
    return (*gradients, None)


_cross_entropies.defvjp(_forward, _backward)


def _word_chunks(table_VD, bias_V, rows: int, chunks: int):
    """Rows, biases and ids of this device's words, (chunks, W, ...); padding's biases are −∞."""
    row_V = sharding.index_on(sharding.TENSOR) * len(bias_V) + jnp.arange(len(bias_V))
    parts = table_VD, jnp.where(row_V < rows, bias_V, -jnp.inf), row_V
    return [x.reshape(chunks, -1, *x.shape[1:]) for x in parts]


def _word_scores(hidden_ND, table_WD, bias_W):
    """Scores (N, W), and the rows (W, D) whole and in the dtype of the states."""
    table_WD = sharding.gather_over(table_WD.astype(hidden_ND.dtype), sharding.FSDP, dim=1)
    scores_NW = jnp.einsum("ND,WD->NW", hidden_ND, table_WD, preferred_element_type=jnp.float32)
    return scores_NW + bias_W[None, :], table_WD


def _score_words(hidden_BLD, table_VD, bias_V, targets_BL, *, rows: int, chunks: int):
    hidden_ND, target_N = hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), targets_BL.reshape(-1)

    def add(totals, words):
        top_N, norm_N, target_score_N = totals
        scores_NW, _ = _word_scores(hidden_ND, *words[:2])
        new_N = jnp.maximum(top_N, scores_NW.max(-1))
        norm_N = norm_N * jnp.exp(top_N - new_N) + jnp.exp(scores_NW - new_N[:, None]).sum(-1)
        is_target_NW = words[2][None, :] == target_N[:, None]
        return (new_N, norm_N, target_score_N + jnp.where(is_target_NW, scores_NW, 0).sum(-1)), None

    zero_N = jnp.zeros(target_N.shape)
    begin = (zero_N + jnp.finfo(jnp.float32).min, zero_N, zero_N)
    totals, _ = jax.lax.scan(add, begin, _word_chunks(table_VD, bias_V, rows, chunks))
    top_N, norm_N, target_score_N = totals
    highest_N = sharding.max_over(top_N, sharding.TENSOR)
    norm_N = sharding.sum_over(norm_N * jnp.exp(top_N - highest_N), sharding.TENSOR)
    target_score_N = sharding.sum_over(target_score_N, sharding.TENSOR)
    log_norm_N = jnp.log(norm_N) + highest_N
    hits_N = (target_score_N >= highest_N).astype(jnp.float32)
    found = (log_norm_N - target_score_N, hits_N, log_norm_N)
    return tuple(x.reshape(targets_BL.shape) for x in found)


def _word_gradients(
    hidden_BLD, table_VD, bias_V, targets_BL, log_norm_BL, scale_BL, *, rows: int, chunks: int
):
    hidden_ND = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
    target_N, log_norm_N, scale_N = (x.reshape(-1) for x in (targets_BL, log_norm_BL, scale_BL))

    def add(hidden_grad_ND, words):
        scores_NW, table_WD = _word_scores(hidden_ND, *words[:2])
        is_target_NW = words[2][None, :] == target_N[:, None]
        grad_NW = (jnp.exp(scores_NW - log_norm_N[:, None]) - is_target_NW) * scale_N[:, None]
        bias_W, grad_NW = grad_NW.sum(0), grad_NW.astype(hidden_ND.dtype)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        table_WD, hidden_grad_ND = (
            product("NW,ND->WD", grad_NW, hidden_ND),
            hidden_grad_ND + product("NW,WD->ND", grad_NW, table_WD),
        )
        return hidden_grad_ND, (sharding.scatter_over(table_WD, sharding.FSDP, dim=1), bias_W)

    words = _word_chunks(table_VD, bias_V, rows, chunks)
    hidden_grad_ND, (table, bias) = jax.lax.scan(add, jnp.zeros(hidden_ND.shape), words)
    hidden_grad_ND = sharding.sum_over(hidden_grad_ND, sharding.TENSOR).astype(hidden_BLD.dtype)
    table_grad_VD = sharding.sum_over(table.reshape(table_VD.shape), *sharding.COPIES)
    bias_grad_V = sharding.sum_over(bias.reshape(-1), *sharding.TOKEN_AXES)
    return hidden_grad_ND.reshape(hidden_BLD.shape), table_grad_VD, bias_grad_V
