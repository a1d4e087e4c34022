# SPDX-License-Identifier: Apache-2.0
"""The train step of a run, compiled once for each shape of its batches, and said when it is."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from lmjax import executables, recipe, sharding
from lmjax.batches import Stage
from lmjax.compilation import Compiled, compiled, without_cache
from lmjax.run import Run
from lmjax.step import State, abstract_state, jit_train_step, make_train_step

Say = Callable[[str], None]

# What the compiled step does not know of; the mesh is told by the devices.
_OUTSIDE = (
    "log_every",
    "evaluate_every",
    "evaluate_windows",
    "save_every",
    "keep",
    "workers",
    "skip_batches",
    "max_skipped",
    "check_every",
)


class Programs:
    """`programs(step, state, batch) → (state, metrics)`, compiled where the batch's shape changes.

    Another batch size or length is another program; a new stage of the run with the old shapes is
    not.
    """

    def __init__(self, run: Run, say: Say, saved: Path | None = None) -> None:
        """`saved`: a folder of steps that `save` compiled, to be taken where they agree."""
        self._run, self._plan, self._say, self._saved = run, run.plan(), say, saved
        self._stage: Stage | None = None
        self._program: Any = None

    def __call__(self, step: int, state: State, batch: Any) -> Any:
        """Step number `step`, from 0."""
        stage = self._plan.stage(step)
        if stage is not self._stage:
            before = self._stage and _shape(self._run, self._stage)
            if _shape(self._run, stage) != before:
                self._compile(step, stage, state, batch)
            self._stage = stage
        return self._program(state, batch)

    def _compile(self, step: int, stage: Stage, state: State, batch: Any) -> None:
        size = f"batch {stage.size:,} × {stage.example_tokens:,}"
        if self._program is not None:
            self._say(f"{size} from step {step + 1:,}: compiling")
        if self._saved is not None:
            devices = _devices()
            about = _about(self._run, stage)
            found = executables.load(self._saved, about, state, batch, devices)
            if not isinstance(found, str):
                self._program = found
                self._say(f"{size}: the step was compiled before, in {self._saved}")
                return
            self._say(f"compiling anew: {found}")
        done = compiled(partial(lower, self._run, stage.phase, state, batch))
        self._program = done.program
        self._say(f"{size}: {_outcome(done)}")


def _outcome(done: Compiled) -> str:
    if done.cached:
        return f"the step came from the compilation cache in {done.seconds:.1f} s"
    return f"compiled the step in {done.seconds:.1f} s"


def _shape(run: Run, stage: Stage) -> Any:
    """What a program is compiled for."""
    maker = run.makers()[stage.phase]
    return stage.size, run.microbatches()[stage.phase], sorted(maker.arrays().items())


def lower(run: Run, phase: int, state: State, batch: Any) -> Any:
    """The train step of a phase, traced for arrays or shapes that are placed; seconds."""
    accumulate = run.microbatches()[phase]
    step = make_train_step(
        run.model, run.loss, run.optimiser(), run.schedule(), run.seed, accumulate
    )
    return jit_train_step(step, state).lower(state, batch)


def batch_shapes(run: Run, phase: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of a phase, as its example maker lays it out, placed on the mesh in use."""
    placed = sharding.batch_sharding()
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=placed)
        for name, (shape, dtype) in run.makers()[phase].arrays().items()
    }


def save(run: Run, folder: Path, say: Say) -> list[Path]:
    """Compiles every step of a run for the devices of the mesh in use, and writes them down.

    Raises:
      ValueError: the batch does not fit the mesh, or the folder is not the user's alone.
    """
    run.check()
    state = abstract_state(run.model, run.optimiser(), run.batch)
    stages = {str(_shape(run, stage)): stage for stage in run.plan().stages}
    paths = []
    for stage in stages.values():
        say(f"compiling to save: batch {stage.size:,} × {stage.example_tokens:,} …")
        batch = batch_shapes(run, stage.phase, stage.size)
        with without_cache():
            done = compiled(partial(lower, run, stage.phase, state, batch))
        paths.append(executables.save(done.program, folder, _about(run, stage)))
    return paths


def _about(run: Run, stage: Stage) -> executables.About:
    """What the step of a stage depends on."""
    resolved = {k: v for k, v in recipe.to_json(run).items() if k not in (*_OUTSIDE, "mesh")}
    resolved["data"] = {"examples": resolved["data"]["examples"]}
    return {
        **executables.here(_devices()),
        "mesh": {axis: sharding.axis_size(axis) for axis in sharding.AXES},
        "batch": stage.size,
        "length": stage.example_tokens,
        "phase": stage.phase,
        "recipe": resolved,
    }


def _devices() -> list[Any]:
    """Of the mesh in use, in its order."""
    here = sharding.mesh()
    assert here is not None, "steps are compiled under sharding.use(mesh)"
    return list(here.devices.flat)
