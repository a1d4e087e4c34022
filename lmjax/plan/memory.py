# SPDX-License-Identifier: Apache-2.0
"""What a step needs in memory, from shapes alone: seconds instead of minutes, and no program.

Exact is what rests on a device: parameters and optimiser by their shardings. What the forward pass
saves for the backward pass is what JAX hands from one to the other, traced for one row and for two:
a line through rows. The compiler may hold more (temporaries) or less (it computes again what is
cheap), so a line prunes a search; what fits is for the compiler to say.
"""

import dataclasses
import functools
import math
from typing import Any

from lmjax.plan import chips
from lmjax.plan.facts import resting

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmjax import sharding, sparse
from lmjax.programs import batch_shapes
from lmjax.recipe import dump, to_json
from lmjax.run import Run, replace
from lmjax.sharding import Layout
from lmjax.step import abstract_params, abstract_state, forward, initial_carry, placed, total_of

_LANES = 128  # numbers side by side in a row of memory
_SURE = 0.5  # of what the line says is saved: stays, whatever the compiler computes again


@dataclasses.dataclass(frozen=True)
class Resting:
    """Bytes of one device that are there before a step and after it.

    Attributes:
      optimiser: with what a recurrent model carries.
      gradients: of all parameters; of tables that a step touches a few rows of, none.
      added: gradients of microbatches so far.
    """

    parameters: int
    optimiser: int
    gradients: int
    added: int

    @property
    def always(self) -> int:
        """What no program can do without."""
        return self.parameters + self.optimiser + self.added


def resting_bytes(run: Run, topology: str, phase: int = 0) -> Resting:
    """Of a run on a topology.

    Raises:
      ValueError: a mesh that does not fit, or an axis that does not divide what it splits.
    """
    mesh = mesh_of(run.mesh, topology)
    shapes = _shapes(_key(run), run.batch_sizes()[phase])
    with sharding.use(mesh):
        run.check()
        state = placed(shapes)
        parameters = resting(state.params)
        gradients = 0 if hasattr(run.model, "draw") else parameters
        added = gradients if run.microbatches()[phase] > 1 else 0
        return Resting(parameters, resting((state.opt_state, state.carry)), gradients, added)


def saved_bytes(run: Run, topology: str, phase: int = 0) -> float:
    """What a row leaves for the backward pass, by a line through the traces of one and of two."""
    return _saved(_key(run), topology, phase)


def line(run: Run, topology: str, phase: int = 0) -> int:
    """Bytes of one device: what rests, the gradients, and what is saved, which tensor parallelism
    is taken to split evenly. Errors: as `resting_bytes`.
    """
    rests = resting_bytes(run, topology, phase)
    return int(rests.always + rests.gradients + _saved_here(run, topology, phase))


def least(run: Run, topology: str, phase: int = 0) -> int:
    """Bytes of one device below which no program gets: what rests, and half of what is saved by
    the line. Errors: as `resting_bytes`.
    """
    always = resting_bytes(run, topology, phase).always
    return int(always + _SURE * _saved_here(run, topology, phase))


def touched_params(run: Run, topology: str, phase: int = 0) -> Any:
    """Shapes of the parameters as a step sees them: of sparse tables, the rows that it touches."""
    return _touched(_key(run), topology, phase, run.batch_sizes()[phase])


@functools.cache
def mesh_of(layout: Layout, topology: str) -> Mesh:
    """The mesh on a topology. Errors: ValueError where it does not fit."""
    return layout.mesh(chips.devices(topology))


def _saved_here(run: Run, topology: str, phase: int) -> float:
    rows = run.batch_sizes()[phase] / run.microbatches()[phase]
    return saved_bytes(run, topology, phase) * rows / mesh_of(run.mesh, topology).size


@dataclasses.dataclass(frozen=True)
class _Key:
    """A run, by what the shapes of its states depend on."""

    name: str
    run: Run = dataclasses.field(compare=False)


def _key(run: Run) -> _Key:
    makers = (run.data.examples, run.phase2 and run.phase2.examples)
    parts = [to_json(part) for part in (run.model, run.loss, run.optim, *makers)]
    return _Key(dump(parts), run)


@functools.cache
def _shapes(key: _Key, rows: int) -> Any:
    return abstract_state(key.run.model, key.run.optimiser(), rows)


@functools.cache
def _saved(key: _Key, topology: str, phase: int) -> float:
    one, two = (_handed_on(key.run, topology, phase, rows) for rows in (1, 2))
    return two - one


@functools.cache
def _touched(key: _Key, topology: str, phase: int, rows: int) -> Any:
    one = _alone(key.run, rows)
    with sharding.use(_first(topology)):
        given = abstract_params(one.model), batch_shapes(one, phase, rows)
        return jax.eval_shape(lambda *given: _objective(one, rows, *given)[1], *given)


def _first(topology: str) -> Mesh:
    return Layout(1, 1, 1).mesh(chips.devices(topology)[:1])


def _alone(run: Run, rows: int) -> Run:
    """A run with a microbatch of `rows` on one device."""
    second = run.phase2 and replace(run.phase2, batch=rows, accumulate=1)
    return replace(run, batch=rows, accumulate=1, ramp=None, mesh=Layout(1, 1, 1), phase2=second)


def _handed_on(run: Run, topology: str, phase: int, rows: int) -> int:
    """Bytes that the forward pass of `rows` on one device leaves for the backward pass."""
    one = _alone(run, rows)

    def residuals(params: Any, batch: Any) -> Any:
        return jax.vjp(*_objective(one, rows, params, batch))[1]

    with sharding.use(_first(topology)):
        given = abstract_params(one.model), batch_shapes(one, phase, rows)
        saved = jax.eval_shape(residuals, *given)
    arrays = [x for x in jax.tree.leaves(saved) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    return sum(_padded(x.shape) * np.dtype(x.dtype).itemsize for x in arrays)


def _padded(shape: tuple[int, ...]) -> int:
    """Numbers of an array whose last dimension fills whole lanes, as heads of 64 do not."""
    lanes = -(-shape[-1] // _LANES) * _LANES if len(shape) > 1 else math.prod(shape)
    return math.prod(shape[:-1]) * lanes if len(shape) > 1 else lanes


def _objective(run: Run, rows: int, params: Any, batch: Any) -> tuple[Any, Any]:
    """What a step differentiates, and the parameters as it sees them."""
    key = jax.random.key(0)
    drawn = sparse.draw(run.model, batch, key)
    carry = initial_carry(run.model, rows)

    def objective(params: Any) -> Any:
        sums, _ = forward(run.model, run.loss, drawn, params, batch, key, carry)
        return total_of(run.loss)({name: s / jnp.maximum(w, 1) for name, (s, w) in sums.items()})

    return objective, sparse.take(params, drawn)
