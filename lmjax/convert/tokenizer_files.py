# SPDX-License-Identifier: Apache-2.0
"""Tokeniser files of published folders: which spec reads them, and ours as such files."""

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from lmjax import spm
from lmjax.tokenizer import (
    GPT1BPE,
    ByteBPE,
    SentencePiece,
    TokenizerSpec,
    WordPiece,
    load_tokenizer,
)
from lmjax.workdir import read_json

_CONFIG = "tokenizer_config.json"
_FILES = {
    "gpt2": ("tokenizer.json", "vocab.json", "encoder.json"),
    "openai-gpt": ("tokenizer.json", "vocab.json", "encoder_bpe_40000.json"),
    "roberta": ("tokenizer.json", "vocab.json"),
    "albert": ("spiece.model",),
    "bert": ("vocab.txt", "tokenizer.json"),
    "ernie": ("vocab.txt", "tokenizer.json"),
    "electra": ("vocab.txt", "tokenizer.json"),
}


def published_spec(folder: Path, model_type: str, vocab: int) -> TokenizerSpec | None:
    """The tokeniser in a family's folder, or None where there is none.

    Raises:
      ValueError: a settings file is damaged.
    """
    found = [folder / name for name in _FILES[model_type] if (folder / name).is_file()]
    if not found:
        return None
    path = str(folder.absolute())
    if model_type == "gpt2":
        return ByteBPE(vocab, path)
    if model_type == "openai-gpt":
        return GPT1BPE(vocab, path)
    if model_type == "roberta":
        return ByteBPE(vocab, path, controls="roberta")
    if model_type == "albert":
        return SentencePiece(vocab, path=f"{path}/spiece.model", controls="albert")
    return WordPiece(vocab, path, lowercase=_lowercase(found[0]))


def _lowercase(path: Path) -> bool:
    """Whether a WordPiece lower-cases: as its settings say, else as its pieces look."""
    if path.name == "tokenizer.json":
        rules = _object(path).get("normalizer") or {}
        return bool(rules.get("lowercase", True)) if isinstance(rules, dict) else True
    said = _object(path.with_name(_CONFIG)).get("do_lower_case")
    if isinstance(said, bool):
        return said
    pieces = path.read_text("utf-8", errors="replace").split("\n")
    return not any(re.match(r"(##)?[A-Z]", piece) for piece in pieces)


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object")
    return found


def published_files(directory: Path) -> dict[str, bytes]:
    """A tokenizer folder of ours as the files that the hub's readers look for, by name.

    WordPiece gives vocab.txt, RoBERTa's BPE vocab.json and merges.txt, ALBERT's SentencePiece
    spiece.model, beside a tokenizer.json, and a tokenizer_config.json with the library's class.
    """
    tokenizer = load_tokenizer(directory)
    model, made = directory / "sentencepiece.model", directory / "tokenizer.json"
    if model.is_file():
        if not tokenizer.controls:
            return {model.name: model.read_bytes()}
        return _albert_files(model)
    if not made.is_file():
        return {}
    files = {made.name: made.read_bytes()}
    spec = _object(made)
    if spec["model"]["type"] == "WordPiece":
        return files | _wordpiece_files(spec)
    return files | (_roberta_files(spec) if tokenizer.controls else {})


def _albert_files(path: Path) -> dict[str, bytes]:
    """ALBERT's file, and a tokenizer.json where its normalisation, which the library assumes for
    the class of ALBERT, is not the model's."""
    content = path.read_bytes()
    processor = spm.parse(content, str(path))
    files = {"spiece.model": content}
    sample = " \ufb01  A "
    if processor.normalize(sample) != sample.replace(" ", spm.BLANK):
        settings = {"tokenizer_class": "AlbertTokenizer", "do_lower_case": False}
        return files | {_CONFIG: _bytes(settings)}
    made = _library_form(processor)
    names = {f"{key}_token": name for key, name in spm.ALBERT.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "unk_token": "<unk>"}
    text = made.to_str(pretty=False)
    return files | {"tokenizer.json": text.encode(), _CONFIG: _bytes(settings)}


def _library_form(processor: Any) -> Tokenizer:
    """A SentencePiece model without normalisation as one of the `tokenizers` library."""
    count = processor.vocab_size()
    pieces = [processor.id_to_piece(i) for i in range(count)]
    scores = [processor.get_score(i) for i in range(count)]
    if all(score == int(score) for score in scores):  # BPE's count its merges down
        ids = {piece: i for i, piece in enumerate(pieces)}
        model: Any = models.BPE(
            ids, _merges(ids), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    else:
        model = models.Unigram(
            list(zip(pieces, scores, strict=True)), processor.unk_id(), byte_fallback=True
        )
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", spm.BLANK)  # pyright: ignore
    blanks, parts = decoders.Replace(spm.BLANK, " "), (decoders.ByteFallback(), decoders.Fuse())
    made.decoder = decoders.Sequence([blanks, *parts])  # pyright: ignore
    controls = [AddedToken(name, normalized=False) for name in (*spm.ALBERT.values(), "<unk>")]
    made.add_special_tokens(controls)
    cls, sep = spm.ALBERT["cls"], spm.ALBERT["sep"]
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore
        f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1",
        [(name, made.token_to_id(name)) for name in (cls, sep)],
    )  # fmt: skip
    return made


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, those of the earlier pieces first."""
    found = [
        (i, ids[piece[:cut]], ids[piece[cut:]])
        for piece, i in ids.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    pieces = list(ids)
    return [(pieces[left], pieces[right]) for _, left, right in sorted(found)]


def _wordpiece_files(spec: dict[str, Any]) -> dict[str, bytes]:
    ids = _ids(spec)
    rows = [""] * (max(ids.values()) + 1)
    for piece, i in ids.items():
        rows[i] = piece
    # A row without a piece is written as BERT's vocabularies call it; no text yields it.
    lines = [piece or f"[unused-{i}]" for i, piece in enumerate(rows)]
    rules = spec["normalizer"] or {}
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": rules.get("lowercase", True),
        "strip_accents": rules.get("strip_accents"),
        "tokenize_chinese_chars": rules.get("handle_chinese_chars", True),
    }
    return {"vocab.txt": "\n".join([*lines, ""]).encode(), _CONFIG: _bytes(settings)}


def _roberta_files(spec: dict[str, Any]) -> dict[str, bytes]:
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False}
    return {
        "vocab.json": json.dumps(_ids(spec), ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        _CONFIG: _bytes(settings),
    }


def _ids(spec: dict[str, Any]) -> dict[str, int]:
    """Every piece of a tokenizer.json and its id, added ones too, by id."""
    ids = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _bytes(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=1) + "\n").encode()
