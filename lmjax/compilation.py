# SPDX-License-Identifier: Apache-2.0
"""Compiled programs on disk, from which the next start takes them: JAX's cache, in a safe place.

What lies there is run as it is, so the folder belongs to the user alone. A cache that cannot be had
is none: it never ends a run.
"""

import contextlib
import functools
import hashlib
import os
import platform
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SWITCH = "LMJAX_COMPILATION_CACHE"
_LARGEST = 4 * 2**30  # bytes; what was not used for longest goes first
_SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_DAMAGED = "Error reading persistent compilation cache entry"


def turn_on(env: Mapping[str, str] = os.environ) -> None:
    """Makes JAX keep what it compiles, in a folder of the user's below `XDG_CACHE_HOME`.

    JAX_COMPILATION_CACHE_DIR names another folder, LMJAX_COMPILATION_CACHE=off turns it off. Where
    the folder cannot be had, one line on standard error says why.

    Raises:
      ValueError: the switch is neither on nor off.
    """
    switch = env.get(_SWITCH, "on")
    if switch not in ("on", "off"):
        raise ValueError(f"{_SWITCH}={switch}: on or off")
    if switch == "off" or "JAX_COMPILATION_CACHE_DIR" in env:
        return
    try:
        folder = _folder(env)
        _make_room(folder, _LARGEST)
    except (OSError, RuntimeError) as error:  # no home, no space, no right to write
        print(f"no compilation cache: {error}", file=sys.stderr)
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _SHORTEST not in env:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _folder(env: Mapping[str, str]) -> Path:
    """The folder for programs of this kind of machine, made if it is not there."""
    base = env.get("XDG_CACHE_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    outer = root / "lmjax" / "compiled"
    root.mkdir(parents=True, exist_ok=True)
    for folder in (outer.parent, outer):
        folder.mkdir(exist_ok=True, mode=0o700)
    if reason := not_private(outer, reading=True):
        raise OSError(reason)
    # Homes may be shared by machines, and a CPU's program needs that CPU's instructions.
    folder = outer / _machine()
    folder.mkdir(exist_ok=True, mode=0o700)
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} cannot be written")
    return folder


def not_private(folder: Path, reading: bool = False) -> str:
    """Why programs in this folder are not to be run; "" where it is the user's alone.

    Args:
      reading: others may read it, but not write.
    """
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is no folder"
    if found.st_uid != os.geteuid():
        return f"{folder} belongs to another user (id {found.st_uid})"
    if found.st_mode & (0o022 if reading else 0o077):
        return f"{folder} is open to other users (mode {found.st_mode & 0o777:o}): chmod 700 it"
    return ""


@functools.cache
def _machine() -> str:
    """A name for the instructions that the CPU has."""
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n")
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]


def _make_room(folder: Path, most: int) -> None:
    """Deletes what was not used for longest, until `most` bytes are left."""
    found = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another start may be deleting as well
            about = path.stat()
            found.append((max(about.st_atime, about.st_mtime), about.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


@dataclass
class Compiled:
    """A program ready to run, and what it took: seconds, and whether it was in the cache."""

    program: Callable[..., Any]
    seconds: float
    cached: bool


def compiled(lower: Callable[[], Any]) -> Compiled:
    """What `lower` traces, compiled; the clock runs from before it traces."""
    began, hits = time.monotonic(), _hits()
    before = hits[0]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lowered = lower()
        program = lowered.compile()
    for warning in told:
        if str(warning.message).startswith(_DAMAGED):
            _delete_damaged(lowered)
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return Compiled(program, time.monotonic() - began, hits[0] > before)


def _delete_damaged(lowered: Any) -> None:
    """JAX would read a file that was cut short again and again, and never write it anew."""
    import jax

    folder: Any = jax.config.jax_compilation_cache_dir  # pyright: ignore
    name = lowered.compiler_ir().operation.attributes["sym_name"].value
    for path in Path(folder).glob(f"{name}-*-cache"):
        with contextlib.suppress(OSError):
            path.unlink()


@functools.cache
def _hits() -> list[int]:
    """How many programs came from the cache in this process, kept up to date by JAX."""
    import jax

    count = [0]

    def hear(event: str, **_: Any) -> None:
        count[0] += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_listener(hear)
    return count


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Nothing is read from JAX's cache or written to it.

    Its programs need a device to be read back, and cannot be saved a second time.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
