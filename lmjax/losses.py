# SPDX-License-Identifier: Apache-2.0
"""Losses: `loss(outputs, batch) → {name: (sum, weight)}`, sums and weights, never means.

Sums are added over microbatches, devices and hosts first and divided last, so that padding,
gradient accumulation and the number of devices leave the value unchanged. What is minimised is
`total` of the means: the sum of those that are called loss or …_loss; the others only report. A
loss that weighs them in another way has a method `total` of its own.

Shapes: B batch, X directions, L length, D width, V vocabulary; P scored tokens and C sequences of a
row, T classes; in a shard and chunk: N tokens, W words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmjax import cpu, sharding
from lmjax.layers import Batch, Outputs, Readout
from lmjax.sampled_loss import sampled_cross_entropy
from lmjax.word_chunks import cross_entropies

Sums = dict[str, tuple[jax.Array, jax.Array]]

# float32 scores that one device holds at a time: small enough for a CPU's caches; on accelerators
# large, because every chunk adds to the table's gradient in memory.
_CHUNK_BYTES = {"cpu": 2**22, "gpu": 2**30, "tpu": 2**29}

# Words of one device from which the vocabulary is cut instead of the tokens: so few tokens' scores
# would make a chunk that reading the table and adding to its gradient took longer than the scores.
_LARGE = 2**17


def next_token(outputs: Outputs, batch: Batch) -> Sums:
    """Next-token cross-entropy in nats, and the share of targets that score highest."""
    weights_BL = batch["weights_BL"]
    nll, hits = cross_entropy(outputs.hidden_BLD, outputs.readout, batch["targets_BL"], weights_BL)
    weight = weights_BL.sum()
    return {"loss": (nll, weight), "accuracy": (jax.lax.stop_gradient(hits), weight)}


def masked_token(outputs: Outputs, batch: Batch) -> Sums:
    """Cross-entropy of the original tokens at `masked_BP`, in nats, and the share of hits."""
    weights_BP = batch["weights_BP"]
    scored_BPE = _head(outputs, "masked_BPE", "no masked-token head (model.masked)")
    nll, hits = cross_entropy(scored_BPE, outputs.readout, batch["targets_BP"], weights_BP)
    weight = weights_BP.sum()
    hits = jax.lax.stop_gradient(hits)
    return {"masked_loss": (nll, weight), "masked_accuracy": (hits, weight)}


def pair(outputs: Outputs, batch: Batch) -> Sums:
    """Cross-entropy of each pair's label (next sentence, or order), and the share of hits."""
    scores_BCT = _head(outputs, "pair_BCT", "no head for pairs (model.pair), or its examples none")
    nll, hits, weight = classes(scores_BCT, batch["pairs_BC"], batch["pair_weights_BC"])
    return {"pair_loss": (nll, weight), "pair_accuracy": (hits, weight)}


def masked_token_and_pair(outputs: Outputs, batch: Batch) -> Sums:
    """BERT's objective: masked tokens, and sentence pairs (Devlin et al. 2018)."""
    return {**masked_token(outputs, batch), **pair(outputs, batch)}


def _head(outputs: Outputs, name: str, lacking: str) -> jax.Array:
    if name not in outputs.heads:
        raise ValueError(f"this loss reads {name}, but the model has {lacking}; take another loss")
    return outputs.heads[name]


