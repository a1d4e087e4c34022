# SPDX-License-Identifier: Apache-2.0
"""The token store: every document tokenised once, flat on disk, sealed by counts and hashes.

A store is a folder: `manifest.json`, a copy of the tokenizer, and four or six files a split,
    SPLIT.tokens   uint16 or uint32, the documents one after the other, each behind `eot`
    SPLIT.starts   int64[documents + 1], where each document starts in the tokens
    SPLIT.bytes    int64[documents], the UTF-8 bytes of each document
    SPLIT.ids      the documents' ids, one a line
    SPLIT.sentences  int64, where each sentence starts in the tokens; only with units
    SPLIT.marks    uint8[tokens], the bits WORD, ENTITY and LABEL, 0 at `eot`; only with units
all little-endian. It is built beside its place and renamed into it at the end, so what has the
store's name is whole; the manifest holds every size and hash, and a hash of itself.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.document import Document, Report
from lmjax.store_build import (
    COUNTS,
    Occupied,
    SplitWriter,
    batches,
    building,
    is_occupied,
    manifest_fault,
    write_durably,
)
from lmjax.tokenizer import Tokenizer, load_tokenizer
from lmjax.units import Units, reader

__all__ = [
    "TOKENIZER",
    "Occupied",
    "Progress",
    "Split",
    "Store",
    "build_store",
    "building",
    "damaged",
    "fill_store",
    "is_occupied",
    "open_store",
    "plain",
    "read_manifest",
]

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
_SCAN = 1 << 24
_ABSENT = object()
_CACHED = ("circle", "memo")  # what a split computes for itself does not travel
_MAPPED = ("tokens", "marks")

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Split:
    """The documents of one split.

    tokens: uint16 or uint32[tokens], memory-mapped. starts: int64[documents + 1]; document i is
    tokens[starts[i] : starts[i + 1]] and begins with the end-of-text id, where there is one.
    document_bytes: int64[documents], of the text in UTF-8. vocab: of the tokenizer, and its
    controls. tokenizer: its folder. It pickles as paths, not as tokens.

    With units, else None: sentences: int64, where each sentence starts, ascending; one ends where
    the next one starts or its document ends. marks: uint8[tokens] of WORD, ENTITY and LABEL,
    memory-mapped.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    document_bytes: np.ndarray
    ids_path: Path
    n_bytes: int
    eot: int | None
    sentences: np.ndarray | None = None
    marks: np.ndarray | None = None
    vocab: int = 0
    controls: dict[str, int] = field(default_factory=dict)
    tokenizer: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in vars(self).items() if k not in _CACHED}
        for name in _MAPPED:
            if isinstance(values := state[name], np.memmap):
                state[name] = (values.filename, values.dtype.str)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in _MAPPED:
            if isinstance(state[name], tuple):
                path, dtype = state[name]
                state[name] = np.memmap(path, dtype, mode="r")
        vars(self).update(state)

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What example makers computed from this split and keep, by keys of their own."""
        return {}

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
    units: Units | None = None,
    report: Report | None = None,
    sources: Sequence[tuple[str, int]] = (),
    total_bytes: int | None = None,
) -> None:
    """Tokenises documents into a new store at `directory`, which must not exist.

    `spec` says what the store was made from and is asked for again by `open_store`; `split`
    names the split of a document; `progress(done, total)` counts bytes of text; `units` adds
    sentences and marks. `report` is filled by whoever yields
    the documents, and its lines are kept with `sources`.
    Errors: ValueError for an occupied folder and where there are no documents.
    """
    with building(directory) as folder:
        shutil.copytree(tokenizer.directory, folder / TOKENIZER)
        fill_store(
            folder, documents, tokenizer, spec, split, progress,
            units=units, report=report, sources=sources, total_bytes=total_bytes,
        )  # fmt: skip


def fill_store(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    spec: dict[str, Any],
    split: Callable[[Document], str],
    progress: Progress | None = None,
    *,
    units: Units | None = None,
    report: Report | None = None,
    sources: Sequence[tuple[str, int]] = (),
    total_bytes: int | None = None,
) -> None:
    """`build_store` inside a folder of `building`, where the tokenizer lies already."""
    dtype = "<u2" if tokenizer.vocab <= 1 << 16 else "<u4"
    encode = tokenizer.encode_documents if units is None else reader(units, tokenizer)
    writers: dict[str, SplitWriter] = {}
    done = 0
    with ExitStack() as opened:
        for batch in batches(documents):
            for document, encoded in zip(batch, encode(batch), strict=True):
                name = split(document)
                if name not in writers:
                    marked = encoded.marks is not None
                    writers[name] = SplitWriter(folder, name, dtype, tokenizer, opened, marked)
                writers[name].add(document, encoded)
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
        "totals": {key: sum(facts[key] for facts in splits.values()) for key in COUNTS},
        "report": lines,
    }
    manifest["seal"] = _seal(manifest)
    write_durably(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


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
    splits = {
        name: _open_split(directory, name, manifest, tokenizer.controls)
        for name in manifest["splits"]
    }
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
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise damaged(path, "is not a manifest") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not sealed:
        raise damaged(path, "was changed after the store was built")
    if version != FORMAT:
        raise damaged(path, f"has format {version}, and this lmjax reads {FORMAT}")
    if fault := manifest_fault(manifest):
        raise damaged(path, f"describes no store ({fault})")
    return manifest


def damaged(path: Path, what: str) -> ValueError:
    """The error for a file of a store that cannot be trusted, with the way out."""
    folder = path.parent
    return ValueError(f"{path} {what}; delete the folder {folder} to have it rebuilt")


def plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples become lists, keys become strings."""
    return json.loads(json.dumps(value))


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _open_split(
    directory: Path, name: str, manifest: dict[str, Any], controls: dict[str, int]
) -> Split:
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
    sentences, marks = _open_units(path, starts, manifest["eot"] is not None)
    return Split(
        name, tokens, starts, sizes, path["ids"], facts["bytes"], manifest["eot"],
        sentences, marks, manifest["vocab"], dict(controls), directory / TOKENIZER,
    )  # fmt: skip


def _open_units(
    path: dict[str, Path], starts: np.ndarray, led: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    if "marks" not in path:
        return None, None
    size = int(starts[-1])
    marks = np.memmap(path["marks"], np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    if len(marks) != size:
        raise damaged(path["marks"], "does not hold a mark for each of the tokens")
    sentences = np.fromfile(path["sentences"], "<i8")
    inside = not len(sentences) or (sentences[0] >= 0 and sentences[-1] < size)
    if not inside or (np.diff(sentences) <= 0).any() or (led and np.isin(sentences, starts).any()):
        raise damaged(path["sentences"], "does not divide the documents into sentences")
    return sentences, marks


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
