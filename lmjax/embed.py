# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts, words or tokens from any layer of the newest checkpoint, one text at a time.

Shapes: B rows, L length, D width, T vectors of one text.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from lmjax import batches, sharding
from lmjax.checkpoint import load_params
from lmjax.run import Run
from lmjax.step import abstract_params
from lmjax.tokenizer import Tokenizer
from lmjax.vectors import Vectors, writer
from lmjax.workdir import run_tokenizer

Pool = Literal["mean", "first", "words", "tokens"]
_ROWS = 32
_SHORTEST = 16
_AHEAD = 256  # texts that are sorted by length together


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
    tokenizer = run_tokenizer(workdir)
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
            if not count:  # before the file gets its name
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
        return np.asarray(apply(params, batches.place(batch, size, batches.WHOLE)))

    return states


def _vectors(
    run: Run,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    states: Callable[[batches.Arrays], np.ndarray],
    pool: Pool,
) -> Iterator[Vectors]:
    """The vectors of each text, in order."""
    context, (lead, tail) = run.model.context, _around(tokenizer)
    room = context - len(lead) - len(tail)
    if room < 1:
        raise ValueError(f"model.context={context} holds no text")
    numbered = enumerate(texts)
    while group := list(itertools.islice(numbered, _AHEAD)):
        encoded = tokenizer.encode_batch([text.encode() for _, text in group])
        # Stretches that fit into the model, by text and first token, and each one's states.
        rows = {
            (at, first): ids[first : first + room]
            for at, ids in enumerate(encoded)
            for first in _firsts(ids, room)
        }
        order = sorted(rows, key=lambda place: len(rows[place]))
        hidden: dict[tuple[int, int], np.ndarray] = {}
        for start in range(0, len(order), _ROWS):
            places = order[start : start + _ROWS]
            whole = [[*lead, *rows[place], *tail] for place in places]
            hidden_BLD = states(_batch(whole, context, tokenizer.controls.get("pad", 0)))
            for row, place in enumerate(places):
                hidden[place] = hidden_BLD[row, : len(lead) + len(rows[place])]
        for at, ((number, text), ids) in enumerate(zip(group, encoded, strict=True)):
            mine = [hidden[at, first] for first in _firsts(ids, room)]
            yield _pooled(tokenizer, number, text, ids, mine, len(lead), pool)


def _firsts(ids: np.ndarray, room: int) -> range:
    """Where the stretches of a text begin; one without tokens has one, too."""
    return range(0, max(len(ids), 1), room)


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Control tokens before a text, [CLS] or a decoder's end of text, and behind it."""
    controls = tokenizer.controls
    first = controls.get("cls", tokenizer.eot)
    return [] if first is None else [first], [controls["sep"]] if "sep" in controls else []


def _batch(rows: list[list[int]], context: int, pad: int) -> batches.Arrays:
    """Rows of ids, padded to one of few lengths and to whole devices."""
    length, longest = _SHORTEST, max(map(len, rows))
    while length < longest:
        length *= 2
    length = min(length, context)  # which need not be a power of two: ERNIE's is 513
    devices = sharding.axis_size(*sharding.BATCH_AXES)
    size = -(-_ROWS // devices) * devices
    tokens_BL = np.full((size, length), pad, np.int32)
    segments_BL = np.zeros((size, length), np.int32)
    for row, ids in enumerate(rows):
        tokens_BL[row, : len(ids)] = ids
        segments_BL[row, : len(ids)] = 1
    return {"tokens_BL": tokens_BL, "segments_BL": segments_BL}


def _pooled(
    tokenizer: Tokenizer,
    number: int,
    text: str,
    ids: np.ndarray,
    stretches: list[np.ndarray],
    before: int,
    pool: Pool,
) -> Vectors:
    """What is asked for of a text's states, `before` of them a control's in each stretch."""
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
    if not len(ids):
        return Vectors(number, text, states_TD, [])
    starts = tokenizer.word_starts[ids]
    starts[0] = True
    first = np.flatnonzero(starts)
    sizes = np.diff(np.append(first, len(ids)))
    words = [tokenizer.decode(part).strip() for part in np.split(ids, first[1:])]
    return Vectors(number, text, np.add.reduceat(states_TD, first, axis=0) / sizes[:, None], words)
