# SPDX-License-Identifier: Apache-2.0
"""Text from a decoder: sampling in chunks from a key-value cache, and beam search.

The prompt is read in one call and tokens are drawn in a scan on the device, so the host only sees
whole chunks. Under a mesh every device that has rows of the batch computes a copy of the sequence.

Shapes: B rows, L length, D width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import sharding
from lmjax.layers import padded
from lmjax.models.gpt import GPT
from lmjax.tokenizer import Tokenizer

CHUNK = 32
_SHORTEST_READ = 32
_TORN = "\ufffd"
_TORN_MOST = 3  # a character of UTF-8 has four bytes, so at most three wait for another


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature first, then top-k, then top-p of what is left.

    temperature: above 1 flatter, below 1 sharper; 0 is greedy.
    top_k: only the k likeliest; 0 is all. top_p: only the fewest that together have probability p.
    greedy: the likeliest token always. seed: the same one gives the same text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: allowed are numbers from 0 on")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: allowed are 0 (all tokens) and above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: allowed are numbers above 0 and up to 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: allowed are 0 to {2**32 - 1}")


def stream(
    model: GPT,
    params: Any,
    prompt_ids: np.ndarray,
    sampling: Sampling,
    max_tokens: int,
    vocab: int,
    eot: int | None = None,
    chunk: int = CHUNK,
) -> Iterator[np.ndarray]:
    """Continues a prompt; yields the new ids as they come, int32, up to `chunk` at a time.

    An empty prompt starts from `eot`, the id before every document, or from id 0 where there is
    none. When the model's context is full, the last half of a context is read again as a new
    prompt; a longer prompt begins there too. The token at place t of the whole sequence is drawn
    with a key of (seed, t), so neither `chunk` nor `max_tokens` changes it.

    Args:
      vocab: ids of the tokenizer; the model's others are never drawn.
      eot: ends the text, and is not yielded itself; None goes on to `max_tokens`.

    Raises:
      ValueError: a prompt id, `vocab`, `eot` or `max_tokens` is out of range.
    """
    if max_tokens < 0 or chunk < 1:
        raise ValueError(f"max_tokens={max_tokens}, chunk={chunk}: at least 0 and 1 are allowed")
    _check_vocab(model, vocab)
    if eot is not None and not 0 <= eot < vocab:
        raise ValueError(f"eot={eot}: allowed are 0 to {vocab - 1}")
    ids = _started(_checked(prompt_ids, vocab), eot)
    return _stream(_cached(model), params, ids, sampling, max_tokens, vocab, eot, chunk)


def _stream(
    model: GPT,
    params: Any,
    ids: np.ndarray,
    sampling: Sampling,
    left: int,
    vocab: int,
    eot: int | None,
    chunk: int,
) -> Iterator[np.ndarray]:
    half = max(1, model.context // 2)
    window = ids if len(ids) <= model.context else ids[-half:]
    key = jax.random.key(sampling.seed)
    how = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.greedy)
    draw = partial(_draw_chunk, model, params, sampling=how, vocab=vocab, chunk=min(chunk, left))
    while left:
        scores_BV, cache = _read(model, params, _rows(window, 1, model.context), len(window))
        room = model.context - len(window) + 1
        while room and left:
            # Beyond `room` and `left` a chunk is waste, but of the shape that is compiled.
            tokens, scores_BV, cache = draw(cache, scores_BV, key, len(ids))
            new = np.asarray(tokens)[: min(room, left)]
            ends = np.flatnonzero(new == eot) if eot is not None else []
            if len(ends):
                new = new[: ends[0]]
            if new.size:
                yield new
            if len(ends):
                return
            ids = np.concatenate([ids, new])
            room, left = room - len(new), left - len(new)
        window = ids[-half:]


def generate_text(
    model: GPT,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    max_tokens: int,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Continues a text; yields the new text piece by piece, without the prompt.

    A piece never ends inside a character. The text ends at the end of a document, after
    `max_tokens`, or before the stop string that is complete first.

    Raises:
      ValueError: a stop string is empty, or what `stream` refuses.
    """
    _check_stop(stop)
    prompt_ids = tokenizer.encode(prompt)
    chunks = stream(model, params, prompt_ids, sampling, max_tokens, tokenizer.vocab, tokenizer.eot)
    return _until_stop(_texts(chunks, tokenizer, prompt_ids), stop)


def beam_text(
    model: GPT,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    beams: int,
    max_tokens: int,
    stop: Sequence[str] = (),
) -> str:
    """The best continuation that beam search finds, up to the end of a document or a stop string.

    Raises:
      ValueError: a stop string is empty, or what `beam_search` refuses.
    """
    _check_stop(stop)
    prompt_ids = tokenizer.encode(prompt)
    ids, eos = _started(prompt_ids, tokenizer.eot), tokenizer.eot
    found, _ = beam_search(model, params, ids, beams, max_tokens, eos, vocab=tokenizer.vocab)
    new = found[0, len(ids) :]
    return "".join(_until_stop(_texts(iter([new]), tokenizer, prompt_ids), stop))


def _check_stop(stop: Sequence[str]) -> None:
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop={stop!r}: a list of strings that are not empty is allowed")


