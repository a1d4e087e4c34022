# SPDX-License-Identifier: Apache-2.0
"""Checkpoints come back to the bit on any mesh, or are refused by the name of what differs."""

import contextlib
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from lmjax import sharding
from lmjax.checkpoint import Checkpoints, load_params
from lmjax.sharding import Layout, path_of
from lmjax.step import State, placed
from lmjax.steps import folder, newest_step

RECIPE = {"model": {"class": "GPT", "depth": 2}, "name": "é"}
SHAPES = {
    "embedding": (16, 8),
    "positions": (4, 8),
    "blocks": {"mlp": {"up": {"kernel": (2, 8, 16), "bias": (2, 16)}}},
    "final_norm": {"scale": (8,)},
}
MESHES = {
    "1x1x1": Layout(1, 1, 1),
    "8x1x1": Layout(8, 1, 1),
    "2x2x2": Layout(2, 2, 2),
    "1x2x1x4": Layout(1, 2, 1, 4),
}


def mesh(layout: Layout):
    return layout.mesh(jax.devices()[: math.prod(dataclasses.astuple(layout))])


def target(shapes=SHAPES, dtype=jnp.float32, optimiser=None) -> State:
    """Shapes of a state of those parameters, placed on the mesh in use."""

    def build() -> State:
        is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
        params = jax.tree.map(lambda shape: jnp.zeros(shape, dtype), shapes, **is_shape)
        return State(jnp.int32(0), params, (optimiser or optax.adam(0.1)).init(params))

    return placed(jax.eval_shape(build))


def state_at(step: int, wanted: State | None = None) -> State:
    """A state whose every number is drawn anew for each step, with odd values among them."""
    random = np.random.default_rng(step)

    def draw(path, x):
        if path_of(path) == "step":
            return jax.device_put(np.int32(step), x.sharding)
        value = random.normal(size=x.shape).astype(x.dtype)
        if value.ndim > 1:
            value.flat[:4] = (np.nan, -0.0, 1e-42, np.inf)
        return jax.device_put(value, x.sharding)

    return jax.tree_util.tree_map_with_path(draw, target() if wanted is None else wanted)


def save(workdir: Path, *states: State, keep: int = 2) -> list[str]:
    """Saves each state under its step; returns what was said."""
    said: list[str] = []
    checkpoints = Checkpoints(workdir, RECIPE, keep, said.append)
    for state in states:
        checkpoints.save(int(state.step), state)
    checkpoints.close()
    return said


def restore(workdir: Path, wanted: State) -> State:
    with contextlib.closing(Checkpoints(workdir, RECIPE, 2, print)) as checkpoints:
        return checkpoints.restore(wanted)


