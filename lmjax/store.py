# SPDX-License-Identifier: Apache-2.0
"""The token store: every document tokenised once, flat on disk, sealed by counts and hashes.

A store is a folder: `manifest.json`, a copy of the tokenizer, and four files a split,
    SPLIT.tokens   uint16 or uint32, the documents one after the other, each behind `eot`
    SPLIT.starts   int64[documents + 1], where each document starts in the tokens
    SPLIT.bytes    int64[documents], the UTF-8 bytes of each document
    SPLIT.ids      the documents' ids, one a line
all little-endian. It is built beside its place and renamed into it at the end, so what has the
store's name is whole; the manifest holds every size and hash, and a hash of itself.
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from lmjax.document import Document, Report
from lmjax.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
BATCH_BYTES = 1 << 20
_COLUMNS = {"tokens": None, "starts": "<i8", "bytes": "<i8", "ids": None}
_COUNTS = ("documents", "tokens", "bytes", "unknown")
_SCAN = 1 << 24
_ABSENT = object()

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Split:
    """The documents of one split.

    tokens: uint16 or uint32[tokens], memory-mapped. starts: int64[documents + 1]; document i is
    tokens[starts[i] : starts[i + 1]] and begins with the end-of-text id, where there is one.
    document_bytes: int64[documents], of the text in UTF-8. It pickles as paths, not as tokens.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    document_bytes: np.ndarray
    ids_path: Path
    n_bytes: int
    eot: int | None

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in vars(self).items() if k != "circle"}
        if isinstance(self.tokens, np.memmap):
            state["tokens"] = (self.tokens.filename, self.tokens.dtype.str)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["tokens"], tuple):
            path, dtype = state["tokens"]
            state["tokens"] = np.memmap(path, dtype, mode="r")
        vars(self).update(state)

    @cached_property
    def circle(self) -> np.ndarray:
        """Starts of the documents on two turns of the stream taken as a circle, int64."""
        return np.concatenate([self.starts[:-1], self.starts[:-1] + len(self.tokens)])

    @property
    def n_tokens(self) -> int:
        """Tokens, end-of-text ids included."""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """Documents."""
        return len(self.document_bytes)

    def document_ids(self) -> list[str]:
        """The ids of all documents, in order; read from disk at each call."""
        return self.ids_path.read_text("utf-8").split("\n")[:-1]


@dataclass(frozen=True)
class Store:
    """An open, verified store."""

    directory: Path
    splits: dict[str, Split]
    vocab: int
    eot: int | None
    tokenizer: Tokenizer
    manifest: dict[str, Any]


def build_store(
    directory: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    spec: dict[str, Any],
    split: Callable[[Document], str],
    progress: Progress | None = None,
    *,
    report: Report | None = None,
    sources: Sequence[tuple[str, int]] = (),
    total_bytes: int | None = None,
) -> None:
    """Tokenises documents into a new store at `directory`, which must not exist.

    `spec` says what the store was made from and is asked for again by `open_store`; `split`
    names the split of a document; `progress(done, total)` counts bytes of text. `report` is
    filled by whoever yields the documents, and its lines are kept with `sources`.
    Errors: ValueError for an occupied folder and where there are no documents.
    """
    with building(directory) as folder:
        shutil.copytree(tokenizer.directory, folder / TOKENIZER)
        fill_store(
            folder, documents, tokenizer, spec, split, progress,
            report=report, sources=sources, total_bytes=total_bytes,
        )  # fmt: skip


