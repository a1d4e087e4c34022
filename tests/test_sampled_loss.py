# SPDX-License-Identifier: Apache-2.0
"""The sampled softmax is its formula on every mesh, and agrees with the full ones."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import losses, sampled, sharding, sparse
from lmjax.layers import Outputs, Readout
from lmjax.losses import bidirectional, cross_entropy
from lmjax.sampled import EMPTY, draw_log_uniform, placed, touched_rows
from lmjax.sampled_loss import sampled_cross_entropy
from lmjax.sharding import Layout

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "fixtures" / "golden" / "bilm_tf_train"

ROWS, LENGTH, WIDTH, VOCAB, PADDED, COUNT = 8, 12, 16, 90, 128, 13


def expected_counts(vocab: int, tries: float) -> np.ndarray:
    """How often each word is expected among the distinct ones of TensorFlow's log-uniform draws."""
    k = np.arange(vocab, dtype=np.float64)
    chance = (np.log(k + 2) - np.log(k + 1)) / np.log(vocab + 1)
    return -np.expm1(tries * np.log1p(-chance))


def inputs():
    random = np.random.default_rng(0)
    hidden = random.normal(size=(ROWS, 2, LENGTH, WIDTH)).astype(np.float32)
    table = random.normal(size=(PADDED, WIDTH)).astype(np.float32)
    bias = random.normal(size=PADDED).astype(np.float32)
    ids = np.stack([np.sort(random.permutation(VOCAB)[:COUNT]) for _ in range(2)]).astype(np.int32)
    targets = random.integers(0, VOCAB, (ROWS, 2, LENGTH)).astype(np.int32)
    targets[0, 0, :5], targets[3, 1, 4] = ids[0, :5], ids[1, 7]  # hits
    weights = random.choice([0.0, 0.5, 1.0, 2.0], (ROWS, 2, LENGTH)).astype(np.float32)
    return hidden, table, bias, targets, weights, ids, np.array([20, 31], np.int32)


SCALE = np.array([3.0, 0.5])  # what each direction's sum is multiplied with


def plain(hidden, table, bias, targets, weights, ids, tries):
    """(X,) sums, and the gradients of SCALE · sums in float64, with all scores at once."""
    hidden, table, bias = (a.astype(np.float64) for a in (hidden, table, bias))
    sums, grads = [], [np.zeros(hidden.shape), np.zeros(table.shape), np.zeros(bias.shape)]
    for x in range(2):
        log_counts = np.log(expected_counts(VOCAB, tries[x]))
        scores = hidden[:, x] @ table[:VOCAB].T + bias[:VOCAB] - log_counts
        target = np.eye(VOCAB)[targets[:, x]]
        scored = np.isin(np.arange(VOCAB), ids[x]) | (target > 0)
        exp = np.exp(scores) * scored  # a hit counts once, as the target
        probs = exp / exp.sum(-1, keepdims=True)
        sums.append(-np.sum(weights[:, x] * np.log(np.sum(probs * target, -1))))
        grad = (probs - target) * weights[:, x, :, None] * SCALE[x]
        grads[0][:, x] = grad @ table[:VOCAB]
        grads[1][:VOCAB] += np.einsum("blv,bld->vd", grad, hidden[:, x])
        grads[2][:VOCAB] += grad.sum((0, 1))
    return np.array(sums), grads


def ours(hidden, table, bias, targets, weights, ids, tries, chunks=1, rows=None):
    """The same by the function under test; `rows` cuts the table down to them."""

    def objective(hidden, table, bias):
        negatives = placed(jnp.asarray(ids), jnp.asarray(tries), VOCAB, rows)
        if rows is not None:
            table, bias = (x.at[rows].get(mode="fill", fill_value=0) for x in (table, bias))
        readout = Readout(table, bias, VOCAB, negatives)
        nll_X = sampled_cross_entropy(hidden, readout, targets, weights, chunks)
        return (nll_X * SCALE.astype(np.float32)).sum(), nll_X

    run = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))
    grads, sums = run(*(jnp.asarray(a) for a in (hidden, table, bias)))
    return jax.device_get((sums, grads))


