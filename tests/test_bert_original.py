# SPDX-License-Identifier: Apache-2.0
"""BERT beside Google's own graph: every layer, both losses, gradients, forty steps.

Shapes: B batch, L length, P scored tokens, C sequences of a row.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT

from lmjax import losses, recipe
from lmjax.models.bert import BERT
from lmjax.optim import AdamW
from lmjax.step import make_train_step, state_from

FIXTURE = ROOT.parent / "shared" / "data" / "fixtures" / "golden" / "bert_tf_tiny"
BERTS: dict[str, Any] = {"activation": "gelu_tanh", "epsilon": 1e-12}


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
    layers = range(model.depth)
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
        return np.stack([stacked(name) for name in names], axis=-2)

    return {
        "embeddings": {
            "embedding": padded("bert|embeddings|word_embeddings"),
            "positions": weights["bert|embeddings|position_embeddings"],
            "types": weights["bert|embeddings|token_type_embeddings"],
            "norm": norm("bert|embeddings|LayerNorm"),
        },
        "blocks": {
            "attention": {
                "qkv": {"kernel": qkv("kernel"), "bias": qkv("bias")},
                "out": dense("attention|output|dense", True),
            },
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
