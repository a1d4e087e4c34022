# SPDX-License-Identifier: Apache-2.0
"""Corpora that Baidu tokenised already (ERNIE 1.0): two sentences a line, as numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmjax import wordpiece
from lmjax.document import Document
from lmjax.tokenizer_base import ENTITY, LABEL, WORD, Encoded, Tokenizer, load_tokenizer
from lmjax.wordpiece import WordPieceTokenizer

_FIELDS = ("token ids", "sentence ids", "positions", "segmentation labels", "label")


@dataclass(frozen=True)
class PretokenizedERNIE:
    """Lines `token ids;sentence ids;positions;segmentation labels;label`, a document each.

    For `Files("…gz", document="line")`. The numbers of a field stand between blanks. Each line is
    [CLS] A [SEP] B [SEP] with sentence ids 0 and 1; the segmentation labels are 0 on the first
    token of a word, 1 inside, -1 on controls; the label is 1 where B follows A, else 0.

    path: the vocabulary of the ids, as `WordPiece` takes it. Other text than such a corpus is
    encoded by it as by `WordPiece`.
    """

    path: str
    lowercase: bool = True

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Copies the vocabulary into `directory`."""
        made = wordpiece.read(Path(self.path).expanduser(), self.lowercase)
        # The lines bring their own controls, so nothing goes before a document.
        wordpiece.write(directory, made, "ernie-pretokenized", eot=None)

    def load(self, directory: Path) -> Tokenizer:
        """Opens what `build` wrote."""
        return load_tokenizer(directory)


class PretokenizedTokenizer(WordPieceTokenizer, kinds=("ernie-pretokenized",)):
    """A WordPiece whose documents are lines of numbers."""

    def encode_documents(self, documents: Sequence[Document]) -> list[Encoded]:
        """The tokens, sentences and marks of each line. Errors: ValueError naming the document."""
        return [self._read(document) for document in documents]

    def _read(self, document: Document) -> Encoded:
        place = f"document {document.id!r} is no pre-tokenised line of ERNIE's"
        ids, sentences, positions, labels, label = _numbers(document.text, place)
        if not ids.size == sentences.size == positions.size == labels.size > 0:
            sizes = ", ".join(str(f.size) for f in (ids, sentences, positions, labels))
            raise ValueError(f"{place}: its fields have {sizes} numbers, and need as many each")
        if ids.min() < 0 or ids.max() >= self.vocab:
            wrong = next(int(i) for i in ids if not 0 <= i < self.vocab)
            raise ValueError(f"{place}: id {wrong} is not one of the vocabulary's {self.vocab}")
        second = int((sentences == 0).sum())
        if not 0 < second < len(ids) or (sentences != (np.arange(len(ids)) >= second)).any():
            raise ValueError(f"{place}: its {_FIELDS[1]} must be 0 for a while, then 1")
        if (positions != np.arange(len(ids))).any():
            raise ValueError(f"{place}: its {_FIELDS[2]} must be 0, 1, 2 and so on")
        if labels.min() < -1 or labels.max() > 1:
            raise ValueError(f"{place}: its {_FIELDS[3]} must be -1, 0 and 1")
        if label.tolist() not in ([0], [1]):
            raise ValueError(f"{place}: its {_FIELDS[4]} must be 0 or 1")
        marks = np.where(labels == 0, WORD | ENTITY, 0).astype(np.uint8)
        marks[0] |= LABEL * int(label[0])
        return Encoded(ids.astype(np.int32), np.array([0, second], np.int64), marks)


def _numbers(text: bytes, place: str) -> list[np.ndarray]:
    fields = text.strip().split(b";")
    if len(fields) != len(_FIELDS):
        raise ValueError(
            f"{place}: it has {len(fields)} fields between semicolons, not {len(_FIELDS)}"
            f" ({'; '.join(_FIELDS)})"
        )
    try:
        return [np.array(field.split(), np.int64) for field in fields]
    except (ValueError, OverflowError):
        raise ValueError(f"{place}: a field holds something that is no whole number") from None
