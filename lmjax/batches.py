# SPDX-License-Identifier: Apache-2.0
"""Step number → global sharded batch. The data cursor is the step; no iterator state exists.

The batch of step s is a run of consecutive global example indices; example i is a pure function of
(store, seed, i). A process builds the rows that its devices hold and no others, so any number of
hosts, devices and workers sees the same batches.
"""

import bisect
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lmjax import sharding

Arrays = dict[str, np.ndarray]
Make = Callable[[np.ndarray], Arrays]
Spans = tuple[tuple[int, int], ...]


def spans(text: str, current: Any = None) -> Spans:
    """Spans [a, b) of batches as they are typed: 100:200,300:310.

    Raises:
      ValueError: something else.
    """
    bare = re.sub(r"[\s()\[\]]", "", text)
    bare = re.sub(r"(\d+),(\d+)", r"\1:\2", bare) if ":" not in bare else bare
    parts = [part.split(":") for part in bare.split(",") if part and bare != "none"]
    if not all(len(p) == 2 and all(n.isascii() and n.isdigit() for n in p) for p in parts):
        raise ValueError(
            f"--skip_batches={text}: spans FIRST:END are needed, such as 100:200,300:310 (the batch"
            " END is not one of them)"
        )
    return tuple((int(a), int(b)) for a, b in parts)


def check_spans(skip: Spans) -> None:
    """Raises ValueError for spans that are empty, overlap, or lie beyond what steps can count."""
    end = 0
    for a, b in sorted(skip):
        if not 1 <= a < b:
            raise ValueError(f"skip_batches={a}:{b}: a span FIRST:END has 1 ≤ FIRST < END")
        if b >= 1 << 31:
            raise ValueError(f"skip_batches={a}:{b}: END must be below 2**31")
        if a < end:
            raise ValueError(f"skip_batches={a}:{b} overlaps the span before it")
        end = b


