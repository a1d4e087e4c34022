# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: text to ids and back. A spec is part of the recipe; a folder holds the result.

A spec's `build` writes a folder; `load_tokenizer` opens it without the spec. Control ids (end of
text) come from the example makers only, never from text.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmjax import bpe, spm
from lmjax.pretokenized import PretokenizedERNIE
from lmjax.tokenizer_base import (
    DESCRIPTION,
    ENTITY,
    LABEL,
    WORD,
    Encoded,
    Tokenizer,
    TokenizerSpec,
    begins_word,
    load_tokenizer,
    read_bytes,
    training_texts,
    write_tokenizer,
)
from lmjax.vocabulary import Vocabulary
from lmjax.wordpiece import WordPiece

__all__ = [
    "DESCRIPTION",
    "ENTITY",
    "GPT1BPE",
    "LABEL",
    "WORD",
    "ByteBPE",
    "Characters",
    "Encoded",
    "PretokenizedERNIE",
    "SentencePiece",
    "Tokenizer",
    "TokenizerSpec",
    "Vocabulary",
    "WordPiece",
    "load_tokenizer",
]

# A setting that is younger than the stores: a store's spec leaves it out at its default.
_YOUNG = {"young": True}


@dataclass(frozen=True)
class SentencePiece:
    """SentencePiece over raw text: identity normalisation and byte fallback, so lossless.

    vocab: at most so many ids (fewer where the corpus does not support them).
    path: a foreign .model to take instead of training one.
    train_bytes: how much of the training split is learnt from.
    controls: "albert" for an encoder's: [CLS], [SEP], [MASK] and <pad>.
    """

    vocab: int = 8192
    model_type: Literal["bpe", "unigram"] = "bpe"
    path: str = ""
    train_bytes: int = 10_000_000
    controls: Literal["", "albert"] = field(default="", metadata=_YOUNG)

    def __post_init__(self) -> None:
        _check_controls(self.controls, ("", "albert"))

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Trains (or copies) the model into `directory`."""
        if self.path:
            model = read_bytes(Path(self.path).expanduser())
        else:
            texts = training_texts(train_texts, self.train_bytes)
            model = spm.train(texts, self.vocab, self.model_type, bool(self.controls))
        processor = spm.parse(model, self.path)
        controls = spm.albert_controls(processor, self.path) if self.controls else {}
        eos = controls.get("sep", processor.eos_id())
        write_tokenizer(
            directory,
            {"sentencepiece.model": model},
            controls,
            kind="sentencepiece",
            vocab=processor.vocab_size(),
            eot=eos if eos >= 0 else None,
            unknown=None if not self.path else processor.unk_id(),
            lossless=not self.path,
        )

    def load(self, directory: Path) -> Tokenizer:
        """Opens what `build` wrote."""
        return load_tokenizer(directory)


class SentencePieceTokenizer(Tokenizer, kinds=("sentencepiece",)):
    """A SentencePiece model."""

    def __init__(self, directory: Path, description: dict[str, Any]):
        super().__init__(directory, description)
        path = directory / "sentencepiece.model"
        self._processor = spm.parse(read_bytes(path), str(path))
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

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def _begins_word(self, token: int) -> bool:
        piece = self.piece(token)
        if self._processor.is_byte(token):
            return begins_word(bytes([int(piece[3:5], 16)]))
        return self._processor.is_control(token) or begins_word(
            piece.replace(spm.BLANK, " ").encode()
        )


@dataclass(frozen=True)
class ByteBPE:
    """GPT-2's byte-level BPE. Lossless; the end of text is `<|endoftext|>`.

    vocab: ids to learn, the end of text included. path: a folder with a published one
    (vocab.json + merges.txt, encoder.json + vocab.bpe, or tokenizer.json). controls: "roberta"
    for an encoder's, in fairseq's order: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> the last.
    """

    vocab: int = 50_257
    path: str = ""
    train_bytes: int = 10_000_000
    controls: Literal["gpt2", "roberta"] = field(default="gpt2", metadata=_YOUNG)

    def __post_init__(self) -> None:
        _check_controls(self.controls, ("gpt2", "roberta"))

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Trains (or copies) the encoder into `directory`."""
        roberta = self.controls == "roberta"
        if self.path:
            made = bpe.read_byte_bpe(Path(self.path).expanduser(), roberta)
        else:
            texts = training_texts(train_texts, self.train_bytes)
            made = bpe.train_byte_bpe(texts, self.vocab, roberta)
        names = bpe.ROBERTA if roberta else {}
        controls = {name: bpe.id_of(made, piece) for name, piece in names.items()}
        eot = controls.get("sep", made.token_to_id(bpe.END_OF_TEXT))
        lossless = bpe.is_lossless(made)
        word = None if lossless else made.model.unk_token  # pyright: ignore
        unknown = None if word is None else made.token_to_id(word)
        _write_bpe(directory, made, "byte-bpe", eot, unknown, lossless, controls)

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
            made = bpe.train_gpt1_bpe(training_texts(train_texts, self.train_bytes), self.vocab)
        unknown = made.token_to_id(bpe.UNKNOWN)
        _write_bpe(directory, made, "gpt1-bpe", None, unknown, lossless=False)

    def load(self, directory: Path) -> Tokenizer:
        """Opens what `build` wrote."""
        return load_tokenizer(directory)


