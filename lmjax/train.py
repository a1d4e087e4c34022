# SPDX-License-Identifier: Apache-2.0
"""The story of a run: prepare the data, resume or begin, step, score, save, report."""

import contextlib
import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax import cpu, hosts, recipe, sharding
from lmjax.batches import batches
from lmjax.checkpoint import Checkpoints
from lmjax.data import Prepared
from lmjax.evaluate import Evaluator
from lmjax.hardware import checked_step
from lmjax.metrics import MetricsWriter, Throughput
from lmjax.peaks import peak_flops
from lmjax.programs import Programs
from lmjax.progress import Progress, Work
from lmjax.report import write_report
from lmjax.run import Run
from lmjax.skips import Skips
from lmjax.step import State, abstract_state, create_state
from lmjax.steps import newest_in_words, newest_step
from lmjax.witness import Witness
from lmjax.workdir import (
    RunLock,
    check_data,
    keep_tokenizer,
    record,
    refuse_other_recipe,
    refuse_skipping_the_past,
)

Note = Callable[[int, Any, Any], None]


def train(
    run: Run,
    workdir: Path,
    about: dict[str, str],
    allow: tuple[str, ...] = (),
    stop_at: int = 0,
    compiled: Path | None = None,
    witness: Path | None = None,
) -> int:
    """Trains until `run.steps`, resuming what `workdir` holds; returns the step that it reached.

    SIGTERM and SIGINT save and return; a second signal ends the process at once.

    Args:
      about: name and description of the experiment, for the records.
      allow: dotted keys that may differ from the recorded recipe.
      stop_at: leave early, after this step, as a signal would (0: never).
      compiled: a folder of steps that `plan --save` compiled.
      witness: a file to write each step's batch and loss to, by `lmjax.witness`; slows the run.

    Raises:
      ValueError: the recipe, the data or the checkpoint do not fit each other.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(workdir) if hosts.is_first() else contextlib.nullcontext()
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        cpu.keep_freed_memory()
    with lock, _full_disk(workdir), sharding.use(run.mesh.mesh()):
        run.check()
        newest = newest_step(workdir)
        if newest is not None:
            refuse_other_recipe(run, workdir, allow)
            refuse_skipping_the_past(run, workdir, newest)
        prepared = _prepared(run, workdir, about)
        recorded = recipe.to_json(run)
        with contextlib.closing(Checkpoints(workdir, recorded, run.keep, print)) as checkpoints:
            state, first = _resume_or_begin(run, checkpoints)
            end = min(stop_at or run.steps, run.steps)
            if first < end:
                log = Recorder(run, workdir, first) if hosts.is_first() else Silent()
                with contextlib.closing(log), _Stop() as stop, _noted(witness) as note:
                    programs = Programs(run, log.say, compiled)
                    state = _loop(
                        run, prepared, state, range(first, end), workdir, programs, log,
                        checkpoints, stop, note,
                    )  # fmt: skip
    if hosts.is_first():
        print(f"report: {write_report(workdir)}")
    return int(state.step)


@contextlib.contextmanager
def _noted(path: Path | None) -> Iterator[Note]:
    """What is told of each step: its number, batch and metrics."""
    if path is None:
        yield lambda step, batch, metrics: None
        return
    with contextlib.closing(Witness(path)) as witness:
        yield witness.step


@contextlib.contextmanager
def _full_disk(workdir: Path) -> Iterator[None]:
    """Raises ValueError with the way out where a file of the run finds no space."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"no space left on the disk of {workdir}; {newest_in_words(workdir)}; make space, then"
            " start again"
        ) from None


def _prepared(run: Run, workdir: Path, about: dict[str, str]) -> Prepared:
    """The data; the first process builds what is not there, and writes down what the run is."""
    if not hosts.is_first():
        hosts.wait_for_all("data")
        return run.data.prepare(workdir)
    prepared = run.data.prepare(workdir, Work("tokenising"))
    check_data(run, prepared)
    keep_tokenizer(prepared.tokenizer.directory, workdir)
    record(run, workdir, about)
    hosts.wait_for_all("data")
    return prepared


