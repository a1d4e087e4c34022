# SPDX-License-Identifier: Apache-2.0
"""Documents that a recipe names for its validation split."""

from dataclasses import replace
from pathlib import Path

import pytest
from commands import DEMO, ROOT, write_text

from lmjax.__main__ import main
from lmjax.data import Data
from lmjax.text import Files
from lmjax.tokenizer import SentencePiece


def test_documents_that_are_named_are_held_out_and_no_others(tmp_path: Path):
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text(f"{name} has a text of its own", "utf-8")
    corpus = Files(str(tmp_path / "*.txt"), document="file")
    data = Data(corpus, SentencePiece(vocab=300), None, test=0.0, held_out="b.txt, d*")
    store = data.prepare(tmp_path / "run", say=lambda _: None).store
    assert store.splits["validation"].document_ids() == ["b.txt", "d.txt"]
    assert store.splits["train"].document_ids() == ["a.txt", "c.txt"]
    assert data.spec() != replace(data, held_out="b.txt").spec()
    with pytest.raises(ValueError, match="no document has an id like e.txt.*'d.txt'"):
        replace(data, held_out="a.txt,e.txt").prepare(tmp_path / "other", say=lambda _: None)


def test_a_validation_split_too_short_to_score_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    (tmp_path / "corpus").mkdir()
    write_text(tmp_path / "corpus")
    (tmp_path / "corpus" / "short.txt").write_text("hi", "utf-8")
    keys = ("--data.corpus.document=file", "--data.held_out=short.txt", "--data.test=0")
    corpus = f"--data.corpus=files:{tmp_path}/corpus/*.txt"
    assert main(["train", DEMO, "--tiny", f"--workdir={tmp_path}/run", corpus, *keys]) == 2
    out = capsys.readouterr()
    assert "the validation split has" in out.err and "step 1/" not in out.out
