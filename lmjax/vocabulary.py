# SPDX-License-Identifier: Apache-2.0
"""Whole words as tokens, and the characters that they are spelt with (ELMo, arXiv 1802.05365).

A document is stored as its sentences, the words of each and then `</S>`. Words outside of the
vocabulary are stored spelt, an id for each byte of UTF-8, so no characters are lost: a model that
reads characters sees them, one that predicts words counts them all as `<UNK>`.

Shapes: n words, C characters of a word.
"""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lmjax.sentences import split_sentences
from lmjax.text_files import nearest
from lmjax.tokenizer_base import (
    Tokenizer,
    is_chinese,
    load_tokenizer,
    read_bytes,
    write_tokenizer,
)

Cut = Literal["blanks", "words", "chinese"]

MARKS = ("<S>", "</S>", "<UNK>")
START, END, UNKNOWN = range(3)
# Ids past the words: the first byte of an unknown word, and its further ones.
BYTES = 256
SPELT = 2 * BYTES

# Characters are bytes of UTF-8, and these.
SENTENCE_STARTS, SENTENCE_ENDS, WORD_STARTS, WORD_ENDS, PADDING = range(256, 261)
CHARACTERS = 261
WORD_LENGTH = 50

_FILE = "vocab.txt"
_LINE_ENDS = re.compile(r"\r\n?|\n")
_BLANK = re.compile(r"\s")
_LONGEST = 1000  # characters of a word that is counted: what has no blanks is spelt instead
_AT_ONCE = 1 << 16  # characters of a sentence, or rows of a table, that are worked on at a time


@dataclass(frozen=True)
class Vocabulary:
    """Words in a file as bilm-tf's: <S>, </S>, <UNK>, then the words, the most frequent first.

    size: at most so many lines, the three marks included; ties go by code point, and words of more
        than 1,000 characters are none of them.
    path: such a file to take instead; its marks may stand anywhere.
    split: what a word is. "blanks": the text is tokenised, a sentence a line, blanks between the
        words. "words": raw text, cut into sentences, then into words, numbers and signs.
        "chinese": as "words", and each Chinese character is a word.
    """

    size: int = 793_471
    path: str = ""
    split: Cut = "blanks"

    def __post_init__(self) -> None:
        if self.size <= len(MARKS):
            raise ValueError(
                f"data.tokenizer.size={self.size}: must be at least {len(MARKS) + 1}, for"
                f" {', '.join(MARKS)} are counted"
            )
        if self.split not in (cuts := get_args(Cut)):
            near = nearest(str(self.split), cuts)
            raise ValueError(
                f"data.tokenizer.split={self.split!r}: one of {', '.join(cuts)};"
                f" did you mean {near!r}?"
            )

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Counts (or copies) the words into `directory`."""
        if self.path:
            words = list(read_vocabulary(Path(self.path).expanduser()))
        else:
            words = [*MARKS, *_frequent(train_texts, self.split, self.size - len(MARKS))]
        write_tokenizer(
            directory, {_FILE: "\n".join([*words, ""]).encode()},
            kind="vocabulary", vocab=len(words) + SPELT, eot=None, unknown=None, lossless=False,
            split=self.split,
        )  # fmt: skip

    def load(self, directory: Path) -> Tokenizer:
        """Opens what `build` wrote."""
        return load_tokenizer(directory)


class VocabularyTokenizer(Tokenizer, kinds=("vocabulary",)):
    """Words of a vocabulary, the others spelt.

    words: lines of the vocabulary, which are the rows of a softmax; `vocab` also counts the ids
    that spell. split: what a word is, as in `Vocabulary`.
    """

    def __init__(self, directory: Path, description: dict[str, Any]):
        super().__init__(directory, description)
        self.words = self.vocab - SPELT
        self.split: Cut = description["split"]
        self._content = read_bytes(directory / _FILE)
        self._tables: dict[int, np.ndarray] = {}

    @cached_property
    def spellings(self) -> list[str]:
        """The words by id."""
        return self._content.decode().split("\n")[:-1]

    @cached_property
    def _ids(self) -> dict[str, int]:
        # A text that spells a mark means its letters: marks come from the structure only.
        return {word: i for i, word in enumerate(self.spellings) if i >= len(MARKS)}

    def character_table(self, length: int = WORD_LENGTH) -> np.ndarray:
        """Character ids of every word of the vocabulary, int16[words, C]; made once."""
        if length not in self._tables:
            content = np.frombuffer(self._content, np.uint8)
            ends = np.flatnonzero(content == ord("\n"))
            starts = np.concatenate([[0], ends[:-1] + 1])
            self._tables[length] = table = _framed(content, starts, ends - starts, length)
            table[[START, END]] = _of_marks(length)
        return self._tables[length]

    def sentences(self, text: str) -> Iterator[list[str]]:
        """The words of each sentence of a text."""
        for sentence in _sentences(text, self.split):
            if words := list(chain.from_iterable(_words(sentence, self.split))):
                yield words

    def _encode_all(self, texts: Any) -> list[np.ndarray]:
        # A piece of a text would end in a sentence's end that is none.
        return [self._stream(text.decode() if short is None else short) for text, short in texts]

    def _encode_pieces(self, texts: list[str]) -> list[Any]:
        return [self._stream(text) for text in texts]

    def _stream(self, text: str) -> np.ndarray:
        ids = array("i")
        for sentence in _sentences(text, self.split):
            before = len(ids)
            for words in _words(sentence, self.split):
                ids.extend(self._encoded(words))
            if len(ids) > before:
                ids.append(END)
        return np.asarray(ids)  # of its memory: a copy would be as large again

    def _encoded(self, words: list[str]) -> Iterable[int]:
        # Lazily, for one word without a blank may have 100 MB.
        known = self._ids
        try:
            return [known[word] for word in words]
        except KeyError:
            return chain.from_iterable(map(self._one, words))

    def _one(self, word: str) -> Iterable[int]:
        if (known := self._ids.get(word)) is not None:
            return (known,)
        spelt = memoryview(word.encode())
        return chain((self.words + spelt[0],), (self.words + BYTES + byte for byte in spelt[1:]))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The words between blanks, a sentence a line."""
        text = bytearray()
        apart = False  # whether a word stands before on the line
        for i in self._known(ids):
            if i == END:
                text += b"\n"
            elif i >= self.words + BYTES:
                text.append(i - self.words - BYTES)
            elif i != START:
                text += b" " * apart
                text += bytes([i - self.words]) if i >= self.words else self.spellings[i].encode()
            apart = i not in (START, END) or (apart and i == START)
        return text.decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        if token < self.words:
            return self.spellings[token]
        inside, byte = divmod(token - self.words, BYTES)
        shown = chr(byte) if 32 < byte < 127 else f"<0x{byte:02X}>"
        return "##" * inside + shown

    def _begins_word(self, token: int) -> bool:
        return token < self.words + BYTES


