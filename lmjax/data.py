# SPDX-License-Identifier: Apache-2.0
"""The data of a recipe: corpus, tokenizer, splits; made into a sealed store once, then reused."""

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmjax.document import (
    Document,
    Report,
    id_position,
    pieces,
    redacted,
    split_of,
    whole_id,
)
from lmjax.store import (
    TOKENIZER,
    Occupied,
    Progress,
    Store,
    build_store,
    building,
    fill_store,
    is_occupied,
    open_store,
)
from lmjax.text import Corpus, changed_source, corpus_from_string, steady
from lmjax.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer
from lmjax.units import Units

_HASH_ORDER = ("test", "validation", "train")
SAMPLE_BYTES = 16 << 10


@dataclass(frozen=True)
class Prepared:
    """What training reads: the sealed store and the tokenizer that made it."""

    store: Store
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Data:
    """Where text comes from, how it becomes tokens, and which part of it is held out.

    examples: the example maker; opaque here. validation, test: shares, in [0, 1).
    split: "documents" puts each document into one split by the hash of its id; "tail" gives the
        first characters of every document to train and the last ones to validation, then test.
    held_out: patterns of document ids, such as "book_9.txt" or "news*", with commas between them;
        what matches is the validation split, instead of a share.
    store: the folder of the token store; "" is `data` in the run's own folder.
    units: also keeps sentences and words, which the examples of encoders are made of.
    """

    corpus: Corpus = field(metadata={"parse": corpus_from_string})
    tokenizer: TokenizerSpec
    examples: Any
    validation: float = 0.05
    test: float = 0.05
    split: Literal["documents", "tail"] = "documents"
    held_out: str = ""
    store: str = ""
    units: Units | None = None

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: a share from 0 up to 1")
        if self.validation + self.test >= 1:
            raise ValueError(
                f"data.validation={self.validation} and data.test={self.test} leave no training"
                " split: together they must stay below 1"
            )
        if self.split not in ("documents", "tail"):
            raise ValueError(f"data.split={self.split!r}: one of documents, tail")

    def prepare(
        self,
        workdir: Path,
        progress: Progress | None = None,
        say: Callable[[str], Any] = print,
    ) -> Prepared:
        """Opens the store of this data, building it where there is none.

        `progress(done, total)` counts bytes of text while building; `say` takes the report, a
        line at a time. Errors: ValueError for bad input, a store of other settings, a changed
        source.
        """
        folder, spec = self.folder(workdir), self.spec()
        if built := not is_occupied(folder):
            # Another process may build the same store; the one that waited opens the result.
            with suppress(Occupied):
                self._build(folder, spec, progress)
        prepared = open_prepared(folder, spec)
        if built:
            for line in prepared.store.manifest["report"]:
                say(line)
        else:
            self._check_sources(prepared.store, say)
        for line in summary(prepared.store):
            say(line)
        return prepared

    def folder(self, workdir: Path) -> Path:
        """Where the store of a run in `workdir` lies."""
        return local_folder("data.store", self.store) if self.store else Path(workdir) / "data"

    def spec(self) -> dict[str, Any]:
        """What the store depends on: a change of any of it is another store."""
        return {
            "corpus": _described(self.corpus),
            "tokenizer": _described(self.tokenizer),
            "validation": self.validation,
            "test": self.test,
            "split": self.split,
            **({"held_out": self.held_out} if self.held_out else {}),
            **_units_spec(self.units),
        }

    def documents(self, report: Report) -> Iterator[Document]:
        """The corpus, with the documents that `held_out` names in the validation split."""
        patterns = [p.strip() for p in self.held_out.split(",") if p.strip()]
        unused, last = set(patterns), ""
        for document in self.corpus.documents(report):
            found = [p for p in patterns if fnmatchcase(whole_id(document.id), p)]
            unused.difference_update(found)
            last = document.id
            yield replace(document, split="validation") if found else document
        if unused:
            raise ValueError(
                f"data.held_out: no document has an id like {', '.join(sorted(unused))}; the last"
                f" one is called {last!r}"
            )

    def _build(self, folder: Path, spec: dict[str, Any], progress: Progress | None) -> None:
        with building(folder) as unfinished:
            sources = self.corpus.sources()
            plan = survey(self)
            documents = plan.divide(self.documents(Report()))
            texts = (document.text for document in documents if document.split == "train")
            limit = getattr(self.tokenizer, "train_bytes", None)
            self.tokenizer.build(_sample(texts, plan.bytes["train"], limit), unfinished / TOKENIZER)
            report = Report()
            fill_store(
                unfinished,
                steady(plan.divide(self.documents(report)), self.corpus, sources),
                load_tokenizer(unfinished / TOKENIZER),
                spec,
                lambda document: document.split or "train",
                progress,
                units=self.units,
                report=report,
                sources=sources,
                total_bytes=sum(plan.bytes.values()),
            )

    def _check_sources(self, store: Store, say: Callable[[str], Any]) -> None:
        try:
            now = self.corpus.sources()
        except (ValueError, OSError) as error:
            say(f"the corpus cannot be read any more ({error}); using its sealed store")
            return
        if changed := changed_source(store.manifest["sources"], now):
            raise ValueError(
                f"the corpus changed since {store.directory} was built: {changed}. Delete that"
                " folder to rebuild it, or name another with --data.store"
            )


