# SPDX-License-Identifier: Apache-2.0
"""What bad files and records get: an error that names the place, or a counted skip."""

import gzip
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from lmjax import text_bytes, text_files
from lmjax.document import MAX_DOCUMENT_BYTES
from lmjax.text import BadFile, BadRecord, Files, Report, corpus_from_string

GOOD = b'{"text": "good"}\n'
NUMBER = b"9" * 5000
BAD_RECORDS = {
    "no text": (b'{"txet": "a"}', "no field 'text': the nearest is 'txet'"),
    "null": (b'{"text": null}', "no string: found null"),
    "number": (b'{"text": 3}', "no string: found a number"),
    "NaN": (b'{"text": NaN}', "no string: found a number"),
    "list": (b'{"text": ["a"]}', "no string: found a list"),
    "object": (b'{"text": {"text": "a"}}', "no string: found an object"),
    "not an object": (b'["text"]', "not a JSON object: found a list"),
    "cut": (b'{"text": "a', "not one JSON object on a line"),
    "two": (b'{"text": "a"} {"text": "b"}', "more than one value on a line"),
    "twice": (b'{"text": "a", "text": "b"}', "the field 'text' occurs twice"),
    "twice, escaped": (b'{"text": "a", "\\u0074ext": "b"}', "the field 'text' occurs twice"),
    "surrogate": (b'{"text": "a\\ud800"}', "a lone surrogate: at character 2"),
    "deep": (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "long number": (b'{"text": "a", "x": ' + NUMBER + b"}", "a JSON number that is too long"),
    "invalid UTF-8": (b'{"text": "a\xff"}', "not valid UTF-8"),
}
NOT_TEXT = {
    "gzip data": gzip.compress(b"hello world, hello world"),
    "UTF-16": "hello world".encode("utf-16"),
    "UTF-16 text without a mark": "hello world, again".encode("utf-16-le"),
    "UTF-32": "hello world".encode("utf-32"),
    "a zip archive": b"PK\x03\x04" + bytes(range(64)),
    "zstandard": b"\x28\xb5\x2f\xfd" + bytes(64),
    "binary data": bytes(range(1, 32)) * 10,
}


def read(path: Path, report: Report | None = None, **settings) -> list[bytes]:
    corpus = Files(str(path), **settings)
    return [document.text for document in corpus.documents(report or Report())]


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_names_file_and_line(tmp_path: Path, case: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + BAD_RECORDS[case][0] + b"\n" + GOOD)
    with pytest.raises(BadRecord) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2")
    assert BAD_RECORDS[case][1] in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_skipped_and_counted_when_asked(tmp_path: Path, case: str):
    path, report = tmp_path / "a.jsonl", Report()
    path.write_bytes(GOOD + BAD_RECORDS[case][0] + b"\n" + GOOD)
    assert read(path, report, on_bad="skip") == [b"good"] * 2
    assert sum(report.dropped.values()) == 1
    assert any(f"{path}:2" in line for line in report.lines())


@pytest.mark.parametrize(
    "line",
    [b"", b"   ", b'{"text": "a", "x": NaN}', b'{"x": {"text": 1, "text": 2}, "text": "a"}'],
)
def test_harmless_oddities_of_jsonl_pass(tmp_path: Path, line: bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + line + b"\r\n" + GOOD.strip())
    texts = read(path)
    assert texts[0] == texts[-1] == b"good" and len(texts) == (3 if line.strip() else 2)


@pytest.mark.parametrize("kind", NOT_TEXT)
def test_what_is_not_text_is_named(tmp_path: Path, kind: str):
    path, report = tmp_path / "a.txt", Report()
    path.write_bytes(NOT_TEXT[kind])
    with pytest.raises(BadFile, match=f"a.txt: is .*{kind}"):
        read(path)
    assert read(path, report, on_bad="skip") == [] and sum(report.dropped.values()) == 1


def test_invalid_utf8_names_file_line_and_byte(tmp_path: Path):
    path, report = tmp_path / "a.txt", Report()
    path.write_bytes(b"one\ntwo \xc3\xa9\xff!\nthree\n")
    with pytest.raises(BadRecord) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2:7: not valid UTF-8: byte 0xff")
    assert read(path, report, on_bad="skip") == [b"one", b"three"]
    assert report.dropped == {"not valid UTF-8": 1}


def test_invalid_utf8_far_into_a_long_line_is_found(tmp_path: Path):
    path = tmp_path / "a.txt"
    body = "é".encode() * (1 << 20)
    path.write_bytes(b"x\n" + body + b"\xc3(")
    with pytest.raises(BadRecord, match=f":2:{len(body) + 1}: "):
        read(path, document="file")


def test_one_bad_byte_drops_the_whole_document_once(tmp_path: Path):
    path, report = tmp_path / "a.txt", Report()
    path.write_bytes(b"good\n\nbad \xff\nbad \xfe\n\nfine\n")
    assert read(path, report, on_bad="skip") == [b"good", b"fine"]
    assert report.dropped == {"not valid UTF-8": 1}


def test_the_reader_does_not_depend_on_the_locale(tmp_path: Path):
    path = tmp_path / "é.txt"
    path.write_bytes("naïve ☃\n".encode())
    code = (
        "import sys; from lmjax.text import *; "
        "print(ascii([d.text.decode() for d in Files(sys.argv[1]).documents(Report())]))"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == ascii(["naïve ☃"])


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "gb18030", "cp1252"])
def test_other_encodings_are_read_when_named(tmp_path: Path, encoding: str):
    path, text = tmp_path / "a.txt", "déjà vu\nÜber\n"
    path.write_bytes(text.encode(encoding))
    assert read(path, encoding=encoding) == [
        "déjà vu".encode(),
        "Über".encode(),
    ]