def check(found, wanted, tolerance=2e-6):
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance)
    for ours, plain in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(ours, plain, atol=tolerance * np.abs(plain).max())


@pytest.mark.parametrize("chunks", [1, 3, 12])
def test_loss_and_gradients_are_those_of_the_formula(chunks: int):
    given = inputs()
    check(ours(*given, chunks=chunks), plain(*given))


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_table_of_the_touched_rows_gives_the_same(chunks: int):
    given = inputs()
    rows = touched_rows(PADDED, jnp.asarray(given[5]), jnp.asarray(given[3]))
    check(ours(*given, chunks=chunks, rows=rows), plain(*given))


MESHES = {
    "8x1x1": Layout(8, 1, 1),
    "1x8x1": Layout(1, 8, 1),
    "2x2x2": Layout(2, 2, 2),
    "1x1x8": Layout(1, 1, 8),
}


@pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES.keys())
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("cut", [False, True], ids=["whole table", "touched rows"])
def test_every_mesh_gives_the_same(layout: Layout, chunks: int, cut: bool):
    given = inputs()
    rows = touched_rows(PADDED, jnp.asarray(given[5]), jnp.asarray(given[3])) if cut else None
    with sharding.use(layout.mesh()):
        check(ours(*given, chunks=chunks, rows=rows), plain(*given), 1e-5)


def test_the_forward_pass_alone_gives_the_same_sums():
    hidden, table, bias, targets, weights, ids, tries = given = inputs()
    readout = Readout(table, bias, VOCAB, placed(jnp.asarray(ids), jnp.asarray(tries), VOCAB))
    alone = jax.jit(lambda: sampled_cross_entropy(hidden, readout, targets, weights, 3))
    np.testing.assert_allclose(alone(), plain(*given)[0], rtol=2e-6)


def test_empty_places_count_nothing_and_get_no_gradient():
    *given, ids, tries = inputs()
    few = [np.where(np.arange(COUNT) < 9, ids, EMPTY), tries]
    check(ours(*given, *few), plain(*given, *few))


def test_large_scores_do_not_overflow():
    hidden, table, bias, targets, weights, ids, tries = inputs()
    sums, grads = ours(hidden * 300, table, bias, targets, weights, ids, tries)
    assert np.isfinite(sums).all() and all(np.isfinite(g).all() for g in grads)
    assert (sums > 1e4).all()


def test_bfloat16_states_give_float32_sums_and_table_gradients():
    given = inputs()
    low = jnp.asarray(given[0], jnp.bfloat16)
    sums, grads = ours(low, *given[1:])
    assert sums.dtype == np.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, np.float32, np.float32]
    check((sums, [np.asarray(g, np.float32) for g in grads]), plain(*given), 0.02)


def test_the_scores_of_all_tokens_never_exist():
    rows, length, width, count, vocab = 8, 64, 16, 4096, 8192
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((rows, 2, length, width), jnp.float32),
            ((vocab, width), jnp.float32),
            ((rows, 2, length), jnp.int32),
            ((2, count), jnp.int32),
        )
    ]

    def temporary(chunks: int) -> int:
        def loss(hidden, table, targets, ids):
            negatives = placed(ids, jnp.array([count, count]), vocab)
            readout = Readout(table, None, vocab, negatives)
            ones = jnp.ones(targets.shape)
            return sampled_cross_entropy(hidden, readout, targets, ones, chunks).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_scores = rows * length * count * 4
    assert temporary(1) > all_scores > 2 * temporary(16)


# --- in expectation: every set of negatives, with its probability ---------------------------------

TINY, TRIES = 7, 6


def every_set() -> tuple[jax.Array, np.ndarray]:
    """All sets of TINY words (A, X, S), and how likely each is if words come independently."""
    chance = expected_counts(TINY, TRIES)
    sets, probs = [], []
    for chosen in itertools.product([False, True], repeat=TINY):
        ids = np.sort(np.where(chosen, np.arange(TINY), EMPTY))
        sets.append(np.stack([ids, ids]))
        probs.append(np.prod(np.where(chosen, chance, 1 - chance)))
    return jnp.asarray(np.array(sets), jnp.int32), np.array(probs)


