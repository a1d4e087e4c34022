# SPDX-License-Identifier: Apache-2.0
"""GPT is the papers' model: sizes, causality, packing, initialisation, and the numbers by hand."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.layers import ACTIVATIONS, Outputs
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.step import abstract_params

VOCAB, CONTEXT = 90, 72
TINY = GPT(vocab=VOCAB, context=CONTEXT, depth=2, width=16, heads=2)
KINDS = {
    "pre": TINY,
    "post": TINY.clone(norm="post"),
    "one_table": TINY.clone(norm="post", one_table=True),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


@cache
def params_of(model: GPT, seed: int = 0):
    """Parameters at random, biases and scales as well, so that none can be left out."""
    random = np.random.default_rng(seed)

    def fill(path, x):
        scale = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (scale + 0.3 * random.normal(size=x.shape)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_params(model))


LENGTH = 70  # more than one block of queries
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
PLACES = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
# Documents in row 0, of which the third crosses a block of queries; row 1 is one document.
DOCUMENTS = [(0, 25), (25, 28), (28, 66), (66, 70)]
SEGMENTS, POSITIONS = np.ones_like(TOKENS), PLACES.copy()
for number, (begin, end) in enumerate(DOCUMENTS):
    SEGMENTS[0, begin:end], POSITIONS[0, begin:end] = number + 1, np.arange(end - begin)


@cache
def compiled(model: GPT):
    """One program a model and shape: compilation is most of what these tests cost."""
    return jax.jit(lambda params, batch: model.apply({"params": params}, batch))


def forward(model: GPT, params, tokens=TOKENS, segments=SEGMENTS, positions=POSITIONS) -> Outputs:
    batch = {"tokens_BL": tokens, "segments_BL": segments, "positions_BL": positions}
    return jax.device_get(compiled(model)(params, batch))


def hidden(model: GPT, params, **batch) -> np.ndarray:
    return forward(model, params, **batch).hidden_BLD


# --- sizes ----------------------------------------------------------------------------------------

SIZES = {
    "gpt1": (GPT(40_478, 512, 12, 768, 12, norm="post", one_table=True), 116_534_784),
    "gpt2 small": (GPT(50_257, 1024, 12, 768, 12), 124_439_808),
    "gpt2 medium": (GPT(50_257, 1024, 24, 1024, 16), 354_823_168),
    "gpt2 large": (GPT(50_257, 1024, 36, 1280, 20), 774_030_080),
    "gpt2 xl": (GPT(50_257, 1024, 48, 1600, 25), 1_557_611_200),
    "gpt3 small": (GPT(50_257, 2048, 12, 768, 12), 125_226_240),
}


@pytest.mark.parametrize(("model", "count"), SIZES.values(), ids=SIZES.keys())
def test_parameter_counts_are_the_papers_own(model: GPT, count: int):
    params = abstract_params(model)
    stored = sum(x.size for x in jax.tree.leaves(params))
    assert stored - model.padding == count
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert params["embedding"].shape[0] % 128 == 0
    assert 0 <= params["embedding"].shape[0] - model.rows < 128


def test_flops_count_what_is_multiplied():
    model, count = SIZES["gpt2 small"]
    multiplied = count - 1024 * 768  # positions are looked up
    assert model.flops_per_token(1024) == 6 * multiplied + 12 * 12 * 768 * 1024
    gpt1 = SIZES["gpt1"][0]  # its positions are rows of the readout
    assert gpt1.flops_per_token(512) == 6 * 116_534_784 + 12 * 12 * 768 * 512


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width=16 .*heads=3"):
        GPT(vocab=8, context=8, depth=1, width=16, heads=3)


# --- the numbers, by hand -------------------------------------------------------------------------


def by_hand(model: GPT, params, tokens: np.ndarray) -> np.ndarray:
    """Hidden states in float64, one position of one head at a time, from the papers' equations."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, w):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attend(x, w):
        qkv = np.einsum("BLD,DNE->NBLE", x, w["qkv"]["kernel"]) + w["qkv"]["bias"][:, None, None]
        heads = qkv.reshape(*qkv.shape[:3], model.heads, -1)
        query, key, value = np.moveaxis(heads, 3, 2)
        out = np.zeros_like(value)
        for at in range(x.shape[1]):
            past = slice(at + 1)
            scores = np.einsum("BHK,BHSK->BHS", query[:, :, at], key[:, :, past])
            scores /= math.sqrt(query.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[:, :, at] = np.einsum("BHS,BHSK->BHK", weights, value[:, :, past])
        joined = np.moveaxis(out, 1, 2).reshape(x.shape)
        return joined @ w["out"]["kernel"] + w["out"]["bias"]

    def mlp(x, w):
        inner = gelu(x @ w["up"]["kernel"] + w["up"]["bias"])
        return inner @ w["down"]["kernel"] + w["down"]["bias"]

    length = tokens.shape[1]
    table = p["embedding"]
    places = table[model.vocab :] if model.one_table else p["positions"]
    x = table[tokens] + places[:length]
    for n in range(model.depth):
        w = jax.tree.map(lambda v, n=n: v[n], p["blocks"])
        if model.norm == "pre":
            x = x + attend(norm(x, w["norm_1"]), w["attention"])
            x = x + mlp(norm(x, w["norm_2"]), w["mlp"])
        else:
            x = norm(x + attend(x, w["attention"]), w["norm_1"])
            x = norm(x + mlp(x, w["mlp"]), w["norm_2"])
    return norm(x, p["final_norm"]) if model.norm == "pre" else x


@EACH_KIND
def test_hidden_states_equal_the_equations(kind: str):
    model = KINDS[kind]
    # Small embeddings make norms sensitive to their epsilon; wide weights, GELU to its form.
    params = dict(params_of(model))
    params["embedding"] = params["embedding"] * 0.02
    if "positions" in params:
        params["positions"] = params["positions"] * 0.02
    expected = by_hand(model, params, TOKENS)
    np.testing.assert_allclose(hidden(model, params), expected, atol=2e-5)


def test_the_readout_is_tied_and_has_no_bias():
    params = params_of(TINY)
    outputs = forward(TINY, params)
    assert outputs.readout.bias_V is None and outputs.states_NBLD is None
    logits = outputs.readout.logits(outputs.hidden_BLD[:, :4])
    assert logits.shape == (2, 4, VOCAB)
    expected = outputs.hidden_BLD[:, :4] @ params["embedding"][:VOCAB].T
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)


