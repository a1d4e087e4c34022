# SPDX-License-Identifier: Apache-2.0
"""The state of a run and the pure functions that advance and score it."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from lmjax import cpu, sharding
from lmjax.layers import Batch, Outputs
from lmjax.losses import Sums, total

Loss = Callable[[Outputs, Batch], Sums]


@flax.struct.dataclass
class State:
    """Everything that a step reads and writes; `carry` is what recurrent families hand on."""

    step: jax.Array
    params: Any
    opt_state: Any
    carry: Any = None


TrainStep = Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


def init_params(model: nn.Module, seed: int) -> Any:
    """The parameters before step 0."""
    ints = jnp.zeros((1, 1), jnp.int32)
    names = ("tokens_BL", "positions_BL", "segments_BL", "types_BL", "masked_BP", "firsts_BC")
    return model.init(jax.random.key(seed), dict.fromkeys(names, ints))["params"]


def init_state(model: nn.Module, optimiser: optax.GradientTransformation, seed: int) -> State:
    """The state before step 0; traced under `jax.jit`, it is born sharded."""
    return state_from(optimiser, init_params(model, seed))


def state_from(optimiser: optax.GradientTransformation, params: Any) -> State:
    """Step 0 with these parameters and a fresh optimiser."""
    return State(jnp.zeros((), jnp.int32), params, optimiser.init(params))


def placed(shapes: Any) -> Any:
    """Shapes and dtypes with the shardings that they have on the mesh in use, if one is."""
    if sharding.mesh() is None:
        return shapes
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        sharding.shardings(shapes),
    )


def abstract_params(model: nn.Module) -> Any:
    """Shapes and dtypes of the parameters, placed."""
    return placed(jax.eval_shape(lambda: init_params(model, 0)))


def abstract_state(model: nn.Module, optimiser: optax.GradientTransformation) -> State:
    """Shapes and dtypes of the state, placed."""
    return placed(jax.eval_shape(lambda: init_state(model, optimiser, 0)))


def create_state(model: nn.Module, optimiser: optax.GradientTransformation, seed: int) -> State:
    """The state before step 0, each array computed where it rests."""
    rest = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimiser))
    return jax.jit(lambda: init_state(model, optimiser, seed), out_shardings=rest)()


def make_train_step(
    model: nn.Module,
    loss: Loss,
    optimiser: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    seed: int,
    accumulate: int = 1,
) -> TrainStep:
    """`train_step(state, batch) → (state, metrics)`, to be jitted with the state donated.

    The metrics are the loss's means, their total as `loss`, the norm of its gradient before
    clipping, and the learning rate.

    Args:
      accumulate: microbatches per step; only memory depends on it.
    """

    def sums(params: Any, batch: Batch, key: jax.Array) -> Sums:
        rngs = {"dropout": key, "sample": jax.random.fold_in(key, 1)}
        outputs: Any = model.apply({"params": params}, batch, train=True, rngs=rngs)
        return _scored(loss, outputs, batch)

    whole = total_of(loss)

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        means, gradients = _gradients(sums, whole, state.params, batch, key, accumulate)
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": whole(means), **means, "gradient_norm": norm}
        metrics["learning_rate"] = schedule(state.step)
        return State(state.step + 1, params, opt_state, state.carry), metrics

    return train_step


def jit_train_step(step: TrainStep, state: State) -> TrainStep:
    """`step` compiled for the mesh in use: the state is donated and stays where it rests.

    Args:
      state: arrays or shapes, with their shardings.
    """
    rest = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(rest, sharding.replicated()),
        compiler_options=cpu.compiler_options(),
    )


def _gradients(
    sums: Callable[..., Sums],
    whole: Callable[[dict[str, jax.Array]], jax.Array],
    params: Any,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
) -> tuple[dict[str, jax.Array], Any]:
    """Means of everything over the whole batch, and the gradient of their total."""

    def objective(params: Any, batch: Batch, key: jax.Array, weights: Any) -> Any:
        parts = sums(params, batch, key)
        weights = {name: w for name, (_, w) in parts.items()} if weights is None else weights
        means = {name: s / jnp.maximum(weights[name], 1) for name, (s, _) in parts.items()}
        return whole(means), means

    differentiate = jax.grad(objective, has_aux=True)
    if accumulate == 1:
        gradients, means = differentiate(params, batch, key, None)
        return means, gradients

    # The weights of the whole batch come first, so that each microbatch is divided by them; they
    # do not depend on the forward pass, which the compiler therefore leaves out.
    weights = {name: weight for name, (_, weight) in sums(params, batch, key).items()}
    keys = jax.random.split(key, accumulate)

    def add(total: Any, inputs: Any) -> tuple[Any, None]:
        gradients, means = differentiate(params, *inputs, weights)
        return jax.tree.map(jnp.add, total, (gradients, means)), None

    micro = jax.tree.map(lambda x: _microbatches(x, accumulate), batch)
    zeros = jax.tree.map(jnp.zeros_like, (params, {name: jnp.float32(0) for name in weights}))
    (gradients, means), _ = jax.lax.scan(add, zeros, (micro, keys))
    return means, gradients


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """(B, ...) to (count, B / count, ...), of each device's own rows: nothing moves."""
    x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
    return sharding.constrain(x, None, sharding.BATCH_AXES, *([None] * (x.ndim - 2)))


def _scored(loss: Loss, outputs: Outputs, batch: Batch) -> Sums:
    """The loss; what it adds up of the batch waits for the model where it must."""
    return loss(outputs, cpu.after(batch, outputs.hidden_BLD))


def total_of(loss: Loss) -> Callable[[Any], Any]:
    """What makes one number to minimise of a loss's means."""
    return getattr(loss, "total", total)


def make_eval_step(model: nn.Module, loss: Loss) -> Callable[[Any, Batch], Sums]:
    """`eval_step(params, batch) → {name: (sum, weight)}`."""

    def eval_step(params: Any, batch: Batch) -> Sums:
        # One set of draws for every batch: what is scored is the same at each evaluation.
        outputs: Any = model.apply({"params": params}, batch, rngs={"sample": jax.random.key(0)})
        return _scored(loss, outputs, batch)

    return eval_step
