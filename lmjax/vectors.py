# SPDX-License-Identifier: Apache-2.0
"""Files of vectors, written text by text: JSON lines, HDF5, or a .npz that is laid out as it grows.

Shapes: D width, T vectors of one text, K layers.
"""

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

FORMATS = (".npz", ".jsonl", ".hdf5")


@dataclass(frozen=True)
class Vectors:
    """Of one text: its place among the texts, its vectors (T, D) float32, and what each is of.

    Of several layers, each vector is (K, D), and they are (T, K, D).
    """

    number: int
    text: str
    vectors_TD: np.ndarray
    pieces: list[str]


Write = Callable[[Vectors], None]


@contextlib.contextmanager
def writer(target: Path | None, single: bool) -> Iterator[Write]:
    """What writes each text's vectors; the file appears whole when the block ends well, or not.

    .jsonl: an object a text: number, text and `vector`, or `pieces` and `vectors`. .npz: `vectors`
    (all of them, D), `texts`, and unless `single`, `pieces` and `starts` (texts + 1): text i has
    vectors[starts[i] : starts[i + 1]]. .hdf5: as bilm-tf and AllenNLP have it, a dataset for text i
    named "i", (T, D), of several layers (K, T, D), or if `single` (D,); `sentence_to_index` holds
    a JSON object from texts to these names.

    Raises:
      ValueError: a target of another kind.
    """
    if target is None:
        yield lambda found: print(_line(found, single))
        return
    if target.suffix not in FORMATS:
        raise ValueError(f"--to={target}: a file that ends in {', '.join(FORMATS)}")
    if not target.parent.is_dir():
        raise ValueError(f"--to={target}: there is no folder {target.parent}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.suffix == ".jsonl":
            with open(temporary, "x", encoding="utf-8") as file:
                yield lambda found: print(_line(found, single), file=file)
        else:
            kind = _Npz if target.suffix == ".npz" else _Hdf5
            with kind(temporary, single) as archive:
                yield archive.add
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _line(found: Vectors, single: bool) -> str:
    content: dict[str, Any] = {"number": found.number, "text": found.text}
    if single:
        content["vector"] = found.vectors_TD[0].tolist()
    else:
        content |= {"pieces": found.pieces, "vectors": found.vectors_TD.tolist()}
    return json.dumps(content, ensure_ascii=False)


class _Npz:
    """A .npz whose vectors wait in a file beside it, so that none have to fit into memory."""

    def __init__(self, path: Path, single: bool) -> None:
        self._path, self._single = path, single
        self._texts: list[str] = []
        self._pieces: list[str] = []
        self._starts, self._shape = [0], (0,)

    def __enter__(self) -> "_Npz":
        self._raw_path = self._path.with_suffix(".raw")
        self._raw: IO[bytes] = open(self._raw_path, "xb")  # noqa: SIM115
        return self

    def add(self, found: Vectors) -> None:
        """Appends one text."""
        vectors_TD = np.ascontiguousarray(found.vectors_TD, "<f4")
        self._raw.write(vectors_TD.tobytes())
        self._texts.append(found.text)
        self._pieces += found.pieces
        self._starts.append(self._starts[-1] + len(vectors_TD))
        self._shape = vectors_TD.shape[1:]

    def __exit__(self, kind: Any, *_: object) -> None:
        self._raw.close()
        try:
            if kind is None:
                self._finish()
        finally:
            self._raw_path.unlink()

    def _finish(self) -> None:
        arrays = {"texts": np.array(self._texts, np.str_)}
        if not self._single:
            arrays |= {
                "pieces": np.array(self._pieces, np.str_),
                "starts": np.array(self._starts, np.int64),
            }
        shape = (self._starts[-1], *self._shape)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(self._path, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("vectors.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, header)
                with open(self._raw_path, "rb") as raw:
                    shutil.copyfileobj(raw, file, 1 << 20)
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)


class _Hdf5:
    """A file with a dataset a text."""

    def __init__(self, path: Path, single: bool) -> None:
        self._path, self._single = path, single
        self._names: dict[str, str] = {}

    def __enter__(self) -> "_Hdf5":
        self._file = h5py.File(self._path, "x")
        return self

    def add(self, found: Vectors) -> None:
        """Appends one text."""
        vectors = np.asarray(found.vectors_TD, "<f4")
        vectors = vectors[0] if self._single else vectors
        layers_first = np.moveaxis(vectors, 1, 0) if vectors.ndim == 3 else vectors
        self._file.create_dataset(str(found.number), data=np.ascontiguousarray(layers_first))
        self._names[found.text] = str(found.number)

    def __exit__(self, kind: Any, *_: object) -> None:
        with self._file as file:
            if kind is None:
                names = json.dumps(self._names, ensure_ascii=False)
                text = h5py.string_dtype("utf-8")
                file.create_dataset("sentence_to_index", (1,), text, data=[names])


def lines_of(path: Path) -> Iterator[str]:
    """The texts of a file, one a line; blank lines are left out.

    Raises:
      ValueError: no such file, or a line that is not UTF-8; names both.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}:{number}: not valid UTF-8 ({error.reason})") from None
                if text:
                    yield text
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
