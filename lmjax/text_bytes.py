# SPDX-License-Identifier: Apache-2.0
"""The bytes of one text file: unpacked, sniffed, transcoded to UTF-8, a chunk at a time."""

import codecs
import difflib
import functools
import os
import zlib
from collections.abc import Iterator

from lmjax.document import visible

CHUNK = 1 << 20
PACKED_CHUNK = 1 << 16  # unpacks to 66 MiB at most
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200
_MAGIC = {
    b"\x1f\x8b": "gzip data (name it .gz to have it unpacked)",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstandard data",
    b"\xfd7zXZ\x00": "xz data",
    b"BZh91AY&SY": "bzip2 data",
    b"PAR1\x15": "Parquet (name it .parquet)",
    b"%PDF-": "a PDF",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x7fELF": "an ELF binary",
    b"\x89HDF": "HDF5 data",
    b"SQLite format 3\0": "an SQLite database",
    codecs.BOM_UTF32_LE: "UTF-32 text (say encoding=utf-32)",
    codecs.BOM_UTF32_BE: "UTF-32 text (say encoding=utf-32)",
    codecs.BOM_UTF16_LE: "UTF-16 text (say encoding=utf-16)",
    codecs.BOM_UTF16_BE: "UTF-16 text (say encoding=utf-16)",
}


class BadFile(ValueError):
    """A file that cannot be used as a whole; the message starts with its path."""

    def __init__(self, path: str, reason: str):
        self.path, self.reason = path, reason
        super().__init__(f"{visible(path)}: {reason}")


def read_chunks(path: str, encoding: str) -> Iterator[bytes]:
    """A file as UTF-8 bytes (not yet checked), gzip unpacked by its name.

    A byte that `encoding` lacks becomes a lone surrogate, which is no UTF-8 either. Errors:
    BadFile for damaged archives and for what is not text at all; ValueError for the encoding.
    """
    if path.lower().endswith(".gz"):
        _check_gzip(path, *_stamp(path))
        raw = _gunzip(path)
    else:
        raw = _read(path, CHUNK)
    return _sniffed(path, raw) if _is_utf8(encoding) else _transcoded(path, raw, encoding)


def _is_utf8(encoding: str) -> bool:
    try:
        found, fault = codecs.lookup(encoding), "no encoding of text that can be read in pieces"
    except (LookupError, ValueError):
        found, fault = None, "unknown"
    if found is None or not _decodes_text(found):
        near = difflib.get_close_matches(encoding, ["utf-8", "latin-1", "utf-16", "cp1252"], 1, 0)
        raise ValueError(f"encoding {encoding!r} is {fault}; did you mean {near[0]!r}?")
    return found.name in ("utf-8", "utf-8-sig", "ascii")


def _decodes_text(codec: codecs.CodecInfo) -> bool:
    """Whether a codec turns bytes into text, as rot13 and zlib do not, a chunk at a time."""
    if not codec._is_text_encoding or codec.incrementaldecoder is None:
        return False
    try:
        codec.incrementaldecoder("surrogateescape").decode(b"", True)
    except UnicodeError:  # idna, punycode, undefined
        return False
    return True


def _read(path: str, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(size):
            yield chunk


def _stamp(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=4096)
def _check_gzip(path: str, size: int, modified: int) -> None:
    # A first pass to the end: no document of a damaged or exploding archive is ever yielded.
    # The stamp makes the answer good for later passes over the same file only.
    total = 0
    for chunk in _gunzip(path):
        total += len(chunk)
        if total > BOMB_BYTES and total > BOMB_RATIO * size:
            raise BadFile(path, f"{size:,} bytes unpack to more than {total:,}: a gzip bomb?")


def _gunzip(path: str) -> Iterator[bytes]:
    unpacker, members = zlib.decompressobj(wbits=31), 1
    try:
        for chunk in _read(path, PACKED_CHUNK):
            while chunk:
                if unpacker.eof:
                    chunk = chunk.lstrip(b"\0")  # padding up to a block is legal
                    if not chunk:
                        break
                    unpacker, members = zlib.decompressobj(wbits=31), members + 1
                if out := unpacker.decompress(chunk):
                    yield out
                chunk = unpacker.unused_data
    except zlib.error:
        reason = "garbage after the end of the gzip data" if members > 1 else "not gzip, or damaged"
        raise BadFile(path, reason) from None
    if not unpacker.eof:
        raise BadFile(path, "truncated gzip data" if members == 1 else "gzip data with a cut end")


def _sniffed(path: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    for index, chunk in enumerate(chunks):
        if index == 0 and (kind := _not_text(chunk[:4096])):
            raise BadFile(path, f"is {kind}, not UTF-8 text")
        yield chunk


def _not_text(head: bytes) -> str | None:
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if len(head) >= 16 and head.count(0) > 0.3 * len(head):
        return "binary data or UTF-16 text without a mark (say encoding=utf-16-le or utf-16-be)"
    # Text has tabs, line and page feeds and the odd escape; the other controls mean binary data.
    controls = sum(head.count(code) for code in [*range(1, 8), *range(14, 27), *range(28, 32)])
    return "binary data" if len(head) >= 16 and controls > 0.1 * len(head) else None


def _transcoded(path: str, chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
    try:
        for chunk in chunks:
            if out := decoder.decode(chunk):
                yield out.encode("utf-8", "surrogatepass")
        if out := decoder.decode(b"", True):
            yield out.encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        raise BadFile(path, f"is not {encoding} ({error})") from None
