# SPDX-License-Identifier: Apache-2.0
"""Corpora yield the documents that they promise, in a fixed order, under stable ids."""

import gzip
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from commands import DEMO, lmjax
from hypothesis import given
from hypothesis import strategies as st

from lmjax.document import is_blank, pieces
from lmjax.text import (
    TFDS,
    BadFile,
    BadRecord,
    Builtin,
    Files,
    Report,
    corpus_from_string,
    split_of,
)


def read(path: Path | str, **settings) -> dict[str, bytes]:
    return {d.id: d.text for d in Files(str(path), **settings).documents(Report())}


def test_the_builtin_corpus_is_prose_and_deterministic():
    report = Report()
    documents = list(Builtin().documents(report))
    assert 1_500_000 < report.bytes < 4_000_000 and report.documents > 400
    assert documents == list(Builtin().documents(Report()))
    ids = [d.id for d in documents]
    assert len(set(ids)) == len(ids)
    by_id = {d.id: d.text.decode() for d in documents}
    assert "assert" in by_id["topics/assert"]
    heading, text = "json.decoder.JSONDecoder.decode\n\n", by_id["library/json.decoder"]
    assert heading + "Return the Python representation" in text
    assert not any(".test." in name or "site-packages" in name for name in ids)


def test_the_builtin_corpus_knows_its_source():
    ((name, size),) = Builtin().sources()
    assert name.startswith("Python 3.") and size > 5_000_000