@dataclass(frozen=True)
class Ramp:
    """Batch sizes from `start` by `increment` up to the full batch, over the first `tokens`.

    Each size lasts an equal number of tokens, rounded up to whole steps.
    """

    start: int
    increment: int
    tokens: float

    def __post_init__(self) -> None:
        for name in ("start", "increment", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"ramp.{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Stage:
    """A stretch of steps with one batch size; `phase` says which example maker it reads.

    first_example counts from the start of the phase, tokens_before from the start of the run.
    """

    first_step: int
    size: int
    example_tokens: int
    phase: int = 0
    first_example: int = 0
    tokens_before: int = 0

    def examples(self, step: int) -> int:
        """First example of a step, counted in its phase."""
        return self.first_example + (step - self.first_step) * self.size

    def tokens_after(self, steps: Any) -> Any:
        """Tokens of the run after that many steps, of which the last are of this stage."""
        return self.tokens_before + (steps - self.first_step) * (self.size * self.example_tokens)


class Plan:
    """Which examples each step sees: the arithmetic of batch sizes and phases."""

    def __init__(
        self,
        batch: int,
        example_tokens: int,
        ramp: Ramp | None = None,
        phase2: tuple[int, int, int] | None = None,
        skip: Spans = (),
    ) -> None:
        """`batch` examples a step, each of `example_tokens` targets, after the ramp if any.

        phase2: (first step, batch, tokens an example) of a second phase, whose examples are
        counted from 0 again.
        skip: spans of batches that no step sees, counted from 0; those behind them move up.
        """
        sizes = [] if ramp is None else list(range(ramp.start, batch, ramp.increment))
        stages, first = [], 0
        for size in sizes:
            assert ramp is not None
            stages.append(Stage(first, size, example_tokens))
            first += -(-int(ramp.tokens) // (len(sizes) * size * example_tokens))
        stages.append(Stage(first, batch, example_tokens))
        if phase2 is not None:
            stages = [stage for stage in stages if stage.first_step < phase2[0]]
            stages.append(Stage(*phase2, phase=1))
        self.stages: list[Stage] = []
        for stage in stages:
            self.stages.append(self._after(stage) if self.stages else stage)
        self._first_steps = [stage.first_step for stage in self.stages]
        self._left_out = [self._examples_of(span) for span in sorted(skip)]

    def _after(self, stage: Stage) -> Stage:
        """A stage with the counts that the one before leaves."""
        before = self.stages[-1]
        example = before.examples(stage.first_step) if stage.phase == before.phase else 0
        tokens = before.tokens_after(stage.first_step)
        return replace(stage, first_example=example, tokens_before=tokens)

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return self.stages[bisect.bisect_right(self._first_steps, step) - 1]

    def examples(self, batch: int) -> tuple[int, int]:
        """First example of a batch, counted in its phase, and how many.

        Batches are numbered by the steps that would see them if none were skipped.
        """
        stage = self.stage(batch)
        return stage.examples(batch), stage.size

    def indices(self, step: int) -> np.ndarray:
        """The examples that a step sees, counted in its phase."""
        stage = self.stage(step)
        found = stage.examples(step) + np.arange(stage.size)
        for phase, begin, end in self._left_out:
            if phase == stage.phase:
                found = np.where(found >= begin, found + (end - begin), found)
        return found

    def batches_of(self, step: int) -> tuple[int, int]:
        """The span of batches [a, b) that the examples of a step are of."""
        phase, seen = self.stage(step).phase, self.indices(step)

        def batch(example: int) -> int:
            before = [s for s in self.stages if s.phase == phase and s.first_example <= example]
            return before[-1].first_step + (example - before[-1].first_example) // before[-1].size

        return batch(int(seen[0])), batch(int(seen[-1])) + 1

    def _examples_of(self, span: tuple[int, int]) -> tuple[int, int, int]:
        """(phase, first example, end) of a span of batches, all of one phase."""
        first, last = self.stage(span[0]), self.stage(span[1] - 1)
        if first.phase != last.phase:
            raise ValueError(
                f"skip_batches={span[0] + 1}:{span[1] + 1}: the second phase begins with batch"
                f" {last.first_step + 1}; name those before it and from it on apart"
            )
        return first.phase, first.examples(span[0]), last.examples(span[1])

    def tokens_after(self, steps: Any) -> Any:
        """Tokens seen in that many steps; float32 when traced."""
        if isinstance(steps, (int, np.integer)):
            return self.stage(int(steps)).tokens_after(int(steps))
        starts = jnp.asarray(self._first_steps)
        per_step = [float(stage.size * stage.example_tokens) for stage in self.stages]
        at = jnp.searchsorted(starts, steps, side="right") - 1
        before = jnp.asarray([float(stage.tokens_before) for stage in self.stages])[at]
        return before + (steps - starts[at]).astype(jnp.float32) * jnp.asarray(per_step)[at]

    def check(self, *accumulate: int) -> None:
        """Raises ValueError for a batch that the mesh and a phase's microbatches do not divide."""
        rows = sharding.axis_size(*sharding.BATCH_AXES)
        for stage in self.stages:
            size, parts = stage.size, accumulate[stage.phase]
            if size < 1 or size % (rows * parts):
                raise ValueError(
                    f"batch={size} cannot be split over {rows} devices (mesh data × fsdp) times "
                    f"accumulate={parts}; it must be a multiple of {rows * parts}"
                )


@dataclass(frozen=True)
class Share:
    """Some rows of a batch: it is cut into `of` equal parts, and these are the ones numbered
    `parts`, in rising order. On a torus, a host's devices need not hold neighbouring rows.
    """

    parts: tuple[int, ...] = (0,)
    of: int = 1

    def rows(self, size: int) -> np.ndarray:
        """Their numbers in a batch of `size` rows."""
        one = size // self.of
        return (np.array(self.parts)[:, None] * one + np.arange(one)).reshape(-1)


WHOLE = Share()


class _Steps:
    """grain source whose element s is this process's rows of the batch of step s."""

    def __init__(self, makes: Sequence[Make], plan: Plan, stop: int, share: Share):
        self._makes, self._plan, self._stop, self._share = makes, plan, stop, share

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, index: int) -> Arrays:
        stage = self._plan.stage(int(index))
        mine = self._plan.indices(int(index))[self._share.rows(stage.size)]
        try:
            return self._makes[stage.phase](mine)
        except StopIteration as error:  # would pass for the end of the run
            raise RuntimeError(f"the examples of step {index} ended") from error


def host_batches(
    makes: Sequence[Make],
    plan: Plan,
    start: int,
    stop: int,
    share: Share = WHOLE,
    workers: int = 0,
) -> Iterator[Arrays]:
    """Batches of steps start … stop − 1 as numpy, of each the rows of `share`.

    Args:
      makes: for each phase, example indices (B,) to arrays of B rows; picklable if there are
        workers.
      workers: grain processes that read ahead; 0 reads in a thread.
    """
    source = _Steps(makes, plan, stop, share)
    steps = grain.MapDataset.source(source)[start:]
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    ahead = steps.to_iter_dataset(reading)
    if workers:
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which we do not use
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        ahead = ahead.mp_prefetch(options, worker_init_fn=_leave_with_parent)
    return iter(ahead)


def _leave_with_parent(index: int, count: int) -> None:
    """Ends this worker when the process that reads from it is gone, however it went."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def share_of(process: int) -> Share:
    """The rows that a process builds: those that its devices hold on the mesh in use."""
    count = sharding.axis_size(*sharding.BATCH_AXES)
    placed = sharding.batch_sharding().devices_indices_map((count,)).items()
    mine = {index[0].indices(count)[0] for d, index in placed if d.process_index == process}
    return Share(tuple(sorted(mine)), count)


def place(batch: Arrays, size: int, share: Share) -> dict[str, jax.Array]:
    """This process's rows as part of global arrays of `size` rows, sharded over the batch axes."""
    numbers, placed = share.rows(size), sharding.batch_sharding()

    def globally(rows: np.ndarray) -> jax.Array:
        def local(index: Any) -> np.ndarray:
            lo, hi, _ = index[0].indices(size)
            at = int(np.searchsorted(numbers, lo))
            return rows[at : at + hi - lo]

        return jax.make_array_from_callback((size, *rows.shape[1:]), placed, local)

    with jax.transfer_guard("allow"):  # the one transfer of a step that is meant
        return {name: globally(rows) for name, rows in batch.items()}


def batches(
    makes: Sequence[Make], plan: Plan, start: int, stop: int, workers: int = 0
) -> Iterator[dict[str, jax.Array]]:
    """Device batches of steps start … stop − 1, each placed while the step before it runs."""
    share = share_of(jax.process_index())
    ahead = None
    host = host_batches(makes, plan, start, stop, share, workers)
    for step, batch in zip(range(start, stop), host, strict=True):
        placed = place(batch, plan.stage(step).size, share)
        if ahead is not None:
            yield ahead
        ahead = placed
    if ahead is not None:
        yield ahead