def character_ids(word: str, length: int = WORD_LENGTH, shifted: bool = False) -> np.ndarray:
    """The characters of one word, int16[length], as bilm-tf numbers them.

    258, the bytes of UTF-8 (cut to length - 2), 259, then 260; `<S>` has 256 for its bytes, `</S>`
    257. shifted: one more each, as in the original's inference, where 0 pads whole words.
    """
    return characters_of([word], length, shifted)[0]


def characters_of(
    words: Sequence[str], length: int = WORD_LENGTH, shifted: bool = False
) -> np.ndarray:
    """`character_ids` of many words, int16[n, C]."""
    spelt = [word.encode("utf-8", "ignore") for word in words]
    sizes = np.array([len(word) for word in spelt], np.int64)
    content = np.frombuffer(b"".join(spelt), np.uint8)
    out = _framed(content, np.cumsum(sizes) - sizes, sizes, length)
    for mark, row in zip((START, END), _of_marks(length), strict=True):
        out[[word == MARKS[mark] for word in words]] = row
    return out + np.int16(shifted)


def spelt_characters(
    tokens: np.ndarray, places_n: np.ndarray, words: int, length: int
) -> np.ndarray:
    """Character ids of the unknown words that are spelt from these places, int16[n, C].

    tokens: the stream. words: the first id that spells.
    """
    index = np.minimum(places_n[:, None] + np.arange(length - 2), len(tokens) - 1)
    stream = tokens[index].astype(np.int32) - words
    stream[:, 1:] -= BYTES
    # Of a word that ends the stream, the last place is read again and again.
    inside = (stream >= 0) & (index == places_n[:, None] + np.arange(length - 2))
    sizes = np.logical_and.accumulate(inside, axis=1).sum(1)
    starts = np.arange(len(places_n)) * (length - 2)
    return _framed(stream.reshape(-1), starts, sizes, length)


def _framed(content: np.ndarray, starts_n, sizes_n, length: int) -> np.ndarray:
    """int16[n, C]: of each word the bytes content[start : start + size], between its ends."""
    if length < 3:
        raise ValueError(f"characters={length}: must be at least 3, for a word has two ends")
    out = np.full((len(starts_n), length), PADDING, np.int16)
    out[:, 0] = WORD_STARTS
    column = np.arange(length - 2)
    for at in range(0, len(out), _AT_ONCE):
        rows, starts = out[at : at + _AT_ONCE], starts_n[at : at + _AT_ONCE]
        sizes = np.minimum(sizes_n[at : at + _AT_ONCE], length - 2)
        inside = column < sizes[:, None]
        rows[:, 1:-1][inside] = content[(starts[:, None] + column)[inside]]
        rows[np.arange(len(rows)), sizes + 1] = WORD_ENDS
    return out


