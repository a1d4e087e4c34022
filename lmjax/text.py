# SPDX-License-Identifier: Apache-2.0
"""Corpora: where documents come from. Each yields them in a fixed order, under stable ids."""

import ast
import difflib
import functools
import glob
import inspect
import os
import platform
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from lmjax.document import (
    BadRecord,
    Document,
    Report,
    cut_documents,
    invalid_utf8,
    is_blank,
    redacted,
    split_of,
    visible,
)
from lmjax.text_bytes import BadFile
from lmjax.text_files import DocumentRule, TextFile, nearest

__all__ = [
    "BadFile",
    "BadRecord",
    "Builtin",
    "Corpus",
    "Document",
    "Files",
    "Report",
    "TFDS",
    "changed_source",
    "corpus_from_string",
    "split_of",
    "steady",
]

MANY_FILES = 10
_SPLITS = ("train", "validation", "test")
_NO_PROSE = {
    "__pycache__", "_bundled", "dist-packages", "encodings", "idle_test", "lib-dynload",
    "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip


class Corpus(Protocol):
    """What `Data` asks of a corpus; any frozen dataclass with these two methods will do."""

    def documents(self, report: Report) -> Iterator[Document]:
        """The documents in a fixed order, counting them and what is dropped in `report`."""
        ...

    def sources(self) -> list[tuple[str, int]]:
        """(name, bytes) of what the corpus is made of; cheap, to notice a changed source."""
        ...


def changed_source(old: Iterable[Iterable[Any]], new: Iterable[Iterable[Any]]) -> str:
    """The first of some (name, bytes) that is another than it was, in words; "" for none."""
    before, now = dict(map(tuple, old)), dict(map(tuple, new))
    for name in [*before, *now]:
        if before.get(name) != now.get(name):
            sizes = (f"{s[name]:,} bytes" if name in s else "absent" for s in (before, now))
            return f"{name} ({' -> '.join(sizes)})"
    return ""


def steady(
    documents: Iterator[Document], corpus: Corpus, sources: list[tuple[str, int]]
) -> Iterator[Document]:
    """The documents; ValueError after the last if the corpus is no more what `sources` says."""
    yield from documents
    if changed := changed_source(sources, corpus.sources()):
        raise ValueError(
            f"the corpus changed while it was read: {changed}; start again when nothing writes to"
            " it any more"
        )


@dataclass(frozen=True)
class Builtin:
    """The documentation of the running Python: help topics and docstrings, about 2 MB of prose."""

    def documents(self, report: Report) -> Iterator[Document]:
        """One document a help topic, then one a module; nothing is imported but the topics."""
        for name, text in _python_documentation():
            yield from cut_documents(Document(name, text), report)

    def sources(self) -> list[tuple[str, int]]:
        """The version of Python, with the size of the library's source."""
        size = sum(path.stat().st_size for path in _library_modules())
        return [(f"Python {platform.python_version()} library", size)]


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _library_modules() -> list[Path]:
    root, found = _library(), []
    for folder, folders, files in os.walk(root):
        folders[:] = [n for n in folders if n not in _NO_PROSE and not n.startswith("config-")]
        # Sitecustomize and the build's own tables are of the machine, not of Python.
        found += [
            Path(folder, name)
            for name in files
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize"))
        ]
    return sorted(found)


@functools.lru_cache(maxsize=1)
def _python_documentation() -> tuple[tuple[str, bytes], ...]:
    # Parsing the library takes seconds and a build reads its corpus three times.
    from pydoc_data.topics import topics

    found = [(f"topics/{name}", text.strip().encode()) for name, text in sorted(topics.items())]
    for path in _library_modules():
        module = path.relative_to(_library()).with_suffix("").as_posix().replace("/", ".")
        module = module.removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # the library ships templates and deliberately broken sources
        text = "\n\n".join(_docstrings(tree, module)).encode("utf-8", "replace")
        if not is_blank(text):
            found.append((f"library/{module}", text))
    return tuple(found)


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """The docstrings below a node in source order, each under its qualified name."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if (text := ast.get_docstring(node, clean=False)) and text.strip():
            yield f"{name}\n\n{inspect.cleandoc(text)}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _docstrings(child, name)  # definitions under an if or a try


@dataclass(frozen=True)
class Files:
    """Text files by path or glob: plain text, JSONL or Parquet, by name; .gz is unpacked.

    document: what one document is in plain text: a file, a block between blank lines, or a
        line. "auto": files where the glob matches ten or more, else blocks where the file's
        first MiB has a blank line, else lines.
    field: the key (JSONL) or column (Parquet) that holds the text.
    encoding: of plain text and JSONL, by Python's names.
    on_bad: "error" stops at the first bad record; "skip" leaves it out, and counts it.
    """

    glob: str
    document: DocumentRule = "auto"
    field: str = "text"
    encoding: str = "utf-8"
    on_bad: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("document", ("auto", "file", "blank-line", "line")),
            ("on_bad", ("error", "skip")),
        ):
            if (value := getattr(self, name)) not in allowed:
                near = nearest(str(value), allowed)
                raise ValueError(
                    f"corpus.{name}={value!r}: one of {', '.join(allowed)}; did you mean {near!r}?"
                )

    def documents(self, report: Report) -> Iterator[Document]:
        """The documents of all files, sorted by path. Errors: BadRecord, BadFile, ValueError."""
        found, doubles = _find_files(self.glob)
        report.note("further paths to a file that is read already, left out", doubles)
        rule = self.document
        if rule == "auto" and len(found) >= MANY_FILES:
            rule = "file"
        for path, name in found:
            skip = self.on_bad == "skip"
            yield from TextFile(path, name, rule, self.field, self.encoding, skip).documents(report)

    def sources(self) -> list[tuple[str, int]]:
        """Every file, by its name below the glob's fixed folder."""
        return [(name, os.path.getsize(path)) for path, name in find_files(self.glob)]


def find_files(pattern: str) -> list[tuple[str, str]]:
    """(path, name) of the regular files that a path or glob stands for, sorted by path.

    A path that exists is taken literally. The name is the path below the pattern's fixed
    folder, so that ids do not depend on where the corpus lies. Of several paths to one file, by
    links, the shortest is kept: no text falls into two splits. Errors: ValueError where nothing
    matches, and for folders, pipes and devices.
    """
    return _find_files(pattern)[0]


def _find_files(pattern: str) -> tuple[list[tuple[str, str]], int]:
    """What `find_files` returns, and how many further paths to the same files were left out."""
    pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern):
        _require_file(pattern)
        return [(pattern, _id_name(os.path.basename(pattern)))], 0
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", pattern):
        raise ValueError(
            f"{redacted(pattern)}: a URL; only files of this machine are read: download it, or"
            " mount the bucket, and name the file"
        )
    folder = _fixed_folder(pattern)
    rest = os.path.relpath(pattern, folder) if folder else pattern
    found = glob.glob(os.path.join(glob.escape(folder), rest), recursive=True)
    found = sorted({path for path in found if not os.path.isdir(path)})
    if not found:
        raise ValueError(_nothing_found(pattern, folder, rest))
    kept: dict[str, str] = {}
    for path in sorted(found, key=lambda path: (len(path), path)):
        kept.setdefault(os.path.realpath(path), path)
    for path in kept.values():
        _require_file(path)
    names = [
        (path, _id_name(os.path.relpath(path, folder or "."))) for path in sorted(kept.values())
    ]
    return names, len(found) - len(kept)


