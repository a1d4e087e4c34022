# SPDX-License-Identifier: Apache-2.0
"""ELMo in bilm-tf's files: equal numbers in, the same bits out, one error for each bad file."""

import json
from pathlib import Path

import bilm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import recipe, sharding
from lmjax.checkpoint import load_params
from lmjax.convert.elmo import export_elmo, import_elmo
from lmjax.convert.exchange import export_folder, import_folder
from lmjax.models.elmo import ELMo
from lmjax.step import abstract_params, init_params
from lmjax.tokenizer import load_tokenizer
from lmjax.vocabulary import characters_of
from lmjax.workdir import recorded_run

EXPERIMENT = Path(__file__).parents[1] / "experiments/elmo.py"
SENTENCES = [
    "the cat sat on the mat".split(),
    ["naïve", "猫", "x" * 70, "don't", "<S>", "."],
    ["one"],
]
# Every part that options can change, each where leaving it out is seen.
MODELS = {
    "the released form": bilm.options(),
    "without skips": bilm.options(lstm__use_skip_connections=False),
    "tanh": bilm.options(char_cnn__activation="tanh"),
    "three layers": bilm.options(lstm__n_layers=3),
    "one layer": bilm.options(lstm__n_layers=1),
    "one highway": bilm.options(char_cnn__n_highway=1),
    "three highways": bilm.options(char_cnn__n_highway=3),
    "no highway": bilm.options(char_cnn__n_highway=None),
    "tight clips": bilm.options(lstm__cell_clip=0.05, lstm__proj_clip=0.03),
    "a clip of cells": bilm.options(lstm__cell_clip=0.05, lstm__proj_clip=None),
    "a clip of projections": bilm.options(lstm__cell_clip=0, lstm__proj_clip=0.03),
    "equal sizes": bilm.options(lstm__dim=16, lstm__projection_dim=16, lstm__proj_clip=0.01),
    "short words": bilm.options(char_cnn__max_characters_per_token=6),
    "training's characters": bilm.options(char_cnn__n_characters=261),
}


def states(model, params, sentence, characters=50):
    """(layers and one, words, twice the width) of one sentence, in a plain call."""
    words = ["<S>", *sentence, "</S>"]
    spelt = characters_of(words, characters)
    for at, word in enumerate(sentence, 1):
        spelt[at] = bilm.letters(word, characters)
    order = np.array([range(len(words)), range(len(words))[::-1]])
    numbers = np.unique(words, return_inverse=True)[1].astype(np.int32)
    if "<S>" in sentence:
        numbers[0] = len(words)
    batch = {
        "words_BXL": np.zeros((1, *order.shape), np.int32),
        "spellings_BXL": numbers[order][None],
        "characters_BXLC": spelt[order][None],
    }

    @jax.jit
    def forward(params, batch):
        return model.apply({"params": params}, batch, states=True)

    outputs = forward(params, batch)
    forward, backward = outputs.states_NBLD[:, 0, 0], outputs.states_NBLD[:, 0, 1, ::-1]
    return np.concatenate([forward, backward], -1)[:, 1:-1]


def difference(model, params, said, weights):
    network, longest = bilm.Network(said, weights), said["char_cnn"]["max_characters_per_token"]
    far = 0.0
    for sentence in SENTENCES:
        network.reset()
        ours = states(model.clone(dtype="float32"), params, sentence, longest)
        far = max(far, float(np.abs(ours - network.layers(sentence)).max()))
    return far


def assert_equal_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_equal_files(left, right):
    assert sorted(left) == sorted(right)
    for name, values in left.items():
        assert right[name].dtype == np.float32
        np.testing.assert_array_equal(values, right[name])


@pytest.mark.parametrize("name", MODELS)
def test_layers_equal_a_plain_implementation_and_the_file_comes_back(name, tmp_path):
    said, weights = MODELS[name], bilm.draw(MODELS[name])
    model, params, info = import_elmo(bilm.write(tmp_path / "in", said, weights))
    assert difference(model, params, said, weights) < 2e-6
    longest = said["char_cnn"]["max_characters_per_token"]
    assert info.characters == longest

    export_elmo(tmp_path / "out", model, params, longest)
    again, written = bilm.read(tmp_path / "out")
    assert_equal_files(weights, written)
    if name == "equal sizes":
        said["lstm"]["proj_clip"] = None  # of a projection that there is not
    assert again["lstm"].keys() == said["lstm"].keys()
    said["char_cnn"]["n_characters"] = 262
    for part in ("lstm", "char_cnn"):
        wanted = {key: value or None for key, value in said[part].items()}
        assert {key: value or None for key, value in again[part].items()} == wanted


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("lstm__use_skip_connections", False),
        ("lstm__cell_clip", 0.3),
        ("lstm__proj_clip", 0.1),
        ("char_cnn__activation", "tanh"),
        ("char_cnn__max_characters_per_token", 5),
    ],
)
def test_an_option_that_is_read_wrongly_is_seen(key, other, tmp_path):
    said = bilm.options()
    weights = bilm.draw(said)
    folder = bilm.write(tmp_path, bilm.options(**{key: other}), weights)
    model, params, info = import_elmo(folder)
    said["char_cnn"]["max_characters_per_token"] = info.characters if "max" in key else 50
    if "max" in key:
        ours = states(model.clone(dtype="float32"), params, SENTENCES[0], info.characters)
        network = bilm.Network(bilm.options(), weights)
        assert np.abs(ours - network.layers(SENTENCES[0])).max() > 1e-3
    else:
        assert difference(model, params, said, weights) > 1e-3


