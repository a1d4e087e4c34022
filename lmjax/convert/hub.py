# SPDX-License-Identifier: Apache-2.0
"""Folders of the Hugging Face hub: what every family shares in reading and writing them.

config.json holds the sizes, safetensors files the weights by name. Reading checks every setting,
name and shape, so that a folder is either understood whole or refused.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lmjax.recipe import dump
from lmjax.step import abstract_params
from lmjax.workdir import read_json

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OURS = ("config.json", "generation_config.json", WEIGHTS)
_FLOATS = ("F32", "F16", "BF16", "F64")

# Keys of config.json and the values that can be expressed; an absent key has the first one.
Settings = tuple[tuple[str, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class Info:
    """What a folder says beside the model.

    model_type: the hub's word for the family. eos: id of the end of text, if named. notes: what was
    read in another way than the folder says. characters: the most of a word, if they are read.
    """

    model_type: str
    eos: int | None
    notes: tuple[str, ...]
    characters: int = 0


def read_config(folder: Path) -> tuple[dict[str, Any], Path]:
    """The settings in a folder's config.json, and its path for messages."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a folder in the hub's format has one")
    return read_object(path), path


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError if it holds anything else."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object")
    return config


def check_sizes(config: Mapping[str, Any], path: Path, keys: tuple[str, ...]) -> None:
    """Raises ValueError unless the keys are whole numbers above 0."""
    for key in keys:
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{path}: {key}={config.get(key)!r}; a whole number is needed")


def check_settings(config: Mapping[str, Any], path: Path, settings: Settings) -> None:
    """Raises ValueError for a setting that changes the function and cannot be expressed."""
    for key, values in settings:
        value = config.get(key, values[0])
        if value not in values:
            named = " or ".join(json.dumps(v) for v in values)
            raise ValueError(f"{path}: {key}={json.dumps(value)}; allowed: {named}")


def rate(config: Mapping[str, Any], key: str, path: Path, default: float = 0.1) -> float:
    """A dropout rate of config.json."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"{path}: {key}={value!r}; allowed are numbers from 0 to below 1")
    return float(value)


def stored(
    folder: Path, rename: Callable[[str], str], buffers: re.Pattern[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """(new name, float32 values) of every tensor in a folder's safetensors that is a weight.

    Names that `buffers` finds are no weights.
    """
    for file in _weight_files(folder):
        try:
            with safe_open(folder / file, framework="numpy") as opened:
                for name in opened.keys():
                    if not buffers.search(name):
                        dtype = opened.get_slice(name).get_dtype()
                        if dtype not in _FLOATS:
                            raise ValueError(
                                f"{folder / file}: {name} is {dtype}; allowed: {', '.join(_FLOATS)}"
                            )
                        values = np.asarray(opened.get_tensor(name), np.float32)
                        yield rename(name), values
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} cannot be read: {error}") from None


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / _INDEX
    if not index.is_file():
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {_INDEX}; only safetensors are read")
    found = read_json(index)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    files = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not files or any(Path(f).name != f for f in files):
        raise ValueError(f"{index}: weight_map names {files}; allowed: files of this folder")
    return files


def without_copies(
    tensors: Iterator[tuple[str, np.ndarray]], copies: Mapping[str, str], folder: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors without tied copies (copy by original), each of which must equal its original."""
    seen: set[str] = set()
    held: dict[str, np.ndarray] = {}
    for name, values in tensors:
        if name in seen:
            raise ValueError(f"{folder}: tensor {name} is stored twice")
        seen.add(name)
        if name in copies or name in copies.values():
            held[name] = values
        if name not in copies:
            yield name, values
    for copy, original in copies.items():
        if copy in held and original in held and not np.array_equal(held[copy], held[original]):
            tied = "the table" if original.endswith(".weight") else "it"
            raise ValueError(
                f"{folder}: {copy} differs from {original}; allowed is a readout tied to {tied}"
            )


def check_names(
    tensors: Mapping[str, Any],
    wanted: Mapping[str, tuple[int, ...]],
    folder: Path,
    settings: str = "config.json",
) -> None:
    """Raises ValueError with every tensor that is missing, extra or of another shape."""
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    other = [
        f"{name} {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    found = (("missing", missing), ("extra", extra), ("of another shape", other))
    parts = [f"{word}: {', '.join(names)}" for word, names in found if names]
    if parts:
        raise ValueError(f"{folder}: the tensors do not fit {settings}; {'; '.join(parts)}")


def our_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters by their path."""
    # Another machine's kernel need not run here.
    plain = model.clone(kernel="auto") if hasattr(model, "kernel") else model
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(abstract_params(plain), sep="/"))
    return {name: x.shape for name, x in flat.items()}


def our_arrays(model: Any, params: Any) -> dict[str, np.ndarray]:
    """Parameters of a model by their path, on the host.

    Raises:
      ValueError: they are not the arrays of `model`.
    """
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    wanted = our_shapes(model)
    found = {name: tuple(np.shape(x)) for name, x in flat.items()}
    if found != wanted:
        differing = sorted(k for k in found | wanted if found.get(k) != wanted.get(k))
        raise ValueError(f"these parameters are not the model's: {', '.join(differing)}")
    return jax.device_get(flat)


def tokenizer_contents(files: Mapping[str, bytes] | Path | None) -> dict[str, bytes]:
    """Contents by name of the tokeniser's files, given so or as a folder."""
    if isinstance(files, Path):
        if not files.is_dir():
            raise ValueError(f"{files} is no folder of tokenizer files")
        files = {p.name: p.read_bytes() for p in sorted(files.iterdir()) if p.is_file()}
    contents = dict(files or {})
    bad = [name for name in contents if name in _OURS or Path(name).name != name]
    if bad:
        raise ValueError(f"tokenizer files {', '.join(bad)}: allowed are names but {_OURS}")
    return contents


@contextmanager
def appearing(folder: Path | str) -> Iterator[Path]:
    """A folder to fill, which gets its name once the block ends without an error.

    What a killed process left unfinished there is removed.

    Raises:
      ValueError: something is there already, or it cannot be written, as on a full disk.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    handle = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # whoever can have it knows that we are dead
        yield temporary
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (SafetensorError, OSError)):
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{folder} cannot be written ({reason}); nothing is left there"
            ) from error
        raise
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    """Removes the unfinished folders of processes that are gone."""
    form = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)\.tmp")
    for path in folder.parent.iterdir():
        found = form.fullmatch(path.name)
        if found and path.is_dir() and not path.is_symlink() and not _runs(int(found[1])):
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:  # another machine's, at work
                pass
            finally:
                os.close(handle)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return pid != os.getpid()


def fill(
    folder: Path,
    tensors: dict[str, np.ndarray],
    jsons: Mapping[str, Any],
    others: Mapping[str, bytes],
) -> None:
    """Writes weights, JSON files (config.json is one) and other files into a folder."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    texts = {name: dump(content).encode() for name, content in jsons.items()}
    for name, content in (texts | dict(others)).items():
        (folder / name).write_bytes(content)
    shutil.copymode(folder / "config.json", folder / WEIGHTS)  # it comes as 0600


def check_equal(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises ValueError unless what was written gives the same arrays, bit for bit, all finite."""
    for name, values in wanted.items():
        again = found.get(name)
        if again is None or not np.array_equal(values, again, equal_nan=True):
            raise ValueError(
                f"{folder}: the files that were written do not give the model's {name}"
            )
    if bad := [name for name, values in wanted.items() if not np.isfinite(values).all()]:
        raise ValueError(
            f"the model's {', '.join(bad)} are not finite (NaN or infinite): it diverged, and is"
            " not exported"
        )
