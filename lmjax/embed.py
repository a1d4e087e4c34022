# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts, words or tokens from any layer of the newest checkpoint, one text at a time.

Shapes: B rows, L length, D width, T vectors of one text.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from lmjax import batches, sharding
from lmjax.checkpoint import load_params
from lmjax.run import Run
from lmjax.step import abstract_params
from lmjax.tokenizer import Tokenizer, load_tokenizer
from lmjax.vectors import Vectors, writer

Pool = Literal["mean", "first", "words", "tokens"]
_ROWS = 32
_SHORTEST = 16
_AHEAD = 256  # texts that are sorted by length together


@dataclass(frozen=True)
class Piece:
    """A stretch of a text that fits into the model."""

    text: int
    ids: np.ndarray


def embed(
    run: Run,
    workdir: Path,
    texts: Iterable[str],
    target: Path | None,
    layer: int = -1,
    pool: Pool = "mean",
) -> int:
    """Writes the vectors of texts to a .npz or .jsonl file, or as JSON lines to the output.

    Texts longer than the model's context are cut into stretches that do not see each other.

    Args:
      layer: 0 is the embeddings, n the output of layer n; negative counts from the last.
      pool: "mean" of a text's tokens (control tokens left out), "first" the first control token's
        ([CLS]), "words" the mean of each word's tokens, "tokens" all.

    Returns:
      How many texts there were.

    Raises:
      ValueError: no such layer or pool, no text, no checkpoint or no tokeniser in `workdir`.
    """
    if pool not in get_args(Pool):
        raise ValueError(f"--pool={pool}: one of {', '.join(get_args(Pool))}")
    depth = run.model.depth
    if not -depth - 1 <= layer <= depth:
        raise ValueError(f"--layer={layer}: from 0 (the embeddings) to {depth}, or -1 (the last)")
    if not (workdir / "tokenizer").is_dir():
        raise ValueError(f"{workdir} has no tokeniser: train there, or import one with the weights")
    tokenizer = load_tokenizer(workdir / "tokenizer")
    if pool == "first" and "cls" not in tokenizer.controls:
        raise ValueError("--pool=first: this tokeniser puts no control token before a text")
    with sharding.use(sharding.Layout().mesh()):
        _, params = load_params(workdir, abstract_params(run.model))
        states = _states(run.model, params, layer % (depth + 1))
        with writer(target, single=pool in ("mean", "first")) as write:
            count = 0
            for vectors in _vectors(run, tokenizer, texts, states, pool):
                write(vectors)
                count += 1
    if not count:
        raise ValueError("there is no text to embed")
    return count


def _states(model: Any, params: Any, layer: int) -> Callable[[batches.Arrays], np.ndarray]:
    """Batch of whole rows to one layer's states (B, L, D) in float32."""

    @jax.jit
    def apply(params: Any, batch: Any) -> jax.Array:
        outputs: Any = model.apply({"params": params}, batch, states=layer < model.depth)
        last = layer == model.depth
        states_BLD = outputs.hidden_BLD if last else outputs.states_NBLD[layer]
        return states_BLD.astype(np.float32)

    def states(batch: batches.Arrays) -> np.ndarray:
        size = len(batch["tokens_BL"])
        return np.asarray(apply(params, batches.place(batch, size, (0, 1, 1))))

    return states


def _vectors(
    run: Run,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    states: Callable[[batches.Arrays], np.ndarray],
    pool: Pool,
) -> Iterator[Vectors]:
    """The vectors of each text, in order."""
    numbered = enumerate(texts)
    while group := list(itertools.islice(numbered, _AHEAD)):
        encoded = tokenizer.encode_batch([text.encode() for _, text in group])
        stretches = [
            Piece(at, ids[first : first + _room(run, tokenizer)])
            for at, ids in enumerate(encoded)
            for first in range(0, max(len(ids), 1), _room(run, tokenizer))
        ]
        found: dict[int, np.ndarray] = {}
        order = sorted(range(len(stretches)), key=lambda i: len(stretches[i].ids))
        for first in range(0, len(order), _ROWS):
            rows = order[first : first + _ROWS]
            hidden_BLD = states(_batch(tokenizer, [stretches[i].ids for i in rows]))
            for row, i in enumerate(rows):
                found[i] = hidden_BLD[row, : len(stretches[i].ids) + _before(tokenizer)]
        for at, (number, text) in enumerate(group):
            mine = [found[i] for i, piece in enumerate(stretches) if piece.text == at]
            yield _pooled(tokenizer, number, text, encoded[at], mine, pool)


def _before(tokenizer: Tokenizer) -> int:
    """Control tokens before a text: [CLS], or a decoder's end of text."""
    return int("cls" in tokenizer.controls or tokenizer.eot is not None)


def _room(run: Run, tokenizer: Tokenizer) -> int:
    """Tokens of a text that fit into the model beside the control tokens."""
    room = run.model.context - _before(tokenizer) - ("sep" in tokenizer.controls)
    if room < 1:
        raise ValueError(f"model.context={run.model.context} holds no text")
    return room


def _batch(tokenizer: Tokenizer, rows: list[np.ndarray]) -> batches.Arrays:
    """Rows of ids between control tokens, padded to one of few lengths and to whole devices."""
    controls = tokenizer.controls
    lead = [controls["cls"]] if "cls" in controls else [] if (e := tokenizer.eot) is None else [e]
    tail = [controls["sep"]] if "sep" in controls else []
    longest = max(len(ids) for ids in rows) + len(lead) + len(tail)
    length = _SHORTEST
    while length < longest:
        length *= 2
    devices = sharding.axis_size(*sharding.BATCH_AXES)
    size = -(-_ROWS // devices) * devices
    tokens_BL = np.full((size, length), controls.get("pad", 0), np.int32)
    segments_BL = np.zeros((size, length), np.int32)
    for row, ids in enumerate(rows):
        whole = [*lead, *ids, *tail]
        tokens_BL[row, : len(whole)] = whole
        segments_BL[row, : len(whole)] = 1
    return {"tokens_BL": tokens_BL, "segments_BL": segments_BL}


def _pooled(
    tokenizer: Tokenizer,
    number: int,
    text: str,
    ids: np.ndarray,
    stretches: list[np.ndarray],
    pool: Pool,
) -> Vectors:
    before = _before(tokenizer)
    if pool == "first":
        return Vectors(number, text, stretches[0][:1], [])
    states_TD = np.concatenate([states[before:] for states in stretches])
    if pool == "mean":
        # A text without a token has the vector of its control token.
        mean_D = states_TD.mean(0) if len(ids) else stretches[0][: before or 1].mean(0)
        return Vectors(number, text, mean_D[None], [])
    pieces = [tokenizer.piece(int(i)) for i in ids]
    if pool == "tokens":
        return Vectors(number, text, states_TD, pieces)
    starts = tokenizer.word_starts[ids]
    first = np.flatnonzero(starts | (np.arange(len(ids)) == 0))
    sizes = np.diff(np.append(first, len(ids)))
    words = (
        [tokenizer.decode(part).strip() for part in np.split(ids, first[1:])] if len(ids) else []
    )
    means_TD = np.add.reduceat(states_TD, first, axis=0) / sizes[:, None] if len(ids) else states_TD
    return Vectors(number, text, means_TD, words)
