# SPDX-License-Identifier: Apache-2.0
"""Pseudo-likelihood of a masked language model: each token scored with itself alone masked.

log PLL = Σ log p(token | the rest of its window) (Salazar et al. 2020). It is no probability of the
text: a model that sees both sides is not to be compared with one that sees the left side only.

Shapes: B rows, L length, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import batches
from lmjax.examples.permutation import mix, permute
from lmjax.step import make_eval_step
from lmjax.store import Split


@dataclass(frozen=True)
class Pseudo:
    """Mean of −log p in nats over the scored tokens, and what stands behind it.

    tokens: of the split. scored: how many of them. error: half of the 95 % interval of the mean,
    0 where all were scored.
    """

    loss: float
    tokens: int
    scored: int
    error: float


def pseudo_likelihood(
    model: Any, params: Any, split: Split, length: int, rows: int, limit: int
) -> Pseudo:
    """Scores up to `limit` tokens of a split: all of them, or a sample without replacement.

    Args:
      length: of a window, its first and last control token included.
      rows: windows a batch; a multiple of the devices that share a batch.
    """
    starts, ends = windows(split, length - 2)
    before = np.concatenate([[0], np.cumsum(ends - starts)])
    total = int(before[-1])
    scored = min(limit, total)
    if not scored:
        raise ValueError(f"the {split.name} split has no tokens to score one by one")
    picked = np.arange(scored)
    if scored < total:
        picked = np.sort(permute(picked, total, mix(0, total)))
    window = np.searchsorted(before, picked, side="right") - 1
    place = picked - before[window]

    def make(indices: np.ndarray) -> batches.Arrays:
        at = np.minimum(indices, scored - 1)
        bounds = (starts[window[at]], ends[window[at]])
        return masked_rows(split, *bounds, place[at], length)

    step = jax.jit(make_eval_step(model, _row_losses))
    plan = batches.Plan(rows, length)
    parts = batches.batches((make,), plan, 0, -(-scored // rows))
    losses = [jax.device_get(step(params, batch)) for batch in parts]
    nll = np.concatenate(losses)[:scored].astype(np.float64)
    spread = nll.std(ddof=1) * math.sqrt((1 - scored / total) / scored) if scored > 1 else 0.0
    return Pseudo(float(nll.mean()), total, scored, 1.96 * float(spread))


def windows(split: Split, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of stretches of whole sentences of one document, of up to `room` tokens each.

    A longer sentence is cut. Together they hold every token of every sentence once.
    """
    assert split.sentences is not None
    bounds = list(_greedy(split, room))
    starts, ends = np.array(bounds, np.int64).reshape(-1, 2).T
    return starts, ends


def _greedy(split: Split, room: int) -> Iterator[tuple[int, int]]:
    sentences: Any = split.sentences
    for document in range(split.n_documents):
        lo, hi = split.starts[document], split.starts[document + 1]
        first, last = np.searchsorted(sentences, [lo, hi])
        edges = [*sentences[first:last].tolist(), int(hi)]
        if first == last:
            continue
        start = edges[0]
        for here, after in zip(edges, edges[1:], strict=False):
            if after - start > room and here > start:
                yield start, here
                start = here
            while after - start > room:
                yield start, start + room
                start += room
        if start < edges[-1]:
            yield start, edges[-1]


def masked_rows(
    split: Split, starts: np.ndarray, ends: np.ndarray, place: np.ndarray, length: int
) -> batches.Arrays:
    """Rows (B, L) of the windows between control tokens, each with the token at `place` masked."""
    controls, size = split.controls, (ends - starts)[:, None]
    column = np.arange(length)[None]
    inside = (column >= 1) & (column <= size)
    index = np.where(inside, starts[:, None] + column - 1, 0)
    tokens = np.where(inside, split.tokens[index].astype(np.int32), controls.get("pad", 0))
    tokens[:, 0] = controls["cls"]
    tokens[column == size + 1] = controls["sep"]
    targets = np.take_along_axis(tokens, place[:, None] + 1, axis=1)
    np.put_along_axis(tokens, place[:, None] + 1, controls["mask"], axis=1)
    return {
        "tokens_BL": tokens.astype(np.int32),
        "segments_BL": (column <= size + 1).astype(np.int32),
        "masked_BP": (place[:, None] + 1).astype(np.int32),
        "wanted_BP": targets.astype(np.int32),
    }


def _row_losses(outputs: Any, batch: Any) -> Any:
    """−log p of each row's masked token, (B,)."""
    scores_BPV = outputs.readout.logits(outputs.heads["masked_BPE"])
    log_probs_BPV = jax.nn.log_softmax(scores_BPV, axis=-1)
    return -jnp.take_along_axis(log_probs_BPV, batch["wanted_BP"][..., None], -1)[:, 0, 0]