def classes(
    scores_BCT: jax.Array, labels_BC: jax.Array, weights_BC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sums of −log softmax(scores)[label] and of hits, and the weight; few classes."""
    log_probs_BCT = jax.nn.log_softmax(scores_BCT, axis=-1)
    nll_BC = -jnp.take_along_axis(log_probs_BCT, labels_BC[..., None], axis=-1)[..., 0]
    hits_BC = (scores_BCT.argmax(-1) == labels_BC).astype(jnp.float32)
    return (nll_BC * weights_BC).sum(), (hits_BC * weights_BC).sum(), weights_BC.sum()


@dataclass(frozen=True)
class ReplacedToken:
    """ELECTRA's objective: masked tokens for the generator and, `weight` times, replaced tokens
    for the discriminator, on every token that is not padding (Clark et al. 2020).
    """

    weight: float = 50.0

    def __call__(self, outputs: Outputs, batch: Batch) -> Sums:
        """Cross-entropies in nats, and the shares of hits; a score above 0 says replaced."""
        scores_BL, replaced_BL = outputs.heads["replaced_BL"], outputs.heads["is_replaced_BL"]
        real_BL = (batch["segments_BL"] > 0).astype(jnp.float32)
        wrong_BL = replaced_BL.astype(jnp.float32)
        nll_BL = jax.nn.softplus(scores_BL) - wrong_BL * scores_BL
        hits_BL = ((scores_BL > 0) == (replaced_BL > 0)).astype(jnp.float32)
        count = real_BL.sum()
        return {
            **masked_token(outputs, batch),
            "replaced_loss": ((nll_BL * real_BL).sum(), count),
            "replaced_accuracy": ((hits_BL * real_BL).sum(), count),
            "replaced_share": ((wrong_BL * real_BL).sum(), count),
        }

    def total(self, means: Mapping[str, Any]) -> Any:
        """What is minimised, of the means."""
        return means["masked_loss"] + self.weight * means["replaced_loss"]


@dataclass(frozen=True)
class Bidirectional:
    """ELMo's objective: each direction's cross-entropy of its next words (Peters et al. 2018).

    A readout with negatives, as in training, makes it a sampled softmax.
    """

    def __call__(self, outputs: Outputs, batch: Batch) -> Sums:
        """Cross-entropies in nats of hidden states (B, X, L, D), in the order of processing."""
        hidden_BXLD, weights_BXL = outputs.hidden_BLD, batch["weights_BXL"]
        nll_X = _by_direction(hidden_BXLD, outputs.readout, batch["targets_BXL"], weights_BXL)
        weight_X = weights_BXL.sum((0, 2))
        names = ("forward_loss", "backward_loss")
        return {name: (nll_X[x], weight_X[x]) for x, name in enumerate(names)}

    def total(self, means: Mapping[str, Any]) -> Any:
        """What is minimised, of the means: their mean."""
        return 0.5 * (means["forward_loss"] + means["backward_loss"])


bidirectional = Bidirectional()


def _by_direction(hidden_BXLD, readout: Readout, targets_BXL, weights_BXL) -> jax.Array:
    """Σ weight · −log p(target) of each direction (X,)."""
    batch, directions, length, width = hidden_BXLD.shape
    if readout.negatives is not None:
        scores = readout.negatives.ids_XS.shape[1] // sharding.axis_size(sharding.TENSOR)
        chunks = _chunks(length, _rows_per_device(batch) * scores * 4, _chunk_bytes())
        return sampled_cross_entropy(hidden_BXLD, readout, targets_BXL, weights_BXL, chunks)
    # As rows of one batch, so that a large table is gone through once for all directions.
    if _words_per_device(readout) >= _LARGE:
        flat = (batch, directions * length)
        hidden_BLD, targets_BL = hidden_BXLD.reshape(*flat, width), targets_BXL.reshape(flat)
        nll_BL, _ = _cut_words(hidden_BLD, readout, targets_BL, _chunk_bytes())
        return (nll_BL.reshape(weights_BXL.shape) * weights_BXL).sum((0, 2))
    nll = [jnp.zeros(())]
    for x in range(directions):
        hidden_BLD = cpu.after(hidden_BXLD[:, x], jnp.full((batch, 1), nll[-1]))
        nll.append(cross_entropy(hidden_BLD, readout, targets_BXL[:, x], weights_BXL[:, x])[0])
    return jnp.stack(nll[1:])


def total(means: Mapping[str, Any]) -> Any:
    """The sum of the means that are losses: what is minimised, unless the loss says otherwise."""
    losses = [value for name, value in means.items() if f"_{name}".endswith("_loss")]
    assert losses, f"none of {', '.join(means)} is called a loss"
    return sum(losses)


def cross_entropy(
    hidden_BLD: jax.Array,
    readout: Readout,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk_bytes: int | None = None,
    cut: Literal["tokens", "words"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of the negative log-likelihood and of hits, without ever holding all scores.

    Over `tensor`, each device scores its own part of the vocabulary. Either tokens go through in
    chunks whose gradients are formed at once, in the forward pass, so a chunk's (N, V) scores are
    all that exists; or words do, and (N, W) scores of all tokens: these are computed again for
    the gradients, but the table and its gradient are gone through once.

    Args:
      chunk_bytes: float32 bytes of scores that a device may hold; default by platform.
      cut: what is cut into chunks; default: words if they are very many.

    Returns:
      Σ weight · −log p(target) and Σ weight · [target has the highest score], float32 scalars.
    """
    chunk_bytes = chunk_bytes or _chunk_bytes()
    words = _words_per_device(readout)
    weights_BL = weights_BL.astype(jnp.float32)
    if cut == "words" or (cut is None and words >= _LARGE):
        nll_BL, hits_BL = _cut_words(hidden_BLD, readout, targets_BL, chunk_bytes)
        return (nll_BL * weights_BL).sum(), (hits_BL * weights_BL).sum()
    hidden_BLD, targets_BL, weights_BL = map(
        sharding.pad_tokens, (hidden_BLD, targets_BL, weights_BL)
    )
    rows, length = _rows_per_device(hidden_BLD.shape[0]), _tokens_per_device(hidden_BLD.shape[1])
    chunks = _chunks(length, rows * words * 4, chunk_bytes)
    targets = (targets_BL, weights_BL)
    table_VD, bias_V = readout.table_VD, _bias(readout)
    return _cross_entropy(hidden_BLD, table_VD, bias_V, targets, readout.rows, chunks)


def _chunk_bytes() -> int:
    return _CHUNK_BYTES.get(sharding.platform(), 2**28)


def _rows_per_device(batch: int) -> int:
    return batch // sharding.axis_size(*sharding.BATCH_AXES)


def _tokens_per_device(length: int) -> int:
    return -(-length // sharding.axis_size(sharding.SEQUENCE))


def _words_per_device(readout: Readout) -> int:
    return readout.table_VD.shape[0] // sharding.axis_size(sharding.TENSOR)


def _bias(readout: Readout) -> jax.Array:
    if readout.bias_V is not None:
        return readout.bias_V
    return jnp.zeros(readout.table_VD.shape[:1], jnp.float32)


def _cut_words(hidden_BLD, readout: Readout, targets_BL, chunk_bytes: int) -> Any:
    """−log p(target) (B, L), and whether the target has the highest score."""
    tokens = _rows_per_device(targets_BL.shape[0]) * _tokens_per_device(targets_BL.shape[1])
    chunks = _chunks(_words_per_device(readout), tokens * 4, chunk_bytes)
    given = (hidden_BLD, readout.table_VD, _bias(readout), targets_BL)
    found: Any = cross_entropies(*given, readout.rows, chunks)
    return found


def _chunks(length: int, bytes_per_position: int, budget: int) -> int:
    """Fewest chunks of equal length that keep within the budget."""
    wanted = max(1, math.ceil(length * bytes_per_position / budget))
    return next(n for n in range(min(wanted, length), length + 1) if length % n == 0)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden_BLD, table_VD, bias_V, targets, rows, chunks):
    sums, _ = _in_shards(hidden_BLD, table_VD, bias_V, targets, rows, chunks, gradients=False)
    return sums


def _forward(hidden_BLD, table_VD, bias_V, targets, rows, chunks):
    return _in_shards(hidden_BLD, table_VD, bias_V, targets, rows, chunks, gradients=True)


def _backward(rows, chunks, saved, cotangents):
    scale, _ = cotangents  # hits are counted, not differentiated
    hidden_BLD, shards_VD, bias_V = saved
    spec = sharding.spec("embedding", shards_VD.shape[1:])

    # Each copy of the table has its own gradient until here: summed beside that of the embedding,
    # the compiler sends both as one.
    def add_up(shard_VD, scale):
        return sharding.sum_over(shard_VD[0] * scale, *sharding.COPIES)

    copies_spec = P(sharding.COPIES, *spec)
    table_VD = sharding.map_shards(add_up, (copies_spec, P()), spec)(shards_VD, scale)
    return hidden_BLD * scale.astype(hidden_BLD.dtype), table_VD, bias_V * scale, None


_cross_entropy.defvjp(_forward, _backward)


def _in_shards(hidden_BLD, table_VD, bias_V, targets, rows, chunks, gradients: bool):
    """Runs `_local` on every device's tokens and part of the table, and adds up."""
    tokens_spec, table_spec = sharding.TOKENS, sharding.spec("embedding", table_VD.shape)
    vocab_spec = P(table_spec[0])
    grad_specs = (tokens_spec, P(sharding.COPIES, *table_spec), vocab_spec) if gradients else None
    local = partial(_local, rows=rows, chunks=chunks, gradients=gradients)
    return sharding.map_shards(
        local,
        (tokens_spec, table_spec, vocab_spec, (tokens_spec, tokens_spec)),
        ((P(), P()), grad_specs),
    )(hidden_BLD, table_VD, bias_V, targets)


def _local(hidden_BLD, table_VD, bias_V, targets, *, rows: int, chunks: int, gradients: bool):
    table_VD = sharding.gather_over(table_VD.astype(hidden_BLD.dtype), sharding.FSDP, dim=1)
    vocab, width = table_VD.shape
    row_V = sharding.index_on(sharding.TENSOR) * vocab + jnp.arange(vocab)
    bias_V = jnp.where(row_V < rows, bias_V, -jnp.inf)
    chunked = partial(_chunk, table_VD=table_VD, bias_V=bias_V, row_V=row_V, gradients=gradients)

    if chunks == 1:
        inputs = (hidden_BLD, *targets)
        totals, hidden_grad = chunked(_totals(vocab, width, gradients), inputs)
    else:
        split = partial(_split, chunks=chunks)
        inputs = (split(hidden_BLD), *map(split, targets))
        hidden_grad: Any
        totals, hidden_grad = jax.lax.scan(chunked, _totals(vocab, width, gradients), inputs)
    sums = sharding.sum_over((totals.nll, totals.hits), *sharding.TOKEN_AXES)
    if not gradients:
        return sums, None
    if chunks > 1:
        hidden_grad = jnp.moveaxis(hidden_grad, 0, 1).reshape(hidden_BLD.shape)
    table_grad = sharding.scatter_over(totals.table_VD, sharding.FSDP, dim=1)
    bias_grad = sharding.sum_over(totals.bias_V, *sharding.TOKEN_AXES)
    return sums, (hidden_grad, table_grad[None], bias_grad)


class _Totals(NamedTuple):
    """Running sums over chunks; the gradients are None in evaluation."""

    nll: jax.Array
    hits: jax.Array
    table_VD: Any
    bias_V: Any


def _totals(vocab: int, width: int, gradients: bool) -> _Totals:
    zero = jnp.zeros((), jnp.float32)
    grads = (jnp.zeros((vocab, width)), jnp.zeros(vocab)) if gradients else (None, None)
    return _Totals(zero, zero, *grads)


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """(B, L, ...) to (chunks, B, L / chunks, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)


def _chunk(totals: _Totals, inputs, *, table_VD, bias_V, row_V, gradients: bool):
    """Adds one chunk's sums and gradients to the totals; returns its hidden gradient."""
    hidden_BLD, targets_BL, weights_BL = inputs
    hidden_ND = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
    target_N, weight_N = targets_BL.reshape(-1), weights_BL.reshape(-1)

    scores_NV = jnp.einsum("ND,VD->NV", hidden_ND, table_VD, preferred_element_type=jnp.float32)
    scores_NV = scores_NV + bias_V[None, :]
    top_N = sharding.max_over(scores_NV.max(-1), sharding.TENSOR)
    exp_NV = jnp.exp(scores_NV - top_N[:, None])
    norm_N = sharding.sum_over(exp_NV.sum(-1), sharding.TENSOR)
    is_target_NV = row_V[None, :] == target_N[:, None]
    target_score_N = jnp.where(is_target_NV, scores_NV, 0).sum(-1)
    target_score_N = sharding.sum_over(target_score_N, sharding.TENSOR)
    nll_N = jnp.log(norm_N) + top_N - target_score_N
    nll = totals.nll + jnp.dot(nll_N, weight_N)
    hits = totals.hits + jnp.dot((target_score_N >= top_N).astype(jnp.float32), weight_N)
    if not gradients:
        return totals._replace(nll=nll, hits=hits), None

    grad_NV = (exp_NV / norm_N[:, None] - is_target_NV) * weight_N[:, None]
    bias_grad_V = totals.bias_V + grad_NV.sum(0)
    grad_NV = grad_NV.astype(hidden_ND.dtype)
    # Each device of a tensor group knows its own words' share of the hidden gradient.
    hidden_grad_ND = sharding.sum_over(jnp.einsum("NV,VD->ND", grad_NV, table_VD), sharding.TENSOR)
    table_grad_VD = totals.table_VD + jnp.einsum(
        "NV,ND->VD", grad_NV, hidden_ND, preferred_element_type=jnp.float32
    )
    totals = _Totals(nll, hits, table_grad_VD, bias_grad_V)
    return totals, hidden_grad_ND.reshape(hidden_BLD.shape)
