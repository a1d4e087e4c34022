# SPDX-License-Identifier: Apache-2.0
"""Rows split over `sequence`: the numbers of one device, or an error before compilation."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from encoders import MODELS, example
from jax.sharding import PartitionSpec as P

from lmjax import losses, recipe, sharding
from lmjax.attention import Kernel, attention, causal_share
from lmjax.examples.windows import Windows
from lmjax.models.gpt import GPT
from lmjax.run import Run, replace
from lmjax.sharding import Layout
from lmjax.step import abstract_params
from lmjax.train import train

ROWS, HEADS, WIDTH = 4, 2, 16
MESHES = {
    "2x1x1x4": Layout(2, 1, 1, 4),
    "1x2x2x2": Layout(1, 2, 2, 2),
    "1x1x1x8": Layout(1, 1, 1, 8),
}
every_mesh = pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES)


def assert_near(got, wanted, tolerance: float):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


# --- attention ------------------------------------------------------------------------------------


def inputs(length: int, width: int = WIDTH) -> tuple[list[jax.Array], jax.Array]:
    """Query, key, value and a direction (B, H, L, K), and documents that end between devices."""
    random = np.random.default_rng(0)
    shape = (ROWS, HEADS, length, width)
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(4)]
    place = np.arange(length)
    rows = [place // 37, 1 + (place >= length // 3), 0 * place, place // 5]
    return arrays, jnp.asarray(np.stack(rows), jnp.int32)


def differentiated(arrays, segments, causal: bool, kernel: Kernel = "auto"):
    """Σ direction · attention, and its gradients; a function of its own, to be traced anew."""

    def total(query, key, value, direction):
        mixed = attention(query, key, value, causal=causal, segments_BL=segments, kernel=kernel)
        return (mixed * direction).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arrays)


@every_mesh
@pytest.mark.parametrize("causal", [True, False])
def test_attention_over_parts_of_a_row_is_that_of_the_row(layout: Layout, causal: bool):
    arrays, segments = inputs(80)
    wanted = differentiated(arrays, segments, causal)
    with sharding.use(layout.mesh()):
        assert_near(differentiated(arrays, segments, causal), wanted, 1e-5)


# 512 tokens give each of two devices a chunk from either end; 256 are too few for that.
@pytest.mark.parametrize(("length", "causal"), [(512, True), (256, True), (256, False)])
def test_splash_over_parts_of_a_row_is_that_of_the_row(length: int, causal: bool, monkeypatch):
    """The kernel of TPUs, interpreted: masks of part and whole, and gradients that come home."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    interpreted = partial(splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha", interpreted)
    arrays, segments = inputs(length)
    wanted = differentiated(arrays, segments, causal)
    with sharding.use(Layout(2, 1, 2, 2).mesh()):
        assert_near(differentiated(arrays, segments, causal, "splash"), wanted, 1e-5)