def local_folder(key: str, text: str | Path) -> Path:
    """The folder of this machine that a key names; it need not exist yet.

    Raises:
      ValueError: no name, the address of a bucket (a Path has lost one of its slashes), or a file.
    """
    name = str(text)
    if not name.strip() or "\0" in name:
        raise ValueError(f"--{key}={name!r}: name a folder, such as runs/first")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", name):
        raise ValueError(
            f"--{key}={redacted(name)}: a folder of this machine is needed; mount the bucket,"
            " e.g. with gcsfuse, and name the folder where it is mounted"
        )
    folder = Path(os.path.expanduser(name))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--{key}={name} is a file; name a folder, new or old")
    return folder


def open_prepared(folder: Path, spec: dict[str, Any] | None = None) -> Prepared:
    """Opens a store and its tokenizer; `spec`, when given, must be the store's own."""
    folder = Path(folder)
    store = open_store(folder, spec)
    return Prepared(store, store.tokenizer)


def hold_out(
    corpus: Corpus,
    tokenizer: Tokenizer,
    workdir: Path,
    progress: Progress | None = None,
    units: Units | None = None,
) -> Prepared:
    """All of another corpus as one test split, in the tokens and units of a trained model.

    Its store is a folder of its own in `workdir`, named by the hash of what it was made from.
    """
    spec = {"corpus": _described(corpus), "tokenizer": tokenizer.fingerprint, "split": "test"}
    spec |= _units_spec(units)
    sources = corpus.sources()
    name = hashlib.sha256(json.dumps([spec, sources]).encode()).hexdigest()[:12]
    folder = Path(workdir) / f"data-{name}"
    if not is_occupied(folder):
        report = Report()
        build_store(
            folder, steady(corpus.documents(report), corpus, sources), tokenizer, spec,
            lambda _: "test", progress, units=units, report=report, sources=sources,
        )  # fmt: skip
    return open_prepared(folder, spec)


def summary(store: Store) -> list[str]:
    """One line a split: documents, bytes, tokens, and bytes a token."""
    lines = []
    for name in ("train", "validation", "test"):
        if name in store.splits:
            split = store.splits[name]
            unknown = store.manifest["splits"][name]["unknown"]
            lines.append(
                f"{name}: {split.n_documents:,} documents, {split.n_bytes:,} bytes,"
                f" {split.n_tokens:,} tokens ({split.n_bytes / split.n_tokens:.2f} bytes a token)"
                + (f", {unknown:,} of them unknown" if unknown else "")
            )
    return lines