def test_blocks_between_blank_lines_are_documents(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n \t\r\n\nthree\r\nfour\n\n")
    assert read(tmp_path / "a.txt") == {"a.txt:1": b"one\ntwo", "a.txt:5": b"three\nfour"}


def test_lines_are_documents_where_no_line_is_blank(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\n")
    report = Report()
    found = {d.id: d.text for d in Files(str(tmp_path / "a.txt")).documents(report)}
    assert found == {"a.txt:1": b"one", "a.txt:2": b"two"}
    assert "files read with document=line: 1" in report.lines() and not report.dropped


@pytest.mark.parametrize("count, whole", [(9, False), (10, True)])
def test_ten_files_are_ten_documents(tmp_path: Path, count: int, whole: bool):
    for i in range(count):
        (tmp_path / f"{i}.txt").write_bytes(b"one\n\ntwo\n")
    found = read(tmp_path / "*.txt")
    assert found["0.txt" if whole else "0.txt:1"] == (b"one\n\ntwo\n" if whole else b"one")


@given(st.binary(max_size=60).map(lambda b: b.replace(b"\r\n", b"\n")))
def test_a_file_document_is_the_file(tmp_path_factory, noise: bytes):
    path = tmp_path_factory.mktemp("whole") / "a.txt"
    text = "".join(chr(b) if b > 31 or b == 10 else "é" for b in noise)
    text = ("a" + text).encode()  # the mark of another format is not at its start
    path.write_bytes(text)
    assert read(path, document="file") == {"a.txt": text}


def test_formats_and_gzip_give_the_same_documents(tmp_path: Path):
    texts = ["naïve ☃", "two\nlines\r\n", "x" * 5000]
    lines = "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.json").write_bytes(lines)
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(lines))
    table = pyarrow.table({"n": [0, 1, 2], "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    for name in ("a.jsonl", "a.json", "a.ndjson.gz", "a.parquet"):
        expected = {f"{name}:{i}": t.encode() for i, t in enumerate(texts, 1)}
        assert read(tmp_path / name) == expected


def test_names_in_capitals_are_of_the_same_formats(tmp_path: Path):
    line = json.dumps({"text": "one"}).encode() + b"\n"
    (tmp_path / "A.JSONL").write_bytes(line)
    (tmp_path / "A.Json").write_bytes(line)
    (tmp_path / "A.NDJSON.GZ").write_bytes(gzip.compress(line))
    (tmp_path / "A.TXT.Gz").write_bytes(gzip.compress(b"one\n"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "A.PARQUET")
    for path in tmp_path.iterdir():
        assert read(path) == {f"{path.name}:1": b"one"}


def test_a_parquet_column_that_occurs_twice_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    twice = pyarrow.table([["a"], ["b"], [1], [2]], names=["text", "text", "n", "n"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(BadFile, match="a.parquet: the column 'text' occurs twice"):
        read(path)
    assert read(path, on_bad="skip") == {}
    pyarrow.parquet.write_table(twice.select([1, 2, 3]), path)
    assert read(path) == {"a.parquet:1": b"b"}


def test_parquet_columns_are_checked(tmp_path: Path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": ["a", None, "c"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(BadFile, match="no column 'bodi'; the nearest is 'body'"):
        read(path, field="bodi")
    with pytest.raises(BadFile, match="column 'n' does not hold strings"):
        read(path, field="n")
    with pytest.raises(BadRecord, match="a.parquet:2: the field 'body' is null"):
        read(path, field="body")
    assert list(read(path, field="body", on_bad="skip").values()) == [b"a", b"c"]


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_missing_parquet_package_is_named(tmp_path: Path, monkeypatch, on_bad: str):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="a.parquet: Parquet needs a package: pip install pyarrow"):
        read(tmp_path / "a.parquet", on_bad=on_bad)


def test_a_dataset_that_is_not_prepared_and_cannot_be_is_named(tmp_path: Path, monkeypatch):
    import tensorflow_datasets as tfds

    def offline(self, **settings):
        raise OSError("no network here")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(ValueError, match="tfds:ag_news_subset is not prepared .* no network here"):
        TFDS("ag_news_subset", data_dir=str(tmp_path)).sources()


def test_ids_do_not_depend_on_where_the_corpus_lies(tmp_path: Path, monkeypatch):
    (tmp_path / "books" / "x").mkdir(parents=True)
    (tmp_path / "books" / "x" / "a.txt").write_bytes(b"a\n")
    (tmp_path / "books" / "b.txt").write_bytes(b"b\n")
    monkeypatch.chdir(tmp_path)
    assert read("books/**/*.txt") == read(tmp_path / "books/**/*.txt")
    assert list(read("books/**/*.txt")) == ["b.txt:1", "x/a.txt:1"]
    assert Files("books/**/*.txt").sources() == [("b.txt", 2), ("x/a.txt", 2)]


def test_a_file_that_links_name_many_times_is_read_once(tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "loop").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "a.txt").write_bytes(b"a\n")
    (tmp_path / "x" / "a-again.txt").symlink_to("a.txt")
    (tmp_path / "x" / "copy.txt").write_bytes(b"a\n")
    corpus, report = Files(f"{tmp_path}/**/*.txt"), Report()
    documents = list(corpus.documents(report))
    assert [d.id for d in documents] == ["x/a.txt:1", "x/copy.txt:1"]
    assert corpus.sources() == [("x/a.txt", 2), ("x/copy.txt", 2)]
    (line,) = [line for line in report.lines() if line.startswith("further paths to a file")]
    assert int(line.rpartition(" ")[2]) > 2


def test_split_of_is_by_hash_and_keeps_parts_together():
    names = [f"doc{i}" for i in range(4000)]
    found = [split_of(name, 0.1, 0.2) for name in names]
    assert found == [split_of(name + "#7", 0.1, 0.2) for name in names]
    assert 0.08 < found.count("validation") / 4000 < 0.12
    assert 0.17 < found.count("test") / 4000 < 0.23
    assert {split_of(name, 0, 0) for name in names} == {"train"}


def test_split_of_never_changes():
    # Published splits hang on this: a changed hash moves documents from test to train.
    assert [split_of(f"d{i}", 0.3, 0.3) for i in range(6)] == [
        "validation",
        "train",
        "train",
        "test",
        "train",
        "train",
    ]


@given(st.text(min_size=1), st.integers(4, 12))
def test_pieces_lose_nothing_and_tear_no_character(text: str, limit: int):
    found = list(pieces(text.encode(), limit))
    assert "".join(piece.decode() for piece in found) == text
    assert all(0 < len(piece) <= limit for piece in found)


@given(st.text(max_size=20))
def test_blank_is_what_has_no_visible_character(text: str):
    assert is_blank(text.encode()) == (not text.strip())


def test_corpora_by_name():
    assert corpus_from_string("builtin") == Builtin()
    assert corpus_from_string("files:books/*:x.txt") == Files("books/*:x.txt")
    assert corpus_from_string("tfds:glue/cola:1.0.0") == TFDS("glue/cola:1.0.0")


BUILDER = """
import sys
import tensorflow_datasets as tfds

class LittleNotes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"note": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {name: self._generate_examples(name) for name in sys.argv[2].split(",")}

    def _generate_examples(self, split):
        for i in range(40 if split == "train" else 7):
            yield i, {"note": f"{split} note {i} é"}

LittleNotes(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""
READER = """
import json, sys
from pathlib import Path
from lmjax.data import Data
from lmjax.text import TFDS, Report
from lmjax.tokenizer import Characters

corpus = TFDS("little_notes", field="note", data_dir=sys.argv[1])
documents = [(d.id, d.text.decode(), d.split) for d in corpus.documents(Report())]
data = Data(corpus, Characters(), None, validation=0.2, test=0.2)
store = data.prepare(Path(sys.argv[2]), say=lambda line: None).store
errors = []
for wrong in (TFDS("little_note", "note", sys.argv[1]), TFDS("little_notes", "nite", sys.argv[1])):
    try:
        wrong.sources()
    except ValueError as error:
        errors.append(str(error))
assert "tensorflow" not in sys.modules
counts = {name: split.n_documents for name, split in store.splits.items()}
heads = {n: sorted({i.split(":")[0] for i in s.document_ids()}) for n, s in store.splits.items()}
print(json.dumps([documents, counts, heads, errors, corpus.sources()]))
"""


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("splits", ["train,validation,test", "train,test", "train"])
def test_a_tfds_dataset_is_read_without_tensorflow(tmp_path: Path, splits: str):
    run(BUILDER, tmp_path / "tfds", splits)
    out = run(READER, tmp_path / "tfds", tmp_path / "run").splitlines()[-1]
    documents, counts, heads, errors, sources = json.loads(out)
    own = splits.split(",")
    assert sorted(text for _, text, _ in documents) == sorted(
        f"{name} note {i} é" for name in own for i in range(40 if name == "train" else 7)
    )
    for name, _, split in documents:
        home = name.split(":")[0]
        assert split == (None if home == "train" and len(own) < 3 else home)
    assert sum(counts.values()) == len(documents) and set(counts) == {"train", "validation", "test"}
    for name in counts:  # a split of the dataset's own gets nothing else; a missing one, train's
        assert heads[name] == [name if name in own else "train"]
    assert "no TFDS dataset 'little_note'" in errors[0]
    assert "no feature 'nite'" in errors[1] and "--data.corpus.field=note" in errors[1]
    assert [name for name, _ in sources] == [f"little_notes/1.0.0 {name}" for name in own]


def test_a_damaged_tfds_dataset_is_named(tmp_path: Path):
    run(BUILDER, tmp_path / "tfds", "train")
    (shard,) = tmp_path.glob("tfds/*/*/*.array_record*")
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(BadFile, match="tfds:little_notes in .*'train' cannot be read"):
        list(TFDS("little_notes", "note", str(tmp_path / "tfds")).documents(Report()))


def test_a_run_trains_from_a_tfds_dataset_and_scores_its_own_test_split(tmp_path: Path):
    run(BUILDER, tmp_path / "tfds", "train,validation,test")
    keys = ("--data.corpus=tfds:little_notes", "--data.corpus.field=note")
    keys += (f"--data.corpus.data_dir={tmp_path / 'tfds'}", f"--workdir={tmp_path / 'run'}")
    lmjax("train", DEMO, "--tiny", "--steps=2", "--data.examples.length=16", *keys)
    out, _ = lmjax("evaluate", DEMO, "--tiny", f"--workdir={tmp_path / 'run'}")
    assert "test split at step 2" in out and "7 documents" in out