def test_bytes_that_a_named_encoding_lacks_are_found(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo \x81\n")
    with pytest.raises(BadRecord, match=r"a.txt:2:5: not valid CP1252"):
        read(path, encoding="cp1252")


def test_an_unknown_encoding_names_the_nearest(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match="'latin1x' is unknown; did you mean 'latin-1'"):
        read(tmp_path / "a.txt", encoding="latin1x")


@pytest.mark.parametrize(
    "encoding", ["rot13", "hex", "zlib", "base64", "bz2", "uu", "idna", "punycode", "undefined"]
)
def test_a_codec_that_is_no_encoding_of_text_is_refused(tmp_path: Path, encoding: str):
    (tmp_path / "a.txt").write_bytes(b"some text\n")
    with pytest.raises(ValueError, match=f"'{encoding}' is no encoding of text .* did you mean"):
        read(tmp_path / "a.txt", encoding=encoding)


def test_marks_nul_and_line_ends(tmp_path: Path):
    path, report = tmp_path / "a.txt", Report()
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\r\nth\0ree\rfour\n")
    assert read(path, report) == [b"one", b"two\r", b"th\0ree\rfour"]
    assert report.notes["byte order marks stripped"] == 1
    assert report.notes["NUL characters kept"] == 1


def test_only_newlines_end_lines(tmp_path: Path):
    odd = "a\u2028b\x85c\x0bd\x0ce\x1cf\u2029g"
    (tmp_path / "a.txt").write_bytes(odd.encode() + b"\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": odd}, ensure_ascii=False) + "\n")
    assert read(tmp_path / "a.txt") == read(tmp_path / "a.jsonl") == [odd.encode()]