def test_gpt_1_has_positions_and_tokens_in_one_table():
    model = KINDS["one_table"]
    params = params_of(model)
    assert "positions" not in params and "final_norm" not in params
    assert model.rows == VOCAB + CONTEXT
    outputs = forward(model, params)
    assert outputs.readout.logits(outputs.hidden_BLD[:, :2]).shape == (2, 2, VOCAB + CONTEXT)
    table = params["embedding"].copy()
    table[VOCAB + 3] += np.linspace(-1, 1, 16)
    difference = np.abs(hidden(model, {**params, "embedding": table}) - outputs.hidden_BLD).max(-1)
    assert not difference[:, :3].any() and (difference[:, 3:] > 1e-4).all()


def test_states_are_the_embeddings_and_every_layer_s_output():
    params = params_of(TINY)
    batch = {"tokens_BL": TOKENS}
    outputs = jax.jit(lambda p: TINY.apply({"params": p}, batch, states=True))(params)
    states = np.asarray(outputs.states_NBLD)
    assert states.shape == (TINY.depth + 1, 2, LENGTH, 16)
    embeddings = params["embedding"][TOKENS] + params["positions"][:LENGTH]
    np.testing.assert_allclose(states[0], embeddings, atol=1e-6)
    one_layer = {**params, "blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    for state, expected in [
        (states[1], by_hand(TINY.clone(depth=1), one_layer, TOKENS)),
        (states[2], by_hand(TINY, params, TOKENS)),
    ]:
        norm = params["final_norm"]
        centred = state - state.mean(-1, keepdims=True)
        final = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(final * norm["scale"] + norm["bias"], expected, atol=1e-4)


# --- causality, padding, packing ------------------------------------------------------------------


@EACH_KIND
def test_the_gradient_from_the_future_is_exactly_zero(kind: str):
    model = KINDS[kind]
    params = params_of(model)
    tokens = np.arange(LENGTH)[None]  # every token once: its row of the table is its embedding
    direction = np.random.default_rng(2).normal(size=16).astype(np.float32)

    @jax.jit
    def reached(at):
        def look(table):
            batch = {"tokens_BL": tokens}
            states = model.apply({"params": {**params, "embedding": table}}, batch).hidden_BLD
            return states[0, at] @ direction

        return jnp.abs(jax.grad(look)(params["embedding"])[:LENGTH]).max(-1) > 0

    for at in (0, 1, 33, 63, 64, 69):
        row = np.asarray(reached(at))
        assert row[: at + 1].all() and not row[at + 1 :].any()