def bits(tree) -> dict[str, bytes]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): np.asarray(x).tobytes() for path, x in leaves}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of step 7 by eight devices."""
    workdir = tmp_path_factory.mktemp("saved")
    with sharding.use(mesh(Layout(1, 8, 1))):
        save(workdir, state_at(7))
    return workdir


@pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES.keys())
def test_a_state_comes_back_to_the_bit_on_another_mesh(layout: Layout, saved):
    with sharding.use(mesh(layout)):
        wanted = target()
        state = restore(saved, wanted)
        assert bits(state) == bits(state_at(7)) and int(state.step) == 7
        for x, w in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
            assert (x.shape, x.dtype) == (w.shape, w.dtype)
            assert x.sharding.is_equivalent_to(w.sharding, x.ndim)


@pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES.keys())
def test_parameters_come_alone_and_need_no_optimiser(layout: Layout, saved):
    with sharding.use(mesh(layout)):
        step, params = load_params(saved, target().params)
        assert step == 7 and bits(params) == bits(state_at(7).params)
        for x, w in zip(jax.tree.leaves(params), jax.tree.leaves(target().params), strict=True):
            assert x.sharding.is_equivalent_to(w.sharding, x.ndim)


def test_recipe_and_shapes_lie_beside_the_arrays(saved):
    metadata = ocp.metadata(str(folder(saved) / "7")).custom_metadata
    assert metadata["recipe"] == RECIPE
    assert metadata["arrays"]["params/blocks/mlp/up/kernel"] == [[2, 8, 16], "float32"]
    assert metadata["arrays"]["step"] == [[], "int32"]
    with sharding.use(mesh(Layout(1, 1, 1))):
        assert set(metadata["arrays"]) == set(bits(state_at(7)))


OTHER = {
    "shape": (SHAPES | {"positions": (6, 8)}, "positions", "float32[4, 8]", "float32[6, 8]"),
    "missing": (
        SHAPES | {"new": {"embedding": (8, 8)}},
        "new/embedding", "nothing", "float32[8, 8]",
    ),
    "extra": (
        {k: v for k, v in SHAPES.items() if k != "positions"},
        "positions", "float32[4, 8]", "nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_another_model_is_refused_by_the_names_of_its_arrays(case: str, saved):
    shapes, name, stored, wanted = OTHER[case]
    line = f"  params/{name}: checkpoint {stored}, model {wanted}"
    with sharding.use(mesh(Layout(1, 1, 1))):
        with pytest.raises(ValueError, match="checkpoint 7 does not fit the model") as error:
            restore(saved, target(shapes))
        assert line in str(error.value).splitlines()
        # Both of Adam's moments differ as well, and nothing else does.
        assert len(str(error.value).splitlines()) == 1 + 3
        with pytest.raises(ValueError, match="does not fit the model") as error:
            load_params(saved, target(shapes).params)
        assert str(error.value).splitlines()[1:] == [line]


def test_another_dtype_is_refused_and_a_long_list_is_cut(saved):
    with sharding.use(mesh(Layout(1, 1, 1))):
        with pytest.raises(ValueError) as error:
            restore(saved, target(dtype=jnp.bfloat16))
        lines = str(error.value).splitlines()
        assert len(lines) == 12 and lines[-1] == "  … and 5 more"  # three of each of five arrays
        with pytest.raises(ValueError) as error:
            load_params(saved, target(dtype=jnp.bfloat16).params)
        line = "  params/embedding: checkpoint float32[16, 8], model bfloat16[16, 8]"
        assert line in str(error.value).splitlines()


def test_another_optimiser_is_refused_though_the_parameters_fit(saved):
    with sharding.use(mesh(Layout(1, 1, 1))):
        wanted = target(optimiser=optax.sgd(0.1))
        with pytest.raises(ValueError, match=r"opt_state/0/mu/embedding: checkpoint .*nothing"):
            restore(saved, wanted)
        assert load_params(saved, wanted.params)[0] == 7


def test_a_directory_without_checkpoint_says_so(tmp_path):
    assert newest_step(tmp_path) is None
    with pytest.raises(ValueError, match=f"{tmp_path} holds no checkpoint yet; train first"):
        load_params(tmp_path, {})


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_steps_stay(keep: int, tmp_path):
    with sharding.use(mesh(Layout(1, 1, 1))):
        said = save(tmp_path, *(state_at(step) for step in (1, 2, 10)), keep=keep)
        assert said == ["saved step 1", "saved step 2", "saved step 10"]
        names = {int(p.name) for p in folder(tmp_path).iterdir() if p.is_dir()}
        assert names == {10, *[2][: keep - 1]}
        assert newest_step(tmp_path) == 10  # by number, not by name
        assert bits(restore(tmp_path, target())) == bits(state_at(10))


def test_what_is_said_to_be_saved_can_be_restored_at_that_moment(tmp_path):
    said = []

    def look(line: str) -> None:
        step, params = load_params(tmp_path, target().params)
        assert line == f"saved step {step:,}" and bits(params) == bits(state_at(step).params)
        said.append(line)

    with sharding.use(mesh(Layout(1, 1, 1))):
        checkpoints = Checkpoints(tmp_path, RECIPE, 3, look)
        for step in (1, 2, 1000):
            checkpoints.save(step, state_at(step))
            assert len(said) == (1, 2, 1000).index(step)  # the one before, and not yet this one
        checkpoints.close()
    assert said == ["saved step 1", "saved step 2", "saved step 1,000"]


class Slow:
    """Stands for a save of Orbax that takes its time or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.busy, self.error = True, error

    def __call__(self, *_, **__) -> "Slow":
        return self

    def result(self, timeout: float | None = None) -> None:
        if timeout == 0 and self.busy:
            raise TimeoutError
        self.busy = False
        if self.error:
            raise self.error


def test_nothing_is_said_while_a_save_is_under_way(tmp_path, monkeypatch):
    said: list[str] = []
    checkpoints, slow = Checkpoints(tmp_path, RECIPE, 2, said.append), Slow()
    monkeypatch.setattr(ocp, "save_async", slow)
    checkpoints.save(5, State(jnp.int32(5), {}, ()))
    checkpoints.check()
    assert said == []
    slow.busy = False
    checkpoints.check()
    checkpoints.check()
    assert said == ["saved step 5"]


FULL = "writing d/7f3 [source locations='a.cc:1'\nb.cc:2'] No space left on device"


@pytest.mark.parametrize("late", [False, True])
def test_a_save_that_fails_is_an_error_that_names_the_last_good_step(late, tmp_path, monkeypatch):
    with sharding.use(mesh(Layout(1, 1, 1))):
        save(tmp_path, state_at(3))
    checkpoints = Checkpoints(tmp_path, RECIPE, 2, pytest.fail)
    slow = Slow(ValueError(FULL))
    monkeypatch.setattr(ocp, "save_async", slow if late else lambda *_, **__: slow.result())
    wanted = (
        "step 5 was not saved: no space left on the disk; the newest good step is 3; make space,"
        " then start again"
    )
    with pytest.raises(ValueError, match=f"^{wanted}$"):
        checkpoints.save(5, State(jnp.int32(5), {}, ()))
        slow.busy = False
        checkpoints.check()
    checkpoints.close()  # it is not said twice


def test_the_arrays_may_be_overwritten_once_save_returns(tmp_path):
    """Training donates them to the next step while the copy is being written."""
    with sharding.use(mesh(Layout(2, 2, 2))):
        checkpoints, state = Checkpoints(tmp_path, RECIPE, 2, print), state_at(3)
        rest = jax.tree.map(lambda x: x.sharding, state)
        clear = jax.jit(
            lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0, out_shardings=rest
        )
        checkpoints.save(3, state)
        jax.block_until_ready(clear(state))
        checkpoints.close()
        # Scalars are written from where they are, and JAX overwrites none that somebody looks at.
        assert all(x.is_deleted() for x in jax.tree.leaves(state) if x.ndim)
        assert bits(restore(tmp_path, target())) == bits(state_at(3))