def test_empty_files_and_blank_documents_are_dropped_and_counted(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": ""}\n{"text": " \\n"}\n{"text": "\\u3000"}\n')
    report = Report()
    assert read(tmp_path / "*", report) == []
    assert report.dropped == {"empty file": 1, "empty or blank document": 3}
    assert f"{tmp_path}/b.jsonl:2" in report.places["empty or blank document"]


def test_a_report_keeps_the_first_five_places(tmp_path: Path):
    path, report = tmp_path / "a.jsonl", Report()
    path.write_bytes(b"{}\n" * 9)
    read(path, report, on_bad="skip")
    assert report.dropped["no field 'text'"] == 9
    assert report.places["no field 'text'"] == [f"{path}:{i}" for i in range(1, 6)]


GZIPPED = gzip.compress(b"line\n" * 20_000, 1)
BAD_GZIP = {
    "truncated": (GZIPPED[:-9], "truncated"),
    "garbage at the end": (GZIPPED + b"garbage", "garbage"),
    "half a header at the end": (GZIPPED + b"\x1f", "cut end"),
    "not gzip": (b"plain text\n", "not gzip"),
    "flipped": (GZIPPED[:60] + bytes([GZIPPED[60] ^ 255]) + GZIPPED[61:], "damaged|truncated"),
}


@pytest.mark.parametrize("case", BAD_GZIP)
def test_a_damaged_gzip_yields_nothing(tmp_path: Path, case: str):
    path, seen = tmp_path / "a.txt.gz", []
    path.write_bytes(BAD_GZIP[case][0])
    with pytest.raises(BadFile, match=BAD_GZIP[case][1]):
        seen.extend(Files(str(path)).documents(Report()))
    assert seen == []


def test_gzip_members_and_padding_are_read(tmp_path: Path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n") + bytes(512))
    assert read(path) == [b"one", b"two"]


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_bytes, "BOMB_BYTES", 4 << 20)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(zlib.compress(b"lol " * (2 << 20), 9, 31))
    with pytest.raises(BadFile, match="gzip bomb"):
        read(path)


def test_a_huge_line_is_cut_at_blanks_into_numbered_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 1000)
    path, report = tmp_path / "a.txt", Report()
    path.write_bytes("naïve ☃ ".encode() * 1000)
    documents = list(Files(str(path)).documents(report))
    assert b"".join(d.text for d in documents) == path.read_bytes()
    assert [d.id for d in documents[:3]] == ["a.txt:1", "a.txt:1#2", "a.txt:1#3"]
    assert all(len(d.text) <= 1000 and d.text.endswith(b" ") for d in documents)
    assert report.notes["documents cut into parts of at most 16 MiB"] == 1


def test_a_line_without_blanks_is_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes("☃".encode() * 5000)
    parts = read(tmp_path / "a.txt", document="file")
    assert "".join(part.decode() for part in parts) == "☃" * 5000


def test_an_endless_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 10_000)
    path, report = tmp_path / "a.jsonl", Report()
    path.write_bytes(b'{"text": "' + b"a" * (3 << 20) + b'"}\n' + GOOD)
    with pytest.raises(BadRecord, match="a.jsonl:1: a record of more than"):
        read(path)
    assert read(path, report, on_bad="skip") == [b"good"]
    assert sum(report.dropped.values()) == 1


def test_the_limit_of_a_document_is_16_mib():
    assert MAX_DOCUMENT_BYTES == 16 << 20


@pytest.mark.parametrize("name", ["a[1].txt", "a*.txt", "a\nb.txt", "a#1.txt", "-a?.txt"])
def test_odd_names_are_taken_literally(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"odd\n")
    (tmp_path / "a1.txt").write_bytes(b"other\n")
    documents = list(Files(str(tmp_path / name)).documents(Report()))
    assert [d.text for d in documents] == [b"odd"]
    assert "\n" not in documents[0].id and "#" not in documents[0].id


def test_a_glob_below_a_folder_with_odd_name(tmp_path: Path):
    (tmp_path / "d[1]").mkdir()
    (tmp_path / "d[1]" / "a.txt").write_bytes(b"x\n")
    assert read(tmp_path / "d[1]" / "*.txt") == [b"x"]


def test_folders_pipes_and_missing_files_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe"):
        read(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe"):
        read(tmp_path / "*")
    with pytest.raises(ValueError, match="is a folder; did you mean"):
        read(tmp_path)
    (tmp_path / "stories.txt").write_bytes(b"x")
    with pytest.raises(ValueError) as error:
        read(tmp_path / "storys*.txt")
    for part in ("storys*.txt", str(tmp_path), "stories.txt"):
        assert part in str(error.value)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link: cannot be read"):
        read(tmp_path / "link")


def test_a_damaged_parquet_file_is_named(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(BadFile, match="a.parquet: damaged or not Parquet"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("text", ["fles:a", "tfsd:x", "builtins", "files:", "tfds:", "", "a.txt"])
def test_a_mistyped_corpus_shows_the_right_forms(text: str):
    with pytest.raises(ValueError, match="builtin, files:GLOB or tfds:NAME; did you mean"):
        corpus_from_string(text)


def test_a_mistyped_setting_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'blank-line'"):
        Files("a", document="blank")  # type: ignore[arg-type]
