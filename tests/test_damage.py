# SPDX-License-Identifier: Apache-2.0
"""Damaged steps: found, named, passed over, set aside, and never a reason to begin again."""

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import pytest
import test_checkpoint
from commands import lmjax, tiny, write_text
from test_checkpoint import RECIPE, bits, mesh, restore, save
from test_hosts import start_two

from lmjax import manifest, sharding
from lmjax.checkpoint import Checkpoints, load_params
from lmjax.sharding import Layout
from lmjax.step import State
from lmjax.steps import all_steps, damaged_folders, folder, newest_step
from lmjax.train import _full_disk

METADATA = "_CHECKPOINT_METADATA"
# Large enough that their values lie in a file of their own.
SHAPES = {"embedding": (64, 32), "positions": (40, 32), "final_norm": {"scale": (8,)}}


def target() -> State:
    return test_checkpoint.target(SHAPES)


def state_at(step: int) -> State:
    return test_checkpoint.state_at(step, target())


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("two")
    with sharding.use(mesh(Layout(1, 1, 1))):
        save(workdir, state_at(1), state_at(2))
    return workdir


@pytest.fixture
def workdir(two, tmp_path) -> Path:
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run"


def edit(path: Path, change) -> None:
    """Changes our manifest in a step."""
    content = json.loads((path / METADATA).read_text())
    change(content["custom_metadata"])
    (path / METADATA).write_text(json.dumps(content))


