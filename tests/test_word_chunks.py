# SPDX-License-Identifier: Apache-2.0
"""The cross-entropy with words in chunks equals the one with tokens in chunks, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import losses, sharding
from lmjax.layers import Readout
from lmjax.losses import cross_entropy
from lmjax.sharding import Layout

ROWS, LENGTH, WIDTH, VOCAB, PADDED = 8, 12, 16, 90, 128
MESHES = {
    "one device": None,
    "8x1x1": Layout(8, 1, 1),
    "1x8x1": Layout(1, 8, 1),
    "2x2x2": Layout(2, 2, 2),
    "1x1x8": Layout(1, 1, 8),
    "1x2x2x2": Layout(1, 2, 2, 2),
}


def inputs():
    random = np.random.default_rng(0)
    hidden = random.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    table = random.normal(size=(PADDED, WIDTH)).astype(np.float32)
    table[VOCAB:] = 9  # padding is loud
    bias = random.normal(size=PADDED).astype(np.float32)
    targets = random.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    targets[0] = (hidden[0] @ table[:VOCAB].T + bias[:VOCAB]).argmax(-1)  # hits
    weights = random.choice([0.0, 0.5, 1.0, 2.0], (ROWS, LENGTH)).astype(np.float32)
    return hidden, table, bias, targets, weights


def check(found, wanted, tolerance=2e-6):
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance)
    for ours, other in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(ours, other, atol=tolerance * np.abs(other).max())


def run(cut, hidden, table, bias, targets, weights, chunk_bytes=2**12):
    def objective(hidden, table, bias):
        nll, hits = cross_entropy(
            hidden,
            Readout(table, bias, VOCAB),
            targets,
            weights,
            chunk_bytes,
            cut,
        )
        return 3 * nll, (nll, hits)

    differentiate = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))
    grads, sums = differentiate(*(jnp.asarray(a) for a in (hidden, table, bias)))
    return jax.device_get((sums, grads))


@pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES.keys())
@pytest.mark.parametrize("chunk_bytes", [2**30, 2**13, 1])
def test_words_in_chunks_equal_tokens_in_chunks(layout: Layout | None, chunk_bytes: int):
    hidden, table, bias, targets, weights = inputs()
    given = (hidden, table, bias, targets, weights)
    wanted = run("tokens", *given)
    assert wanted[0][1] > 0
    if layout is None:
        return check(run("words", *given, chunk_bytes), wanted, 2e-6)
    with sharding.use(layout.mesh()):
        check(run("words", *given, chunk_bytes), wanted, 1e-5)


def test_many_words_are_cut_and_few_are_not(monkeypatch: pytest.MonkeyPatch):
    hidden, table, bias, targets, weights = inputs()
    whole = run("words", hidden, table, bias, targets, weights)
    calls = []
    cut = losses.cross_entropies
    monkeypatch.setattr(losses, "cross_entropies", lambda *a: calls.append(a[-1]) or cut(*a))
    for large, expected in ((PADDED, 1), (PADDED + 1, 0)):
        monkeypatch.setattr(losses, "_LARGE", large)
        calls.clear()
        check(run(None, hidden, table, bias, targets, weights), whole)
        assert len(calls) == expected


def test_the_scores_of_all_words_never_exist():
    shapes = (8, 64, 16), (2**15, 16), (8, 64)
    hidden, table, targets = (
        jax.ShapeDtypeStruct(s, d)
        for s, d in zip(shapes, (jnp.float32, jnp.float32, jnp.int32), strict=True)
    )

    def temporary(chunk_bytes: int) -> int:
        def loss(hidden, table, targets):
            readout = Readout(table, rows=table.shape[0])
            ones = jnp.ones(targets.shape)
            return cross_entropy(hidden, readout, targets, ones, chunk_bytes, "words")[0]

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_scores = 8 * 64 * 2**15 * 4
    assert temporary(2**30) > all_scores > 8 * temporary(2**21)
