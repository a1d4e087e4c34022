# SPDX-License-Identifier: Apache-2.0
"""Runs from published encoders and back: recipe, tokeniser files, errors."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from test_convert_bert import assert_equal_trees, electra_folders, golden, write
from test_convert_google import google_folder
from tokenizers import Tokenizer

from lmjax import recipe, sharding
from lmjax.checkpoint import load_params
from lmjax.convert.encoders import export_encoder, import_encoder
from lmjax.convert.exchange import export_folder, import_folder
from lmjax.convert.tokenizer_files import published_files, published_spec
from lmjax.step import abstract_params, init_params
from lmjax.steps import newest_step
from lmjax.tokenizer import ByteBPE, SentencePiece, WordPiece, load_tokenizer
from lmjax.workdir import recorded_run

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TEXT = b"the cat sat on the mat, and the caf\xc3\xa9  was full of hats\n" * 40
TEXTS = ("the hat sat", "The  caf\u00e9!\nand\tmats \u4e2d\u6587 [MASK] <mask>", " a")
SPECS = {
    "bert": WordPiece(vocab=120),
    "ernie": WordPiece(vocab=120, lowercase=False),
    "electra": WordPiece(vocab=120),
    "roberta": ByteBPE(vocab=290, controls="roberta"),
    "albert": SentencePiece(vocab=300, model_type="unigram", controls="albert"),
    "albert of pairs": SentencePiece(vocab=300, controls="albert"),
}


def made(name, folder):
    SPECS[name].build(iter([TEXT]), folder)
    return load_tokenizer(folder)


def publish(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", SPECS)
def test_a_published_tokeniser_gives_the_same_ids(name, tmp_path):
    ours = made(name, tmp_path / "ours")
    folder = publish(tmp_path / "hub", published_files(tmp_path / "ours"))
    spec = published_spec(folder, name.split()[0], ours.vocab)
    assert type(spec) is type(SPECS[name])
    assert getattr(spec, "lowercase", True) == getattr(SPECS[name], "lowercase", True)
    spec.build(iter(()), tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.controls == ours.controls and again.vocab == ours.vocab
    for text in TEXTS:
        assert again.encode(text).tolist() == ours.encode(text).tolist()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("bert", {"vocab.txt", "tokenizer.json"}),
        ("roberta", {"vocab.json", "merges.txt", "tokenizer.json"}),
        ("albert", {"spiece.model", "tokenizer.json"}),
    ],
)
def test_a_published_tokeniser_has_the_files_of_its_family(name, wanted, tmp_path):
    ours = made(name, tmp_path / "ours")
    files = published_files(tmp_path / "ours")
    assert set(files) == wanted | {"tokenizer_config.json"}
    if "vocab.txt" in files:
        pieces = files["vocab.txt"].decode().splitlines()
        assert pieces == [ours.piece(i) for i in range(ours.vocab)]
    if "merges.txt" in files:
        folder = publish(tmp_path / "old", {n: files[n] for n in ("vocab.json", "merges.txt")})
        ByteBPE(path=str(folder), controls="roberta").build(iter(()), tmp_path / "again")
        again = load_tokenizer(tmp_path / "again")
        assert again.encode(TEXTS[0]).tolist() == ours.encode(TEXTS[0]).tolist()


@pytest.mark.parametrize("name", SPECS)
def test_the_library_reads_a_published_tokenizer_json(name, tmp_path):
    ours = made(name, tmp_path / "ours")
    library = Tokenizer.from_str(published_files(tmp_path / "ours")["tokenizer.json"].decode())
    for text in ("the hat sat", "The  caf\u00e9!\nand\tmats \u4e2d\u6587", " a", TEXT.decode()):
        ids = ours.encode(text).tolist()
        framed = [ours.controls["cls"], *ids, ours.controls["sep"]]
        assert library.encode(text).ids == framed
    assert library.encode("the [MASK]<mask>").ids.count(ours.controls["mask"]) == 1


def test_the_case_of_a_wordpiece_is_found(tmp_path):
    controls = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"
    folder = publish(tmp_path, {"vocab.txt": f"{controls}the\n##s\n".encode()})
    assert published_spec(folder, "bert", 9).lowercase
    (folder / "vocab.txt").write_text(f"{controls}The\n##s\n")
    assert not published_spec(folder, "bert", 9).lowercase
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert published_spec(folder, "bert", 9).lowercase
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json is damaged"):
        published_spec(folder, "bert", 9)
    assert published_spec(folder, "albert", 9) is None


@pytest.mark.parametrize("name", ["bert_base", "roberta_base", "albert_base", "electra_small"])
def test_a_run_is_exported_and_imported_with_its_tokeniser(name, tmp_path, capsys):
    run = recipe.load(str(EXPERIMENTS / f"{name}.py"), tiny=True)
    tokenizer = made(name.split("_")[0], tmp_path / "t")
    model = run.model.clone(vocab=tokenizer.vocab, context=24, depth=1)
    params = jax.device_get(jax.jit(lambda: init_params(model, 0))())
    files = published_files(tmp_path / "t")
    export_encoder(tmp_path / "hub", model, params, files, tokenizer.controls)
    import_folder(run, tmp_path / "hub", tmp_path / "run", {})
    recorded = recipe.from_json(run, recorded_run(tmp_path / "run"))
    assert recorded.model == model.clone(dtype=run.model.dtype)
    assert recorded.data.examples.length == 24 and recorded.data.units == run.data.units
    assert recorded.phase2 is None or recorded.phase2.examples.length == 24
    assert recorded.loss == run.loss and recorded.optim == run.optim
    again = load_tokenizer(tmp_path / "run" / "tokenizer")
    for text in TEXTS:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert again.controls == tokenizer.controls
    with sharding.use(sharding.Layout().mesh()):
        step, read = load_params(tmp_path / "run", abstract_params(recorded.model))
    assert step == newest_step(tmp_path / "run") == 0
    assert_equal_trees(read, params)

    export_folder(recorded, tmp_path / "run", tmp_path / "out")
    assert "its logits are those of the checkpoint" in capsys.readouterr().out
    assert_equal_trees(import_encoder(tmp_path / "out")[1], params)
    part = "discriminator" if name == "electra_small" else ""
    assert set(files) < {p.name for p in (tmp_path / "out" / part).iterdir()}


def test_googles_gelu_is_the_recipes(tmp_path, capsys):
    run = recipe.load(str(EXPERIMENTS / "bert_base.py"), tiny=True)
    google_folder(tmp_path / "google")
    made("bert", tmp_path / "t")
    pieces = published_files(tmp_path / "t")["vocab.txt"].decode().splitlines()[:30]
    (tmp_path / "google" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    for activation in ("gelu_tanh", "gelu_erf"):
        mine = recipe.override(run, [("model.activation", activation)])
        workdir = tmp_path / activation
        import_folder(mine, tmp_path / "google" / "bert_model.ckpt", workdir, {})
        assert recorded_run(workdir)["model"]["activation"] == activation
        assert f"read as {activation}" in capsys.readouterr().out
        assert load_tokenizer(workdir / "tokenizer").vocab == 30


def test_a_discriminator_alone_gets_the_recipes_generator(tmp_path, capsys):
    run = recipe.load(str(EXPERIMENTS / "electra_small.py"), tiny=True)
    _, config, tensors = golden("electra_discriminator")
    import_folder(run, write(tmp_path / "hub", config, tensors), tmp_path / "run", {})
    recorded = recorded_run(tmp_path / "run")["model"]
    sizes = [recorded[f"generator_{key}"] for key in ("width", "heads", "depth")]
    assert sizes == [16, 1, 1] and recorded["depth"] == 3
    said = capsys.readouterr().out
    assert "a new one of width 16 was drawn" in said and "has no tokeniser" in said


def test_another_family_than_the_recipes_is_refused(tmp_path):
    run = recipe.load(str(EXPERIMENTS / "bert_base.py"), tiny=True)
    electra_folders(tmp_path / "electra")
    with pytest.raises(ValueError, match=r"holds ELECTRA \(electra\), the recipe BERT"):
        import_folder(run, tmp_path / "electra", tmp_path / "run", {})
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="holds gpt2, the recipe BERT"):
        import_folder(run, tmp_path / "gpt", tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_a_tokeniser_with_more_ids_than_the_model_is_refused(tmp_path):
    run = recipe.load(str(EXPERIMENTS / "bert_base.py"), tiny=True)
    _, config, tensors = golden("bert_pretraining")
    folder = write(tmp_path / "hub", config, tensors)
    tokenizer = made("bert", tmp_path / "t")
    publish(folder, published_files(tmp_path / "t"))
    assert tokenizer.vocab > np.int64(config["vocab_size"])
    with pytest.raises(ValueError, match="the tokeniser has 120 ids, the model 70"):
        import_folder(run, folder, tmp_path / "run", {})
