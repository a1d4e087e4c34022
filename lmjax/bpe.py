# SPDX-License-Identifier: Apache-2.0
"""Byte-pair encoders in the forms that GPT-1 and GPT-2 were published in, through `tokenizers`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

END_OF_TEXT = "<|endoftext|>"
# RoBERTa's controls stand at 0 to 3, in fairseq's order, but for the mask, which is the last id.
ROBERTA = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "mask": "<mask>"}
UNKNOWN = "<unk>"
END_OF_WORD = "</w>"
_BYTE_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_GPT1_FILES = (("encoder_bpe_40000.json", "vocab_40000.bpe"), ("vocab.json", "merges.txt"))


def train_byte_bpe(texts: Iterator[str], vocab: int, roberta: bool = False) -> Tokenizer:
    """GPT-2's byte-level BPE learnt from texts: 256 bytes, merges, `<|endoftext|>` last; or
    RoBERTa's: `<s>` `<pad>` `</s>` `<unk>`, 256 bytes, merges, `<mask>` last."""
    first = [ROBERTA["cls"], ROBERTA["pad"], ROBERTA["sep"], UNKNOWN] if roberta else []
    last = ROBERTA["mask"] if roberta else END_OF_TEXT
    least = len(first) + 257
    if vocab < least:
        names = ", ".join([*first, last])
        raise ValueError(f"vocab={vocab}: a byte BPE needs at least {least} (256 bytes, {names})")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 1,  # pyright: ignore[reportCallIssue]
        special_tokens=first,  # pyright: ignore
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore
        show_progress=False,  # pyright: ignore
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([last])
    return _framed(tokenizer) if roberta else tokenizer


def read_byte_bpe(folder: Path, roberta: bool = False) -> Tokenizer:
    """A published byte-level BPE: vocab.json + merges.txt, encoder.json + vocab.bpe or
    tokenizer.json. Errors: ValueError naming the file."""
    if (folder / "tokenizer.json").is_file() and not _pair(folder, _BYTE_FILES):
        tokenizer = parse_tokenizer(folder / "tokenizer.json")
    else:
        vocab, merges = _read_pair(folder, _BYTE_FILES, "tokenizer.json")
        tokenizer = _byte_level(models.BPE(vocab, merges))
        known = [*ROBERTA.values(), UNKNOWN] if roberta else [END_OF_TEXT]
        tokenizer.add_special_tokens([name for name in known if name in vocab])
    if not roberta:
        return tokenizer
    if missing := [n for n in ROBERTA.values() if tokenizer.token_to_id(n) is None]:
        raise ValueError(f"{folder}: has no {' and no '.join(missing)}; is it RoBERTa's?")
    return _framed(tokenizer)


def _framed(tokenizer: Tokenizer) -> Tokenizer:
    """With RoBERTa's frame, for whoever opens the file by other means."""
    cls, sep = ((ROBERTA[n], id_of(tokenizer, ROBERTA[n])) for n in ("cls", "sep"))
    tokenizer.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=False)
    return tokenizer


def id_of(tokenizer: Tokenizer, piece: str) -> int:
    """The id of a piece that is there."""
    found = tokenizer.token_to_id(piece)
    assert found is not None, piece
    return found


def byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level BPE stands for: the visible ones of Latin-1 stand
    for themselves, the others are counted from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_gpt1_bpe(texts: Iterator[str], vocab: int) -> Tokenizer:
    """GPT-1's lower-cased BPE with `</w>` learnt from texts; `<unk>` is id 0."""
    tokenizer = _lower_cased(models.BPE(unk_token=UNKNOWN, end_of_word_suffix=END_OF_WORD))
    assert tokenizer.normalizer is not None
    kept = [tokenizer.normalizer.normalize_str(text) for text in texts]
    characters = sorted({c for text in kept for c in text if not c.isspace()})
    # Each character has an id inside words and one at their ends, as published. Naming the
    # latter keeps the trainer from numbering them in the order of its hash table, which
    # differs from run to run.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,  # pyright: ignore[reportCallIssue]
        special_tokens=[UNKNOWN, *(c + END_OF_WORD for c in characters)],  # pyright: ignore
        end_of_word_suffix=END_OF_WORD,  # pyright: ignore
        show_progress=False,  # pyright: ignore
    )
    tokenizer.train_from_iterator(kept, trainer)
    return without_controls(tokenizer, keep=(UNKNOWN,))[0]


