# SPDX-License-Identifier: Apache-2.0
"""Updates that were skipped because a number was not finite: said, counted, and when too many."""

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from lmjax import hosts, recipe
from lmjax.data import Prepared
from lmjax.run import Run
from lmjax.seen import documents_seen
from lmjax.steps import folder, newest_in_words, newest_step
from lmjax.workdir import write_text


class Skips:
    """Watches the metrics of each step; ends the run after too many skipped updates in a row."""

    def __init__(
        self, run: Run, prepared: Prepared, workdir: Path, before: Callable[[], None]
    ) -> None:
        """`before` is called before the run is ended: it finishes what is being saved."""
        self._run, self._prepared, self._workdir = run, prepared, workdir
        self._before = before
        self._row: deque[int] = deque(maxlen=run.max_skipped or 1)

    @property
    def in_row(self) -> bool:
        """Whether the last update was skipped."""
        return bool(self._row)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of the next step.

        Raises:
          ValueError: so many updates in a row were skipped as the recipe allows; names the file
            with the documents of their batches.
        """
        if not values["skipped"]:
            self._row.clear()
            return
        self._row.append(step)
        measured = f"loss {values['loss']}, gradient norm {values['gradient_norm']}"
        print(f"step {step:,}: {measured}: the update is skipped")
        if self._run.max_skipped and len(self._row) == self._run.max_skipped:
            raise self._too_many()

    def _too_many(self) -> ValueError:
        self._before()
        path = self._workdir / f"skipped-{self._row[-1]}.json"
        seen = [documents_seen(self._run, self._prepared, step) for step in self._row]
        if hosts.is_first():
            write_text(path, recipe.dump(seen))
        steps = [s for s in self._row if s > (newest_step(self._workdir) or 0)] or list(self._row)
        plan = self._run.plan()
        span = (plan.batches_of(steps[0] - 1)[0] + 1, plan.batches_of(steps[-1] - 1)[1] + 1)
        spans = ",".join(f"{a}:{b}" for a, b in (*self._run.skip_batches, span))
        return ValueError(
            f"{len(self._row)} updates in a row were skipped, steps {self._row[0]:,} to"
            f" {self._row[-1]:,}: no finite loss or gradient; {newest_in_words(self._workdir)}."
            f" {path} names the documents of their batches. To go on without these:"
            f" --skip_batches={spans} --allow=skip_batches. If the next ones fail as well, lower"
            f" the learning rate or move newer steps out of {folder(self._workdir)}, to go on from"
            " an older one"
        )
