# SPDX-License-Identifier: Apache-2.0
"""Parallel streams of words in both directions, for models that carry their state (ELMo).

Row r of step s + 1 goes on where row r of step s stopped. A sentence w1 … wn is n + 1 positions:
forward, it reads <S> w1 … wn and predicts w1 … wn </S>; backward, it reads </S> wn … w1 and
predicts wn … w1 <S>. Sentences follow each other without padding, as in bilm-tf.

The text is addressed by word, ends of sentences counted: word c of a split is at one place of the
stream of tokens, and a sentence of n + 1 positions is n + 1 words in a row.

Shapes: B rows, X directions (0 forward, 1 backward), L words, C characters of a word, n words.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from lmjax.examples.permutation import mix, permute
from lmjax.store import Split
from lmjax.text_files import nearest
from lmjax.tokenizer import load_tokenizer
from lmjax.vocabulary import (
    BYTES,
    END,
    SPELT,
    START,
    UNKNOWN,
    WORD_LENGTH,
    VocabularyTokenizer,
    spelt_characters,
)

Backward = Literal["own", "same"]
Shuffle = Literal["sentences", "documents", "none"]

_CHUNK = 1 << 22
_BLOCK = 16
_ORDERS = 4  # both directions of two epochs


@dataclass(frozen=True)
class Streams:
    """`streams` rows that read the split side by side, `length` words a step.

    Example i is row i % streams at step i // streams, a pure function of (split, seed, i): each
    epoch cuts an order of its own into as many equal parts as there are rows, and drops what is
    left over, less than a step.

    backward: "own" gives the backward rows an order of their own, as the original; "same" the
        sentences of the forward rows.
    shuffle: what an epoch puts into a new order; "none" only begins elsewhere.
    held_out_length: words of a held-out row that count; `length` words before them warm it up.
    characters: of each word; 0 leaves them out.
    streams: rows; 0 is the run's batch.
    """

    length: int = 20
    backward: Backward = "own"
    shuffle: Shuffle = "sentences"
    held_out_length: int = 400
    characters: int = WORD_LENGTH
    streams: int = 0

    def __post_init__(self) -> None:
        least = {"length": 1, "held_out_length": 1, "characters": 0, "streams": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"data.examples.{name}={getattr(self, name)}: at least {low}")
        if self.characters in (1, 2):
            raise ValueError(
                f"data.examples.characters={self.characters}: 0 for none, or at least 3, for a"
                " word has two ends"
            )
        for name, allowed in {"backward": get_args(Backward), "shuffle": get_args(Shuffle)}.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(
                    f"data.examples.{name}={value!r}: one of {', '.join(allowed)};"
                    f" did you mean {nearest(str(value), allowed)!r}?"
                )

    def of_batch(self, rows: int) -> "Streams":
        """This maker for batches of so many rows. Errors: ValueError for another `streams`."""
        if self.streams not in (0, rows):
            raise ValueError(
                f"data.examples.streams={self.streams}: a batch has a row of each stream, so it"
                f" must be batch={rows} (or 0, which is the batch)"
            )
        return replace(self, streams=rows)

    def epoch(self, split: Split, seed: int = 0) -> int:
        """Examples in one pass over the split, with any seed. Errors: ValueError where it is too
        short."""
        return self._steps(_indexed(split)) * self.streams

    def arrays(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Of each array of a batch: its shape without the rows, and its type."""
        shape = (2, self.length)
        found: dict[str, Any] = {"weights_BXL": (shape, np.float32)}
        found |= dict.fromkeys(("words_BXL", "targets_BXL"), (shape, np.int32))
        if self.characters:
            found["spellings_BXL"] = shape, np.int32
            found["characters_BXLC"] = (*shape, self.characters), np.int16
        return found

    def train(self, split: Split, seed: int, examples: np.ndarray) -> dict[str, np.ndarray]:
        """The examples with these global indices (B,), as arrays (B, X, L, ...).

        words: what is read, int32, unknown words as <UNK>. targets: what comes next, int32.
        weights: 1, float32. Only with characters: characters: int16 (B, X, L, C); spellings: int32,
        the word, or for unknown ones a number past the words, which two of them share only if
        their characters are the same, and always if they are in the same row.
        """
        text = _indexed(split)
        return self._arrays(text, self._words(text, seed, examples), examples)

    def places(self, split: Split, seed: int, examples: np.ndarray) -> list[list[tuple[int, int]]]:
        """Of each row, the stretches [a, b) of the split's tokens that it reads, both directions.

        Words that follow each other in the text are one stretch.
        """
        text = _indexed(split)
        found = []
        for words_XL in self._words(text, seed, examples):
            row = set()
            for words in words_XL:
                cuts = np.flatnonzero(np.diff(words) != 1) + 1
                row |= {(int(run[0]), int(run[-1]) + 1) for run in np.split(words, cuts)}
            found.append([text.stretch(*run) for run in sorted(row)])
        return found

    def _words(self, text: "_Text", seed: int, examples: np.ndarray) -> np.ndarray:
        """The words (B, X, L) of these rows, by their number in the text."""
        per_epoch = self._steps(text)
        steps, rows = np.divmod(examples.astype(np.int64), self.streams)
        epochs, steps = np.divmod(steps, per_epoch)
        places = ((rows * per_epoch + steps) * self.length)[:, None] + np.arange(self.length)
        words = np.empty((len(examples), 2, self.length), np.int64)
        for epoch in np.unique(epochs):  # a batch touches one epoch, rarely two
            here = epochs == epoch
            for direction in range(2):
                order = text.order(self.shuffle, self._key(seed, int(epoch), direction))
                words[here, direction] = order.words(places[here])
        return words

    def held_out_count(self, split: Split) -> int:
        """Rows that score each word and end of a sentence once."""
        if not (total := _indexed(split).total):
            raise ValueError(f"the {split.name} split has no words")
        return -(-total // self.held_out_length)

    def held_out(self, split: Split, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows (B, X, length + held_out_length, ...) of the split in order, as `train` makes them.

        A row begins `length` words early, without weight, so that its state is warm wherever it
        begins: no number depends on the batch. What lies outside of the text is blank.
        """
        text = _indexed(split)
        column = np.arange(self.length + self.held_out_length)
        start = rows.astype(np.int64)[:, None] * self.held_out_length - self.length
        words = start + column
        real = (words >= 0) & (words < text.total)
        words = np.where(real, words, 0)
        batch = self._arrays(text, np.stack([words, words], 1), rows)
        scored = real & (column >= self.length)
        batch["weights_BXL"] *= scored[:, None]
        blank = np.broadcast_to(~real[:, None], batch["words_BXL"].shape)
        for name in ("words_BXL", "targets_BXL", "spellings_BXL", "characters_BXLC"):
            if name in batch:
                empty = text.table(self.characters)[START] if name == "characters_BXLC" else START
                batch[name][blank] = empty
        return batch

    def _steps(self, text: "_Text") -> int:
        assert self.streams, "Streams.of_batch says how many rows there are"
        if text.total < self.streams * self.length:
            raise ValueError(
                f"the {text.name} split has {text.total:,} words and ends of sentences, fewer than"
                f" the {self.streams * self.length:,} of one step ({self.streams:,} streams of"
                f" {self.length:,}); add text or make --batch or --data.examples.length smaller"
            )
        return text.total // (self.streams * self.length)

    def _key(self, seed: int, epoch: int, direction: int) -> int:
        return mix(seed, epoch, direction if self.backward == "own" else 0)

    def _arrays(self, text: "_Text", words_BXL, examples: np.ndarray) -> dict[str, np.ndarray]:
        inputs, targets = text.read(words_BXL)
        out = {
            "words_BXL": text.ids(inputs),
            "targets_BXL": text.ids(targets),
            "weights_BXL": np.ones(words_BXL.shape, np.float32),
        }
        if self.characters:
            characters, spellings = text.spell(inputs, self.characters, examples)
            out |= {"characters_BXLC": characters, "spellings_BXL": spellings}
        return out


def _indexed(split: Split) -> "_Text":
    if _Text not in split.memo:
        split.memo[_Text] = _Text(split)
    return split.memo[_Text]


class _Text:
    """Where the words and sentences of a split are.

    bounds: the word that each sentence begins with, and their number; documents: so for documents.
    What is read of the stream are places: of word c, or -1 - id for the marks <S> and </S>.
    """

    def __init__(self, split: Split):
        tokenizer = load_tokenizer(split.tokenizer) if split.tokenizer else None
        if not isinstance(tokenizer, VocabularyTokenizer):
            raise ValueError(
                "data.examples=Streams() needs whole words: set data.tokenizer=Vocabulary() in the"
                f" experiment file (this store has a {type(tokenizer).__name__})"
            )
        self.name, self.table = split.name, tokenizer.character_table
        self._words = split.vocab - SPELT
        self._tokens = np.asarray(split.tokens)
        self._index(split.starts)
        self._orders: OrderedDict[Any, _Order] = OrderedDict()

    def _index(self, starts: np.ndarray) -> None:
        bounds, blocks, documents, total = [np.zeros(1, np.int64)], [], [], 0
        for at in range(0, len(self._tokens), _CHUNK):
            tokens = self._tokens[at : at + _CHUNK]
            before = np.zeros(len(tokens) + 1, np.int64)
            np.cumsum(tokens < self._words + BYTES, out=before[1:])
            before += total
            total = int(before[-1])
            bounds.append(before[1:][tokens == END])
            blocks.append(before[:-1:_BLOCK].copy())
            low, high = np.searchsorted(starts, (at, at + len(tokens)))
            documents.append(before[starts[low:high] - at])
        self.bounds = np.concatenate(bounds)
        self.documents = np.concatenate([*documents, [total]])
        self.total, self._blocks = total, np.concatenate([*blocks, np.zeros(0, np.int64)])

    def order(self, shuffle: str, key: int) -> "_Order":
        """The text in the order of a key."""
        if (shuffle, key) not in self._orders:
            units = {"sentences": self.bounds, "documents": self.documents, "none": None}[shuffle]
            self._orders[shuffle, key] = _Order(units, self.total, key)
            while len(self._orders) > _ORDERS:
                self._orders.popitem(last=False)
        return self._orders[shuffle, key]

    def read(self, words_BXL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) as places; `words_BXL` counts on in the backward rows as well."""
        sentence = np.searchsorted(self.bounds, words_BXL, side="right") - 1
        first, end = self.bounds[sentence], self.bounds[sentence + 1] - 1
        mirrored = first + end - words_BXL  # the end for the first position
        inputs, targets = words_BXL - 1, words_BXL.copy()
        inputs[:, 1], targets[:, 1] = mirrored[:, 1], mirrored[:, 1] - 1
        begins, ends = words_BXL == first, words_BXL == end
        inputs, targets = self._places(inputs), self._places(targets)
        inputs[:, 0][begins[:, 0]] = -1 - START
        inputs[:, 1][begins[:, 1]] = -1 - END
        targets[:, 1][ends[:, 1]] = -1 - START
        return inputs, targets

    def _places(self, words: np.ndarray) -> np.ndarray:
        """Where in the stream these words begin; those outside are anywhere."""
        wanted = np.clip(words, 0, self.total - 1).reshape(-1)
        if self.total == len(self._tokens):
            return wanted.reshape(words.shape)
        block = np.searchsorted(self._blocks, wanted, side="right") - 1
        index = block[:, None] * _BLOCK + np.arange(_BLOCK)
        tokens = self._tokens.take(index, mode="clip")
        order = np.cumsum(tokens < self._words + BYTES, axis=1, dtype=np.int8)
        within = (order <= (wanted - self._blocks[block])[:, None]).sum(1)
        return (block * _BLOCK + within).reshape(words.shape)

    def stretch(self, first: int, end: int) -> tuple[int, int]:
        """The tokens of words first … end − 1, as a stretch of the stream."""
        begin, last = self._places(np.array([first, end - 1])).tolist()
        words = self._words + BYTES
        while last + 1 < len(self._tokens) and self._tokens[last + 1] >= words:
            last += 1
        return begin, last + 1

    def ids(self, places: np.ndarray) -> np.ndarray:
        """The words at these places, int32, unknown ones as <UNK>."""
        ids = self._tokens[np.maximum(places, 0)].astype(np.int32)
        ids[ids >= self._words] = UNKNOWN
        return np.where(places < 0, -1 - places, ids).astype(np.int32)

    def spell(
        self, places_BXL: np.ndarray, length: int, examples: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(characters (B, X, L, C) int16, spellings (B, X, L) int32) of these places."""
        spellings = self.ids(places_BXL)
        characters = self.table(length)[spellings]
        unknown = np.flatnonzero(spellings == UNKNOWN)
        if unknown.size:
            places_n = places_BXL.reshape(-1)[unknown]
            spelt = spelt_characters(self._tokens, places_n, self._words, length)
            characters.reshape(-1, length)[unknown] = spelt
            # Within a row only, for a row is the same whichever rows are made beside it.
            rows = (unknown // (places_BXL.shape[1] * places_BXL.shape[2])).astype(np.int32)
            keys = np.concatenate([rows[:, None].view(np.int16), spelt.astype(np.int16)], 1)
            same = np.ascontiguousarray(keys).view(f"V{2 * keys.shape[1]}")[:, 0]
            _, first, which = np.unique(same, return_index=True, return_inverse=True)
            number = self._words + self._numbers(places_BXL.shape, examples)
            spellings.reshape(-1)[unknown] = number.reshape(-1)[unknown[first]][which]
        return characters, spellings

    def _numbers(self, shape: tuple[int, ...], examples: np.ndarray) -> np.ndarray:
        """A number of its own for each position of a batch, whichever host makes the row."""
        a_row = shape[1] * shape[2]
        rows = (2**31 - 1 - self._words) // a_row
        return (examples.astype(np.int64) % rows)[:, None] * a_row + np.arange(a_row)


class _Order:
    """The units of a text in another order; without units, from another place on.

    units: the word each begins with, and the number of words.
    """

    def __init__(self, units: np.ndarray | None, total: int, key: int):
        self._units, self._total, self._key = units, total, key

    @cached_property
    def _ends(self) -> np.ndarray:
        """Words up to the end of each unit, in the order."""
        assert self._units is not None
        count = len(self._units) - 1
        sizes = np.empty(count, np.int64)
        for at in range(0, count, _CHUNK):
            units = permute(np.arange(at, min(at + _CHUNK, count)), count, self._key)
            sizes[at : at + _CHUNK] = self._units[units + 1] - self._units[units]
        return np.cumsum(sizes, out=sizes)

    def words(self, places: np.ndarray) -> np.ndarray:
        """The words at these places of the order, as places of the text."""
        if self._units is None:
            return (places + self._key % self._total) % self._total
        turn = np.searchsorted(self._ends, places, side="right")
        unit = permute(turn, len(self._units) - 1, self._key)
        return self._units[unit + 1] - (self._ends[turn] - places)
