# SPDX-License-Identifier: Apache-2.0
"""Optimisers: a learning-rate schedule and an optax chain, as one frozen recipe."""

import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lmjax.recipe import nearest
from lmjax.sharding import path_of

Schedule = Callable[[Any], jax.Array]

# (parameter path, the dimension along which its array holds variables that the original models
# keep apart): the layers of a stack; the queries, keys and values of a fused projection.
_APART: tuple[tuple[str, int], ...] = ((r"(^|/)blocks/", 0), (r"(^|/)qkv/(kernel|bias)$", -2))


@dataclass(frozen=True)
class Optimiser:
    """What all optimisers share: a schedule of the learning rate, clipping, and weight decay.

    With x the `unit`s (steps or tokens) counted for an update, W = `warmup` and T = `decay_until`
    (None: the end of the run),

        rate = peak · x / W                               while x < W
        rate = peak · (floor + (1 − floor) · decay(d))    from then on
        d = (x − W) / (T − W), or x / T if `decay_from` is "start"; at most 1

    where `decay` falls from 1 at d = 0 to 0 at d = 1. BERT's schedule (Devlin et al. 2019; also
    ERNIE, ALBERT, ELECTRA) is count="before", decay_from="start", decay="linear", floor=0: the
    first update has rate 0 and the rate drops by W / T of the peak where the warm-up ends.

    Args:
      count: whether x includes the update at hand ("after": the first one already moves) or stops
        short of it ("before": the first update has x = 0).
      decay_from: where the decay is counted from: the end of the warm-up, or the run's start.
      weight_decay: what the learning rate multiplies gains so many times the weight.
      decay_parameters: regex on parameter paths; what matches is decayed ("" matches all).
      clip: global norm that gradients are clipped to; None for no clipping.
    """

    peak: float
    warmup: float
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1
    decay_until: float | None = None
    count: Literal["after", "before"] = "after"
    decay_from: Literal["warmup", "start"] = "warmup"
    unit: Literal["steps", "tokens"] = "steps"
    weight_decay: float = 0.1
    decay_parameters: str = r"(kernel|embedding|positions|types)$"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(f"optim.{field.name}={value}: must be 0 or more")
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal:
                _check_choice(name, getattr(self, name), typing.get_args(hint))
        try:
            re.compile(self.decay_parameters)
        except re.error as error:
            raise ValueError(
                f"optim.decay_parameters={self.decay_parameters!r}: no regular expression ({error})"
            ) from None

    def schedule(self, steps: int, tokens_after: Callable[[Any], Any]) -> Schedule:
        """Learning rate of the update from step s to s + 1.

        Args:
          steps: length of the run.
          tokens_after: tokens seen after that many steps; traceable.
        """
        measure = tokens_after if self.unit == "tokens" else (lambda step: step)
        counted = 1 if self.count == "after" else 0
        # Floats, because tokens outgrow the 32 bits that JAX gives to Python's integers.
        warmup = float(self.warmup)
        start = warmup if self.decay_from == "warmup" else 0.0
        end = float(measure(steps) if self.decay_until is None else self.decay_until)

        def rate(step: jax.Array) -> jax.Array:
            seen = jnp.asarray(measure(step + counted), float)
            rising = seen / max(warmup, 1.0)
            done = jnp.clip((seen - start) / max(end - start, 1.0), 0, 1)
            falling = {
                "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)),
                "linear": 1 - done,
                "constant": jnp.ones_like(done),
            }[self.decay]
            falling = self.floor + (1 - self.floor) * falling
            return self.peak * jnp.where(seen < warmup, rising, falling)

        return rate

    def decayed(self, params: Any) -> list[str]:
        """Paths of the parameters that weight decay acts on, in the order of the tree."""
        leaves = jax.tree_util.tree_leaves_with_path(self._is_decayed(params))
        return [path_of(path) for path, is_decayed in leaves if is_decayed]

    def transform(self, schedule: Schedule) -> optax.GradientTransformation:
        """Gradients to updates. The state holds the moments as trees of the parameters' paths."""
        return optax.chain(
            optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip),
            *self._directions(),
            optax.scale_by_learning_rate(schedule),
        )

    def _directions(self) -> tuple[optax.GradientTransformation, ...]:
        """From clipped gradients to what the learning rate multiplies."""
        raise NotImplementedError

    def _is_decayed(self, params: Any) -> Any:
        pattern = re.compile(self.decay_parameters)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(pattern.search(path_of(path))), params
        )


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019) and a warm-up schedule.

    Args:
      bias_correction: divide the moments by 1 − b^updates. BERT's AdamWeightDecay does not.
      epsilon: added to the root of the (corrected) second moment.
    """

    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    bias_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: from 0 up to 1")

    def _directions(self) -> tuple[optax.GradientTransformation, ...]:
        adam = optax.scale_by_adam if self.bias_correction else _scale_by_uncorrected_adam
        return (
            adam(self.b1, self.b2, self.epsilon),
            optax.add_decayed_weights(self.weight_decay, self._is_decayed),
        )


@dataclass(frozen=True)
class LAMB(AdamW):
    """Adam whose updates have the length of what they change (You et al. 2019), as in ALBERT.

    The update of each variable w, with its weight decay, is scaled by the trust ratio
    ‖w‖ / ‖update‖ (1 where either is 0). Variables are what ALBERT's checkpoint calls so: each
    layer, and each of query, key and value, on its own. What `decay_parameters` leaves out keeps
    a ratio of 1. The rest is AdamW, with ALBERT's values for defaults.
    """

    b2: float = 0.999
    epsilon: float = 1e-6
    bias_correction: bool = False
    weight_decay: float = 0.01

    def _directions(self) -> tuple[optax.GradientTransformation, ...]:
        return *super()._directions(), optax.stateless(self._trusted)

    def _trusted(self, updates: Any, params: Any) -> Any:
        def scale(path: Any, update: jax.Array, weight: jax.Array, is_adapted: bool) -> jax.Array:
            return update * _trust_ratio(path_of(path), update, weight) if is_adapted else update

        return jax.tree_util.tree_map_with_path(scale, updates, params, self._is_decayed(params))


@dataclass(frozen=True)
class Adagrad(Optimiser):
    """Adagrad (Duchi et al. 2011) as TensorFlow 1 has it, with ELMo's values for defaults.

    The direction is g / √(accumulator + Σ g²), without an epsilon.

    Args:
      accumulator: where the sum of squares begins.
      gradient_scale: what gradients are multiplied by before they are clipped. ELMo minimises its
        mean loss times the length of a window.
    """

    peak: float = 0.2
    warmup: float = 0
    decay: Literal["cosine", "linear", "constant"] = "constant"
    weight_decay: float = 0.0
    clip: float | None = 10.0
    accumulator: float = 1.0
    gradient_scale: float = 20.0

    def transform(self, schedule: Schedule) -> optax.GradientTransformation:
        """Gradients to updates. The state holds the sums of squares as a tree of the paths."""
        return optax.chain(optax.scale(self.gradient_scale), super().transform(schedule))

    def _directions(self) -> tuple[optax.GradientTransformation, ...]:
        return (
            optax.scale_by_rss(self.accumulator, eps=0.0),
            optax.add_decayed_weights(self.weight_decay, self._is_decayed),
        )


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = nearest(str(value), allowed)
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"optim.{name}={value}: allowed are {', '.join(allowed)}{hint}")


def _scale_by_uncorrected_adam(
    b1: float, b2: float, epsilon: float
) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, and its state, with the moments as they are."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mean, square)
        return updates, state._replace(count=state.count + 1, mu=mean, nu=square)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, epsilon).init, update)


def _trust_ratio(path: str, update: jax.Array, weight: jax.Array) -> jax.Array:
    """‖weight‖ / ‖update‖ of each variable in an array; size 1 along a variable's dimensions."""
    apart = {dim % weight.ndim for pattern, dim in _APART if re.search(pattern, path)}
    dims = tuple(dim for dim in range(weight.ndim) if dim not in apart)
    own, step = (jnp.sqrt(jnp.sum(jnp.square(x), dims, keepdims=True)) for x in (weight, update))
    return jnp.where((own > 0) & (step > 0), own / jnp.where(step > 0, step, 1), 1)
