# SPDX-License-Identifier: Apache-2.0
"""Interleaved timings: each side is a process that waits while another one is timed."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

THREADS = 2


def serve(run: Callable[[int], Any]) -> None:
    """Answers each line `n` on standard input with the seconds that `run(n)` took."""
    run(2)
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        run(int(line))
        print(time.perf_counter() - began, flush=True)


class Side:
    """A process that serves one side: `python -m MODULE --serve=SIDE --sizes=SIZE`."""

    def __init__(self, module: str, side: str, size: str) -> None:
        command = [sys.executable, "-m", module, f"--serve={side}", f"--sizes={size}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        if self._out.readline().strip() != "ready":
            raise RuntimeError(f"{side} did not start")

    def seconds(self, steps: int) -> float:
        """Wall time of that many steps."""
        print(steps, file=self._in, flush=True)
        return float(self._out.readline())

    def close(self) -> None:
        """Ends the process."""
        self._in.close()
        self._process.wait()


def interleave(
    module: str, names: Sequence[str], size: str, steps: int, pairs: int
) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each side, `pairs` times, one side after the other."""
    sides = {name: Side(module, name, size) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(pairs):
        for name in names:
            seconds[name].append(sides[name].seconds(steps))
    for side in sides.values():
        side.close()
    return seconds
