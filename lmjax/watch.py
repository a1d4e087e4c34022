# SPDX-License-Identifier: Apache-2.0
"""Ends the processes of a run when one of them is gone, with a line that names it.

JAX ends a process whose peer is silent, without a word on which. So each process has a sentinel
beside it: this file, run as a program of its own, which no long computation holds up. All
sentinels talk to that of process 0. One whose process ended, or stands still, tells the others.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

SILENCE = 10.0  # seconds after which a process that stands still, or a host, is given up
_BEAT = 1.0
_TICK = 0.25
# Seconds from the end of our process to our saying so. Where process 0 is gone, JAX ends the others
# faster than they hear of it; and where all meet the same error, each is to tell it.
_FIRST, _OTHERS = 1.0, 3.0
_BYE = b"bye\n"


class Sentinel:
    """The sentinel of this process, running until `leave` or the end of this process."""

    def __init__(self, index: int, count: int, address: str = "", token: str = "") -> None:
        """Starts it.

        Args:
          address: of process 0, "host port"; for process 0 itself the interface to listen at.
          token: what process 0's sentinel is called by.
        """
        self.token = token or secrets.token_hex(8)
        settings = [os.getpid(), index, count, socket.gethostname(), address, self.token]
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._child.stdin and self._child.stdout
        self._pipe = self._child.stdin
        self._pipe.write(json.dumps(settings).encode() + b"\n")  # other users see arguments
        self._pipe.flush()
        self.port = int(self._child.stdout.readline() or 0)  # of process 0
        self._child.stdout.close()

    def leave(self) -> None:
        """Tells the others that this process ends as it should."""
        with contextlib.suppress(OSError):
            self._pipe.write(_BYE)
            self._pipe.flush()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(2 * _BEAT)
        with contextlib.suppress(OSError):
            self._pipe.close()


class _Peer:
    """The other end of a connection: process `index`, None until it has said who it is."""

    def __init__(self, connection: socket.socket, index: int | None, host: str) -> None:
        self.connection, self.index, self.host = connection, index, host
        self.heard, self.rest = time.monotonic(), b""

    def tell(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class _Watch:
    """The loop of a sentinel."""

    def __init__(self, parent: int, index: int, count: int, host: str, token: str) -> None:
        self.parent, self.index, self.count = parent, index, count
        self.host, self.token = host, token
        self.peers: list[_Peer] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ, self._from_parent)
        self.ended = 0.0  # when our process did
        self.still = 0.0  # since when it stands still

    def listen(self, interface: str) -> None:
        """Process 0: waits for the others, and prints at which port."""
        family = socket.AF_INET6 if ":" in interface else socket.AF_INET
        server = socket.socket(family)
        server.bind((interface, 0))
        server.listen(1024)
        print(server.getsockname()[1], flush=True)
        self.selector.register(server, selectors.EVENT_READ, self._accept)

    def connect(self, address: str) -> None:
        """Another process: calls process 0."""
        host, _, port = address.rpartition(" ")
        name, _, host = host.rpartition(" ")
        print(0, flush=True)
        connection = socket.create_connection((host, int(port)), timeout=SILENCE)
        peer = self._add(connection, 0, name)
        peer.tell(index=self.index, count=self.count, host=self.host, token=self.token)

    def run(self) -> NoReturn:
        """Until the run ends."""
        beaten = 0.0
        while True:
            for key, _ in self.selector.select(_TICK):
                key.data()
            now = time.monotonic()
            if now - beaten >= _BEAT:
                beaten = now
                for peer in self.peers:
                    peer.tell(beat=1)
            self._check_parent(now)
            for peer in list(self.peers):
                if now - peer.heard > SILENCE:
                    self._lost(peer, f"was silent for {SILENCE:g} s")

    def _accept(self) -> None:
        (server,) = (k.fileobj for k in self.selector.get_map().values() if k.data == self._accept)
        connection, _ = server.accept()  # type: ignore[union-attr]
        self._add(connection, None, "")

    def _add(self, connection: socket.socket, index: int | None, host: str) -> _Peer:
        connection.settimeout(_BEAT)
        peer = _Peer(connection, index, host)
        self.peers.append(peer)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._hear(peer))
        return peer

    def _drop(self, peer: _Peer) -> None:
        self.peers.remove(peer)
        self.selector.unregister(peer.connection)
        peer.connection.close()

    def _lost(self, peer: _Peer, why: str) -> None:
        self._drop(peer)
        if peer.index is not None:
            self._end(peer.index, peer.host, why)

    def _hear(self, peer: _Peer) -> None:
        try:
            said = peer.connection.recv(1 << 16)
        except OSError:
            said = b""
        if not said:
            self._lost(peer, "is gone")
            return
        peer.heard = time.monotonic()
        *lines, peer.rest = (peer.rest + said).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                self._take(peer, message)
            except (ValueError, TypeError, KeyError, AttributeError):
                self._drop(peer)  # no sentinel
                return
            if peer not in self.peers:
                return

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        if peer.index is None:
            if message["token"] != self.token or message["count"] != self.count:
                raise ValueError("a stranger")
            peer.index, peer.host = int(message["index"]), str(message["host"])[:200]
        elif "gone" in message:
            self._end(int(message["gone"]), str(message["host"])[:200], str(message["why"])[:200])
        elif "bye" in message:
            self._drop(peer)
            if not self.peers and self.index:
                sys.exit(0)

    def _from_parent(self) -> None:
        said = os.read(0, 100)
        if said == _BYE:
            for peer in self.peers:
                peer.tell(bye=1)
            sys.exit(0)
        self.selector.unregister(0)
        self.ended = self.ended or time.monotonic()

    def _check_parent(self, now: float) -> None:
        if os.getppid() != self.parent:
            self.ended = self.ended or now
        if self.ended and now - self.ended > (_OTHERS if self.index else _FIRST):
            self._end(self.index, self.host, "ended before the run did")
        self.still = (self.still or now) if self._stands_still() else 0.0
        if self.still and now - self.still > SILENCE - 2 * _BEAT:
            self._end(self.index, self.host, f"stood still for {SILENCE - 2 * _BEAT:g} s")

    def _stands_still(self) -> bool:
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{self.parent}/stat").read_bytes()
            return status.rpartition(b")")[2].split()[0] == b"T"
        return False

    def _end(self, index: int, host: str, why: str) -> NoReturn:
        for peer in self.peers:
            peer.tell(gone=index, host=host, why=why)
        if index != self.index:
            line = (
                f"\nerror: process {index} of {self.count} ({host}) {why}; all processes end here."
                " Start them again to go on from the newest checkpoint.\n"
            )
            os.write(2, line.encode())
        if os.getppid() == self.parent:
            os.kill(self.parent, signal.SIGKILL)
        sys.exit(0)


def main() -> None:
    """The sentinel's process; its settings come first on its standard input."""
    settings = b""
    while not settings.endswith(b"\n"):
        if not (letter := os.read(0, 1)):
            return
        settings += letter
    parent, index, count, host, address, token = json.loads(settings)
    watch = _Watch(parent, index, count, host, token)
    try:
        watch.connect(address) if index else watch.listen(address)
    except OSError as error:
        print(0, flush=True)
        os.write(2, f"process {index} does not watch over the others: {error}\n".encode())
        return
    with contextlib.suppress(BrokenPipeError):
        watch.run()


if __name__ == "__main__":
    main()
