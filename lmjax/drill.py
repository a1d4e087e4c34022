# SPDX-License-Identifier: Apache-2.0
"""Proves on a recipe what resuming promises: kills it, damages it, moves it, and compares.

Bits are compared where the mesh is the same: parameters, the optimiser's and the carried state at
the end, and the loss and the batch of every step, repeated ones too. On other meshes and numbers of
processes batches are equal to the bit and losses within `CLOSE`. Controls, another seed and a
skipped batch, must differ, or the comparison would prove nothing.
"""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lmjax.drill_runs import Trainer
from lmjax.run import Run
from lmjax.steps import all_steps, damaged_folders
from lmjax.steps import folder as checkpoints_of
from lmjax.verify import unequal_arrays
from lmjax.witness import Seen
from lmjax.workdir import read_json

CLOSE = 1e-5  # largest relative difference of a loss on another mesh
_LENGTH = 40  # steps at least, unless --steps says otherwise
_SAVES = 8
_SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")

Say = Callable[[str], None]


@dataclasses.dataclass
class Verdict:
    """What was compared, and what did not hold."""

    held: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(_SIGNALS, 0))

    def check(self, name: str, *problems: str) -> bool:
        """Counts a comparison, which holds if there are no problems."""
        self.held += not problems
        self.failed += [f"{name}: {problem}" for problem in problems]
        return not problems

    def count(self, what: str, many: int = 1) -> None:
        """Notes that something was done to a run."""
        self.counts[what] = self.counts.get(what, 0) + many

    def sentence(self) -> str:
        """All of it in one."""
        done = ", ".join(f"{many}× {what}" for what, many in self.counts.items() if many)
        done = done or "nothing"
        total = self.held + len(self.failed)
        if not self.failed:
            return f"drill: all {total} comparisons hold after {done}"
        return f"drill: {len(self.failed)} of {total} comparisons FAILED after {done}"


def drill(
    run: Run,
    arguments: Sequence[str],
    kills: int,
    seed: int,
    keep: Path | None,
    env: Mapping[str, str],
    say: Say = print,
) -> bool:
    """Tries everything on a recipe; whether all of it held. The last line says so in one sentence.

    Args:
      run: the recipe that `arguments` make.
      arguments: EXPERIMENT and its keys, as typed.
      kills: SIGKILLs at random moments, every other one during a save.
      seed: of the moments and the damage.
      keep: a new folder to leave all runs in; None: a temporary one, left only after a failure.
      env: the environment of the runs. They need the accelerator, if there is one, so this process
        must not hold it.
    """
    steps = run.steps if _typed(arguments) else max(_LENGTH, _each(kills) * 2)
    if steps < _each(kills):
        raise ValueError(
            f"--steps={steps}: a drill with --kills={kills} needs at least {_each(kills)} steps"
        )
    folder = Path(tempfile.mkdtemp(prefix="lmjax-drill-")) if keep is None else keep
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; a drill needs a folder of its own")
    trainer = Trainer(tuple(arguments), folder, timeout=1800, env=env)
    drilled = _Drill(run, steps, trainer, random.Random(seed), say)
    try:
        with _interruptible():
            drilled.everything(kills)
    except KeyboardInterrupt:
        trainer.kill()
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    verdict = drilled.verdict
    for failure in verdict.failed:
        say(f"FAILED {failure}")
    if verdict.failed:
        say(f"the runs are in {folder}")
    elif keep is None:
        shutil.rmtree(folder)
    say(verdict.sentence())
    return not verdict.failed


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM as KeyboardInterrupt, so that nothing is left running or lying about."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _typed(arguments: Sequence[str]) -> bool:
    return any(a.partition("=")[0] == "--steps" for a in arguments)


def _each(kills: int) -> int:
    """Steps that are enough for so many kills, two signals and what follows them."""
    return 2 * (kills + 3)


