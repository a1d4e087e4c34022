# SPDX-License-Identifier: Apache-2.0
"""The rows of bad input that need more than a file: long lines, control ids, too little text,
loaders that fail. What other tests hold is listed at the end, so that the table is whole."""

import ast
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from commands import DEMO, ROOT

from lmjax.__main__ import main
from lmjax.batches import Plan, host_batches
from lmjax.data import Data, hold_out
from lmjax.text import BadRecord, Document, Files, Report
from lmjax.tokenizer import (
    ByteBPE,
    Characters,
    SentencePiece,
    Vocabulary,
    WordPiece,
    load_tokenizer,
)
from lmjax.units import Units

# --- control ids come from the packer only --------------------------------------------------------

SPELT = "<|endoftext|> <s> </s> <unk> <pad> <mask> [CLS] [SEP] [MASK] [PAD] [UNK] <S> </S> <UNK> ▁"
SPECS = {
    "sentencepiece": SentencePiece(vocab=400),
    "albert": SentencePiece(vocab=400, controls="albert"),
    "byte-bpe": ByteBPE(vocab=300),
    "roberta": ByteBPE(vocab=300, controls="roberta"),
    "wordpiece": WordPiece(vocab=200),
    "characters": Characters(),
    "words": Vocabulary(size=40),
}


@pytest.mark.parametrize("name", SPECS)
def test_control_ids_spelt_in_the_text_are_text(name: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text(f"one {SPELT} two.\n" * 30, "utf-8")
    corpus = Files(str(tmp_path / "a.txt"), document="line")
    made = Data(corpus, SPECS[name], None, 0, 0).prepare(tmp_path / "run", say=lambda line: None)
    split, tokenizer = made.store.splits["train"], made.tokenizer
    counts = np.bincount(split.tokens, minlength=tokenizer.vocab)
    for control in set(tokenizer.controls.values()) - {tokenizer.eot}:
        assert counts[control] == 0
    if tokenizer.eot is not None and name != "words":  # there it ends sentences as well
        assert counts[tokenizer.eot] == 30 == split.n_documents
    if tokenizer.lossless and name != "words":
        ids = split.tokens[split.starts[7] + (tokenizer.eot is not None) : split.starts[8]]
        assert tokenizer.decode(ids) == f"one {SPELT} two."


# --- one line of 100 MB ---------------------------------------------------------------------------

BUILD = """
import sys
from pathlib import Path
from lmjax.data import Data
from lmjax.text import BadRecord, Files, Report
from lmjax.tokenizer import *
from lmjax.units import Units
store = Data(Files(sys.argv[1]), {tokenizer}, None, 0, 0, units={units}).prepare(
    Path(sys.argv[2]), say=lambda line: None).store
status = Path("/proc/self/status").read_text()
print(store.splits["train"].n_bytes, int(status.partition("VmHWM:")[2].split()[0]) >> 10)
"""


def peak_of(tokenizer: str, path: Path, run: Path) -> tuple[int, int]:
    """(bytes of text in the store, MiB of memory at most) of a build in a process of its own."""
    units = Units() if tokenizer in ("wordpiece", "words") else None
    code = BUILD.format(tokenizer=SPECS[tokenizer], units=units)
    command = [sys.executable, "-c", code, path, run]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    size, peak = map(int, done.stdout.split())
    return size, peak


def one_line(path: Path, megabytes: int, kind: str) -> int:
    """Writes a line of that size: of words, with an emoji here and there, or without a blank."""
    source = random.Random(0)
    words = [f"{source.randrange(1 << 20):x}" for _ in range(5000)]
    block = ((" " if kind == "words" else "").join(source.choices(words, k=20_000)) + "😀").encode()
    before, after = (b'{"text": "', b'"}\n') if path.suffix == ".jsonl" else (b"", b"\n")
    with open(path, "wb") as file:
        file.write(before)
        for _ in range(megabytes * 2**20 // len(block)):
            file.write(block)
        file.write(after)
    return path.stat().st_size - len(before) - len(after)


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "characters"])
def test_a_line_of_10_mb_stays_far_below_a_gib(tokenizer: str, tmp_path: Path):
    size = one_line(tmp_path / "a.txt", 10, "words")
    kept, peak = peak_of(tokenizer, tmp_path / "a.txt", tmp_path / "run")
    assert kept == size and peak < 512


@pytest.mark.slow
@pytest.mark.parametrize(("name", "megabytes"), [("a.txt", 100), ("a.jsonl", 60)])
@pytest.mark.parametrize("kind", ["words", "no blanks"])
@pytest.mark.parametrize(
    "tokenizer", ["characters", "sentencepiece", "byte-bpe", "wordpiece", "words"]
)
def test_a_line_of_100_mb_stays_below_a_gib(
    tokenizer: str, kind: str, name: str, megabytes: int, tmp_path: Path
):
    """A record of JSONL may have 64 MiB; a longer one is refused by its line."""
    size = one_line(tmp_path / name, megabytes, kind)
    kept, peak = peak_of(tokenizer, tmp_path / name, tmp_path / "run")
    print(f"{tokenizer}, {kind}, {megabytes} MB {name}: {peak} MiB")
    assert kept == size > (megabytes - 1) << 20 and peak < 1024


