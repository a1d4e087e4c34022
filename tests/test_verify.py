# SPDX-License-Identifier: Apache-2.0
"""`verify`: which steps of a run directory are what was saved, without its experiment file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment
from test_checkpoint import RECIPE, bits, mesh, restore, save
from test_damage import edit, empty, flip_values, state_at, target

import lmjax.checkpoint
from lmjax import sharding
from lmjax.__main__ import main
from lmjax.checkpoint import Finding, examine
from lmjax.sharding import Layout
from lmjax.steps import all_steps, damaged_folders, folder
from lmjax.verify import unequal_arrays


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Steps 1, 2 and 1000, saved by eight devices."""
    workdir = tmp_path_factory.mktemp("three")
    with sharding.use(mesh(Layout(2, 2, 2))):
        save(workdir, state_at(1), state_at(2), state_at(1000), keep=3)
    return workdir


@pytest.fixture
def workdir(three, tmp_path) -> Path:
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


def test_good_steps_are_counted_with_their_arrays(workdir, capsys, monkeypatch):
    monkeypatch.setattr(lmjax.checkpoint, "_SLICE", 10_000)  # several slices, one array too large
    assert main(["verify", str(workdir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # The step, Adam's count, and three parameters with two moments each.
    size = 4 * (2 + 3 * (64 * 32 + 40 * 32 + 8))
    assert lines[1].split() == ["1", "11", f"{size:,}", "good"]
    assert lines[3].split() == ["1,000", "11", f"{size:,}", "good"]
    assert lines[4] == "3 of 3 steps are good; a run goes on from step 1,000"


def test_damaged_steps_are_named_and_left_where_they_are(workdir, capsys):
    flip_values(folder(workdir) / "1000")
    empty(folder(workdir) / "1")
    assert main(["verify", str(workdir)]) == 2
    out, err = capsys.readouterr()
    assert err == "error: 1 of 3 steps are good; a run goes on from step 2\n"
    lines = out.splitlines()
    assert lines[1].split(maxsplit=1)[1] == "damaged: its folder is empty"
    assert "damaged: the values of " in lines[3] or "damaged: it cannot be read" in lines[3]
    assert all_steps(workdir) == [1, 2, 1000]


def test_damaged_steps_are_set_aside_when_asked(workdir, capsys):
    edit(folder(workdir) / "1000", lambda content: content["recipe"].update(name="x"))
    assert main(["verify", str(workdir), "--set-aside"]) == 2
    (name,) = damaged_folders(workdir)
    out = capsys.readouterr().out
    assert "damaged: its manifest was changed" in out
    assert f"set aside as checkpoints/{name}" in out and all_steps(workdir) == [1, 2]
    with sharding.use(mesh(Layout(1, 1, 1))):
        assert bits(restore(workdir, target())) == bits(state_at(2))
    assert main(["verify", str(workdir)]) == 0
    assert f"set aside before: checkpoints/{name}" in capsys.readouterr().out


def test_a_folder_without_steps_is_an_error(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert "none holds no step; is it a run directory?" in capsys.readouterr().err
    (folder(tmp_path) / "damaged-3-x").mkdir(parents=True)
    assert main(["verify", str(tmp_path)]) == 2
    assert "only steps that were set aside: damaged-3-x" in capsys.readouterr().err


def test_a_recipe_that_is_not_the_saved_one_is_found(three, tmp_path, capsys):
    shutil.copytree(three, tmp_path / "run")
    run = {**RECIPE, "data": {}, "loss": {}, "optim": {}}
    for depth, code in ((2, 0), (1, 2)):
        run["model"] = {**RECIPE["model"], "depth": depth}
        (tmp_path / "run/recipe.json").write_text(json.dumps({"run": run}))
        assert main(["verify", str(tmp_path / "run")]) == code
    assert "model.depth is 1, and 2 was saved" in capsys.readouterr().err


def test_a_step_that_vanishes_meanwhile_is_not_counted(workdir, capsys, monkeypatch):
    def gone(where: Path, step: int) -> Finding:
        if step == 1:
            shutil.rmtree(folder(where) / "1")
        return examine(where, step)

    monkeypatch.setattr("lmjax.verify.examine", gone)
    assert main(["verify", str(workdir)]) == 0
    assert "2 of 2 steps are good" in capsys.readouterr().out


def test_it_asks_nothing_of_an_accelerator(workdir):
    """Where a run trains there, its chips are taken; here there are none."""
    done = subprocess.run(
        [sys.executable, "-m", "lmjax", "verify", str(workdir)],
        cwd=ROOT, env={**environment(), "JAX_PLATFORMS": "tpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "3 of 3 steps are good" in done.stdout, done.stderr


def test_it_takes_no_keys_of_a_recipe(tmp_path, capsys):
    assert main(["verify", str(tmp_path), "--steps=3"]) == 2
    assert "unknown flag --steps: verify reads no recipe" in capsys.readouterr().err


def test_two_runs_are_compared_by_their_fingerprints(three, workdir):
    assert unequal_arrays(three, workdir, 2) == []
    shutil.rmtree(folder(workdir) / "2")
    other = state_at(2)
    scale = other.params["final_norm"]["scale"]
    other.params["final_norm"]["scale"] = scale.at[3].set(-scale[3])
    save(workdir, other, keep=9)
    assert unequal_arrays(three, workdir, 2) == ["params/final_norm/scale"]
    with pytest.raises(ValueError, match="run has no step 7"):
        unequal_arrays(workdir, three, 7)