def fill_store(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    spec: dict[str, Any],
    split: Callable[[Document], str],
    progress: Progress | None = None,
    *,
    report: Report | None = None,
    sources: Sequence[tuple[str, int]] = (),
    total_bytes: int | None = None,
) -> None:
    """`build_store` inside a folder of `building`, where the tokenizer lies already."""
    dtype = "<u2" if tokenizer.vocab <= 1 << 16 else "<u4"
    writers: dict[str, _SplitWriter] = {}
    done = 0
    with ExitStack() as opened:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                name = split(document)
                if name not in writers:
                    writers[name] = _SplitWriter(folder, name, dtype, tokenizer, opened)
                writers[name].add(document, ids)
                done += len(document.text)
            if progress:
                progress(done, total_bytes)
        splits = {name: writers[name].finish() for name in sorted(writers)}
    lines = report.lines() if report else []
    if not splits:
        raise ValueError("there are no documents" + "".join(f"; {line}" for line in lines))
    manifest = {
        "format": FORMAT,
        "spec": plain(spec),
        "sources": plain(sources),
        "dtype": dtype,
        "vocab": tokenizer.vocab,
        "eot": tokenizer.eot,
        "unknown": tokenizer.unknown,
        "tokenizer": tokenizer.fingerprint,
        "splits": splits,
        "totals": {key: sum(facts[key] for facts in splits.values()) for key in _COUNTS},
        "report": lines,
    }
    manifest["seal"] = _seal(manifest)
    _write_durably(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def open_store(directory: Path, spec: dict[str, Any] | None = None) -> Store:
    """Opens a store after checking every size, hash and id; `spec`, when given, must be its own.

    Errors: ValueError naming the file at fault, or the keys of the spec that differ.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if spec is not None and (changes := _differences(manifest["spec"], plain(spec))):
        raise ValueError(
            f"{directory} was built from other data settings (stored -> asked for):"
            f" {'; '.join(changes)}. Ask for the stored ones, name another store, or delete the"
            " folder to rebuild it"
        )
    tokenizer = load_tokenizer(directory / TOKENIZER)
    if tokenizer.fingerprint != manifest["tokenizer"]:
        raise damaged(directory / TOKENIZER, "is not the tokenizer that made the tokens")
    splits = {name: _open_split(directory, name, manifest) for name in manifest["splits"]}
    return Store(directory, splits, manifest["vocab"], manifest["eot"], tokenizer, manifest)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a store, its seal checked. Errors: ValueError."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        sealed = manifest.pop("seal") == _seal(manifest)
        version = manifest["format"]
    except FileNotFoundError:
        raise damaged(path, "is missing: the store is unfinished, or none") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise damaged(path, "is not a manifest") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not sealed:
        raise damaged(path, "was changed after the store was built")
    if version != FORMAT:
        raise damaged(path, f"has format {version}, and this lmjax reads {FORMAT}")
    return manifest


def damaged(path: Path, what: str) -> ValueError:
    """The error for a file of a store that cannot be trusted, with the way out."""
    folder = path.parent
    return ValueError(f"{path} {what}; delete the folder {folder} to have it rebuilt")


def plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples become lists, keys become strings."""
    return json.loads(json.dumps(value))


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


class _SplitWriter:
    def __init__(
        self, folder: Path, name: str, dtype: str, tokenizer: Tokenizer, opened: ExitStack
    ):
        assert name in ("train", "validation", "test"), name
        files = {column: _HashedFile(folder / f"{name}.{column}") for column in _COLUMNS}
        self._files = {column: opened.enter_context(closing(f)) for column, f in files.items()}
        self._dtype, self._vocab, self._unknown = dtype, tokenizer.vocab, tokenizer.unknown
        self._lead = [] if tokenizer.eot is None else [tokenizer.eot]
        self._facts = dict.fromkeys(_COUNTS, 0)
        self._put("starts", [0])

    def _put(self, column: str, values: Any) -> None:
        self._files[column].write(np.asarray(values, _COLUMNS[column] or self._dtype).tobytes())

    def add(self, document: Document, ids: np.ndarray) -> None:
        assert not len(ids) or (ids.min() >= 0 and ids.max() < self._vocab), "id out of vocabulary"
        assert "\n" not in document.id, document.id
        facts = self._facts
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

    def finish(self) -> dict[str, Any]:
        files = {column: file.finish() for column, file in self._files.items()}
        return {**self._facts, "files": files}


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_durably(path: Path, content: bytes) -> None:
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


def _open_split(directory: Path, name: str, manifest: dict[str, Any]) -> Split:
    facts = manifest["splits"][name]
    for entry in facts["files"].values():
        _verify(directory / entry["name"], entry)
    path = {column: directory / entry["name"] for column, entry in facts["files"].items()}
    starts = np.fromfile(path["starts"], "<i8")
    sizes = np.fromfile(path["bytes"], "<i8")
    tokens = np.zeros(0, manifest["dtype"])
    if facts["tokens"]:
        tokens = np.memmap(path["tokens"], manifest["dtype"], mode="r")
    if len(tokens) != facts["tokens"] or len(sizes) != facts["documents"]:
        raise damaged(path["tokens"], "does not hold the tokens that the manifest counts")
    bounds = len(starts) == len(sizes) + 1 and starts[0] == 0 and starts[-1] == len(tokens)
    if not bounds or (np.diff(starts) < 0).any():
        raise damaged(path["starts"], "does not divide the tokens into documents")
    for at in range(0, len(tokens), _SCAN):
        if int(tokens[at : at + _SCAN].max()) >= manifest["vocab"]:
            raise damaged(path["tokens"], f"has ids beyond the vocabulary of {manifest['vocab']}")
    return Split(name, tokens, starts, sizes, path["ids"], facts["bytes"], manifest["eot"])


def _verify(path: Path, entry: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise damaged(path, f"has {size:,} bytes and had {entry['bytes']:,} when built")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    if digest != entry["sha256"]:
        raise damaged(path, "was changed after the store was built")


def _differences(stored: Any, asked: Any, key: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(asked, dict):
        found = []
        for name in sorted({*stored, *asked}):
            inner = f"{key}.{name}" if key else name
            found += _differences(stored.get(name, _ABSENT), asked.get(name, _ABSENT), inner)
        return found
    return [] if stored == asked else [f"{key} {_shown(stored)} -> {_shown(asked)}"]


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