def flip_values(path: Path) -> None:
    """A bit in every kilobyte of the largest file, where the arrays are."""
    files = [p for p in path.rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    raw = bytearray(largest.read_bytes())
    for place in range(700, len(raw), 1024):
        raw[place] ^= 4
    largest.write_bytes(raw)


def delete_arrays(path: Path) -> None:
    shutil.rmtree(path / "state" / "d")


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def link_to_nowhere(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("nowhere")


def pipe_inside(path: Path) -> None:
    (path / METADATA).unlink()
    os.mkfifo(path / METADATA)  # who reads it waits for ever


def print_of(path: str):
    def change(content: dict) -> None:
        value = content["fingerprints"][path]
        content["fingerprints"][path] = value[:-1] + ("0" if value[-1] != "0" else "1")

    return lambda step: edit(step, change)


DAMAGE = {
    "flip": (flip_values, "the values of|it cannot be read"),
    "arrays": (delete_arrays, "of opt_state/0/count, nothing is stored"),
    "empty": (empty, "its folder is empty"),
    "no metadata": (lambda p: (p / METADATA).unlink(), "it cannot be read"),
    "fingerprint": (print_of("params/positions"), "its manifest was changed"),
    "step": (lambda p: edit(p, lambda c: c.update(step=7)), "its manifest was changed"),
    "no seal": (lambda p: edit(p, lambda c: c.pop("seal")), "its manifest was changed"),
    "file": (file_instead, "it is no folder"),
    "link": (link_to_nowhere, "it is no folder"),
    "pipe": (pipe_inside, f"{METADATA} is no file"),
    "nothing": (lambda p: edit(p, lambda c: c.clear()), "it has no manifest"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_step_is_set_aside_and_the_one_before_is_taken(case, workdir, capsys):
    damage, reason = DAMAGE[case]
    damage(folder(workdir) / "2")
    with sharding.use(mesh(Layout(1, 1, 1))):
        step, params = load_params(workdir, target().params)  # looks, and touches nothing
        assert (step, bits(params)) == (1, bits(state_at(1).params)) and all_steps(workdir) == [
            1,
            2,
        ]
        line = capsys.readouterr().err
        assert line.startswith("step 2 is damaged, ") and line.endswith(": taking step 1\n")

        state = restore(workdir, target())
        assert bits(state) == bits(state_at(1))
        (line,) = capsys.readouterr().out.splitlines()
        (aside,) = damaged_folders(workdir)
        assert aside.startswith("damaged-2-") and all_steps(workdir) == [1]
        assert line.endswith(f": set aside as checkpoints/{aside}")
        assert re.search(f"step 2 is damaged, ({reason})", line)

        assert save(workdir, state_at(2)) == ["saved step 2"]  # nothing is in the way
        assert bits(restore(workdir, target())) == bits(state_at(2))


def test_a_step_under_the_name_of_another_is_damaged(workdir, capsys):
    (folder(workdir) / "2").rename(folder(workdir) / "3")
    with sharding.use(mesh(Layout(1, 1, 1))):
        assert bits(restore(workdir, target())) == bits(state_at(1))
    assert "step 3 is damaged, its manifest is of step 2" in capsys.readouterr().out


def test_values_that_orbax_reads_and_nobody_saved_are_found(workdir, monkeypatch, capsys):
    """The seal fits the manifest, the shapes fit, and one sign is another."""
    path = folder(workdir) / "2"

    def lie(content: dict) -> None:
        content["fingerprints"]["params/final_norm/scale"] = "0" * 16
        body = {k: v for k, v in content.items() if k != "seal"}
        content["seal"] = manifest._digest(body)

    edit(path, lie)
    with sharding.use(mesh(Layout(1, 1, 1))):
        restore(workdir, target())
    out = capsys.readouterr().out
    assert "step 2 is damaged, the values of params/final_norm/scale are not those that" in out


def test_where_all_steps_are_damaged_nothing_is_touched(workdir):
    for step in (1, 2):
        empty(folder(workdir) / str(step))
    with sharding.use(mesh(Layout(1, 1, 1))):
        for read in (lambda: restore(workdir, target()), lambda: load_params(workdir, {})):
            with pytest.raises(ValueError, match="holds steps, but all are damaged") as error:
                read()
            assert "step 2: its folder is empty\n  step 1: its folder is empty" in str(error.value)
    assert all_steps(workdir) == [1, 2] and newest_step(workdir) == 2


def test_what_was_set_aside_is_no_reason_to_begin_again(tmp_path):
    (folder(tmp_path) / "damaged-2-x").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, RECIPE, 2, print)
    for read in (checkpoints.latest, lambda: load_params(tmp_path, {})):
        with pytest.raises(ValueError, match=r"only steps that were set aside \(damaged-2-x\)"):
            read()


def test_a_checkpoint_from_before_fingerprints_is_restored_with_a_line(workdir, capsys):
    def older(content: dict) -> None:
        for key in ("seal", "fingerprints", "step"):
            del content[key]

    edit(folder(workdir) / "2", older)
    with sharding.use(mesh(Layout(1, 1, 1))):
        assert bits(restore(workdir, target())) == bits(state_at(2))
        assert "step 2 was saved without fingerprints" in capsys.readouterr().out
        load_params(workdir, target().params)
        assert "step 2 was saved without fingerprints" in capsys.readouterr().err


def test_leftovers_of_a_kill_are_no_steps_and_are_cleaned_up(workdir):
    here = folder(workdir)
    shutil.copytree(here / "1", here / "3.orbax-checkpoint-tmp")
    shutil.copytree(here / "1", here / "deleting-0-1")
    for name in ("x", "03", "٣", "-4", "99999999999999999999"):
        (here / name).mkdir()
    assert all_steps(workdir) == [1, 2]
    Checkpoints(workdir, RECIPE, 2, print).close()
    assert {p.name for p in here.iterdir()} == {
        "1", "2", "x", "03", "٣", "-4", "99999999999999999999"
    }  # fmt: skip


def test_what_is_retired_is_gone_whatever_it_was(workdir):
    file_instead(folder(workdir) / "1")
    with sharding.use(mesh(Layout(1, 1, 1))):
        save(workdir, state_at(3))
    assert {p.name for p in folder(workdir).iterdir()} == {"2", "3"}


def test_a_kill_while_an_old_step_is_deleted_leaves_no_half_of_it(workdir, monkeypatch):
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: seen.append(Path(path).name))
    with sharding.use(mesh(Layout(1, 1, 1))):
        save(workdir, state_at(3))
    # In the background, and once more at the end for what a failed save left.
    assert {tuple(n.split("-")[:2]) for n in seen} == {("deleting", "1")}
    assert all_steps(workdir) == [2, 3]


def test_parameters_are_called_by_plain_names(tmp_path):
    for name in ("../evil", "a.b", "", "a/b", "x" * 101):
        state = State(jnp.int32(1), {name: jnp.ones(2)}, ())
        with pytest.raises(ValueError, match="is no name of a parameter"):
            Checkpoints(tmp_path, RECIPE, 2, print).save(1, state)
    assert all_steps(tmp_path) == []


def test_train_goes_back_and_says_so_before_it_goes_on(tmp_path):
    text, run = write_text(tmp_path), tmp_path / "run"
    lmjax(*tiny(run, text, "--steps=4", "--save_every=2"))
    flip_values(folder(run) / "4")
    out, err = lmjax(*tiny(run, text, "--steps=4", "--save_every=2"))
    assert out.index("step 4 is damaged") < out.index("resumed at step 2") < out.index("saved step")
    assert err == ""


@pytest.mark.slow
def test_two_processes_go_back_together(tmp_path):
    """The bytes that are damaged are read by one of them."""
    text, run = write_text(tmp_path), tmp_path / "run"
    keys = ("--steps=8", "--save_every=4", "--mesh.fsdp=2")
    for resumed in (False, True):
        first, second = start_two(*tiny(run, text, *keys))
        out, rest = (process.communicate(timeout=200)[0] for process in (first, second))
        assert (first.returncode, second.returncode) == (0, 0), (out, rest)
        assert ("step 8 is damaged" in out and "resumed at step 4" in out) == resumed
        damage = sorted((folder(run) / "8" / "state").glob("ocdbt.process_1/d/*"))
        assert damage and "damaged" not in rest  # one voice
        flip_values(damage[0].parent)


def test_a_full_disk_says_where_the_run_can_go_on(workdir):
    with pytest.raises(ValueError, match="no space left on the disk of .*good step is 2; make"):
        with _full_disk(workdir):
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(IsADirectoryError), _full_disk(workdir):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")


@pytest.mark.slow
def test_a_run_stops_on_a_full_disk_and_goes_on_when_there_is_space(tmp_path):
    text, disk = write_text(tmp_path), tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        keys = ("--steps=40", "--save_every=4", "--keep=100")
        out, err = lmjax(*tiny(disk / "run", text, *keys), code=2)
        good = max(int(n) for n in re.findall(r"saved step (\d+)", out))
        assert f"the newest good step is {good}; make space, then start again\n" in err
        assert err.count("\n") == 1 and newest_step(disk / "run") == good
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        out, _ = lmjax(*tiny(disk / "run", text, *keys))
        assert f"resumed at step {good}" in out and "saved step 40" in out
    finally:
        subprocess.run(["umount", str(disk)], check=True)