@EACH_KIND
def test_padding_after_the_end_changes_nothing(kind: str):
    model = KINDS[kind].clone(cross_documents=False)
    params = params_of(model)
    before = PLACES < 41
    whole = hidden(model, params, segments=np.ones_like(TOKENS), positions=PLACES)
    other = np.where(before, TOKENS, (TOKENS + 11) % VOCAB)
    padded = hidden(model, params, tokens=other, segments=before.astype(np.int32), positions=PLACES)
    assert np.array_equal(whole[before], padded[before])
    assert (np.abs(whole - padded)[~before].max(-1) > 1e-4).all()


@EACH_KIND
def test_packed_documents_are_as_each_alone(kind: str):
    model, crossing = KINDS[kind].clone(cross_documents=False), KINDS[kind]
    params = params_of(model)
    packed = hidden(model, params)
    for begin, end in DOCUMENTS:
        alone = by_hand(model, params, TOKENS[:1, begin:end])
        np.testing.assert_allclose(packed[:1, begin:end], alone, atol=2e-5)
    across = hidden(crossing, params)
    np.testing.assert_allclose(across, by_hand(crossing, params, TOKENS), atol=2e-5)
    np.testing.assert_allclose(across[0, :25], packed[0, :25], atol=1e-5)
    assert (np.abs(across - packed)[0, 25:].max(-1) > 1e-3).all()


# --- knobs that change no number ------------------------------------------------------------------


def losses_of(model: GPT):
    tokens = TOKENS[:, :32]
    weights = np.ones(tokens.shape, np.float32)
    batch = {"tokens_BL": tokens, "targets_BL": np.roll(tokens, -1), "weights_BL": weights}
    return lambda p: next_token(model.apply({"params": p}, batch), batch)["loss"][0]


def test_remat_saves_memory_and_changes_no_number():
    params, results, temporary = params_of(TINY), [], {}
    for remat, unroll in [("none", 2), ("none", 1), ("names", 1), ("full", 1)]:
        model = TINY.clone(remat=remat, unroll=unroll)
        run = jax.jit(jax.value_and_grad(losses_of(model))).lower(params).compile()
        results.append(jax.device_get(run(params)))
        temporary[remat] = run.memory_analysis().temp_size_in_bytes
    for loss, gradients in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(results[0][1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    assert temporary["full"] < temporary["names"] < temporary["none"]


def test_layers_are_scanned_so_depth_adds_no_program():
    def size(depth: int) -> int:
        model = TINY.clone(depth=depth, unroll=1)
        params = abstract_params(model)
        traced = jax.make_jaxpr(lambda p: model.apply({"params": p}, {"tokens_BL": TOKENS}))(params)
        return str(traced).count("dot_general")

    assert size(2) == size(9) > 0


# --- dropout and dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        TINY.clone(dropout=0.3),
        TINY.clone(attention_dropout=0.3),
        KINDS["one_table"].clone(dropout=0.3, attention_dropout=0.3),
    ],
    ids=["dropout", "attention", "one table"],
)
def test_dropout_is_for_training_and_follows_its_key(model: GPT):
    params, batch = params_of(model), {"tokens_BL": TOKENS[:, :8]}

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        outputs = model.apply({"params": params}, batch, train=True, rngs=rngs)
        return outputs.hidden_BLD, outputs.readout.table_VD

    still = by_hand(model, params, TOKENS)
    np.testing.assert_allclose(hidden(model, params), still, atol=2e-5)
    one, same, other = (jax.device_get(train(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one[0], same[0])
    assert np.abs(one[0] - other[0]).max() > 1e-3
    assert np.abs(one[0] - still[:, :8]).max() > 1e-3
    # GPT-1 drops entries of its table, and what is dropped leaves the scores as well.
    dropped = (one[1][: model.rows] == 0).mean()
    assert abs(dropped - (0.3 if model.one_table else 0)) < 0.05


def test_layers_drop_different_entries():
    """With residuals alone dropped, a layer's mask is where its output did not move."""
    model = TINY.clone(dropout=0.5, depth=3)
    params = jax.tree.map(np.zeros_like, params_of(model))
    params["blocks"]["mlp"]["down"]["bias"] += 1.0  # every block adds two, or nothing
    rngs = {"dropout": jax.random.key(0)}
    batch = {"tokens_BL": TOKENS}
    run = jax.jit(lambda p: model.apply({"params": p}, batch, train=True, states=True, rngs=rngs))
    added = np.diff(np.asarray(run(params).states_NBLD), axis=0)
    assert set(np.unique(added)) == {0.0, 2.0}
    for a, b in [(0, 1), (1, 2), (0, 2)]:
        assert abs((added[a] == added[b]).mean() - 0.5) < 0.1


def test_bfloat16_computes_low_and_keeps_parameters_and_gradients_high():
    model = TINY.clone(dtype="bfloat16")
    params = params_of(model)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(abstract_params(model)))
    loss, gradients = jax.eval_shape(jax.value_and_grad(losses_of(model)), params)
    assert loss.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradients))
    got = hidden(model, params)
    assert got.dtype == jnp.bfloat16
    error = np.abs(got.astype(np.float64) - by_hand(model, params, TOKENS))
    assert 0.001 < error.mean() < 0.05
    # float32 norms: the inverse root of the variance is never taken in 16 bits.
    traced = str(jax.make_jaxpr(lambda p: compiled(model)(p, {"tokens_BL": TOKENS}))(params))
    roots = [line for line in traced.splitlines() if " rsqrt" in line]
    assert len(roots) >= 3 and all(":f32" in line for line in roots)


