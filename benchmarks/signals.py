# SPDX-License-Identifier: Apache-2.0
"""Asks a run to stop in every way that schedulers and people do, and times how long it takes.

    python -m benchmarks.signals

A row a case: how many processes, the signal, to whom, how often, and the seconds from the last
signal to the end of all processes. A case fails unless the run saved and exited with 0 (twice: left
at once with 128 + the signal's number), and then went on to its end without leaving out a step.
"""

import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lmjax.drill_runs import Process, Trainer, free_port
from lmjax.steps import newest_step

RECIPE = ("experiments/demo.py", "--tiny", "--steps=60", "--batch=8", "--evaluate_every=0")
_MESH = ("--mesh.data=-1",)


@dataclass(frozen=True)
class Case:
    """A way to stop a run of `processes`: `number`, sent to one or to all, once or twice."""

    processes: int
    number: int
    everyone: bool = True
    times: int = 1

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        whom = "all" if self.everyone else "the second"
        often = "twice" if self.times == 2 else "once"
        return f"{self.processes} process{'es' * (self.processes > 1)}, {name} to {whom}, {often}"


CASES = (
    *(Case(1, n, True, times) for n in (signal.SIGTERM, signal.SIGINT) for times in (1, 2)),
    *(Case(2, n, whom) for n in (signal.SIGTERM, signal.SIGINT) for whom in (True, False)),
    Case(2, signal.SIGTERM, True, 2),
)


def try_case(case: Case, folder: Path) -> float:
    """Seconds from the last signal to the end of all processes.

    Raises:
      ValueError: it did not save and exit as it must, or did not go on to the right end.
    """
    store = f"--data.store={folder.parent / 'store'}"
    trainer = Trainer((*RECIPE, store, "--log_every=1", "--save_every=100"), folder, timeout=300)
    address = f"127.0.0.1:{free_port()}"
    processes = [
        trainer.start(
            "run", *_MESH, devices=2 // case.processes,
            place=(address, case.processes, i) if case.processes > 1 else None,
        )
        for i in range(case.processes)
    ]  # fmt: skip
    try:
        _wait(trainer, processes)
        targets = processes if case.everyone else processes[1:]
        for _ in range(case.times):
            for process in targets:
                process.popen.send_signal(case.number)
            asked = time.monotonic()
            time.sleep(0.02)
        codes = [process.popen.wait(300) for process in processes]
        took = time.monotonic() - asked
    finally:
        for process in processes:
            process.popen.kill()
    saved = newest_step(trainer.workdir("run"))
    if case.times == 1 and (any(codes) or saved is None):
        raise ValueError(f"{case}: exit {codes}, newest step {saved}")
    if case.times == 2 and not all(code in (0, 128 + case.number) for code in codes):
        raise ValueError(f"{case}: exit {codes}")
    trainer.run("run", *_MESH, devices=2)
    steps = {s.step: s for s in trainer.seen("run")}
    if sorted(steps) != list(range(1, 61)):
        raise ValueError(f"{case}: went on from {saved} and made {len(steps)} of 60 steps")
    return took


def _wait(trainer: Trainer, processes: list[Process]) -> None:
    while not trainer.seen("run"):
        if any(process.popen.poll() is not None for process in processes):
            raise ValueError(trainer.finish(processes[0]))
        time.sleep(0.01)


def main() -> None:
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="lmjax-signals-") as folder:
        for number, case in enumerate(CASES):
            place = Path(folder) / str(number)
            place.mkdir()
            try:
                print(f"{case!s:45}  {try_case(case, place):6.1f} s", flush=True)
            except ValueError as error:
                wrong += 1
                print(f"{case!s:45}  FAILED {error}", flush=True)
    print(f"{len(CASES) - wrong} of {len(CASES)} as they must")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