def read_gpt1_bpe(folder: Path) -> Tokenizer:
    """GPT-1's published BPE: encoder_bpe_40000.json + vocab_40000.bpe, their later names, or
    tokenizer.json. Errors: ValueError naming the file."""
    if (folder / "tokenizer.json").is_file() and not _pair(folder, _GPT1_FILES):
        tokenizer = parse_tokenizer(folder / "tokenizer.json")
        if tokenizer.token_to_id(UNKNOWN) is None:
            raise ValueError(f"{folder / 'tokenizer.json'}: has no {UNKNOWN}; is it GPT-1's?")
        return tokenizer
    vocab, merges = _read_pair(folder, _GPT1_FILES, "tokenizer.json")
    if UNKNOWN not in vocab:
        raise ValueError(f"{folder}: the vocabulary has no {UNKNOWN}; is it GPT-1's?")
    model = models.BPE(vocab, merges, unk_token=UNKNOWN, end_of_word_suffix=END_OF_WORD)
    tokenizer = _lower_cased(model)
    tokenizer.add_special_tokens([UNKNOWN])
    return tokenizer


def _lower_cased(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    return tokenizer


def parse_tokenizer(path: Path, kind: type[Any] = models.BPE) -> Tokenizer:
    """A tokenizer.json that holds a model of that kind. Errors: ValueError naming the file."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from None
    if not isinstance(tokenizer.model, kind):
        found = type(tokenizer.model).__name__
        raise ValueError(f"{path}: holds a {found}, not a {kind.__name__}")
    return tokenizer


def is_lossless(tokenizer: Tokenizer) -> bool:
    """Whether every text comes back, which one with every byte of UTF-8 shows; a second one begins
    with a blank, because some encoders put a blank before what has none.

    Raises:
      ValueError: there is text that it cannot even encode.
    """
    encoder, _ = without_controls(tokenizer)
    points = [*range(0x800), *range(0x800, 0xD800, 0x1000), *range(0xE000, 0x110000, 0x1000)]
    text = "a  b " + "".join(map(chr, points)) + "\n"
    texts = (text, " " + text)
    try:
        found = [encoder.encode(t, add_special_tokens=False).ids for t in texts]
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the tokenizer cannot encode every text: {error}") from None
    return all(encoder.decode(i, False) == t for i, t in zip(found, texts, strict=True))


def without_controls(
    tokenizer: Tokenizer, keep: tuple[str, ...] = (), normalised: bool = False
) -> tuple[Tokenizer, dict[int, str]]:
    """A copy that finds no added token in text, and the added tokens by id; for text that is
    `normalised` already, also without a normalizer.

    The library turns every occurrence of an added token into its id; in lmjax a control id
    never comes from text, so `<|endoftext|>` in a document is encoded letter by letter.
    """
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    controls = {t["id"]: t["content"] for t in spec["added_tokens"] if t["content"] not in keep}
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in keep]
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
    if normalised:
        spec["normalizer"] = None
    if spec["model"].get("ignore_merges"):
        # Whole words are looked up before merging: a control word must not be among them.
        for content in controls.values():
            spec["model"]["vocab"].pop(content, None)
    return Tokenizer.from_str(json.dumps(spec)), controls


def _pair(folder: Path, names: tuple[tuple[str, str], ...]) -> tuple[Path, Path] | None:
    for vocab, merges in names:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return folder / vocab, folder / merges
    return None


def _read_pair(
    folder: Path, names: tuple[tuple[str, str], ...], other: str
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    pair = _pair(folder, names)
    if pair is None:
        wanted = [f"{vocab} + {merges}" for vocab, merges in names] + [other]
        raise ValueError(f"{folder}: no tokenizer here; wanted {' or '.join(wanted)}")
    vocab = _read_vocab(pair[0])
    return vocab, _read_merges(pair[1], vocab)


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(vocab, dict) or sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{path}: the ids of a vocabulary are 0 to its size, each once")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or any(part not in vocab for part in (*pair, "".join(pair))):
            raise ValueError(f"{path}:{number}: no merge of two pieces of the vocabulary: {line!r}")
        merges.append((pair[0], pair[1]))
    return merges
