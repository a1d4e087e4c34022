# SPDX-License-Identifier: Apache-2.0
"""Compiled train steps in files: written where they are compiled, read where they run.

A file of these is code (JAX reads it with pickle). It is read only from a folder that is the user's
own and closed to others, and only if everything that the program depends on is as it was.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from lmjax.compilation import not_private
from lmjax.recipe import difference, dump, flatten

About = dict[str, Any]
_LIBRARIES = ("jax", "jaxlib", "libtpu")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")


def here(devices: Sequence[Any]) -> About:
    """What a program depends on beside its recipe: libraries, our source, flags, devices."""
    return {
        "versions": {name: version(name) for name in _LIBRARIES},
        "devices": {
            "kind": devices[0].device_kind,
            "count": len(devices),
            "order": [[d.id, *getattr(d, "coords", ())] for d in devices],
        },
        "source": source(),
        "flags": {name: os.environ.get(name, "") for name in _FLAGS},
    }


def prepare(folder: Path) -> None:
    """Makes the folder, for this user alone.

    Raises:
      ValueError: it is there, and not the user's alone.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if reason := not_private(folder):
        raise ValueError(reason)


def save(program: Any, folder: Path, about: About) -> Path:
    """Writes a compiled step, which takes (state, batch), and what it depends on; returns its file.

    Raises:
      ValueError: as `prepare`.
    """
    prepare(folder)
    content, _, out_tree = serialize_executable.serialize(program)
    metrics = jax.tree.unflatten(out_tree, range(out_tree.num_leaves))[1]
    found = hashlib.sha256(content).hexdigest()
    manifest = {"about": about, "metrics": sorted(metrics), "sha256": found}
    name = hashlib.sha256(dump(about).encode()).hexdigest()[:16]
    write_whole(folder / f"{name}.step", content)
    write_whole(folder / f"{name}.json", json.dumps(manifest, indent=1).encode())
    return folder / f"{name}.step"


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, whoever else writes it now."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def load(folder: Path, about: About, state: Any, batch: Any, devices: Sequence[Any]) -> Any:
    """The program that was saved for exactly this, ready to run on `devices`; or why there is none.

    Returns:
      a compiled step, or a sentence without an end (str).
    """
    try:
        if reason := not_private(folder):
            return reason
        found = [(*_apart(manifest["about"], about), manifest, path)
                 for path, manifest in _manifests(folder)]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder} cannot be read ({error})"
    if not found:
        return f"{folder} holds no compiled step"
    apart, reason, manifest, path = min(found, key=lambda one: one[0])
    if apart:
        return f"{path.with_suffix('.step')} is of {reason}"
    content = path.with_suffix(".step").read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        return f"{path.with_suffix('.step')} is damaged"
    given = jax.tree.structure(((state, batch), {}))
    result = jax.tree.structure((state, dict.fromkeys(manifest["metrics"], 0)))
    try:
        return serialize_executable.deserialize_and_load(
            content, given, result, devices[0].client, devices
        )
    except Exception as error:  # of XLA: no class of its own
        first = str(error).strip().split("\n")[0]
        return f"{path.with_suffix('.step')} cannot be loaded ({first})"


def _manifests(folder: Path) -> Iterator[tuple[Path, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield path, json.loads(path.read_text("utf-8"))


def _apart(theirs: About, mine: About) -> tuple[int, str]:
    """In how many things two programs differ, and the first of them in words."""
    theirs, mine = json.loads(json.dumps([theirs, mine]))  # tuples are lists
    changes = difference(theirs, mine)
    if not changes:
        return 0, ""
    order = list(dict(flatten(mine)))
    changes.sort(key=lambda change: order.index(change[0]) if change[0] in order else len(order))
    key, old, new = changes[0]
    if key == "source":
        return len(changes), "other source code of lmjax"
    if key == "devices.order":
        return len(changes), "the same devices in another order"
    old, new = (_short(value) for value in (old, new))
    return len(changes), f"{key.removeprefix('versions.')} {old}; here it is {new}"


def _short(value: Any) -> str:
    text = "none" if value in (None, "") else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def version(library: str) -> str:
    """Of an installed library; "" where it is not."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def source() -> str:
    """A hash of every file of the package."""
    package = Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(str(path.relative_to(package)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()
