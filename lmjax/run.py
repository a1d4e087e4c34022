# SPDX-License-Identifier: Apache-2.0
"""Run: one training run as a value, which experiment files write down."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import optax

from lmjax.batches import Plan, Ramp
from lmjax.data import Data
from lmjax.optim import AdamW, Schedule
from lmjax.sharding import Layout
from lmjax.step import Loss, abstract_params


@dataclass(frozen=True)
class Run:
    """A model, its data, its loss and its optimiser, and for how long.

    Args:
      batch: examples per step over all devices, after `ramp` if there is one.
      steps: length of the run; the schedule's end unless the optimiser says otherwise.
      accumulate: microbatches per step: less memory, the same numbers.
      log_every: steps between lines of metrics.jsonl.
      evaluate_every: steps between scores on the validation split; 0 only at the end.
      evaluate_windows: windows of the split to score while training; 0 is all of them.
      save_every: steps between checkpoints; `keep` newest ones stay.
      workers: processes that read examples ahead; 0 reads in a thread.
    """

    model: Any
    data: Data
    loss: Loss
    optim: AdamW
    batch: int
    steps: int
    seed: int = 0
    ramp: Ramp | None = None
    accumulate: int = 1
    mesh: Layout = Layout()
    log_every: int = 10
    evaluate_every: int = 1000
    evaluate_windows: int = 0
    save_every: int = 1000
    keep: int = 2
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("evaluate_every", "evaluate_windows", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed}: a whole number from 0 up to 2**32 - 1")
        if self.steps >= 1 << 31:
            raise ValueError(f"steps={self.steps}: must be below 2**31")
        length, context = self.data.examples.length, getattr(self.model, "context", None)
        if context is not None and length > context:
            raise ValueError(
                f"data.examples.length={length} is longer than model.context={context}"
            )

    def plan(self) -> Plan:
        """Which examples each step sees."""
        return Plan(self.batch, self.data.examples.length, self.ramp)

    def schedule(self) -> Schedule:
        """Learning rate by step."""
        return self.optim.schedule(self.steps, self.plan().tokens_after)

    def optimiser(self) -> optax.GradientTransformation:
        """Gradients to updates."""
        return self.optim.transform(self.schedule())

    def parameters(self) -> int:
        """Trainable numbers of the model; padding rows are none of them."""
        params = abstract_params(self.model)
        return sum(x.size for x in jax.tree.leaves(params)) - self.model.padding


def describe(run: Run) -> dict[str, Any]:
    """What a run is and costs, from shapes alone."""
    plan = run.plan()
    return {
        "parameters": run.parameters(),
        "flops_per_token": run.model.flops_per_token(run.data.examples.length),
        "tokens_per_step": run.batch * run.data.examples.length,
        "steps": run.steps,
        "tokens": plan.tokens_after(run.steps),
    }


def replace(run: Any, **changes: Any) -> Any:
    """A recipe, or a part of one, with some fields changed."""
    return dataclasses.replace(run, **changes)
