# SPDX-License-Identifier: Apache-2.0
"""Vectors of words: against the original's numbers, a plain implementation, and in every file."""

import argparse
import json
from pathlib import Path

import bilm
import h5py
import numpy as np
import pytest
from commands import ROOT

from lmjax import recipe
from lmjax.__main__ import main
from lmjax.convert.exchange import import_folder
from lmjax.embed_flags import add_flags, embed_by_flags
from lmjax.vectors import Vectors, writer

ELMO = "experiments/elmo.py"
VOCABULARY = ["<S>", "</S>", "<UNK>", "the", "cat", "sat"]
TEXTS = [
    "the cat sat on the mat",
    "naïve 猫 " + "x" * 70 + " don't <S> </S> .",
    "one",
    " ".join(f"word{n % 50}" for n in range(300)),  # longer than any window
    "the cat",
    "mat the on sat",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
]
# So that its states are far from those of zeros after any text.
SAID = bilm.options(char_cnn__max_characters_per_token=40)
CLOSE = 2e-6


def imported(source: Path, workdir: Path) -> Path:
    (source / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    import_folder(recipe.load(str(ROOT / ELMO), tiny=True), source, workdir, {})
    return workdir


@pytest.fixture(scope="module")
def elmo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elmo")
    source = bilm.write(folder / "in", SAID, bilm.draw(SAID))
    return imported(source, folder / "run")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> tuple[Path, bilm.Network]:
    folder = tmp_path_factory.mktemp("words")
    said = {"lstm": bilm.options()["lstm"]}
    weights = bilm.draw(said, words=6)
    run = imported(bilm.write(folder / "in", said, weights), folder / "run")
    return run, bilm.Network(said, weights, VOCABULARY)


def network() -> bilm.Network:
    return bilm.Network(SAID, bilm.draw(SAID))


def alone(text: str) -> np.ndarray:
    """(layers and one, words, twice the width) of a text on a state of zeros."""
    return network().layers(text.split())


@pytest.fixture
def embed(monkeypatch, capsys):
    """The output of `embed`, which must end with `code`."""
    monkeypatch.chdir(ROOT)

    def embed(workdir: Path, *flags: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["embed", ELMO, "--tiny", f"--workdir={workdir}", *flags]) == code
        out = capsys.readouterr()
        return out.err if code else out.out

    return embed


def written(folder: Path, texts: list[str]) -> str:
    path = folder / "texts.txt"
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return f"--file={path}"


def of_npz(path: Path) -> list[np.ndarray]:
    with np.load(path) as found:
        starts = found["starts"]
        return [found["vectors"][a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]


def of_hdf5(path: Path) -> list[np.ndarray]:
    with h5py.File(path, "r") as file:
        found = [file[str(i)] for i in range(len(file) - 1)]
        assert all(x.dtype == np.float32 for x in found)
        return [x[()] for x in found]


def all_close(found, wanted) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)


# --- numbers --------------------------------------------------------------------------------------


def test_every_layer_of_every_word_in_the_originals_file(elmo, embed, tmp_path):
    target = tmp_path / "out.hdf5"
    flags = (written(tmp_path, TEXTS), f"--to={target}", "--layer=all", "--blanks")
    assert embed(elmo, *flags) == f"{len(TEXTS)} texts → {target}\n"
    found = of_hdf5(target)
    all_close(found, [alone(text) for text in TEXTS])
    assert found[0].shape == (3, 6, 12)
    np.testing.assert_array_equal(found[0][0, :, :6], found[0][0, :, 6:])
    with h5py.File(target, "r") as file:
        names = json.loads(file["sentence_to_index"][0])
    assert names == {text: str(i) for i, text in enumerate(TEXTS)}


@pytest.mark.parametrize(
    ("layer", "index"), [("0", 0), ("1", 1), ("2", 2), ("top", 2), ("-1", 2), ("-3", 0)]
)
def test_one_layer(layer, index, elmo, embed, tmp_path):
    target = tmp_path / "out.npz"
    embed(elmo, written(tmp_path, TEXTS[:2]), f"--to={target}", f"--layer={layer}", "--blanks")
    all_close(of_npz(target), [alone(text)[index] for text in TEXTS[:2]])
    with np.load(target) as found:
        assert found["texts"].tolist() == TEXTS[:2]
        assert found["pieces"].tolist() == [*TEXTS[0].split(), *TEXTS[1].split()]
        assert found["vectors"].dtype == np.float32


def test_the_top_is_the_default_and_json_lines_hold_it(elmo, embed, tmp_path):
    line = json.loads(embed(elmo, "--text=the cat", "--blanks"))
    assert (line["number"], line["text"], line["pieces"]) == (0, "the cat", ["the", "cat"])
    all_close([np.array(line["vectors"])], [alone("the cat")[2]])
    target = tmp_path / "out.jsonl"
    embed(elmo, written(tmp_path, TEXTS[:3]), f"--to={target}", "--layer=all", "--blanks")
    lines = [json.loads(line) for line in target.read_text("utf-8").split("\n")[:-1]]
    found = [np.array(line["vectors"]).transpose(1, 0, 2) for line in lines]
    all_close(found, [alone(text) for text in TEXTS[:3]])


@pytest.mark.parametrize(("mix", "gamma"), [("0.5,-1,2", 1), ("0.5,-1,2:1.5", 1.5)])
def test_a_mix_of_the_layers(mix, gamma, elmo, embed):
    line = json.loads(embed(elmo, f"--text={TEXTS[0]}", "--blanks", f"--mix={mix}"))
    layers = alone(TEXTS[0])
    wanted = gamma * (0.5 * layers[0] - layers[1] + 2 * layers[2])
    np.testing.assert_allclose(line["vectors"], wanted, rtol=0, atol=3 * CLOSE)


def test_a_text_is_cut_by_the_runs_tokeniser_unless_blanks_are_asked_for(elmo, embed):
    text = "The cat, don't! Sat."
    line = json.loads(embed(elmo, f"--text={text}"))
    assert line["pieces"] == ["The", "cat", ",", "don't", "!", "Sat", "."]
    all_close([np.array(line["vectors"])], [alone(" ".join(line["pieces"]))[2]])
    line = json.loads(embed(elmo, f"--text={text}", "--blanks"))
    assert line["pieces"] == ["The", "cat,", "don't!", "Sat."]
    line = json.loads(embed(elmo, "--text= ", "--blanks"))
    assert line["pieces"] == line["vectors"] == []


def test_the_company_of_a_text_does_not_change_its_vectors(elmo, embed, tmp_path):
    target = tmp_path / "out.npz"
    embed(elmo, written(tmp_path, TEXTS), f"--to={target}", "--blanks")
    first = of_npz(target)
    many = [TEXTS[(i * 5) % 7] for i in range(40)]
    embed(elmo, written(tmp_path, many), f"--to={target}", "--blanks")
    for i, vectors in enumerate(of_npz(target)):
        np.testing.assert_allclose(vectors, first[(i * 5) % 7], rtol=0, atol=5e-7)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_row_goes_on_with_the_state_of_its_own_last_text(rows, elmo, embed, tmp_path):
    """7 texts of other lengths in 2 and 3 rows: the last of them leaves rows empty."""
    target = tmp_path / "out.hdf5"
    flags = [written(tmp_path, [*TEXTS, *TEXTS[:3]]), f"--to={target}", "--blanks", "--layer=all"]
    embed(elmo, *flags, "--stateful", *([f"--rows={rows}"] if rows > 1 else []))
    networks = [network() for _ in range(rows)]
    texts = [*TEXTS, *TEXTS[:3]]
    wanted = [networks[i % rows].layers(text.split()) for i, text in enumerate(texts)]
    all_close(of_hdf5(target), wanted)
    assert np.abs(wanted[-1] - alone(TEXTS[2]))[1:].max() > 1e-2


def test_a_model_of_words_looks_them_up(words, embed, tmp_path):
    workdir, reference = words
    for text, *flags in (("the cat sat",), ("cat unheard <S> the", "--blanks")):
        target = tmp_path / f"{len(flags)}.hdf5"
        embed(workdir, f"--text={text}", f"--to={target}", "--layer=all", *flags)
        reference.reset()
        known = [word if word in VOCABULARY[3:] else "unknown" for word in text.split()]
        all_close(of_hdf5(target), [reference.layers(known)])


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The original's weights as a run."""
    folder = tmp_path_factory.mktemp("original")
    for name in ("options.json", "lm_weights.hdf5"):
        (folder / name).write_bytes((bilm.SHARED / name).read_bytes())
    import_folder(recipe.load(str(ROOT / ELMO), tiny=True), folder, folder / "run", {})
    return folder / "run"


@pytest.mark.skipif(not bilm.SHARED.is_dir(), reason=f"{bilm.SHARED} is not on this machine")
def test_the_originals_ten_batches_of_three_rows(original, embed, tmp_path):
    sentences = json.loads((bilm.SHARED / "lm_embeddings_sentences.json").read_text("utf-8"))
    texts = [sentences[row][batch] for batch in range(10) for row in range(3)]
    stored = {}
    for row in range(3):
        with h5py.File(bilm.SHARED / f"lm_embeddings_{row}.hdf5", "r") as file:
            for batch in range(10):
                stored[batch * 3 + row] = np.concatenate([*file[str(batch)][()]], -1)
    target = tmp_path / "out.hdf5"
    flags = (written(tmp_path, texts), f"--to={target}", "--layer=all")
    # There is no vocabulary, so words are what stands between blanks.
    embed(original, *flags, "--stateful", "--rows=3")
    found = of_hdf5(target)
    assert len(found) == 30
    all_close([layers[-1] for layers in found], [stored[i] for i in range(30)])
    networks = [bilm.Network(*bilm.read(bilm.SHARED)) for _ in range(3)]
    all_close(found, [networks[i % 3].layers(text.split()) for i, text in enumerate(texts)])

    embed(original, *flags)
    found = [layers[-1] for layers in of_hdf5(target)]
    all_close(found[:3], [stored[i] for i in range(3)])
    far = [np.abs(found[i] - stored[i]).max() for i in range(3, 30)]
    assert min(far) > 1e-3, "a state of zeros is not the one that was carried"


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--layer=3",), r"--layer=3: all, top, or from 0 (the input layer) to 2"),
        (("--layer=tpo",), "--layer=tpo: all, top"),
        (("--mix=1,2",), "--mix=1,2: 3 numbers are needed: w0,w1,w2 or w0,w1,w2:gamma"),
        (("--mix=1,2,nan",), "--mix=1,2,nan: 3 numbers"),
        (("--mix=1,2,3:x",), "--mix=1,2,3:x: 3 numbers"),
        (("--mix=1,2,3", "--layer=1"), "--layer and --mix: one of them"),
        (("--pool=mean",), "--pool=mean: this model has a vector a word; allowed: words"),
        (("--rows=2",), "--rows=2: at least 1, and only with --stateful"),
        (("--rows=-2", "--stateful"), "--rows=-2: at least 1"),
        (("--to=out.csv",), "ends in .npz, .jsonl, .hdf5"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, elmo, embed):
    assert message in embed(elmo, "--text=a", *flags, code=2)


@pytest.mark.parametrize("flag", ["--mix=1,2,3", "--stateful", "--rows=2", "--blanks"])
def test_other_families_do_not_have_the_flags_of_words(flag, tmp_path):
    run = recipe.load(str(ROOT / "experiments/bert_base.py"), tiny=True)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    name = flag.partition("=")[0]
    with pytest.raises(ValueError, match=f"{name}: only models with a vector a word"):
        embed_by_flags(run, tmp_path, ["a"], None, parser.parse_args(["--text=a", flag]))
    with pytest.raises(ValueError, match="--layer=all: a number, or top"):
        embed_by_flags(run, tmp_path, ["a"], None, parser.parse_args(["--text=a", "--layer=all"]))


def test_a_file_of_another_families_vectors_has_no_layers(tmp_path):
    vectors_TD = np.arange(6, dtype=np.float32).reshape(2, 3)
    for single, wanted in ((False, vectors_TD), (True, vectors_TD[0])):
        target = tmp_path / f"{single}.hdf5"
        with writer(target, single=single) as write:
            write(Vectors(0, "a b", vectors_TD, ["a", "b"]))
        np.testing.assert_array_equal(of_hdf5(target)[0], wanted)


def test_what_fails_leaves_no_file(elmo, embed, tmp_path):
    source = tmp_path / "texts.txt"
    source.write_bytes(b"fine\n\xff\xfe\n")
    err = embed(elmo, f"--file={source}", f"--to={tmp_path}/out.hdf5", code=2)
    assert f"{source}:2: not valid UTF-8" in err
    source.write_bytes(b"\n")
    assert "no text to embed" in embed(
        elmo, f"--file={source}", f"--to={tmp_path}/out.hdf5", code=2
    )
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]
