# SPDX-License-Identifier: Apache-2.0
"""A vector for each word of a text, from a model that reads a sentence in both directions (ELMo).

A text is one sentence to the model: it reads <S>, the words and </S>, and the two marks are left
out of what is written. Texts of any length go through it a window at a time, the state of each
direction handed on, so that a window changes nothing.

Shapes: B rows, X directions (0 forward, 1 backward), L words of a window, C characters of a word,
D width of a direction, N layers and one, K of them that are asked for, T words of one text.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import batches, sharding
from lmjax.checkpoint import load_params
from lmjax.models.elmo import ELMo
from lmjax.run import Run
from lmjax.step import abstract_params, initial_carry
from lmjax.vectors import Vectors, writer
from lmjax.vocabulary import BYTES, MARKS, UNKNOWN, characters_of, spelt_characters
from lmjax.workdir import run_tokenizer

_ROWS = 32
_AHEAD = 256  # texts that are sorted by length together
_WINDOWS = (16, 32, 64, 128)
_START, _END = range(2)  # rows of a table of spellings, before those of words

# Arrays (N, B, X, L, D) to the (K, B, X, L, D) that are asked for.
Choice = Callable[[jax.Array], jax.Array]


def gives_words(model: Any) -> bool:
    """Whether a model's vectors are of words, and come from here."""
    return isinstance(model, ELMo)


def embed_words(
    run: Run,
    workdir: Path,
    texts: Iterable[str],
    target: Path | None,
    layer: str = "top",
    mix: str = "",
    stateful: int = 0,
    blanks: bool = False,
) -> int:
    """Writes the vectors of the words of texts to a .npz, .jsonl or .hdf5 file, or prints them.

    Args:
      layer: "all", "top", or a number: 0 is the input layer, each direction of it the same; n is
        layer n, forward then backward; negative ones count from the last.
      mix: instead of a layer, weights of all of them, and what their sum is multiplied by:
        "0.2,0.5,0.3:1.5".
      stateful: 0 begins each text with a state of zeros, so that its vectors depend on nothing
        else. n reads the texts in n rows, text i in row i % n, each on the state that the one
        before it left, as bilm-tf does.
      blanks: words are what stands between blanks, whatever the run's tokeniser does.

    Returns:
      How many texts there were.

    Raises:
      ValueError: no such layer, a mix of another number of layers, no text, no checkpoint.
    """
    choice = _choice(layer, mix, run.model.depth)
    cut, ids = _words_of(run, workdir, blanks)
    with sharding.use(sharding.Layout().mesh()):
        _, params = load_params(workdir, abstract_params(run.model))
        net = _Net(run.model, params, choice, ids, run.data.examples.characters, stateful or _ROWS)
        numbered = ((number, text, cut(text)) for number, text in enumerate(texts))
        read = _carried if stateful else _apart
        count = 0
        with writer(target, single=False) as write:
            for (number, text, words), states_KTD in read(net, numbered):
                states_TKD = states_KTD.transpose(1, 0, 2)
                vectors = states_TKD if layer == "all" and not mix else states_TKD[:, 0]
                write(Vectors(number, text, vectors, words))
                count += 1
            if not count:  # before the file gets its name
                raise ValueError("there is no text to embed")
    return count


def _choice(layer: str, mix: str, depth: int) -> Choice:
    """What is asked for, of the input layer and `depth` more."""
    if mix:
        weights, gamma = _weights(mix, depth + 1)
        # Not a product of matrices, which accelerators round.
        return lambda states: gamma * _sum(w * h for w, h in zip(weights, states, strict=True))
    if layer == "all":
        return lambda states: states
    try:
        n = depth if layer == "top" else int(layer)
        if not -depth - 1 <= n <= depth:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--layer={layer}: all, top, or from 0 (the input layer) to {depth}, or -1 (the last)"
        ) from None
    n %= depth + 1
    return lambda states: states[n : n + 1]


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    """(1, ...)."""
    return functools.reduce(jnp.add, parts)[None]


def _weights(mix: str, layers: int) -> tuple[np.ndarray, np.float32]:
    weights, _, gamma = mix.partition(":")
    try:
        numbers = np.array([float(w) for w in weights.split(",")], np.float32)
        scale = np.float32(gamma or 1)
        if len(numbers) != layers or not (np.isfinite(numbers).all() and np.isfinite(scale)):
            raise ValueError
    except ValueError:
        wanted = ",".join(f"w{n}" for n in range(layers))
        raise ValueError(
            f"--mix={mix}: {layers} numbers are needed: {wanted} or {wanted}:gamma"
        ) from None
    return numbers, scale


def _words_of(
    run: Run, workdir: Path, blanks: bool
) -> tuple[Callable[[str], list[str]], dict[str, int]]:
    """What cuts a text into words, and the ids of words if the model reads these."""
    spells = run.model.input == "characters"
    if spells and (blanks or not (workdir / "tokenizer").is_dir()):
        return str.split, {}
    tokenizer: Any = run_tokenizer(workdir)
    ids = {} if spells else {word: i for i, word in enumerate(tokenizer.spellings)}
    if blanks:
        return str.split, ids
    return lambda text: list(itertools.chain.from_iterable(tokenizer.sentences(text))), ids


Text = tuple[int, str, list[str]]


