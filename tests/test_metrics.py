# SPDX-License-Identifier: Apache-2.0
"""What metrics.jsonl, TensorBoard and the progress display promise."""

import contextlib
import fcntl
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from lmjax.metrics import MetricsWriter, Throughput, read_metrics
from lmjax.progress import Progress, Work

REPOSITORY = Path(__file__).resolve().parents[1]


def write_steps(workdir: Path, steps: range, resume_step: int = 0, offset: float = 0.0) -> None:
    with MetricsWriter(workdir, resume_step, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, {"loss": step + offset})


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def test_every_line_is_strict_json_and_reads_back(tmp_path):
    values = {
        "nan": math.nan,
        "up": math.inf,
        "down": -math.inf,
        "loss": np.float32(0.5),
    }
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, values)
        writer.write(2, {"tokens": np.int64(7)})  # pyright: ignore[reportArgumentType]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first == {
        "step": 1,
        "nan": "NaN",
        "up": "Infinity",
        "down": "-Infinity",
        "loss": 0.5,
    }
    assert second == {"step": 2, "tokens": 7} and isinstance(second["tokens"], int)
    back = read_metrics(tmp_path)[0]
    assert math.isnan(back["nan"]) and back["up"] == math.inf and back["down"] == -math.inf


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_resume_drops_later_steps_and_each_step_stands_once(tmp_path):
    write_steps(tmp_path, range(1, 11))
    write_steps(tmp_path, range(5, 8), resume_step=4, offset=0.5)
    write_steps(tmp_path, range(7, 9), resume_step=6, offset=0.75)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [record["loss"] for record in records] == [1, 2, 3, 4, 5.5, 6.5, 7.75, 8.75]


def test_a_fresh_start_keeps_nothing(tmp_path):
    write_steps(tmp_path, range(0, 5))
    write_steps(tmp_path, range(0, 2), offset=0.5)
    assert [record["loss"] for record in read_metrics(tmp_path)] == [0.5, 1.5]


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b"\0" * 64, b"[4]\n", b'{"loss": 1}\n'])
def test_a_damaged_tail_is_left_out_when_read_and_dropped_on_resume(tmp_path, tail):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    write_steps(tmp_path, range(4, 5), resume_step=3)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_kill_while_the_old_lines_are_dropped_loses_none(tmp_path, monkeypatch):
    write_steps(tmp_path, range(1, 11))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, resume_step=4, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    write_steps(tmp_path, range(5, 6), resume_step=4)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert not list(tmp_path.glob("*partial*")) and not list(tmp_path.glob(".*partial*"))


