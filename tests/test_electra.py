# SPDX-License-Identifier: Apache-2.0
"""ELECTRA: a generator and a discriminator in one step, over shared embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from encoders import MODELS, VOCAB, apply, example, params_of

from lmjax import losses
from lmjax.layers import Readout
from lmjax.models.electra import draw, replace


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
