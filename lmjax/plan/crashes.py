# SPDX-License-Identifier: Apache-2.0
"""The TPU compiler sometimes ends the process that it runs in: a segmentation fault of libtpu. So
`plan` runs in a child of a process that sees it end, writes down which program it was, and begins
again; what was compiled before is kept, and that program is refused from then on.
"""

import contextlib
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LONGEST_NAME = 256
_told: mmap.mmap | None = None  # what is compiled, in memory that outlives a crash


def outlive() -> None:
    """Returns in a child process; this one waits for it, and exits as it did.

    SIGINT, SIGTERM and SIGHUP end both at once, also inside the compiler; SIGKILL within a second.
    Called while the process has one thread.
    """
    global _told
    told = mmap.mmap(-1, _LONGEST_NAME)
    refused = ""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some starters leave it, none comes
    # Taken one after the other by `_wait`, whenever they come. A handler would run between two
    # lines of Python only: not while this process is blocked.
    taken = {signal.SIGCHLD} | {n for n in _ENDING if signal.getsignal(n) != signal.SIG_IGN}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    parent = os.getpid()
    while True:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
            _told = told
            return
        code = _wait(child, taken)
        compiling = told[:].rstrip(b"\0").decode()
        # The same one again: it could not be written down.
        if -code not in _CRASHES or compiling in ("", refused):
            sys.exit(code if code >= 0 else 128 - code)
        name = signal.Signals(-code).name
        print(f"the TPU compiler ended with {name}; going on without it", file=sys.stderr)
        _refuse(refused := compiling, name)


def _wait(child: int, taken: set[signal.Signals]) -> int:
    """How a child ended. A signal to end ends it and this process."""
    while (number := signal.sigwait(taken)) == signal.SIGCHLD:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
    os.kill(child, signal.SIGKILL)  # at others libtpu writes down its stack
    os.waitpid(child, 0)
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(2, b"\ninterrupted\n")
    os._exit(128 + number)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(128 + signal.SIGKILL)


def _refuse(name: str, crash: str) -> None:
    from lmjax.plan import kept

    kept.write(name, {"crash": crash})


@contextlib.contextmanager
def compiling(name: str) -> Iterator[None]:
    """Tells the parent, if there is one, what is compiled meanwhile, by the name it is kept by."""
    _tell(name)
    try:
        yield
    finally:
        _tell("")


def _tell(name: str) -> None:
    if _told is not None:
        _told[:] = name.encode().ljust(_LONGEST_NAME, b"\0")
