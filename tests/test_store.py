# SPDX-License-Identifier: Apache-2.0
"""The store holds every token, is sealed, survives kills, and keeps the splits apart."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from commands import write_lines

from lmjax import store as module
from lmjax import store_build
from lmjax.data import Data, Prepared
from lmjax.document import Document, Report
from lmjax.store import Occupied, Store, build_store, building, open_store
from lmjax.text import BadRecord, Files, split_of
from lmjax.tokenizer import ByteBPE, Characters, SentencePiece, Tokenizer, load_tokenizer

DOCUMENTS = [Document(f"d{i}", f"document {i} é {'x' * (i % 7)}\n".encode()) for i in range(60)]


def hashed(document: Document) -> str:
    return split_of(document.id, 0.2, 0.2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("t") / "tokenizer"
    ByteBPE(vocab=300).build((d.text for d in DOCUMENTS), folder)
    return load_tokenizer(folder)


@pytest.fixture
def built(tmp_path: Path, tokenizer: Tokenizer) -> Store:
    build_store(tmp_path / "store", DOCUMENTS, tokenizer, {"a": 1}, hashed)
    return open_store(tmp_path / "store", {"a": 1})


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def prepare(data: Data, folder: Path) -> Prepared:
    return data.prepare(folder, say=lambda line: None)


def test_every_document_comes_back_behind_its_end_of_text(built: Store, tokenizer: Tokenizer):
    seen = {}
    for name, split in built.splits.items():
        assert split.tokens.dtype == np.uint16
        assert split.n_tokens == split.starts[-1] and split.n_documents == len(split.starts) - 1
        for i, document_id in enumerate(split.document_ids()):
            ids = split.tokens[split.starts[i] : split.starts[i + 1]]
            assert ids[0] == tokenizer.eot and tokenizer.eot not in ids[1:]
            text = tokenizer.decode(ids[1:])
            assert split.document_bytes[i] == len(text.encode())
            seen[document_id] = (text.encode(), name)
        assert split.n_bytes == split.document_bytes.sum()
    assert seen == {d.id: (d.text, hashed(d)) for d in DOCUMENTS}
    assert built.eot == tokenizer.eot and built.vocab == tokenizer.vocab


def test_a_tokenizer_without_end_of_text_adds_nothing(tmp_path: Path):
    Characters().build((d.text for d in DOCUMENTS), tmp_path / "t")
    build_store(tmp_path / "s", DOCUMENTS, load_tokenizer(tmp_path / "t"), {}, lambda d: "train")
    train = open_store(tmp_path / "s").splits["train"]
    assert train.n_tokens == sum(len(d.text.decode()) for d in DOCUMENTS)


@pytest.mark.parametrize("vocab, dtype", [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_token_type_holds_every_id(tmp_path: Path, tokenizer, monkeypatch, vocab, dtype):
    monkeypatch.setattr(tokenizer, "vocab", vocab)
    monkeypatch.setattr(tokenizer, "eot", vocab - 1)
    build_store(tmp_path / "s", DOCUMENTS, tokenizer, {}, lambda d: "train")
    tokens = open_store(tmp_path / "s").splits["train"].tokens
    assert tokens.dtype == dtype and int(tokens[0]) == vocab - 1


def test_an_id_beyond_the_vocabulary_is_never_stored(tmp_path: Path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab", 200)
    with pytest.raises(AssertionError, match="out of vocabulary"):
        build_store(tmp_path / "s", DOCUMENTS, tokenizer, {}, hashed)
    assert not (tmp_path / "s").exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}
FILES = [
    "manifest.json", "train.tokens", "train.starts", "test.bytes", "validation.ids",
    "tokenizer/tokenizer.json", "tokenizer/description.json",
]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(built: Store, file: str, damage: str):
    DAMAGE[damage](built.directory / file)
    with pytest.raises(ValueError) as error:
        open_store(built.directory)
    assert Path(file).name in str(error.value)


def test_swapped_splits_are_refused(built: Store):
    folder = built.directory
    (folder / "train.tokens").rename(folder / "x")
    (folder / "test.tokens").rename(folder / "train.tokens")
    (folder / "x").rename(folder / "test.tokens")
    with pytest.raises(ValueError, match="delete the folder"):
        open_store(folder)


def reseal(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("seal")
    change(manifest)
    manifest["seal"] = module._seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(vocab=100), "ids beyond the vocabulary of 100"),
        (lambda m: m.update(format=9), "has format 9"),
        (lambda m: m.update(tokenizer="x"), "not the tokenizer that made"),
        (lambda m: m["splits"]["train"].update(tokens=1), "size of tokens of train"),
        (lambda m: m.update(dtype="O"), "describes no store .dtype"),
        (
            lambda m: m["splits"].update({"../x": m["splits"]["train"]}),
            "describes no store .splits",
        ),
        (lambda m: m["splits"]["train"]["files"]["ids"].update(name="/dev/zero"), "ids of train"),
        (lambda m: m["splits"]["train"]["files"]["tokens"].update(name="../a"), "tokens of train"),
        (lambda m: m["splits"]["test"].update(documents=True), "counts of test"),
        (lambda m: m.pop("report"), "sources, report"),
        (lambda m: m.pop("tokenizer"), "describes no store .tokenizer"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(built: Store, change, message: str):
    reseal(built.directory, change)
    with pytest.raises(ValueError, match=message):
        open_store(built.directory)


def test_an_edited_manifest_is_refused(built: Store):
    path = built.directory / "manifest.json"
    path.write_text(path.read_text().replace('"a": 1', '"a": 2'))
    with pytest.raises(ValueError, match="manifest.json was changed"):
        open_store(built.directory, {"a": 2})


def test_another_spec_is_refused_with_the_difference(built: Store):
    with pytest.raises(ValueError, match=r'a 1 -> 2; b absent -> {"c": "x"}') as error:
        open_store(built.directory, {"a": 2, "b": {"c": "x"}})
    assert "delete the folder" in str(error.value)


def test_nothing_is_built_over_something(built: Store, tokenizer: Tokenizer):
    before = contents(built.directory)
    with pytest.raises(Occupied, match="in the way"):
        build_store(built.directory, DOCUMENTS, tokenizer, {}, hashed)
    assert contents(built.directory) == before


def test_progress_counts_bytes(tmp_path: Path, tokenizer: Tokenizer, monkeypatch):
    monkeypatch.setattr(store_build, "BATCH_BYTES", 100)
    seen: list[tuple[int, int | None]] = []
    total = sum(len(d.text) for d in DOCUMENTS)
    build_store(
        tmp_path / "s", DOCUMENTS, tokenizer, {}, hashed,
        lambda done, of: seen.append((done, of)), total_bytes=total,
    )  # fmt: skip
    assert len(seen) > 5 and seen == sorted(seen) and seen[-1] == (total, total)


def test_a_failed_build_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer):
    def broken() -> Iterator[Document]:
        yield from DOCUMENTS
        raise BadRecord("a.txt", 3, "bad")

    with pytest.raises(BadRecord):
        build_store(tmp_path / "s", broken(), tokenizer, {}, hashed)
    assert [p.name for p in tmp_path.iterdir()] == [".s.lock"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "corpus")


def test_an_unfinished_folder_is_refused(tmp_path: Path, corpus: Path):
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "s") as folder:
        shutil.copytree(folder, tmp_path / "data")
        (tmp_path / "data" / "train.tokens").write_bytes(b"")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="manifest.json is missing: the store is unfinished"):
        prepare(Data(Files(str(corpus)), Characters(), None), tmp_path)


def test_a_store_is_reused_and_other_settings_are_refused(tmp_path: Path, corpus: Path):
    data = Data(Files(str(corpus)), SentencePiece(vocab=300), None)
    first = contents(prepare(data, tmp_path).store.directory)
    assert contents(prepare(replace(data, examples="other"), tmp_path).store.directory) == first
    with pytest.raises(ValueError, match=r'corpus.document "auto" -> "file"'):
        prepare(replace(data, corpus=Files(str(corpus), document="file")), tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.vocab 300 -> 301; validation 0.05 -> 0.1"):
        prepare(replace(data, tokenizer=SentencePiece(vocab=301), validation=0.1), tmp_path)


def test_a_changed_source_is_refused_and_a_vanished_one_is_not(tmp_path: Path, corpus: Path):
    (corpus.parent / "b.txt").write_text("one\ntwo\nthree\n")
    data = Data(Files(str(corpus.parent / "*.txt")), Characters(), None)
    prepare(data, tmp_path)
    (corpus.parent / "b.txt").write_text("one\ntwo\nthree\nfour\n")
    with pytest.raises(ValueError, match=r"changed since .*: b.txt \(14 bytes -> 19 bytes\)"):
        prepare(data, tmp_path)
    (corpus.parent / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b.txt \(14 bytes -> absent\)"):
        prepare(data, tmp_path)
    corpus.unlink()
    said: list[str] = []
    data.prepare(tmp_path, say=said.append)
    assert "using its sealed store" in said[0]


def test_splits_never_share_a_document_and_train_alone_teaches(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{chr(0x4E00 + i)}\n" for i in range(300)))
    made = prepare(Data(Files(str(path)), Characters(), None, validation=0.1, test=0.1), tmp_path)
    ids = {name: set(split.document_ids()) for name, split in made.store.splits.items()}
    assert sum(map(len, ids.values())) == len(set().union(*ids.values())) == 300
    assert made.tokenizer.vocab == len(ids["train"]) + 1
    counts = {n: facts["unknown"] for n, facts in made.store.manifest["splits"].items()}
    assert counts == {"train": 0, "validation": len(ids["validation"]), "test": len(ids["test"])}


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_every_split_gets_a_document(tmp_path: Path, count: int):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(count)))
    data = Data(Files(str(path)), Characters(), None, validation=0.01, test=0.01)
    counts = {n: s.n_documents for n, s in prepare(data, tmp_path).store.splits.items()}
    assert counts == {"train": count - 2, "validation": 1, "test": 1}


def test_fewer_documents_than_splits_is_an_error_with_the_remedy(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    data = Data(Files(str(tmp_path / "a.txt")), Characters(), None)
    with pytest.raises(ValueError, match="2 documents for 3 splits") as error:
        prepare(data, tmp_path)
    for remedy in ("--data.corpus.document=line", "--data.split=tail"):
        assert remedy in str(error.value)
    assert set(prepare(replace(data, test=0), tmp_path).store.splits) == {"train", "validation"}


def test_an_empty_corpus_is_an_error(tmp_path: Path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(
        ValueError, match="no text to train on: 0 documents, 0 bytes; dropped 1: empty file"
    ):
        prepare(Data(Files(str(tmp_path / "a.txt")), Characters(), None), tmp_path)


@pytest.mark.parametrize("validation, test", [(0.1, 0.0), (0.05, 0.05), (0.25, 0.125)])
def test_tail_cuts_every_document_by_characters(tmp_path: Path, validation: float, test: float):
    text = "".join(chr(0x100 + i % 500) for i in range(1001)) + "\n"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    corpus = Files(str(tmp_path / "a.txt"), document="file")
    data = Data(corpus, SentencePiece(vocab=600), None, validation, test, split="tail")
    made = prepare(data, tmp_path)
    names = ["train", "validation"] + (["test"] if test else [])
    assert set(made.store.splits) == set(names)
    parts = [made.tokenizer.decode(made.store.splits[name].tokens) for name in names]
    assert "".join(parts) == text
    assert len(parts[0]) == int(1002 * round(1 - validation - test, 9))


def test_tail_gives_the_published_split_of_tiny_shakespeare_lengths(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a" * 1_115_393 + b"\n")
    corpus = Files(str(tmp_path / "a.txt"), document="file")
    data = Data(corpus, Characters(), None, validation=0.1, test=0.0, split="tail")
    splits = prepare(data, tmp_path).store.splits
    assert {n: s.n_tokens for n, s in splits.items()} == {"train": 1_003_854, "validation": 111_540}


@dataclass(frozen=True)
class OwnSplits:
    """A corpus that brings a test split."""

    def documents(self, report: Report) -> Iterator[Document]:
        for document in DOCUMENTS:
            yield report.keep(replace(document, split="test" if document.id < "d2" else None))

    def sources(self) -> list[tuple[str, int]]:
        return []


def test_a_split_of_the_corpus_is_kept_and_nothing_joins_it(tmp_path: Path):
    splits = prepare(Data(OwnSplits(), Characters(), None, 0.1, 0.4), tmp_path).store.splits
    assert set(splits["test"].document_ids()) == {d.id for d in DOCUMENTS if d.id < "d2"}
    assert splits["validation"].n_documents > 0


def test_the_tokenizer_learns_from_all_over_the_training_split(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a" * 60_000 + "b" * 60_000 + "c" * 60_000)
    tokenizer = ByteBPE(vocab=300, train_bytes=90_000)
    corpus = Files(str(tmp_path / "a.txt"), document="file")
    made = prepare(Data(corpus, tokenizer, None, 0, 0), tmp_path)
    for letter in "abc":
        assert len(made.tokenizer.encode(letter * 64)) < 32


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"validation": 1.5}, "data.validation=1.5"),
        ({"validation": 0.5, "test": 0.5}, "leave no training split"),
        ({"split": "random"}, "one of documents, tail"),
    ],
)
def test_impossible_shares_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Data(Files("a"), Characters(), None, **settings)


def test_prepare_says_what_was_built(tmp_path: Path, corpus: Path):
    said: list[str] = []
    Data(Files(str(corpus)), Characters(), None).prepare(tmp_path, say=said.append)
    assert said[0].startswith("2,000 documents, ") and "document=line: 1" in said[1]
    assert [line.split(":")[0] for line in said[-3:]] == ["train", "validation", "test"]


def test_no_data_module_imports_jax():
    code = "import sys, lmjax.data; assert not {'jax', 'flax'} & set(sys.modules)"
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