def test_a_record_over_64_mib_is_refused_by_its_line(tmp_path: Path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "good"}\n{"text": "')
        for _ in range(65):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n{"text": "good"}\n')
    corpus = Files(str(tmp_path / "a.jsonl"))
    with pytest.raises(BadRecord, match="a.jsonl:2: a record of more than 64 MiB"):
        list(corpus.documents(Report()))
    report = Report()
    found = [d.text for d in replace(corpus, on_bad="skip").documents(report)]
    assert found == [b"good"] * 2 and report.dropped == {"a record of more than 64 MiB": 1}


# --- too little text ------------------------------------------------------------------------------


def refused(capsys, corpus: Path, *keys: str) -> str:
    """The error of `train` on a corpus."""
    workdir = f"--workdir={corpus.parent}/run"
    keys = ("--data.validation=0", "--data.test=0", "--data.tokenizer.vocab=300", *keys)
    assert main(["train", DEMO, "--tiny", workdir, f"--data.corpus=files:{corpus}", *keys]) == 2
    return capsys.readouterr().err


def test_less_text_than_a_batch_states_both_numbers(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "a.txt"
    path.write_text("the cat sat on a mat, and a bird flew over two old barns at noon\n" * 5)
    err = refused(capsys, path)
    examples = int(err.partition("makes ")[2].split()[0])
    assert 1 <= examples < 8 and "fewer than one batch of 8; add text, or make --batch" in err
    err = refused(capsys, path, f"--batch={8 * examples + 8}", "--accumulate=1")
    assert f"makes {examples} examples" in err and f"one batch of {8 * examples + 8}" in err


def test_less_text_than_an_example_states_both_numbers(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "a.txt").write_text("a cat\n")
    err = refused(capsys, tmp_path / "a.txt")
    assert "tokens, fewer than one window of 32 + 1" in err


def test_an_empty_corpus_is_refused(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "a.txt").write_text("")
    assert "no text to train on: 0 documents, 0 bytes" in refused(capsys, tmp_path / "a.txt")


# --- a corpus that changes while it is read -------------------------------------------------------


LINE = "a line of text.\n"


@dataclass(frozen=True)
class Unsteady(Files):
    """Two files, of which the second has another number of lines when it is read once more."""

    lines: int = 0
    left: ClassVar[list[str]] = []  # passes over the corpus before that one

    def documents(self, report: Report) -> Iterator[Document]:
        change = not self.left
        del self.left[:1]
        for number, document in enumerate(super().documents(report)):
            if change and number == 5:
                Path(self.glob).with_name("b.txt").write_text(LINE * self.lines)
            yield document


@pytest.mark.parametrize("lines", [5, 20])
def test_a_corpus_that_changes_while_it_is_read_is_refused(lines: int, tmp_path: Path):
    def unsteady(passes: int) -> Unsteady:
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text(LINE * 10)
        Unsteady.left[:] = ["pass"] * passes
        return Unsteady(str(tmp_path / "*.txt"), document="line", lines=lines)

    wanted = rf"changed while it was read: b.txt \(160 bytes -> {16 * lines} bytes\)"
    for passes in range(3):  # of the survey, the tokenizer, the store
        data = Data(unsteady(passes), Characters(), None, 0, 0)
        with pytest.raises(ValueError, match=wanted):
            data.prepare(tmp_path / "run", say=lambda line: None)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".data.lock"}
    Characters().build(iter([LINE.encode()]), tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=wanted):
        hold_out(unsteady(0), load_tokenizer(tmp_path / "tokenizer"), tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]


# --- loaders that fail ----------------------------------------------------------------------------

FAILURES = {"ValueError": ValueError, "IndexError": IndexError, "StopIteration": StopIteration}


def fail_at_8(kind: str, examples: np.ndarray) -> dict[str, np.ndarray]:
    """An example maker of which one example cannot be made."""
    if 8 in examples:
        raise FAILURES[kind]("example 8")
    return {"x": examples}


@pytest.mark.parametrize(
    ("kind", "workers"), [*((kind, 0) for kind in FAILURES), ("StopIteration", 1)]
)
def test_an_example_that_cannot_be_made_ends_the_run(kind: str, workers: int):
    """It is neither left out nor taken for the end of the run."""
    found = host_batches((partial(fail_at_8, kind),), Plan(4, 1), 0, 6, workers=workers)
    assert [next(found)["x"][0], next(found)["x"][0]] == [0, 4]
    wanted = RuntimeError if kind == "StopIteration" else FAILURES[kind]
    with pytest.raises(wanted, match="step 2 ended" if kind == "StopIteration" else "example 8"):
        next(found)


# --- the rest of the table ------------------------------------------------------------------------

ELSEWHERE = {
    "C/POSIX locale": ("test_security", "test_a_run_in_the_c_locale_reads_and_writes_utf8"),
    "gz: an archive yields nothing before it is whole": (
        "test_bad_input", "test_a_damaged_gzip_yields_nothing",
    ),
    "token id ≥ vocab, at build": (
        "test_store", "test_an_id_beyond_the_vocabulary_is_never_stored",
    ),
    "token id ≥ vocab, at load": ("test_store", "test_a_manifest_that_does_not_fit_is_refused"),
    "uint16 store with vocab > 65,535": ("test_store", "test_the_token_type_holds_every_id"),
    "builder killed": (
        "test_store_kills", "test_a_builder_killed_at_random_moments_equals_a_clean_one",
    ),
    "shard missing, duplicated, cut, flipped": ("test_store", "test_damage_is_refused_by_name"),
    "shard of another split": ("test_store", "test_swapped_splits_are_refused"),
    "shard from another tokeniser": (
        "test_store_kills", "test_files_of_another_store_are_refused_by_name",
    ),
    "raw .bin tokens": ("test_store", "test_damage_is_refused_by_name"),
}  # fmt: skip


@pytest.mark.parametrize("row", ELSEWHERE)
def test_every_other_row_of_the_table_has_its_test(row: str):
    module, name = ELSEWHERE[row]
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text("utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
