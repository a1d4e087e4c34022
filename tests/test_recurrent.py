# SPDX-License-Identifier: Apache-2.0
"""Projected LSTMs against a plain scan that JAX differentiates, on every mesh."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.characters import CharacterEncoder
from lmjax.recurrent import GATES, ProjectedLSTM, Weights, projected_lstm
from lmjax.sharding import Layout

ROWS, WORDS, WIDTH, CELLS = 8, 5, 8, 16
LENGTHS = np.array([5, 0, 3, 5, 1, 4, 2, 5])
GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "fixtures" / "golden" / "bilm_tf_train"
MESHES = [Layout(8, 1, 1), Layout(1, 8, 1), Layout(2, 2, 2)]


def draw(*shape: int, scale: float = 1.0) -> jax.Array:
    random = np.random.default_rng(sum(shape) + len(shape))
    return jnp.asarray(scale * random.normal(size=shape), jnp.float32)


def inputs() -> tuple[jax.Array, Any, Any]:
    """x (B, X, L, D), parameters and carry."""
    params = {
        "input": {"kernel": draw(2, WIDTH, GATES, CELLS, scale=0.5)},
        "recurrent": {"kernel": draw(2, WIDTH, GATES, CELLS, scale=0.6)},
        "bias": draw(2, GATES, CELLS, scale=0.5),
        "out": {"kernel": draw(2, CELLS, WIDTH, scale=0.5)},
    }
    carry = (draw(ROWS, 2, CELLS, scale=0.3), draw(ROWS, 2, WIDTH, scale=0.3))
    return draw(ROWS, 2, WORDS, WIDTH), params, carry


def clip(x: jax.Array, bound: float) -> jax.Array:
    """TensorFlow's clip_by_value, whose gradient is 1 at the bound and 0 beyond."""
    return jnp.where(jnp.abs(x) <= bound, x, jnp.sign(x) * bound) if bound else x


def plain(x_BXLD, params, carry, clips, lengths_B=None) -> Any:
    """One word after another, each gate by its formula."""
    cell, hidden = jax.lax.stop_gradient(carry)
    outputs = []
    for t in range(x_BXLD.shape[2]):
        fused = jnp.concatenate([params["input"]["kernel"], params["recurrent"]["kernel"]], 1)
        both = jnp.concatenate([x_BXLD[:, :, t], hidden], -1)
        z = jnp.einsum("BXD,XDGH->BXGH", both, fused) + params["bias"][None]
        i, j, f, o = (z[:, :, g] for g in range(4))
        new = clip(jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(j), clips[0])
        given = jax.nn.sigmoid(o) * jnp.tanh(new)
        projected = clip(jnp.einsum("BXH,XHD->BXD", given, params["out"]["kernel"]), clips[1])
        if lengths_B is None:
            cell, hidden = new, projected
        else:
            on = (t < lengths_B)[:, None, None]
            cell, hidden = jnp.where(on, new, cell), jnp.where(on, projected, hidden)
        outputs.append(hidden)
    return jnp.stack(outputs, 2), (cell, hidden)


def layer(x_BXLD, params, carry, clips, lengths_B=None) -> Any:
    module = ProjectedLSTM(CELLS, WIDTH, *clips, name="layer_0")
    return module.apply({"params": params}, x_BXLD, carry, lengths_B)


def value_and_gradients(function: Any, clips: tuple[float, float], lengths_B: Any) -> Any:
    """Outputs and carry; and the gradients of a weighted sum of the outputs."""
    x, params, carry = inputs()
    weight = draw(ROWS, 2, WORDS, WIDTH) + 0.5

    def loss(x, params, carry):
        outputs, end = function(x, params, carry, clips, lengths_B)
        return (weight * outputs).sum(), (outputs, end)

    differentiate = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, results), gradients = jax.jit(differentiate)(x, params, carry)
    return results, gradients


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = max(float(jnp.abs(b).max()), 1e-3)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("clips", [(0.0, 0.0), (3.0, 3.0), (0.4, 0.0), (0.0, 0.3), (0.3, 0.2)])
def test_gradients_are_those_of_a_plain_scan(clips: tuple[float, float], lengths: Any):
    (outputs, end), gradients = value_and_gradients(layer, clips, lengths)
    (plain_outputs, plain_end), plain_gradients = value_and_gradients(plain, clips, lengths)
    if 0 < clips[0] < 1:  # the bounds are tight enough to matter
        assert (jnp.abs(plain_end[0]) == jnp.float32(clips[0])).mean() > 0.1
    if 0 < clips[1] < 1:
        assert (jnp.abs(plain_outputs) == jnp.float32(clips[1])).mean() > 0.1
    close((outputs, end), (plain_outputs, plain_end), 2e-6)
    close(gradients, plain_gradients)


