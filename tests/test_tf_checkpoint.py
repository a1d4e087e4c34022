# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's checkpoints without TensorFlow: the format, what is damaged."""

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.convert.tf_checkpoint import Checkpoint, crc32c, masked_crc32c

# golden/tf_checkpoint.npz: the index that TensorFlow wrote for a tiny BERT, the first tensors of
# its data file, and from another file of the same weights their names, shapes and two values.
GOLDEN = Path(__file__).parent / "golden" / "tf_checkpoint.npz"
SHARED = Path(__file__).parents[2] / "shared/data/fixtures/golden/bert_tf_tiny"


def slow_crc32c(data):
    """A bit at a time, by the definition."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def as_bytes(data):
    return np.frombuffer(data, np.uint8)


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, value):
    """A field of a protocol buffer; zeros are left out."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b""


def block(rows, interval):
    """Sorted rows as LevelDB writes them: keys share what they begin with, but for every 16th."""
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(rows):
        shared = 0
        if i % interval:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def write_index(path, rows, blocks=1, kind=0):
    """A table of sorted rows in so many data blocks."""
    data, handles = b"", []

    def put(content):
        nonlocal data
        handle = varint(len(data)) + varint(len(content))
        content += bytes([kind])
        data += content + struct.pack("<I", masked_crc32c(as_bytes(content)))
        return handle

    size = -(-len(rows) // blocks)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        last = start + size >= len(rows)
        key = bytes([part[-1][0][0] + 1]) if last else part[-1][0]  # the shortest one that is after
        handles.append((key, put(block(part, 16))))
    footer = put(block([], 16)) + put(block(handles, 1))
    path.write_bytes(data + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57))


def entry(dtype, shape, shard, offset, size, checksum, *, sliced=False):
    dims = b"".join(field(2, field(1, n)) for n in shape)
    numbers = field(3, shard) + field(4, offset) + field(5, size)
    end = bytes([6 << 3 | 5]) + struct.pack("<I", checksum) + (field(7, b"x") if sliced else b"")
    return field(1, dtype) + field(2, dims) + numbers + end


DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}


def write_checkpoint(prefix, tensors, blocks=1, shards=1, header=b"", kind=0):
    """A checkpoint as TensorFlow's Saver writes it."""
    rows = [(b"", field(1, shards) + header + field(3, field(1, 1)))]
    files = [b""] * shards
    for i, (name, values) in enumerate(sorted(tensors.items())):
        raw, shard = np.ascontiguousarray(values).tobytes(), i % shards
        place = (shard, len(files[shard]), len(raw), masked_crc32c(as_bytes(raw)))
        rows.append((name.encode(), entry(DTYPES[str(values.dtype)], values.shape, *place)))
        files[shard] += raw
    write_index(Path(f"{prefix}.index"), rows, blocks, kind)
    for shard, content in enumerate(files):
        Path(f"{prefix}.data-{shard:05}-of-{shards:05}").write_bytes(content)


def examples():
    random = np.random.default_rng(0)
    shapes = {"bert/a": (3, 4), "bert/b": (5,), "cls/c": (), "z": (2, 0)}
    tensors = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return tensors | {"global_step": np.array(1234, np.int64)}


def assert_same(checkpoint, tensors):
    assert sorted(checkpoint) == sorted(tensors)
    for name, values in tensors.items():
        assert checkpoint[name].dtype == values.dtype and checkpoint[name].shape == values.shape
        np.testing.assert_array_equal(checkpoint[name], values)


def test_checksums_of_the_standard():
    # RFC 3720, B.4
    assert crc32c(as_bytes(b"123456789")) == 0xE3069283
    assert crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA
    assert crc32c(np.full(32, 255, np.uint8)) == 0x62A8AB43
    assert crc32c(np.arange(32, dtype=np.uint8)) == 0x46DD794E


@given(st.binary(max_size=70))
def test_checksums_equal_the_definition(data):
    assert crc32c(as_bytes(data)) == slow_crc32c(data)


def test_checksums_over_several_chunks_equal_the_definition(monkeypatch):
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    monkeypatch.setattr("lmjax.convert.tf_checkpoint._CHUNK", 1000)
    for length in (999, 1000, 1001, 5000):
        assert crc32c(data[:length]) == slow_crc32c(data[:length].tobytes())


def test_checksums_are_fast():
    data = np.zeros(20_000_000, np.uint8)
    crc32c(data)
    begun = time.perf_counter()
    crc32c(data)
    assert time.perf_counter() - begun < 2, "400 MB must take seconds"


