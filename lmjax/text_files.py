# SPDX-License-Identifier: Apache-2.0
"""Documents out of one file: plain text, JSONL or Parquet, plain or gzip, in bounded memory."""

import codecs
import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lmjax.document import (
    CUT,
    MAX_DOCUMENT_BYTES,
    BadRecord,
    Document,
    Report,
    cut_documents,
    invalid_utf8,
    is_blank,
    safe_cut,
    visible,
)
from lmjax.text_bytes import CHUNK, BadFile, read_chunks

DocumentRule = Literal["auto", "file", "blank-line", "line"]
MAX_RECORD_BYTES = 64 << 20
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class TextFile:
    """One file of a corpus and how to read it; `name` is what its documents' ids start with."""

    path: str
    name: str
    document: DocumentRule
    field: str
    encoding: str
    skip_bad: bool

    def documents(self, report: Report) -> Iterator[Document]:
        """Its documents in file order. Errors: BadRecord, BadFile (or counted, with skip_bad)."""
        dropped, empty = report.dropped.total(), True
        for document in self._records(report):
            empty = False
            if is_blank(document.text):
                line = re.search(r":\d+$", document.id)
                report.drop(
                    "empty or blank document", visible(self.path) + (line[0] if line else "")
                )
            else:
                yield from cut_documents(document, report)
        if empty and report.dropped.total() == dropped:
            report.drop("file without text", visible(self.path))

    def _records(self, report: Report) -> Iterator[Document]:
        try:
            if os.path.getsize(self.path) == 0:
                report.drop("empty file", visible(self.path))
                return
            stem = self.path.lower().removesuffix(".gz")
            if stem.endswith(".parquet"):
                yield from _parquet_documents(self, report)
            elif stem.endswith(JSON_SUFFIXES):
                yield from _json_documents(self, report)
            else:
                yield from _plain_documents(self, report)
        except OSError as error:
            raise BadFile(self.path, f"cannot be read ({error.strerror or error})") from None
        except BadFile as error:
            if not self.skip_bad:
                raise
            report.drop(error.reason, visible(self.path))

    def bad(self, error: BadRecord, report: Report) -> None:
        """Raises the error of a record, or counts it where bad records are skipped."""
        if not self.skip_bad:
            raise error
        report.drop(error.reason, error.place)

    def not_utf8(self, line: int, text: bytes, at: int, offset: int = 0) -> BadRecord:
        """The error for the byte `at` of a text that starts `offset` bytes into its line."""
        detail = (
            f"byte 0x{text[at]:02x} (say encoding=latin-1, or whatever the file is in;"
            " or on_bad=skip to leave such documents out)"
        )
        reason = f"not valid {self.encoding.upper()}"
        return BadRecord(self.path, line, reason, detail, offset + at + 1)

    def lines(self, report: Report, limit: int) -> Iterator[tuple[int, bytes, bool]]:
        """(number, bytes, whether a newline follows); a line over `limit` comes in pieces.

        Lines end at newlines only, and one carriage return before a newline is dropped.
        """
        number, buffer, searched, bom = 1, bytearray(), 0, codecs.BOM_UTF8
        for index, chunk in enumerate(read_chunks(self.path, self.encoding)):
            if index == 0 and chunk.startswith(bom):
                chunk = chunk[len(bom) :]
                report.note("byte order marks stripped")
            buffer += chunk
            start = 0
            while (end := buffer.find(b"\n", max(start, searched))) >= 0:
                line = bytes(buffer[start:end])
                yield number, line[:-1] if line.endswith(b"\r") else line, True
                number, start = number + 1, end + 1
            del buffer[:start]
            while len(buffer) > limit:
                cut = safe_cut(buffer, limit)
                yield number, bytes(buffer[:cut]), False
                del buffer[:cut]
            searched = len(buffer)
        if buffer:
            yield number, bytes(buffer), False


def _plain_documents(file: TextFile, report: Report) -> Iterator[Document]:
    rule = file.document
    if rule == "auto":
        rule = "blank-line" if _has_blank_line(file) else "line"
    report.note(f"files read with document={rule}")
    gather = _Gather(file, rule, report)
    for number, line, newline in file.lines(report, MAX_DOCUMENT_BYTES):
        yield from gather.add(number, line, newline)
    yield from gather.finish()


def _has_blank_line(file: TextFile) -> bool:
    head = next(read_chunks(file.path, file.encoding), b"")[:CHUNK].strip()
    return bool(re.search(rb"\n[ \t\r]*\n", head))


