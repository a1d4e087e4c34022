# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to the newest checkpoint: the state that is restored is one that was saved."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import ROOT
from faults import KINDS, Fault, inject

from lmjax import recipe, sharding
from lmjax.checkpoint import Checkpoints
from lmjax.sharding import Layout
from lmjax.step import State, abstract_state
from lmjax.steps import all_steps, folder

FAMILIES = ("demo", "bert_base", "elmo")  # a decoder, an encoder, one that carries its state
SAVED = (10, 20)


@cache
def target(family: str) -> State:
    """Shapes of the family's toy state."""
    run = recipe.load(str(ROOT / f"experiments/{family}.py"), tiny=True)
    return abstract_state(run.model, run.optimiser(), run.batch)


def state_at(family: str, step: int) -> State:
    """A random state."""
    random = np.random.default_rng(step)

    def draw(path: Any, x: Any) -> jax.Array:
        if sharding.path_of(path) == "step":
            return jax.device_put(np.int32(step), x.sharding)
        return jax.device_put(random.normal(size=x.shape).astype(x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(draw, target(family))


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module", autouse=True)
def _on_one_device():
    with sharding.use(Layout(1, 1, 1).mesh(jax.devices()[:1])):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Path, dict[int, list[bytes]]]]:
    """For each family, a folder with two steps and what is in them."""
    found = {}
    for family in FAMILIES:
        workdir, contents = tmp_path_factory.mktemp(family), {}
        checkpoints = Checkpoints(workdir, {"name": family}, 2, str)
        for step in SAVED:
            state = state_at(family, step)
            contents[step] = bits(state)
            checkpoints.save(step, state)
        checkpoints.close()
        found[family] = workdir, contents
    return found


def outcome(
    family: str, workdir: Path, contents: dict[int, list[bytes]], say: Callable[[str], Any]
) -> int:
    """The step that is restored after an accident; then a step more is saved and restored.

    What is restored must be what was saved.
    """
    checkpoints = Checkpoints(workdir, {"name": family}, 2, say)
    newest = checkpoints.latest()
    assert newest is not None
    state = checkpoints.restore(target(family))
    step = int(state.step)
    assert bits(state) == contents[step], "silently wrong"
    after = state.replace(step=state.step + 3)
    checkpoints.save(step + 3, after)
    checkpoints.close()
    assert all_steps(workdir)[-1] == step + 3
    again = Checkpoints(workdir, {"name": family}, 2, say).restore(target(family))
    assert bits(again) == bits(after)
    return step


# What the newest step may survive: the accident is beside it, or hits what nobody reads.
HARMLESS = (
    "empty_newer_step", "leftover", "flip_in_arrays", "flip_in_metadata", "truncate",
    "zeros_in_arrays", "noise_in_arrays", "empty_file", "delete_file", "delete_folder",
)  # fmt: skip


def survive(seed: int, saved: dict, tmp_path: Path) -> Fault:
    family = FAMILIES[seed // len(KINDS) % len(FAMILIES)]
    workdir, contents = saved[family]
    here = tmp_path / "run"
    shutil.copytree(workdir, here)
    fault, said = inject(folder(here), seed), []
    step = outcome(family, here, contents, said.append)
    shutil.rmtree(here)
    moved = [line for line in said if "set aside as checkpoints/damaged-" in line]
    if step == SAVED[-1]:
        assert fault.kind in HARMLESS, fault
    else:
        assert len(moved) == 1, (fault, said)
    return fault


@pytest.mark.parametrize("seed", range(60))
def test_after_an_accident_the_run_goes_on_from_a_state_that_was_saved(seed, saved, tmp_path):
    survive(seed, saved, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60, 300))
def test_after_any_of_240_accidents_the_run_goes_on(seed, saved, tmp_path):
    survive(seed, saved, tmp_path)


def test_accidents_follow_their_seed(saved, tmp_path):
    done = []
    for name in "ab":
        shutil.copytree(saved["demo"][0], tmp_path / name)
        done.append(inject(folder(tmp_path / name), 4))
    assert done[0] == done[1] and len(KINDS) == 20
