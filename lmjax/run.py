# SPDX-License-Identifier: Apache-2.0
"""Run: one training run as a value, which experiment files write down."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from lmjax import sharding
from lmjax.batches import Plan, Ramp, Spans, check_spans, spans
from lmjax.data import Data
from lmjax.optim import Optimiser, Schedule
from lmjax.sharding import Layout
from lmjax.step import Loss, abstract_params

_LENGTHS = ("data.examples.length", "phase2.examples.length")
_MOST_WORKERS = 256  # each is a process with a Python of its own


@dataclass(frozen=True)
class Phase:
    """The last part of a run, on examples of another kind: BERT's long sequences.

    Args:
      share: of the run's steps.
      examples: the example maker.
      batch: examples a step; 0 is the run's.
      accumulate: microbatches a step; 0 is the run's.
    """

    share: float
    examples: Any
    batch: int = 0
    accumulate: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"phase2.share={self.share}: a share above 0 and below 1")
        for name in ("batch", "accumulate"):
            if getattr(self, name) < 0:
                raise ValueError(f"phase2.{name}={getattr(self, name)}: must be 0 or more")


@dataclass(frozen=True)
class Run:
    """A model, its data, its loss and its optimiser, and for how long.

    Args:
      phase2: what the last steps read instead of `data.examples`; where it begins follows `steps`.
      batch: examples per step over all devices, after `ramp` if there is one.
      steps: length of the run; the schedule's end unless the optimiser says otherwise.
      accumulate: microbatches per step: less memory, the same numbers.
      log_every: steps between lines of metrics.jsonl.
      evaluate_every: steps between scores on the validation split; 0 only at the end.
      evaluate_windows: windows of the split to score while training; 0 is all of them.
      save_every: steps between checkpoints; `keep` newest ones stay.
      workers: processes that read examples ahead, at most 256; 0 reads in a thread.
      skip_batches: spans (a, b) of batches a … b − 1 that no step sees, as after a spike of the
        loss; later ones move up. Batch n is that of step n (from 1) where none are skipped.
      max_skipped: updates in a row that are skipped, for a loss or gradient that is no finite
        number, before the run stops; 0 is without end.
      check_every: steps between checks of the hardware: replicas compared, the step computed twice;
        needs room for a second state. 0 is never.
    """

    model: Any
    data: Data
    loss: Loss
    optim: Optimiser
    batch: int
    steps: int
    seed: int = 0
    ramp: Ramp | None = None
    phase2: Phase | None = None
    accumulate: int = 1
    mesh: Layout = Layout()
    log_every: int = 10
    evaluate_every: int = 1000
    evaluate_windows: int = 0
    save_every: int = 1000
    keep: int = 2
    workers: int = 0
    skip_batches: Spans = field(default=(), metadata={"parse": spans})
    max_skipped: int = 10
    check_every: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        check_spans(self.skip_batches)
        counts = ("evaluate_every", "evaluate_windows", "workers", "max_skipped", "check_every")
        for name in counts:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.workers > _MOST_WORKERS:
            raise ValueError(f"workers={self.workers}: must be at most {_MOST_WORKERS} processes")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed}: a whole number from 0 up to 2**32 - 1")
        if self.steps >= 1 << 31:
            raise ValueError(f"steps={self.steps}: must be below 2**31")
        if self.phase2 and hasattr(self.model, "initial_carry"):
            raise ValueError("phase2: a model that carries its state has one phase (--phase2=none)")
        context = getattr(self.model, "context", None)
        for key, maker in zip(_LENGTHS, self.makers(), strict=False):
            if context is not None and maker.length > context:
                raise ValueError(f"{key}={maker.length} is longer than model.context={context}")

    def makers(self) -> tuple[Any, ...]:
        """The example maker of each phase."""
        makers = (self.data.examples, *([self.phase2.examples] if self.phase2 else []))
        # Parallel streams, one a row of the batch, are told how many they are.
        return tuple(
            maker.of_batch(batch) if hasattr(maker, "of_batch") else maker
            for maker, batch in zip(makers, self.batch_sizes(), strict=True)
        )

    def batch_sizes(self) -> tuple[int, ...]:
        """Examples a step in each phase, after the ramp."""
        return (self.batch, *([self.phase2.batch or self.batch] if self.phase2 else []))

    def microbatches(self) -> tuple[int, ...]:
        """Microbatches a step in each phase."""
        second = [self.phase2.accumulate or self.accumulate] if self.phase2 else []
        return (self.accumulate, *second)

    def plan(self) -> Plan:
        """Which examples each step sees."""
        second = None
        if self.phase2:
            begins = round(self.steps * (1 - self.phase2.share))
            second = (begins, self.batch_sizes()[1], self.phase2.examples.length)
        length = self.data.examples.length
        skip = tuple((a - 1, b - 1) for a, b in self.skip_batches)
        return Plan(self.batch, length, self.ramp, second, skip)

    def check(self) -> None:
        """Raises ValueError for batches, heads, or tokens of a row, that the mesh in use cannot
        split.
        """
        self.plan().check(*self.microbatches())
        parts = sharding.axis_size(sharding.TENSOR)
        for name in ("heads", "generator_heads"):
            if (heads := getattr(self.model, name, parts)) % parts:
                raise ValueError(
                    f"model.{name}={heads}: heads are whole, and mesh axis tensor={parts} does not "
                    "divide their number; choose another --mesh.tensor (--mesh.fsdp splits "
                    "parameters as well)"
                )
        size = sharding.axis_size(sharding.SEQUENCE)
        if size > 1 and hasattr(self.model, "initial_carry"):
            raise ValueError(
                f"mesh.sequence={size}: a recurrent model reads a row word after word, so that its "
                "tokens cannot be split; give its devices to --mesh.data or --mesh.fsdp"
            )
        for key, maker in zip(_LENGTHS, self.makers(), strict=False):
            if maker.length % size:
                raise ValueError(
                    f"{key}={maker.length}: dimension 1 of a batch's tokens has size "
                    f"{maker.length}, which mesh axis sequence={size} does not divide; choose "
                    "another --mesh.sequence"
                )

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
    summary = {
        "parameters": run.parameters(),
        "flops_per_token": run.model.flops_per_token(run.data.examples.length),
        "tokens_per_step": run.batch * run.data.examples.length,
        "steps": run.steps,
        "tokens": plan.tokens_after(run.steps),
    }
    if run.phase2:
        last = plan.stages[-1]
        summary["phase2_first_step"] = last.first_step
        summary["phase2_tokens_per_step"] = last.size * last.example_tokens
        summary["phase2_flops_per_token"] = run.model.flops_per_token(last.example_tokens)
    return summary


def replace(run: Any, **changes: Any) -> Any:
    """A recipe, or a part of one, with some fields changed."""
    return dataclasses.replace(run, **changes)
