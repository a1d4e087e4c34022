# SPDX-License-Identifier: Apache-2.0
"""Plans that were made before: a folder of the user's, a file a compilation."""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lmjax.executables import version, write_whole
from lmjax.recipe import dump

_LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def folder() -> Path:
    """Where they are; private to the user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "lmjax" / "plan"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def key(*parts: Any) -> str:
    """A name for what an answer depends on: `parts`, the libraries, and the code that reads
    compiled programs.
    """
    versions = {name: version(name) for name in _LIBRARIES}
    return hashlib.sha256(dump([_source(), versions, *parts]).encode()).hexdigest()


def path(name: str) -> Path:
    """Where what is kept under a name is."""
    return folder() / f"{name}.json"


def read(name: str) -> dict[str, Any] | None:
    """What was kept under a name, if it can be read."""
    try:
        return json.loads(path(name).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def write(name: str, found: dict[str, Any]) -> None:
    """Keeps it; a cache that cannot be written is none."""
    try:
        write_whole(path(name), json.dumps(found).encode())
    except OSError:
        pass


@functools.cache
def _source() -> str:
    """A hash of the modules that turn a compiled program into what is kept."""
    found = hashlib.sha256()
    for name in ("facts", "hlo", "program"):
        found.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return found.hexdigest()
