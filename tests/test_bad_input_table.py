# SPDX-License-Identifier: Apache-2.0
"""Every kind of bad input, a row each: what lies there, what `train` says, what a build keeps.

Rows are tried as a user meets them: `train` on the files must end with the one line of error that
the row states, or build a store with exactly the documents that it states; with on_bad=skip the
build goes on, keeps the good documents and counts the bad ones. The rest of each kind (the locale,
killed builders, damaged stores, long lines, loaders) has tests of its own, named at the end.
"""

import gzip
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lmjax import text_bytes
from lmjax.__main__ import main
from lmjax.data import Data, Prepared
from lmjax.text import Files
from lmjax.tokenizer import Characters

DEMO = "experiments/demo.py"
OK = b'{"text": "good"}\n'
ANY = "*"
PROSE = b"the cat sat on a mat\n" * 40


@dataclass(frozen=True)
class Row:
    """One row. `files` are written to a folder (None: a pipe), of which `glob` is read.

    error: what the message says after "error: FOLDER/"; "" where nothing is at fault.
    keeps: the texts of the store; with an error, those that on_bad=skip leaves (None: it is no
        record's fault, so skipping does not help).
    drops, notes: reasons and counts in the report. places: in the report as well.
    """

    files: dict[str, bytes | None]
    error: str = ""
    keeps: tuple[bytes, ...] | None = None
    drops: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    glob: str = ANY
    settings: dict[str, str] = field(default_factory=dict)


def text(content: bytes, error: str = "", *keeps: bytes, **rest) -> Row:
    """A row of one text file."""
    return Row({"a.txt": content}, error and f"a.txt{error}", keeps or None, **rest)


def record(line: bytes, says: str, reason: str, byte: str = "") -> Row:
    """A row of one bad line of JSON between two good ones."""
    return Row(
        {"a.jsonl": OK + line + b"\n" + OK},
        f"a.jsonl:2{byte}: {says}",
        (b"good", b"good"),
        {reason: 1},
        places=(f"a.jsonl:2{byte}",),
    )


def sniffed(content: bytes, what: str) -> Row:
    """A row of a file that is no text, beside a good one."""
    says = f"is {what}, not UTF-8 text"
    return Row({"a.txt": content, "b.txt": b"good\n"}, f"a.txt: {says}", (b"good",), {says: 1})


def packed(content: bytes, says: str) -> Row:
    """A row of a damaged archive beside a good file: not one of its lines may be read."""
    return Row(
        {"a.txt.gz": content, "b.txt": b"good\n"}, f"a.txt.gz: {says}", (b"good",), {says: 1}
    )


GZ = gzip.compress(b"line\n" * 20_000, 1)
BOMB = zlib.compress(b"lol " * (2 << 20), 9, 31)
SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\x1deight\x1enine"
GOOD_AND_BAD = b"good\nbad \xc3\xa9\xff!\nfine\n"
DEEP = b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
UTF16 = "binary data or UTF-16 text without a mark (say encoding=utf-16-le or utf-16-be)"

