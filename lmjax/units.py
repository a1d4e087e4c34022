# SPDX-License-Identifier: Apache-2.0
"""Units: the sentences, words and entities of documents, kept beside their tokens.

Sentences are what pair objectives join, words and entities what whole-word and knowledge masking
hide at once (BERT, arXiv 1810.04805; ERNIE, arXiv 1904.09223).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmjax.document import Document
from lmjax.sentences import split_sentences
from lmjax.text_files import nearest
from lmjax.tokenizer import ENTITY, WORD, Encoded, Tokenizer
from lmjax.tokenizer_base import is_chinese, read_bytes
from lmjax.words import Entities, Jieba

Read = Callable[[Sequence[Document]], list[Encoded]]


@dataclass(frozen=True)
class Units:
    """How documents are cut into sentences and words.

    sentences: "lines" takes each line that is not blank, "rules" cuts at punctuation, "auto"
        takes the lines of a document where they look like sentences and the rules elsewhere.
    words: "pieces" by the spelling of the tokens (a Chinese character is a word), "jieba" also
        by the words that jieba finds in Chinese; needs WordPiece and `pip install jieba==0.42.1`.
    entities: a UTF-8 file with an entity a line, found where they are longest, from the left; ""
        for none. Needs WordPiece.
    """

    sentences: Literal["auto", "lines", "rules"] = "auto"
    words: Literal["pieces", "jieba"] = "pieces"
    entities: str = ""

    def __post_init__(self) -> None:
        allowed = {"sentences": ("auto", "lines", "rules"), "words": ("pieces", "jieba")}
        for name, names in allowed.items():
            if (value := getattr(self, name)) not in names:
                near = nearest(str(value), names)
                raise ValueError(
                    f"data.units.{name}={value!r}: one of {', '.join(names)};"
                    f" did you mean {near!r}?"
                )

    def spec(self) -> dict[str, Any]:
        """What a store depends on: of the entities, the file's content, wherever it lies."""
        content = read_bytes(Path(self.entities).expanduser()) if self.entities else b""
        digest = hashlib.sha256(content).hexdigest() if self.entities else ""
        return {"sentences": self.sentences, "words": self.words, "entities": digest}


def reader(units: Units, tokenizer: Tokenizer) -> Read:
    """What turns documents into tokens with sentences and marks.

    Raises:
      ValueError: no entities in the file, no jieba, a tokenizer that does not know where its
        tokens begin, or one whose documents hold their units already.
    """
    if type(tokenizer).encode_documents is not Tokenizer.encode_documents:
        raise ValueError(
            "data.units: these documents are tokenised already and hold their units; leave it None"
        )
    if units.words == "pieces" and not units.entities:
        return lambda documents: [_by_spelling(units, tokenizer, d) for d in documents]
    tokenizer.offsets([])  # refuses before anything is read
    jieba = Jieba() if units.words == "jieba" else None
    entities = Entities(Path(units.entities).expanduser()) if units.entities else None
    return lambda documents: [_by_text(units, tokenizer, jieba, entities, d) for d in documents]


def _by_spelling(units: Units, tokenizer: Tokenizer, document: Document) -> Encoded:
    found = tokenizer.encode_texts(split_sentences(document.text.decode(), units.sentences))
    ids = np.concatenate([np.zeros(0, np.int32), *found])
    return _encoded(ids, found, tokenizer.word_starts[ids] * np.uint8(WORD | ENTITY))


def _by_text(
    units: Units,
    tokenizer: Tokenizer,
    jieba: Jieba | None,
    entities: Entities | None,
    document: Document,
) -> Encoded:
    sentences = split_sentences(document.text.decode(), units.sentences)
    found, marks = [], []
    for text, (ids, begins) in zip(sentences, tokenizer.offsets(sentences), strict=True):
        words = tokenizer.word_starts[ids]
        if jieba is not None:
            words &= _is_apart(text, begins, jieba.word_starts(text))
        units_of = words.copy()
        for first, last in entities.find(text) if entities is not None else ():
            start, end = np.searchsorted(begins, (first, last))
            if start < end:
                units_of[start:end] = False
                units_of[start : end + 1 : end - start] = True
        found.append(ids)
        marks.append(words * np.uint8(WORD) | units_of * np.uint8(ENTITY))
    ids = np.concatenate([np.zeros(0, np.int32), *found])
    return _encoded(ids, found, np.concatenate([np.zeros(0, np.uint8), *marks]))


def _is_apart(text: str, begins: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """bool[tokens]: not a Chinese character that goes on with the word of the token before.

    starts: bool[characters], where a word begins in the text.
    """
    chinese = np.array([is_chinese(text[at]) for at in begins], bool)
    word = np.cumsum(starts)[begins]
    return ~chinese | (np.diff(word, prepend=-1) != 0)


def _encoded(ids: np.ndarray, found: list[np.ndarray], marks: np.ndarray) -> Encoded:
    """The document of these sentences; those without tokens are left out."""
    sizes = np.array([len(part) for part in found if len(part)], np.int64)
    sentences = np.cumsum(sizes) - sizes
    marks[sentences] = WORD | ENTITY  # a sentence never begins inside a word
    return Encoded(ids, sentences, marks)
