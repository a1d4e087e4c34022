# SPDX-License-Identifier: Apache-2.0
"""TPU generations, and the topologies that they come in, to compile for."""

import functools
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

# Read when libtpu loads, which the first topology makes happen: there is no metadata server to
# wait for, and several processes compile at once.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_ID", "0")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from jax.experimental import topologies  # noqa: E402

from lmjax.executables import TPU_FLAGS  # noqa: E402
from lmjax.peaks import FLOPS  # noqa: E402
from lmjax.text_files import nearest  # noqa: E402


def _init_args(given: str) -> str:
    """What libtpu is told when it loads: what the user says, and TPU_FLAGS that this leaves open.

    Estimating some small matrix products, as BERT-base's on 256 devices, overflows the stacks that
    the compiler's fibers have of themselves.
    """
    said = {flag.partition("=")[0] for flag in given.split()}
    added = [flag for flag in TPU_FLAGS if flag.partition("=")[0] not in said]
    return " ".join([*added, *given.split()])


os.environ["LIBTPU_INIT_ARGS"] = _init_args(os.environ.get("LIBTPU_INIT_ARGS", ""))
MISSING = "no TPU compiler here (x86 Linux): in the checkout, pip install -e '.[tpu-compile]'"


@dataclass(frozen=True)
class Chip:
    """A generation, by Google's documentation where nothing else is said.

    Args:
      flops: bfloat16 per second at the peak.
      memory: bytes of a device that a program may use, as the compiler says.
      hbm: bytes per second of a chip's memory.
      link: bytes per second one way through one of the links between neighbours.
      wraps: sizes of a torus axis from which its ends are linked, and by which it then divides.
      matrix: rows of the matrix unit, which narrower heads leave idle in part.
      clock: cycles per second that turn the compiler's cycles into seconds.
      dimensions: of the torus.
      most: chips of a pod.
      devices: JAX devices of a chip.
      price: dollars per chip and hour on demand; lists change, so `--price` replaces it.
      options: what describes the topology beside its name.
    """

    flops: float
    memory: int
    hbm: float
    link: float
    wraps: int
    matrix: int
    clock: float
    dimensions: int
    most: int
    devices: int = 1
    price: float | None = None
    options: tuple[tuple[str, Any], ...] = ()


_GIB = 2**30
_MEGACORE = (("chip_config_name", "megacore"),)  # both cores of a chip as one device
CHIPS = {
    "v4": Chip(
        FLOPS["TPU v4"], int(30.75 * _GIB), 1.2e12, 4.5e10, 4, 128, 1.05e9,
        3, 4096, 1, 3.22, _MEGACORE,
    ),
    "v5e": Chip(
        FLOPS["TPU v5 lite"], int(15.75 * _GIB), 0.82e12, 4.5e10, 16, 128, 1.5e9, 2, 256, 1, 1.20
    ),
    "v5p": Chip(
        FLOPS["TPU v5"], int(95.74 * _GIB), 2.765e12, 9e10, 4, 128, 1.75e9, 3, 8960, 1, 4.20
    ),
    "v6e": Chip(
        FLOPS["TPU v6 lite"], int(31.25 * _GIB), 1.6e12, 9e10, 16, 256, 1.75e9, 2, 256, 1, 2.70
    ),
    "tpu7x": Chip(
        2 * FLOPS["TPU7x"], int(94.75 * _GIB), 7.38e12, 9e10, 4, 256, 1.9e9, 3, 9216, 2
    ),
}  # fmt: skip
# Slices that Google rents, by dimensions; of three all multiples of 4 as well.
_SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4"),
}
_SIDE = 16  # of two dimensions, at most
_FORM = re.compile(r"([a-z0-9]+):(\d+(?:x\d+){1,2})")


def installed() -> bool:
    """Whether libtpu, the package with the compiler, is here."""
    return importlib.util.find_spec("libtpu") is not None


def split_name(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the shape of the torus of a name as "v5e:4x4".

    Raises:
      ValueError: a name of another form, of a chip that is not in the table, or of a slice that
        is not made of it.
    """
    found = _FORM.fullmatch(topology)
    if not found:
        raise ValueError(
            f"--topology={topology}: CHIP:SHAPE is needed, as v5e:4x4 or v5p:2x2x2"
            f" (chips: {', '.join(CHIPS)})"
        )
    if found[1] not in CHIPS:
        raise ValueError(
            f"--topology={topology}: no chip {found[1]!r}; one of {', '.join(CHIPS)};"
            f" did you mean {nearest(found[1], CHIPS)!r}?"
        )
    shape = tuple(int(n) for n in found[2].split("x"))
    if 0 in shape:
        raise ValueError(f"--topology={topology}: sizes are at least 1")
    if reason := _unlike(found[1], shape):
        raise ValueError(f"--topology={topology}: {reason}")
    return CHIPS[found[1]], shape


def _unlike(name: str, shape: tuple[int, ...]) -> str:
    """What keeps a shape from being one of a chip's slices; "" where it is one."""
    chip, slices = CHIPS[name], _SLICES[CHIPS[name].dimensions]
    flat = chip.dimensions == 2
    if flat and (len(shape) != 2 or max(shape) > _SIDE):
        return f"{name} has two dimensions, each at most {_SIDE}, such as {name}:4x4"
    if not flat and (len(shape) != 3 or math.prod(shape) > chip.most):
        most = f"at most {chip.most:,} chips"
        return f"{name} has three dimensions, and {most}, such as {name}:4x4x4"
    written = {"x".join(map(str, sizes)) for sizes in (shape, sorted(shape))}
    if written & {*slices} or (not flat and all(n % 4 == 0 for n in shape)):
        return ""
    more = "" if flat else ", and multiples of 4 such as 4x4x8"
    return f"{name} comes as {', '.join(slices)}{more}"


@functools.cache
def devices(topology: str) -> list[Any]:
    """The devices of a topology, good for compiling only.

    Raises:
      ValueError: as `split_name`; or the compiler is not installed or does not know this shape.
    """
    chip, shape = split_name(topology)
    if not installed():
        raise ValueError(MISSING)
    options = dict(chip.options)
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # of XLA: no class of its own
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"--topology={topology}: the compiler has none ({first})") from None
    return list(described.devices)
