# SPDX-License-Identifier: Apache-2.0
"""Every path of attention equals a plain softmax, and none looks where it must not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.attention import attention

ROWS, HEADS, WIDTH = 2, 2, 8


def qkv(length: int, keys: int | None = None, width: int = WIDTH, seed: int = 0):
    keys = length if keys is None else keys
    random = np.random.default_rng(seed)
    shapes = [(ROWS, HEADS, n, width) for n in (length, keys, keys)]
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def plain(query, key, value, causal: bool, segments=None, offset: int = 0) -> np.ndarray:
    """softmax(QKᵀ/√K + mask) V in float64, the whole square at once."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    seen = np.ones(scores.shape[-2:], bool)
    if causal:
        seen = offset + np.arange(seen.shape[0])[:, None] >= np.arange(seen.shape[1])[None, :]
    seen = np.broadcast_to(seen, scores.shape)
    if segments is not None:
        segments = np.asarray(segments)
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = np.where(seen, scores, -np.inf)
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True) @ value


def segments_of(length: int) -> jnp.ndarray:
    """Two rows of documents that end at different places, not at a block's edge."""
    place = np.arange(length)
    return jnp.asarray(np.stack([1 + (place >= length // 3), 1 + place // 37]))


# 100 and 129 leave a last block of queries that is not full.
@pytest.mark.parametrize("length", [1, 7, 64, 65, 100, 129])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_a_plain_softmax(length: int, causal: bool):
    query, key, value = qkv(length)
    got = attention(query, key, value, causal=causal)
    np.testing.assert_allclose(got, plain(query, key, value, causal), atol=1e-5)


@pytest.mark.parametrize("length", [40, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_segments_keep_documents_apart(length: int, causal: bool):
    query, key, value = qkv(length)
    segments = segments_of(length)
    got = attention(query, key, value, causal=causal, segments_BL=segments)
    np.testing.assert_allclose(got, plain(query, key, value, causal, segments), atol=1e-5)
    assert np.abs(got - plain(query, key, value, causal)).max() > 0.1


@pytest.mark.parametrize(("queries", "keys", "offset"), [(1, 9, 4), (3, 9, 6), (70, 90, 11)])
def test_queries_of_a_cache_see_their_past_and_no_unwritten_keys(queries, keys, offset):
    query, key, value = qkv(queries, keys)
    run = jax.jit(lambda at: attention(query, key, value, causal=True, offset=at))
    expected = plain(query, key, value, True, offset=offset)
    np.testing.assert_allclose(run(jnp.int32(offset)), expected, atol=1e-5)


@pytest.mark.parametrize("length", [12, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_of_the_future_is_exactly_zero(length: int, causal: bool):
    query, key, value = qkv(length)
    at = length // 2 + 1
    direction = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, HEADS, WIDTH)))

    @jax.jit
    def gradients(query, key, value):
        def look(query, key, value):
            return jnp.sum(attention(query, key, value, causal=causal)[:, :, at] * direction)

        return jax.grad(look, argnums=(1, 2))(query, key, value)

    for gradient in gradients(query, key, value):
        reached = np.abs(gradient).max(axis=(0, 1, 3)) > 0
        assert reached[: at + 1].all()
        assert reached[at + 1 :].all() if not causal else not reached[at + 1 :].any()


@pytest.mark.parametrize("length", [16, 100])
def test_gradients_equal_those_of_the_whole_square(length: int):
    """Blocks of queries add up their keys' gradients."""
    query, key, value = qkv(length)
    segments = segments_of(length)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=query.shape), jnp.float32)

    def square(query, key, value):
        scores = jnp.einsum("BHLK,BHSK->BHLS", query, key) * WIDTH**-0.5
        same = segments[:, None, :, None] == segments[:, None, None, :]
        scores = jnp.where(same & jnp.tri(length, dtype=bool)[None, None], scores, -1e30)
        return jnp.sum(jax.nn.softmax(scores) @ value * direction)

    def ours(query, key, value):
        return jnp.sum(attention(query, key, value, causal=True, segments_BL=segments) * direction)

    expected = jax.jit(jax.grad(square, argnums=(0, 1, 2)))(query, key, value)
    got = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(query, key, value)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_cpu_skips_blocks_that_no_query_sees():
    """At 4 blocks of queries, 10 of the 16 squares are computed."""
    query, key, value = qkv(256)

    def flops(causal: bool) -> float:
        run = jax.jit(lambda q, k, v: attention(q, k, v, causal=causal))
        return run.lower(query, key, value).compile().cost_analysis()["flops"]

    assert flops(causal=True) < 0.75 * flops(causal=False)


def test_dropout_needs_a_key_and_depends_on_it():
    query, key, value = qkv(24)
    still = attention(query, key, value, causal=True)
    keyless = attention(query, key, value, causal=True, dropout=0.5)
    assert np.array_equal(keyless, still)

    @partial(jax.jit, static_argnums=1)
    def dropped(seed: int, rate: float = 0.5):
        random = jax.random.key(seed)
        return attention(query, key, value, causal=True, dropout=rate, dropout_key=random)

    assert np.array_equal(dropped(1), dropped(1))
    assert not np.allclose(dropped(1), dropped(2))
    assert not np.allclose(dropped(1), still)
    np.testing.assert_allclose(dropped(1, rate=0.0), still, atol=1e-6)


def test_dropout_keeps_the_mean_and_drops_its_share():
    """With one key its probability is 1, so that outputs are 0 or 1 / 0.75."""
    ones = jnp.ones((2000, 1, 1, 1))
    random = jax.random.key(3)
    run = jax.jit(lambda x: attention(x, x, x, causal=True, dropout=0.25, dropout_key=random))
    got = np.asarray(run(ones)).reshape(-1)
    np.testing.assert_allclose(np.unique(got), [0, 1 / 0.75], rtol=1e-6)
    assert abs((got == 0).mean() - 0.25) < 0.04


def test_the_softmax_is_float32_under_bfloat16():
    query, key, value = (x.astype(jnp.bfloat16) for x in qkv(100))
    got = attention(query, key, value, causal=True)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), plain(query, key, value, True), atol=0.03)
    traced = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, causal=True))(query, key, value)
    exps = [eqn for eqn in _equations(traced.jaxpr) if eqn.primitive.name == "exp"]
    assert exps and all(eqn.invars[0].aval.dtype == jnp.float32 for eqn in exps)


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


