# SPDX-License-Identifier: Apache-2.0
"""What every corpus yields: documents, a report of what was dropped, and the split of an id."""

import codecs
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_DOCUMENT_BYTES = 16 << 20
CUT = f"documents cut into parts of at most {MAX_DOCUMENT_BYTES >> 20} MiB"
PLACES_KEPT = 5
_PART = re.compile(r"#\d+$")
# One slash as well: a Path has lost the other.
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*:/{1,3})([^\s'\"<>]+)")
_SPACES = b" \t\n\r\v\f"


class BadRecord(ValueError):
    """One record of a source that cannot be used; the message starts with its file:line.

    `path` names the source, `line` its line or row, `byte` the position in the line (both from
    1; `byte` is None where the record as a whole is at fault).
    """

    def __init__(
        self, path: str, line: int, reason: str, detail: str = "", byte: int | None = None
    ):
        self.path, self.line, self.reason, self.byte = path, line, reason, byte
        self.place = f"{visible(path)}:{line}" + (f":{byte}" if byte is not None else "")
        super().__init__(f"{self.place}: {reason}" + (f": {detail}" if detail else ""))


@dataclass(frozen=True)
class Document:
    """A text in valid UTF-8 under a stable id; `split` is set where the source has its own."""

    id: str
    text: bytes
    split: str | None = None


@dataclass
class Report:
    """Counts of what a pass over a corpus yielded, dropped and did to the text."""

    documents: int = 0
    bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, place: str) -> None:
        """Counts one dropped record and remembers where the first few were."""
        self.dropped[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES_KEPT:
            places.append(place)

    def note(self, what: str, count: int = 1) -> None:
        """Counts something that was done to the text, or kept in it."""
        if count:
            self.notes[what] += count

    def keep(self, document: Document) -> Document:
        """Counts a document that is passed on, and returns it."""
        self.documents += 1
        self.bytes += len(document.text)
        self.note("NUL characters kept", document.text.count(b"\0"))
        return document

    def lines(self) -> list[str]:
        """The report in words, one fact a line."""
        out = [f"{self.documents:,} documents, {self.bytes:,} bytes"]
        for reason, count in sorted(self.dropped.items()):
            more = ", …" if count > len(self.places[reason]) else ""
            out.append(f"dropped {count:,}: {reason} ({', '.join(self.places[reason])}{more})")
        out += [f"{what}: {count:,}" for what, count in sorted(self.notes.items())]
        return out


def visible(name: str) -> str:
    """A file's name with newlines, other controls and torn characters as escapes, for a message."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def redacted(text: str) -> str:
    """A message without what URLs say of people: users, passwords and queries."""

    def hidden(url: re.Match[str]) -> str:
        rest = re.sub(r"^[^?#]*@", "***@", url[2])
        return url[1] + re.sub(r"[?#].*", "?***", rest)

    return _URL.sub(hidden, text)


def is_blank(text: bytes) -> bool:
    """Whether a text has no visible character (Unicode blanks count as blank)."""
    if text.strip(_SPACES):
        # Only a short text can be worth a decode: a long one of Unicode blanks is a curiosity.
        return len(text) < 1024 and not text.decode("utf-8", "replace").strip()
    return True


def safe_cut(text: bytes | bytearray | memoryview, limit: int) -> int:
    """Where to cut a text that is longer than `limit` bytes: at most `limit`, at least 1.

    After the last newline of the second half, else after its last blank, else before the
    character that would be torn.
    """
    assert len(text) > limit >= 4
    half = bytes(text[limit // 2 : limit])
    for mark in (b"\n", b" "):
        if (at := half.rfind(mark)) >= 0:
            return limit // 2 + at + 1
    cut = limit
    while cut > limit - 4 and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def pieces(text: bytes, limit: int) -> Iterator[bytes]:
    """A text in consecutive pieces of at most `limit` bytes, cut at safe boundaries."""
    start = 0
    while len(text) - start > limit:
        cut = safe_cut(memoryview(text)[start : start + limit + 1], limit)
        yield text[start : start + cut]
        start += cut
    yield text[start:] if start else text


def cut_documents(document: Document, report: Report) -> Iterator[Document]:
    """A document as it is, or in parts `id#2`, `id#3` … when it exceeds the size limit."""
    if len(document.text) <= MAX_DOCUMENT_BYTES:
        yield report.keep(document)
        return
    report.note(CUT)
    for number, text in enumerate(pieces(document.text, MAX_DOCUMENT_BYTES), 1):
        name = document.id if number == 1 else f"{document.id}#{number}"
        yield report.keep(Document(name, text, document.split))


def invalid_utf8(text: bytes) -> int | None:
    """The offset of the first byte that is not UTF-8, or None; decodes a MiB at a time."""
    if len(text) <= 1 << 20:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            return error.start
        return None
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), 1 << 20):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(text[start : start + (1 << 20)], start + (1 << 20) >= len(text))
        except UnicodeDecodeError as error:
            return start - pending + error.start
    return None


def whole_id(document_id: str) -> str:
    """The id of the document that a part `id#2` was cut from."""
    return _PART.sub("", document_id)


def id_position(document_id: str) -> float:
    """A document's place in [0, 1) by the hash of its id; parts of a document share it."""
    digest = hashlib.blake2b(whole_id(document_id).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def split_of(document_id: str, validation: float, test: float) -> str:
    """The split of a document by the hash of its id: "train", "validation" or "test".

    Depends on nothing but the arguments, so adding or reordering documents moves no other one.
    """
    position = id_position(document_id)
    if position < test:
        return "test"
    return "validation" if position < test + validation else "train"