def tiny_inputs():
    """One context, which each word follows once: states, table, bias, targets."""
    random = np.random.default_rng(4)
    hidden = np.broadcast_to(random.normal(size=WIDTH), (1, 2, TINY, WIDTH)).astype(np.float32)
    table = random.normal(size=(TINY, WIDTH)).astype(np.float32) / 2
    bias = random.normal(size=TINY).astype(np.float32)
    targets = np.broadcast_to(np.arange(TINY), (1, 2, TINY)).astype(np.int32)
    return hidden, table, bias, targets


def expected_gradient(
    hits_removed: bool = True, of_targets: bool = True, of_negatives: bool = True
) -> np.ndarray:
    """E ∂loss/∂scores over words that follow as the model says, and over negatives; (V,).

    By the function under test, or if a part is left out, by the formula without it.
    """
    hidden, table, bias, targets = tiny_inputs()
    scores = hidden[0, 0, 0] @ table.T + bias
    truth = np.exp(scores) / np.exp(scores).sum()
    sets, probs = every_set()
    if hits_removed and of_targets and of_negatives:
        weights = np.broadcast_to(truth, targets.shape).astype(np.float32)

        def loss(bias, ids_XS):
            negatives = placed(ids_XS, jnp.array([TRIES, TRIES]), TINY)
            readout = Readout(jnp.asarray(table), bias, TINY, negatives)
            return sampled_cross_entropy(jnp.asarray(hidden), readout, targets, weights, 1)[0]

        grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(jnp.asarray(bias), sets)
        return probs @ np.asarray(grads, np.float64)
    log_counts = np.log(expected_counts(TINY, TRIES))
    total = np.zeros(TINY)
    for ids, prob in zip(np.asarray(sets)[:, 0], probs, strict=True):
        drawn = ids[ids < EMPTY]
        for target in range(TINY):
            others = drawn[drawn != target] if hits_removed else drawn
            words = np.concatenate([[target], others])
            logits = scores[words] - log_counts[words] * of_negatives
            logits[0] = scores[target] - log_counts[target] * of_targets
            probs_here = np.exp(logits) / np.exp(logits).sum()
            probs_here[0] -= 1
            np.add.at(total, words, prob * truth[target] * probs_here)
    return total


def test_what_is_optimal_for_the_full_softmax_is_optimal_for_the_sampled_one():
    """Where words follow as the model says, the expected gradient is 0, as the full softmax's is.

    That holds exactly for negatives that come independently with the expected counts: which of
    target and negatives is the target has odds exp(score) / count.
    """
    assert np.abs(expected_gradient()).max() < 1e-6


@pytest.mark.parametrize("left_out", ["hits_removed", "of_targets", "of_negatives"])
def test_it_is_not_with_a_part_left_out(left_out: str):
    assert np.abs(expected_gradient(**{left_out: False})).max() > 1e-3


def test_drawn_words_stand_for_the_whole_vocabulary_on_average():
    """E Σ exp(score) / count over negatives = Σ exp(score) over all words, whichever way summed."""
    hidden, table, bias, _ = tiny_inputs()
    bias[2] = -60.0  # the target: what remains of the sum are the negatives
    targets, ones = np.full((1, 2, 1), 2, np.int32), np.ones((1, 2, 1), np.float32)
    states = jnp.asarray(hidden[:, :, :1])
    sets, probs = every_set()

    def log_sum(ids_XS):
        readout = Readout(table, bias, TINY, placed(ids_XS, jnp.array([TRIES, TRIES]), TINY))
        return sampled_cross_entropy(states, readout, targets, ones, 1)[0]

    score = hidden[0, 0, 0] @ table[2] + bias[2]
    nll = np.asarray(jax.jit(jax.vmap(log_sum))(sets), np.float64)
    partition = probs @ np.exp(nll + score - np.log(expected_counts(TINY, TRIES))[2])
    for cut in ("tokens", "words"):
        full, _ = cross_entropy(
            states[:, 0], Readout(table, bias, TINY), targets[:, 0], ones[:, 0], 4, cut
        )
        np.testing.assert_allclose(partition, np.exp(np.float64(full) + score), rtol=2e-5)