def test_keys_of_other_devices_are_gathered_again_and_not_kept():
    """Keys and values once for the forward pass, and once for the backward one."""
    arrays, segments = inputs(1024)
    with sharding.use(Layout(2, 1, 1, 4).mesh()):
        mixed = partial(attention, causal=True, segments_BL=segments, kernel="splash")
        step = jax.grad(lambda *qkv: mixed(*qkv).sum(), argnums=(0, 1, 2))
        traced = str(jax.make_jaxpr(step)(*arrays[:3]))
    assert traced.count("= all_gather[") == 4
    assert traced.count("reduce_scatter[") == 2
    # Queries, their segments and what they found go to another device and back, half by half.
    assert traced.count("= ppermute[") >= 2 * (2 + 1 + 2)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_folded_row_gives_each_device_a_chunk_from_either_end(devices: int):
    """So that causal queries see as many keys in all on each."""
    row = np.arange(2 * devices * 3)[None]
    spec = P(None, sharding.SEQUENCE)
    with sharding.use(Layout(8 // devices, 1, 1, devices).mesh()):
        folded = jax.jit(sharding.map_shards(partial(sharding.fold, dim=1), spec, spec))(row)
        back = jax.jit(sharding.map_shards(partial(sharding.unfold, dim=1), spec, spec))(folded)
    np.testing.assert_array_equal(back, row)
    parts = np.asarray(folded).reshape(devices, 6)
    assert {part.sum() for part in parts} == {row.sum() // devices}
    assert [set(part // 3) for part in parts] == [{i, 2 * devices - 1 - i} for i in range(devices)]


@pytest.mark.parametrize(("length", "parts"), [(512, 1), (512, 4), (1024, 4), (768, 2), (1024, 2)])
def test_the_busiest_device_sees_the_share_that_plan_counts(length: int, parts: int, monkeypatch):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    made, masks = splash.make_splash_mha, []
    monkeypatch.setattr(
        splash, "make_splash_mha", lambda mask, **rest: masks.append(mask) or made(mask, **rest)
    )
    arrays, segments = inputs(length)
    with sharding.use(Layout(1, 1, 1, parts).mesh(jax.devices()[:parts])):
        mixed = partial(attention, causal=True, segments_BL=segments, kernel="splash")
        jax.eval_shape(mixed, *arrays[:3])
    seen = np.asarray(masks[0].masks[0][:, :]).reshape(parts, -1).mean(axis=1).max()
    assert causal_share(length, parts) == pytest.approx(seen, abs=1 / length)


def test_kernels_that_cannot_split_a_row_are_refused():
    (query, key, value, _), _ = inputs(256)
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    with sharding.use(Layout(2, 1, 1, 4).mesh()):
        with pytest.raises(ValueError, match="splash: .* multiple of 128 on each device"):
            attention(query, key, value, causal=True, kernel="splash")
        with pytest.raises(ValueError, match=r"cudnn: .*mesh\.sequence"):
            attention(*half, causal=True, kernel="cudnn")


# --- models ---------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab": 61,
    "context": 40,
    "depth": 2,
    "width": 16,
    "heads": 2,
    "unroll": 1,
}
DROPPING = {"dropout": 0.2, "attention_dropout": 0.2}  # a mesh draws the same


def gpt_case():
    """Documents of 13 tokens, whose positions restart."""
    random = np.random.default_rng(1)
    tokens = random.integers(0, 61, (8, 41)).astype(np.int32)
    place = np.tile(np.arange(40, dtype=np.int32), (8, 1))
    batch = {
        "tokens_BL": tokens[:, :-1],
        "targets_BL": tokens[:, 1:],
        "weights_BL": random.integers(0, 2, (8, 40)).astype(np.float32),
        "segments_BL": place // 13,
        "positions_BL": place % 13,
    }
    return GPT(**SIZES, cross_documents=False), losses.next_token, batch


def bert_case():
    """Padding, masked tokens on several devices, pairs pooled at the first token."""
    batch = example(rows=8)
    batch["masked_BP"] = np.tile(np.array([1, 7, 15, 0], np.int32), (8, 1))
    for name in ("masked_BP", "targets_BP", "weights_BP"):  # three: no axis divides them
        batch[name] = batch[name][:, :3]
    return MODELS["ernie"].clone(**DROPPING, unroll=1), losses.masked_token_and_pair, batch


def objective(model, loss, params, batch):
    outputs = model.apply(
        {"params": params}, batch, train=True, rngs={"dropout": jax.random.key(5)}
    )
    sums = loss(outputs, batch)
    return losses.total({name: s / w for name, (s, w) in sums.items()})


@pytest.mark.parametrize(
    ("case", "layout"), [(gpt_case, Layout(1, 1, 1, 8)), (bert_case, Layout(2, 1, 1, 4))]
)
def test_losses_and_gradients_are_those_of_one_device(case, layout: Layout):
    model, loss, batch = case()
    draw = np.random.default_rng(2).normal
    params = jax.tree.map(lambda x: np.float32(draw(size=x.shape) / 8), abstract_params(model))
    function = jax.value_and_grad(partial(objective, model, loss))
    wanted, want = jax.jit(function)(params, batch)
    with sharding.use(layout.mesh()):
        batch = jax.device_put(batch, sharding.batch_sharding())
        params = jax.device_put(params, sharding.shardings(params))
        value, gradients = jax.jit(function)(params, batch)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert_near(gradients, want, 1e-4)


def test_a_device_has_its_part_of_every_layers_states():
    model, _, batch = gpt_case()
    layout = Layout(2, 1, 1, 4)

    def states(params, batch):
        return model.apply({"params": params}, batch, states=True).states_NBLD

    with sharding.use(layout.mesh()):
        batch = jax.device_put(batch, sharding.batch_sharding())
        params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(model))
        states_NBLD = jax.jit(states)(params, batch)
        tail = sharding.split_tokens(states_NBLD[0][:, :7])
    assert states_NBLD.shape == (3, 8, 40, 16)
    assert states_NBLD.sharding.shard_shape(states_NBLD.shape) == (3, 4, 10, 16)
    assert tail.sharding.shard_shape(tail.shape) == (4, 7, 16)  # 4 devices do not divide 7


# --- what cannot be split -------------------------------------------------------------------------


def toy(name: str, **changes) -> Run:
    return replace(recipe.load(str(ROOT / f"experiments/{name}.py"), tiny=True), **changes)


def refused(run: Run, says: str) -> None:
    with sharding.use(run.mesh.mesh()), pytest.raises(ValueError, match=says):
        run.check()


def test_lengths_that_do_not_divide_are_refused_by_dimension_size_and_axis():
    run = toy("gpt2_small", batch=8)
    run = replace(run, mesh=Layout(2, 1, 1, 4), data=replace(run.data, examples=Windows(length=30)))
    says = r"data\.examples\.length=30: dimension 1 .* size 30, .*axis sequence=4 does not divide"
    refused(run, says + r".*--mesh\.sequence")
    with sharding.use(Layout(4, 1, 1, 2).mesh()):
        run.check()
    run = toy("bert_base", batch=8, mesh=Layout(1, 1, 1, 8))
    assert run.phase2 is not None
    odd = replace(run.phase2.examples, length=60)
    refused(
        replace(run, phase2=replace(run.phase2, examples=odd)),
        r"phase2\.examples\.length=60: dimension 1 .* size 60, .* axis sequence=8",
    )


def test_batches_that_do_not_divide_are_refused_by_their_axes():
    run = toy("gpt2_small", batch=6, mesh=Layout(2, 2, 1, 2))
    refused(run, "batch=6 cannot be split over 4 devices .mesh data × fsdp")


def test_recurrent_models_are_refused_with_the_reason():
    refused(toy("elmo", mesh=Layout(4, 1, 1, 2)), r"mesh\.sequence=2: a recurrent model reads")


def test_training_asks_before_it_compiles(tmp_path, capsys):
    """And before it makes the data."""
    run = toy("elmo", mesh=Layout(4, 1, 1, 2))
    with pytest.raises(ValueError, match="recurrent"):
        train(run, tmp_path, {})
    assert not (tmp_path / "recipe.json").exists()