def test_fields_are_those_of_the_options_and_the_rest_the_recipes(tmp_path):
    said = bilm.options(lstm__cell_clip=2.5, lstm__proj_clip=None)
    like = ELMo(vocab=9, cells=99, negatives=17, dropout=0.4, distinct=0.25)
    folder = bilm.write(tmp_path, said, bilm.draw(said))
    model, _, info = import_elmo(folder, like, rows=range(40))
    assert model == ELMo(
        vocab=40, depth=2, cells=10, width=6, embedding=5, filters=((1, 4), (2, 5), (3, 7)),
        cell_clip=2.5, projection_clip=0.0, negatives=17, dropout=0.4, distinct=0.25,
    )  # fmt: skip
    assert info.notes == ("the softmax is new, so perplexity means nothing until it is trained",)
    trained = said | {"dropout": 0.2, "n_negative_samples_batch": 8, "batch_size": 3, "colour": 1}
    (tmp_path / "options.json").write_text(json.dumps(trained | {"bidirectional": True}))
    model, _, info = import_elmo(tmp_path, like, rows=range(40))
    assert (model.dropout, model.negatives) == (0.2, 8)
    assert "options that are not read: colour" in info.notes[0]


def test_a_new_softmax_is_drawn_as_a_runs_would_be(tmp_path):
    said = bilm.options()
    folder = bilm.write(tmp_path, said, bilm.draw(said))
    model, params, _ = import_elmo(folder, rows=range(300), seed=3)
    fresh = jax.jit(lambda: init_params(model, 3))()["softmax"]
    assert_equal_trees(params["softmax"], jax.device_get(fresh))
    assert params["softmax"]["embedding"].std() > 0.1
    other = import_elmo(folder, rows=range(300), seed=4)[1]["softmax"]["embedding"]
    assert np.abs(other - params["softmax"]["embedding"])[:300].min(1).max() > 0
    rest = {name: x for name, x in params.items() if name != "softmax"}
    assert_equal_trees(rest, {k: x for k, x in import_elmo(folder)[1].items() if k != "softmax"})


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_words_has_its_table_in_the_file(tied, tmp_path):
    vocabulary = ["<S>", "</S>", "<UNK>", "the", "cat", "sat"]
    said = {"lstm": bilm.options()["lstm"], "n_tokens_vocab": 6}
    said |= {"share_embedding_softmax": True} if tied else {}
    weights = bilm.draw(said, words=6)
    folder = bilm.write(tmp_path / "in", said, weights)
    model, params, _ = import_elmo(folder, rows=range(6))
    assert (model.input, model.tied) == ("words", tied)
    table = params["softmax"]["embedding"] if tied else params["words"]["embedding"]
    np.testing.assert_array_equal(table[:6], weights["embedding"])
    ids = np.array([[[0, 3, 4, 2, 1], [1, 2, 4, 3, 0]]], np.int32)
    outputs = model.clone(dtype="float32").apply(
        {"params": params}, {"words_BXL": jnp.asarray(ids)}, states=True
    )
    ours = np.concatenate([outputs.states_NBLD[:, 0, 0], outputs.states_NBLD[:, 0, 1, ::-1]], -1)
    wanted = bilm.Network(said, weights, vocabulary).layers(["the", "cat", "unheard-of"])
    np.testing.assert_allclose(ours[:, 1:-1], wanted, atol=2e-6)
    export_elmo(tmp_path / "out", model, params, 0)
    again, written = bilm.read(tmp_path / "out")
    assert_equal_files(weights, written)
    assert again == said
    for words, text in ((0, "no vocabulary"), (7, "7 words")):
        with pytest.raises(ValueError, match=f"has 6 rows, there is {text}; name the file"):
            import_elmo(folder, rows=range(words))


