# SPDX-License-Identifier: Apache-2.0
"""How long a step may take, from shapes and the peaks of a chip: to rank what to compile first.

Matrix products at a usual share of the peak, what is computed again, the memory's traffic of saved
tensors and of the optimiser, and what devices send each other. It ranks; it is no prediction.
"""

import math

from lmjax.plan import chips, memory
from lmjax.plan.predict import transfer_seconds

import jax  # isort: skip

from lmjax import sharding
from lmjax.run import Run
from lmjax.sharding import DATA, FSDP, SEQUENCE, TENSOR

_MATMUL_SHARE = 0.6  # of the peak, in a whole step
_RECOMPUTED = {"full": 1 / 3, "names": 1 / 20}  # of the model's FLOPs
_SAVED_PASSES = 3  # over what is saved: written, read, and its gradient
_STATE_PASSES = 2.5  # over parameters and optimiser: read, written, beside the gradients
_BFLOAT16 = 2
_HOP = 1e-6  # seconds from a chip to its neighbour
_MATRICES = 4  # of a layer, each gathered and summed by itself
_TILE = 16  # rows of a tile of bfloat16: fewer rows of a weight on a device travel padded


def run_seconds(run: Run, topology: str) -> float:
    """Of all steps of a run, both phases; a batch that grows is taken as grown.

    Raises:
      ValueError: as `memory.resting_bytes`.
    """
    share = run.phase2.share if run.phase2 else 0.0
    shares = (1 - share, share)
    phases = range(len(run.makers()))
    return run.steps * sum(shares[p] * step_seconds(run, topology, p) for p in phases)


def step_seconds(run: Run, topology: str, phase: int = 0) -> float:
    """Of one step: between all transfers hidden and none, the geometric mean."""
    chip, torus = chips.split_name(topology)
    rows, length = run.batch_sizes()[phase], run.makers()[phase].length
    flops = run.model.flops_per_token(length) * rows * length / math.prod(torus)
    again = _RECOMPUTED.get(getattr(run.model, "remat", ""), 0.0)
    rests = memory.resting_bytes(run, topology, phase)
    saved = memory.saved_bytes(run, topology, phase) * rows / math.prod(torus)
    moved = _SAVED_PASSES * saved
    if rests.gradients:  # else few rows of the tables are touched
        moved += _STATE_PASSES * (rests.parameters + rests.optimiser)
    moved += 3 * rests.added * run.microbatches()[phase]
    work = flops / chip.flops * (1 / _MATMUL_SHARE + again) + moved / chip.hbm
    sent = run.microbatches()[phase] * sum(transfers(run, topology, phase).values())
    return math.sqrt(max(work, sent) * (work + sent))


def transfers(run: Run, topology: str, phase: int = 0) -> dict[str, float]:
    """Seconds of what one microbatch sends over each axis."""
    chip, torus = chips.split_name(topology)
    shape = memory.mesh_of(run.mesh, topology).shape
    gathered, summed = _weights(run, topology, phase)
    depth = getattr(run.model, "depth", 1)

    def seconds(kind: str, size: float, axis: str, times: int) -> float:
        """Of `times` collectives of a layer that move `size` bytes together in all layers."""
        hops = min(shape[axis] - 1, sum(torus))
        return transfer_seconds(kind, size, shape[axis], chip, torus) + depth * times * hops * _HOP

    rows = run.batch_sizes()[phase] // run.microbatches()[phase] // (shape[DATA] * shape[FSDP])
    length = run.makers()[phase].length / shape[SEQUENCE]
    # Attention and MLP of each layer sum their outputs, and the gradients of their inputs; a
    # recurrent layer does so at each position.
    sums = 6 if getattr(run.model, "remat", "") == "full" else 4
    hidden = rows * length * getattr(run.model, "width", 0) * _BFLOAT16 * depth * sums
    times = sums * (int(length) if hasattr(run.model, "initial_carry") else 1)
    return {
        DATA: seconds("all-reduce", summed, DATA, _MATRICES),
        # Gathered forward and backward, and the gradients scattered.
        FSDP: seconds("all-gather", 3 * gathered, FSDP, 3 * _MATRICES),
        TENSOR: seconds("all-reduce", hidden, TENSOR, times),
    }


def _weights(run: Run, topology: str, phase: int) -> tuple[float, float]:
    """Bytes that a device gathers over fsdp, and that it sums over data."""
    gathered = summed = 0.0
    mesh = memory.mesh_of(run.mesh, topology)
    shapes = memory.touched_params(run, topology, phase)
    with sharding.use(mesh):
        for path, x in jax.tree_util.tree_leaves_with_path(shapes):
            spec = sharding.spec(sharding.path_of(path), x.shape)
            size = _BFLOAT16 * math.prod(x.shape) / (mesh.shape[TENSOR] if TENSOR in spec else 1)
            if FSDP in spec and mesh.shape[FSDP] > 1:
                rows = x.shape[tuple(spec).index(FSDP)] // mesh.shape[FSDP]
                gathered += size * max(1, _TILE / rows)
                size /= mesh.shape[FSDP]
            summed += size
    return gathered, summed