# --- initialisation -------------------------------------------------------------------------------


@cache
def initial(model: GPT):
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(lambda: model.init(jax.random.key(3), {"tokens_BL": tokens})["params"])
    return jax.device_get(init())


def test_initial_values_have_the_papers_statistics():
    model = GPT(vocab=1000, context=256, depth=4, width=64, heads=4, position_std=0.01)
    params = initial(model)
    table, blocks = np.asarray(params["embedding"]), params["blocks"]
    assert table.shape == (1024, 64) and not table[1000:].any()
    for values, std in [
        (table[:1000], 0.02),
        (params["positions"], 0.01),
        (blocks["attention"]["qkv"]["kernel"], 0.02),
        (blocks["mlp"]["up"]["kernel"], 0.02),
        (blocks["attention"]["out"]["kernel"], 0.02 / math.sqrt(8)),
        (blocks["mlp"]["down"]["kernel"], 0.02 / math.sqrt(8)),
    ]:
        assert abs(float(np.mean(values))) < 0.02 * std + 3 * std / math.sqrt(np.size(values))
        assert abs(float(np.std(values)) / std - 1) < 0.03
    kernels = np.asarray(blocks["mlp"]["up"]["kernel"])
    assert not np.allclose(kernels[0], kernels[1])  # layers begin differently
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "bias" in name or "scale" in name:
            assert (np.asarray(x) == ("scale" in name)).all(), name

    # A new model guesses: its loss is the logarithm of the number of tokens.
    batch = {"tokens_BL": TOKENS, "segments_BL": SEGMENTS, "positions_BL": POSITIONS}
    outputs = compiled(model)(params, batch)
    scores = np.asarray(outputs.readout.logits(outputs.hidden_BLD))
    assert abs(float(np.log(np.exp(scores).sum(-1)).mean()) - math.log(1000)) < 0.1


def test_gpt_1_does_not_scale_its_residual_layers():
    model = GPT(
        vocab=100, context=28, depth=4, width=64, heads=4, norm="post", one_table=True,
        scale_residual_init=False,
    )  # fmt: skip
    params = initial(model)
    assert abs(float(jnp.std(params["blocks"]["mlp"]["down"]["kernel"])) / 0.02 - 1) < 0.03
    assert np.asarray(params["embedding"])[:128].any(axis=1).all()


def test_activations_are_the_named_ones():
    x = np.linspace(-3, 3, 13)
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    np.testing.assert_allclose(ACTIVATIONS["gelu_erf"](x), erf, atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["relu"](x), np.maximum(x, 0))
    assert 1e-4 < np.abs(ACTIVATIONS["gelu_tanh"](x) - erf).max() < 1e-3
