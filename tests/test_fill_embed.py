# SPDX-License-Identifier: Apache-2.0
"""Words for masks and vectors of texts, from a trained run and by whole commands."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, write_text

from lmjax import recipe, sharding
from lmjax.__main__ import main
from lmjax.checkpoint import load_params
from lmjax.embed import _batch
from lmjax.sharding import Layout
from lmjax.step import abstract_params
from lmjax.tokenizer import load_tokenizer

BERT, DEMO = "experiments/bert_base.py", "experiments/demo.py"
TEXTS = ["the cat sat", "one red bird", "a " * 100 + "mat", "noon"]


def trained(file: str, workdir: Path) -> Path:
    corpus = f"--data.corpus=files:{write_text(workdir)}"
    keys = ("--steps=2", "--evaluate_every=0", "--evaluate_windows=8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["train", file, "--tiny", f"--workdir={workdir}/run", corpus, *keys]) == 0
    return workdir / "run"


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return trained(BERT, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return trained(DEMO, tmp_path_factory.mktemp("demo"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Output of a command that must succeed."""
    monkeypatch.chdir(ROOT)

    def command(verb: str, file: str, workdir: Path, *flags: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main([verb, file, "--tiny", f"--workdir={workdir}", *flags]) == code
        out = capsys.readouterr()
        return out.err if code else out.out

    return command


def outputs(file: str, workdir: Path, rows: list[list[int]]) -> Any:
    """The model on rows of equal length, in plain calls."""
    model = recipe.load(str(ROOT / file), tiny=True).model
    with sharding.use(Layout().mesh(jax.devices()[:1])):
        _, params = load_params(workdir, abstract_params(model))
    tokens = jnp.asarray(rows)
    batch = {"tokens_BL": tokens, "segments_BL": jnp.ones_like(tokens)}
    if file == BERT:
        batch["masked_BP"] = jnp.arange(tokens.shape[1])[None]
    return model.apply({"params": params}, batch, states=True)


# --- fill -----------------------------------------------------------------------------------------


def test_fill_names_the_likeliest_words_of_each_mask(bert: Path, command):
    text = "the [MASK] sat on a [MASK]"
    found = json.loads(command("fill", BERT, bert, f"--text={text}", "--top=4", "--json"))
    tokenizer = load_tokenizer(bert / "tokenizer")
    controls = tokenizer.controls
    ids = [controls["cls"], *tokenizer.encode_masked(text).tolist(), controls["sep"]]
    columns = [i for i, token in enumerate(ids) if token == controls["mask"]]
    assert len(columns) == len(found["masks"]) == 2
    out = outputs(BERT, bert, [ids])
    probs = jax.nn.softmax(out.readout.logits(out.heads["masked_BPE"])[0], axis=-1)
    for column, words in zip(columns, found["masks"], strict=True):
        row = np.asarray(probs[column])[: tokenizer.vocab]
        assert [w["id"] for w in words] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([w["probability"] for w in words], np.sort(row)[::-1][:4], 1e-4)
        assert all(w["word"] == tokenizer.piece(w["id"]) for w in words)
    shown = command("fill", BERT, bert, f"--text={text}", "--top=2")
    assert shown.startswith("mask 1\n") and len(shown.splitlines()) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text=no mask here",), "has no mask"),
        (("--text=[MASK]" + " cat" * 100,), "tokens; 62 are the most"),
        (("--text=[MASK]", "--top=0"), "--top=0"),
    ],
)
def test_fill_refuses(flags, message: str, bert: Path, command):
    assert message in command("fill", BERT, bert, *flags, code=2)


def test_a_decoder_fills_in_nothing(demo: Path, command):
    assert "knows no mask" in command("fill", DEMO, demo, "--text=[MASK]", code=2)


# --- embed ----------------------------------------------------------------------------------------


def embedded(command, bert: Path, tmp_path: Path, *flags: str) -> dict[str, np.ndarray]:
    source, target = tmp_path / "texts.txt", tmp_path / "out.npz"
    source.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    out = command("embed", BERT, bert, f"--file={source}", f"--to={target}", *flags)
    assert out == f"4 texts → {target}\n"
    with np.load(target) as found:
        return dict(found)


