# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models that lose nothing: trained on raw text, with byte fallback."""

import io
from collections import Counter
from collections.abc import Iterable
from typing import Any

import sentencepiece

from lmjax.document import pieces

BLANK = "\u2581"  # stands for a blank inside SentencePiece
_LINE_BYTES = 4000
_CONTROLS_AND_BYTES = 4 + 256
ALBERT = {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "pad": "<pad>"}
# What the trainer takes for its own marks, or refuses.
_MARKS = str.maketrans({BLANK: " ", "\u2585": " ", "\0": " ", "\t": " "})


def train(texts: Iterable[str], vocab: int, model_type: str, albert: bool = False) -> bytes:
    """A model of at most `vocab` ids: pad 0, unk 1, bos 2, eos 3, then bytes and pieces; for
    `albert` <pad> 0, <unk> 1, [CLS] 2, [SEP] 3, [MASK] 4 come first.

    Errors: ValueError for no text, and for a vocabulary that cannot hold the bytes.
    """
    lines = _training_lines(texts)
    first: dict[str, Any] = {"bos_id": 2, "eos_id": 3}
    if albert:
        first: dict[str, Any] = {
            "bos_id": -1,
            "eos_id": -1,
            "control_symbols": list(ALBERT.values())[:3],
        }
    if not lines:
        raise ValueError("the training split has no text to learn a tokenizer from")
    error = None
    for attempt in range(2):
        if attempt:
            lines = _without_rare_characters(lines, vocab - _CONTROLS_AND_BYTES - albert)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab,
                model_type=model_type, num_threads=1,
                pad_id=0, unk_id=1, **first, byte_fallback=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False,
                add_dummy_prefix=False, hard_vocab_limit=False, minloglevel=2,
            )  # fmt: skip
            return model.getvalue()
        except RuntimeError as failure:
            error = failure
    raise ValueError(
        f"vocab={vocab}: SentencePiece needs {4 + albert} control ids, 256 bytes and room for some"
        f" characters and merges ({error})"
    )


def parse(model: bytes, path: str) -> sentencepiece.SentencePieceProcessor:
    """Opens a serialised model. Errors: ValueError naming `path`."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError:
        raise ValueError(f"{path}: not a SentencePiece model") from None
    return processor


def albert_controls(processor: sentencepiece.SentencePieceProcessor, path: str) -> dict[str, int]:
    """The ids of ALBERT's controls. Errors: ValueError naming the ones that are no controls."""
    ids = {key: processor.piece_to_id(name) for key, name in ALBERT.items()}
    missing = [ALBERT[key] for key, i in ids.items() if not processor.is_control(i)]
    if missing:
        raise ValueError(f"{path}: has no control {' and no '.join(missing)}; is it ALBERT's?")
    return ids


def _training_lines(texts: Iterable[str]) -> list[str]:
    """Lines as the SentencePiece trainer wants them: short, without its own marks."""
    lines = []
    for text in texts:
        for line in text.translate(_MARKS).split("\n"):
            lines += [piece.decode() for piece in pieces(line.encode(), _LINE_BYTES) if piece]
    return lines


def _without_rare_characters(lines: list[str], room: int) -> list[str]:
    """The lines with only their most common characters, for half of the room that is left.

    SentencePiece gives every character of its text an id, and fails when they do not fit; the
    rare ones do as well by byte fallback.
    """
    counts = Counter(character for line in lines for character in line)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    rare = {ord(character): " " for character in ranked[max(1, room // 2) :]}
    return [line.translate(rare) for line in lines]
