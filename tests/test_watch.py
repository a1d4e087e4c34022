# SPDX-License-Identifier: Apache-2.0
"""The sentinels: one process that is gone ends the others, with a line that names it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from commands import ROOT

from lmjax import watch

# Process I of 3: says that it is watched, then waits, and leaves when it is told to.
PROCESS = """
import sys
from lmjax.watch import Sentinel
index, address, token = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sentinel = Sentinel(index, 3, address, token)
print(sentinel.port, sentinel._child.pid, flush=True)
sys.stdin.readline()
sentinel.leave()
"""


class Three:
    """Three processes with their sentinels, started as those of a run are."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.sentinels: list[int] = []
        self.port = int(self._start("127.0.0.1"))
        for _ in range(2):
            self._start(f"{socket.gethostname()} 127.0.0.1 {self.port}")
        time.sleep(1)  # until each has been called

    def _start(self, address: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(len(self.processes)), address, "token"],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        self.processes.append(process)
        assert process.stdout
        port, pid = process.stdout.readline().split()
        self.sentinels.append(int(pid))
        return port

    def ends(self, index: int) -> tuple[int, str]:
        """Exit code and last words of a process and its sentinel, which share a standard error."""
        code = self.processes[index].wait(timeout=60)
        assert self.processes[index].stderr
        return code, self.processes[index].stderr.read()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def three() -> Iterator[Three]:
    found = Three()
    yield found
    for pid in found.sentinels:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    for process in found.processes:
        process.kill()
        process.communicate()


def line(index: int, why: str) -> str:
    return f"\nerror: process {index} of 3 ({socket.gethostname()}) {why}; all processes end here."


@pytest.mark.parametrize("gone", [0, 2])
def test_a_killed_process_ends_the_others_and_is_named(three, gone):
    three.processes[gone].kill()
    for other in {0, 1, 2} - {gone}:
        code, said = three.ends(other)
        assert code == -signal.SIGKILL and said.startswith(line(gone, "ended before the run did"))
        assert said.count("\n") == 2
    assert three.ends(gone)  # its standard error is closed: its sentinel has ended as well


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_stands_still_ends_all(three, gone):
    three.processes[gone].send_signal(signal.SIGSTOP)
    for index in range(3):
        code, said = three.ends(index)
        assert code == -signal.SIGKILL
        assert index == gone or said.startswith(line(gone, "stood still for 8 s"))


def test_a_host_that_is_silent_ends_the_others(three):
    os.kill(three.sentinels[1], signal.SIGSTOP)  # as if its host were frozen or cut off
    for index in (0, 2):
        code, said = three.ends(index)
        assert code == -signal.SIGKILL and said.startswith(line(1, "was silent for 10 s"))
    os.kill(three.sentinels[1], signal.SIGCONT)
    code, said = three.ends(1)
    assert code == -signal.SIGKILL and "error: process" in said


def test_who_leaves_ends_nobody(three):
    for index in (1, 0, 2):  # the first one need not be the last
        assert three.processes[index].stdin
        three.processes[index].stdin.write("\n")
        three.processes[index].stdin.flush()
        three.processes[index].wait(timeout=20)
        time.sleep(watch._OTHERS + 1)
    assert [three.ends(index) for index in range(3)] == [(0, "")] * 3


STRANGERS = (
    b"\n",
    b"[]\n",
    b'{"index": 1}\n',
    b'{"gone": 1, "host": "x", "why": "y"}\n',
    b'{"index": 1, "count": 3, "host": "h", "token": "guess"}\n{"gone": 1}\n',
)


def test_strangers_cannot_end_a_run(three):
    for said in STRANGERS:
        with socket.create_connection(("127.0.0.1", three.port)) as stranger:
            stranger.sendall(said)
            stranger.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(1000):
                    pass
    time.sleep(1)
    assert all(process.poll() is None for process in three.processes)
