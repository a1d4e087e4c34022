# SPDX-License-Identifier: Apache-2.0
"""Runs lmjax as a user does, for the tests of whole commands."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEMO = "experiments/demo.py"
# Fewer of LLVM's passes: compiles a fifth faster, and the suite compiles a lot.
COMPILE_FASTER = "--xla_backend_optimization_level=1"


def environment(devices: int = 1, flags: str = "") -> dict[str, str]:
    """The environment of a command that sees that many CPU devices; flags: more for XLA."""
    flags += f" --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(*arguments: str, devices: int = 1, flags: str = "") -> subprocess.Popen[str]:
    """`python -m lmjax …`, running."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "lmjax", *arguments],
        cwd=ROOT,
        env=environment(devices, flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lmjax(*arguments: str, code: int = 0, devices: int = 1, flags: str = "") -> tuple[str, str]:
    """Output and errors of `python -m lmjax …`, which must exit with `code`."""
    process = start(*arguments, devices=devices, flags=flags)
    try:
        out, err = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err, err
    return out, err


def tiny(workdir: Path, text: Path, *keys: str) -> tuple[str, ...]:
    """Arguments that train the demo's toy recipe on `text` in `workdir`."""
    corpus = f"--data.corpus=files:{text}"
    return ("train", DEMO, "--tiny", f"--workdir={workdir}", corpus, *keys)


def write_text(folder: Path) -> Path:
    """A small corpus of 60 short documents, one a line."""
    words = "the cat sat on a mat and saw one red bird fly over two old barns at noon".split()
    lines = []
    for number in range(60):
        picked = [words[(number * 7 + place * place) % len(words)] for place in range(40)]
        lines.append(f"{number}: " + " ".join(picked) + ".")
    path = folder / "text.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_lines(folder: Path) -> Path:
    """A corpus of 2,000 lines, each a document, in a new folder."""
    folder.mkdir()
    path = folder / "a.txt"
    path.write_text("".join(f"line {i} of the corpus, é\n" for i in range(2000)), "utf-8")
    return path