class _Gather:
    """Joins lines into documents of one file, cutting what grows beyond the size limit."""

    def __init__(self, file: TextFile, rule: DocumentRule, report: Report):
        self.file, self.rule, self.report = file, rule, report
        self.line, self.offset = 0, 0  # the line that is being read, and the bytes of it so far
        self._clear()

    def _clear(self) -> None:
        self.text, self.first, self.part, self.bad = bytearray(), 0, 1, False

    def add(self, number: int, line: bytes, newline: bool) -> Iterator[Document]:
        """Takes a line (or a piece of a long one) and yields the documents that it completes."""
        if number != self.line:
            self.line, self.offset = number, 0
        if self.rule != "file" and self.offset == 0 and not line.strip():
            yield from self.finish()
            return
        self.first = self.first or number
        if not self.bad and (at := invalid_utf8(line)) is not None:
            self.file.bad(self.file.not_utf8(number, line, at, self.offset), self.report)
            self.bad = True
        self.text += line
        self.offset += len(line)
        while len(self.text) > MAX_DOCUMENT_BYTES:
            yield from self._emit(safe_cut(self.text, MAX_DOCUMENT_BYTES))
            self.part += 1
        if newline and self.rule == "line":
            yield from self.finish()
        elif newline:
            self.text += b"\n"

    def finish(self) -> Iterator[Document]:
        """Yields the document that is still open at its end."""
        if self.rule != "file":
            del self.text[len(self.text.rstrip(b"\n")) :]
        if self.text:
            yield from self._emit(len(self.text))
        self._clear()

    def _emit(self, size: int) -> Iterator[Document]:
        text, name = bytes(self.text[:size]), self.file.name
        del self.text[:size]
        if self.bad:
            self.bad = False
            return
        if self.part == 2:
            self.report.note(CUT)
        name = name if self.rule == "file" else f"{name}:{self.first}"
        yield Document(name if self.part == 1 else f"{name}#{self.part}", text)


class _Repeated(dict):
    """A JSON object that has the wanted key twice."""


def _json_documents(file: TextFile, report: Report) -> Iterator[Document]:
    def gather(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs) and sum(key == file.field for key, _ in pairs) > 1:
            return _Repeated(record)
        return record

    decoder = json.JSONDecoder(object_pairs_hook=gather)
    too_long = 0
    for number, line, newline in file.lines(report, MAX_RECORD_BYTES):
        if number == too_long:
            continue
        try:
            if not newline and len(line) >= MAX_RECORD_BYTES // 2:
                too_long = number
                raise BadRecord(
                    file.path, number, f"a record of more than {MAX_RECORD_BYTES >> 20} MiB"
                )
            if line.strip():
                text = _json_text(file, number, line, decoder)
                yield Document(f"{file.name}:{number}", text)
        except BadRecord as error:
            file.bad(error, report)


def _json_text(file: TextFile, number: int, line: bytes, decoder: json.JSONDecoder) -> bytes:
    if (at := invalid_utf8(line)) is not None:
        raise file.not_utf8(number, line, at)

    def bad(reason: str, detail: str = "") -> BadRecord:
        return BadRecord(file.path, number, reason, detail)

    try:
        record = decoder.decode(line.decode())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise bad("more than one value on a line", f"at column {error.colno}") from None
        raise bad("not one JSON object on a line", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise bad("JSON nested too deeply") from None
    except ValueError as error:
        raise bad("a JSON number that is too long", str(error).partition(";")[0]) from None
    if not isinstance(record, dict):
        raise bad("not a JSON object", f"found {_kind(record)}")
    field = file.field
    if field not in record:
        near = nearest(field, record)
        raise bad(f"no field {field!r}", f"the nearest is {near!r}" if near else "no field at all")
    if isinstance(record, _Repeated):
        raise bad(f"the field {field!r} occurs twice")
    text = record[field]
    if not isinstance(text, str):
        raise bad(f"the field {field!r} is no string", f"found {_kind(text)}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise bad("a lone surrogate", f"at character {error.start + 1} of {field!r}") from None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None where none is known."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, 0.0)), None)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _parquet_documents(file: TextFile, report: Report) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{visible(file.path)}: Parquet needs a package: pip install pyarrow"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if file.field not in names:
                near = nearest(file.field, names)
                raise BadFile(file.path, f"no column {file.field!r}; the nearest is {near!r}")
            if names.count(file.field) > 1:
                raise BadFile(file.path, f"the column {file.field!r} occurs twice")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[file.field]):
                # As bytes: Arrow does not check that its strings are UTF-8, and we do.
                for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    yield from _parquet_row(file, report, row, value)
    except pyarrow.ArrowNotImplementedError:
        raise BadFile(file.path, f"column {file.field!r} does not hold strings") from None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise BadFile(file.path, f"damaged or not Parquet ({reason})") from None


def _parquet_row(
    file: TextFile, report: Report, row: int, value: bytes | None
) -> Iterator[Document]:
    if value is None:
        file.bad(BadRecord(file.path, row, f"the field {file.field!r} is null"), report)
    elif (at := invalid_utf8(value)) is not None:
        file.bad(file.not_utf8(row, value, at), report)
    else:
        yield Document(f"{file.name}:{row}", value)
