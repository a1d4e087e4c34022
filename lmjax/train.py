# SPDX-License-Identifier: Apache-2.0
"""The story of a run: prepare the data, resume or begin, step, score, save, report."""

import contextlib
import errno
import itertools
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax import cpu, hosts, recipe, sharding
from lmjax.batches import batches
from lmjax.checkpoint import Checkpoints, saved_recipe
from lmjax.data import Prepared
from lmjax.document import redacted
from lmjax.evaluate import Evaluator
from lmjax.executables import source
from lmjax.hardware import checked_step
from lmjax.metrics import METRICS_FILE, MetricsWriter, Throughput, read_metrics
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
    refuse_edited_recipe,
    refuse_other_recipe,
    refuse_other_text,
    refuse_skipping_the_past,
)

Note = Callable[[int, Any, Any], None]
_PLACES = re.compile(r"data\.store|data\.corpus\.data_dir")  # may differ from host to host


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

    SIGTERM, SIGINT and SIGHUP save and return; a second signal ends the process at once.

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
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        cpu.keep_freed_memory()
    with (
        _full_disk(workdir),
        RunLock(workdir) if hosts.is_first() else contextlib.nullcontext(),
        sharding.use(run.mesh.mesh()),
    ):
        run.check()
        _refuse_unlike(run, {"--allow": ",".join(allow), "--until": stop_at})
        begun = newest_step(workdir) is not None
        step, saved = saved_recipe(workdir)
        if begun:
            refuse_edited_recipe(workdir, step, saved)
            refuse_other_recipe(run, workdir, allow)
        prepared = _prepared(run, workdir, allow if begun else None)
        recorded = recipe.to_json(run)
        with contextlib.closing(Checkpoints(workdir, recorded, run.keep, print)) as checkpoints:
            state, first = _resume_or_begin(run, workdir, checkpoints)
            if begun:
                refuse_skipping_the_past(run, workdir, first)
            if hosts.is_first():  # not before: a start that is refused changes no record
                record(run, workdir, about, prepared, saved)
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


def _refuse_unlike(run: Run, flags: dict[str, Any]) -> None:
    """Raises ValueError on all processes where one was started with another recipe, or other code:
    they would wait for each other for ever, or compute nonsense together.
    """
    if jax.process_count() == 1:
        return
    mine = {
        "the code of lmjax": source()[:12],
        **flags,
        **dict(recipe.flatten(recipe.to_json(run))),
    }
    first, *others = (
        {key: value for key, value in json.loads(text).items() if not _PLACES.fullmatch(key)}
        for text in hosts.gathered(json.dumps(mine))
    )
    for index, other in enumerate(others, 1):
        if changes := recipe.difference(first, other):
            lines = "".join(f"\n  {key}: {old}, there {new}" for key, old, new in changes)
            raise ValueError(
                f"process {index} was not started as process 0 was:{redacted(lines)}\n"
                "Start all of them with one command"
            )


def _prepared(run: Run, workdir: Path, allow: tuple[str, ...] | None) -> Prepared:
    """The data; the first process builds what is not there.

    allow: what may differ from what the run began with; None where it begins.
    """
    if not hosts.is_first():
        hosts.wait_for_all("data")
        return run.data.prepare(workdir)
    prepared = run.data.prepare(workdir, Work("tokenising"))
    check_data(run, prepared)
    keep_tokenizer(prepared.tokenizer.directory, workdir)
    if allow is not None:
        refuse_other_text(prepared, workdir, allow)
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

    unscored = hosts.of_first(log.unscored(span.start))  # a stop came before the score was made
    with jax.transfer_guard("disallow"):
        if unscored and (score := scores[plan.stage(span.start - 1).phase]):
            log.scored(span.start, score(state.params))
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
            if saving and skips.in_row and done < run.steps:
                log.say(f"step {done:,} is not saved: its update was skipped")
            elif saving:
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
        self._run, self._workdir, self._plan = run, workdir, run.plan()
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
            values = values | _named(held_out)
            self._throughput.restart()
        due = _due(step, self._run.log_every) or _due(step, self._run.evaluate_every)
        if held_out is not None or due or step == self._run.steps or values["skipped"]:
            values |= {"tokens": tokens, "tokens_per_second": rate}
            if self._peak:  # model FLOPs utilisation
                length = self._plan.stage(step - 1).example_tokens
                values["mfu"] = rate * self._flops_per_token(length) / self._peak
            self._writer.write(step, values)

    def unscored(self, step: int) -> bool:
        """Whether a score was due after `step`, and its line has none."""
        if step == 0 or not _due(step, self._run.evaluate_every):
            return False
        last = read_metrics(self._workdir)[-1:]
        return any(line["step"] == step and "held_out_loss" not in line for line in last)

    def scored(self, step: int, held_out: dict[str, float]) -> None:
        """The validation scores of the last line, late."""
        values = read_metrics(self._workdir)[-1]
        assert values.pop("step") == step
        self._writer.close()
        self._writer = MetricsWriter(self._workdir, step - 1)
        self._writer.write(step, values | _named(held_out))
        self._throughput.restart()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.say(text)

    def close(self) -> None:
        """Flushes and closes."""
        self._bar.close()
        self._writer.close()


def _named(held_out: dict[str, float]) -> dict[str, float]:
    means = {k: v for k, v in held_out.items() if not k.endswith("_weight")}
    return {f"held_out_{name}": value for name, value in means.items()}


class Silent:
    """The recorder of the processes that write nothing."""

    def unscored(self, step: int) -> bool:
        """The first process knows."""
        return False

    def scored(self, step: int, held_out: Any) -> None:
        """There is nothing to write."""

    def step(self, step: int, values: Any, held_out: Any = None) -> None:
        """There is nothing to write."""

    def say(self, text: str) -> None:
        """One voice is enough."""

    def close(self) -> None:
        """There is nothing to close."""


def _resume_or_begin(run: Run, workdir: Path, checkpoints: Checkpoints) -> tuple[State, int]:
    if checkpoints.latest() is None:
        if (workdir / METRICS_FILE).exists():
            print(f"{workdir} holds metrics, but no step: starting from the beginning")
        return create_state(run.model, run.optimiser(), run.seed, run.batch), 0
    state = checkpoints.restore(abstract_state(run.model, run.optimiser(), run.batch))
    step = int(state.step)
    print(f"resumed at step {step:,}" + (" (finished)" if step >= run.steps else ""))
    return state, step


class _Stop:
    """True once SIGTERM, SIGINT or SIGHUP has come; the second signal ends the process at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        with contextlib.suppress(ValueError):  # not the main thread: signals are not ours
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
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
