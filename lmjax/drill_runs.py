# SPDX-License-Identifier: Apache-2.0
"""Starts, stops and kills `train` in processes of its own, as a scheduler or a bad day would."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lmjax import hosts
from lmjax.steps import folder as checkpoints_of
from lmjax.witness import Seen, seen

_POLL = 0.0005  # seconds


class Process(NamedTuple):
    """A process that trains, and the file that it prints to."""

    popen: "subprocess.Popen[bytes]"
    log: Path


@dataclass(frozen=True)
class Trainer:
    """`train` of one experiment, with the same keys each time.

    Args:
      arguments: EXPERIMENT and its keys, as typed.
      folder: holds a run directory and a witness for every name.
      timeout: seconds after which a process counts as stuck.
      env: the environment of `train`; None is this process's.
      started: all that was, for `kill`.
    """

    arguments: tuple[str, ...]
    folder: Path
    timeout: float
    env: Mapping[str, str] | None = None
    started: "list[subprocess.Popen[bytes]]" = field(default_factory=list, repr=False)

    def workdir(self, name: str) -> Path:
        """The run directory of that name."""
        return self.folder / name

    def seen(self, name: str) -> list[Seen]:
        """What the steps of a run saw, in the order in which they ran, all starts together."""
        return seen(self._witness(name))

    def run(self, name: str, *keys: str, devices: int = 0) -> str:
        """Trains to the end of what is asked for; returns what was printed.

        Raises:
          ValueError: it did not exit with 0, or not in time.
        """
        return self.finish(self.start(name, *keys, devices=devices))

    def finish(self, process: "Process") -> str:
        """Waits for the end of a process, and returns what it printed; errors as `run`."""
        try:
            code = process.popen.wait(self.timeout)
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()
            code = f"stuck for {self.timeout:g} s"
        printed = process.log.read_text("utf-8", errors="replace")
        if code:
            end = "\n".join(line[:200] for line in re.split(r"[\r\n]+", printed.strip())[-12:])
            raise ValueError(
                f"{process.log}: {code if isinstance(code, str) else f'exit {code}'}\n{end}"
            )
        return printed

    def start(
        self, name: str, *keys: str, devices: int = 0, place: tuple[str, int, int] | None = None
    ) -> "Process":
        """Begins to train; `devices` CPU devices (0: what there is); place: (address, count, i)."""
        env = dict(os.environ if self.env is None else self.env)
        if devices:
            kept = [f for f in env.get("XLA_FLAGS", "").split() if "host_platform_device" not in f]
            flag = f"--xla_force_host_platform_device_count={devices}"
            env |= {"XLA_FLAGS": " ".join([*kept, flag]), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-u", "-m", "lmjax", "train", *self.arguments]
        command += [f"--workdir={self.workdir(name)}", f"--witness={self._witness(name)}", *keys]
        if place:
            command += [f"{flag}={value}" for flag, value in zip(hosts.FLAGS, place, strict=True)]
        # A file: a pipe that nobody reads would fill and stop the run.
        log = self.folder / f"{name}.{len(list(self.folder.glob(f'{name}.*.log')))}.log"
        with open(log, "wb") as printed:
            popen = subprocess.Popen(command, env=env, stdout=printed, stderr=subprocess.STDOUT)
        self.started.append(popen)
        return Process(popen, log)

    def kill(self) -> None:
        """Ends what was started and still runs."""
        for popen in self.started:
            if popen.poll() is None:
                popen.kill()
                popen.wait()

    def together(self, name: str, count: int, devices: int, *keys: str) -> None:
        """Trains as `count` processes over loopback, each with so many CPU devices."""
        address = f"127.0.0.1:{free_port()}"
        processes = [
            self.start(name, *keys, devices=devices, place=(address, count, index))
            for index in range(count)
        ]
        try:
            for process in processes:
                self.finish(process)
        finally:
            self.kill()

    def stopped(self, name: str, number: int, step: int, delay: float, saving: bool) -> bool:
        """Trains until a step, or the next save after it, then sends a signal.

        After SIGKILL the process is gone; after others it must exit with 0.

        Args:
          delay: seconds between the moment and the signal.

        Returns:
          Whether the signal came before the end of the run.
        """
        before = len(self.seen(name))  # by the starts until now
        process = self.start(name)
        reached = self._wait(
            process, lambda: any(s.step >= step for s in self.seen(name)[before:][-1:])
        )
        if reached and saving:
            reached = self._wait(process, lambda: any(_unfinished(self.workdir(name))))
        time.sleep(delay)
        if not reached or process.popen.poll() is not None:
            self.finish(process)
            return False
        process.popen.send_signal(number)
        if number == signal.SIGKILL:
            process.popen.wait()
        else:
            self.finish(process)
        return True

    def _wait(self, process: "Process", come: Callable[[], bool]) -> bool:
        """Whether it came before the process ended. Errors: ValueError after the timeout."""
        deadline = time.monotonic() + self.timeout
        while process.popen.poll() is None:
            if come():
                return True
            if time.monotonic() > deadline:
                self.finish(process)
            time.sleep(_POLL)
        return False

    def _witness(self, name: str) -> Path:
        return self.folder / f"{name}.witness"


def _unfinished(workdir: Path) -> Iterator[Path]:
    """Checkpoints that are being written."""
    return (
        p for p in checkpoints_of(workdir).glob("*") if not p.name.isdigit() and "tmp" in p.name
    )


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
