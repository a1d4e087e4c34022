# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of arrays: 64 bits a leaf that are equal on every mesh, and tell replicas apart.

With u the bits of an element as an unsigned word and p, q two numbers of its place,

    lane 0 = Σ mix(u ⊕ A p) mod 2³²        lane 1 = Σ mix(B u + C q) mod 2³²

Integer sums have no order, so the value does not depend on how an array is split. Each device adds
up its own shard and nothing is sent; what the shards give is added on the host. `mix` (the end of
MurmurHash3) is a bijection, so one changed element is always seen; other damage is missed with
probability 2⁻⁶⁴. This finds accidents, not attackers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmjax.sharding import path_of

_A, _B, _C, _STRIDE = 0x9E3779B1, 0x27D4EB2F, 0x165667B1, 0x85EBCA77


@dataclass(frozen=True)
class Shards:
    """The lanes of every shard of every leaf.

    Args:
      names: path of each leaf.
      lanes: uint32 (leaves, devices, 2).
      groups: for each leaf, the places in `devices` of those that hold the same shard, together.
      devices: in the order of `lanes`.
    """

    names: tuple[str, ...]
    lanes: np.ndarray
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    devices: tuple[Any, ...]

    def fingerprints(self) -> dict[str, str]:
        """16 hexadecimal digits a leaf, by path."""
        found = {}
        for name, lanes, groups in zip(self.names, self.lanes, self.groups, strict=True):
            firsts = [group[0] for group in groups]
            low, high = lanes[firsts].sum(axis=0, dtype=np.uint64) & np.uint64(0xFFFFFFFF)
            found[name] = f"{int(low):08x}{int(high):08x}"
        return found

    def odd_replicas(self) -> list[tuple[str, Any]]:
        """(path, device) of each replica that differs from most of the others.

        Where no value has more holders than the others, all holders are named.
        """
        odd = []
        for name, lanes, groups in zip(self.names, self.lanes, self.groups, strict=True):
            for group in groups:
                values = [tuple(lanes[i].tolist()) for i in group]
                counts = {v: values.count(v) for v in values}
                most = [v for v, n in counts.items() if n == max(counts.values())]
                if len(counts) > 1:
                    right = most[0] if len(most) == 1 else None
                    odd += [
                        (name, self.devices[i])
                        for i, v in zip(group, values, strict=True)
                        if v != right
                    ]
        return odd

    def differences(self, other: "Shards") -> list[tuple[str, Any]]:
        """(path, device) of each shard that is another one in `other`, a tree of the same form."""
        assert (self.names, self.devices) == (other.names, other.devices)
        unequal = (self.lanes != other.lanes).any(axis=-1)
        return [(self.names[i], self.devices[j]) for i, j in zip(*unequal.nonzero(), strict=True)]


def fingerprints(tree: Any) -> dict[str, str]:
    """16 hexadecimal digits for each array of a tree, by path; the same on every process."""
    return shards(tree).fingerprints()


def shards(tree: Any) -> Shards:
    """The lanes of every shard: one pass over the arrays where they are; waits for the result.

    The arrays may be of any dtype, all on the same devices. Sign of zero and payloads of NaN count.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = tuple(path_of(path) for path, _ in leaves)
    arrays = [_plain(x) for _, x in leaves]
    if not arrays:
        return Shards((), np.zeros((0, 1, 2), np.uint32), (), (None,))
    mesh = _mesh(arrays)
    if mesh is None:
        devices = tuple(arrays[0].devices())
        parts = [_of_one_device(x) for x in arrays]
    else:
        devices = tuple(mesh.devices.flat)
        with jax.set_mesh(mesh):
            parts = [_of_each_device(mesh, _spec(x))(x) for x in arrays]
            if jax.process_count() > 1:
                parts = _whole(mesh)(parts)
    groups = tuple(_groups(x, devices) for x in arrays)
    return Shards(names, np.stack(jax.device_get(parts)), groups, devices)


def _plain(x: Any) -> jax.Array:
    """An array on devices, of numbers; keys are numbers as well."""
    if not isinstance(x, jax.Array):
        x = jax.device_put(x)
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _mesh(arrays: Sequence[jax.Array]) -> Mesh | None:
    """The mesh that the arrays rest on; None where it is one device."""
    if len(arrays[0].devices()) == 1:
        return None
    sharding: Any = arrays[0].sharding
    return sharding.mesh


def _spec(x: jax.Array) -> P:
    placing: Any = x.sharding
    return placing.spec


def _groups(x: jax.Array, devices: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    places = {device: i for i, device in enumerate(devices)}
    found: dict[Any, list[int]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        key = tuple((s.start, s.stop) for s in index)
        found.setdefault(key, []).append(places[device])
    return tuple(tuple(sorted(group)) for group in found.values())


@jax.jit
def _of_one_device(x: jax.Array) -> jax.Array:
    """Lanes (1, 2)."""
    return _lanes(x, P(), {})[None]


@cache
def _of_each_device(mesh: Mesh, spec: P) -> Any:
    """An array with this sharding to lanes (devices, 2), a row on each device."""

    def local(x: jax.Array) -> jax.Array:
        return _lanes(x, spec, mesh.shape)[None]

    rows = P(mesh.axis_names)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=rows, check_vma=False))


@cache
def _whole(mesh: Mesh) -> Any:
    return jax.jit(lambda parts: parts, out_shardings=NamedSharding(mesh, P()))


def _lanes(x: jax.Array, spec: P, axis_sizes: Mapping[str, int]) -> jax.Array:
    """Both sums over this device's shard, uint32 (2,)."""
    words = _words(x)
    linear, strided = jnp.zeros((), jnp.uint32), jnp.zeros((), jnp.uint32)
    for dim, size in enumerate(words.shape):
        axes = spec[dim] if dim < len(spec) else None
        parts, place = 1, jnp.uint32(0)
        if axes is not None:
            names = axes if isinstance(axes, tuple) else (axes,)
            parts = math.prod(axis_sizes[a] for a in names)
            place = jax.lax.axis_index(names).astype(jnp.uint32)
        shape = [1] * words.ndim
        shape[dim] = size
        index = (place * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32)).reshape(shape)
        linear = linear * jnp.uint32(size * parts & 0xFFFFFFFF) + index
        strided = (strided + index) * jnp.uint32(_STRIDE)
    low = _mix(words ^ (linear * jnp.uint32(_A)))
    high = _mix(words * jnp.uint32(_B) + strided * jnp.uint32(_C))
    # One reduction of both: two would read the array twice, on CPUs at a fifteenth of the speed.
    zero, dims = jnp.uint32(0), tuple(range(words.ndim))
    return jnp.stack(
        jax.lax.reduce((low, high), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), dims)
    )


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32; 64 bits are two words along a last dimension."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(jnp.stack([x.real, x.imag], axis=-1))
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
