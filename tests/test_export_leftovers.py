# SPDX-License-Identifier: Apache-2.0
"""Folders that appear whole: what is unfinished has another name, and does not pile up."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

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


def test_a_failed_export_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyError), appearing(tmp_path / "a"):
        raise KeyError
    assert not names(tmp_path)
