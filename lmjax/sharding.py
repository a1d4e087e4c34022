# SPDX-License-Identifier: Apache-2.0
"""The mesh and the rules: the only file that names mesh axes.

`data` splits the batch, `fsdp` splits the batch and the parameters, `tensor` splits heads, the
MLP's inner width and the vocabulary, `sequence` the tokens of each row. Parameters rest sharded as
RULES says; a layer asks `for_compute` for its weights, which casts them first and gathers them over
`fsdp` second, so that what travels is the compute dtype. The compiler's own choice for narrow
models is thousands of small permutes, which is why the gather is explicit. Vectors, which no rule
splits over `fsdp`, rest split as well where it divides them, and a step gathers them once.

Over `sequence`, activations (B, L, D) are split on L, and only attention puts keys and values
together again. Parameters rest whole on it, so a long context takes `fsdp` beside it where they are
large; batches of token ids are small, and come whole, too.
"""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA, FSDP, TENSOR, SEQUENCE = AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = (DATA, FSDP)
TOKEN_AXES = (*BATCH_AXES, SEQUENCE)
TOKENS = P(BATCH_AXES, SEQUENCE)  # of (B, L, ...)
COPIES = (DATA, SEQUENCE)  # each device of these makes a gradient of all that fsdp gathered

# (parameter path, how its last dimensions are split). Leading ones (stacked layers) are whole.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding$", (TENSOR, FSDP)),
    (r"(positions|types)$", (None, FSDP)),
    (r"qkv/kernel$", (FSDP, None, TENSOR)),  # whole heads, by `check_even` of attention
    (r"qkv/bias$", (None, TENSOR)),
    (r"attention/out/kernel$", (TENSOR, FSDP)),
    (r"up/kernel$", (FSDP, TENSOR)),
    (r"up/bias$", (TENSOR,)),
    (r"down/kernel$", (TENSOR, FSDP)),
    # Of ELMo: cells are split like heads, and characters are few.
    (r"(input|recurrent)/kernel$", (FSDP, None, TENSOR)),
    (r"layer_\d+/out/kernel$", (TENSOR, FSDP)),
    (r"layer_\d+/bias$", (None, TENSOR)),
    (r"characters/(table|conv_\d+/kernel)$", (None, None)),
    (r"characters/.*kernel$", (FSDP, None)),
    (r"(project|pooler|transform|dense)/kernel$", (FSDP, TENSOR)),
    (r"(pair|sequence|token|replaced)/kernel$", (FSDP, None)),  # a class is a column
    (r"output_bias$", (TENSOR,)),
    (r"bias$", (None,)),
    (r"(norm\w*/scale|mix/weights)$", (None,)),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shape of the device mesh; -1 stands for all devices that the other axes leave.

    Args:
      data: parts of the batch, each with a copy of the parameters; the only axis across slices.
      fsdp: parts of the batch that share one copy of the parameters.
      tensor: parts of heads, inner widths and the vocabulary.
      sequence: parts of each row's tokens, for contexts too long for one device.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def sizes(self, devices: int) -> list[int]:
        """Of the axes, -1 in numbers where the others divide so many devices."""
        sizes = [getattr(self, axis) for axis in AXES]
        known = math.prod(n for n in sizes if n != -1)
        if -1 in sizes and known and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
        return sizes

    def mesh(self, devices: Any = None) -> Mesh:
        """The mesh over `devices` (default: all).

        Raises:
          ValueError: the product of the axes is not the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        given = [getattr(self, axis) for axis in AXES]
        if given.count(-1) > 1 or any(n < 1 and n != -1 for n in given):
            raise ValueError(f"mesh {given}: sizes are at least 1, and one of them may be -1")
        shape = self.sizes(len(devices))
        if math.prod(shape) != len(devices):
            named = "×".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True))
            raise ValueError(
                f"mesh {named} does not fit {len(devices)} devices: the product of --mesh.data, "
                "--mesh.fsdp, --mesh.tensor and --mesh.sequence must be that number (-1: the rest)"
            )
        return Mesh(_placed(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _placed(shape: list[int], devices: list[Any]) -> Any:
    """Devices in an array of the mesh's shape; slices, which a slow network joins, split `data`.

    Neighbours on an axis are neighbours in the torus; an axis may be a part of a torus axis
    (data=8 × tensor=2 on 4×4), which `jax.make_mesh` refuses.
    """
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ValueError(
            f"mesh.data={shape[0]} does not divide among {slices} slices of TPUs, which only that"
            f" axis may cross; make --mesh.data a multiple of {slices}"
        )
    inside, across = [shape[0] // slices, *shape[1:]], [slices, *[1] * (len(shape) - 1)]
    return create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


_current: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `mesh` the one that models, losses and attention are traced for."""
    token = _current.set(mesh)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _current.reset(token)


