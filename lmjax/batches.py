# SPDX-License-Identifier: Apache-2.0
"""Step number → global sharded batch. The data cursor is the step; no iterator state exists.

The batch of step s is a run of consecutive global example indices; example i is a pure function of
(store, seed, i). A process builds the rows that its devices hold and no others, so any number of
hosts, devices and workers sees the same batches.
"""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lmjax import sharding

Arrays = dict[str, np.ndarray]


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


class Plan:
    """Which examples each step sees: the arithmetic of batch sizes."""

    def __init__(self, batch: int, example_tokens: int, ramp: Ramp | None = None) -> None:
        """`batch` examples a step, each of `example_tokens` targets, after the ramp if any."""
        sizes = [] if ramp is None else list(range(ramp.start, batch, ramp.increment))
        self.sizes, self.first_step, self.first_example = [], [0], [0]
        for size in sizes:
            assert ramp is not None
            steps = -(-int(ramp.tokens) // (len(sizes) * size * example_tokens))
            self.sizes.append(size)
            self.first_step.append(self.first_step[-1] + steps)
            self.first_example.append(self.first_example[-1] + steps * size)
        self.sizes.append(batch)
        self.example_tokens = example_tokens

    def examples(self, step: int) -> tuple[int, int]:
        """First global example of a step, and how many."""
        stage = bisect.bisect_right(self.first_step, step) - 1
        size = self.sizes[stage]
        return self.first_example[stage] + (step - self.first_step[stage]) * size, size

    def tokens_after(self, steps: Any) -> Any:
        """Tokens seen in that many steps; float32 when traced."""
        if isinstance(steps, (int, np.integer)):
            return self.examples(int(steps))[0] * self.example_tokens
        starts, sizes = jnp.asarray(self.first_step), jnp.asarray(self.sizes, jnp.float32)
        stage = jnp.searchsorted(starts, steps, side="right") - 1
        before = jnp.asarray(self.first_example, jnp.float32)[stage]
        examples = before + (steps - starts[stage]).astype(jnp.float32) * sizes[stage]
        return examples * self.example_tokens

    def check(self, accumulate: int) -> None:
        """Raises ValueError for a batch that the mesh and the microbatches do not divide."""
        rows = sharding.axis_size(*sharding.BATCH_AXES)
        for size in self.sizes:
            if size < 1 or size % (rows * accumulate):
                raise ValueError(
                    f"batch={size} cannot be split over {rows} devices (mesh data × fsdp) times "
                    f"accumulate={accumulate}; it must be a multiple of {rows * accumulate}"
                )


class _Steps:
    """grain source whose element s is this process's rows of the batch of step s."""

    def __init__(self, make: Callable[[np.ndarray], Arrays], plan: Plan, stop: int, share: Any):
        self._make, self._plan, self._stop, self._share = make, plan, stop, share

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, index: int) -> Arrays:
        first, size = self._plan.examples(int(index))
        lo, hi = self._share[0] * size // self._share[2], self._share[1] * size // self._share[2]
        return self._make(np.arange(first + lo, first + hi))


def host_batches(
    make: Callable[[np.ndarray], Arrays],
    plan: Plan,
    start: int,
    stop: int,
    share: tuple[int, int, int] = (0, 1, 1),
    workers: int = 0,
) -> Iterator[Arrays]:
    """Batches of steps start … stop − 1 as numpy: part [a/n, b/n) of each for share (a, b, n).

    Args:
      make: global example indices (B,) to arrays of B rows; picklable if there are workers.
      workers: grain processes that read ahead; 0 reads in a thread.
    """
    source = _Steps(make, plan, stop, share)
    steps = grain.MapDataset.source(source)[start:]
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    ahead = steps.to_iter_dataset(reading)
    if workers:
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which we do not use
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        ahead = ahead.mp_prefetch(options)
    return iter(ahead)


def my_share() -> tuple[int, int, int]:
    """This process's rows of a batch as (a, b, n): part [a/n, b/n), by where its devices lie."""
    rows = sharding.axis_size(*sharding.BATCH_AXES)
    placed = sharding.batch_sharding().addressable_devices_indices_map((rows,))
    mine = [index[0].indices(rows)[:2] for index in placed.values() if index]
    return min(lo for lo, _ in mine), max(hi for _, hi in mine), rows


def place(batch: Arrays, size: int, share: tuple[int, int, int]) -> dict[str, jax.Array]:
    """This process's rows as part of global arrays of `size` rows, sharded over the batch axes."""
    first = share[0] * size // share[2]
    placed = sharding.batch_sharding()

    def globally(rows: np.ndarray) -> jax.Array:
        def local(index: Any) -> np.ndarray:
            lo, hi, _ = index[0].indices(size)
            return rows[lo - first : hi - first]

        return jax.make_array_from_callback((size, *rows.shape[1:]), placed, local)

    with jax.transfer_guard("allow"):  # the one transfer of a step that is meant
        return {name: globally(rows) for name, rows in batch.items()}


def batches(
    make: Callable[[np.ndarray], Arrays], plan: Plan, start: int, stop: int, workers: int = 0
) -> Iterator[dict[str, jax.Array]]:
    """Device batches of steps start … stop − 1, each placed while the step before it runs."""
    share = my_share()
    ahead = None
    host = host_batches(make, plan, start, stop, share, workers)
    for step, batch in zip(range(start, stop), host, strict=False):
        placed = place(batch, plan.examples(step)[1], share)
        if ahead is not None:
            yield ahead
        ahead = placed
    if ahead is not None:
        yield ahead