def _texts(chunks: Iterator[np.ndarray], tokenizer: Tokenizer, ids: np.ndarray) -> Iterator[str]:
    """Text of chunks of ids after `ids`, cut where characters end."""
    # Decoded together with the prompt: a decoder may write a first word in another way.
    done, text = len(tokenizer.decode(ids)), ""
    for chunk in chunks:
        ids = np.concatenate([ids, chunk])
        text = tokenizer.decode(ids)
        end = len(text)
        while end > max(done, len(text) - _TORN_MOST) and text[end - 1] == _TORN:
            end -= 1
        if end > done:
            yield text[done:end]
            done = end
    if text[done:]:
        yield text[done:]


def _until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces up to the stop string that is complete first."""
    kept = ""
    for piece in pieces:
        kept += piece
        found = [(at + len(s), at) for s in stop if (at := kept.find(s)) >= 0]
        if found:
            if before := kept[: min(found)[1]]:
                yield before
            return
        # What may be the beginning of a stop string waits for the next piece.
        waits = [n for s in stop for n in range(1, len(s)) if kept.endswith(s[:n])]
        end = len(kept) - max(waits, default=0)
        if end:
            yield kept[:end]
        kept = kept[end:]
    if kept:
        yield kept


def beam_search(
    model: GPT,
    params: Any,
    prompt_ids: np.ndarray,
    beams: int,
    max_tokens: int,
    eos: int | None = None,
    length_penalty: float = 1.0,
    pad: int | None = None,
    vocab: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `beams` best continuations that beam search finds, best first.

    The score of a sequence is its log-probability over (new tokens)**length_penalty. The search
    ends when the best open beam, scored at its present length, cannot enter the finished ones
    (`early_stopping=False` of Hugging Face, whose results these are).

    Args:
      eos: the id that finishes a sequence, kept at its end; without it all run to `max_tokens`.
      pad: fills what is shorter than the longest; `eos` if not given.
      vocab: ids of the tokenizer; the model's others are never found. All of the model's if None.

    Returns:
      Sequences with their prompt (beams, length), int32, and scores (beams,), float32.

    Raises:
      ValueError: the prompt is empty, the sequence exceeds the context, `vocab` exceeds the
        model's, or beams exceed vocab / 2.
    """
    vocab = model.vocab if vocab is None else vocab
    ids = _checked(prompt_ids, vocab)
    _check_search(model, ids, beams, max_tokens, vocab)
    model, rows = _cached(model), _row_count(beams)
    scores_BV, cache = _read(model, params, _rows(ids, beams, model.context), len(ids))
    open_scores = np.full(beams, -1e9, np.float32)
    open_scores[0] = 0  # all rows hold the prompt: only one of them may have children
    new = np.zeros((beams, 0), np.int32)
    finished: list[tuple[np.float32, np.ndarray]] = []
    for count in range(1, max_tokens + 1):
        found = _best_children(scores_BV, open_scores, vocab)
        values, parents, tokens = (np.asarray(x) for x in found)
        children = np.concatenate([new[parents], tokens[:, None]], axis=1)
        ends = (tokens == eos) if count < max_tokens else np.full(len(tokens), True)
        norm = np.float32(count**length_penalty)
        # Of twice as many children as beams, the second half only replaces those that end.
        finished += [(values[i] / norm, children[i]) for i in range(beams) if ends[i]]
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        alive = np.flatnonzero(~ends)[:beams]
        hopeless = len(finished) == beams and (
            not len(alive) or values[alive[0]] / norm <= finished[-1][0]
        )
        if hopeless:
            break
        open_scores, new = values[alive], children[alive]
        chosen = np.resize(parents[alive], rows), np.resize(tokens[alive], rows)
        scores_BV, cache = _feed(model, params, cache, *chosen)
    longest = max(len(sequence) for _, sequence in finished)
    fill = pad if pad is not None else -1 if eos is None else eos
    sequences = np.full((beams, len(ids) + longest), fill, np.int32)
    for row, (_, sequence) in zip(sequences, finished, strict=True):
        row[: len(ids) + len(sequence)] = np.concatenate([ids, sequence])
    return sequences, np.array([score for score, _ in finished], np.float32)


def _check_search(model: GPT, ids: np.ndarray, beams: int, max_tokens: int, vocab: int) -> None:
    _check_vocab(model, vocab)
    if not ids.size or max_tokens < 1:
        raise ValueError(f"{len(ids)} prompt tokens, max_tokens={max_tokens}: at least 1 is needed")
    if not 1 <= beams <= vocab // 2:
        raise ValueError(f"beams={beams}: allowed are 1 to vocab / 2 = {vocab // 2}")
    if len(ids) + max_tokens > model.context + 1:
        raise ValueError(
            f"{len(ids)} prompt tokens and max_tokens={max_tokens} exceed the context of "
            f"{model.context}; max_tokens up to {model.context + 1 - len(ids)} is allowed"
        )


def _check_vocab(model: GPT, vocab: int) -> None:
    if not 1 <= vocab <= model.vocab:
        raise ValueError(f"vocab={vocab}: the model has {model.vocab} tokens, 1 to that is allowed")