def test_the_writer_of_these_tests_gives_tensorflows_bytes(tmp_path):
    stored = np.load(GOLDEN)
    (tmp_path / "a.index").write_bytes(stored["index"].tobytes())
    (tmp_path / "a.data-00000-of-00001").write_bytes(bytes(int(stored["size"])))
    entries = Checkpoint(tmp_path / "a").entries
    shapes = {name: list(e.shape) for name, e in entries.items()}
    assert shapes == json.loads(str(stored["shapes"]))
    rows = [(b"", field(1, 1) + field(3, field(1, 1)))]
    for name, e in sorted(entries.items()):
        rows.append((name.encode(), entry(e.dtype, e.shape, e.shard, e.offset, e.size, e.checksum)))
    write_index(tmp_path / "b.index", rows)
    assert (tmp_path / "b.index").read_bytes() == stored["index"].tobytes()


def test_tensorflows_own_bytes_are_read_and_checked(tmp_path):
    stored = np.load(GOLDEN)
    (tmp_path / "a.index").write_bytes(stored["index"].tobytes())
    data = stored["head"].tobytes().ljust(int(stored["size"]), b"\0")
    (tmp_path / "a.data-00000-of-00001").write_bytes(data)
    checkpoint = Checkpoint(tmp_path / "a")
    for part in ("beta", "gamma"):
        found = checkpoint[f"bert/embeddings/LayerNorm/{part}"]
        np.testing.assert_array_equal(found, stored[part])
    with pytest.raises(ValueError, match="the checksum of bert/pooler/dense/bias is another"):
        checkpoint["bert/pooler/dense/bias"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
def test_the_shared_checkpoint_equals_its_weights():
    weights = np.load(SHARED / "weights.npz")
    wanted = {name.replace("|", "/"): weights[name] for name in weights.files}
    assert_same(Checkpoint(SHARED / "bert_model.ckpt"), wanted)


@pytest.mark.parametrize(("blocks", "shards"), [(1, 1), (3, 1), (2, 3)])
def test_blocks_and_shards_are_read(blocks, shards, tmp_path):
    write_checkpoint(tmp_path / "m", examples(), blocks, shards)
    checkpoint = Checkpoint(tmp_path / "m")
    assert_same(checkpoint, examples())
    assert [n for n in checkpoint if not checkpoint.is_float32(n)] == ["global_step"]


def test_what_is_missing_cut_or_of_another_form_is_named(tmp_path):
    prefix = tmp_path / "m"
    with pytest.raises(ValueError, match=r"m\.index: No such file"):
        Checkpoint(prefix)
    write_checkpoint(prefix, examples(), shards=2)
    data = tmp_path / "m.data-00001-of-00002"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="m.data-00001-of-00002 is cut: global_step ends at byte"):
        Checkpoint(prefix)
    data.unlink()
    with pytest.raises(ValueError, match=r"m\.data-00001-of-00002: No such file"):
        Checkpoint(prefix)
    index = tmp_path / "m.index"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(ValueError, match="does not end as the index"):
        Checkpoint(prefix)
    write_checkpoint(prefix, examples(), kind=1)
    with pytest.raises(ValueError, match="compressed with snappy; only plain"):
        Checkpoint(prefix)
    write_checkpoint(prefix, examples(), header=field(2, 1))
    with pytest.raises(ValueError, match="big-endian"):
        Checkpoint(prefix)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (entry(7, (1,), 0, 0, 4, 0), "dtype 7, not a number's"),
        (entry(1, (2,), 0, 0, 4, 0), r"x of shape \[2\] has 4 bytes"),
        (entry(1, (1,), 3, 0, 4, 0), "x is in file 3 of 1"),
        (entry(1, (1,), 0, 0, 4, 0, sliced=True), "x is stored in slices"),
        (entry(1, (1,), 0, 1 << 62, 4, 0), "is cut"),
        (field(1, b"one"), "its entries make no sense"),
        (b"\x0c", "its entries make no sense"),
        (b"\x12\x09", "its entries make no sense"),
    ],
)
def test_entries_that_make_no_sense_are_named(row, said, tmp_path):
    write_index(tmp_path / "m.index", [(b"", field(1, 1)), (b"x", row)])
    (tmp_path / "m.data-00000-of-00001").write_bytes(bytes(4))
    with pytest.raises(ValueError, match=said):
        Checkpoint(tmp_path / "m")["x"]


@settings(deadline=None)
@given(st.data())
def test_a_changed_byte_is_an_error_or_nothing(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("m")
    write_checkpoint(folder / "m", examples(), blocks=2)
    path = folder / data.draw(st.sampled_from(["m.index", "m.data-00000-of-00001"]))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        checkpoint = Checkpoint(folder / "m")
        found = {name: checkpoint[name] for name in checkpoint}
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert path.suffix == ".index" and at >= len(content) - 48, "only the footer has filling"
        assert_same(found, examples())
