# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run on disk: one JSON object a step, and the same as TensorBoard scalars.

`metrics.jsonl` is the record; TensorBoard events are a view of it. Both survive kills: what a
resumed run is about to compute again is removed first, so every step stands there once.
"""

import json
import logging
import math
import numbers
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmjax.recipe import strict

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_FLUSH_SECONDS = 5
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends the metrics of each step to `workdir`; a context manager.

    `resume_step` is the step of the checkpoint that the run goes on from. Later steps will be
    computed again, so their lines are dropped, and all lines where it is 0 (a fresh start).
    """

    def __init__(self, workdir: Path, resume_step: int = 0, tensorboard: bool = True) -> None:
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        self._last_step = _rewind(path, resume_step)
        self._file = path.open("a", encoding="utf-8", newline="\n")
        self._tensorboard = None
        if tensorboard:
            first = resume_step + 1 if resume_step else 0
            self._tensorboard = _Events(workdir / TENSORBOARD_FOLDER, first)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records the `values` of `step`, on disk on return. Steps must come in rising order."""
        assert step > self._last_step, f"step {step} after step {self._last_step}"
        assert "step" not in values, "the step is an argument of its own"
        plain = {name: _plain(value) for name, value in values.items()}
        record = {"step": int(step)} | {name: strict(value) for name, value in plain.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step
        if self._tensorboard is not None:
            self._tensorboard.write(step, plain)

    def close(self) -> None:
        """Flushes and closes both files; a second call does nothing."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Events:
    """TensorBoard's events of one start, written without a thread, whose errors nobody would see.

    TensorBoard hides the events at and after step `first` that earlier files hold.
    """

    def __init__(self, folder: Path, first: int) -> None:
        # Half a second to import, so only where it is wanted.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns of every NaN
        self._messages: Any = event_pb2
        self._scalar = scalar
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        log = self._messages.SessionLog
        self._add(first, session_log=log(status=log.START))
        self._flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds scalars; on disk some seconds later."""
        for name, value in values.items():
            self._add(step, summary=self._scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._file.close()

    def _add(self, step: int, **content: Any) -> None:
        event = self._messages.Event(step=step, wall_time=time.time(), **content)
        self._file.write_event(event)

    def _flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()


class Throughput:
    """Tokens a second over the last `window` steps."""

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.monotonic) -> None:
        assert window >= 1
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)  # (seconds, tokens so far)
        self.restart()

    def restart(self) -> None:
        """Forgets the past: call it after a pause, such as an evaluation."""
        self._marks.clear()
        self._marks.append((self._clock(), 0))
        self._first = True

    def update(self, tokens: int) -> float:
        """Counts the `tokens` of a finished step and returns the rate, in tokens a second."""
        self._marks.append((self._clock(), self._marks[-1][1] + tokens))
        (began, before), (now, after) = self._marks[0], self._marks[-1]
        if self._first:
            # The first step waits for the compiler; later rates are not to carry that.
            self._marks.popleft()
            self._first = False
        return (after - before) / max(now - began, 1e-9)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of `workdir`, oldest first, none where there is no file.

    Unreadable lines, such as the half line of a killed run, are left out with a warning.
    """
    records, damaged = read_json_lines(Path(workdir) / METRICS_FILE)
    steps = [record for record in records if _has_step(record)]
    damaged += len(records) - len(steps)
    if damaged:
        _log.warning("%s: %d unreadable line(s) left out", Path(workdir) / METRICS_FILE, damaged)
    return [
        {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value
         for name, value in record.items()}
        for record in steps
    ]  # fmt: skip


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the JSON objects of a file, one a line, and how many lines are not one."""
    if not path.exists():
        return [], 0
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    objects = [item for line in lines if (item := _parsed(line)) is not None]
    return objects, len(lines) - len(objects)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` as a whole: a reader, or a kill, finds the old content or the new."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _rewind(path: Path, resume_step: int) -> int:
    """Drops the lines after `resume_step` and damaged ones; returns the last step that stays."""
    records, damaged = read_json_lines(path)
    if damaged:
        _log.warning("%s: %d unreadable line(s) dropped", path, damaged)
    kept: dict[int, dict[str, Any]] = {}
    for record in records:
        if resume_step > 0 and _has_step(record) and record["step"] <= resume_step:
            kept[record["step"]] = record
    lines = [json.dumps(kept[step]) + "\n" for step in sorted(kept)]
    content = "".join(lines).encode()
    if path.exists() and path.read_bytes() != content:
        write_atomically(path, content)
    return max(kept, default=-1)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        item = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return item if isinstance(item, dict) else None


def _has_step(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("step"), int) and not isinstance(record["step"], bool)


def _plain(value: Any) -> int | float:
    """The Python number of a Python, numpy or device scalar."""
    return int(value) if isinstance(value, numbers.Integral) else float(value)
