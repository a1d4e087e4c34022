# SPDX-License-Identifier: Apache-2.0
"""Hardware that keeps or computes a wrong bit is found by its device; sound hardware is not."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from lmjax import sharding
from lmjax.checkpoint import Checkpoints
from lmjax.fingerprint import fingerprints
from lmjax.hardware import checked_step
from lmjax.sharding import Layout
from lmjax.step import State, placed

SHAPES = {"embedding": (16, 8), "norm": {"scale": (8,)}}


def state() -> State:
    """Replicated over `data`, random, on the mesh in use."""

    def build() -> State:
        is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
        params = jax.tree.map(lambda s: jnp.zeros(s), SHAPES, **is_shape)
        return State(jnp.int32(0), params, optax.adam(0.1).init(params))

    def draw(x):
        values = np.random.default_rng(x.size).normal(size=x.shape)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree.map(draw, placed(jax.eval_shape(build)))


def flip(x: jax.Array, device: int) -> jax.Array:
    """`x` with one bit changed in what one device holds."""
    assert isinstance(x.sharding, NamedSharding)
    parts = []
    for shard in x.addressable_shards:
        part = np.array(shard.data)
        if shard.device.id == device:
            part.view(np.uint32).reshape(-1)[0] ^= np.uint32(1)
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


@jax.jit
def halve(state: State, batch) -> tuple[State, dict]:
    params = jax.tree.map(lambda x: x / 2, state.params)
    return State(state.step + 1, params, state.opt_state), {"loss": batch["x"]}


BATCH = {"x": jnp.float32(3)}
MESHES = {"8x1x1": Layout(8, 1, 1), "4x2x1": Layout(4, 2, 1)}


@pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES.keys())
def test_sound_hardware_raises_no_alarm_and_the_step_is_what_it_is(layout: Layout, capsys):
    with sharding.use(layout.mesh()):
        after, metrics = checked_step(halve, state(), BATCH, 7)
        wanted, _ = halve(state(), BATCH)
    assert fingerprints(after) == fingerprints(wanted) and metrics["loss"] == 3
    assert capsys.readouterr().out == "step 7: computed twice, equal on 8 devices\n"


@pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES.keys())
def test_one_flipped_bit_of_one_replica_is_found_with_its_device(layout: Layout):
    with sharding.use(layout.mesh()):
        bad = state()
        scale = bad.params["norm"]["scale"]
        bad.params["norm"]["scale"] = flip(scale, 5)
        with pytest.raises(
            ValueError, match="before step 7, replicas of params/norm/scale"
        ) as error:
            checked_step(halve, bad, BATCH, 7)
    assert str(error.value).count("of process 0") == 1 and "look at cpu:5 of" in str(error.value)


@pytest.mark.parametrize("turn", [1, 2])
def test_a_step_that_gives_other_bits_the_second_time_is_found(turn: int):
    turns = []

    def unsound(state, batch):
        turns.append(1)
        after, metrics = halve(state, batch)
        if len(turns) == turn:
            after.params["embedding"] = flip(after.params["embedding"], 2)
        return after, metrics

    with sharding.use(Layout(1, 8, 1).mesh()):  # no replicas of the embedding
        with pytest.raises(ValueError, match="step 7 computed twice gives two values") as error:
            checked_step(unsound, state(), BATCH, 7)
    assert "params/embedding" in str(error.value) and "look at cpu:2 of" in str(error.value)


def test_the_same_wrong_bit_twice_is_found_among_replicas():
    def unsound(state, batch):
        after, metrics = halve(state, batch)
        after.params["embedding"] = flip(after.params["embedding"], 3)
        return after, metrics

    with sharding.use(Layout(8, 1, 1).mesh()):
        with pytest.raises(ValueError, match="after step 7, replicas of params/embedding differ"):
            checked_step(unsound, state(), BATCH, 7)


def test_every_save_compares_the_replicas_that_it_reads_anyway(tmp_path):
    said: list[str] = []
    with sharding.use(Layout(8, 1, 1).mesh()):
        for step, flipped in ((1, None), (2, 6)):
            saved = state().replace(step=jax.device_put(jnp.int32(step), sharding.replicated()))
            if flipped is not None:
                saved.params["embedding"] = flip(saved.params["embedding"], flipped)
            with contextlib.closing(Checkpoints(tmp_path, {}, 2, said.append)) as checkpoints:
                checkpoints.save(step, saved)
    assert [line for line in said if "saved" not in line] == [
        "step 2: replicas of params/embedding differ: look at cpu:6 of process 0; --check_every=1"
        " stops the run where they begin to"
    ]