@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_every_mesh_gives_the_same(layout: Layout):
    results, gradients = value_and_gradients(layer, (0.4, 0.3), LENGTHS)
    with sharding.use(layout.mesh()):
        there, there_gradients = value_and_gradients(layer, (0.4, 0.3), LENGTHS)
    close(there, results)
    close(there_gradients, gradients)


@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_devices_that_share_the_rows_send_each_other_weights_alone(layout: Layout):
    x, params, carry = inputs()

    def loss(params, x, carry):
        outputs, end = layer(x, params, carry, (3.0, 3.0))
        return jnp.square(outputs).sum(), end

    with sharding.use(layout.mesh()):
        named = {"layer_0": params}
        params = jax.device_put(named, sharding.shardings(named))["layer_0"]
        x, carry = jax.device_put((x, carry), sharding.batch_sharding())
        program = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(params, x, carry).compile()
    text = str(program.as_text())
    assert "all-reduce" in text and "all-to-all" not in text and "collective-permute" not in text
    assert ("all-gather" in text) == (layout.fsdp > 1)


def test_no_gradient_crosses_the_edge():
    x, params, carry = inputs()

    def of_outputs(carry):
        return layer(x, params, carry, (3.0, 3.0))[0].sum()

    def of_end(params, x):
        return sum(part.sum() for part in layer(x, params, carry, (3.0, 3.0))[1])

    for gradient in (jax.grad(of_outputs)(carry), jax.grad(of_end, (0, 1))(params, x)):
        assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_state_carried_over_equals_one_long_window():
    x, params, carry = inputs()
    whole, end = layer(x, params, carry, (0.4, 0.3))
    first, middle = layer(x[:, :, :2], params, carry, (0.4, 0.3))
    second, last = layer(x[:, :, 2:], params, middle, (0.4, 0.3))
    close((jnp.concatenate([first, second], 2), last), (whole, end), 1e-6)


def test_words_beyond_a_length_change_neither_state_nor_gradient():
    x, params, carry = inputs()
    beyond = (jnp.arange(WORDS)[None] >= LENGTHS[:, None])[:, None, :, None]

    def loss(params, x):
        outputs, end = layer(x, params, carry, (3.0, 3.0), LENGTHS)
        return jnp.where(beyond, 0, outputs).sum(), end

    differentiate = jax.grad(loss, has_aux=True)
    changed = differentiate(params, jnp.where(beyond, 100.0, x))
    close(changed, differentiate(params, x), 1e-6)
    np.testing.assert_array_equal(changed[1][0][1], carry[0][1])  # a row without words


def one_cell(out: float, cell_clip: float, projection_clip: float) -> tuple[Any, Any]:
    """Hidden state of one cell after one word, and its gradient by the projection and the input."""
    one = jnp.ones((1, 1))
    gates = [jnp.full((1, 1), z) for z in (2.0, 1.0, 0.0, 0.5)]
    zeros = [jnp.zeros(1)] * GATES

    def hidden(out_HD, x_TBD):
        weights = Weights(gates, [0 * one] * GATES, zeros, out_HD)
        carry = (0 * one, 0 * one)
        return projected_lstm(x_TBD, weights, carry, cell_clip, projection_clip)[0].sum()

    return jax.value_and_grad(hidden, (0, 1))(jnp.full((1, 1), out), one[None])


def test_a_bound_lets_the_gradient_pass_when_it_is_met_and_not_beyond():
    unbound, (by_out, by_x) = one_cell(1.0, 0.0, 0.0)
    for bound, share in ((float(unbound), 1.0), (float(unbound) * 0.999, 0.0)):
        value, gradients = one_cell(1.0, 0.0, bound)
        np.testing.assert_allclose(value, bound, rtol=1e-6)
        np.testing.assert_allclose(gradients[0], share * by_out, rtol=1e-6)
        np.testing.assert_allclose(gradients[1], share * by_x, rtol=1e-6)


def test_a_clipped_cell_still_reaches_the_output_gate():
    _, (_, by_x) = one_cell(1.0, 0.1, 0.0)
    gate = 1 / (1 + math.exp(-0.5))
    np.testing.assert_allclose(by_x, 0.5 * gate * (1 - gate) * math.tanh(0.1), rtol=1e-5)


def test_bfloat16_keeps_the_state_in_float32():
    x, params, carry = inputs()
    outputs, end = layer(x.astype(jnp.bfloat16), params, carry, (3.0, 3.0))
    wanted, wanted_end = layer(x, params, carry, (3.0, 3.0))
    assert outputs.dtype == jnp.bfloat16 and {part.dtype for part in end} == {jnp.dtype("float32")}
    close((outputs.astype(jnp.float32), end), (wanted, wanted_end), 0.03)
    assert (end[1] != end[1].astype(jnp.bfloat16)).any()


