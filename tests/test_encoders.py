# SPDX-License-Identifier: Apache-2.0
"""Encoders: sizes of the papers, what a token may see, padding, packing, heads, meshes.

Shapes: B batch, L length, D width, P scored tokens, C sequences of a row.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT

from lmjax import losses, recipe, sharding
from lmjax.encoder import pick
from lmjax.layers import Readout
from lmjax.models.albert import ALBERT
from lmjax.models.bert import BERT
from lmjax.models.electra import ELECTRA, draw, replace
from lmjax.optim import AdamW
from lmjax.sharding import Layout, path_of
from lmjax.step import abstract_params, init_params, make_train_step, state_from

FIXTURE = ROOT.parent / "shared" / "data" / "fixtures" / "golden" / "bert_tf_tiny"
VOCAB, WIDTH, LENGTH = 61, 16, 24
SIZES: dict[str, Any] = {"vocab": VOCAB, "context": 40, "depth": 2, "width": WIDTH, "heads": 2}
PLAIN: dict[str, Any] = {**SIZES, "dropout": 0.0, "attention_dropout": 0.0}
BERTS: dict[str, Any] = {"activation": "gelu_tanh", "epsilon": 1e-12}
HEADS: dict[str, Any] = {"sequence_classes": 3, "token_classes": 4}
MODELS = {
    "bert": BERT(**PLAIN, **BERTS, **HEADS),
    "roberta": BERT(
        **PLAIN, activation="gelu_erf", epsilon=1e-5, types=1, position_offset=2, pooler=False,
        pair=False, truncated_init=False,
    ),
    "ernie": BERT(**PLAIN, activation="relu", epsilon=1e-5),
    "albert": ALBERT(**PLAIN, embedding_width=8, **HEADS),
    "electra": ELECTRA(
        **PLAIN, embedding_width=8, generator_width=8, generator_heads=2, generator_depth=1
    ),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def params_of(model: Any) -> Any:
    """Parameters large enough that every path through the model counts."""
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x + 0.1, init_params(model, 0))


def example(rows: int = 4, length: int = LENGTH, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of different lengths, the last a full one, each with two sentences and three masks."""
    random = np.random.default_rng(seed)
    sizes = np.append(random.integers(8, length, rows - 1), length)
    column = np.arange(length)[None]
    inside = column < sizes[:, None]
    return {
        "tokens_BL": random.integers(5, VOCAB, (rows, length)).astype(np.int32) * inside,
        "segments_BL": inside.astype(np.int32),
        "types_BL": ((column >= sizes[:, None] // 2) & inside).astype(np.int32),
        "masked_BP": np.tile(np.array([1, 3, 6, 0], np.int32), (rows, 1)),
        "targets_BP": random.integers(5, VOCAB, (rows, 4)).astype(np.int32),
        "weights_BP": np.tile(np.array([1, 1, 1, 0], np.float32), (rows, 1)),
        "firsts_BC": np.zeros((rows, 1), np.int32),
        "pairs_BC": random.integers(0, 2, (rows, 1)).astype(np.int32),
        "pair_weights_BC": np.ones((rows, 1), np.float32),
    }


def batch_for(name: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without sentence types where the model has one only."""
    return {k: v for k, v in batch.items() if name != "roberta" or k != "types_BL"}


def loss_of(name: str) -> Any:
    return {"roberta": losses.masked_token, "electra": losses.ReplacedToken()}.get(
        name, losses.masked_token_and_pair
    )


def apply(model: Any, params: Any, batch: Any, **options: Any) -> Any:
    return model.apply({"params": params}, batch, rngs={"sample": jax.random.key(3)}, **options)


def total(name: str, params: Any, batch: Any) -> Any:
    """What is minimised, of one batch."""
    loss = loss_of(name)
    sums = loss(apply(MODELS[name], params, batch), batch)
    means = {key: s / jnp.maximum(w, 1) for key, (s, w) in sums.items()}
    return getattr(loss, "total", losses.total)(means)


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


# --- ELECTRA --------------------------------------------------------------------------------------


def test_the_generator_learns_from_masks_only_and_shares_its_embeddings():
    model, batch = MODELS["electra"], example()
    params = params_of(model)

    def part(name: str) -> Any:
        sums = lambda p: losses.ReplacedToken()(apply(model, p, batch), batch)[name][0]  # noqa: E731
        return jax.grad(sums)(params)

    def size(tree: Any) -> float:
        return float(sum(np.abs(x).sum() for x in jax.tree.leaves(tree)))

    masked, found = part("masked_loss"), part("replaced_loss")
    assert size(found["generator"]) == 0 and size(masked["discriminator"]) == 0
    assert size(masked["generator"]) > 0 and size(found["discriminator"]) > 0
    for gradient in (masked, found):
        assert all(size(x) > 0 for x in jax.tree.leaves(gradient["embeddings"]))


def test_a_token_that_was_drawn_right_is_original():
    batch = example()
    batch["masked_BP"] = np.array([[1, 3, 6, 0]] * 4, np.int32)
    drawn_BP = batch["targets_BP"].copy()
    drawn_BP[0, 1] = (drawn_BP[0, 1] + 1) % VOCAB
    drawn_BP[:, 3] = 2  # an unused slot
    tokens_BL, replaced_BL = replace(jax.tree.map(jnp.asarray, batch), jnp.asarray(drawn_BP))
    wanted = batch["tokens_BL"].copy()
    np.put_along_axis(wanted, batch["masked_BP"][:, :3], drawn_BP[:, :3], axis=1)
    np.testing.assert_array_equal(tokens_BL, wanted)
    assert np.argwhere(np.asarray(replaced_BL)).tolist() == [[0, 3]]


def test_draws_follow_the_softmax_and_never_hit_padding_rows(monkeypatch):
    monkeypatch.setattr("lmjax.models.electra._SAMPLE_BYTES", 4 * 3 * 500 * 2)
    readout = Readout(jnp.eye(8, 3), jnp.log(jnp.array([0.5, 0.3, 0.2, 9, 9, 9, 9, 9.0])), rows=3)
    drawn = draw(jnp.zeros((500, 8, 3)), readout, jax.random.key(0), 1.0)
    assert drawn.shape == (500, 8)
    shares = np.bincount(np.asarray(drawn).ravel(), minlength=8) / drawn.size
    np.testing.assert_allclose(shares[:3], [0.5, 0.3, 0.2], atol=4 * np.sqrt(0.25 / drawn.size))
    assert shares[3:].sum() == 0
    cold = draw(jnp.zeros((500, 8, 3)), readout, jax.random.key(0), 0.05)
    assert (np.asarray(cold) == 0).mean() > 0.99


def test_the_discriminator_counts_every_token_that_is_not_padding():
    model, batch = MODELS["electra"], example()
    outputs = apply(model, params_of(model), batch)
    sums = losses.ReplacedToken()(outputs, batch)
    scores, wrong = np.asarray(outputs.heads["replaced_BL"]), outputs.heads["is_replaced_BL"]
    wrong, real = np.asarray(wrong), batch["segments_BL"] > 0
    chance = 1 / (1 + np.exp(-scores.astype(np.float64)))
    nll = -np.log(np.where(wrong > 0, chance, 1 - chance))
    assert sums["replaced_loss"][1] == real.sum()
    np.testing.assert_allclose(sums["replaced_loss"][0], nll[real].sum(), rtol=1e-5)
    hits = ((scores > 0) == (wrong > 0))[real].sum()
    assert sums["replaced_accuracy"][0] == hits
    assert losses.ReplacedToken(7.0).total({"masked_loss": 1.0, "replaced_loss": 2.0}) == 15.0


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "albert", "electra"])
def test_a_mesh_changes_no_number(name: str):
    """Loss and gradients over data, fsdp and tensor; ELECTRA without its draws, which are masks of
    a random stream whose bits a mesh may lay out in another way."""
    batch = example(rows=8)
    if name == "electra":
        batch["weights_BP"][:] = 0
    params = params_of(MODELS[name])
    wanted = jax.value_and_grad(lambda p: total(name, p, batch))(params)
    with sharding.use(Layout(2, 2, 2).mesh()):
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


# --- the original graph ---------------------------------------------------------------------------


def fixture() -> tuple[BERT, dict[str, np.ndarray], Path]:
    if not FIXTURE.is_dir():
        pytest.skip("golden/bert_tf_tiny is not on this machine; tests/golden has its own")
    config = json.loads((FIXTURE / "bert_config.json").read_text("utf-8"))
    model = BERT(
        config["vocab_size"], config["max_position_embeddings"], config["num_hidden_layers"],
        config["hidden_size"], config["num_attention_heads"], **BERTS,
        inner=config["intermediate_size"], dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return model, dict(np.load(FIXTURE / "io.npz")), FIXTURE


def from_tensorflow(model: BERT, weights: Any) -> Any:
    """Variables of the TF graph, `a|b|c`, as our tree; their gradients and updates as well."""
    width, heads, layers = model.width, model.heads, range(model.depth)
    rows = -(-model.vocab // 128) * 128

    def padded(name: str) -> np.ndarray:
        x = weights[name]
        return np.pad(x, [(0, rows - model.vocab)] + [(0, 0)] * (x.ndim - 1))

    def stacked(name: str) -> np.ndarray:
        return np.stack([weights[f"bert|encoder|layer_{i}|{name}"] for i in layers])

    def norm(name: str, stack: bool = False) -> dict[str, np.ndarray]:
        get = stacked if stack else weights.__getitem__
        return {"scale": get(f"{name}|gamma"), "bias": get(f"{name}|beta")}

    def dense(name: str, stack: bool = False) -> dict[str, np.ndarray]:
        get = stacked if stack else weights.__getitem__
        return {"kernel": get(f"{name}|kernel"), "bias": get(f"{name}|bias")}

    def qkv(part: str) -> np.ndarray:
        names = [f"attention|self|{n}|{part}" for n in ("query", "key", "value")]
        shape = (width,) if part == "kernel" else ()
        each = [stacked(n).reshape(model.depth, *shape, heads, width // heads) for n in names]
        return np.stack(each, axis=-3)

    out = dense("attention|output|dense", True)
    out["kernel"] = out["kernel"].reshape(model.depth, heads, width // heads, width)
    return {
        "embeddings": {
            "embedding": padded("bert|embeddings|word_embeddings"),
            "positions": weights["bert|embeddings|position_embeddings"],
            "types": weights["bert|embeddings|token_type_embeddings"],
            "norm": norm("bert|embeddings|LayerNorm"),
        },
        "blocks": {
            "attention": {"qkv": {"kernel": qkv("kernel"), "bias": qkv("bias")}, "out": out},
            "norm_1": norm("attention|output|LayerNorm", True),
            "norm_2": norm("output|LayerNorm", True),
            "mlp": {"up": dense("intermediate|dense", True), "down": dense("output|dense", True)},
        },
        "pooler": dense("bert|pooler|dense"),
        "pair": {
            "kernel": weights["cls|seq_relationship|output_weights"].T,
            "bias": weights["cls|seq_relationship|output_bias"],
        },
        "masked": {
            "transform": dense("cls|predictions|transform|dense"),
            "norm": norm("cls|predictions|transform|LayerNorm"),
            "output_bias": padded("cls|predictions|output_bias"),
        },
    }


def tensorflow_batch(io: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    names = {
        "tokens_BL": "input_ids",
        "segments_BL": "input_mask",
        "types_BL": "segment_ids",
        "masked_BP": "masked_lm_positions",
        "targets_BP": "masked_lm_ids",
        "weights_BP": "masked_lm_weights",
        "pairs_BC": "next_sentence_labels",
    }
    batch = {ours: io[f"b{number}_in_{theirs}"] for ours, theirs in names.items()}
    ones = np.ones_like(batch["pairs_BC"])
    return {**batch, "firsts_BC": 0 * ones, "pair_weights_BC": ones.astype(np.float32)}


@pytest.mark.parametrize("number", range(4))
def test_every_layer_and_both_losses_are_those_of_the_original_graph(number: int):
    model, io, folder = fixture()
    params = from_tensorflow(model, np.load(folder / "weights.npz"))
    batch = tensorflow_batch(io, number)
    outputs: Any = model.apply({"params": params}, batch, states=True)
    real = batch["segments_BL"] > 0
    wanted = [io[f"b{number}_out_embedding"], *io[f"b{number}_out_layers"]]
    for ours, theirs in zip(outputs.states_NBLD, wanted, strict=True):
        np.testing.assert_allclose(ours[real], theirs[real], atol=1e-5)
    pooled = outputs.heads["pooled_BCD"][:, 0]
    np.testing.assert_allclose(pooled, io[f"b{number}_out_pooled"], atol=1e-5)
    sums = losses.masked_token_and_pair(outputs, batch)
    for ours, theirs in (("masked_loss", "mlm_loss"), ("pair_loss", "nsp_loss")):
        mean = sums[ours][0] / sums[ours][1]
        np.testing.assert_allclose(mean, io[f"b{number}_out_{theirs}"], atol=1e-5)


def test_gradients_are_those_of_the_original_graph():
    model, io, folder = fixture()
    params = from_tensorflow(model, np.load(folder / "weights.npz"))
    wanted = from_tensorflow(model, np.load(folder / "grads_b0.npz"))
    batch = tensorflow_batch(io, 0)

    def objective(params: Any) -> Any:
        sums = losses.masked_token_and_pair(model.apply({"params": params}, batch), batch)  # type: ignore[arg-type]
        return losses.total({name: s / w for name, (s, w) in sums.items()})

    got = jax.grad(objective)(params)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max())


def test_forty_steps_are_those_of_the_original_optimiser():
    model, io, folder = fixture()
    record = json.loads((folder / "train_trajectory.json").read_text("utf-8"))
    recipe_of_bert = recipe.load(str(ROOT / "experiments/bert_base.py")).optim
    optim: AdamW = recipe.override(recipe_of_bert, [("peak", "1e-3"), ("warmup", "10")])
    schedule = optim.schedule(40, lambda s: s)
    params = from_tensorflow(model, np.load(folder / "weights.npz"))
    state = state_from(optim.transform(schedule), jax.tree.map(jnp.asarray, params))
    loss = losses.masked_token_and_pair
    step = jax.jit(make_train_step(model, loss, optim.transform(schedule), schedule, 0))
    for line in record["steps"]:
        state, metrics = step(state, tensorflow_batch(io, line["step"] % 4))
        assert abs(float(metrics["loss"]) - line["loss"]) < 1e-4, line
        np.testing.assert_allclose(metrics["gradient_norm"], line["grad_norm"], rtol=1e-4)
    after = from_tensorflow(model, np.load(folder / "weights_after.npz"))
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
