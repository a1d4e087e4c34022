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
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from lmjax.compilation import not_private
from lmjax.recipe import difference, dump, flatten

About = dict[str, Any]
_LIBRARIES = ("jax", "jaxlib", "libtpu")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")
# Of libtpu: larger stacks for the compiler, which no program depends on; and what JAX asks for
# wherever it finds a TPU. `plan` gives both, so that what it compiles is what a TPU would run.
TPU_FLAGS = (
    "--fibers_default_thread_stack_size=4194304",
    "--xla_tpu_use_enhanced_launch_barrier=true",
)
_NAME = re.compile(r"[0-9a-f]{16}")


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
        "flags": {name: _flags(name) for name in _FLAGS},
    }


def _flags(name: str) -> str:
    """What the user set, but for TPU_FLAGS and stacks of any size."""
    text = os.environ.get(name, "")
    if name != "LIBTPU_INIT_ARGS":
        return text
    stacks = TPU_FLAGS[0].partition("=")[0]
    kept = (flag for flag in text.split() if flag not in TPU_FLAGS)
    return " ".join(flag for flag in kept if flag.partition("=")[0] != stacks)


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
    names = sorted(metrics)
    manifest = {"about": about, "metrics": names, "sha256": _seal(content, names)}
    path = folder / f"{_name(about)}.step"
    write_whole(path, content)
    write_whole(path.with_suffix(".json"), json.dumps(manifest, indent=1).encode())
    return path


def _name(about: About) -> str:
    return hashlib.sha256(dump(about).encode()).hexdigest()[:16]


def _seal(content: bytes, metrics: Any) -> str:
    """Of all that a step is put together from."""
    return hashlib.sha256(content + dump(metrics).encode()).hexdigest()


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
        manifests = _manifests(folder)
    except OSError as error:
        return f"{folder} cannot be read ({error})"
    damaged = [path for path, manifest in manifests.items() if manifest is None]
    found = [(*_apart(manifest["about"], about), path)
             for path, manifest in manifests.items() if manifest]  # fmt: skip
    mine = folder / f"{_name(about)}.json"
    if mine in damaged or (damaged and not found):
        return f"{mine if mine in damaged else damaged[0]} is damaged"
    if not found:
        return f"{folder} holds no compiled step"
    apart, reason, path = min(found, key=lambda one: one[0])
    if apart:
        return f"{path.with_suffix('.step')} is of {reason}"
    return _whole(path.with_suffix(".step"), manifests[path], (state, batch), devices)


def _whole(path: Path, manifest: Any, given: Any, devices: Sequence[Any]) -> Any:
    """As `load`, of the one step that agrees."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"{path} is damaged ({error.strerror})"
    if _seal(content, manifest["metrics"]) != manifest["sha256"]:
        return f"{path} is damaged"
    result = jax.tree.structure((given[0], dict.fromkeys(manifest["metrics"], 0)))
    given = jax.tree.structure((given, {}))
    try:
        return serialize_executable.deserialize_and_load(
            content, given, result, devices[0].client, devices
        )
    except Exception as error:  # of XLA: no class of its own
        first = str(error).strip().split("\n")[0]
        return f"{path} cannot be loaded ({first})"


def _manifests(folder: Path) -> dict[Path, About | None]:
    """Those in the folder, None for one that cannot be read. Files of other names are not ours."""
    return {p: _manifest(p) for p in sorted(folder.glob("*.json")) if _NAME.fullmatch(p.stem)}


def _manifest(path: Path) -> About | None:
    try:
        found = json.loads(path.read_text("utf-8"))
        about, names, _ = (found[key] for key in ("about", "metrics", "sha256"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = isinstance(about, dict) and isinstance(names, list)
    return found if whole and all(isinstance(name, str) for name in names) else None


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