def _apart(net: "_Net", texts: Iterator[Text]) -> Iterator[tuple[Text, np.ndarray]]:
    """Each text and its states (K, T, D), from a state of zeros; rows of like length together."""
    while group := list(itertools.islice(texts, _AHEAD)):
        order = sorted(range(len(group)), key=lambda at: len(group[at][2]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), net.rows):
            places = order[start : start + net.rows]
            states, _ = net([group[at][2] for at in places], net.zeros())
            found.update(zip(places, states, strict=True))
        for at, text in enumerate(group):
            yield text, found.pop(at)


def _carried(net: "_Net", texts: Iterator[Text]) -> Iterator[tuple[Text, np.ndarray]]:
    """Each text and its states (K, T, D), rows going on from text to text."""
    carry = net.zeros()
    while group := list(itertools.islice(texts, net.rows)):
        states, carry = net([words for _, _, words in group], carry)
        yield from zip(group, states, strict=True)


@dataclass(frozen=True)
class _Spelt:
    """Sentences as rows of a table of spellings, <S> and </S> around each.

    rows: a list of int32[T + 2]. ids: int32[table]. characters: int16[table, C], unless the model
    reads words.
    """

    rows: list[np.ndarray]
    ids: np.ndarray
    characters: np.ndarray | None

    def window(self, start: int, length: int, size: int) -> batches.Arrays:
        """Both directions of `length` words from `start` on, of `size` rows; 0 beyond the ends."""
        table_BXL = np.zeros((size, 2, length), np.int32)
        lengths_B = np.zeros(size, np.int32)
        for b, row in enumerate(self.rows):
            both = row[start : start + length], row[::-1][start : start + length]
            lengths_B[b] = len(both[0])
            table_BXL[b, :, : lengths_B[b]] = both
        batch = {"lengths_B": lengths_B, "words_BXL": self.ids[table_BXL]}
        if self.characters is None:
            return batch
        spelt = {"spellings_BXL": table_BXL, "characters_BXLC": self.characters[table_BXL]}
        return batch | spelt


class _Net:
    """A model with its parameters, which reads up to `rows` sentences at a time."""

    def __init__(
        self, model: ELMo, params: Any, choice: Choice, ids: dict[str, int], length: int, rows: int
    ) -> None:
        """ids: of words, where the model reads words. length: characters of a word."""
        self.rows, self._ids, self._length = rows, ids, length
        self._params, self._choice, self._model = params, choice, model
        devices = sharding.axis_size(*sharding.BATCH_AXES)
        self._size = -(-rows // devices) * devices
        self._apply = jax.jit(self._states)

    def _states(self, params: Any, batch: Any, carry: Any) -> tuple[jax.Array, Any]:
        outputs: Any = self._model.apply({"params": params}, batch, carry=carry, states=True)
        states_KBXLD = self._choice(outputs.states_NBLD.astype(jnp.float32))
        return states_KBXLD, jax.tree.map(sharding.split_batch, outputs.cache)

    def zeros(self) -> Any:
        """The state before any word."""
        rows: Any = jax.tree.map(np.asarray, initial_carry(self._model, self._size))
        return batches.place(rows, self._size, batches.WHOLE)

    def __call__(self, sentences: list[list[str]], carry: Any) -> tuple[list[np.ndarray], Any]:
        """States (K, T, D), D of both directions, of each sentence, and the state behind it."""
        spelt = self._spelt(sentences)
        longest = max(map(len, spelt.rows))
        length = next((n for n in _WINDOWS if n >= longest), _WINDOWS[-1])
        parts = []
        for start in range(0, longest, length):
            batch = batches.place(
                spelt.window(start, length, self._size), self._size, batches.WHOLE
            )
            states_KBXLD, carry = self._apply(self._params, batch, carry)
            parts.append(np.asarray(states_KBXLD)[:, : len(spelt.rows)])
        states_KBXLD = np.concatenate(parts, 3) if len(parts) > 1 else parts[0]
        return [
            # The backward row holds the words from last to first.
            np.concatenate(
                [states_KBXLD[:, b, 0, 1 : n - 1], states_KBXLD[:, b, 1, n - 2 : 0 : -1]], -1
            )
            for b, n in enumerate(map(len, spelt.rows))
        ], carry

    def _spelt(self, sentences: list[list[str]]) -> _Spelt:
        found: dict[str, int] = {}
        for word in itertools.chain.from_iterable(sentences):
            found.setdefault(word, len(MARKS) + len(found))
        rows = [np.array([_START, *map(found.__getitem__, s), _END], np.int32) for s in sentences]
        # A word that is written as a mark is none: marks stand around a sentence only.
        known = [UNKNOWN if word in MARKS else self._ids.get(word, UNKNOWN) for word in found]
        ids = np.array([*range(len(MARKS)), *known], np.int32)
        if self._model.input == "words":
            return _Spelt(rows, ids, None)
        marks = characters_of(MARKS, self._length)
        return _Spelt(rows, ids, np.concatenate([marks, _characters(list(found), self._length)]))


def _characters(words: list[str], length: int) -> np.ndarray:
    """int16[words, C]: the characters of words, each by its bytes."""
    spelt = [word.encode() for word in words]
    sizes = np.array([len(word) for word in spelt], np.int64)
    starts = np.cumsum(sizes) - sizes
    stream = np.frombuffer(b"".join(spelt), np.uint8).astype(np.int32) + BYTES
    stream[starts] -= BYTES
    return spelt_characters(stream, starts, 0, length) if words else np.zeros((0, length), np.int16)