def test_a_killed_process_leaves_every_written_step(tmp_path):
    code = (
        "import sys, itertools, pathlib; from lmjax.metrics import MetricsWriter\n"
        "writer = MetricsWriter(pathlib.Path(sys.argv[1]), tensorboard=False)\n"
        "for step in itertools.count(1):\n"
        "    writer.write(step, {'loss': 1 / step}); print(step, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None
    seen = [int(process.stdout.readline()) for _ in range(50)][-1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= seen


def test_a_step_is_never_written_twice(tmp_path):
    write_steps(tmp_path, range(1, 4))
    with MetricsWriter(tmp_path, resume_step=3, tensorboard=False) as writer:
        with pytest.raises(AssertionError, match="step 3"):
            writer.write(3, {"loss": 1.0})


def test_no_file_means_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def events(workdir: Path) -> list[list]:
    """The TensorBoard events of each file, oldest file first, parsed from the TFRecord frames."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    files = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at, found = path.read_bytes(), 0, []
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
        files.append(found)
    return files


def test_tensorboard_gets_the_scalars_and_the_purge_of_a_resume(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 3.0, "learning_rate": 0.25})
        writer.write(2, {"loss": 2.0})
    # Event files are named by the second.
    time.sleep(1.0 - time.time() % 1 + 0.01)
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write(2, {"loss": 1.5})
    first, second = events(tmp_path)
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in first
        for value in event.summary.value
    ]
    assert scalars == [(1, "loss", 3.0), (1, "learning_rate", 0.25), (2, "loss", 2.0)]
    starts = [event.step for event in second if event.HasField("session_log")]
    assert starts == [2]


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_slides_over_recent_steps_without_the_compilation():
    clock = Clock()
    throughput = Throughput(window=2, clock=clock)
    rates = []
    for seconds in (50.0, 1.0, 1.0, 2.0, 2.0):
        clock.now += seconds
        rates.append(throughput.update(100))
    assert rates == [2.0, 100.0, 100.0, 200 / 3, 50.0]


def test_throughput_leaves_a_pause_out():
    clock = Clock()
    throughput = Throughput(clock=clock)
    clock.now += 1
    throughput.update(100)
    clock.now += 1000
    throughput.restart()
    clock.now += 2
    assert throughput.update(100) == 50.0


def plain_progress(**options) -> tuple[Progress, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return Progress(2000, 119, 4096, stream=stream, clock=clock, **options), stream, clock


def test_plain_progress_says_step_losses_rate_and_time_left():
    progress, stream, clock = plain_progress()
    clock.now += 10
    progress.update(120, 3.4123, 12_345.4, held_out=3.5)
    expected = "step 120/2000  loss 3.412  val 3.500  12,345 tokens/s  0:10:24 left"
    assert stream.getvalue().splitlines()[-1] == expected


def test_plain_lines_come_every_ten_seconds_and_at_the_end():
    progress, stream, clock = plain_progress()
    for step in range(120, 145):
        clock.now += 1
        progress.update(step, 3.0, 1000.0)
    progress.close()
    progress.close()
    steps = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert steps == ["119/2000", "129/2000", "139/2000", "144/2000"]


def test_work_counts_bytes_and_closes_at_its_end():
    stream, clock = io.StringIO(), Clock()
    work = Work("tokenising", stream=stream, clock=clock)
    clock.now += 10
    work(25_000_000, 100_000_000)
    clock.now += 5
    work(100_000_000, 100_000_000)
    assert stream.getvalue().splitlines() == [
        "tokenising  25 MB of 100 MB  2.5 MB/s  0:00:30 left",
        "tokenising  100 MB of 100 MB  6.67 MB/s",
    ]


def test_work_of_unknown_length_needs_no_total():
    stream, clock = io.StringIO(), Clock()
    with Work("reading", unit="documents", stream=stream, clock=clock) as work:
        clock.now += 10
        work(2500, None)
    assert stream.getvalue() == "reading  2,500 documents  250 documents/s\n"


NOISY = (
    "from lmjax.progress import Progress\n"
    "with Progress(50, 0, 64) as progress:\n"
    "    for step in range(1, 51):\n"
    "        progress.update(step, float('nan') if step == 9 else 2.0, 1e4, 3.0)\n"
    "        progress.say('a sample \\x1b[31m\\r\\0 \\u00e9 \\ud800 ' + 'long ' * 50)\n"
    "print('the end')\n"
)


def run_noisy(environment: Mapping[str, str] = MappingProxyType({}), **options) -> bytes:
    """What the noisy run writes; it must end well and complain of nothing."""
    command = [sys.executable, "-c", NOISY]
    environment = os.environ | environment
    done = subprocess.run(
        command, stderr=subprocess.PIPE, cwd=REPOSITORY, env=environment, timeout=60, **options
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_piped_progress_has_no_control_characters():
    # Not even where the environment asks for colours.
    colours = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    text = run_noisy(colours, stdout=subprocess.PIPE).decode()
    assert "step 50/50" in text and "a sample \\x1b[31m\\r\\x00 é \\ud800" in text
    assert not [char for char in text if unicodedata.category(char) == "Cc" and char != "\n"]


def test_progress_outlives_its_reader():
    read, write = os.pipe()
    os.close(read)
    run_noisy(stdout=write)
    os.close(write)


def on_terminal(width: int, environment: Mapping[str, str]) -> str:
    """What the noisy run draws on a terminal of that width."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    drawn: list[bytes] = []

    def read() -> None:
        # Linux answers with an error once the other side is closed.
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                drawn.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    run_noisy(environment, stdin=slave, stdout=slave)
    os.close(slave)
    reader.join()
    os.close(master)
    return b"".join(drawn).decode()


BAR = "━"
UTF_8 = {"PYTHONIOENCODING": "utf-8", "TERM": "xterm-256color", "NO_COLOR": "", "COLUMNS": ""}


def test_a_terminal_gets_a_bar_in_colour_and_its_cursor_back():
    drawn = on_terminal(120, UTF_8)
    assert BAR in drawn and "\x1b[3" in drawn
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")


def test_no_color_is_respected():
    drawn = on_terminal(120, UTF_8 | {"NO_COLOR": "1"})
    assert BAR in drawn and "\x1b[3" not in drawn


@pytest.mark.parametrize("width", [1, 7, 40])
def test_a_narrow_terminal_gets_a_cut_line(width):
    assert "…" in on_terminal(width, UTF_8)


def test_a_dumb_terminal_gets_plain_lines():
    drawn = on_terminal(120, UTF_8 | {"TERM": "dumb"})
    assert "step 50/50" in drawn and "\x1b" not in drawn


def test_a_terminal_without_unicode_gets_ascii():
    assert on_terminal(120, UTF_8 | {"PYTHONIOENCODING": "ascii"}).isascii()