@dataclass(frozen=True)
class Plan:
    """Which split every document of a corpus belongs to, settled before anything is built.

    shares: of the documents that bring no split of their own. moved: documents, by the position
    of their id, that fill a split which the hash left empty. bytes: of text in each split.
    """

    split: str
    shares: dict[str, float]
    moved: dict[float, str]
    bytes: Counter[str]

    def divide(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents with their splits set; "tail" makes up to three of one."""
        for document in documents:
            if document.split:
                yield document
            elif self.split == "tail":
                yield from _tail(document, self.shares["validation"], self.shares["test"])
            else:
                yield replace(document, split=self._split(document.id))

    def _split(self, document_id: str) -> str:
        moved = self.moved.get(id_position(document_id)) if self.moved else None
        return moved or split_of(document_id, self.shares["validation"], self.shares["test"])


def survey(data: Data) -> Plan:
    """Reads the whole corpus once to settle its splits; bad input ends here, before any work.

    Keeps 16 bytes a document. Errors: ValueError where there are fewer documents than splits.
    """
    positions, sizes = array("d"), array("q")
    own: Counter[str] = Counter()
    report = Report()
    for document in data.documents(report):
        if document.split:
            own[document.split] += len(document.text)
        else:
            positions.append(id_position(document.id))
            sizes.append(len(document.text))
    shares = {name: 0.0 if name in own else getattr(data, name) for name in ("validation", "test")}
    where, weight = np.asarray(positions, np.float64), np.asarray(sizes, np.int64)
    if data.split == "tail":
        held = {name: int(weight.sum() * share) for name, share in shares.items()}
        own.update({**held, "train": int(weight.sum()) - sum(held.values())})
        return Plan(data.split, shares, {}, _checked(own, report))
    ends = np.cumsum([shares["test"], shares["validation"]])
    splits = np.searchsorted(ends, where, side="right")  # 0 test, 1 validation, 2 train
    moved = _fill_empty(where, splits, ends, shares, report) if len(where) else {}
    for position, name in moved.items():
        splits[where == position] = _HASH_ORDER.index(name)
    for index, name in enumerate(_HASH_ORDER):
        own[name] += int(weight[splits == index].sum())
    return Plan(data.split, shares, moved, _checked(own, report))


def _checked(sizes: Counter[str], report: Report) -> Counter[str]:
    if not sizes["train"]:
        raise ValueError(f"there is no text to train on: {'; '.join(report.lines())}")
    return sizes


def _fill_empty(
    where: np.ndarray,
    splits: np.ndarray,
    ends: np.ndarray,
    shares: dict[str, float],
    report: Report,
) -> dict[float, str]:
    """Documents for the splits that the hash left empty: those whose position is the nearest.

    where: float64[documents] in [0, 1). splits: int[documents], indices of `_HASH_ORDER`.
    """
    where, first = np.unique(where, return_index=True)
    splits = splits[first]
    wanted = [i for i, name in enumerate(_HASH_ORDER) if shares.get(name, 1.0) > 0]
    if len(where) < len(wanted):
        raise ValueError(
            f"the corpus has {len(where)} document{'s' * (len(where) != 1)} for {len(wanted)}"
            f" splits ({report.bytes:,} bytes), and a document is never in two: cut it into more"
            " (--data.corpus.document=line), hold out the end of each (--data.split=tail), or"
            " hold out nothing (--data.validation=0 --data.test=0)"
        )
    moved: dict[float, str] = {}
    for index in wanted:
        if (splits == index).any():
            continue
        low, high = (0.0, *ends)[index], (*ends, 1.0)[index]
        distance = np.maximum(np.maximum(low - where, where - high), 0)
        # A split that has one document keeps it.
        distance[np.bincount(splits, minlength=3)[splits] < 2] = np.inf
        nearest = int(distance.argmin())
        splits[nearest] = index
        moved[float(where[nearest])] = _HASH_ORDER[index]
    return moved


def _tail(document: Document, validation: float, test: float) -> Iterator[Document]:
    text = document.text.decode()
    # Rounded first: 1 - 0.05 - 0.05 is a hair below 0.9, and a cut must not notice.
    cuts = [int(len(text) * round(1 - share, 12)) for share in (validation + test, test)]
    parts = (text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :])
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        if part:
            yield Document(document.id, part.encode(), name)


def _sample(texts: Iterator[bytes], total: int, limit: int | None) -> Iterator[bytes]:
    """Pieces that make up about `limit` of `total` bytes, taken evenly from all over."""
    if limit is None or total <= limit:
        yield from texts
        return
    credit = 0.0
    for text in texts:
        for piece in pieces(text, SAMPLE_BYTES):
            credit += len(piece) * limit / total
            if credit >= len(piece):
                credit -= len(piece)
                yield piece


def _described(value: Any) -> dict[str, Any]:
    assert is_dataclass(value) and not isinstance(value, type), value
    young = {f.name for f in fields(value) if f.metadata.get("young")}
    at_default = {f.name for f in fields(value) if getattr(value, f.name) == f.default}
    kept = {name: part for name, part in asdict(value).items() if name not in young & at_default}
    return {"class": type(value).__name__, **kept}


def _units_spec(units: Units | None) -> dict[str, Any]:
    # A store without units is described as before there were any.
    return {} if units is None else {"units": units.spec()}
