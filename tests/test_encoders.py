# SPDX-License-Identifier: Apache-2.0
"""Encoders: sizes of the papers, what a token may see, padding, packing, heads, meshes.

Shapes: B batch, L length, D width, P scored tokens, C sequences of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from encoders import (
    BERTS,
    LENGTH,
    MODELS,
    SIZES,
    VOCAB,
    WIDTH,
    apply,
    batch_for,
    example,
    loss_of,
    params_of,
    total,
)

from lmjax import recipe, sharding
from lmjax.encoder import pick
from lmjax.models.albert import ALBERT
from lmjax.models.bert import BERT
from lmjax.models.electra import ELECTRA
from lmjax.sharding import Layout, path_of
from lmjax.step import abstract_params

every_model = pytest.mark.parametrize("name", MODELS)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "depth", "width", "heads", "bare", "pooled", "whole"),
    [
        (30_522, 12, 768, 12, 108_891_648, 109_482_240, 110_106_428),
        (28_996, 12, 768, 12, 107_719_680, 108_310_272, 108_932_934),
        (30_522, 24, 1024, 16, 334_092_288, 335_141_888, 336_226_108),
        (28_996, 24, 1024, 16, 332_529_664, 333_579_264, 334_661_958),
        (30_522, 2, 128, 2, None, 4_385_920, 4_433_468),
        (30_522, 4, 256, 4, None, 11_170_560, 11_267_900),
        (30_522, 4, 512, 8, None, 28_763_648, 29_058_876),
        (30_522, 8, 512, 8, None, 41_373_184, 41_668_412),
    ],
)
def test_bert_has_the_parameters_of_the_release(vocab, depth, width, heads, bare, pooled, whole):
    model = BERT(vocab, 512, depth, width, heads, **BERTS)
    assert count(model) == whole
    assert count(model.clone(masked=False, pair=False)) == pooled
    if bare is not None:
        assert count(model.clone(masked=False, pair=False, pooler=False)) == bare


@pytest.mark.parametrize(
    ("depth", "width", "heads", "parameters"),
    [
        (12, 768, 12, 11_683_584),
        (24, 1024, 16, 17_683_968),
        (24, 2048, 16, 58_724_864),
        (12, 4096, 64, 222_595_584),
    ],
)
def test_albert_has_the_parameters_of_the_release(depth, width, heads, parameters):
    assert count(ALBERT(30_000, 512, depth, width, heads, masked=False, pair=False)) == parameters


@pytest.mark.parametrize(
    ("narrow", "depth", "width", "heads", "generator", "parameters"),
    [
        (128, 12, 256, 4, (64, 1, 12), 13_549_057),
        (768, 12, 768, 12, (256, 4, 12), 109_483_009),
        (1024, 24, 1024, 16, (256, 4, 24), 335_142_913),
    ],
)
def test_electra_has_the_discriminator_of_the_release(
    narrow, depth, width, heads, generator, parameters
):
    model = ELECTRA(30_522, 512, depth, width, heads, narrow, *generator)
    assert model.discriminator_parameters() == parameters
    held = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    kept = [x.size for path, x in held if not path_of(path).startswith("generator")]
    assert sum(kept) - (30_592 - 30_522) * narrow == parameters


def test_roberta_and_ernie_have_the_parameters_of_the_release():
    roberta = recipe.load(str(ROOT / "experiments/roberta_base.py")).model
    assert count(roberta) == 124_697_433
    assert count(roberta.clone(masked=False)) == 124_055_040
    assert count(roberta.clone(masked=False, types=0)) == 124_054_272
    ernie = recipe.load(str(ROOT / "experiments/ernie_base.py")).model
    assert count(ernie) == 100_477_778
    assert count(ernie.clone(masked=False, pair=False)) == 99_866_112
    assert count(ernie.clone(masked=False, pair=False, pooler=False)) == 99_275_520


def count(model: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract_params(model))) - model.padding


# --- what a token sees ----------------------------------------------------------------------------


@every_model
def test_a_state_depends_on_both_sides_and_not_on_padding(name: str):
    model, batch = MODELS[name], batch_for(name, example())
    params = params_of(model)
    batch = {k: v for k, v in batch.items() if k in ("tokens_BL", "segments_BL", "types_BL")}
    size = int(batch["segments_BL"][0].sum())
    assert size < LENGTH

    def state(places: Any) -> jax.Array:
        # A gradient for each column: its row of the position table is a place of its own.
        table = params["embeddings"]["positions"].at[: LENGTH + 2].add(places)
        moved = {**params, "embeddings": {**params["embeddings"], "positions": table}}
        return (apply(model, moved, batch).hidden_BLD[0, 5] ** 2).sum()

    offset = getattr(model, "position_offset", 0)
    gradient = jax.grad(state)(jnp.zeros((LENGTH + 2, params["embeddings"]["positions"].shape[1])))
    reach = np.abs(gradient).sum(1)[offset : offset + LENGTH]
    assert (reach[:size] > 0).all() and (reach[size:] == 0).all()


@every_model
def test_padding_changes_nothing(name: str):
    """Bit for bit in rows of the same length; within rounding in longer rows."""
    model, batch = MODELS[name], batch_for(name, example())
    params = params_of(model)
    run = jax.jit(lambda batch: losses_and_states(name, params, batch))
    wanted, states = run(batch)
    rubbish = dict(batch)
    outside = batch["segments_BL"] == 0
    rubbish["tokens_BL"] = np.where(outside, 7, batch["tokens_BL"])
    got, others = run(rubbish)
    inside = batch["segments_BL"] > 0
    for key, value in wanted.items():
        assert np.array_equal(got[key], value), key
    assert np.array_equal(np.asarray(others)[inside], np.asarray(states)[inside])

    longer = {k: np.pad(v, ((0, 0), (0, 9))) if k.endswith("BL") else v for k, v in batch.items()}
    got, others = run(longer)
    for key, value in wanted.items():
        np.testing.assert_allclose(got[key], value, rtol=2e-6, atol=2e-6, err_msg=key)
    np.testing.assert_allclose(
        np.asarray(others)[:, :LENGTH][inside], np.asarray(states)[inside], atol=1e-5
    )


def losses_and_states(name: str, params: Any, batch: Any) -> Any:
    outputs = apply(MODELS[name], params, batch)
    return loss_of(name)(outputs, batch), outputs.hidden_BLD


@pytest.mark.parametrize("name", ["bert", "roberta", "ernie", "albert"])
def test_packed_sequences_give_the_losses_of_their_own_rows(name: str):
    """The two shortest rows in one, and the longest alone; gradients as well."""
    batch = batch_for(name, example())
    sizes = batch["segments_BL"].sum(1)
    packed = pack(batch, [[0, 1], [2], [3]], int(sizes[0] + sizes[1]))
    params = params_of(MODELS[name])
    one = jax.value_and_grad(lambda p: total(name, p, batch))(params)
    other = jax.value_and_grad(lambda p: total(name, p, packed))(params)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    for path, x in jax.tree_util.tree_leaves_with_path(one[1]):
        y = other[1]
        for key in path:
            y = y[key.key]
        np.testing.assert_allclose(x, y, atol=2e-6 * max(1, float(np.abs(x).max())))


def pack(batch: dict[str, np.ndarray], groups: list[list[int]], length: int) -> dict[str, Any]:
    """Rows put one behind the other, each with its own segment, positions and first token."""
    length = max(length, LENGTH)
    sizes = batch["segments_BL"].sum(1)
    per_row = {"BL": length, "BP": 8, "BC": 2}
    rows = {
        key: np.zeros((len(groups), per_row[key[-2:]]), value.dtype) for key, value in batch.items()
    } | {"positions_BL": np.zeros((len(groups), length), np.int32)}
    for row, members in enumerate(groups):
        first = 0
        for place, i in enumerate(members):
            here = slice(first, first + sizes[i])
            for key in ("tokens_BL", "types_BL"):
                if key in batch:
                    rows[key][row, here] = batch[key][i, : sizes[i]]
            rows["segments_BL"][row, here] = place + 1
            rows["positions_BL"][row, here] = np.arange(sizes[i])
            slots = slice(4 * place, 4 * place + 4)
            rows["masked_BP"][row, slots] = batch["masked_BP"][i] + first
            rows["targets_BP"][row, slots] = batch["targets_BP"][i]
            rows["weights_BP"][row, slots] = batch["weights_BP"][i]
            rows["firsts_BC"][row, place] = first
            rows["pairs_BC"][row, place] = batch["pairs_BC"][i, 0]
            rows["pair_weights_BC"][row, place] = 1
            first += sizes[i]
    return rows


# --- heads ----------------------------------------------------------------------------------------


@every_model
def test_the_vocabulary_is_scored_at_masked_tokens_only(name: str):
    """No array of the step has a score for every token: rows × length × vocabulary."""
    model, batch = MODELS[name], batch_for(name, example())
    rows = batch["tokens_BL"].shape[0]
    jaxpr = str(jax.make_jaxpr(lambda p: jax.grad(partial_total(name, batch))(p))(params_of(model)))
    assert f"f32[{rows},{LENGTH},128]" not in jaxpr and f"f32[{rows * LENGTH},128]" not in jaxpr
    assert f"f32[{rows * 4},128]" in jaxpr  # B · P scores of the padded vocabulary


def partial_total(name: str, batch: Any) -> Any:
    return lambda params: total(name, params, batch)


def test_scores_of_a_masked_token_are_those_of_the_whole_row():
    model, batch = MODELS["bert"], example()
    params = params_of(model)
    everywhere = {**batch, "masked_BP": np.tile(np.arange(LENGTH, dtype=np.int32), (4, 1))}
    some, all_ = apply(model, params, batch), apply(model, params, everywhere)
    scores = all_.readout.logits(all_.heads["masked_BPE"])
    assert scores.shape == (4, LENGTH, VOCAB)
    picked = pick(scores, jnp.asarray(batch["masked_BP"]))
    np.testing.assert_allclose(some.readout.logits(some.heads["masked_BPE"]), picked, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "albert"])
def test_classification_heads_read_the_first_state_and_every_state(name: str):
    model, batch = MODELS[name], example()
    outputs = apply(model, params_of(model), batch, states=True)
    assert outputs.heads["sequence_BCT"].shape == (4, 1, 3)
    assert outputs.heads["token_BLT"].shape == (4, LENGTH, 4)
    assert outputs.states_NBLD.shape == (3, 4, LENGTH, WIDTH)
    np.testing.assert_array_equal(outputs.states_NBLD[-1], outputs.hidden_BLD)


def test_a_head_without_its_pooler_is_refused():
    with pytest.raises(ValueError, match="pooler"):
        BERT(**SIZES, **BERTS, pooler=False)


def test_albert_applies_one_block_again_and_again():
    model = MODELS["albert"]
    params = params_of(model)
    states = apply(model, params, example(), states=True).states_NBLD
    once = apply(model.clone(depth=1), params, example(), states=True).states_NBLD
    np.testing.assert_allclose(states[1], once[1], atol=1e-6)
    assert not any(
        path_of(p).startswith("blocks") for p, _ in jax.tree_util.tree_leaves_with_path(params)
    )


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("bert", Layout(2, 2, 2)),
        ("albert", Layout(2, 2, 2)),
        ("electra", Layout(1, 2, 2, 2)),
    ],
)
def test_a_mesh_changes_no_number(name: str, layout: Layout):
    """Loss and gradients over all axes; ELECTRA without its draws, which are masks of a random
    stream whose bits a mesh may lay out in another way."""
    batch = example(rows=8)
    if name == "electra":
        batch["weights_BP"][:] = 0
    params = params_of(MODELS[name])
    wanted = jax.value_and_grad(lambda p: total(name, p, batch))(params)
    with sharding.use(layout.mesh()):
        rest = sharding.shardings(params)
        placed = jax.device_put(batch, sharding.batch_sharding())
        function = jax.jit(jax.value_and_grad(lambda p, b: total(name, p, b)))
        got = function(jax.device_put(params, rest), placed)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1, float(np.abs(y).max())))


@pytest.mark.parametrize("file", ["bert_base", "albert_base", "electra_small", "ernie_base"])
def test_norms_and_biases_are_not_decayed_and_embeddings_are(file: str):
    run = recipe.load(str(ROOT / f"experiments/{file}.py"))
    params = abstract_params(run.model)
    paths = {path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)}
    spared = paths - set(run.optim.decayed(params))
    assert spared == {p for p in paths if p.endswith(("bias", "scale"))}
    assert {p.rsplit("/", 1)[-1] for p in paths - spared} == {
        "kernel", "embedding", "positions", "types",
    }  # fmt: skip


def test_roberta_decays_everything():
    run = recipe.load(str(ROOT / "experiments/roberta_base.py"))
    params = abstract_params(run.model)
    assert len(run.optim.decayed(params)) == len(jax.tree.leaves(params))
