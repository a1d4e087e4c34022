# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: their places, and two that train over 127.0.0.1."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DEMO, ROOT, environment, lmjax, write_text
from processes import beyond_loopback, listening

from lmjax.drill_runs import free_port
from lmjax.hosts import Place, found, join
from lmjax.metrics import read_metrics

SLURM = {"SLURM_JOB_ID": "70001", "SLURM_NTASKS": "8", "SLURM_PROCID": "5"}
OURS = {"LMJAX_COORDINATOR": "h:1", "LMJAX_PROCESSES": "4"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
GKE = {"TPU_WORKER_HOSTNAMES": "a-0.x,a-1.x,a-2.x", "TPU_WORKER_ID": "2"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (GKE, Place("a-0.x:8476", 3, 2)),
        ({**SLURM, "SLURM_STEP_NODELIST": "node[007-015],other"}, Place("node007:61809", 8, 5)),
        ({**SLURM, "SLURM_STEP_NODELIST": "node001,node002"}, Place("node001:61809", 8, 5)),
        ({**SLURM, "SLURM_STEP_NODELIST": "single"}, Place("single:61809", 8, 5)),
        ({**OURS, "LMJAX_PROCESS": "3"}, Place("h:1", 4, 3)),
        ({**OURS, "JOB_COMPLETION_INDEX": "2"}, Place("h:1", 4, 2)),
        ({**OURS, "LMJAX_PROCESS": "0", **GKE}, Place("h:1", 4, 0)),
    ],
)
def test_places_by_the_environment(env, place):
    assert found(env) == place


def test_open_mpi_names_the_host_of_its_launcher():
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    one, two = (found({**OMPI, **uri, "OMPI_COMM_WORLD_RANK": str(n)}) for n in (0, 1))
    assert (one.count, one.index, two.index) == (2, 0, 1)
    assert one.address == two.address and re.fullmatch(r"10\.96\.0\.1:6\d{4}", one.address)
    with pytest.raises(ValueError, match="pass -x LMJAX_COORDINATOR=HOST:PORT"):
        found(OMPI)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (OURS, "LMJAX_PROCESS must be set as well"),
        ({"LMJAX_PROCESSES": "2"}, "LMJAX_COORDINATOR, LMJAX_PROCESS must be set as well"),
        ({**OURS, "LMJAX_PROCESS": "4"}, "LMJAX_PROCESS=4: from 0 to 3"),
        ({**OURS, "LMJAX_PROCESS": "x"}, "LMJAX_PROCESS='x': a whole number"),
        ({**OURS, "LMJAX_PROCESS": "0", "LMJAX_COORDINATOR": "h"}, "=h: HOST:PORT is needed"),
        ({**OURS, "LMJAX_PROCESS": "0", "LMJAX_JOIN_SECONDS": "soon"}, "'soon': seconds above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(env, message):
    with pytest.raises(ValueError, match=message):
        join(env)


def test_flags_win_over_the_environment():
    four = {**OURS, "LMJAX_PROCESS": "3"}
    join(four, ("127.0.0.1:1", "1", "0"))  # one process alone: nobody to join
    with pytest.raises(ValueError, match="--process=9: from 0 to 3"):
        join(four, (None, None, "9"))
    with pytest.raises(ValueError, match="LMJAX_PROCESSES, LMJAX_PROCESS must be .*--processes"):
        join(GKE, ("h:1", None, None))


# --- two processes --------------------------------------------------------------------------------

STEPS = ("--steps=16", "--save_every=4", "--evaluate_every=8", "--mesh.fsdp=2")


def command(workdir: Path, text: Path) -> tuple[str, ...]:
    corpus = f"--data.corpus=files:{text}"
    return ("train", DEMO, "--tiny", f"--workdir={workdir}", corpus, *STEPS)


def start_two(*arguments: str, second: tuple[str, ...] = ()) -> list[subprocess.Popen[str]]:
    """`python -m lmjax …` as two processes with two CPU devices each; `second` for the second."""
    flags = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2")
    wrong = {"LMJAX_COORDINATOR": "nowhere:1", "LMJAX_PROCESSES": "7", "LMJAX_PROCESS": "5"}
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-u",
                "-m",
                "lmjax",
                *arguments,
                *flags,
                f"--process={index}",
                *second * index,
            ],
            cwd=ROOT,
            env={**environment(2), **wrong, "LMJAX_JOIN_SECONDS": "60"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def until(process: subprocess.Popen[str], line: str) -> None:
    for said in process.stdout:
        if said.startswith(line):
            return
    raise AssertionError(f"{line!r} was never said")


def losses(workdir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(workdir)]


def scores(workdir: Path) -> list[float]:
    """Losses on the held-out text."""
    return [r["held_out_loss"] for r in read_metrics(workdir) if "held_out_loss" in r]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"))


def test_two_processes_train_are_killed_and_go_on_as_two_and_as_one(text, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    lmjax(*command(unbroken, text), devices=4)

    first, second = start_two(*command(broken, text))
    until(first, "saved step 4")
    held = listening(first.pid) | listening(second.pid)
    assert held and not beyond_loopback(held)
    second.kill()
    said, other = (process.communicate(timeout=120)[0] for process in (first, second))
    assert re.search(r"error: process 1 of 2 \(\S+\) ended before the run did", said), said
    assert first.returncode != 0
    assert "saved" not in other  # one voice

    first, second = start_two(*command(broken, text))
    until(first, "resumed at step")
    until(first, "saved step 8")
    second.send_signal(signal.SIGTERM)  # one is asked, both leave
    said, other = (process.communicate(timeout=120)[0] for process in (first, second))
    assert (first.returncode, second.returncode) == (0, 0), (said, other)

    before = len(losses(broken))
    out, _ = lmjax(*command(broken, text), devices=1 + 1)
    assert re.search(r"resumed at step (8|9|1\d)", out), out
    assert len(losses(broken)) == 16 > before
    assert losses(broken) == pytest.approx(losses(unbroken), abs=1e-5)
    # Scored by two processes at step 8, by one at step 16.
    assert scores(broken) == pytest.approx(scores(unbroken), abs=1e-5) and len(scores(broken)) == 2


def test_processes_that_were_started_unlike_are_refused_before_anything(text, tmp_path):
    workdir = tmp_path / "run"
    for process in start_two(*command(workdir, text), second=("--save_every=2", "--until=2")):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert "process 1 was not started as process 0 was:" in said
        assert "save_every: 4, there 2" in said and "--until: 0, there 2" in said
    assert not (workdir / "data").exists()


def test_one_of_two_is_told_who_is_missing(text, tmp_path):
    env = {"LMJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "LMJAX_PROCESSES": "2"}
    env |= {"LMJAX_PROCESS": "0", "LMJAX_JOIN_SECONDS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lmjax", *command(tmp_path / "alone", text)],
        cwd=ROOT, env={**environment(2), **env}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 of 2 processes started within 1 s; missing: 1; here: 0")
    assert not (tmp_path / "alone").exists()
