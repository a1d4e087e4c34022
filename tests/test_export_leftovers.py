# SPDX-License-Identifier: Apache-2.0
"""Folders that appear whole: what is unfinished has another name, and does not pile up; what is
worth nothing does not appear."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from safetensors import SafetensorError
from test_huggingface import small

from lmjax.convert import hub
from lmjax.convert.gpt import export_gpt2
from lmjax.convert.hub import appearing

UNFINISHED = """
import sys, time
from lmjax.convert.hub import appearing
with appearing(sys.argv[1]) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def begun(target: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of an export."""
    command = [sys.executable, "-c", UNFINISHED, str(target)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_next_export_removes_what_killed_ones_left_and_nothing_else(tmp_path: Path):
    target = tmp_path / "a.b"
    with begun(target) as dead, begun(target) as alive:
        dead.kill()
        dead.wait()
        others = {f".{target.name}.x.tmp", f"{target.name}.1.tmp", ".aXb.999999999.tmp"}
        for name in others:
            (tmp_path / name).mkdir()
        (tmp_path / f".{target.name}.999999999.tmp").write_text("a file", "utf-8")
        others |= {f".{target.name}.999999999.tmp"}
        working = f".{target.name}.{alive.pid}.tmp"
        assert names(tmp_path) == {f".{target.name}.{dead.pid}.tmp", working, *others}
        with appearing(target) as folder:
            (folder / "done").write_text("whole", "utf-8")
        assert names(tmp_path) == {"a.b", working, *others}
        assert names(target) == {"done"}
        alive.kill()


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    "error", [SafetensorError(FULL), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
)
def test_a_full_disk_is_one_error_that_names_the_folder(tmp_path: Path, monkeypatch, error):
    def save_file(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(hub, "save_file", save_file)
    with (
        pytest.raises(ValueError, match=f"^{tmp_path}/a cannot be written .*No space left"),
        appearing(tmp_path / "a") as folder,
    ):
        hub.fill(folder, {}, {"config.json": {}}, {})
    assert not names(tmp_path)


def test_a_failed_export_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyError), appearing(tmp_path / "a"):
        raise KeyError
    assert not names(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_not_exported(value: float, tmp_path):
    model, params = small()
    params = {**params, "embedding": params["embedding"].at[3, 5].set(value)}
    with pytest.raises(ValueError, match=r"the model's logits are not finite \(NaN or infinite\)"):
        export_gpt2(tmp_path / "out", model, params)
    assert not list(tmp_path.iterdir())