def test_with_our_draws_the_three_agree_within_what_tensorflow_s_formula_leaves():
    """By the same sums: the draw that ends it is always of a new word, so one in S is too many."""
    vocab, count, times = 40, 20, 3000
    random = np.random.default_rng(1)
    states = jnp.asarray(random.normal(size=(1, 2, 1, WIDTH)), jnp.float32)
    table = jnp.asarray(random.normal(size=(vocab, WIDTH)) / 4, jnp.float32)
    bias = jnp.zeros(vocab).at[vocab - 1].set(-60)
    targets, ones = np.full((1, 2, 1), vocab - 1, np.int32), np.ones((1, 2, 1), np.float32)

    def log_sum(key):
        ids, tries = draw_log_uniform(key, count, vocab)
        negatives = placed(jnp.stack([ids, ids]), jnp.stack([tries, tries]), vocab)
        nll_X = sampled_cross_entropy(
            states, Readout(table, bias, vocab, negatives), targets, ones, 1
        )
        chance = sampled.log_expected_counts(jnp.int32(vocab - 1), tries.astype(jnp.float32), vocab)
        return nll_X[0] - chance

    nll = jax.jit(jax.vmap(log_sum))(jax.random.split(jax.random.key(0), times))
    full, _ = cross_entropy(states[:, 0], Readout(table, bias, vocab), targets[:, 0], ones[:, 0])
    ratio = np.exp(np.asarray(nll, np.float64) - np.float64(full)).mean()
    assert abs(ratio - 1) < 1 / count, ratio


@pytest.mark.parametrize("cut", ["tokens", "words"])
def test_if_every_word_is_sure_to_be_drawn_it_is_the_full_softmax(cut):
    hidden, table, bias, targets, weights, _, _ = inputs()
    bias = jnp.asarray(bias)
    everything = jnp.broadcast_to(jnp.arange(VOCAB)[None, :], (2, VOCAB))
    negatives = placed(everything, jnp.array([10**8, 10**8]), VOCAB)

    def sampled_sums(hidden, table):
        return sampled_cross_entropy(
            hidden, Readout(table, bias, VOCAB, negatives), targets, weights, 2
        )

    def full_sums(hidden, table):
        readout = Readout(table, bias, VOCAB)
        given = [[a[:, x] for a in (hidden, targets, weights)] for x in range(2)]
        parts = [cross_entropy(h, readout, t, w, 2**12, cut)[0] for h, t, w in given]
        return jnp.stack(parts)

    found, wanted = (
        jax.device_get((jax.jit(f)(hidden, table), jax.jit(jax.jacrev(f, (0, 1)))(hidden, table)))
        for f in (sampled_sums, full_sums)
    )
    check(found, wanted, 5e-6)


