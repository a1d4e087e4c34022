# SPDX-License-Identifier: Apache-2.0
"""Trees of arrays on disk, by Orbax: saved in the background, described, read.

The only file that names Orbax. Whatever it stumbles over in a folder is `Damaged`.
"""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lmjax import sharding
from lmjax.manifest import Damaged


def start_save(path: Path, tree: Any, metadata: Any) -> Any:
    """Starts to save; the arrays are copied before this returns. The answer's `result()` waits."""
    quiet()
    with jax.transfer_guard("allow"):  # processes compare their paths
        return ocp.save_async(str(path), tree, custom_metadata=metadata)


def describe(path: Path) -> tuple[Any, Any]:
    """(what was saved as metadata, the tree with shapes and dtypes in place of arrays)."""
    with _alone():
        if not path.is_dir():
            raise Damaged("it is no folder")
        if not any(path.iterdir()):
            raise Damaged("its folder is empty")
        if odd := next((p for p in path.rglob("*") if not (p.is_file() or p.is_dir())), None):
            raise Damaged(f"{odd.relative_to(path)} is no file")  # a pipe would be waited for
        found: Any = ocp.metadata(str(path))
        return found.custom_metadata, found.metadata


def read(path: Path, target: Any, partial: bool = False) -> Any:
    """The arrays, with the shardings of `target`; `partial` if these are some of those stored."""
    with _alone(partial):
        return ocp.load(str(path), target)


def arrays_of(tree: Any) -> dict[str, Any]:
    """Path → [shape, dtype] of all that has these."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_of(path): [list(x.shape), str(x.dtype)] for path, x in leaves}


@contextlib.contextmanager
def _alone(partial: bool = False) -> Iterator[None]:
    """Orbax without waiting for other processes; whatever it stumbles over is damage.

    Raises:
      Damaged: something could not be read. What is no fault of the files stays what it is.
    """
    quiet()
    context = ocp.Context()
    context.multiprocessing.primary_host = None
    context.multiprocessing.active_processes = {jax.process_index()}
    context.pytree.loading.partial_load = partial
    try:
        with context:
            yield
    except (Damaged, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise Damaged(f"it cannot be read ({short(error)})") from None


def short(error: BaseException) -> str:
    """The first words of what a library says."""
    text = " ".join(str(error).split("[tensorstore_spec")[0].split()) or type(error).__name__
    if "No space left" in text or "ENOSPC" in text:
        return "no space left on the disk"
    return text if len(text) <= 160 else text[:157] + "…"


def quiet() -> None:
    """Keeps the libraries' own accounts of what we report from the terminal."""
    for name in ("orbax", "absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    _quiet_strays()


@cache
def _quiet_strays() -> None:
    """Where one array of many fails, what is done with the others ends as stray exceptions."""
    report = sys.unraisablehook

    def hook(stray: Any) -> None:
        code = getattr(stray.object, "cr_code", None)
        theirs = code is not None and "orbax" in Path(code.co_filename).parts
        if not theirs and str(stray.exc_value) != "Event loop is closed":
            report(stray)

    report_thread = threading.excepthook

    def thread_hook(failed: Any) -> None:  # what it was doing fails where its result is asked for
        if not type(failed.thread).__module__.startswith("orbax"):
            report_thread(failed)

    sys.unraisablehook, threading.excepthook = hook, thread_hook
    logging.getLogger().addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
