# SPDX-License-Identifier: Apache-2.0
"""Evaluation: every token of a split once, the same number on every mesh, and beside xz."""

import dataclasses
import json
import lzma
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, write_text

from lmjax import recipe, sharding
from lmjax.checkpoint import Checkpoints
from lmjax.data import Data, Prepared
from lmjax.evaluate import evaluate, next_token_report, split_text
from lmjax.evaluator import Evaluator
from lmjax.examples.windows import Windows
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.optim import AdamW
from lmjax.run import Run
from lmjax.sharding import Layout
from lmjax.step import init_params, placed, state_from
from lmjax.text import Files
from lmjax.tokenizer import ByteBPE, Characters
from lmjax.workdir import keep_tokenizer, record

LENGTH = 12
ONE = Layout(1, 1, 1)
# The positions tell windows apart, and the wide table makes no two tokens alike.
MODEL = GPT(vocab=320, context=LENGTH, depth=1, width=16, heads=2, position_std=1.0)


def first(layout: Layout):
    return jax.devices()[: math.prod(dataclasses.astuple(layout))]


def recipe_on(text: Path, **changes) -> Run:
    """A run over the lines of `text`."""
    examples = Windows(length=LENGTH)
    corpus = Files(str(text), document="line")
    data = Data(corpus, ByteBPE(vocab=300), examples, validation=0.2, test=0.2)
    run = Run(MODEL, data, next_token, AdamW(peak=1e-3, warmup=1), batch=8, steps=1, mesh=ONE)
    return replace(run, **changes)


def params_of(seed: int = 0):
    """Parameters far from the uniform distribution, on the host."""
    params = jax.tree.map(np.asarray, init_params(MODEL, seed))
    random = np.random.default_rng(seed)
    return {**params, "embedding": random.normal(0, 1, params["embedding"].shape).astype("f4")}


PARAMS = params_of()