# --- a step's draw, and the loss of both directions -----------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_s_rows_are_all_that_its_loss_reads(tied: bool):
    hidden, table, bias, targets, weights, _, _ = inputs()
    words = jnp.asarray((targets + 1) % VOCAB) if tied else None
    drawn = sampled.draw(jnp.asarray(targets), jax.random.key(3), COUNT, VOCAB, words)
    again = sampled.draw(jnp.asarray(targets), jax.random.key(4), COUNT, VOCAB, words)
    negatives = drawn.batch["negatives"]
    ids = np.asarray(negatives.ids_XS)
    assert not np.array_equal(ids[0], ids[1]) and not np.array_equal(
        ids, again.batch["negatives"].ids_XS
    )
    used = np.unique(np.concatenate([ids.reshape(-1), targets.reshape(-1)]))
    used = np.union1d(used, words) if tied else used
    rows = np.asarray(drawn.rows_R)
    assert np.array_equal(rows[rows < EMPTY], used)

    params = {"softmax": {"embedding": table, "output_bias": bias}, "other": {"kernel": table}}
    taken = sparse.take(jax.tree.map(jnp.asarray, params), drawn)
    assert taken["other"]["kernel"].shape == table.shape
    softmax = taken["softmax"]
    if words is not None:
        np.testing.assert_array_equal(softmax["embedding"][negatives.place(words)], table[words])
    readout = Readout(softmax["embedding"], softmax["output_bias"], VOCAB, negatives)
    wanted, _ = plain(hidden, table, bias, targets, weights, ids, np.asarray(negatives.tries_X))
    batch = {"targets_BXL": jnp.asarray(targets), "weights_BXL": jnp.asarray(weights)}
    sums = bidirectional(Outputs(jnp.asarray(hidden), readout), batch)
    for x, name in enumerate(("forward_loss", "backward_loss")):
        np.testing.assert_allclose(sums[name][0], wanted[x], rtol=2e-6)
        np.testing.assert_allclose(sums[name][1], weights[:, x].sum())
    assert set(sums) == {"forward_loss", "backward_loss"}


@pytest.mark.parametrize("large", [False, True], ids=["tokens cut", "words cut"])
def test_without_negatives_each_direction_has_the_full_softmax(
    large: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(losses, "_LARGE", 1 if large else 10**6)
    monkeypatch.setattr(losses, "_CHUNK_BYTES", {"cpu": 2**12})
    passes, cut = [], losses.cross_entropies
    monkeypatch.setattr(losses, "cross_entropies", lambda *a: passes.append(a) or cut(*a))
    hidden, table, bias, targets, weights, _, _ = inputs()
    batch = {"targets_BXL": jnp.asarray(targets), "weights_BXL": jnp.asarray(weights)}
    sums = bidirectional(Outputs(jnp.asarray(hidden), Readout(table, bias, VOCAB)), batch)
    assert len(passes) == large  # a large table is gone through once for both directions
    scores = hidden.astype(np.float64) @ table[:VOCAB].T + bias[:VOCAB]
    target = np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    nll = (np.log(np.exp(scores).sum(-1)) - target) * weights
    np.testing.assert_allclose(sums["forward_loss"][0], nll[:, 0].sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["backward_loss"][0], nll[:, 1].sum(), rtol=1e-6)
    means = {name: s / w for name, (s, w) in sums.items()}
    mean = (nll[:, 0].sum() / weights[:, 0].sum() + nll[:, 1].sum() / weights[:, 1].sum()) / 2
    np.testing.assert_allclose(bidirectional.total(means), mean, rtol=1e-6)


# --- the original ---------------------------------------------------------------------------------


def test_losses_of_the_original_s_training_graph():
    if not GOLDEN.exists():
        pytest.skip("../shared/data is not here")
    weights, io = np.load(GOLDEN / "weights.npz"), np.load(GOLDEN / "io.npz")
    table, bias = weights["lm|softmax|W"], weights["lm|softmax|b"]
    vocab = json.loads((GOLDEN / "options.json").read_text())["n_tokens_vocab"]
    for step in range(6):
        states = np.stack([io[f"b{step}_lstm_fwd"], io[f"b{step}_lstm_bwd"]], 1)
        names = (f"b{step}_next_token_id", f"b{step}_next_token_id_reverse")
        targets = jnp.asarray(np.stack([io[name] for name in names], 1))
        batch = {"targets_BXL": targets, "weights_BXL": jnp.ones(targets.shape)}
        sums = bidirectional(Outputs(jnp.asarray(states), Readout(table, bias, vocab)), batch)
        means = {name: s / w for name, (s, w) in sums.items()}
        found = [bidirectional.total(means), means["forward_loss"], means["backward_loss"]]
        np.testing.assert_allclose(found, io[f"b{step}_losses"], rtol=0, atol=1e-5)
