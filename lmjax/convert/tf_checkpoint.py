# SPDX-License-Identifier: Apache-2.0
"""Reads TensorFlow checkpoints (PREFIX.index and PREFIX.data-00000-of-00001) without TensorFlow.

The index is a table of LevelDB's format: blocks of sorted entries, each followed by its kind and
checksum, and a footer that says where the block that lists the blocks is. Its entry "" describes
the checkpoint, every other one a tensor: dtype, shape, data file, place, checksum. These are
protocol buffers of a few numbers. Every byte that is returned has been checked.
"""

import struct
from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_TRAILER = 5  # kind and checksum after each block
_KINDS = {0: "plain", 1: "compressed with snappy"}
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
_CHUNK = 1 << 22


class Entry(NamedTuple):
    """Where one tensor lies. dtype: TensorFlow's number of it."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    sliced: bool


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by name, each read and checked when it is asked for."""

    def __init__(self, prefix: Path | str) -> None:
        """Reads the index and compares the sizes of the data files with it.

        Raises:
          ValueError: a file is missing, cut or damaged, or of a form that is not read.
        """
        self.index = Path(f"{prefix}.index")
        entries = dict(_table(self.index))
        try:
            header = _fields(entries.pop(b""))
            self._shards = _integer(header, 1)
            big = _integer(header, 2)
            self.entries = {name.decode(): _entry(value) for name, value in entries.items()}
        except (KeyError, IndexError, UnicodeDecodeError, struct.error, TypeError):
            _damaged(self.index, "its entries make no sense")
        if big:
            raise ValueError(f"{self.index}: written on a big-endian machine; only little is read")
        sizes = [self._size(shard) for shard in range(self._shards)]
        for name, entry in self.entries.items():
            if entry.shard >= len(sizes):
                _damaged(self.index, f"{name} is in file {entry.shard} of {len(sizes)}")
            if entry.offset + entry.size > sizes[entry.shard]:
                raise ValueError(
                    f"{self._file(entry.shard)} is cut: {name} ends at byte"
                    f" {entry.offset + entry.size:,}, the file at {sizes[entry.shard]:,}"
                )

    def __getitem__(self, name: str) -> np.ndarray:
        """One tensor. Raises ValueError for a dtype that is not read, or a wrong checksum."""
        entry = self.entries[name]
        path = self._file(entry.shard)
        if entry.sliced:
            raise ValueError(f"{self.index}: {name} is stored in slices, which are not read")
        if entry.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} has TensorFlow's dtype {entry.dtype}, not a number's")
        dtype = np.dtype(_DTYPES[entry.dtype])
        if prod(entry.shape) * dtype.itemsize != entry.size:
            _damaged(self.index, f"{name} of shape {list(entry.shape)} has {entry.size:,} bytes")
        values = np.fromfile(path, np.uint8, entry.size, offset=entry.offset)
        if len(values) != entry.size or masked_crc32c(values) != entry.checksum:
            _damaged(path, f"the checksum of {name} is another")
        return values.view(dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def is_float32(self, name: str) -> bool:
        """Whether a tensor is of float32, as weights are; counters of steps are not."""
        return self.entries[name].dtype == 1

    def _file(self, shard: int) -> Path:
        prefix = str(self.index).removesuffix(".index")
        return Path(f"{prefix}.data-{shard:05}-of-{self._shards:05}")

    def _size(self, shard: int) -> int:
        try:
            return self._file(shard).stat().st_size
        except OSError as error:
            raise ValueError(f"{self._file(shard)}: {error.strerror}") from None


def _damaged(path: Path, why: str) -> NoReturn:
    raise ValueError(f"{path} is damaged: {why}")


def _table(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of every entry of a LevelDB table, in order."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if len(data) < _FOOTER or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        _damaged(path, "it does not end as the index of a TensorFlow checkpoint does")
    try:
        about, at = _handle(data[-_FOOTER:], 0)
        place, _ = _handle(data[-_FOOTER:], at)
        list(_block(data, about, path))  # filters and the like; empty, but its checksum counts
        for _, value in _block(data, place, path):
            yield from _block(data, _handle(value, 0)[0], path)
    except (IndexError, struct.error):
        _damaged(path, "its blocks make no sense")


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """(offset, size) of a block, and where it ends in `data`."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: bytes, place: tuple[int, int], path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Entries of one block: each key says how much of the last one it begins with."""
    start, size = place
    end = start + size
    if end + _TRAILER > len(data):
        _damaged(path, f"a block ends at byte {end + _TRAILER:,}, the file at {len(data):,}")
    kind, checksum = struct.unpack("<BI", data[end : end + _TRAILER])
    if masked_crc32c(np.frombuffer(data[start : end + 1], np.uint8)) != checksum:
        _damaged(path, f"the checksum of the block at byte {start:,} is another")
    if kind != 0:
        raise ValueError(
            f"{path}: a block is {_KINDS.get(kind, f'of kind {kind}')}; only plain ones are read"
        )
    block = data[start:end]
    (restarts,) = struct.unpack("<I", block[-4:])
    key, at, limit = b"", 0, len(block) - 4 - 4 * restarts
    while at < limit:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + own + length > limit:
            raise IndexError
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, low ones first, and where it ends."""
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """The fields of a protocol buffer by number: integers, or the bytes of messages."""
    found: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _varint(message, at)
        elif tag & 7 == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif tag & 7 == 5:
            value, at = struct.unpack("<I", message[at : at + 4])[0], at + 4
        else:
            raise IndexError
        if at > len(message):
            raise IndexError
        found.setdefault(tag >> 3, []).append(value)
    return found


def _integer(fields: dict[int, list[int | bytes]], number: int) -> int:
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise TypeError
    return value


def _entry(message: bytes) -> Entry:
    fields = _fields(message)
    shape = _fields(fields[2][-1]) if 2 in fields else {}  # type: ignore[arg-type]
    dims = tuple(_integer(_fields(dim), 1) for dim in shape.get(2, []))  # type: ignore[arg-type]
    dtype, shard, offset, size, checksum = (_integer(fields, n) for n in (1, 3, 4, 5, 6))
    return Entry(dtype, dims, shard, offset, size, checksum, 7 in fields)


def masked_crc32c(data: np.ndarray) -> int:
    """LevelDB's form of a checksum: rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: np.ndarray) -> int:
    """CRC-32C of bytes (uint8), about 1 GB in some seconds.

    The register after a text is linear in its bits. So all 4-byte words are taken at once, and
    neighbours are joined: the left one, advanced by the length of the right one, plus (exclusive
    or) the right one.
    """
    state = 0xFFFFFFFF
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        levels = max(2, (len(chunk) - 1).bit_length())
        words = np.zeros(1 << levels - 2, "<u4")  # zeros in front leave a register of zero
        words.view(np.uint8)[(1 << levels) - len(chunk) :] = chunk
        for level in range(2, levels):
            words = _apply(_advance(level), words[0::2]) ^ words[1::2]
        state = _shift(state, len(chunk)) ^ int(_apply(_advance(2), words)[0])
    return state ^ 0xFFFFFFFF


def _shift(state: int, count: int) -> int:
    """A register after `count` bytes of zero."""
    register = np.array([state], np.uint32)
    for level in range(count.bit_length()):
        if count >> level & 1:
            register = _apply(_advance(level), register)
    return int(register[0])


def _apply(table: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """A linear map of 32 bits, tabulated by byte (4, 256), of many registers."""
    low, high = registers & 0xFFFF, registers >> 16
    return table[0][low & 255] ^ table[1][low >> 8] ^ table[2][high & 255] ^ table[3][high >> 8]


@cache
def _advance(level: int) -> np.ndarray:
    """The map of a register through 2**level bytes of zero, tabulated by byte (4, 256)."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if level:
        images = _apply(_advance(level - 1), _apply(_advance(level - 1), bits))
    else:
        images = bits
        for _ in range(8):
            images = (images >> 1) ^ np.where(images & 1, np.uint32(0x82F63B78), np.uint32(0))
    chosen = np.arange(256)[:, None] >> np.arange(8) & 1
    parts = images.reshape(4, 1, 8) * chosen[None].astype(np.uint32)
    return np.bitwise_xor.reduce(parts, axis=2)
