# SPDX-License-Identifier: Apache-2.0
"""Optimisers: a learning-rate schedule and an optax chain, as one frozen recipe."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lmjax.sharding import path_of

Schedule = Callable[[Any], jax.Array]


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019) and a warm-up schedule.

    The rate rises linearly over `warmup` to `peak`, falls as `decay` says to `floor`·peak at
    `decay_until` (None: the end of the run) and stays there. Both are counted in `unit`s up to
    and including the update at hand, so that the first update already moves.

    Args:
      decay_parameters: regex on parameter paths; what matches is decayed.
      clip: global norm that gradients are clipped to; None for no clipping.
    """

    peak: float
    warmup: float
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1
    decay_until: float | None = None
    unit: Literal["steps", "tokens"] = "steps"
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay_parameters: str = r"(kernel|embedding|positions)$"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("peak", "warmup", "floor", "decay_until", "epsilon", "weight_decay", "clip"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"optim.{name}={value}: must be 0 or more")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: from 0 up to 1")
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
        count = tokens_after if self.unit == "tokens" else (lambda step: step)
        # Floats, because tokens outgrow the 32 bits that JAX gives to Python's integers.
        warmup = float(self.warmup)
        end = float(count(steps) if self.decay_until is None else self.decay_until)

        def rate(step: jax.Array) -> jax.Array:
            seen = jnp.asarray(count(step + 1), jnp.float32)
            rising = seen / max(warmup, 1.0)
            done = jnp.clip((seen - warmup) / max(end - warmup, 1.0), 0, 1)
            falling = {
                "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)),
                "linear": 1 - done,
                "constant": jnp.ones_like(done),
            }[self.decay]
            falling = self.floor + (1 - self.floor) * falling
            return self.peak * jnp.where(seen < warmup, rising, falling)

        return rate

    def transform(self, schedule: Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        decayed = re.compile(self.decay_parameters)

        def mask(params: Any) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: bool(decayed.search(path_of(path))), params
            )

        return optax.chain(
            optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip),
            optax.scale_by_adam(self.b1, self.b2, self.epsilon),
            optax.add_decayed_weights(self.weight_decay, mask),
            optax.scale_by_learning_rate(schedule),
        )
