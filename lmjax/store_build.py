# SPDX-License-Identifier: Apache-2.0
"""How a store comes to be: files hashed while they are written, in a folder that takes its place
when it is whole."""

import fcntl
import glob
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from lmjax.document import Document
from lmjax.tokenizer import Encoded, Tokenizer

BATCH_BYTES = 1 << 20
SPLITS = ("train", "validation", "test")
COUNTS = ("documents", "tokens", "bytes", "unknown")
_COLUMNS = {"tokens": "", "starts": "<i8", "bytes": "<i8", "ids": ""}
_UNITS = {"sentences": "<i8", "marks": "u1"}
_TOKEN_TYPES = {"<u2": 2, "<u4": 4}


def is_occupied(directory: Path) -> bool:
    """Whether something stands where a store would go: a file, or a folder with content."""
    return directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))


class Occupied(ValueError):
    """The place of a new store is taken."""


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path):
        self._file: IO[bytes] = open(path, "xb")
        self._digest, self._size, self.name = hashlib.sha256(), 0, path.name

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._size += len(content)

    def finish(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return {"name": self.name, "bytes": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()


class SplitWriter:
    """The files of one split, document by document; with sentences and marks if `units`."""

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: str,
        tokenizer: Tokenizer,
        opened: ExitStack,
        units: bool,
    ):
        assert name in SPLITS, name
        self._types = {**_COLUMNS, "tokens": dtype, **(_UNITS if units else {})}
        files = {column: _HashedFile(folder / f"{name}.{column}") for column in self._types}
        self._files = {column: opened.enter_context(closing(f)) for column, f in files.items()}
        self._vocab, self._unknown = tokenizer.vocab, tokenizer.unknown
        self._lead = [] if tokenizer.eot is None else [tokenizer.eot]
        self._facts = dict.fromkeys(COUNTS, 0)
        self._put("starts", [0])

    def _put(self, column: str, values: Any) -> None:
        self._files[column].write(np.asarray(values, self._types[column]).tobytes())

    def add(self, document: Document, encoded: Encoded) -> None:
        """Writes one document behind the id that goes before each."""
        ids = encoded.ids
        assert not len(ids) or (ids.min() >= 0 and ids.max() < self._vocab), "id out of vocabulary"
        assert "\n" not in document.id, document.id
        facts = self._facts
        if "marks" in self._types:
            self._add_units(encoded, facts["tokens"] + len(self._lead))
        facts["documents"] += 1
        facts["tokens"] += len(self._lead) + len(ids)
        facts["bytes"] += len(document.text)
        if self._unknown is not None:
            facts["unknown"] += int((ids == self._unknown).sum())
        self._put("tokens", self._lead)
        self._put("tokens", ids)
        self._put("starts", [facts["tokens"]])
        self._put("bytes", [len(document.text)])
        self._files["ids"].write(document.id.encode() + b"\n")

    def _add_units(self, encoded: Encoded, start: int) -> None:
        sentences, marks = encoded.sentences, encoded.marks
        assert sentences is not None and marks is not None and len(marks) == len(encoded.ids)
        self._put("sentences", sentences + start)
        self._put("marks", np.zeros(len(self._lead)))
        self._put("marks", marks)

    def finish(self) -> dict[str, Any]:
        """Closes the files; returns what the manifest says of the split."""
        files = {column: file.finish() for column, file in self._files.items()}
        return {**self._facts, "files": files}


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in lists of about a MiB of text."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def manifest_fault(manifest: dict[str, Any]) -> str:
    """What a manifest says that no builder writes; "" for nothing.

    A seal proves only that nothing changed by accident: names that lead elsewhere, types and sizes
    are checked before anything is opened by them.
    """
    if manifest.get("dtype") not in list(_TOKEN_TYPES):
        return "dtype"
    for key in ("vocab", "eot", "unknown"):
        value = manifest.get(key, "")
        if not (_is_count(value) or (value is None and key != "vocab")):
            return key
    if not isinstance(manifest.get("tokenizer"), str):
        return "tokenizer"
    if not all(isinstance(manifest.get(key), list) for key in ("sources", "report")):
        return "sources, report"
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in manifest["sources"]):
        return "sources"
    splits = manifest.get("splits")
    if not isinstance(splits, dict) or "spec" not in manifest or not splits.keys() <= set(SPLITS):
        return "splits, spec"
    for name, facts in splits.items():
        if not isinstance(facts, dict) or not all(_is_count(facts.get(key)) for key in COUNTS):
            return f"counts of {name}"
        if fault := _files_fault(name, facts, _TOKEN_TYPES[manifest["dtype"]]):
            return f"{fault} of {name}"
    return ""


def _files_fault(split: str, facts: dict[str, Any], width: int) -> str:
    files = facts.get("files")
    if not isinstance(files, dict) or files.keys() not in (set(_COLUMNS), {*_COLUMNS, *_UNITS}):
        return "files"
    tokens, documents = facts["tokens"], facts["documents"]
    sizes = {"tokens": width * tokens, "starts": 8 * (documents + 1), "bytes": 8 * documents}
    sizes["marks"] = tokens
    for column, entry in files.items():
        if not isinstance(entry, dict) or entry.get("name") != f"{split}.{column}":
            return column
        if not _is_count(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
            return column
        if entry["bytes"] != sizes.get(column, entry["bytes"]):
            return f"size of {column}"
    return "size of sentences" if files.get("sentences", {"bytes": 0})["bytes"] % 8 else ""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def write_durably(path: Path, content: bytes) -> None:
    """Writes a new file through to the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def building(directory: Path) -> Iterator[Path]:
    """A fresh folder beside `directory` that takes its place when the block ends well.

    One builder at a time: a second one waits here, then finds the place taken. Errors: Occupied.
    """
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    stem = f".{directory.name}.building-"
    with open(parent / f".{directory.name}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_occupied(directory):
            raise Occupied(f"{directory} is in the way: a store is built where nothing stands yet")
        # Whoever holds the lock is the only living builder: the rest are leftovers of dead ones.
        for leftover in parent.glob(f"{glob.escape(stem)}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = parent / f"{stem}{os.getpid()}"
        folder.mkdir()
        try:
            yield folder
            _sync_folder(folder)
            os.rename(folder, directory)
            _sync_folder(parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
