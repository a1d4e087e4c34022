# SPDX-License-Identifier: Apache-2.0
"""The chunked cross-entropy equals the plain one, on every mesh, in a fraction of its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.layers import Outputs, Readout
from lmjax.losses import cross_entropy, next_token
from lmjax.sharding import Layout

ROWS, LENGTH, WIDTH, VOCAB, PADDED = 8, 12, 16, 120, 128
ONE_POSITION = ROWS * PADDED * 4  # bytes of float32 scores at one position
MESHES = {
    "one device": None,
    "8x1x1": Layout(8, 1, 1),
    "1x8x1": Layout(1, 8, 1),
    "2x2x2": Layout(2, 2, 2),
    "1x1x8": Layout(1, 1, 8),
    "1x2x2x2": Layout(1, 2, 2, 2),
}


def inputs(bias: bool):
    random = np.random.default_rng(0)
    hidden_BLD = random.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    # Padding rows are loud here, so that any probability they got would show.
    table_VD = random.normal(size=(PADDED, WIDTH)).astype(np.float32)
    table_VD[VOCAB:] = 9
    bias_V = random.normal(size=PADDED).astype(np.float32) if bias else None
    targets_BL = random.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    targets_BL[0, 0] = VOCAB - 1
    weights_BL = random.choice([0.0, 0.5, 1.0, 2.0], (ROWS, LENGTH)).astype(np.float32)
    return hidden_BLD, table_VD, bias_V, targets_BL, weights_BL


def plain(hidden, table, bias, targets, weights):
    """(nll, hits) and the gradients of nll in float64, with all the scores at once."""
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    scores = hidden @ table.T + (0 if bias is None else bias.astype(np.float64))
    scores[..., VOCAB:] = -np.inf
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    probs = exp / exp.sum(-1, keepdims=True)
    onehot = np.eye(PADDED)[targets]
    nll = -np.sum(weights * np.log(np.sum(probs * onehot, -1)))
    hits = np.sum(weights * (scores.argmax(-1) == targets))
    grad_scores = (probs - onehot) * weights[..., None]
    grad_table = np.einsum("blv,bld->vd", grad_scores, hidden)
    return (nll, hits), (grad_scores @ table, grad_table, grad_scores.sum((0, 1)))


def ours(hidden, table, bias, targets, weights, chunk_bytes, scale=1.0):
    """((nll, hits), gradients) by the function under test."""

    def objective(hidden, table, bias):
        readout = Readout(table, bias, rows=VOCAB)
        nll, hits = cross_entropy(hidden, readout, targets, weights, chunk_bytes)
        return scale * nll, (nll, hits)

    wanted = (0, 1) if bias is None else (0, 1, 2)
    run = jax.jit(jax.grad(objective, argnums=wanted, has_aux=True))
    gradients, sums = run(hidden, table, bias)
    return jax.device_get(sums), jax.device_get(gradients)


def check(sums, gradients, expected):
    (nll, hits), wanted = expected
    assert abs(sums[0] - nll) < 1e-6 * nll and sums[1] == hits
    for got, want in zip(gradients, wanted, strict=False):
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("chunk_bytes", [2**30, 5 * ONE_POSITION, 1])  # 1, 3 and 12 chunks
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_chunks_equal_the_plain_loss(chunk_bytes: int, bias: bool):
    given = inputs(bias)
    check(*ours(*given, chunk_bytes), plain(*given))


@pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES.keys())
@pytest.mark.parametrize("chunk_bytes", [2**30, 1], ids=["one chunk", "many chunks"])
def test_every_mesh_gives_the_plain_loss(layout: Layout | None, chunk_bytes: int):
    given = inputs(bias=True)
    if layout is None:
        return check(*ours(*given, chunk_bytes), plain(*given))
    with sharding.use(layout.mesh()):
        check(*ours(*given, chunk_bytes), plain(*given))


def test_the_gradient_follows_what_the_loss_is_multiplied_with():
    given = inputs(bias=True)
    _, once = ours(*given, 1)
    _, thrice = ours(*given, 1, scale=3.0)
    for a, b in zip(once, thrice, strict=True):
        np.testing.assert_allclose(3 * a, b, rtol=1e-5)


def test_evaluation_gives_the_sums_of_training():
    hidden, table, bias, targets, weights = inputs(bias=True)
    sums, _ = ours(hidden, table, bias, targets, weights, 1)
    alone = jax.jit(lambda: cross_entropy(hidden, Readout(table, bias, VOCAB), targets, weights, 1))
    np.testing.assert_allclose(alone(), sums, rtol=1e-6)


@pytest.mark.parametrize("layout", [None, Layout(1, 1, 8)], ids=["one device", "1x1x8"])
def test_padding_rows_get_no_probability_and_no_gradient(layout: Layout | None):
    hidden, table, bias, targets, weights = inputs(bias=True)
    other = table.copy()
    other[VOCAB:] = -300.0  # whatever stands there, nothing changes
    with sharding.use((layout or Layout(1, 1, 1)).mesh(None if layout else jax.devices()[:1])):
        sums, gradients = ours(hidden, table, bias, targets, weights, 1)
        again, same = ours(hidden, other, bias, targets, weights, 1)
    assert np.array_equal(sums, again)
    for a, b in zip(gradients, same, strict=True):
        assert np.array_equal(a, b)
    assert not gradients[1][VOCAB:].any() and not gradients[2][VOCAB:].any()
    assert gradients[1][:VOCAB].any(axis=1).all()


def test_targets_of_weight_zero_do_not_count():
    hidden, table, bias, targets, weights = inputs(bias=True)
    other = np.where(weights == 0, (targets + 1) % VOCAB, targets)
    loud = np.where(weights[..., None] == 0, hidden + 5, hidden)
    sums, gradients = ours(hidden, table, bias, targets, weights, 1)
    again, same = ours(loud, table, bias, other, weights, 1)
    np.testing.assert_allclose(sums, again, rtol=1e-6)
    assert not gradients[0][weights == 0].any() and not same[0][weights == 0].any()
    np.testing.assert_allclose(gradients[1], same[1], atol=1e-5)


def test_large_scores_do_not_overflow():
    hidden, table, bias, targets, weights = inputs(bias=False)
    given = (hidden * 100, table, bias, targets, weights)
    sums, gradients = ours(*given, 1)
    assert np.isfinite(sums).all() and all(np.isfinite(g).all() for g in gradients)
    (nll, hits), _ = _by_log_sum_exp(*given)
    np.testing.assert_allclose(sums, (nll, hits), rtol=1e-5)


def _by_log_sum_exp(hidden, table, bias, targets, weights):
    scores = (hidden.astype(np.float64) @ table.astype(np.float64).T)[..., :VOCAB]
    top = scores.max(-1)
    norm = np.log(np.exp(scores - top[..., None]).sum(-1)) + top
    target = np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    return (np.sum(weights * (norm - target)), np.sum(weights * (target >= top))), None


def test_bfloat16_states_give_a_float32_loss_and_a_float32_table_gradient():
    hidden, table, bias, targets, weights = inputs(bias=False)
    low = jnp.asarray(hidden, jnp.bfloat16)
    sums, gradients = ours(low, table, bias, targets, weights, 1)
    assert sums[0].dtype == np.float32 and gradients[1].dtype == np.float32
    assert gradients[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        sums[0], plain(hidden, table, bias, targets, weights)[0][0], rtol=0.01
    )


def test_next_token_gives_sums_and_weights_never_means():
    hidden, table, _, targets, weights = inputs(bias=False)
    batch = {"targets_BL": targets, "weights_BL": weights}

    def sums(rows: slice):
        part = {key: value[rows] for key, value in batch.items()}
        return next_token(Outputs(hidden[rows], Readout(table, rows=VOCAB)), part)

    whole, first, last = sums(slice(None)), sums(slice(3)), sums(slice(3, None))
    assert set(whole) == {"loss", "accuracy"}
    for name, (total, weight) in whole.items():
        np.testing.assert_allclose(total, first[name][0] + last[name][0], rtol=1e-6)
        assert weight == first[name][1] + last[name][1] == weights.sum()
    np.testing.assert_allclose(whole["loss"][0], plain(*inputs(False))[0][0], rtol=1e-6)
    np.testing.assert_allclose(whole["accuracy"][0], plain(*inputs(False))[0][1])


def test_accuracy_counts_hits_and_has_no_gradient():
    hidden, table, _, targets, weights = inputs(bias=False)

    def accuracy(hidden):
        outputs = Outputs(hidden, Readout(table, rows=VOCAB))
        return next_token(outputs, {"targets_BL": targets, "weights_BL": weights})["accuracy"][0]

    assert not np.asarray(jax.grad(accuracy)(jnp.asarray(hidden))).any()


# --- memory ---------------------------------------------------------------------------------------


def temporary_bytes(loss) -> int:
    """What XLA sets aside beside arguments and results for the loss and its gradients."""
    rows, length, width, vocab = 8, 128, 32, 8192
    hidden = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
    table = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    compiled = run.lower(hidden, table, targets, weights).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_scores_of_all_positions_never_exist():
    all_scores = 8 * 128 * 8192 * 4

    def chunked(hidden, table, targets, weights):
        return cross_entropy(hidden, Readout(table, rows=8000), targets, weights)[0]

    def whole(hidden, table, targets, weights):
        logs = jax.nn.log_softmax(hidden @ table.T)
        return -jnp.sum(weights * jnp.take_along_axis(logs, targets[..., None], -1)[..., 0])

    ours, plain = temporary_bytes(chunked), temporary_bytes(whole)
    assert plain >= all_scores  # the measure sees them where they are
    assert ours < all_scores / 2 and ours < plain / 3