TABLE: dict[str, Row] = {
    # invalid UTF-8: error with file:line:byte, or counted skip
    "invalid UTF-8": text(
        GOOD_AND_BAD, ":2:7: not valid UTF-8: byte 0xff", b"good", b"fine",
        drops={"not valid UTF-8": 1}, places=("a.txt:2:7",),
    ),
    "invalid UTF-8, a cut character at the end": text(
        b"good\nbad \xe2\x98", ":2:5: not valid UTF-8: byte 0xe2", b"good",
        drops={"not valid UTF-8": 1},
    ),
    "invalid UTF-8, an encoded surrogate": text(
        b"good\n\xed\xa0\x80\n", ":2:1: not valid UTF-8: byte 0xed", b"good",
        drops={"not valid UTF-8": 1},
    ),
    "invalid UTF-8, nine times": text(
        b"bad \xff\n" * 9 + b"good\n", ":1:5: not valid UTF-8: byte 0xff", b"good",
        drops={"not valid UTF-8": 9}, places=tuple(f"a.txt:{n}:5" for n in range(1, 6)),
    ),
    "invalid UTF-8 in JSONL": record(
        b'{"text": "a\xff"}', "not valid UTF-8: byte 0xff", "not valid UTF-8", byte=":12"
    ),
    # UTF-16, binary, gz named .txt: sniff magic, say what it is
    "UTF-16": sniffed("hello world".encode("utf-16"), "UTF-16 text (say encoding=utf-16)"),
    "UTF-16 without a mark": sniffed("hello world, you".encode("utf-16-le"), UTF16),
    "UTF-32": sniffed("hello world".encode("utf-32"), "UTF-32 text (say encoding=utf-32)"),
    "binary": sniffed(bytes(range(1, 32)) * 10, "binary data"),
    "gz named .txt": sniffed(GZ, "gzip data (name it .gz to have it unpacked)"),
    "zip named .txt": sniffed(b"PK\x03\x04" + bytes(range(64)), "a zip archive"),
    "zstd named .txt": sniffed(b"\x28\xb5\x2f\xfd" + bytes(64), "zstandard data"),
    "PDF named .txt": sniffed(b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
    # BOM: strip at file start
    "BOM": text(
        b"\xef\xbb\xbfone\ntwo\n", "", b"one", b"two", notes={"byte order marks stripped": 1}
    ),
    "BOM in JSONL": Row(
        {"a.jsonl": b"\xef\xbb\xbf" + OK}, keeps=(b"good",), notes={"byte order marks stripped": 1}
    ),
    "BOM in gz": Row({"a.txt.gz": gzip.compress(b"\xef\xbb\xbfone\n")}, keeps=(b"one",)),
    "BOM elsewhere is text": text("one\n\ufefftwo\n".encode(), "", b"one", "\ufefftwo".encode()),
    # NUL: keep, count
    "NUL": text(b"o\0ne\ntwo\0\0\n", "", b"o\0ne", b"two\0\0", notes={"NUL characters kept": 3}),
    "NUL in JSONL": Row(
        {"a.jsonl": b'{"text": "a\\u0000b"}\n'}, keeps=(b"a\0b",), notes={"NUL characters kept": 1}
    ),
    # CRLF, lone CR: split on newlines, drop one carriage return before each
    "CRLF": text(b"one\r\ntwo\r\r\n", "", b"one", b"two\r"),
    "lone CR": text(b"one\rtwo\nthree\n", "", b"one\rtwo", b"three"),
    "CRLF between blocks": text(b"one\r\ntwo\r\n\r\nthree\r\n", "", b"one\ntwo", b"three"),
    # U+2028, NEL, VT, FS end no line
    "U+2028, NEL, VT, FS": text(SEPARATORS.encode() + b"\n", "", SEPARATORS.encode()),
    "U+2028, NEL, VT, FS in JSONL": Row(
        {"a.jsonl": json.dumps({"text": SEPARATORS}, ensure_ascii=False).encode() + b"\n"},
        keeps=(SEPARATORS.encode(),),
    ),
    # empty file: warn and count; empty or blank documents: drop and count
    "an empty file among others": Row(
        {"a.txt": b"", "b.txt": b"good\n"}, keeps=(b"good",), drops={"empty file": 1}
    ),
    "blank documents": Row(
        {"a.jsonl": b'{"text": ""}\n{"text": " \\n"}\n{"text": "\\u3000"}\n' + OK},
        keeps=(b"good",),
        drops={"empty or blank document": 3},
        places=("a.jsonl:1", "a.jsonl:2", "a.jsonl:3"),
    ),
    "nothing but empty files": Row(
        {"a.txt": b"", "b.txt": b""},
        "there is no text to train on: 0 documents, 0 bytes; dropped 2: empty file",
    ),
    "nothing but blanks": Row(
        {"a.txt": b" \n\t\n"},
        "there is no text to train on: 0 documents, 0 bytes; dropped 1: file without text",
    ),
    "a file of blank lines among others": Row(
        {"a.txt": b"\xef\xbb\xbf\n\n", "b.txt": b"good\n"}, keeps=(b"good",),
        drops={"file without text": 1}, places=("a.txt",),
    ),
    # 1 MB of blanks / no blanks: fine
    "1 MB of blanks": text(b"a" + b" " * (1 << 20) + b"b\n", "", b"a" + b" " * (1 << 20) + b"b"),
    "1 MB without a blank": text(b"ab" * (1 << 19) + b"\n", "", b"ab" * (1 << 19)),
    # gz: nothing of a bad archive is ever read
    "gz, truncated": packed(GZ[:-9], "truncated gzip data"),
    "gz, garbage at the end": packed(GZ + b"garbage", "garbage after the end of the gzip data"),
    "gz, half a header at the end": packed(GZ + b"\x1f", "gzip data with a cut end"),
    "gz, not gzip": packed(b"plain text\n", "not gzip, or damaged"),
    "gz, flipped": packed(GZ[:60] + bytes([GZ[60] ^ 255]) + GZ[61:], "not gzip, or damaged"),
    "gz, a bomb": packed(BOMB, f"{len(BOMB):,} bytes unpack to more than "),
    "gz, empty inside": Row(
        {"a.txt.gz": gzip.compress(b""), "b.txt": b"good\n"}, keeps=(b"good",),
        drops={"file without text": 1},
    ),
    "gz, UTF-16 inside": Row(
        {"a.txt.gz": gzip.compress("hello world".encode("utf-16")), "b.txt": b"good\n"},
        "a.txt.gz: is UTF-16 text", (b"good",), {"is UTF-16 text": 1},
    ),
    # JSONL: one BadRecord naming file and line
    "JSONL, no text": record(
        b'{"txet": "a"}', "no field 'text': the nearest is 'txet'", "no field 'text'"
    ),
    "JSONL, null": record(b'{"text": null}', "the field 'text' is no string: found null", ANY),
    "JSONL, number": record(b'{"text": 3}', "the field 'text' is no string: found a number", ANY),
    "JSONL, NaN": record(b'{"text": NaN}', "the field 'text' is no string: found a number", ANY),
    "JSONL, list": record(b'{"text": ["a"]}', "the field 'text' is no string: found a list", ANY),
    "JSONL, no object": record(b'["text"]', "not a JSON object: found a list", ANY),
    "JSONL, a bare string": record(b'"text"', "not a JSON object: found a string", ANY),
    "JSONL, cut": record(b'{"text": "a', "not one JSON object on a line", ANY),
    "JSONL, two per line": record(
        b'{"text": "a"} {"text": "b"}', "more than one value on a line: at column 15", ANY
    ),
    "JSONL, lone surrogate": record(
        b'{"text": "a\\ud800"}', "a lone surrogate: at character 2 of 'text'", ANY
    ),
    "JSONL, 100k deep": record(DEEP, "JSON nested too deeply", ANY),
    "JSONL, 5,000 digits": record(
        b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "a JSON number that is too long", ANY
    ),
    "JSONL, a control character in a string": record(
        b'{"text": "a\x01"}', "not one JSON object on a line", ANY
    ),
    "JSONL, blank lines and BOM": Row(
        {"a.jsonl": b"\xef\xbb\xbf" + OK + b"\n \r\n" + OK}, keeps=(b"good", b"good")
    ),
    # JSONL: duplicate key is an error, NaN elsewhere is ignored
    "JSONL, duplicate key": record(
        b'{"text": "a", "text": "b"}', "the field 'text' occurs twice", ANY
    ),
    "JSONL, duplicate key, escaped": record(
        b'{"text": "a", "\\u0074ext": "b"}', "the field 'text' occurs twice", ANY
    ),
    "JSONL, duplicate key elsewhere": Row(
        {"a.jsonl": b'{"x": 1, "x": 2, "y": {"text": 1, "text": 2}, "text": "a"}\n'}, keeps=(b"a",)
    ),
    "JSONL, NaN elsewhere": Row({"a.jsonl": b'{"text": "a", "x": NaN}\n'}, keeps=(b"a",)),
    # names with [, *, newline, FIFO: literal paths, regular files only
    "a name with brackets": Row(
        {"a[1].txt": b"x\n", "a1.txt": b"y\n"}, "", (b"x",), glob="a[1].txt"
    ),
    "a name with a star": Row({"a*.txt": b"x\n", "ab.txt": b"y\n"}, "", (b"x",), glob="a*.txt"),
    "a name with a newline": Row({"a\nb.txt": b"x\n"}, "", (b"x",), glob="a\nb.txt"),
    "a name that is no UTF-8": Row({"a\udcff.txt": b"x\n"}, "", (b"x",), glob="a*"),
    "a FIFO": Row({"pipe": None}, "pipe is a pipe", glob="pipe"),
    "a FIFO among files": Row({"a.txt": b"x\n", "pipe": None}, "pipe is a pipe"),
    "a bad record under a name with a newline": Row(
        {"a\nb.txt": b"x\n\xff\n"}, "a\\nb.txt:2:1: not valid UTF-8", (b"x",), {ANY: 1}
    ),
}  # fmt: skip
FAULTS = [name for name, row in TABLE.items() if row.error]
SKIPPED = [name for name, row in TABLE.items() if row.error and row.keeps is not None]
HARMLESS = [name for name, row in TABLE.items() if not row.error]


@pytest.fixture(autouse=True)
def _small_bombs(monkeypatch: pytest.MonkeyPatch):
    """The first GiB of a bomb is more than a test should unpack."""
    monkeypatch.setattr(text_bytes, "BOMB_BYTES", 4 << 20)


def written(row: Row, folder: Path) -> str:
    """The pattern of a row's files, which are written to a folder."""
    folder.mkdir()
    for name, content in row.files.items():
        path = folder / name
        os.mkfifo(path) if content is None else path.write_bytes(content)
    return f"{folder}/{row.glob}"


def prepared(row: Row, pattern: str, workdir: Path, said: list[str], on_bad: str) -> Prepared:
    corpus = Files(pattern, on_bad=on_bad, **row.settings)  # type: ignore[arg-type]
    return Data(corpus, Characters(), None, 0, 0).prepare(workdir, say=said.append)


def texts(made: Prepared) -> tuple[bytes, ...]:
    """The documents of a store, by its tokens."""
    split = made.store.splits["train"]
    bounds = zip(split.starts[:-1], split.starts[1:], strict=True)
    return tuple(made.tokenizer.decode(split.tokens[a:b]).encode() for a, b in bounds)


def check_report(said: list[str], row: Row, folder: Path) -> None:
    """The lines of a build: documents and bytes, then what was dropped and where, then notes."""
    assert row.keeps is not None
    assert said[0] == f"{len(row.keeps):,} documents, {sum(map(len, row.keeps)):,} bytes"
    dropped = [line for line in said if line.startswith("dropped ")]
    assert len(dropped) == len(row.drops)
    for (reason, number), line in zip(sorted(row.drops.items()), dropped, strict=True):
        assert line.startswith(f"dropped {number:,}: {'' if reason == ANY else reason}")
    for place in row.places:
        assert f"{folder}/{place}" in " ".join(dropped)
    for what, number in row.notes.items():
        assert f"{what}: {number:,}" in said


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_at_fault_is_one_line_that_names_the_place(name: str, tmp_path: Path, capsys):
    row = TABLE[name]
    pattern = written(row, tmp_path / "corpus")
    workdir = tmp_path / "run"
    keys = [f"--data.corpus.{key}={value}" for key, value in row.settings.items()]
    code = main(
        ["train", DEMO, "--tiny", f"--workdir={workdir}", f"--data.corpus=files:{pattern}", *keys]
    )
    out, err = capsys.readouterr()
    place = "" if row.error.startswith("there is") else f"{tmp_path}/corpus/"
    assert code == 2 and err.startswith(f"error: {place}{row.error}") and err.count("\n") == 1
    assert "documents" not in out
    assert {p.name for p in workdir.iterdir()} <= {".lock", ".data.lock"}


def check_read(row: Row, tmp_path: Path, on_bad: str) -> None:
    """The documents that a row's corpus is read as, and what is said of the others."""
    said: list[str] = []
    pattern = written(row, tmp_path / "corpus")
    made = prepared(row, pattern, tmp_path / "run", said, on_bad)
    assert texts(made) == row.keeps
    check_report(said, row, tmp_path / "corpus")


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_at_fault_is_left_out_and_counted_when_asked(name: str, tmp_path: Path):
    check_read(TABLE[name], tmp_path, "skip")


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_only_odd_is_read_by_one_rule(name: str, tmp_path: Path):
    check_read(TABLE[name], tmp_path, "error")
