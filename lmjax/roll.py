# SPDX-License-Identifier: Apache-2.0
"""The roll: process 0 hears from all others over the coordinator's port, before JAX connects them.

So those that do not come, or that were told something else, are named.
"""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

SETTINGS = ("LMJAX_COORDINATOR", "LMJAX_PROCESSES", "LMJAX_PROCESS")
TIMEOUT = "LMJAX_JOIN_SECONDS"
_RETRY = 0.2
_PATIENCE = 5  # seconds for a process that has connected to say who it is


@dataclass(frozen=True)
class Place:
    """One process among `count`; process 0 listens at `address`, a host and a port."""

    address: str
    count: int
    index: int

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not (host and re.fullmatch("[0-9]+", port)):
            raise ValueError(f"{SETTINGS[0]}={self.address}: HOST:PORT is needed")
        if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
            raise ValueError(f"{SETTINGS[0]}={self.address}: a port is from 1 to 65535")
        if self.count < 1:
            raise ValueError(f"{SETTINGS[1]}={self.count}: must be at least 1")
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"{SETTINGS[2]}={self.index}: from 0 to {self.count - 1} ({SETTINGS[1]}="
                f"{self.count})"
            )


def call_the_roll(place: Place, seconds: float) -> None:
    """Returns when all processes are there.

    Raises:
      ValueError: some were not, after so long; names them. Or two say that they are the same, or
        one was told of another number of processes; at once.
    """
    (_answer if place.index == 0 else _report)(place, time.monotonic() + seconds, seconds)


def _answer(place: Place, deadline: float, seconds: float) -> None:
    """Process 0: waits for each of the others, then tells all of them who is there."""
    here, wrong = {0: socket.gethostname()}, ""
    with contextlib.ExitStack() as stack, _listening(place.address) as server:
        others: dict[int, socket.socket] = {}
        to_tell = []
        while not wrong and len(here) < place.count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError):
                other = stack.enter_context(server.accept()[0])
                index, count, host = _heard(other)
                if index < 1 or index >= count:
                    continue
                to_tell.append(other)
                for ended in [i for i, one in others.items() if _gone(one)]:
                    del here[ended], others[ended]  # and is missed until it comes again
                if count != place.count:
                    wrong = (
                        f"process {index} was told of {count} processes, process 0 of {place.count}"
                    )
                elif index in others:
                    wrong = f"two processes say --process={index} ({here[index]}, {host})"
                else:
                    here[index], others[index] = host, other
        missing = [i for i in range(place.count) if i not in here]
        for other in to_tell:
            with contextlib.suppress(OSError):
                said = {"missing": missing, "wrong": wrong}
                other.sendall(json.dumps(said).encode() + b"\n")
    if wrong:
        raise ValueError(wrong)
    if missing:
        raise _absent(place, missing, here, seconds)


def _heard(other: socket.socket) -> tuple[int, int, str]:
    """(index, count, host) of who has connected; zeros of a stranger."""
    other.settimeout(_PATIENCE)
    try:
        said = json.loads(other.makefile("rb").readline(4096))
        return int(said["index"]), int(said["count"]), str(said["host"])[:200]
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 0, 0, ""


def _gone(other: socket.socket) -> bool:
    """Whether a process that waits for an answer has ended, perhaps to be started again."""
    other.setblocking(False)
    try:
        return other.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        other.settimeout(_PATIENCE)


@contextlib.contextmanager
def _listening(address: str) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host if is_local(address) else "", int(port)))
        except OSError as error:
            raise ValueError(f"process 0 cannot listen at {address}: {error.strerror}") from None
        server.listen(1024)
        yield server


def is_local(address: str) -> bool:
    """Whether an address is this machine's own, which no other machine needs to reach."""
    return address.rpartition(":")[0] in ("127.0.0.1", "localhost", "::1", "[::1]")


def _report(place: Place, deadline: float, seconds: float) -> None:
    """The others: say that they are here until process 0 has heard of all."""
    host, _, port = place.address.rpartition(":")
    mine = {"index": place.index, "count": place.count, "host": socket.gethostname()}
    reached = False
    while (left := deadline + 5 - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, int(port)), timeout=left) as server:
                server.sendall(json.dumps(mine).encode() + b"\n")
                reached = True
                said = json.loads(server.makefile("rb").readline(1 << 20))
                missing, wrong = said["missing"], said["wrong"]
        except (OSError, ValueError, TypeError, KeyError):  # nobody there yet, or gone
            if reached:
                break
            time.sleep(_RETRY)
            continue
        if wrong:
            raise ValueError(wrong)
        if missing:
            raise _absent(place, missing, {}, seconds)
        return
    gone = "left without an answer" if reached else "did not answer"
    raise ValueError(
        f"process {place.index} of {place.count} waited {seconds:g} s for process 0 at"
        f" {place.address}, which {gone}; is it started? ({TIMEOUT} is how long to wait)"
    )


def _absent(place: Place, missing: list[int], here: dict[int, str], seconds: float) -> ValueError:
    names = ", ".join(map(str, missing[:20])) + (" …" if len(missing) > 20 else "")
    there = ", ".join(f"{i} ({host})" for i, host in sorted(here.items())[:20])
    return ValueError(
        f"{place.count - len(missing)} of {place.count} processes started within {seconds:g} s;"
        f" missing: {names}"
        + (f"; here: {there}" if there else "")
        + f" ({TIMEOUT} is how long to wait)"
    )