def test_a_vocabulary_may_have_its_marks_anywhere(tmp_path):
    said = {"lstm": bilm.options()["lstm"], "n_tokens_vocab": 6}
    weights = bilm.draw(said, words=6)
    folder = bilm.write(tmp_path / "in", said, weights)
    (folder / "vocab.txt").write_text("cat\n</S>\n<S>\nsat\n<UNK>\nthe\n")
    run = run_in(tmp_path / "run", folder, ("model.input", "words"))
    with sharding.use(sharding.Layout().mesh()):
        _, params = load_params(tmp_path / "run", abstract_params(run.model))
    table = np.asarray(params["words"]["embedding"])
    np.testing.assert_array_equal(table[:6], weights["embedding"][[2, 1, 4, 0, 3, 5]])
    words = load_tokenizer(tmp_path / "run" / "tokenizer").spellings
    assert words == ["<S>", "</S>", "<UNK>", "cat", "sat", "the"]
    (folder / "vocab.txt").write_text("cat\n</S>\n<S>\nsat\na\nthe\n")
    with pytest.raises(ValueError, match="`embedding` has no row for <UNK>"):
        run_in(tmp_path / "unknown", folder)


# --- runs -----------------------------------------------------------------------------------------


VOCABULARY = "<S>\n</S>\n<UNK>\nthe\ncat\nsat\n"


def run_in(folder, source, *keys):
    run = recipe.load(str(EXPERIMENT), tiny=True)
    import_folder(recipe.override(run, keys), source, folder, {})
    return recipe.from_json(run, recorded_run(folder))


def test_a_folder_becomes_a_run_and_a_run_a_folder(tmp_path, capsys):
    said = bilm.options(char_cnn__max_characters_per_token=20)
    weights = bilm.draw(said)
    source = bilm.write(tmp_path / "in", said, weights)
    (source / "vocab-2016.txt").write_text(VOCABULARY)
    run = run_in(tmp_path / "run", source)
    out = capsys.readouterr().out
    assert "perplexity means nothing until it is trained" in out and "tokeniser" not in out
    assert run.model.vocab == 6 and run.model.cells == 10
    assert run.data.examples.characters == 20 and run.data.tokenizer.size == 6
    assert load_tokenizer(tmp_path / "run" / "tokenizer").words == 6
    with sharding.use(sharding.Layout().mesh()):
        step, params = load_params(tmp_path / "run", abstract_params(run.model))
    assert step == 0
    assert_equal_trees(
        jax.device_get(params), import_elmo(source, run.model, range(6), run.seed)[1]
    )

    export_folder(run, tmp_path / "run", tmp_path / "out")
    assert "its layers are those of the checkpoint" in capsys.readouterr().out
    again, written = bilm.read(tmp_path / "out")
    assert again == said
    assert_equal_files(weights, written)
    assert (tmp_path / "out" / "vocab.txt").read_text() == VOCABULARY


def test_the_vocabulary_that_is_named_comes_first_and_none_is_said(tmp_path, capsys):
    said = bilm.options()
    source = bilm.write(tmp_path / "in", said, bilm.draw(said))
    run = run_in(tmp_path / "none", source)
    assert "no vocabulary was given" in capsys.readouterr().out
    assert run.model.vocab == 3 and not (tmp_path / "none" / "tokenizer").exists()

    (source / "vocab.txt").write_text("a\nfile\nof another kind\n")
    with pytest.raises(
        ValueError, match="vocab.txt: no line is <S>: a vocabulary has the lines <S>, </S>, <UNK>"
    ):
        run_in(tmp_path / "bad", source)
    assert not (tmp_path / "bad").exists()
    (tmp_path / "mine.txt").write_text(VOCABULARY)
    key = ("data.tokenizer.path", str(tmp_path / "mine.txt"))
    assert run_in(tmp_path / "mine", source, key).model.vocab == 6
    (source / "vocab-2.txt").write_text(VOCABULARY)
    with pytest.raises(ValueError, match="holds vocab-2.txt, vocab.txt; name one by --data"):
        run_in(tmp_path / "several", source)


@pytest.mark.skipif(not bilm.SHARED.is_dir(), reason=f"{bilm.SHARED} is not on this machine")
def test_the_originals_fixture_comes_back_to_the_bit(tmp_path):
    said, weights = bilm.read(bilm.SHARED)
    for name in ("options.json", "lm_weights.hdf5"):
        (tmp_path / name).write_bytes((bilm.SHARED / name).read_bytes())
    model, params, _ = import_elmo(tmp_path)
    assert run_in(tmp_path / "run", bilm.SHARED).model.vocab == 449  # <UNK> is added to its words
    assert not model.skip and model.cells == 64
    export_elmo(tmp_path / "out", model, params, 50)
    again, written = bilm.read(tmp_path / "out")
    assert again == said
    assert_equal_files(weights, written)
