# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: equal on every mesh, equal to plain integers, different after any damage."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmjax import sharding
from lmjax.fingerprint import fingerprints, shards
from lmjax.sharding import Layout
from lmjax.step import State, placed

MESHES = {"1x1x1": Layout(1, 1, 1), "8x1x1": Layout(8, 1, 1), "2x2x2": Layout(2, 2, 2)}
_32 = 1 << 32


def mix(h: int) -> int:
    h = (h ^ h >> 16) * 0x85EBCA6B % _32
    h = (h ^ h >> 13) * 0xC2B2AE35 % _32
    return h ^ h >> 16


def reference(x: np.ndarray) -> str:
    """The same by Python's integers, an element at a time, from the bytes."""
    raw, size = np.ascontiguousarray(x).tobytes(), x.dtype.itemsize
    word, each = min(size, 4), max(size // 4, 1)
    shape = (*x.shape, *([each] if size == 8 else []))
    low = high = 0
    for number, place in enumerate(itertools.product(*map(range, shape))):
        u = int.from_bytes(raw[number * word : (number + 1) * word], "little")
        strided = 0
        for index in place:
            strided = (strided + index) * 0x85EBCA77 % _32
        low += mix(u ^ number * 0x9E3779B1 % _32)
        high += mix((u * 0x27D4EB2F + strided * 0x165667B1) % _32)
    return f"{low % _32:08x}{high % _32:08x}"


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    odd = random.normal(size=(3, 5)).astype(np.float32)
    odd.flat[:4] = (np.nan, -0.0, 1e-42, -np.inf)
    return {
        "float32": odd,
        "bfloat16": random.normal(size=(7, 2, 3)).astype(ml_dtypes.bfloat16),
        "float16": random.normal(size=9).astype(np.float16),
        "float8": random.normal(size=(4, 4)).astype(ml_dtypes.float8_e4m3fn),
        "int32": random.integers(-(2**31), 2**31, (2, 4), np.int32),
        "int8": random.integers(-128, 128, 12, np.int8),
        "uint16": random.integers(0, 2**16, (2, 2), np.uint16),
        "bool": random.integers(0, 2, (3, 3)).astype(bool),
        "complex64": random.normal(size=(3, 4)).astype(np.float32).view(np.complex64),
        "scalar": np.float32(0.5),
        "step": np.int32(77),
        "empty": np.zeros((0, 3), np.float32),
    }


def test_every_dtype_has_the_value_of_plain_integers():
    found = fingerprints({k: jnp.asarray(v) for k, v in arrays().items()})
    assert found == {k: reference(v) for k, v in arrays().items()}
    assert len(set(found.values())) == len(found)


def test_64_bits_are_two_words():
    with jax.enable_x64(True):
        x = np.array([1.0, -2.0, 1e300])
        assert fingerprints({"x": jnp.asarray(x)}) == {"x": reference(x)}


def test_keys_are_their_numbers():
    key = jax.random.key(5)
    wanted = reference(np.asarray(jax.random.key_data(key)))
    assert fingerprints({"key": key}) == {"key": wanted}
    assert fingerprints({"key": jax.random.key(6)}) != {"key": wanted}


SHAPES = {
    "embedding": (16, 8),
    "blocks": {"qkv": {"kernel": (2, 8, 3, 8)}, "up": {"bias": (2, 16)}},
    "norm": {"scale": (8,)},
}


def state() -> State:
    """Sharded over every axis, with carried rows, at step 5."""

    def build() -> State:
        is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
        params = jax.tree.map(lambda s: jnp.zeros(s, jnp.float32), SHAPES, **is_shape)
        return State(jnp.int32(0), params, (), {"hidden": jnp.zeros((8, 4))})

    def draw(x):
        random = np.random.default_rng(x.size)
        return jax.device_put(random.normal(size=x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(draw, placed(jax.eval_shape(build)))


@pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES.keys())
def test_the_mesh_does_not_matter(layout: Layout):
    size = layout.data * layout.fsdp * layout.tensor
    with sharding.use(layout.mesh(jax.devices()[:size])):
        here = state()
        host = jax.tree_util.tree_leaves_with_path(jax.device_get(here))
        wanted = {sharding.path_of(path): reference(x) for path, x in host}
        assert fingerprints(here) == wanted and "carry/hidden" in wanted
        assert shards(here).odd_replicas() == []


def test_bits_that_compare_equal_or_not_at_all_count():
    nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    pairs = [(np.float32(0.0), np.float32(-0.0)), (nan[0], nan[1])]
    for one, other in pairs:
        assert fingerprints({"x": jnp.full(3, one)}) != fingerprints({"x": jnp.full(3, other)})


def test_a_nan_keeps_its_payload_on_the_way():
    bits = np.array([0x7FA00001, 0xFFC12345], np.uint32)
    assert fingerprints({"x": jnp.asarray(bits.view(np.float32))}) == {"x": reference(bits)}


def tamper(x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Words (N, M) with one thing wrong that a disk, a network or a chip may do."""
    y, (rows, columns) = x.copy(), x.shape
    kind, row, column = random.integers(5), random.integers(rows), random.integers(columns)
    if kind == 0:  # one bit
        y[row, column] ^= np.uint32(1 << random.integers(32))
    elif kind == 1:  # two rows changed places
        other = (row + random.integers(1, rows)) % rows
        y[[row, other]] = y[[other, row]]
    elif kind == 2:  # a run of zeros
        y.reshape(-1)[row * columns + column :][: random.integers(1, 99)] = 0
    elif kind == 3:  # shifted by an element
        y = np.roll(y.reshape(-1), 1).reshape(y.shape)
    else:  # signs
        y[row] ^= np.uint32(1 << 31)
    return y


def test_none_of_2000_tamperings_is_missed():
    random = np.random.default_rng(1)
    x = random.normal(size=(24, 16)).astype(np.float32).view(np.uint32)
    damaged = [tamper(x, random) for _ in range(2000)]
    batch = {f"{i}": jnp.asarray(y.view(np.float32)) for i, y in enumerate(damaged)}
    good = reference(x)
    assert sum(np.array_equal(x, y) for y in damaged) == 0
    assert [name for name, value in fingerprints(batch).items() if value == good] == []


def replicas(layout: Layout, spec: P, flipped: int | None, bit: int = 3):
    """A float32 array (8, 6) on eight devices; one bit of device `flipped`'s part is another."""
    mesh = layout.mesh()
    placing = NamedSharding(mesh, spec)
    whole = np.random.default_rng(2).normal(size=(8, 6)).astype(np.float32)
    parts = []
    for device, index in placing.addressable_devices_indices_map(whole.shape).items():
        part = whole[index].copy()
        if device.id == flipped:
            part.view(np.uint32).reshape(-1)[-1] ^= np.uint32(1 << bit)
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(whole.shape, placing, parts)


@pytest.mark.parametrize("layout", [Layout(8, 1, 1), Layout(4, 2, 1)], ids=["8x1x1", "4x2x1"])
@pytest.mark.parametrize("bit", [0, 31])
def test_one_flipped_bit_of_a_replica_names_its_device(layout: Layout, bit: int):
    spec = P(None, "fsdp") if layout.fsdp > 1 else P()
    for flipped in (0, 5):
        found = shards({"w": replicas(layout, spec, flipped, bit)})
        assert [(name, d.id) for name, d in found.odd_replicas()] == [("w", flipped)]
        clean = shards({"w": replicas(layout, spec, None)})
        assert clean.odd_replicas() == []
        assert [(name, d.id) for name, d in found.differences(clean)] == [("w", flipped)]


def test_of_two_replicas_that_differ_both_are_named():
    x = replicas(Layout(2, 4, 1), P("fsdp"), 3)
    odd = {d.id for _, d in shards({"w": x}).odd_replicas()}
    assert 3 in odd and len(odd) == 2


def test_a_tree_without_arrays_has_none():
    assert fingerprints({"a": {}, "b": None}) == {}
