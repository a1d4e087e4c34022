# SPDX-License-Identifier: Apache-2.0
"""Generation: the cache changes nothing, options restrict what they say, text comes out whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import generate, sharding
from lmjax.generate import Sampling, beam_search, beam_text, draw, generate_text, stream
from lmjax.models.gpt import GPT
from lmjax.tokenizer import Characters, SentencePiece

GPT2 = GPT(vocab=60, context=24, depth=2, width=32, heads=4, unroll=1)
GPT1 = GPT2.clone(norm="post", one_table=True)
PROMPT = np.array([5, 17, 3], np.int32)


@functools.cache
def weights(model):
    """Weights wide enough that the likeliest token depends on the whole prompt."""
    init = jax.jit(model.init)(jax.random.key(1), {"tokens_BL": jnp.zeros((1, 2), jnp.int32)})
    return jax.tree.map(lambda x: 4 * x, init["params"])


@functools.cache
def forward(model):
    def logits(params, tokens_BL):
        outputs = model.apply({"params": params}, {"tokens_BL": tokens_BL})
        return outputs.readout.logits(outputs.hidden_BLD)

    return jax.jit(logits)


def plain_logits(model, ids):
    """Logits (L, V) of a sequence without a cache; padding behind it keeps one shape."""
    tokens_BL = np.zeros((1, model.context), np.int32)
    tokens_BL[0, : len(ids)] = ids
    return np.asarray(forward(model)(weights(model), tokens_BL))[0, : len(ids)]


def whole(model, prompt, sampling, count, **options):
    options = {"vocab": model.vocab} | options
    chunks = list(stream(model, weights(model), prompt, sampling, count, **options))
    assert all(c.dtype == np.int32 and c.size for c in chunks)
    return np.concatenate([np.array([], np.int32), *chunks]).tolist()


@pytest.mark.parametrize("model", [GPT2, GPT1], ids=["gpt2", "gpt1"])
@pytest.mark.parametrize("length", [1, 5, 17, 23])
def test_cached_logits_equal_uncached(model, length):
    ids = np.random.default_rng(length).integers(0, model.vocab, model.context)
    plain = plain_logits(model, ids)
    prompt_BL = generate._rows(ids[:length], 1, model.context)
    scores_BV, cache = generate._read(model, weights(model), prompt_BL, length)
    for at in range(length, model.context + 1):
        np.testing.assert_allclose(scores_BV[0], plain[at - 1], rtol=0, atol=1e-5)
        if at < model.context:
            parents, tokens = np.array([0]), ids[at : at + 1]
            scores_BV, cache = generate._feed(model, weights(model), cache, parents, tokens)


@pytest.mark.parametrize("model", [GPT2, GPT1], ids=["gpt2", "gpt1"])
def test_greedy_equals_an_argmax_loop_without_cache(model):
    ids = PROMPT.tolist()
    for _ in range(20):
        ids.append(int(plain_logits(model, ids)[-1, : model.vocab].argmax()))
    assert whole(model, PROMPT, Sampling(greedy=True), 20) == ids[3:]
    assert whole(model, PROMPT, Sampling(temperature=0), 20) == ids[3:]
    assert whole(model, PROMPT, Sampling(temperature=1e-6), 20) == ids[3:]


def test_beyond_the_context_the_last_half_is_read_again():
    ids, window = PROMPT.tolist(), PROMPT.tolist()
    for _ in range(60):
        if len(window) > GPT2.context:
            window = ids[-GPT2.context // 2 :]
        ids.append(int(plain_logits(GPT2, window)[-1].argmax()))
        window = [*window, ids[-1]]
    found = whole(GPT2, PROMPT, Sampling(greedy=True), 60)
    assert found == ids[3:]
    # A prompt that is too long goes on from its last half context.
    long = np.array(ids[:40], np.int32)
    expected = whole(GPT2, long[-GPT2.context // 2 :], Sampling(greedy=True), 8)
    assert whole(GPT2, long, Sampling(greedy=True), 8) == expected


def test_chunks_and_length_do_not_change_the_text():
    # 90 tokens cross the context several times, at other places of each chunk.
    one = whole(GPT2, PROMPT, Sampling(seed=3), 90, chunk=1)
    assert len(one) == 90
    assert whole(GPT2, PROMPT, Sampling(seed=3), 90, chunk=7) == one
    assert whole(GPT2, PROMPT, Sampling(seed=3), 90) == one
    assert whole(GPT2, PROMPT, Sampling(seed=3), 33, chunk=7) == one[:33]
    assert whole(GPT2, PROMPT, Sampling(seed=4), 90) != one
    sizes = [len(c) for c in stream(GPT2, weights(GPT2), PROMPT, Sampling(), 20, 60, chunk=7)]
    assert sizes == [7, 7, 6]


def support(scores, **options):
    """Every id that 3,000 draws give."""
    keys = jax.random.split(jax.random.key(0), 3000)
    one = functools.partial(draw, jnp.asarray(scores), Sampling(**options))
    return set(np.unique(jax.jit(jax.vmap(one))(keys)).tolist())


def test_top_k_and_top_p_draw_exactly_their_set():
    probs = np.array([0.05, 0.3, 0.1, 0.25, 0.2, 0.1], np.float32)
    scores = np.log(probs)
    assert support(scores) == {0, 1, 2, 3, 4, 5}
    assert support(scores, top_k=1) == {1}
    assert support(scores, top_k=3) == {1, 3, 4}
    assert support(scores, top_k=4) == {1, 2, 3, 4}, "of equals the first"
    assert support(scores, top_k=99) == {0, 1, 2, 3, 4, 5}
    assert support(scores, top_p=0.29) == {1}
    assert support(scores, top_p=0.31) == {1, 3}
    assert support(scores, top_p=0.7) == {1, 3, 4}
    assert support(scores, top_p=1e-6) == {1}
    # Of the two likeliest the first has 0.55 of the probability.
    assert support(scores, top_k=2, top_p=0.5) == {1}
    # A flatter distribution needs more tokens for the same probability.
    assert support(scores, temperature=100.0, top_p=0.45) == {1, 3, 4}


def test_draws_follow_the_probabilities_and_the_temperature():
    probs = np.array([0.5, 0.3, 0.2], np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    for temperature in (0.5, 1.0, 2.0):
        sampling = Sampling(temperature=temperature)
        one = functools.partial(draw, jnp.log(jnp.asarray(probs)), sampling)
        shares = np.bincount(jax.jit(jax.vmap(one))(keys), minlength=3) / 20_000
        expected = probs ** (1 / temperature)
        np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.012)


@pytest.mark.parametrize("model", [GPT2, GPT1], ids=["gpt2", "gpt1"])
def test_ids_beyond_the_tokenizer_are_never_drawn(model):
    flat = Sampling(temperature=1e6, seed=1)
    found = whole(model, PROMPT, flat, 300)
    assert max(found) < model.vocab and len(set(found)) > 50
    found = whole(model, PROMPT, flat, 300, vocab=18)
    assert set(found) == set(range(18))
    sequences, _ = beam_search(model, weights(model), PROMPT, 20, 5)
    assert sequences.max() < model.vocab
    sequences, _ = beam_search(model, weights(model), PROMPT, 9, 5, vocab=18)
    assert sequences.max() < 18


def test_the_end_of_text_ends_it_and_is_not_yielded():
    found = whole(GPT2, PROMPT, Sampling(seed=3), 90)
    eot = found[40]
    cut = found[: found.index(eot)]
    for chunk in (1, 7, 32):
        assert whole(GPT2, PROMPT, Sampling(seed=3), 90, eot=eot, chunk=chunk) == cut


def test_an_empty_prompt_starts_from_the_end_of_text_or_id_0():
    empty = np.array([], np.int32)
    free = whole(GPT2, np.array([9], np.int32), Sampling(greedy=True), 6)
    free = free[: free.index(9)] if 9 in free else free
    assert whole(GPT2, empty, Sampling(greedy=True), 6, eot=9) == free
    zero = whole(GPT2, np.array([0], np.int32), Sampling(greedy=True), 6)
    assert whole(GPT2, empty, Sampling(greedy=True), 6) == zero
    assert whole(GPT2, PROMPT, Sampling(), 0) == []


def test_a_mesh_gives_the_same_text_and_beams():
    model, params = GPT2.clone(vocab=62), weights(GPT2.clone(vocab=62))
    text = whole(model, PROMPT, Sampling(seed=5), 30)
    sequences, scores = beam_search(model, params, PROMPT, 3, 6, eos=text[3])
    with sharding.use(sharding.Layout(2, 2, 2).mesh()):
        spread = jax.device_put(params, sharding.shardings(params))
        chunks = stream(model, spread, PROMPT, Sampling(seed=5), 30, 62)
        assert np.concatenate(list(chunks)).tolist() == text
        again, scores_again = beam_search(model, spread, PROMPT, 3, 6, eos=text[3])
    np.testing.assert_array_equal(again, sequences)
    np.testing.assert_allclose(scores_again, scores, atol=1e-5)


def test_a_kernel_that_has_no_cache_is_replaced():
    text = whole(GPT2, PROMPT, Sampling(greedy=True), 5)
    params = weights(GPT2)
    chunks = stream(GPT2.clone(kernel="cudnn"), params, PROMPT, Sampling(greedy=True), 5, 60)
    assert np.concatenate(list(chunks)).tolist() == text


def test_beams_find_the_best_of_all_sequences():
    tiny = GPT2.clone(vocab=8, depth=1)
    sequences, scores = beam_search(tiny, weights(tiny), PROMPT % 8, 4, 2, length_penalty=0.0)
    # With 8 tokens and 2 steps every sequence can be scored.
    every = [(a, b) for a in range(8) for b in range(8)]
    scores_after = lambda ids: plain_logits(tiny, ids)[-1].astype(np.float64)  # noqa: E731
    first, *then = (
        scores - np.log(np.exp(scores).sum())
        for scores in map(scores_after, [PROMPT % 8, *([*PROMPT % 8, a] for a in range(8))])
    )
    total = {(a, b): float(first[a] + then[a][b]) for a, b in every}
    best_first = np.argsort(-first)[:4]
    kept = sorted((p for p in every if p[0] in best_first), key=total.__getitem__)[::-1][:4]
    assert [tuple(s) for s in sequences[:, 3:].tolist()] == kept
    np.testing.assert_allclose(scores, [total[p] for p in kept], atol=1e-5)


def test_pad_fills_what_ended_early():
    params = weights(GPT2)
    free, _ = beam_search(GPT2, params, PROMPT, 3, 6)
    eos = int(free[0, 4])
    ended, scores = beam_search(GPT2, params, PROMPT, 3, 6, eos=eos)
    padded, _ = beam_search(GPT2, params, PROMPT, 3, 6, eos=eos, pad=59)
    assert (np.diff(scores) <= 0).all()
    lengths = [s[3:].tolist().index(eos) + 4 if eos in s[3:] else len(s) for s in ended]
    assert min(lengths) < max(lengths) == ended.shape[1], "the case has sequences of two lengths"
    for one, other, length in zip(ended, padded, lengths, strict=True):
        assert (one[length:] == eos).all() and (other[length:] == 59).all()
        np.testing.assert_array_equal(one[:length], other[:length])


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """Few pieces and many bytes, so that characters arrive torn."""
    folder = tmp_path_factory.mktemp("tokenizer")
    spec = SentencePiece(vocab=300)
    spec.build(iter([b"the cat sat on the mat and the hat\n" * 30]), folder)
    return spec.load(folder)


def speak(monkeypatch, tokenizer, ids, size, stop=(), prompt="the"):
    """Pieces of text when the model says `ids`, `size` at a time."""
    chunks = [np.asarray(ids[i : i + size], np.int32) for i in range(0, len(ids), size)]
    monkeypatch.setattr(generate, "stream", lambda *_: iter(chunks))
    return list(generate_text(GPT2, None, tokenizer, prompt, Sampling(), 99, stop))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_characters_are_never_torn(monkeypatch, byte_tokenizer, size):
    text = " cat € 🙂🙂 naïve 漢字 \ufffd the mat"
    ids = byte_tokenizer.encode("the" + text)[len(byte_tokenizer.encode("the")) :]
    assert len(ids) > len(text), "the text is spelled in bytes"
    pieces = speak(monkeypatch, byte_tokenizer, ids, size)
    assert "".join(pieces) == text and all(pieces)
    assert sum(p.count("\ufffd") for p in pieces) == 1
    # Cut inside a character, the end is what the tokenizer makes of it.
    cut = ids[: int(np.flatnonzero(ids == byte_tokenizer.encode("🙂")[-1])[0])]
    whole_text = byte_tokenizer.decode([*byte_tokenizer.encode("the"), *cut])[3:]
    assert "".join(speak(monkeypatch, byte_tokenizer, cut, size)) == whole_text
    assert whole_text.endswith("\ufffd")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_text_ends_before_the_stop_that_is_complete_first(monkeypatch, byte_tokenizer, size):
    text = " cat sat on the mat and the hat"
    ids = byte_tokenizer.encode("the" + text)[len(byte_tokenizer.encode("the")) :]
    say = functools.partial(speak, monkeypatch, byte_tokenizer, ids, size)
    assert "".join(say()) == text
    assert "".join(say(stop=["the mat"])) == " cat sat on "
    assert "".join(say(stop=["hat", "t on"])) == " cat sa"
    assert "".join(say(stop=[" sat on the mat", "on"])) == " cat sat "
    assert "".join(say(stop=["nd", "and", "d"])) == " cat sat on the mat "
    assert "".join(say(stop=["the hats", "no such"])) == text
    assert "".join(say(stop=[" cat"])) == ""
    if size == 1:
        assert len(say(stop=["zzz"])) > 5, "text comes as it is made"


def test_text_of_a_model_is_the_text_of_its_ids(tmp_path):
    spec = Characters()
    spec.build(iter(["abcdefghij klmnopqrstuvwxyzäöü€🙂\n".encode()]), tmp_path)
    tokenizer = spec.load(tmp_path)
    prompt_ids = tokenizer.encode("hello wörld")
    ids = whole(GPT2, prompt_ids, Sampling(seed=2), 40, vocab=tokenizer.vocab)
    params = weights(GPT2)
    pieces = generate_text(GPT2, params, tokenizer, "hello wörld", Sampling(seed=2), 40)
    text = "".join(pieces)
    assert text == tokenizer.decode(ids) and len(text) == 40
    pieces = generate_text(
        GPT2, params, tokenizer, "hello wörld", Sampling(seed=2), 40, [text[9:12]]
    )
    assert "".join(pieces) == text[: text.index(text[9:12])]
    assert len("".join(generate_text(GPT2, params, tokenizer, "", Sampling(seed=2), 40))) == 40


def test_text_of_beams_is_that_of_the_best_sequence(tmp_path):
    spec = Characters()
    spec.build(iter([b"abcdefghij klmnopqrst\n"]), tmp_path)
    tokenizer = spec.load(tmp_path)
    params = weights(GPT2)
    assert tokenizer.vocab < GPT2.vocab, "the model has ids that the tokenizer cannot decode"
    ids = tokenizer.encode("a hen")
    best = beam_search(GPT2, params, ids, 3, 12, vocab=tokenizer.vocab)[0][0]
    text = beam_text(GPT2, params, tokenizer, "a hen", 3, 12)
    assert text == tokenizer.decode(best[5:]) and len(text) == 12
    cut = beam_text(GPT2, params, tokenizer, "a hen", 3, 12, [text[4:6]])
    assert cut == text[: text.index(text[4:6])]
    assert len(beam_text(GPT2, params, tokenizer, "", 3, 12)) == 12
    with pytest.raises(ValueError, match="strings that are not empty"):
        beam_text(GPT2, params, tokenizer, "a hen", 3, 12, [""])


def test_text_of_beams_keeps_the_blank_after_the_prompt(monkeypatch, byte_tokenizer):
    ids = byte_tokenizer.encode("the cat")
    count = len(byte_tokenizer.encode("the"))
    found = np.array([[*ids, byte_tokenizer.eot, byte_tokenizer.eot]], np.int32)
    monkeypatch.setattr(generate, "beam_search", lambda *_, **__: (found, None))
    assert count < len(ids) and beam_text(GPT2, None, byte_tokenizer, "the", 1, 9) == " cat"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: allowed are numbers from 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1: allowed are 0"),
        ({"top_p": 0.0}, "top_p=0.0: allowed are numbers above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": -1}, "seed=-1: allowed are 0 to 4294967295"),
    ],
)
def test_sampling_refuses(options, said):
    with pytest.raises(ValueError) as caught:
        Sampling(**options)
    assert said in str(caught.value)


def test_bad_arguments_are_refused_at_once(byte_tokenizer):
    begin = functools.partial(stream, GPT2, None)
    for arguments, said in (
        ((PROMPT, Sampling(), -1, 60), "max_tokens=-1"),
        ((PROMPT, Sampling(), 5, 61), "vocab=61: the model has 60"),
        ((PROMPT, Sampling(), 5, 60, 60), "eot=60: allowed are 0 to 59"),
        ((np.array([3, 60]), Sampling(), 5, 60), "from 3 to 60; allowed: 0 to 59"),
        ((np.array([[3]]), Sampling(), 5, 60), "a row of ids"),
    ):
        with pytest.raises(ValueError) as caught:
            begin(*arguments)
        assert said in str(caught.value)
    for stop in ("end", ["a", ""]):
        with pytest.raises(ValueError, match="strings that are not empty"):
            generate_text(GPT2, None, byte_tokenizer, "the", Sampling(), 5, stop)
    search = functools.partial(beam_search, GPT2, None)
    for arguments, said in (
        ((PROMPT[:0], 2, 5), "0 prompt tokens"),
        ((PROMPT, 31, 5), "beams=31: allowed are 1 to vocab / 2 = 30"),
        ((PROMPT, 2, 23), "max_tokens up to 22 is allowed"),
        ((PROMPT, 2, 5, None, 1.0, None, 61), "vocab=61: the model has 60"),
        ((PROMPT, 10, 5, None, 1.0, None, 18), "allowed are 1 to vocab / 2 = 9"),
    ):
        with pytest.raises(ValueError) as caught:
            search(*arguments)
        assert said in str(caught.value)
