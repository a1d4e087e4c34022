# SPDX-License-Identifier: Apache-2.0
"""ELMo against the training graph of the original: losses, gradients, and what it carries."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import bilm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.losses import bidirectional
from lmjax.models.elmo import ELMo
from lmjax.step import total_of

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "fixtures" / "golden" / "bilm_tf_train"
TOTALS = (3.947876, 3.988523, 4.037529, 4.251988, 3.934579, 4.165869)
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is not here")


@cache
def golden() -> tuple[ELMo, Any, Any, Any]:
    """(model, parameters, inputs and outputs, gradients of batch 0) of the original."""
    options = json.loads((GOLDEN / "options.json").read_text())
    lstm, cnn = options["lstm"], options["char_cnn"]
    model = ELMo(
        vocab=options["n_tokens_vocab"],
        depth=lstm["n_layers"],
        cells=lstm["dim"],
        width=lstm["projection_dim"],
        embedding=cnn["embedding"]["dim"],
        filters=tuple(map(tuple, cnn["filters"])),
        highways=cnn["n_highway"],
        activation=cnn["activation"],
        negatives=0,
        dropout=0.0,
    )
    io, weights, gradients = (
        dict(np.load(GOLDEN / f"{name}.npz")) for name in ("io", "weights", "grads_b0")
    )
    return model, tree_of(model, weights), io, tree_of(model, gradients)


def tree_of(model: ELMo, arrays: dict[str, np.ndarray]) -> Any:
    """The original's variables as parameters of the model."""
    found = {name.removeprefix("lm|"): x for name, x in arrays.items()}
    width, cells = model.width, model.cells
    tree: dict[str, Any] = {"characters": {"table": found["char_embed"]}}
    for i in range(len(model.filters)):
        kernel, bias = found[f"CNN|W_cnn_{i}"][0], found[f"CNN|b_cnn_{i}"]
        tree["characters"][f"conv_{i}"] = {"kernel": kernel, "bias": bias}
    for k in range(model.highways):
        tree["characters"][f"highway_{k}"] = {
            part: {
                "kernel": found[f"CNN_high_{k}|W_{part}"],
                "bias": found[f"CNN_high_{k}|b_{part}"],
            }
            for part in ("carry", "transform")
        }
    project = {"kernel": found["CNN_proj|W_proj"], "bias": found["CNN_proj|b_proj"]}
    tree["characters"]["project"] = project
    for n in range(model.depth):
        names = [f"RNN_{x}|rnn|multi_rnn_cell|cell_{n}|lstm_cell" for x in (0, 1)]
        kernel = np.stack([found[f"{name}|kernel"].reshape(2 * width, 4, cells) for name in names])
        tree[f"layer_{n}"] = {
            "input": {"kernel": kernel[:, :width]},
            "recurrent": {"kernel": kernel[:, width:]},
            "bias": np.stack([found[f"{name}|bias"].reshape(4, cells) for name in names]),
            "out": {"kernel": np.stack([found[f"{name}|projection|kernel"] for name in names])},
        }
    table, bias = found["softmax|W"], found["softmax|b"]
    tree["softmax"] = {
        "embedding": np.pad(table, ((0, 128 - len(table)), (0, 0))),
        "output_bias": np.pad(bias, (0, 128 - len(bias))),
    }
    return jax.tree.map(jnp.asarray, tree)


def batch_of(io: dict[str, np.ndarray], k: int) -> dict[str, jax.Array]:
    """Batch k of the original: both directions, as it processes them."""

    def both(name: str) -> np.ndarray:
        return np.stack([io[f"b{k}_{name}"], io[f"b{k}_{name}_reverse"]], axis=1)

    words = both("token_ids")
    return {
        "words_BXL": jnp.asarray(words),
        "characters_BXLC": jnp.asarray(both("tokens_characters").astype(np.int16)),
        # The characters of these batches are drawn for each place, whatever the word.
        "spellings_BXL": jnp.arange(words.size).reshape(words.shape),
        "targets_BXL": jnp.asarray(both("next_token_id")),
        "weights_BXL": jnp.ones(words.shape, jnp.float32),
    }


def loss_of(model: ELMo, params: Any, batch: Any, carry: Any) -> Any:
    outputs: Any = model.apply({"params": params}, batch, carry=carry)
    means = {name: s / w for name, (s, w) in bidirectional(outputs, batch).items()}
    return total_of(bidirectional)(means), (means, outputs)


@needs_golden
def test_six_batches_that_carry_their_state_have_the_losses_of_the_original():
    model, params, io, _ = golden()
    run = jax.jit(lambda batch, carry: loss_of(model, params, batch, carry))
    carry = model.initial_carry(3)
    for k, expected in enumerate(TOTALS):
        loss, (means, outputs) = run(batch_of(io, k), carry)
        got = [loss, means["forward_loss"], means["backward_loss"]]
        np.testing.assert_allclose(got, io[f"b{k}_losses"], atol=1e-5)
        assert loss == pytest.approx(expected, abs=1e-5)
        for x, name in enumerate(("fwd", "bwd")):
            got = outputs.hidden_BLD[:, x]
            np.testing.assert_allclose(got, io[f"b{k}_lstm_{name}"], atol=1e-5)
        carry = outputs.cache
    fresh, _ = run(batch_of(io, 1), model.initial_carry(3))
    assert abs(float(fresh) - TOTALS[1]) > 1e-3  # what was carried matters


@needs_golden
def test_states_of_six_batches_are_those_of_float64():
    """Nearer than the original's own: its float32 states are up to 3.6e-6 away."""
    model, params, io, _ = golden()
    run = jax.jit(lambda batch, carry: loss_of(model, params, batch, carry)[1][1])
    networks = [in_float64() for _ in range(3)]
    carry = model.initial_carry(3)
    for k in range(len(TOTALS)):
        batch = batch_of(io, k)
        outputs = run(batch, carry)
        letters_BXLC = np.asarray(batch["characters_BXLC"])
        for row, network in enumerate(networks):
            for x in (0, 1):
                states = np.stack([network.spelt(ids) for ids in letters_BXLC[row, x]])
                for layer in range(model.depth):
                    states = network.cell(x, layer, states)
                np.testing.assert_allclose(outputs.hidden_BLD[row, x], states, atol=2e-6)
        carry = outputs.cache


def in_float64() -> bilm.Network:
    """The original's network and variables, in numpy."""
    options = json.loads((GOLDEN / "options.json").read_text())
    weights = {}
    for name, x in np.load(GOLDEN / "weights.npz").items():
        name = name.removeprefix("lm|").replace("|", "/")
        name = re.sub(
            r"rnn/multi_rnn_cell/cell_(\d+)/lstm_cell", r"RNN/MultiRNNCell/Cell\1/LSTMCell", name
        )
        for ours, theirs in (("projection/kernel", "W_P_0"), ("kernel", "W_0"), ("bias", "B")):
            name = name.replace(f"LSTMCell/{ours}", f"LSTMCell/{theirs}")
        weights[name] = x
    return bilm.Network(options, weights)


@needs_golden
def test_gradients_are_those_of_the_original():
    model, params, io, expected = golden()
    carry = model.initial_carry(3)
    gradients = jax.grad(lambda p: loss_of(model, p, batch_of(io, 0), carry)[0])(params)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, atol=1e-4 * scale, err_msg=str(path))