# --- choosing a kernel ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "length", "options", "reason"),
    [
        ("splash", 100, {}, "multiple of 128"),
        ("splash", 128, {"offset": jnp.int32(0)}, "no cache or dropout"),
        ("splash", 128, {"dropout": 0.1, "dropout_key": jax.random.key(0)}, "no cache or dropout"),
        ("cudnn", 128, {}, "16-bit inputs, not float32"),
    ],
)
def test_a_kernel_that_cannot_is_refused_with_the_reason(kernel, length, options, reason: str):
    query, key, value = qkv(length)
    with pytest.raises(ValueError, match=f"attention kernel {kernel}: .*{reason}.*allowed: auto"):
        attention(query, key, value, causal=True, kernel=kernel, **options)


def test_cudnn_refuses_segments_and_caches():
    query, key, value = (x.astype(jnp.bfloat16) for x in qkv(128))
    for options, reason in [
        ({"segments_BL": segments_of(128)}, "no segment mask"),
        ({"offset": jnp.int32(0)}, "no cache"),
    ]:
        with pytest.raises(ValueError, match=f"attention kernel cudnn: .*{reason}"):
            attention(query, key, value, causal=True, kernel="cudnn", **options)


def primitives(length: int, **options) -> set[str]:
    """The names of what is traced, on the platform in force."""
    query, key, value = qkv(length, width=128)
    traced = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, causal=True, **options))(
        query, key, value
    )
    return {eqn.primitive.name for eqn in _equations(traced.jaxpr)}


def test_a_tpu_takes_splash_where_it_can_and_xla_elsewhere(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert "pallas_call" in primitives(256)
    assert "pallas_call" in primitives(256, segments_BL=segments_of(256))
    assert "pallas_call" in primitives(128, kernel="splash")  # where it is asked for
    offset = {"offset": jnp.int32(0)}
    for length, options in [(128, {}), (300, {}), (256, offset), (256, {"kernel": "xla"})]:
        assert "pallas_call" not in primitives(length, **options)
    with_dropout = {"dropout": 0.1, "dropout_key": jax.random.key(0)}
    assert "pallas_call" not in primitives(256, **with_dropout)


def test_a_cpu_takes_xla():
    assert "pallas_call" not in primitives(128)
