# SPDX-License-Identifier: Apache-2.0
"""ELMo's training step: what it carries, its sparse rows, and the same numbers on every mesh."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.batches import Plan, batches
from lmjax.losses import bidirectional
from lmjax.models.elmo import ELMo
from lmjax.optim import Adagrad
from lmjax.sharding import Layout
from lmjax.step import create_state, jit_train_step, make_train_step, total_of

BATCH, LENGTH, WORDS, LETTERS, SEED = 16, 5, 300, 12, 3
MODEL = ELMo(
    vocab=WORDS, cells=16, width=8, embedding=4, filters=((1, 4), (2, 4)), highways=1,
    dropout=0.0, negatives=0,
)  # fmt: skip
OPTIM = Adagrad(gradient_scale=LENGTH)
SCHEDULE = OPTIM.schedule(10, lambda step: step)
ONE = Layout(1, 1, 1)
MESHES = {"8x1x1": Layout(8, 1, 1), "1x8x1": Layout(1, 8, 1), "2x2x2": Layout(2, 2, 2)}
LETTERS_OF = np.random.default_rng(0).integers(0, 261, (WORDS, LETTERS))


def make(examples: np.ndarray) -> dict[str, np.ndarray]:
    """Frequent words mostly, uneven weights."""
    rows = [np.random.default_rng(int(i)) for i in examples]
    words = np.stack([r.zipf(1.3, (2, LENGTH + 1)) % WORDS for r in rows]).astype(np.int32)
    weights = np.stack([np.arange(LENGTH) < r.integers(1, LENGTH + 1) for r in rows])
    return {
        "words_BXL": words[..., :-1],
        "characters_BXLC": LETTERS_OF[words[..., :-1]].astype(np.int16),
        "spellings_BXL": words[..., :-1],
        "targets_BXL": words[..., 1:],
        "weights_BXL": np.repeat(weights[:, None], 2, 1).astype(np.float32),
    }


@cache
def train(model: ELMo, layout: Layout = ONE, accumulate: int = 1, steps: int = 4):
    """(metrics of every step, last state) of a short run."""
    size = layout.data * layout.fsdp * layout.tensor
    with sharding.use(layout.mesh(jax.devices()[:size])):
        transform = OPTIM.transform(SCHEDULE)
        state = create_state(model, transform, SEED, BATCH)
        step = make_train_step(model, bidirectional, transform, SCHEDULE, SEED, accumulate)
        jitted = jit_train_step(step, state)
        metrics = []
        for batch in batches((make,), Plan(BATCH, LENGTH), 0, steps):
            state, values = jitted(state, batch)
            metrics.append(values)
        numbers = [{k: float(v) for k, v in values.items()} for values in metrics]
        return numbers, jax.device_get(state)


def assert_equal_runs(run, other, tolerance: float = 1e-5):
    for got, want in zip(run[0], other[0], strict=True):
        assert got == pytest.approx(want, rel=tolerance)
    for part in ("params", "opt_state", "carry"):
        trees = (jax.tree.leaves(getattr(state, part)) for state in (run[1], other[1]))
        for got, want in zip(*trees, strict=True):
            np.testing.assert_allclose(got, want, atol=tolerance * max(1, np.abs(want).max()))


@pytest.mark.parametrize(
    ("layout", "negatives"),
    [(MESHES["8x1x1"], 40), (MESHES["1x8x1"], 40), (MESHES["2x2x2"], 40), (MESHES["2x2x2"], 0)],
    ids=["8x1x1", "1x8x1", "2x2x2", "2x2x2 full softmax"],
)
def test_every_mesh_has_the_numbers_of_one_device(layout: Layout, negatives: int):
    model = MODEL.clone(negatives=negatives)
    metrics, state = train(model)
    assert_equal_runs(train(model, layout), (metrics, state))
    assert float(np.abs(state.carry["cell_BXNH"]).max()) > 0.01


@pytest.mark.parametrize("negatives", [0, 40])
def test_microbatches_change_no_number_and_keep_each_rows_state(negatives: int):
    model = MODEL.clone(negatives=negatives)
    assert_equal_runs(train(model, accumulate=4), train(model))


def test_the_state_is_carried_from_step_to_step():
    metrics, _ = train(MODEL)
    with sharding.use(ONE.mesh(jax.devices()[:1])):
        transform = OPTIM.transform(SCHEDULE)
        state = create_state(MODEL, transform, SEED, BATCH)
        step = jax.jit(make_train_step(MODEL, bidirectional, transform, SCHEDULE, SEED))
        first, second = batches((make,), Plan(BATCH, LENGTH), 0, 2)
        state, _ = step(state, first)
        _, carried = step(state, second)
        fresh = state.replace(carry=jax.tree.map(jnp.zeros_like, state.carry))
        _, forgotten = step(fresh, second)
    assert float(carried["loss"]) == pytest.approx(float(metrics[1]["loss"]), rel=1e-6)
    assert abs(float(forgotten["loss"]) - float(carried["loss"])) > 1e-4


def test_a_step_on_touched_rows_is_the_step_on_the_whole_table(monkeypatch):
    from lmjax import sampled
    from lmjax.sparse import Drawn

    model = MODEL.clone(negatives=40)
    sparse = train(model)
    drawn = sampled.draw

    def of_whole_table(*arguments):
        found = drawn(*arguments).batch["negatives"]
        whole = sampled.placed(found.ids_XS, found.tries_X, WORDS)
        nothing = jnp.arange(2**30, 2**30 + 128)
        return Drawn({"negatives": whole}, "no table", nothing)

    monkeypatch.setattr(sampled, "draw", of_whole_table)
    train.cache_clear()
    try:
        assert_equal_runs(sparse, train(model), 2e-6)
    finally:
        train.cache_clear()
    rows = np.abs(sparse[1].opt_state[1][1].sum_of_squares["softmax"]["embedding"] - 1).max(1)
    assert 0 < (rows > 0).sum() < WORDS  # some rows were never touched


@pytest.mark.parametrize("changes", [{"input": "words"}, {"input": "words", "tied": True}])
@pytest.mark.parametrize("negatives", [0, 40])
def test_words_without_characters_learn(changes: dict, negatives: int):
    metrics, state = train(MODEL.clone(negatives=negatives, **changes), steps=12)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    assert ("words" in state.params) != changes.get("tied", False)


# --- directions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
def test_no_gradient_comes_from_what_a_direction_has_not_read(direction: int):
    model = MODEL.clone(input="words", dropout=0.0, distinct=0.0)
    batch = {name: jnp.asarray(x) for name, x in make(np.arange(2)).items()}
    batch["weights_BXL"] = jnp.zeros((2, 2, LENGTH)).at[:, direction, 2].set(1.0)
    # Every place has a word of its own, so that rows of the table are places.
    batch["words_BXL"] = jnp.arange(2 * 2 * LENGTH).reshape(2, 2, LENGTH)
    params = model.init(jax.random.key(0), batch)["params"]

    def loss(params):
        outputs = model.apply({"params": params}, batch)
        return total_of(bidirectional)(
            {k: s for k, (s, _) in bidirectional(outputs, batch).items()}
        )

    table_VD = jax.grad(loss)(params)["words"]["embedding"]
    read = np.abs(np.asarray(table_VD)).max(1)[: 4 * LENGTH].reshape(2, 2, LENGTH) > 0
    assert read[:, direction, :3].all() and not read[:, direction, 3:].any()
    assert not read[:, 1 - direction].any()


def test_dropout_is_carried_by_the_skip():
    """What layer 1 adds is the very input that it read: zero where that was dropped."""
    model = MODEL.clone(dropout=0.5, input="words", depth=2, projection_clip=1e-9)
    batch = {name: jnp.asarray(x) for name, x in make(np.arange(4)).items()}
    params = model.init(jax.random.key(0), batch)["params"]
    rngs = {"dropout": jax.random.key(1)}
    out = model.apply({"params": params}, batch, train=True, states=True, rngs=rngs)
    first, second = np.abs(out.states_NBLD[1:])
    # The LSTMs give next to nothing, so layer 1 is its dropped input: twice layer 0, or nothing.
    kept = second > 1.5e-9
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(second[kept], 2 * first[kept], atol=1.1e-9)
