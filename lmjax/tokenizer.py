# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text to ids and back. A spec is part of the recipe; a folder holds the result.

A spec's `build` writes a folder; `load_tokenizer` opens it without the spec. Control ids (end of
text) come from the example makers only, never from text.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from lmjax import bpe, spm
from lmjax.document import pieces

PIECE_BYTES = 64 << 10
GROUP_BYTES = 1 << 20
DESCRIPTION = "description.json"
_FORMAT = 1


class TokenizerSpec(Protocol):
    """What the recipe says of a tokenizer; a frozen dataclass."""

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Writes the tokenizer's files, the same ones for the same texts."""
        ...

    def load(self, directory: Path) -> "Tokenizer":
        """Opens what `build` wrote."""
        ...


class Tokenizer(ABC):
    """A tokenizer opened from its folder.

    vocab: the number of ids. eot: the id put before each document, or None. unknown: the id of
    what cannot be encoded, or None where everything can. lossless: whether decoding gives back
    every text (of its own alphabet, where `unknown` exists). fingerprint: of its files.
    """

    def __init__(self, directory: Path, description: dict[str, Any]):
        self.directory = directory
        self.vocab: int = description["vocab"]
        self.eot: int | None = description["eot"]
        self.unknown: int | None = description["unknown"]
        self.lossless: bool = description["lossless"]
        self.fingerprint = _seal(description)

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; control ids give nothing, torn characters U+FFFD."""

    @abstractmethod
    def _encode_pieces(self, texts: list[str]) -> list[Any]:
        """Ids of short texts, in parallel where the library can."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, int32[tokens]."""
        return self.encode_batch([text.encode()])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text, int32[tokens]. Texts over 64 KiB are encoded in pieces, cut
        after a newline or blank, which bounds the library's memory."""
        found: list[list[np.ndarray]] = [[] for _ in texts]
        group: list[str] = []
        owners: list[int] = []
        size = 0
        for owner, text in enumerate(texts):
            for piece in pieces(text, PIECE_BYTES):
                if size + len(piece) > GROUP_BYTES:
                    self._flush(group, owners, found)
                    group, owners, size = [], [], 0
                group.append(piece.decode())
                owners.append(owner)
                size += len(piece)
        self._flush(group, owners, found)
        return [ids[0] if len(ids) == 1 else np.concatenate(ids) for ids in found]

    def _flush(self, group: list[str], owners: list[int], found: list[list[np.ndarray]]) -> None:
        for owner, ids in zip(owners, self._encode_pieces(group) if group else [], strict=True):
            found[owner].append(np.asarray(ids, np.int32))

    def _known(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        known = [int(i) for i in ids]
        for i in known:
            if not 0 <= i < self.vocab:
                raise ValueError(f"id {i} is not one of the tokenizer's {self.vocab}")
        return known


@dataclass(frozen=True)
class SentencePiece:
    """SentencePiece over raw text: identity normalisation and byte fallback, so lossless.

    vocab: at most so many ids (fewer where the corpus does not support them).
    path: a foreign .model to take instead of training one.
    train_bytes: how much of the training split is learnt from.
    """

    vocab: int = 8192
    model_type: Literal["bpe", "unigram"] = "bpe"
    path: str = ""
    train_bytes: int = 10_000_000

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Trains (or copies) the model into `directory`."""
        if self.path:
            model = _read_bytes(Path(self.path).expanduser())
        else:
            texts = _training_texts(train_texts, self.train_bytes)
            model = spm.train(texts, self.vocab, self.model_type)
        processor = spm.parse(model, self.path)
        eos = processor.eos_id()
        _write(
            directory,
            {"sentencepiece.model": model},
            kind="sentencepiece",
            vocab=processor.vocab_size(),
            eot=eos if eos >= 0 else None,
            unknown=None if not self.path else processor.unk_id(),
            lossless=not self.path,
        )

    def load(self, directory: Path) -> Tokenizer:
        """Opens what `build` wrote."""
        return load_tokenizer(directory)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, directory: Path, description: dict[str, Any]):
        super().__init__(directory, description)
        path = directory / "sentencepiece.model"
        self._processor = spm.parse(_read_bytes(path), str(path))
        mark = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in spm.BLANK.encode()]
        self._mark_ids = mark if self.lossless else None

    def _encode_pieces(self, texts: list[str]) -> list[Any]:
        if self._mark_ids is None or not any(spm.BLANK in text for text in texts):
            return self._processor.encode(texts, num_threads=-1)
        # SentencePiece reads U+2581 as a blank; only its three bytes bring it back.
        out = []
        for text in texts:
            first, *rest = self._processor.encode(text.split(spm.BLANK))
            out.append(first + [i for part in rest for i in (*self._mark_ids, *part)])
        return out

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode(self._known(ids))


@dataclass(frozen=True)
class ByteBPE:
    """GPT-2's byte-level BPE. Lossless; the end of text is `<|endoftext|>`.

    vocab: ids to learn, the end of text included. path: a folder with a published one
    (vocab.json + merges.txt, encoder.json + vocab.bpe, or tokenizer.json).
    """

    vocab: int = 50_257
    path: str = ""
    train_bytes: int = 10_000_000

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Trains (or copies) the encoder into `directory`."""
        if self.path:
            made = bpe.read_byte_bpe(Path(self.path).expanduser())
        else:
            made = bpe.train_byte_bpe(_training_texts(train_texts, self.train_bytes), self.vocab)
        eot = made.token_to_id(bpe.END_OF_TEXT)
        lossless = bpe.is_lossless(made)
        word = None if lossless else made.model.unk_token  # pyright: ignore
        unknown = None if word is None else made.token_to_id(word)
        _write_bpe(directory, made, "byte-bpe", eot, unknown, lossless)

    def load(self, directory: Path) -> Tokenizer:
        """Opens what `build` wrote."""
        return load_tokenizer(directory)


@dataclass(frozen=True)
class GPT1BPE:
    """GPT-1's lower-cased BPE with `</w>` (words by the BERT rules; no ftfy, no spaCy). Lossy.

    path: a folder with encoder_bpe_40000.json + vocab_40000.bpe, vocab.json + merges.txt, or
    tokenizer.json.
    """

    vocab: int = 40_478
    path: str = ""
    train_bytes: int = 10_000_000

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Trains (or copies) the encoder into `directory`."""
        if self.path:
            made = bpe.read_gpt1_bpe(Path(self.path).expanduser())
        else:
            made = bpe.train_gpt1_bpe(_training_texts(train_texts, self.train_bytes), self.vocab)
        unknown = made.token_to_id(bpe.UNKNOWN)
        _write_bpe(directory, made, "gpt1-bpe", None, unknown, lossless=False)

    def load(self, directory: Path) -> Tokenizer:
        """Opens what `build` wrote."""
        return load_tokenizer(directory)


class BPETokenizer(Tokenizer):
    """A BPE of the `tokenizers` library, from its tokenizer.json."""

    def __init__(self, directory: Path, description: dict[str, Any]):
        super().__init__(directory, description)
        made = bpe.parse_tokenizer(directory / "tokenizer.json")
        # GPT-1 reads a literal <unk> as its unknown word; that is no control id.
        keep = (bpe.UNKNOWN,) if self.unknown is not None else ()
        self._encoder, self._controls = bpe.without_controls(made, keep)

    def _encode_pieces(self, texts: list[str]) -> list[Any]:
        found = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        plain = [i for i in self._known(ids) if i not in self._controls]
        return self._encoder.decode(plain, skip_special_tokens=False)

    def pieces(self, text: str) -> list[str]:
        """The pieces of a short text as strings; what is unknown, as it was written."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        words = [*encoding.word_ids, None]
        out = []
        for at, (i, token) in enumerate(zip(encoding.ids, encoding.tokens, strict=True)):
            begin, end = encoding.offsets[at]
            if i == self.unknown and text[begin:end] != bpe.UNKNOWN:
                assert self._encoder.normalizer is not None
                token = self._encoder.normalizer.normalize_str(text[begin:end])
                token += bpe.END_OF_WORD if words[at] != words[at + 1] else ""
            out.append(token)
        return out


@dataclass(frozen=True)
class Characters:
    """One id a character of the training split, in code-point order; id 0 is any other one."""

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Collects the characters into `directory`."""
        seen: set[str] = set()
        for text in train_texts:
            seen.update(text.decode())
        if not seen:
            raise ValueError("the training split has no text to take characters from")
        listed = json.dumps(sorted(ord(c) for c in seen)).encode()
        _write(
            directory, {"characters.json": listed},
            kind="characters", vocab=len(seen) + 1, eot=None, unknown=0, lossless=True,
        )  # fmt: skip

    def load(self, directory: Path) -> Tokenizer:
        """Opens what `build` wrote."""
        return load_tokenizer(directory)


class CharacterTokenizer(Tokenizer):
    """A table of characters."""

    def __init__(self, directory: Path, description: dict[str, Any]):
        super().__init__(directory, description)
        listed = json.loads(_read_bytes(directory / "characters.json"))
        self._characters = np.array([0xFFFD, *listed], np.uint32)
        self._ids = np.zeros(0x110000, np.int32)
        self._ids[self._characters[1:]] = np.arange(1, self.vocab)

    def _encode_pieces(self, texts: list[str]) -> list[Any]:
        return [self._ids[np.frombuffer(text.encode("utf-32-le"), np.uint32)] for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = np.asarray(self._known(ids), np.int64)
        return self._characters[known].astype("<u4").tobytes().decode("utf-32-le")


_KINDS: dict[str, type[Tokenizer]] = {
    "sentencepiece": SentencePieceTokenizer,
    "byte-bpe": BPETokenizer,
    "gpt1-bpe": BPETokenizer,
    "characters": CharacterTokenizer,
}


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Opens a tokenizer folder. Errors: ValueError naming the missing or changed file."""
    directory = Path(directory)
    path = directory / DESCRIPTION
    try:
        description = json.loads(_read_bytes(path))
        kind, files = _KINDS[description["kind"]], description["files"]
        if description.pop("seal") != _seal(description) or description["format"] != _FORMAT:
            raise KeyError
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged, or of another version of lmjax") from None
    for name, digest in files.items():
        if hashlib.sha256(_read_bytes(directory / name)).hexdigest() != digest:
            raise ValueError(f"{directory / name}: changed since the tokenizer was built")
    return kind(directory, description)


def _write_bpe(
    directory: Path, made: Any, kind: str, eot: int | None, unknown: int | None, lossless: bool
) -> None:
    files = {"tokenizer.json": made.to_str(pretty=False).encode()}
    vocab = max(made.get_vocab(with_added_tokens=True).values()) + 1
    _write(directory, files, kind=kind, vocab=vocab, eot=eot, unknown=unknown, lossless=lossless)


def _write(directory: Path, files: dict[str, bytes], **facts: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    description = {"format": _FORMAT, **facts, "files": digests}
    description["seal"] = _seal(description)
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", "utf-8")


def _seal(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _training_texts(texts: Iterable[bytes], limit: int) -> Iterator[str]:
    """Up to `limit` bytes of text in pieces that a trainer digests."""
    left = limit
    for text in texts:
        for piece in pieces(text, PIECE_BYTES):
            if len(piece) > left:
                return
            left -= len(piece)
            yield piece.decode()
