# SPDX-License-Identifier: Apache-2.0
"""What every tokenizer is: a folder with files and a sealed description, text to ids and back."""

import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from lmjax.document import Document, pieces

PIECE_BYTES = 64 << 10
GROUP_BYTES = 1 << 20
DESCRIPTION = "description.json"
# Bits of the marks: the first token of a word, of an entity or of a word outside of all entities,
# and of a document whose own label is 1.
WORD, ENTITY, LABEL = 1, 2, 4
_FORMAT = 1
_MASK = re.compile(r"\s*<mask>|\s*\[MASK\]")


class TokenizerSpec(Protocol):
    """What the recipe says of a tokenizer; a frozen dataclass."""

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Writes the tokenizer's files, the same ones for the same texts."""
        ...

    def load(self, directory: Path) -> "Tokenizer":
        """Opens what `build` wrote."""
        ...


@dataclass(frozen=True)
class Encoded:
    """A document in tokens.

    ids: int32[tokens]. sentences: int64, where in `ids` each sentence starts, ascending. marks:
    uint8[tokens], the bits WORD, ENTITY and LABEL. Both are None where nobody asked for them.
    """

    ids: np.ndarray
    sentences: np.ndarray | None = None
    marks: np.ndarray | None = None


class Tokenizer(ABC):
    """A tokenizer opened from its folder.

    vocab: the number of ids. eot: the id put before each document, or None. unknown: the id of
    what cannot be encoded, or None where everything can. controls: the ids of an encoder's marks,
    by "cls", "sep", "mask" and "pad"; no text yields them. lossless: whether decoding gives back
    every text (of its own alphabet, where `unknown` exists). fingerprint: of its files.
    """

    kinds: ClassVar[dict[str, type["Tokenizer"]]] = {}

    def __init_subclass__(cls, kinds: tuple[str, ...] = (), **rest: Any) -> None:
        super().__init_subclass__(**rest)
        Tokenizer.kinds.update(dict.fromkeys(kinds, cls))

    def __init__(self, directory: Path, description: dict[str, Any]):
        self.directory = directory
        self.vocab: int = description["vocab"]
        self.eot: int | None = description["eot"]
        self.unknown: int | None = description["unknown"]
        self.controls: dict[str, int] = description.get("controls", {})
        self.lossless: bool = description["lossless"]
        self.fingerprint = _seal(description)

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; control ids give nothing, torn characters U+FFFD."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """How one id is spelt, to be shown: "##ing", "▁cat", " cat", "[MASK]"."""

    @abstractmethod
    def _encode_pieces(self, texts: list[str]) -> list[Any]:
        """Ids of short texts, in parallel where the library can."""

    @abstractmethod
    def _begins_word(self, token: int) -> bool:
        """Whether an id begins a word by its spelling, or is a control."""

    @cached_property
    def word_starts(self) -> np.ndarray:
        """bool[vocab]: whether an id begins a word by its spelling; controls do."""
        return np.array([self._begins_word(i) for i in range(self.vocab)], bool)

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, int32[tokens]."""
        return self.encode_batch([text.encode()])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text, int32[tokens]. Texts over 64 KiB are encoded in pieces, cut
        after a newline or blank, which bounds the library's memory."""
        return self._encode_all((text, None) for text in texts)

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` of many texts that are strings already."""
        return self._encode_all(
            (b"", text) if len(text) * 4 <= PIECE_BYTES else (text.encode(), None) for text in texts
        )

    def encode_documents(self, documents: Sequence[Document]) -> list[Encoded]:
        """Each document in tokens, without sentences and marks unless its text holds them."""
        return [Encoded(ids) for ids in self.encode_batch([d.text for d in documents])]

    def encode_masked(self, text: str) -> np.ndarray:
        """The ids of a text in which every [MASK] or <mask> stands for the mask, int32[tokens].

        Blanks before a mask go with it, for they belong to the word that it hides.
        Errors: ValueError for a tokenizer without a mask.
        """
        if "mask" not in self.controls:
            raise ValueError("this tokenizer has no mask: it is a decoder's (its controls are {})")
        parts = [self.encode(part) if part else [] for part in _MASK.split(text)]
        ids = [i for part in parts for i in (self.controls["mask"], *part)]
        return np.asarray(ids[1:], np.int32)

    def offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32[tokens], the character of the text where each begins int64[tokens]) a text.

        Errors: ValueError for tokenizers that cannot say.
        """
        raise ValueError(
            f"a {type(self).__name__} does not say where in the text its tokens begin;"
            " WordPiece() does"
        )

    def _encode_all(self, texts: Iterable[tuple[bytes, str | None]]) -> list[np.ndarray]:
        found: list[list[np.ndarray]] = []
        group: list[str] = []
        owners: list[list[np.ndarray]] = []
        size = 0
        for text, short in texts:
            found.append([])
            cut = pieces(text, PIECE_BYTES) if short is None else (short,)
            for piece in cut:
                if size + len(piece) > GROUP_BYTES:
                    self._flush(group, owners)
                    group, owners, size = [], [], 0
                group.append(piece if isinstance(piece, str) else piece.decode())
                owners.append(found[-1])
                size += len(piece)
        self._flush(group, owners)
        return [ids[0] if len(ids) == 1 else np.concatenate(ids) for ids in found]

    def _flush(self, group: list[str], owners: list[list[np.ndarray]]) -> None:
        for owner, ids in zip(owners, self._encode_pieces(group) if group else [], strict=True):
            owner.append(np.asarray(ids, np.int32))

    def _known(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        known = [int(i) for i in ids]
        for i in known:
            if not 0 <= i < self.vocab:
                raise ValueError(f"id {i} is not one of the tokenizer's {self.vocab}")
        return known


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Opens a tokenizer folder. Errors: ValueError naming the missing or changed file."""
    directory = Path(directory)
    path = directory / DESCRIPTION
    try:
        description = json.loads(read_bytes(path))
        kind, files = Tokenizer.kinds[description["kind"]], description["files"]
        if description.pop("seal") != _seal(description) or description["format"] != _FORMAT:
            raise KeyError
        _check(description)
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError,
            RecursionError):  # fmt: skip
        raise ValueError(f"{path}: damaged, or of another version of lmjax") from None
    for name, digest in files.items():
        if hashlib.sha256(read_bytes(directory / name)).hexdigest() != digest:
            raise ValueError(f"{directory / name}: changed since the tokenizer was built")
    return kind(directory, description)


def _check(description: dict[str, Any]) -> None:
    """Raises KeyError for facts and names that `write_tokenizer` never wrote."""
    vocab, files = description["vocab"], description["files"]
    optional = {description["eot"], description["unknown"]} - {None}
    ids = [*optional, *description.get("controls", {}).values()]
    right = type(vocab) is int and all(type(i) is int and 0 <= i < vocab for i in ids)
    plain = all(re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name) for name in files)
    right &= isinstance(files, dict) and type(description["lossless"]) is bool
    if not (right and plain and files):
        raise KeyError


def write_tokenizer(
    directory: Path, files: dict[str, bytes], controls: dict[str, int] | None = None, **facts: Any
) -> None:
    """Writes a tokenizer folder: its files, and the description that seals them.

    facts: kind, vocab, eot, unknown and lossless of `Tokenizer`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    # A tokenizer without controls is described as before there were any: stores know it so.
    marks = {"controls": controls} if controls else {}
    description = {"format": _FORMAT, **facts, **marks, "files": digests}
    description["seal"] = _seal(description)
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", "utf-8")


def read_bytes(path: Path) -> bytes:
    """A file's content. Errors: ValueError naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def training_texts(texts: Iterable[bytes], limit: int) -> Iterator[str]:
    """Up to `limit` bytes of text in pieces that a trainer digests."""
    left = limit
    for text in texts:
        for piece in pieces(text, PIECE_BYTES):
            if len(piece) > left:
                return
            left -= len(piece)
            yield piece.decode()


def begins_word(spelling: bytes) -> bool:
    """Whether text beginning so begins a word, whatever stands before it: blanks, signs and
    Chinese characters do; letters, digits and accents may go on with one."""
    if not spelling:
        return True
    lead = spelling[0]
    if 0x80 <= lead < 0xC0:
        return False  # inside a character
    size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    if len(spelling) < size:
        return 0xE3 <= lead <= 0xE9  # a torn one; Chinese begins with these bytes
    first = spelling[:size].decode("utf-8", "replace")[0]
    return is_chinese(first) or not (first.isalnum() or unicodedata.category(first)[0] == "M")


def is_chinese(character: str) -> bool:
    """Whether a character is one of the blocks that BERT sets apart: CJK ideographs."""
    point = ord(character)
    return (
        0x4E00 <= point <= 0x9FFF
        or 0x3400 <= point <= 0x4DBF
        or 0x20000 <= point <= 0x2A6DF
        or 0x2A700 <= point <= 0x2CEAF
        or 0xF900 <= point <= 0xFAFF
        or 0x2F800 <= point <= 0x2FA1F
    )


def _seal(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
