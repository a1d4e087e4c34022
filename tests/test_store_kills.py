# SPDX-License-Identifier: Apache-2.0
"""Stores under accidents: builders that are killed, builders that meet, files of another store."""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import write_lines

from lmjax.data import Data, open_prepared
from lmjax.store import open_store
from lmjax.text import Files
from lmjax.tokenizer import ByteBPE

BUILDER = """
import sys, time
from pathlib import Path
from lmjax import store_build
from lmjax.data import Data
from lmjax.text import Files
from lmjax.tokenizer import ByteBPE

store_build.BATCH_BYTES = 2000
slow = float(sys.argv[3])
Data(Files(sys.argv[1]), ByteBPE(vocab=300), None, validation=0.2, test=0.2).prepare(
    Path(sys.argv[2]), progress=lambda done, total: time.sleep(slow), say=lambda line: None)
"""


def start(corpus: Path, run: Path, slow: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(corpus), str(run), str(slow)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "corpus")


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def wait_for(found: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def kill_at_random(corpus: Path, run: Path, kills: int, seed: int) -> int:
    """Kills builders at random moments of their work; returns how many left it unfinished."""
    chance, unfinished = random.Random(seed), 0
    for _ in range(kills):
        builder = start(corpus, run, 0.02)
        wait_for(lambda: list(run.glob(".data.building-*")))
        time.sleep(chance.uniform(0, 0.8))
        builder.kill()
        builder.wait()
        unfinished += not (run / "data").exists()
        assert len(list(run.glob(".data.building-*"))) <= 1  # debris does not grow
        if (run / "data").exists():  # it was done: what has the name is whole
            open_store(run / "data")
            shutil.rmtree(run / "data")
    return unfinished


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 1), *(pytest.param(12, s, marks=pytest.mark.slow) for s in (2, 3))]
)
def test_a_builder_killed_at_random_moments_equals_a_clean_one(
    corpus: Path, tmp_path: Path, kills: int, seed: int
):
    assert start(corpus, tmp_path / "clean", 0).wait(60) == 0
    assert kill_at_random(corpus, tmp_path / "run", kills, seed) > kills // 3
    assert start(corpus, tmp_path / "run", 0).wait(60) == 0
    assert contents(tmp_path / "run" / "data") == contents(tmp_path / "clean" / "data")
    assert not list((tmp_path / "run").glob(".data.building-*"))


def test_two_builders_of_one_store_end_with_one(corpus: Path, tmp_path: Path):
    builders = [start(corpus, tmp_path / "run", 0.01) for _ in range(2)]
    assert [builder.wait(60) for builder in builders] == [0, 0]
    assert open_prepared(tmp_path / "run" / "data").store.splits["train"].n_documents > 1000


def test_files_of_another_store_are_refused_by_name(corpus: Path, tmp_path: Path):
    """A shard that is doubled, or stands for another one, or comes from another tokeniser."""
    for name, vocab in (("mine", 300), ("other", 290)):
        data = Data(Files(str(corpus)), ByteBPE(vocab=vocab), None, 0.2, 0.2)
        data.prepare(tmp_path / name, say=lambda line: None)
    mine, other = tmp_path / "mine" / "data", tmp_path / "other" / "data"

    def swapped(path: Path, content: bytes) -> str:
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            open_store(mine)
        path.write_bytes(before)
        return str(error.value)

    for column in ("tokens", "starts", "bytes", "ids"):
        path = mine / f"train.{column}"
        assert f"{path} has" in swapped(path, path.read_bytes() * 2)
        assert f"{path} " in swapped(path, (mine / f"validation.{column}").read_bytes())
    assert f"{mine}/train.tokens " in swapped(
        mine / "train.tokens", (other / "train.tokens").read_bytes()
    )
    manifest = (other / "manifest.json").read_bytes()
    assert f"{mine}/tokenizer is not the tokenizer" in swapped(mine / "manifest.json", manifest)
    shutil.rmtree(mine / "tokenizer")
    shutil.copytree(other / "tokenizer", mine / "tokenizer")
    with pytest.raises(ValueError, match=f"{mine}/tokenizer is not the tokenizer that made"):
        open_store(mine)
