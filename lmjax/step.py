# SPDX-License-Identifier: Apache-2.0
"""The state of a run and the pure functions that advance and score it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from lmjax import cpu, sharding, sparse
from lmjax.layers import Batch, Outputs
from lmjax.losses import Sums, total

Loss = Callable[[Outputs, Batch], Sums]


@flax.struct.dataclass
class State:
    """Everything that a step reads and writes.

    `carry` is what a recurrent model hands from batch to batch, rows first: no gradient crosses.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    carry: Any = None


TrainStep = Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


def init_params(model: nn.Module, seed: int) -> Any:
    """The parameters before step 0."""
    return model.init(jax.random.key(seed), _smallest_batch(model))["params"]


def _smallest_batch(model: Any) -> Batch:
    if hasattr(model, "smallest_batch"):
        return model.smallest_batch()
    ints = jnp.zeros((1, 1), jnp.int32)
    names = ("tokens_BL", "positions_BL", "segments_BL", "types_BL", "masked_BP", "firsts_BC")
    return dict.fromkeys(names, ints)


def initial_carry(model: Any, rows: int) -> Any:
    """What a recurrent model carries into step 0 of batches of `rows`; None for other models."""
    return model.initial_carry(rows) if hasattr(model, "initial_carry") else None


def init_state(
    model: nn.Module, optimiser: optax.GradientTransformation, seed: int, rows: int = 0
) -> State:
    """The state before step 0, of batches of `rows`; under `jax.jit`, it is born sharded."""
    return state_from(optimiser, init_params(model, seed), initial_carry(model, rows))


def state_from(optimiser: optax.GradientTransformation, params: Any, carry: Any = None) -> State:
    """Step 0 with these parameters and a fresh optimiser."""
    return State(jnp.zeros((), jnp.int32), params, optimiser.init(params), carry)


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


def abstract_state(
    model: nn.Module, optimiser: optax.GradientTransformation, rows: int = 0
) -> State:
    """Shapes and dtypes of the state, placed."""
    return placed(jax.eval_shape(lambda: init_state(model, optimiser, 0, rows)))


def create_state(
    model: nn.Module, optimiser: optax.GradientTransformation, seed: int, rows: int = 0
) -> State:
    """The state before step 0, each array computed where it rests."""
    rest = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimiser, rows))
    return jax.jit(lambda: init_state(model, optimiser, seed, rows), out_shardings=rest)()


def forward(
    model: nn.Module, loss: Loss, drawn: Any, params: Any, batch: Batch, key: Any, carry: Any
) -> tuple[Sums, Any]:
    """The loss of a training step on a batch, and what a recurrent model carries on from it.

    Args:
      drawn: by `sparse.draw`, whose rows `params` then are; or None.
    """
    rngs = {"dropout": key, "sample": jax.random.fold_in(key, 1)}
    carried = {} if carry is None else {"carry": carry}
    given = {**batch, **({} if drawn is None else drawn.batch)}
    outputs: Any = model.apply({"params": params}, given, train=True, rngs=rngs, **carried)
    return _scored(loss, outputs, batch), None if carry is None else outputs.cache


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
    clipping, the learning rate, and `skipped`: 1 where the loss or that norm is no finite number.
    Such a step is counted and changes nothing else: no parameter, no moment, not what is carried.

    Args:
      accumulate: microbatches per step; only memory depends on it.
    """
    whole = total_of(loss)

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        drawn = sparse.draw(model, batch, key)
        before = params, opt_state = sparse.take((state.params, state.opt_state), drawn)
        means, gradients, carry = _gradients(
            partial(forward, model, loss, drawn),
            whole,
            sharding.gather_vectors(params),
            batch,
            key,
            state.carry,
            accumulate,
        )
        value, norm = whole(means), optax.tree.norm(gradients)
        sound = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        after = (optax.apply_updates(params, updates), opt_state)
        after, carry = _either(sound, (after, carry), (before, state.carry))
        params, opt_state = sparse.put((state.params, state.opt_state), after, drawn)
        metrics = {"loss": value, **means, "gradient_norm": norm}
        metrics |= {"learning_rate": schedule(state.step), "skipped": 1.0 - sound}
        return State(state.step + 1, params, opt_state, carry), metrics

    return train_step


def _either(sound: jax.Array, new: Any, old: Any) -> Any:
    """`new`, or `old` where the step is not sound; element by element, so in place if donated."""
    return jax.tree.map(lambda x, y: jax.lax.select(sound, x, y), new, old)


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
    sums: Callable[..., tuple[Sums, Any]],
    whole: Callable[[dict[str, jax.Array]], jax.Array],
    params: Any,
    batch: Batch,
    key: jax.Array,
    carry: Any,
    accumulate: int,
) -> tuple[dict[str, jax.Array], Any, Any]:
    """Means of everything over the whole batch, the gradient of their total, and the carry."""

    def objective(params: Any, batch: Batch, key: jax.Array, carry: Any, weights: Any) -> Any:
        parts, carry = sums(params, batch, key, carry)
        weights = {name: w for name, (_, w) in parts.items()} if weights is None else weights
        means = {name: s / jnp.maximum(weights[name], 1) for name, (s, _) in parts.items()}
        return whole(means), (means, carry)

    differentiate = jax.grad(objective, has_aux=True)
    if accumulate == 1:
        gradients, (means, carry) = differentiate(params, batch, key, carry, None)
        return means, gradients, carry

    # The weights of the whole batch come first, so that each microbatch is divided by them; they
    # do not depend on the forward pass, which the compiler therefore leaves out.
    weights = {name: w for name, (_, w) in sums(params, batch, key, carry)[0].items()}
    keys = jax.random.split(key, accumulate)

    def add(total: Any, inputs: Any) -> tuple[Any, Any]:
        gradients, (means, carry) = differentiate(params, *inputs, weights)
        return jax.tree.map(jnp.add, total, (gradients, means)), carry

    batch, carry = jax.tree.map(lambda x: _microbatches(x, accumulate), (batch, carry))
    zeros = jax.tree.map(jnp.zeros_like, (params, {name: jnp.float32(0) for name in weights}))
    (gradients, means), carry = jax.lax.scan(add, zeros, (batch, keys, carry))
    return means, gradients, jax.tree.map(_rejoined, carry)


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """(B, ...) to (count, B / count, ...), of each device's own rows: nothing moves."""
    x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
    return sharding.constrain(x, None, sharding.BATCH_AXES, *([None] * (x.ndim - 2)))


def _rejoined(x: jax.Array) -> jax.Array:
    """What `_microbatches` took apart."""
    x = jnp.moveaxis(x, 0, 1)
    return sharding.split_batch(x.reshape(-1, *x.shape[2:]))


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