def test_weights_begin_as_tensorflow_begins_them():
    x, _, carry = inputs()
    x, carry = jnp.tile(x, (1, 1, 1, 8)), (draw(ROWS, 2, 512), draw(ROWS, 2, 32))
    module = ProjectedLSTM(512, 32, name="layer_0")
    params: Any = module.init(jax.random.key(0), x, carry)["params"]
    fused = math.sqrt(6 / (64 + 32 + 4 * 512))
    for name, bound in (("input", fused), ("recurrent", fused), ("out", math.sqrt(6 / 544))):
        kernel = params[name]["kernel"]
        assert bound * 0.999 < float(jnp.abs(kernel).max()) <= bound
        np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.02)
    assert not params["bias"].any()


def loops(jaxpr: Any) -> list[Any]:
    """The outputs of each pass of every loop in a program."""
    found = []
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += loops(inner)
        if equation.primitive.name in ("while", "scan"):
            found.append([v.aval.shape for v in equation.outvars])
    return found


def test_no_loop_adds_up_the_gradient_of_a_weight():
    x, params, carry = inputs()
    x, carry = x[:6], (carry[0][:6], carry[1][:6])  # a number of rows that no weight has

    def loss(params):
        return layer(x, params, carry, (3.0, 3.0))[0].sum()

    carried = loops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    assert len(carried) == 4  # two directions, forward and backward
    weights = {(WIDTH, CELLS), (CELLS, WIDTH), (CELLS,)}
    assert not weights & {shape for shapes in carried for shape in shapes}


def golden_parameters(weights: dict[str, np.ndarray]) -> tuple[Any, list[Any]]:
    """The original's variables as those of the character encoder and of the layers."""

    def pair(at: str, names: tuple[str, str] = ("W", "b")) -> Any:
        return {"kernel": weights[f"lm|{names[0]}{at}"], "bias": weights[f"lm|{names[1]}{at}"]}

    encoder: dict[str, Any] = {"table": weights["lm|char_embed"]}
    encoder["project"] = pair("_proj", ("CNN_proj|W", "CNN_proj|b"))
    high = ("CNN_high_0|W_", "CNN_high_0|b_")
    encoder["highway_0"] = {part: pair(part, high) for part in ("carry", "transform")}
    for i in range(3):
        conv = pair(f"_cnn_{i}", ("CNN|W", "CNN|b"))
        encoder[f"conv_{i}"] = {"kernel": conv["kernel"][0], "bias": conv["bias"]}
    layers = []
    for n in range(2):
        cells = [f"lm|RNN_{x}|rnn|multi_rnn_cell|cell_{n}|lstm_cell" for x in (0, 1)]
        kernel, bias, out = (
            np.stack([weights[f"{cell}|{name}"] for cell in cells])
            for name in ("kernel", "bias", "projection|kernel")
        )
        width, size = out.shape[2], out.shape[1]
        kernel = kernel.reshape(2, 2 * width, GATES, size)
        layers.append({
            "input": {"kernel": kernel[:, :width]}, "recurrent": {"kernel": kernel[:, width:]},
            "bias": bias.reshape(2, GATES, size), "out": {"kernel": out},
        })  # fmt: skip
    return encoder, layers


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is not here")
def test_six_batches_that_carry_their_state_are_those_of_the_original():
    io, weights = (dict(np.load(GOLDEN / f"{name}.npz")) for name in ("io", "weights"))
    encoder_params, layers = golden_parameters(weights)
    cells, width = layers[0]["out"]["kernel"].shape[1:]
    encoder = CharacterEncoder(
        5, ((1, 4), (2, 8), (3, 12)), 1, width, distinct=0, name="characters"
    )

    @jax.jit
    def run(chars_BXLC: jax.Array, carries: Any) -> Any:
        spellings_BXL = jnp.zeros(chars_BXLC.shape[:3], jnp.int32)
        x_BXLD: Any = encoder.apply(
            {"params": encoder_params}, chars_BXLC, spellings_BXL, jnp.float32
        )
        ends = []
        for n, (params, carry) in enumerate(zip(layers, carries, strict=True)):
            lstm = ProjectedLSTM(cells, width, 3.0, 3.0, name=f"layer_{n}")
            y_BXLD, end = lstm.apply({"params": params}, x_BXLD, carry)
            x_BXLD = x_BXLD + y_BXLD if n else y_BXLD
            ends.append(end)
        return x_BXLD, ends

    carries: Any = [(jnp.zeros((3, 2, cells)), jnp.zeros((3, 2, width)))] * 2
    for b in range(6):
        names = ("tokens_characters", "tokens_characters_reverse")
        chars_BXLC = np.stack([io[f"b{b}_{name}"] for name in names], 1)
        found_BXLD, carries = run(chars_BXLC, carries)
        for x, name in enumerate(("lstm_fwd", "lstm_bwd")):
            np.testing.assert_allclose(found_BXLD[:, x], io[f"b{b}_{name}"], atol=1e-5)
