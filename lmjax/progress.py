# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run works: a live bar on a terminal, plain lines anywhere else.

A display must never end a run: a closed pipe, a terminal that went away or a character that the
terminal cannot show is swallowed here.
"""

import errno
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REFRESH_SECONDS = 0.1  # of the live bar
LINE_SECONDS = 10.0  # between plain lines
_NARROWEST_BAR, _WIDEST_BAR = 8, 40  # columns


class Progress:
    """The progress of a training run; a context manager.

    `step 120/2000  loss 3.412  val 3.500  12,345 tokens/s  0:03:12 left`, and a bar beside it.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        tokens_per_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._tokens_per_step = tokens_per_step
        self._held_out: float | None = None
        self._display = _Display(stream, clock)
        self._display.show(f"step {start_step}/{total_steps}  starting", self._fraction(start_step))

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        held_out: float | None = None,
    ) -> None:
        """Shows the state after `step`; the last `held_out` loss stays until the next one."""
        self._held_out = self._held_out if held_out is None else held_out
        parts = [f"step {step}/{self._total}", f"loss {loss:.3f}"]
        if self._held_out is not None:
            parts.append(f"val {self._held_out:.3f}")
        parts.append(f"{tokens_per_second:,.0f} tokens/s")
        if self._tokens_per_step and tokens_per_second > 0:
            seconds = (self._total - step) * self._tokens_per_step / tokens_per_second
            parts.append(f"{_duration(seconds)} left")
        self._display.show("  ".join(parts), self._fraction(step))

    def say(self, text: str) -> None:
        """Prints `text` above the bar, control characters made visible."""
        self._display.say(text)

    def close(self) -> None:
        """Prints the last state and gives the terminal back; a second call does nothing."""
        self._display.close()

    def _fraction(self, step: int) -> float:
        return step / self._total if self._total > 0 else 1.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Work:
    """The progress of one long piece of work, called with (done, total or None).

    `unit` "B" counts bytes and is shown as kB, MB …; any other word is shown as it is. It closes
    by itself once `done` reaches `total`; where the total is unknown, call `close`.
    """

    def __init__(
        self,
        label: str,
        unit: str = "B",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._unit = label, unit
        self._clock, self._began = clock, clock()
        self._display = _Display(stream, clock)

    def __call__(self, done: int, total: int | None = None) -> None:
        rate = done / max(self._clock() - self._began, 1e-9)
        amount = _amount(done, self._unit)
        if total is not None:
            amount += f" of {_amount(total, self._unit)}"
        parts = [self._label, amount, f"{_amount(rate, self._unit)}/s"]
        finished = total is not None and done >= total
        if total is not None and rate > 0 and not finished:
            parts.append(f"{_duration((total - done) / rate)} left")
        self._display.show("  ".join(parts), done / total if total else None)
        if finished:
            self.close()

    def close(self) -> None:
        """Prints the last state and gives the terminal back; a second call does nothing."""
        self._display.close()

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Display:
    """One line of state: redrawn in place on a terminal, repeated now and then elsewhere."""

    def __init__(self, stream: TextIO | None, clock: Callable[[], float]) -> None:
        self._stream = Unbreakable(sys.stdout if stream is None else stream)
        self._clock = clock
        self._shown = -math.inf  # when the line was last on the screen
        self._line = _Line()
        self._pending = False
        self._closed = False
        self._live: Live | None = None
        if self._stream.isatty() and os.environ.get("TERM", "dumb") not in (
            "dumb",
            "unknown",
        ):
            # rich may be told by the environment to guess otherwise; it is a terminal.
            console = Console(file=self._stream, force_terminal=True)  # pyright: ignore
            # No refresh thread: the two cores of a laptop have better things to do.
            self._live = Live(self._line, console=console, auto_refresh=False)
            self._live.start()

    def show(self, text: str, fraction: float | None) -> None:
        if self._closed:
            return
        self._line.text, self._line.fraction = _visible(text), fraction
        self._pending = True
        wait = LINE_SECONDS if self._live is None else REFRESH_SECONDS
        if self._clock() - self._shown >= wait:
            self._flush()

    def say(self, text: str) -> None:
        text = "\n".join(_visible(line) for line in text.split("\n"))
        if self._live is not None and not self._closed:
            self._live.console.print(Text(text), soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        if self._closed:
            return
        if self._pending:
            self._flush()
        self._closed = True
        if self._live is not None:
            self._live.stop()

    def _flush(self) -> None:
        self._shown, self._pending = self._clock(), False
        if self._live is not None:
            self._live.refresh()
        else:
            self._stream.write(self._line.text + "\n")
            self._stream.flush()


class _Line:
    """The state as a rich renderable: text cut to the width, and a bar where there is room."""

    text = ""
    fraction: float | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = Text(self.text, no_wrap=True, overflow="ellipsis")
        room = min(options.max_width - cell_len(self.text) - 2, _WIDEST_BAR)
        if self.fraction is None or room < _NARROWEST_BAR:
            yield text
            return
        row = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(1.0, self.fraction, room, complete_style="cyan", finished_style="green")
        row.add_row(text, bar)
        yield row


class Unbreakable:
    """A text stream whose writes never raise, and that falls silent once its reader has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        # What the encoding lacks is shown as "?".
        shown = text.encode(self.encoding, "replace").decode(self.encoding)
        self._attempt(lambda: self._stream.write(shown))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda: self._stream.flush())

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self._gone:
            return
        try:
            action()
        except OSError as error:
            # A full disk may pass; a pipe without a reader and a closed terminal do not.
            if error.errno in (errno.EPIPE, errno.EIO):
                self._gone = True
                self._drain()
        except (
            ValueError,
            AttributeError,
        ):  # closed by its owner, or there never was a stdout
            self._gone = True

    def _drain(self) -> None:
        # Python flushes stdout once more at exit, and would complain about the pipe there.
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            return


def _visible(line: str) -> str:
    """The line with control characters as escapes: a sample must not drive the terminal."""
    return "".join(
        ascii(char)[1:-1] if unicodedata.category(char) in ("Cc", "Cs") and char != "\t" else char
        for char in line
    )


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}"
    return f"{days} d {clock}" if days else clock


def _amount(count: float, unit: str) -> str:
    if unit != "B":
        return f"{count:,.0f} {unit}"
    for prefix in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.0f} B" if not prefix else f"{count:.3g} {prefix}B"
        count /= 1000
    return f"{count:,.2f} TB"