class BPETokenizer(Tokenizer, kinds=("byte-bpe", "gpt1-bpe")):
    """A BPE of the `tokenizers` library, from its tokenizer.json."""

    def __init__(self, directory: Path, description: dict[str, Any]):
        super().__init__(directory, description)
        made = bpe.parse_tokenizer(directory / "tokenizer.json")
        # GPT-1 reads a literal <unk> as its unknown word; that is no control id.
        keep = (bpe.UNKNOWN,) if self.unknown is not None else ()
        self._encoder, self._controls = bpe.without_controls(made, keep)
        self._bytes = bpe.byte_alphabet() if description["kind"] == "byte-bpe" else {}

    def _encode_pieces(self, texts: list[str]) -> list[Any]:
        found = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        plain = [i for i in self._known(ids) if i not in self._controls]
        return self._encoder.decode(plain, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        if token in self._controls:
            return self._controls[token]
        return self._spelling(token).decode("utf-8", "backslashreplace")  # shows torn characters

    def _begins_word(self, token: int) -> bool:
        return token in self._controls or begins_word(self._spelling(token))

    def _spelling(self, token: int) -> bytes:
        piece = self._encoder.id_to_token(token) or ""
        if self._bytes.keys() >= set(piece):
            return bytes(self._bytes[letter] for letter in piece)
        return piece.encode()

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
        write_tokenizer(
            directory, {"characters.json": listed},
            kind="characters", vocab=len(seen) + 1, eot=None, unknown=0, lossless=True,
        )  # fmt: skip

    def load(self, directory: Path) -> Tokenizer:
        """Opens what `build` wrote."""
        return load_tokenizer(directory)


class CharacterTokenizer(Tokenizer, kinds=("characters",)):
    """A table of characters."""

    def __init__(self, directory: Path, description: dict[str, Any]):
        super().__init__(directory, description)
        listed = json.loads(read_bytes(directory / "characters.json"))
        if not isinstance(listed, list) or len(listed) != self.vocab - 1:
            raise ValueError(f"{directory}/characters.json: not {self.vocab - 1} characters")
        if not all(type(c) is int and 0 <= c < 0x110000 for c in listed):
            raise ValueError(f"{directory}/characters.json: holds what is no character")
        self._characters = np.array([0xFFFD, *listed], np.uint32)
        self._ids = np.zeros(0x110000, np.int32)
        self._ids[self._characters[1:]] = np.arange(1, self.vocab)

    def _encode_pieces(self, texts: list[str]) -> list[Any]:
        return [self._ids[np.frombuffer(text.encode("utf-32-le"), np.uint32)] for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = np.asarray(self._known(ids), np.int64)
        return self._characters[known].astype("<u4").tobytes().decode("utf-32-le")

    def piece(self, token: int) -> str:
        return self.decode([token])

    def _begins_word(self, token: int) -> bool:
        return begins_word(self.piece(token).encode())


def _check_controls(asked: str, allowed: tuple[str, str]) -> None:
    if asked not in allowed:
        names = " or ".join(map(repr, allowed))
        raise ValueError(f"data.tokenizer.controls={asked!r}: allowed are {names}")


def _write_bpe(
    directory: Path,
    made: Any,
    kind: str,
    eot: int | None,
    unknown: int | None,
    lossless: bool,
    controls: dict[str, int] | None = None,
) -> None:
    files = {"tokenizer.json": made.to_str(pretty=False).encode()}
    vocab = max(made.get_vocab(with_added_tokens=True).values()) + 1
    write_tokenizer(
        directory, files, controls,
        kind=kind, vocab=vocab, eot=eot, unknown=unknown, lossless=lossless,
    )  # fmt: skip
