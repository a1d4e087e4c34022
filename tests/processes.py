# SPDX-License-Identifier: Apache-2.0
"""What processes do behind one's back: their children, and the addresses that they listen at."""

import ipaddress
import os
import time
from collections.abc import Iterator
from pathlib import Path

_LISTENS = "0A"


def descendants(pid: int) -> set[int]:
    """A process and all that it and its children started, of those that still run."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found & parents.keys()


def listening(pid: int) -> set[str]:
    """The addresses at which a process and its descendants listen, "127.0.0.1:80"."""
    mine = {inode for each in descendants(pid) for inode in _sockets(each)}
    return {address for inode, address in _listeners() if inode in mine}


def beyond_loopback(addresses: set[str]) -> set[str]:
    """Those that other machines may reach."""
    return {a for a in addresses if not _is_loopback(a.rpartition(":")[0])}


def wait_until_gone(pids: set[int], seconds: float) -> set[int]:
    """Waits until none of the processes run; those that still do."""
    deadline = time.monotonic() + seconds
    while left := {pid for pid in pids if pid in descendants(pid)}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return left


def _is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _sockets(pid: int) -> Iterator[str]:
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                yield target[8:-1]
    except OSError:  # it ended meanwhile
        return


def _listeners() -> Iterator[tuple[str, str]]:
    """(inode, address) of every socket that listens on this machine."""
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/net/{table}")
        for line in path.read_text().split("\n")[1:-1] if path.exists() else ():
            fields = line.split()
            if fields[3] == _LISTENS:
                host, _, port = fields[1].partition(":")
                words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
                yield fields[9], f"{ipaddress.ip_address(b''.join(words))}:{int(port, 16)}"