def states_of(bert: Path, text: str, layer: int) -> np.ndarray:
    """One layer's states of a short text, control tokens included, (L, D)."""
    tokenizer = load_tokenizer(bert / "tokenizer")
    ids = [tokenizer.controls["cls"], *tokenizer.encode(text), tokenizer.controls["sep"]]
    return np.asarray(outputs(BERT, bert, [ids]).states_NBLD[layer, 0])


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_a_text_is_the_mean_of_its_tokens_at_any_layer(layer: int, bert, command, tmp_path):
    found = embedded(command, bert, tmp_path, f"--layer={layer}")
    assert found["texts"].tolist() == TEXTS[:2] + [TEXTS[2]] + TEXTS[3:]
    assert found["vectors"].shape == (4, 32) and found["vectors"].dtype == np.float32
    for row in (0, 1, 3):
        wanted = states_of(bert, TEXTS[row], layer)[1:-1].mean(0)
        np.testing.assert_allclose(found["vectors"][row], wanted, atol=2e-6)


def test_the_first_state_is_that_of_the_control_token(bert, command, tmp_path):
    found = embedded(command, bert, tmp_path, "--pool=first")
    wanted = states_of(bert, TEXTS[1], -1)[0]
    np.testing.assert_allclose(found["vectors"][1], wanted, atol=2e-6)


def test_tokens_and_words_come_with_their_text_and_bounds(bert, command, tmp_path):
    tokenizer = load_tokenizer(bert / "tokenizer")
    tokens = embedded(command, bert, tmp_path, "--pool=tokens")
    sizes = [len(tokenizer.encode(text)) for text in TEXTS]
    assert sizes[2] > 62  # cut into stretches that fit, and nothing is lost
    assert np.diff(tokens["starts"]).tolist() == sizes
    assert len(tokens["pieces"]) == len(tokens["vectors"]) == sum(sizes)
    first = slice(*tokens["starts"][:2])
    wanted = states_of(bert, TEXTS[0], -1)[1:-1]
    np.testing.assert_allclose(tokens["vectors"][first], wanted, atol=2e-6)

    words = embedded(command, bert, tmp_path, "--pool=words")
    assert words["pieces"][slice(*words["starts"][:2])].tolist() == ["the", "cat", "sat"]
    starts = tokenizer.word_starts[tokenizer.encode(TEXTS[0])]
    groups = np.split(wanted, np.flatnonzero(starts)[1:])
    means = np.stack([group.mean(0) for group in groups])
    np.testing.assert_allclose(words["vectors"][slice(*words["starts"][:2])], means, atol=2e-6)


def test_a_context_need_not_be_a_power_of_two():
    """ERNIE's is 513: rows of a full context are padded to it and no further."""
    batch = _batch([[1] * 500, [1] * 513], 513, pad=7)
    assert batch["tokens_BL"].shape[1] == 513 and batch["segments_BL"].sum() == 1013
    assert batch["tokens_BL"][0, 500:].tolist() == [7] * 13
    assert _batch([[1] * 17], 513, pad=7)["tokens_BL"].shape[1] == 32


def test_json_lines_hold_the_same_vectors(bert, command, tmp_path):
    source, target = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(TEXTS), encoding="utf-8")
    command("embed", BERT, bert, f"--file={source}", f"--to={target}")
    lines = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    arrays = embedded(command, bert, tmp_path)
    assert [line["text"] for line in lines] == [text.strip() for text in TEXTS]
    np.testing.assert_allclose([line["vector"] for line in lines], arrays["vectors"], atol=1e-7)
    printed = json.loads(command("embed", BERT, bert, f"--text={TEXTS[0]}"))
    np.testing.assert_allclose(printed["vector"], lines[0]["vector"], atol=1e-6)


def test_a_decoder_embeds_as_well(demo, command):
    tokenizer = load_tokenizer(demo / "tokenizer")
    line = json.loads(command("embed", DEMO, demo, "--text=the cat", "--pool=tokens"))
    ids = [tokenizer.eot, *tokenizer.encode("the cat")]
    wanted = np.asarray(outputs(DEMO, demo, [ids]).hidden_BLD[0, 1:])
    np.testing.assert_allclose(line["vectors"], wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text=a", "--layer=3"), "--layer=3: from 0"),
        (("--text=a", "--pool=max"), "--pool=max: one of mean, first, words, tokens"),
        (("--text=a", "--to=out.csv"), "ends in .npz, .jsonl, .hdf5"),
        (("--text=a", "--to=nowhere/out.npz"), "no folder nowhere"),
        (("--file=absent.txt",), "absent.txt: cannot be read"),
    ],
)
def test_embed_refuses(flags, message: str, bert, command):
    assert message in command("embed", BERT, bert, *flags, code=2)


def test_a_bad_line_is_named_and_leaves_no_file(bert, command, tmp_path):
    source = tmp_path / "texts.txt"
    source.write_bytes(b"fine\n\xff\xfe\n")
    err = command("embed", BERT, bert, f"--file={source}", f"--to={tmp_path}/out.npz", code=2)
    assert f"{source}:2: not valid UTF-8" in err
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]
