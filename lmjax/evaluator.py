# SPDX-License-Identifier: Apache-2.0
"""The evaluator: means of every loss over a held-out split, compiled once, used often."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lmjax import batches, cpu, sharding
from lmjax.data import Prepared
from lmjax.recipe import nearest
from lmjax.run import Run
from lmjax.step import make_eval_step, total_of


class Evaluator:
    """Scores one split of a run's data; compiled once, used as often as wanted."""

    def __init__(
        self, run: Run, prepared: Prepared, split: str, windows: int = 0, phase: int = 0
    ) -> None:
        """The first `windows` examples of `split`, or all of them, as the phase makes them.

        Raises:
          ValueError: no such split, or one with fewer tokens than an example.
        """
        splits = prepared.store.splits
        if split not in splits:
            near = nearest(split, splits)
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"there is no {split} split: one of {', '.join(splits)}{hint}")
        self.split = splits[split]
        self._model, self._total = run.model, total_of(run.loss)
        self.examples = run.makers()[phase]
        unknown = prepared.store.manifest["splits"][split]["unknown"]
        self.lossless = prepared.tokenizer.lossless and not unknown
        count = self.examples.held_out_count(self.split)
        self.windows = min(windows, count) if windows else count
        self.rows, self.length = run.batch_sizes()[phase], self.examples.length
        self._plan = batches.Plan(self.rows, self.length)
        self._step = self._jitted(run.loss)

    def _jitted(self, function: Any) -> Callable[[Any, Any], Any]:
        step = make_eval_step(self._model, function)
        # Whole on every process.
        placed = sharding.replicated()
        return jax.jit(step, out_shardings=placed, compiler_options=cpu.compiler_options())

    def _make(self, windows: np.ndarray) -> batches.Arrays:
        """Held-out examples (B, …); those past the end are blank, without weight."""
        batch = self.examples.held_out(self.split, np.minimum(windows, self.windows - 1))
        past = windows >= self.windows
        for rows in batch.values():
            rows[past] = 0
        return batch

    def _each(self, step: Callable[[Any, Any], Any], params: Any) -> list[Any]:
        steps = -(-self.windows // self.rows)
        return [step(params, b) for b in batches.batches((self._make,), self._plan, 0, steps)]

    def __call__(self, params: Any) -> dict[str, float]:
        """Mean of everything per unit of weight, `<name>_weight`, the units, and `loss`.

        Raises:
          ValueError: nothing in the split has any weight.
        """
        parts = self._each(self._step, params)
        result = {}
        for name in parts[0]:  # summed on the host: float32 would lose the last digits
            sums, weights = zip(*(jax.device_get(part[name]) for part in parts), strict=True)
            weight = float(np.sum(weights, dtype=np.float64))
            result[name] = float(np.sum(sums, dtype=np.float64)) / max(weight, 1.0)
            result[f"{name}_weight"] = weight
        if not any(result[f"{name}_weight"] for name in parts[0]):
            raise ValueError(
                f"the {self.split.name} split has nothing to score: none of its {self.windows:,}"
                f" examples counts for {' or '.join(parts[0])}; hold out more text"
            )
        means = {name: result[name] for name in parts[0]}
        return {"loss": self._total(means), **result}

    def collect(self, params: Any, function: Any) -> list[np.ndarray]:
        """Arrays (rows, …) of `function(outputs, batch)` over the split, row after row."""
        parts = self._each(self._jitted(function), params)
        return [np.concatenate(jax.device_get(part)) for part in zip(*parts, strict=True)]

    def host_arrays(self, *names: str) -> dict[str, np.ndarray]:
        """Arrays (examples, …) of all examples, of those names that they have."""
        parts: dict[str, list[np.ndarray]] = {}
        for first in range(0, self.windows, 1024):
            batch = self._make(np.arange(first, min(first + 1024, self.windows)))
            for name in batch.keys() & set(names):
                parts.setdefault(name, []).append(batch[name])
        return {name: np.concatenate(part) for name, part in parts.items()}
