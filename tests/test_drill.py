# SPDX-License-Identifier: Apache-2.0
"""The drill: it holds on a recipe of each family, and it sees what does not hold."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import COMPILE_FASTER, lmjax, start, write_text
from processes import descendants, wait_until_gone

from lmjax import recipe
from lmjax.drill import Verdict, drill
from lmjax.drill_runs import Process, Trainer
from lmjax.run import replace
from lmjax.witness import seen


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("name", ["gpt2_small", "bert_base", "elmo"])
def test_a_recipe_of_each_family_passes(name, tmp_path):
    out, _ = lmjax(
        "drill", f"experiments/{name}.py", "--tiny", "--kills=1", "--steps=24",
        f"--folder={tmp_path / 'drill'}", flags=COMPILE_FASTER,
    )  # fmt: skip
    last = out.strip().split("\n")[-1]
    assert re.fullmatch(
        r"drill: all \d\d comparisons hold after 1× SIGKILL, 1× SIGTERM, 1× SIGINT, 3× damaged"
        r" checkpoint, 2× control, 2× change of devices, 1× change of processes",
        last,
    ), out
    assert out.count("losses bit-equal") >= 4


def lines(*steps: tuple[int, str, float]) -> str:
    return "".join(json.dumps([n, batch, loss.hex()]) + "\n" for n, batch, loss in steps)


def test_a_witness_is_read_though_its_last_line_was_cut(tmp_path):
    path = tmp_path / "w"
    path.write_text(lines((1, "a", 0.5), (2, "b", 0.25)) + '[3, "c')
    assert [(s.step, s.batch, s.value) for s in seen(path)] == [(1, "a", 0.5), (2, "b", 0.25)]
    with open(path, "a") as file:  # the run went on
        file.write(lines((2, "b", 0.25)))
    assert [s.step for s in seen(path)] == [1, 2, 2]
    assert seen(tmp_path / "none") == []


class Puppet(Trainer):
    """Runs that leave what a test says instead of training."""

    def run(self, name: str, *keys: str, devices: int = 0) -> str:
        played = self.folder.parent / "played" / name
        if not played.exists():
            raise ValueError(f"nothing played for {name}")
        (self.folder / f"{name}.witness").write_text(played.read_text())
        return ""


def test_what_differs_is_found_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lmjax.drill.Trainer", Puppet)
    monkeypatch.setattr("lmjax.drill._Drill._on_cpu", lambda self: True)
    straight = [(n, f"b{n}", 1.0 + n) for n in range(1, 7)]
    played = tmp_path / "played"
    played.mkdir()
    (played / "straight").write_text(lines(*straight))
    (played / "meshes").write_text(
        lines(*straight[:2], (3, "other", 4.0), (4, "b4", 5.001), *straight[4:])
    )
    run = replace(recipe.load("experiments/demo.py", tiny=True), steps=6)
    said: list[str] = []
    arguments = ["experiments/demo.py", "--tiny", "--steps=6"]
    kept = tmp_path / "kept"
    monkeypatch.setattr("lmjax.drill._Drill.stops", lambda self, kills: None)
    monkeypatch.setattr("lmjax.drill._Drill.damage", lambda self: None)
    monkeypatch.setattr("lmjax.drill._Drill.controls", lambda self: None)
    monkeypatch.setattr("lmjax.drill._Drill.processes", lambda self: None)
    assert not drill(run, arguments, 0, 0, kept, {}, said.append)
    told = "\n".join(said)
    assert "FAILED meshes: batches: step 3 saw another batch (1 such)" in told
    assert "FAILED meshes: losses: step 4 has another loss (1 such)" in told
    assert re.fullmatch(r"drill: \d+ of \d+ comparisons FAILED after .*", said[-1])
    assert str(kept) in told


def test_without_a_straight_run_nothing_else_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("lmjax.drill.Trainer", Puppet)
    run = recipe.load("experiments/demo.py", tiny=True)
    said: list[str] = []
    assert not drill(
        run, ["experiments/demo.py", "--tiny"], 1, 0, tmp_path / "kept", {}, said.append
    )
    assert said[-1] == "drill: 1 of 1 comparisons FAILED after nothing"


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine").write_text("x")
    _, errors = lmjax("drill", "experiments/demo.py", "--tiny", f"--folder={tmp_path}", code=2)
    assert "is not empty; a drill needs a folder of its own" in errors
    _, errors = lmjax("drill", "experiments/demo.py", "--tiny", "--kills=-1", code=2)
    assert "--kills=-1: must be 0 or more" in errors
    few = ("--kills=2", "--steps=9", f"--folder={tmp_path / 'new'}")
    _, errors = lmjax("drill", "experiments/demo.py", "--tiny", *few, code=2)
    assert "--steps=9: a drill with --kills=2 needs at least 10 steps" in errors
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_drill_leaves_nothing(number, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = start("drill", "experiments/demo.py", "--tiny", "--steps=2000000")
    assert process.stdout is not None and process.stdout.readline().startswith("straight")
    while not list(tmp_path.glob("lmjax-drill-*/straight")):  # made by the first run
        time.sleep(0.05)
    runs = descendants(process.pid) - {process.pid}
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert runs and not wait_until_gone(runs, 10)
    assert not list(tmp_path.glob("lmjax-drill-*"))


def test_a_signal_waits_for_a_step_of_the_start_that_it_is_sent_to(tmp_path, monkeypatch):
    """Earlier starts came as far already; what they saw is in the same file."""
    witness = tmp_path / "run.witness"
    witness.write_text(lines((1, "a", 0.5), (2, "b", 0.25)))
    later = (
        f"import time; time.sleep(1); open({str(witness)!r}, 'a').write({lines((2, 'b', 0.25))!r})"
    )
    program = f"{later}; time.sleep(60)"

    def start(self, name: str, *keys: str, **rest) -> Process:
        log = tmp_path / "log"
        log.write_text("")
        return Process(subprocess.Popen([sys.executable, "-c", program]), log)

    monkeypatch.setattr(Trainer, "start", start)
    trainer = Trainer((), tmp_path, timeout=30)
    assert trainer.stopped("run", signal.SIGKILL, 2, 0.0, saving=False)
    assert len(trainer.seen("run")) == 3


def test_the_sentence_counts():
    verdict = Verdict()
    verdict.count("SIGKILL", 3)
    verdict.check("a")
    assert verdict.sentence() == "drill: all 1 comparisons hold after 3× SIGKILL"
    verdict.check("b", "differs", "is missing")
    assert verdict.sentence() == "drill: 2 of 3 comparisons FAILED after 3× SIGKILL"