class _Drill:
    def __init__(
        self, run: Run, steps: int, trainer: Trainer, draw: random.Random, say: Say
    ) -> None:
        self.steps = steps
        self.every = max(1, self.steps // _SAVES)
        fixed = {
            "steps": self.steps, "save_every": self.every, "keep": 3, "log_every": 1,
            "evaluate_every": 0, "evaluate_windows": 1, "data.store": trainer.folder / "store",
        }  # fmt: skip
        keys = tuple(f"--{key}={value}" for key, value in fixed.items())
        self.run, self.draw, self.say = run, draw, say
        self.trainer = dataclasses.replace(trainer, arguments=trainer.arguments + keys)
        self.verdict = Verdict()

    def everything(self, kills: int) -> None:
        """All parts; where one cannot go on it fails, and the next one is tried."""
        for part in (
            self.straight, lambda: self.stops(kills), self.damage, self.controls,
            self.meshes, self.processes,
        ):  # fmt: skip
            try:
                part()
            except ValueError as error:
                self.verdict.check("run", str(error))
                self.say("  FAILED, see below")
            if not self.verdict.held:
                break  # without the straight run there is nothing to compare with

    def straight(self) -> None:
        """The run that nothing happens to."""
        self.say(f"straight: {self.steps} steps, a checkpoint every {self.every}")
        self.trainer.run("straight")
        seen = self.trainer.seen("straight")
        self.by_step = {s.step: s for s in seen}
        missing = [] if len(self.by_step) == len(seen) == self.steps else [f"{len(seen)} steps"]
        self.verdict.check("straight", *missing)

    def stops(self, kills: int) -> None:
        """SIGKILLs, a SIGTERM and a SIGINT, each later than the one before."""
        numbers = [signal.SIGKILL] * kills
        for number in (signal.SIGTERM, signal.SIGINT):
            numbers.insert(self.draw.randint(0, len(numbers)), number)
        for i, number in enumerate(numbers):
            name = signal.Signals(number).name
            low, high = (self.steps * (i + j) // (len(numbers) + 1) for j in (0, 1))
            saving = number == signal.SIGKILL and i % 2 == 0
            step = self.draw.randint(low + 1, max(low + 1, high - 1))
            delay = self.draw.uniform(0, 0.02)
            hit = self.trainer.stopped("stopped", number, step, delay, saving)
            reached = self.trainer.seen("stopped")[-1].step
            self.say(f"{name}{' during a save' if saving else ''}: at step {reached}")
            if hit:
                self.verdict.count(name)
            elif reached >= self.steps:
                raise ValueError(f"{name} came after the end; give the run more --steps")
        self.trainer.run("stopped")
        self._same("stopped", bits=True)

    def damage(self) -> None:
        """The newest checkpoint flipped, cut, and without a file: the run goes on before it."""
        for kind, spoil in (("flipped", _flip), ("cut", _cut), ("robbed", _rob)):
            self._copy("straight", kind)
            newest = checkpoints_of(self.trainer.workdir(kind)) / str(self.steps)
            file = spoil(newest, self.draw)
            printed = self.trainer.run(kind)
            self.say(f"{kind}: {file.relative_to(newest.parent)}")
            self.verdict.count("damaged checkpoint")
            seen = self.trainer.seen(kind)
            before = (self.steps - 1) // self.every * self.every
            aside = damaged_folders(self.trainer.workdir(kind))
            back = len(aside) == 1 and seen[:1] and seen[0].step == before + 1
            problem = f"did not set step {self.steps} aside and go on from {before}:\n{printed}"
            self.verdict.check(f"{kind}: goes back", *([] if back else [problem]))
            self._same(kind, bits=True, whole=False)

    def controls(self) -> None:
        """Another seed and a skipped batch from the checkpoint before the last must differ."""
        last = max(s for s in all_steps(self.trainer.workdir("straight")) if s < self.steps)
        for name, key, allow in (
            ("another seed", f"--seed={self.run.seed + 1}", "--allow=seed"),
            (
                "a skipped batch",
                f"--skip_batches={last + 1}:{last + 2}",
                "--allow=skip_batches",
            ),
        ):
            folder = name.replace(" ", "_")
            self._copy("straight", folder)
            shutil.rmtree(checkpoints_of(self.trainer.workdir(folder)) / str(self.steps))
            self.trainer.run(folder, key, allow)
            differ = self._unequal(folder)
            self.say(f"control, {name}: {len(differ)} arrays differ")
            self.verdict.count("control")
            self.verdict.check(name, *([] if differ else ["must differ, and does not"]))

    def meshes(self) -> None:
        """8, 4 and 1 devices one after the other."""
        sizes = [n for n in (8, 4, 1) if self.run.batch % (n * self.run.accumulate) == 0]
        if not self._on_cpu() or len(sizes) < 2:
            why = f"batch={self.run.batch}" if self._on_cpu() else "the devices here are no CPU"
            self.say(f"meshes: not tried ({why})")
            return
        for i, devices in enumerate(sizes):
            end = self.steps * (i + 1) // len(sizes)
            mesh = _mesh(fsdp=min(2, devices))
            self.trainer.run("meshes", *mesh, f"--until={end}", devices=devices)
        self.say(f"meshes: {' → '.join(map(str, sizes))} devices")
        self.verdict.count("change of devices", len(sizes) - 1)
        self._same("meshes", bits=False)

    def processes(self) -> None:
        """Two processes with two devices each, then one with one."""
        if not self._on_cpu() or self.run.batch % (4 * self.run.accumulate):
            self.say("processes: not tried")
            return
        self.trainer.together("processes", 2, 2, *_mesh(fsdp=1), f"--until={self.steps // 2}")
        self.trainer.run("processes", *_mesh(fsdp=1), devices=1)
        self.say("processes: 2 → 1")
        self.verdict.count("change of processes")
        self._same("processes", bits=False)

    def _same(self, name: str, bits: bool, whole: bool = True) -> None:
        """Compares a run with the straight one, step by step, and their last states if bits are.

        whole: it made every step, not the last ones alone.
        """
        seen = self.trainer.seen(name)
        steps = {s.step for s in seen}
        if whole:
            missing = sorted(set(self.by_step) - steps)
            problems = [f"step {missing[0]} was never made"] if missing else []
            self.verdict.check(f"{name}: every step", *problems)
        other = [s for s in seen if s.batch != self.by_step[s.step].batch]
        self.verdict.check(f"{name}: batches", *_first(other, "saw another batch"))
        other = [s for s in seen if not self._near(s, bits)]
        self.verdict.check(f"{name}: losses", *_first(other, "has another loss"))
        worst = max((self._distance(s) for s in seen), default=0.0)
        if bits:
            differ = self._unequal(name)
            problems = [f"{len(differ)} arrays differ at the end, as {differ[0]}"] if differ else []
            self.verdict.check(f"{name}: parameters, optimiser and carried state", *problems)
        self.say(
            f"  {len(seen)} steps seen, {len(seen) - len(steps)} of them again; losses "
            + ("bit-equal" if worst == 0 else f"within {worst:.1e}")
        )

    def _near(self, one: Seen, bits: bool) -> bool:
        return one.loss == self.by_step[one.step].loss if bits else self._distance(one) <= CLOSE

    def _distance(self, one: Seen) -> float:
        straight = self.by_step[one.step].value
        return abs(one.value - straight) / max(abs(straight), 1e-30)

    def _unequal(self, name: str) -> list[str]:
        """Arrays of a run's last state that are not those of the straight one."""
        straight, other = self.trainer.workdir("straight"), self.trainer.workdir(name)
        return unequal_arrays(straight, other, self.steps)

    def _on_cpu(self) -> bool:
        """Whether the straight run had CPUs, of which there can be any number."""
        recorded = read_json(self.trainer.workdir("straight") / "environment.json")
        return list(recorded["devices"]) == ["cpu"]

    def _copy(self, source: str, name: str) -> None:
        shutil.copytree(self.trainer.workdir(source), self.trainer.workdir(name))


def _first(steps: Sequence[Seen], what: str) -> Iterator[str]:
    if steps:
        yield f"step {steps[0].step} {what} ({len(steps)} such)"


def _mesh(fsdp: int) -> tuple[str, ...]:
    return ("--mesh.data=-1", f"--mesh.fsdp={fsdp}", "--mesh.tensor=1", "--mesh.sequence=1")


def _arrays_of(step: Path) -> list[Path]:
    """Files of a checkpoint that hold arrays or say how to read them, the largest first.

    On a local disk a finished step is known by its name, so that Orbax's mark of success says
    nothing more.
    """
    files = [p for p in step.rglob("*") if p.is_file() and p.name != "commit_success.txt"]
    files = [p for p in files if p.stat().st_size]
    return sorted(files, key=lambda p: (-p.stat().st_size, p.name))


def _flip(step: Path, draw: random.Random) -> Path:
    """A bit in each KiB of the largest file: one alone may lie where nothing is read."""
    path = _arrays_of(step)[0]
    data = bytearray(path.read_bytes())
    for start in range(0, len(data), 1024):
        data[draw.randrange(start, min(start + 1024, len(data)))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return path


def _cut(step: Path, draw: random.Random) -> Path:
    """The largest file without its end."""
    path = _arrays_of(step)[0]
    os.truncate(path, draw.randrange(path.stat().st_size))
    return path


def _rob(step: Path, draw: random.Random) -> Path:
    """The largest file less."""
    path = _arrays_of(step)[0]
    path.unlink()
    return path
