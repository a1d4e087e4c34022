# SPDX-License-Identifier: Apache-2.0
"""Arrays from an HDF5 file of somebody else's: plain float32 datasets in plain groups, no more.

The format can do much that weights never need and that must not happen by opening a file: links
into other files, values that lie outside, filters that are libraries to be loaded. What is read
here has none of these, and every shape is known to be right before a value is read.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

_DEEPEST, _MOST = 8, 10_000
_FLOATS = (h5py.h5t.IEEE_F32LE, h5py.h5t.IEEE_F32BE)
# What the library raises for a file that is no longer what its structures say.
_DAMAGE = (OSError, LookupError, RuntimeError, TypeError, ValueError, MemoryError)
# Filters that come with the library: deflate, shuffle, Fletcher's checksum.
_FILTERS = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)


class Refused(ValueError):
    """A file that the library reads and we do not."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[dict[str, h5py.Dataset]]:
    """The datasets of a file by their path in it; their values are read by `values`.

    Raises:
      ValueError: the file cannot be read, or holds what is no float32 dataset of its own.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(h5py.File(path, "r"))
            found = dict(_datasets(file, "", path, set()))
        except Refused:
            raise
        except _DAMAGE as error:
            raise ValueError(f"{path} cannot be read as HDF5: {error}") from None
        yield found


def values(datasets: Mapping[str, h5py.Dataset], path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 values) of datasets whose shapes are known to be right.

    Raises:
      ValueError: one that was never written, or holds what is no finite number.
    """
    for name, dataset in datasets.items():
        try:
            found = np.asarray(dataset[()], np.float32)
        except _DAMAGE as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}") from None
        if dataset.id.get_storage_size() < _smallest(dataset):
            raise ValueError(f"{path}: {name} has no values; was the file written to its end?")
        if not np.isfinite(found).all():
            raise ValueError(f"{path}: {name} holds a NaN or an infinity; allowed are numbers")
        yield name, found


def _smallest(dataset: h5py.Dataset) -> int:
    """Bytes that the values take in the file at least; 0 if that is for a filter to say."""
    size = math.prod(dataset.shape)
    return size * 4 if dataset.chunks is None else min(size, 1)


def _datasets(
    group: h5py.Group, prefix: str, path: Path, seen: set[Any]
) -> Iterator[tuple[str, h5py.Dataset]]:
    for key in map(str, group):
        name = prefix + key
        link = group.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            kind = type(link).__name__
            raise Refused(f"{path}: {name} is a {kind}; allowed are values in the file itself")
        found = group[key]
        if found in seen or len(seen) >= _MOST or name.count("/") >= _DEEPEST:
            raise Refused(f"{path}: {name} is stored twice, or one of too many or too deep")
        seen.add(found)
        if isinstance(found, h5py.Group):
            yield from _datasets(found, name + "/", path, seen)
        elif isinstance(found, h5py.Dataset):
            _check(found, name, path)
            yield name, found
        else:
            raise Refused(f"{path}: {name} is a {type(found).__name__}; allowed are datasets")


def _check(found: h5py.Dataset, name: str, path: Path) -> None:
    """Raises ValueError unless the values are float32 and all in the file."""
    if found.external or found.is_virtual:
        raise Refused(f"{path}: {name} lies in other files; allowed are values in the file")
    kind = found.id.get_type()
    if not any(kind.equal(known) for known in _FLOATS):
        raise Refused(f"{path}: {name} is {found.dtype}; allowed: float32")
    if found.shape is None:
        raise Refused(f"{path}: {name} has no shape; allowed are arrays")
    settings = found.id.get_create_plist()
    filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    if not set(filters) <= set(_FILTERS):
        raise Refused(f"{path}: {name} has filters {filters}; allowed are gzip and checksums")


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes float32 datasets, their groups made as needed."""
    with h5py.File(path, "x") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=np.ascontiguousarray(array, np.float32))