@pytest.fixture(autouse=True, scope="module")
def a_mesh_takes_the_first_devices():
    """Where `evaluate` makes the mesh itself: this machine has eight, and the recipe wants one."""
    whole = Layout.mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Layout, "mesh", lambda self, devices=None: whole(self, devices or first(self))
        )
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return recipe_on(write_text(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory) -> Path:
    """A run directory with a checkpoint of PARAMS at step 3."""
    workdir = tmp_path_factory.mktemp("run")
    prepared = run.data.prepare(workdir, say=lambda _: None)
    with sharding.use(ONE.mesh()):
        keep_tokenizer(prepared.tokenizer.directory, workdir)
        record(run, workdir, {"name": "a", "description": ""})
        state = state_from(run.optimiser(), jax.tree.map(jnp.asarray, PARAMS))
        checkpoints = Checkpoints(workdir, recipe.to_json(run), 1, print)
        checkpoints.save(3, state.replace(step=jnp.int32(3)))
        checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def prepared(run, workdir) -> Prepared:
    return run.data.prepare(workdir, say=lambda _: None)


def score(run: Run, prepared: Prepared, layout: Layout, split="test", windows=0) -> dict:
    with sharding.use(layout.mesh()):
        rest = jax.tree.map(lambda x: x.sharding, placed(jax.eval_shape(lambda: PARAMS)))
        return Evaluator(run, prepared, split, windows)(jax.device_put(PARAMS, rest))


@jax.jit
def hidden(tokens_L):
    """Hidden states (L, D) of one window, outside any mesh."""
    outputs = MODEL.apply({"params": PARAMS}, {"tokens_BL": tokens_L[None]})
    return outputs.hidden_BLD[0]  # type: ignore[union-attr]


def plain_nll(tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target, float64, a window at a time and by the book."""
    nll = []
    for start in range(0, len(targets), LENGTH):
        window = np.zeros(LENGTH, np.int32)
        here = slice(start, min(start + LENGTH, len(targets)))
        window[: here.stop - start] = tokens[here]  # causal: what follows changes nothing
        scores_LV = np.asarray(hidden(window), np.float64) @ PARAMS["embedding"][:320].T
        log_LV = scores_LV - np.log(np.exp(scores_LV).sum(-1, keepdims=True))
        nll += [-log_LV[i, target] for i, target in enumerate(targets[here])]
    return np.array(nll)


def expected(split) -> np.ndarray:
    """Each token of a split is a target once, and the end of the last document as well."""
    tokens = np.asarray(split.tokens, np.int64)
    return plain_nll(tokens, np.roll(tokens, -1))


# --- the sum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_token_is_scored_once(split: str, run, prepared):
    nll = expected(prepared.store.splits[split])
    assert len(nll) % LENGTH and len(nll) > 8 * LENGTH and nll.std() > 1  # a window that is cut
    got = score(run, prepared, ONE, split)
    assert got["loss_weight"] == len(nll) == prepared.store.splits[split].n_tokens
    assert got["loss"] == pytest.approx(nll.mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "batch"),
    [
        (ONE, 1),
        (ONE, 7),
        (ONE, 500),
        (Layout(8, 1, 1), 16),
        (Layout(2, 2, 2), 12),
        (Layout(2, 1, 1, 4), 12),
    ],
    ids=["1", "7", "500", "8x1x1-16", "2x2x2-12", "2x1x1x4-12"],
)
def test_neither_batch_nor_mesh_changes_the_score(layout: Layout, batch: int, run, prepared):
    """A batch of 500 is mostly windows that pad the only step; none of them may count."""
    nll = expected(prepared.store.splits["test"])
    got = score(replace(run, batch=batch), prepared, layout)
    assert got["loss_weight"] == got["accuracy_weight"] == len(nll)
    assert got["loss"] == pytest.approx(nll.mean(), rel=1e-6)


def test_a_limit_scores_the_first_windows_only(run, prepared):
    nll = expected(prepared.store.splits["test"])[: 3 * LENGTH]
    got = score(run, prepared, ONE, windows=3)
    assert got["loss_weight"] == 3 * LENGTH
    assert got["loss"] == pytest.approx(nll.mean(), rel=1e-6)
    whole = score(run, prepared, ONE, windows=10_000)
    assert whole["loss_weight"] == prepared.store.splits["test"].n_tokens


def test_without_an_end_of_text_the_first_token_is_no_target(run, tmp_path):
    other = replace(run, data=replace(run.data, tokenizer=Characters()))
    prepared = other.data.prepare(tmp_path, say=lambda _: None)
    tokens = np.asarray(prepared.store.splits["test"].tokens, np.int64)
    nll = plain_nll(tokens[:-1], tokens[1:])
    got = score(other, prepared, ONE)
    assert got["loss_weight"] == len(tokens) - 1
    assert got["loss"] == pytest.approx(nll.mean(), rel=1e-6)


# --- the verb -------------------------------------------------------------------------------------


def lines_of(run: Run, split) -> list[bytes]:
    """The documents of a split, from the text file itself."""
    lines = Path(run.data.corpus.glob).read_bytes().split(b"\n")
    return [lines[int(name.rsplit(":", 1)[1]) - 1] for name in split.document_ids()]


def test_the_file_holds_the_score_in_bits_and_beside_baselines(run, workdir, prepared, capsys):
    result = evaluate(run, workdir)
    assert json.loads((workdir / "evaluation-test.json").read_text("utf-8")) == result
    split = prepared.store.splits["test"]
    text, nll = lines_of(run, split), expected(split)
    size = sum(map(len, text))
    assert (result["split"], result["step"]) == ("test", 3)
    assert (result["tokens"], result["bytes"]) == (len(nll), size)
    assert result["documents"] == len(text) == split.n_documents
    assert result["loss"] == pytest.approx(nll.mean(), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx((nll / math.log(2)).sum() / size, rel=1e-6)

    counts = Counter(prepared.store.splits["train"].tokens.tolist())
    total = counts.total() + prepared.tokenizer.vocab
    ids = [prepared.tokenizer.eot, *map(int, prepared.tokenizer.encode(text[0].decode()))]
    assert ids == split.tokens[: len(ids)].tolist()
    unigram = sum(-math.log2((counts[t] + 1) / total) for t in split.tokens.tolist()) / size
    xz = 8 * len(lzma.compress(b"".join(text), preset=9)) / size
    assert split_text(prepared.tokenizer, split) == b"".join(text)
    assert result["baselines"]["unigram_bits_per_byte"] == pytest.approx(unigram)
    assert result["baselines"]["xz_bits_per_byte"] == xz
    assert f"bits per byte  {result['bits_per_byte']:.4f}" in capsys.readouterr().out
    assert (workdir / "report.html").is_file()


def test_a_missing_split_names_the_allowed_ones(run, workdir, tmp_path):
    with pytest.raises(ValueError, match="no dev split: one of test, train, validation"):
        evaluate(run, workdir, "dev")
    with pytest.raises(ValueError, match="holds no token store; name a corpus: --data.corpus="):
        evaluate(run, tmp_path)
    evaluate(run, workdir, "validation")
    assert (workdir / "evaluation-validation.json").is_file()


def test_another_corpus_is_scored_whole(run, workdir, prepared, tmp_path):
    text = tmp_path / "other.txt"
    text.write_bytes("a red barn.\nthe naïve ☃ sat over noon and saw 12 more birds.\n".encode())
    result = evaluate(run, workdir, "", Files(str(text), document="line"))
    assert json.loads((workdir / "evaluation-corpus.json").read_text("utf-8")) == result
    documents = text.read_bytes().split(b"\n")[:-1]
    encoded = [prepared.tokenizer.encode(d.decode()).tolist() for d in documents]
    tokens = np.array([t for ids in encoded for t in (prepared.tokenizer.eot, *ids)])
    nll = plain_nll(tokens, np.roll(tokens, -1))
    size = sum(map(len, documents))
    assert (result["tokens"], result["bytes"], result["documents"]) == (len(tokens), size, 2)
    assert result["loss"] == pytest.approx(nll.mean(), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / size, rel=1e-6)
    assert result["baselines"]["unigram_bits_per_byte"] > 1


def test_text_that_the_tokenizer_loses_has_no_bits_per_byte(run, tmp_path):
    other = replace(run, data=replace(run.data, tokenizer=Characters()))
    prepared = other.data.prepare(tmp_path, say=lambda _: None)
    with sharding.use(ONE.mesh()):
        whole = Evaluator(other, prepared, "test")
        prepared.store.manifest["splits"]["test"]["unknown"] = 1  # as if one were not seen before
        lossy = Evaluator(other, prepared, "test")
        assert next_token_report(whole, whole(PARAMS))["bits_per_byte"] > 0
        assert next_token_report(lossy, lossy(PARAMS))["bits_per_byte"] is None


# --- encoders -------------------------------------------------------------------------------------


def test_the_batch_changes_no_score_of_an_encoder(tmp_path):
    """Masked tokens and pairs are weighed one by one, so rows that pad the last batch are none."""
    encoder = recipe.load(str(ROOT / "experiments/bert_tiny.py"), tiny=True)
    data = replace(encoder.data, corpus=Files(str(write_text(tmp_path)), document="line"))
    encoder = replace(encoder, data=data, mesh=ONE, model=encoder.model.clone(depth=1))
    prepared = encoder.data.prepare(tmp_path, say=lambda _: None)
    with sharding.use(ONE.mesh()):
        params = init_params(encoder.model, 0)
        found = [
            Evaluator(replace(encoder, batch=batch), prepared, "train")(params) for batch in (4, 64)
        ]
    assert found[0]["masked_loss_weight"] > 50 and found[0]["pair_loss_weight"] % 4
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_loss_that_is_not_finite_is_written_as_json(run, prepared, tmp_path, monkeypatch):
    def diverged(self, params):
        return {"loss": math.nan, "loss_weight": 9.0, "accuracy": 0.0, "accuracy_weight": 9.0}

    monkeypatch.setattr("lmjax.evaluate.load_params", lambda workdir, wanted: (3, PARAMS))
    monkeypatch.setattr(Evaluator, "__call__", diverged)
    stored = replace(run, data=replace(run.data, store=str(prepared.store.directory)))
    evaluate(stored, tmp_path)
    text = (tmp_path / "evaluation-test.json").read_text("utf-8")
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (found["loss"], found["perplexity"], found["bits_per_byte"]) == ("NaN",) * 3


# --- nothing to score -----------------------------------------------------------------------------


def test_a_split_without_any_weight_is_an_error_not_a_zero(run, prepared, monkeypatch):
    held_out = Windows.held_out

    def blank(self, split, windows):
        batch = held_out(self, split, windows)
        batch["weights_BL"][:] = 0
        return batch

    monkeypatch.setattr(Windows, "held_out", blank)
    with pytest.raises(ValueError, match=r"the test split has nothing to score: none of its \d+"):
        score(run, prepared, ONE)


def test_an_empty_corpus_and_one_below_a_window_are_errors(run, workdir, tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="there are no documents; 0 documents, 0 bytes; dropped 1"):
        evaluate(run, workdir, "", Files(str(tmp_path / "a.txt")))
    (tmp_path / "b.txt").write_text("a cat")
    with pytest.raises(ValueError, match=f"fewer than one window of {LENGTH}"):
        evaluate(run, workdir, "", Files(str(tmp_path / "b.txt")))