def _fixed_folder(pattern: str) -> str:
    """The longest leading folder of a pattern that exists as it is written."""
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _id_name(path: str) -> str:
    # Ids are kept one a line, and "#" starts the number of a part.
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    for sign in "%#\n\r":
        text = text.replace(sign, f"%{ord(sign):02X}")
    return text


def _require_file(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ValueError(f"{visible(path)}: cannot be read ({error.strerror})") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{visible(path)} is a folder; did you mean {os.path.join(path, '*')!r}?")
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{visible(path)} is a pipe, socket or device; only regular files are read"
        )


def _nothing_found(pattern: str, folder: str, rest: str) -> str:
    missing = rest.split(os.sep)[0]
    names = sorted(os.listdir(folder or "."))
    near = difflib.get_close_matches(missing, names, 3, 0.0)
    hint = (
        f"; the nearest names there: {', '.join(map(visible, near))}"
        if near
        else "; the folder is empty"
    )
    return f"no file matches {pattern!r}: {missing!r} is not in {os.path.abspath(folder)}{hint}"


@dataclass(frozen=True)
class TFDS:
    """A TensorFlow dataset by name, read without TensorFlow. Keeps the dataset's own splits.

    name: as `tfds.builder` takes it, "ag_news_subset" or "wikipedia/20230601.en:1.0.0".
    field: the feature that holds the text.
    data_dir: where it is prepared; "" is TFDS's own default.

    Of a dataset that lacks a validation or test split, the missing one is drawn by hash from
    train: such documents leave `split` open.
    """

    name: str
    field: str = "text"
    data_dir: str = ""

    def documents(self, report: Report) -> Iterator[Document]:
        """The examples in the dataset's own order. Errors: ValueError, BadRecord."""
        builder = self._builder()
        splits = self._splits(builder)
        for split in splits:
            own = None if split == "train" and len(splits) < len(_SPLITS) else split
            for row, text in self._texts(builder, split):
                if is_blank(text):
                    report.drop("empty or blank document", f"tfds:{self.name}/{split}:{row}")
                else:
                    yield from cut_documents(Document(f"{split}:{row}", text, own), report)

    def sources(self) -> list[tuple[str, int]]:
        """The splits that are read, with their sizes on disk."""
        builder = self._builder()
        return [
            (f"{builder.info.full_name} {split}", int(builder.info.splits[split].num_bytes))
            for split in self._splits(builder)
        ]

    def _texts(self, builder: Any, split: str) -> Iterator[tuple[int, bytes]]:
        place = f"tfds:{self.name}/{split}"
        for row, example in enumerate(self._examples(builder, split), 1):
            value = example[self.field]
            if not isinstance(value, bytes | str):
                reason = f"the feature {self.field!r} is no text"
                raise BadRecord(place, row, reason, f"found {type(value).__name__}")
            text = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
            if (at := invalid_utf8(text)) is not None:
                raise BadRecord(place, row, "not valid UTF-8", byte=at + 1)
            yield row, text

    def _examples(self, builder: Any, split: str) -> Iterator[Any]:
        try:
            source = builder.as_data_source(split=split)
            for start in range(0, len(source), 256):
                rows = range(start, min(start + 256, len(source)))
                yield from source.__getitems__(list(rows))
        except Exception as error:  # array_record and the feature decoders have no errors of theirs
            line = str(error).strip().partition("\n")[0] or type(error).__name__
            reason = f"split {split!r} cannot be read ({line}): prepare it again"
            raise BadFile(f"tfds:{self.name} in {builder.data_dir}", reason) from error

    def _splits(self, builder: Any) -> list[str]:
        names = list(builder.info.splits)
        if "train" not in names:
            raise ValueError(f"tfds:{self.name} has no split 'train', only {', '.join(names)}")
        return [split for split in _SPLITS if split in names]

    def _builder(self) -> Any:
        """The dataset's builder, prepared as array_record, with the field checked."""
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise ValueError("TFDS needs a package: pip install tensorflow-datasets") from None
        folder = os.path.expanduser(self.data_dir) or None
        try:
            # What lies prepared is taken as it is, for its code may be absent here.
            builder = tfds.builder(self.name, data_dir=folder)
            if not builder.info.splits:
                builder = tfds.builder(self.name, data_dir=folder, file_format="array_record")
                builder.download_and_prepare()
        except tfds.core.DatasetNotFoundError:
            known = tfds.list_builders(with_community_datasets=False)
            near = nearest(self.name.partition("/")[0].partition(":")[0], known)
            raise ValueError(f"no TFDS dataset {self.name!r}; did you mean {near!r}?") from None
        except Exception as error:  # downloads and foreign builders fail in every way there is
            line = str(error).strip().partition("\n")[0] or type(error).__name__
            message = f"tfds:{self.name} is not prepared in {self.data_dir or 'the default folder'}"
            raise ValueError(f"{message} and preparing it failed: {line}") from error
        described: Any = builder.info.features
        features = list(described or ())
        if self.field not in features:
            near = nearest(self.field, features)
            known = ", ".join(features)
            raise ValueError(
                f"tfds:{self.name} has no feature {self.field!r} (it has {known});"
                f" did you mean --data.corpus.field={near}?"
            )
        return builder


def corpus_from_string(text: str, current: Any = None) -> Builtin | Files | TFDS:
    """The corpus that a command line names: "builtin", "files:GLOB" or "tfds:NAME".

    What else the recipe says of a corpus of that kind, `current`, stays as it is.
    """
    kind, _, rest = text.partition(":")
    if kind == "builtin" and not rest:
        return Builtin()
    if kind == "files" and rest:
        return replace(current, glob=rest) if isinstance(current, Files) else Files(rest)
    if kind == "tfds" and rest:
        return replace(current, name=rest) if isinstance(current, TFDS) else TFDS(rest)
    near = nearest(kind, ("builtin", "files", "tfds"))
    form = {"builtin": "builtin", "files": "files:GLOB", "tfds": "tfds:NAME"}[near or "files"]
    raise ValueError(f"corpus {text!r}: builtin, files:GLOB or tfds:NAME; did you mean {form!r}?")