def _started(ids: np.ndarray, eot: int | None) -> np.ndarray:
    """The prompt, or what an empty one starts from."""
    return ids if ids.size else np.array([eot or 0], np.int32)


def _checked(ids: np.ndarray, vocab: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"a prompt is a row of ids, not {ids.dtype}{list(ids.shape)}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
        raise ValueError(
            f"prompt ids run from {ids.min()} to {ids.max()}; allowed: 0 to {vocab - 1}"
        )
    return ids.astype(np.int32)


def _cached(model: GPT) -> GPT:
    """The model with the attention that reads a cache, whatever it was trained with."""
    return model.clone(kernel="auto")


def _row_count(rows: int) -> int:
    return padded(rows, sharding.axis_size(*sharding.BATCH_AXES))


def _rows(ids: np.ndarray, rows: int, context: int) -> np.ndarray:
    """The prompt as rows for every device, (B, L); L is one of few lengths, so few compilations."""
    length = min(context, max(_SHORTEST_READ, 1 << (len(ids) - 1).bit_length()))
    tokens_BL = np.zeros((_row_count(rows), length), np.int32)
    tokens_BL[:, : len(ids)] = ids
    return tokens_BL


@partial(jax.jit, static_argnames="model")
def _read(model: GPT, params: Any, tokens_BL: jax.Array, length: int) -> tuple[jax.Array, Any]:
    """Scores (B, V) of the token after the first `length`, and the cache of those."""
    cache = model.empty_cache(tokens_BL.shape[0], model.context)
    outputs: Any = model.apply({"params": params}, {"tokens_BL": tokens_BL}, cache=cache)
    last_B1D = jax.lax.dynamic_slice_in_dim(outputs.hidden_BLD, length - 1, 1, axis=1)
    # The padding's keys and values lie behind the offset: unseen, and overwritten in time.
    return outputs.readout.logits(last_B1D)[:, 0], outputs.cache | {"offset": jnp.int32(length)}


def _next(model: GPT, params: Any, cache: Any, tokens_B: jax.Array) -> tuple[jax.Array, Any]:
    outputs: Any = model.apply({"params": params}, {"tokens_BL": tokens_B[:, None]}, cache=cache)
    return outputs.readout.logits(outputs.hidden_BLD)[:, 0], outputs.cache


@partial(
    jax.jit, static_argnames=("model", "sampling", "vocab", "chunk"), donate_argnames=("cache",)
)
def _draw_chunk(
    model: GPT,
    params: Any,
    cache: Any,
    scores_BV: jax.Array,
    key: jax.Array,
    place: int,
    *,
    sampling: Sampling,
    vocab: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array, Any]:
    """Draws the tokens at `place`, place + 1, …: (chunk,), then the next scores and the cache."""

    def step(carry: Any, place: jax.Array) -> Any:
        scores_BV, cache = carry
        token = draw(scores_BV[0, :vocab], sampling, jax.random.fold_in(key, place))
        tokens_B = jnp.full(scores_BV.shape[0], token, jnp.int32)
        return _next(model, params, cache, tokens_B), token

    places = place + jnp.arange(chunk)
    (scores_BV, cache), tokens = jax.lax.scan(step, (scores_BV, cache), places)
    return sharding.constrain(tokens, None), scores_BV, cache


def draw(scores_V: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """One id of float32 scores (V,)."""
    if sampling.greedy or sampling.temperature == 0:
        return scores_V.argmax().astype(jnp.int32)
    scores_V = (scores_V - scores_V.max()) / sampling.temperature
    count = min(sampling.top_k or len(scores_V), len(scores_V))
    if count < len(scores_V) or sampling.top_p < 1:
        best, ids = jax.lax.top_k(scores_V, count)
        probs = jax.nn.softmax(best)
        best = jnp.where(jnp.cumsum(probs) - probs < sampling.top_p, best, -jnp.inf)
        # Back in the order of ids: every choice of k and p then draws with the same noise.
        scores_V = jnp.full_like(scores_V, -jnp.inf).at[ids].set(best)
    return jax.random.categorical(key, scores_V).astype(jnp.int32)


@partial(jax.jit, static_argnames="vocab")
def _best_children(scores_BV: jax.Array, open_scores: jax.Array, vocab: int) -> Any:
    """(scores, parents, tokens) of the 2 · beams best sequences that are one token longer."""
    beams = len(open_scores)
    log_probs = jax.nn.log_softmax(scores_BV[:beams, :vocab]) + open_scores[:, None]
    values, flat = jax.lax.top_k(sharding.constrain(log_probs.ravel(), None), 2 * beams)
    return tuple(sharding.constrain(x, None) for x in (values, flat // vocab, flat % vocab))


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _feed(model: GPT, params: Any, cache: Any, parents_B: jax.Array, tokens_B: jax.Array) -> Any:
    """Scores and cache after one more token on each row's chosen parent."""
    layers = jax.tree.map(lambda x_NBHSK: x_NBHSK[:, parents_B], cache["layers"])
    return _next(model, params, cache | {"layers": layers}, tokens_B)