def _loop(
    run: Run,
    prepared: Prepared,
    state: State,
    span: range,
    workdir: Path,
    programs: Programs,
    log: "Recorder | Silent",
    checkpoints: Checkpoints,
    stop: "_Stop",
    note: Note,
) -> State:
    """The steps of `span`. The host never waits for the step that it just started."""
    plan, phases = run.plan(), range(len(run.makers()))
    examples = [
        partial(maker.train, prepared.store.splits["train"], run.seed) for maker in run.makers()
    ]
    # Every phase now, so that text which is too short for one is not found out days later.
    for make in examples[1:]:
        make(np.arange(1))
    scores = [_evaluator(run, prepared, phase) for phase in phases]
    skips = Skips(run, prepared, workdir, checkpoints.finish)
    agreed = hosts.Agreement()
    late: tuple[int, Any] | None = None  # the step before: fetched while this one runs

    def settle(step: int, metrics: Any, held_out: dict[str, float] | None = None) -> None:
        """Waits until a step is done; what it measured is written down, and judged."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        log.step(step, values, held_out)
        skips.step(step, values)

    with jax.transfer_guard("disallow"):
        steps = batches(examples, plan, span.start, span.stop, run.workers)
        for done, batch in zip(itertools.count(span.start + 1), steps, strict=False):
            if _due(done, run.check_every):
                state, metrics = checked_step(partial(programs, done - 1), state, batch, done)
            else:
                state, metrics = programs(done - 1, state, batch)
            if late is not None:
                settle(*late)
            late = (done, metrics)
            stopping = agreed(bool(stop))
            note(done, batch, metrics)
            last = done == span.stop or stopping
            scoring = not stopping and (last or _due(done, run.evaluate_every))
            saving = last or _due(done, run.save_every)
            if scoring or saving:  # both wait for the step anyway, and a saved step has its line
                score = scores[plan.stage(done - 1).phase] if scoring else None
                settle(*late, held_out=score(state.params) if score else None)
                late = None
            if saving:
                checkpoints.save(done, state)
            checkpoints.check()
            if last:
                break
        if late is not None:
            settle(*late)
        checkpoints.finish()
    return state


def _evaluator(run: Run, prepared: Prepared, phase: int) -> Evaluator | None:
    if "validation" not in prepared.store.splits:
        return None
    return Evaluator(run, prepared, "validation", run.evaluate_windows, phase)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Recorder:
    """Writes what the loop learns: metrics.jsonl, TensorBoard and the progress bar."""

    def __init__(self, run: Run, workdir: Path, first: int) -> None:
        self._plan, self._every, self._steps = run.plan(), run.log_every, run.steps
        self._flops_per_token, self._peak = run.model.flops_per_token, peak_flops(jax.devices())
        self._writer = MetricsWriter(workdir, first)
        self._throughput = Throughput()
        self._bar = Progress(run.steps, first, run.batch * run.data.examples.length)

    def step(
        self, step: int, values: dict[str, float], held_out: dict[str, float] | None = None
    ) -> None:
        """What was measured in step `step`, and the validation scores if it was scored then."""
        tokens = self._plan.tokens_after(step)
        rate = self._throughput.update(tokens - self._plan.tokens_after(step - 1))
        held_out_loss = held_out["loss"] if held_out else None
        self._bar.update(step, values["loss"], rate, held_out_loss)
        if held_out is not None:
            means = {k: v for k, v in held_out.items() if not k.endswith("_weight")}
            values = values | {f"held_out_{name}": value for name, value in means.items()}
            self._throughput.restart()
        logged = step % self._every == 0 or step == self._steps or values["skipped"]
        if held_out is not None or logged:
            values |= {"tokens": tokens, "tokens_per_second": rate}
            if self._peak:  # model FLOPs utilisation
                length = self._plan.stage(step - 1).example_tokens
                values["mfu"] = rate * self._flops_per_token(length) / self._peak
            self._writer.write(step, values)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.say(text)

    def close(self) -> None:
        """Flushes and closes."""
        self._bar.close()
        self._writer.close()


class Silent:
    """The recorder of the processes that write nothing."""

    def step(self, step: int, values: Any, held_out: Any = None) -> None:
        """There is nothing to write."""

    def say(self, text: str) -> None:
        """One voice is enough."""

    def close(self) -> None:
        """There is nothing to close."""


def _resume_or_begin(run: Run, checkpoints: Checkpoints) -> tuple[State, int]:
    if checkpoints.latest() is None:
        return create_state(run.model, run.optimiser(), run.seed, run.batch), 0
    state = checkpoints.restore(abstract_state(run.model, run.optimiser(), run.batch))
    step = int(state.step)
    print(f"resumed at step {step:,}" + (" (finished)" if step >= run.steps else ""))
    return state, step


class _Stop:
    """True once SIGTERM or SIGINT has come; the second signal ends the process at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        with contextlib.suppress(ValueError):  # not the main thread: signals are not ours
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True
        print(f"\n{signal.Signals(number).name}: saving, then leaving (again: leave at once)")

    def __bool__(self) -> bool:
        return self._asked
