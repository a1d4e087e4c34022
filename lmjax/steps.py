# SPDX-License-Identifier: Apache-2.0
"""The folder of checkpoints: which steps are there, and what becomes of old and damaged ones.

A step is a folder `checkpoints/<step>`. What is on its way out has another name first: `deleting-…`
until it is gone, `damaged-<step>-<time>` for good, so that a kill at any moment leaves no half step
under the name of a whole one.
"""

import contextlib
import os
import re
import shutil
import threading
import time
from pathlib import Path

_STEP = re.compile(r"0|[1-9][0-9]{0,9}")
_LEFTOVERS = ("*.orbax-checkpoint-tmp*", "deleting-*")


def folder(workdir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return workdir.absolute() / "checkpoints"


def all_steps(workdir: Path) -> list[int]:
    """The steps that a run directory holds, ascending, whole or damaged.

    What has the name of a step counts as one, be it a file or a link to nowhere: it is in the way
    of the step that is to have that name.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = [p.name for p in folder(workdir).iterdir() if _STEP.fullmatch(p.name)]
        return sorted(step for step in map(int, names) if step < 1 << 31)
    return []


def is_there(workdir: Path, step: int) -> bool:
    """Whether a run directory holds something by the name of that step."""
    return os.path.lexists(folder(workdir) / str(step))


def newest_step(workdir: Path) -> int | None:
    """The newest step of a run directory, whole or damaged."""
    return max(all_steps(workdir), default=None)


def newest_in_words(workdir: Path) -> str:
    """What a run that stops says of where it can go on."""
    step = newest_step(workdir)
    return "no step is saved yet" if step is None else f"the newest good step is {step:,}"


def set_aside(workdir: Path, step: int) -> Path:
    """Gives a damaged step a name that says so; nothing is deleted."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    target = folder(workdir) / f"damaged-{step}-{stamp}"
    for number in range(2, 1000):
        if not target.exists():
            break
        target = target.with_name(f"damaged-{step}-{stamp}-{number}")
    os.rename(folder(workdir) / str(step), target)
    return target


def damaged_folders(workdir: Path) -> list[str]:
    """Names of what was set aside."""
    return sorted(p.name for p in folder(workdir).glob("damaged-*"))


def clean(workdir: Path) -> None:
    """Deletes what a killed run left unfinished. Only for the one who writes there."""
    for pattern in _LEFTOVERS:
        for path in folder(workdir).glob(pattern):
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Retention:
    """Keeps the newest steps; deletes the others in the background, renamed first."""

    def __init__(self, workdir: Path, keep: int) -> None:
        self._workdir, self._keep = workdir, keep
        self._threads: list[threading.Thread] = []

    def apply(self) -> None:
        """Retires all but the newest `keep` steps."""
        self._threads = [t for t in self._threads if t.is_alive()]
        for step in all_steps(self._workdir)[: -self._keep]:
            path = folder(self._workdir) / str(step)
            away = path.with_name(f"deleting-{step}-{time.time_ns()}")
            os.rename(path, away)
            thread = threading.Thread(target=_delete, args=(away,))
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Waits until all of it is deleted."""
        for thread in self._threads:
            thread.join()