def _of_marks(length: int) -> np.ndarray:
    """int16[2, C]: the characters of <S> and </S>."""
    content = np.array([SENTENCE_STARTS, SENTENCE_ENDS])
    return _framed(content, np.arange(2), np.ones(2, np.int64), length)


def read_vocabulary(path: Path) -> dict[str, int]:
    """The words of a file, one a line, without the blanks around them, and their lines from 0.

    In the order of their ids: the marks, wherever they stand, then the words as they follow each
    other. <UNK> may be missing, as in vocabularies that bilm-tf only embeds with: its line is -1.

    Raises:
      ValueError: names the line that is blank, not UTF-8 or there twice, or the mark that is not.
    """
    lines: dict[str, int] = {}
    content = read_bytes(path).removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n")
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            word = line.decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}:{error.start + 1}: not UTF-8") from None
        if not word:
            raise ValueError(f"{path}:{number}: a blank line; wanted a word on each")
        if word in lines:
            raise ValueError(
                f"{path}:{number}: {word[:40]!r} stands on line {lines[word] + 1} already"
            )
        lines[word] = number - 1
    found = {mark: _line_of(mark, lines, path) for mark in MARKS} | lines
    if len(found) == len(MARKS):
        raise ValueError(f"{path}: holds no word beside {', '.join(MARKS)}")
    return found


def _line_of(mark: str, lines: dict[str, int], path: Path) -> int:
    if mark in lines:
        return lines[mark]
    other = next((word for word in lines if word.upper() == mark), None)
    if other or mark != MARKS[UNKNOWN]:
        near = f"; line {lines[other] + 1} is {other}" if other else ""
        raise ValueError(
            f"{path}: no line is {mark}{near}: a vocabulary has the lines {', '.join(MARKS)}, and a"
            " word on each other"
        )
    return -1


def _frequent(texts: Iterator[bytes], split: Cut, most: int) -> list[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        for sentence in _sentences(text.decode(), split):
            for words in _words(sentence, split):
                counts.update(word if len(word) <= _LONGEST else "" for word in words)
    for mark in MARKS:
        counts.pop(mark, None)
    if not counts:
        raise ValueError("the training split has no words to make a vocabulary of")
    counts.pop("", None)
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]


def _sentences(text: str, split: Cut) -> list[str]:
    return _LINE_ENDS.split(text) if split == "blanks" else split_sentences(text, "auto")


def _words(sentence: str, split: Cut) -> Iterator[list[str]]:
    """The words of a sentence in lists, cut at blanks so that none grows with the sentence."""
    start = 0
    while start < len(sentence):
        found = _BLANK.search(sentence, start + _AT_ONCE)
        end = found.end() if found else len(sentence)
        part = sentence[start:end]
        if split == "chinese":
            part = part.translate(_APART)
        yield part.split() if split == "blanks" else _pattern().findall(part)
        start = end


class _Apart(dict[int, str]):
    """What each character becomes where Chinese ones are words."""

    def __missing__(self, point: int) -> str:
        character = chr(point)
        self[point] = made = f" {character} " if is_chinese(character) else character
        return made


_APART = _Apart()


@cache
def _pattern() -> re.Pattern[str]:
    """Words, numbers and signs of raw text: don't, 3.5, 10:30, U.S., e.g., well-known, "...", --.

    Accents and joiners belong to the character before them.
    """
    accents = f"{_accents()}\u00ad\u200c\u200d"
    some = rf"[\w{accents}]+"
    initials = rf"[^\W\d_](?:\.[^\W\d_])+(?![\w{accents}])\.?"
    word = rf"{some}(?:['’‐‑-]{some}|(?<=\d)[.,:/](?=\d){some})*"
    return re.compile(rf"{initials}|{word}|\.\.+|…+|--+|——+|''|``|\S[{accents}]*")


def _accents() -> str:
    """All combining marks of Unicode, as ranges of a regular expression."""
    points = [*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)]
    combining = [unicodedata.category(chr(point))[0] == "M" for point in points]
    edges = np.flatnonzero(np.diff([False, *combining, False]))
    return "".join(f"{chr(points[a])}-{chr(points[b - 1])}" for a, b in edges.reshape(-1, 2))