def mesh() -> Mesh | None:
    """The mesh in use, or None outside `use` (a plain single-device call)."""
    return _current.get()


def platform() -> str:
    """Platform that is compiled for: that of the mesh, which need not be that of this machine."""
    here = mesh()
    return jax.default_backend() if here is None else here.devices.flat[0].platform


def axis_size(*axes: str) -> int:
    """Product of the sizes of mesh axes; 1 outside `use`."""
    here = mesh()
    return 1 if here is None else math.prod(here.shape[a] for a in axes)


def path_of(key_path: tuple[Any, ...]) -> str:
    """`blocks/attention/qkv/kernel` for a key path of `jax.tree_util`."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path
    )


def spec(path: str, shape: tuple[int, ...]) -> P:
    """How the parameter at `path` lies on the mesh when a step begins to compute.

    Raises:
      ValueError: no rule covers the path, or an axis does not divide its dimension.
    """
    if not shape:
        return P()
    if path.startswith("carry/"):  # rows of the batch
        _check_even(path, shape[:1], (BATCH_AXES,))
        return P(BATCH_AXES)
    for pattern, axes in RULES:
        if re.search(pattern, path):
            full = (None,) * (len(shape) - len(axes)) + axes
            _check_even(path, shape, full)
            return P(*full)
    raise ValueError(f"no sharding rule covers parameter {path} of shape {shape}")


def _check_even(path: str, shape: tuple[int, ...], axes: tuple[Any, ...]) -> None:
    for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        check_even(path, f"dimension {dim}", size, *_names(axis))


def check_even(where: str, what: str, size: int, *axes: str) -> None:
    """Raises ValueError if `axes` together do not divide the size of something."""
    if size % axis_size(*axes):
        raise ValueError(
            f"{where}: {what} has size {size}, which mesh axis {' × '.join(axes)}="
            f"{axis_size(*axes)} does not divide; choose another --mesh.{axes[-1]}"
        )


def at_rest(path: str, shape: tuple[int, ...]) -> P:
    """`spec`, and what it leaves whole over `fsdp` split on the last dimension that allows it: on
    256 devices whole vectors would be a quarter of all that rests there.

    Not so the bias of a vocabulary, whose rows a sparse step looks up. Errors: as `spec`.
    """
    computes = spec(path, shape)
    axes = [_names(axis) for axis in computes]
    if any(FSDP in names for names in axes) or path.endswith("output_bias"):
        return computes
    for dim in reversed(range(len(shape))):
        if shape[dim] % axis_size(*axes[dim], FSDP) == 0:
            axes[dim] = (*axes[dim], FSDP)
            break
    return P(*(names[0] if len(names) == 1 else names or None for names in axes))


def _names(axis: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return axis if isinstance(axis, tuple) else (axis,) if axis else ()


def shardings(tree: Any) -> Any:
    """NamedSharding for every array of `tree`: parameters, or a state that holds some."""
    here = mesh()
    assert here is not None, "shardings are asked for under sharding.use(mesh)"
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(here, at_rest(path_of(path), x.shape)), tree
    )


def gather_vectors(params: Any) -> Any:
    """Parameters as `spec` has them: vectors are gathered, all others stay as they rest."""

    def prepare(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        name = path_of(path)
        computes = spec(name, x.shape)
        return x if at_rest(name, x.shape) == computes else constrain(x, *computes)

    return params if axis_size(FSDP) == 1 else jax.tree_util.tree_map_with_path(prepare, params)


def batch_sharding() -> NamedSharding:
    """Rows over the batch axes, each row whole on its devices."""
    here = mesh()
    assert here is not None, "batches are placed under sharding.use(mesh)"
    return NamedSharding(here, P(BATCH_AXES))


def replicated() -> NamedSharding:
    """The whole value on every device."""
    here = mesh()
    assert here is not None, "values are placed under sharding.use(mesh)"
    return NamedSharding(here, P())


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """`x` with its dimensions laid over mesh axes; nothing on a single device."""
    here = mesh()
    if here is None or here.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(here, P(*axes)))


def split_batch(x: jax.Array) -> jax.Array:
    """Activations (B, ...) with rows over the batch axes and the rest whole."""
    return constrain(x, BATCH_AXES, *([None] * (x.ndim - 1)))


def splits(length: int) -> bool:
    """Whether tokens of rows of that length lie over `sequence`: it is there and divides them."""
    return axis_size(SEQUENCE) > 1 and length % axis_size(SEQUENCE) == 0


def split_tokens(x: jax.Array) -> jax.Array:
    """Activations (B, L, ...) with rows over the batch axes, and tokens over `sequence`.

    L that it does not divide stays whole: training refuses it before (`Run.check`).
    """
    over = SEQUENCE if splits(x.shape[1]) else None
    return constrain(x, BATCH_AXES, over, *([None] * (x.ndim - 2)))


def pad_tokens(x: jax.Array) -> jax.Array:
    """(B, L, ...) with zeros after the last of L until `sequence` divides it."""
    spare = -x.shape[1] % axis_size(SEQUENCE)
    return jnp.pad(x, [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2)) if spare else x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, rest: P, over: str = FSDP) -> jax.Array:
    """What lies as `rest` says, gathered over one axis; its gradient is scattered back."""
    return constrain(x, *(None if a == over else a for a in rest))


def _gather_forward(x: jax.Array, rest: P, over: str) -> tuple[jax.Array, None]:
    return gather(x, rest, over), None


def _gather_backward(rest: P, over: str, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Asked for the shard at once, the compiler would split the matrix product that makes the
    # gradient into one slice a device and pass those around, in many small permutes. Whole first
    # and shard second, it sums with one reduce-scatter.
    whole = constrain(gradient, *(None if a == over else a for a in rest))
    return (constrain(whole, *rest),)


gather.defvjp(_gather_forward, _gather_backward)


def for_compute(params: Any, dtype: jnp.dtype) -> Any:
    """Weights as a layer multiplies with them: matrices in `dtype`, gathered over `fsdp`.

    Vectors (norm scales, biases) stay float32: they are small, and norms are computed in float32.
    """

    def prepare(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        name = path_of(path)
        is_matrix = re.search(r"(kernel|embedding|positions|types)$", name)
        return gather(x.astype(dtype) if is_matrix else x, spec(name, x.shape))

    return jax.tree_util.tree_map_with_path(prepare, params)


def map_shards(function: Any, in_specs: Any, out_specs: Any) -> Any:
    """`function` run on each device's shards of its arguments; itself on a single device."""
    here = mesh()
    if here is None or here.size == 1:
        return function
    return jax.shard_map(
        function, mesh=here, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def sum_over(x: Any, *axes: str) -> Any:
    """Sum over mesh axes, inside `map_shards`."""
    axes = tuple(a for a in axes if axis_size(a) > 1)
    return jax.lax.psum(x, axes) if axes else x


def max_over(x: jax.Array, axis: str) -> jax.Array:
    """Maximum over a mesh axis, inside `map_shards`."""
    return jax.lax.pmax(x, axis) if axis_size(axis) > 1 else x


def index_on(axis: str) -> jax.Array | int:
    """This device's place on a mesh axis, inside `map_shards`."""
    return jax.lax.axis_index(axis) if axis_size(axis) > 1 else 0


def gather_over(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Shards of dimension `dim` put together over a mesh axis, inside `map_shards`."""
    return jax.lax.all_gather(x, axis, axis=dim, tiled=True) if axis_size(axis) > 1 else x


def exchange_over(x: jax.Array, axis: str, split: int, join: int) -> jax.Array:
    """Shards of dimension `join` put together and `split` sharded instead, inside `map_shards`."""
    if axis_size(axis) == 1:
        return x
    return jax.lax.all_to_all(x, axis, split_axis=split, concat_axis=join, tiled=True)


def scatter_over(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Sum over a mesh axis of which each device keeps its shard of `dim`, inside `map_shards`."""
    if axis_size(axis) == 1:
        return x
    return jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


def folds() -> list[tuple[int, int]]:
    """The chunks that each device of `sequence` has after `fold`, of twice as many as devices.

    Device i of n has chunks i and 2 n − 1 − i of a row, the even one first.
    """
    last = 2 * axis_size(SEQUENCE) - 1
    return [(i, last - i) if i % 2 == 0 else (last - i, i) for i in range(axis_size(SEQUENCE))]


def fold(x: jax.Array, dim: int) -> jax.Array:
    """Shards of `dim` over `sequence`, exchanged for two chunks each, one from either end of the
    row (see `folds`), inside `map_shards`.
    """
    halves = jnp.split(x, 2, dim)  # of n devices, device i had chunks 2 i and 2 i + 1
    sent = zip(
        *([(chunk // 2, i) for chunk in pair] for i, pair in enumerate(folds())), strict=True
    )
    parts = [jax.lax.ppermute(h, SEQUENCE, way) for h, way in zip(halves, sent, strict=True)]
    return jnp.concatenate(parts, dim)


def unfold(x: jax.Array, dim: int) -> jax.Array:
    """What `fold` was given."""
    halves = jnp.split(x, 2, dim)
    sent = zip(
        *([(i, chunk // 2) for chunk in pair] for i, pair in enumerate(folds())), strict=True
    )
    parts = [jax.lax.ppermute(h, SEQUENCE, way) for h, way in zip(halves, sent, strict=True)]
    return jnp.concatenate(parts, dim)
