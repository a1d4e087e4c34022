# SPDX-License-Identifier: Apache-2.0
"""The TPU compiler sometimes ends the process that it runs in: a segmentation fault of libtpu. So
`plan` runs in a child of a process that sees it end, writes down which program it was, and begins
again; what was compiled before is kept, and that program is refused from then on.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_parent: BinaryIO | None = None


def outlive() -> None:
    """Returns in a child process; this one waits for it, and exits as it did.

    Called while the process has one thread.
    """
    global _parent
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    refused = ""
    while True:
        reading, writing = os.pipe()
        # Until both know what to do with them: one that came between would end this process alone.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
        child = os.fork()
        if not child:
            os.close(reading)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            _parent = os.fdopen(writing, "wb", buffering=0)
            return
        os.close(writing)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
        signal.signal(signal.SIGTERM, partial(_pass_on, child))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code, compiling = _wait(child, reading)
        # The same one again: it could not be written down.
        if -code not in _CRASHES or compiling in ("", refused):
            sys.exit(code if code >= 0 else 128 - code)
        name = signal.Signals(-code).name
        print(f"the TPU compiler ended with {name}; going on without it", file=sys.stderr)
        _refuse(refused := compiling, name)


def _pass_on(child: int, number: int, _: object) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(child, number)


def _wait(child: int, reading: int) -> tuple[int, str]:
    """How a child ended, and the program that it was compiling then."""
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, told.rpartition("\n")[2]


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
        _tell("\n")


def _tell(text: str) -> None:
    if _parent is not None:
        _parent.write(text.encode())
