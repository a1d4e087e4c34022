# SPDX-License-Identifier: Apache-2.0
"""What every file in experiments/ promises: its size, its lab note, its layout, its first losses.

tests/golden/losses.json holds the first, middle and last training loss of each `tiny`, in float32
on one CPU device. After a change that is meant to move them, print new ones:

    PYTHONPATH=. .venv/bin/python tests/test_contracts.py > tests/golden/losses.json
"""

import ast
import contextlib
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import ROOT, write_text

from lmjax import recipe, sharding
from lmjax.__main__ import main
from lmjax.data import open_prepared
from lmjax.metrics import read_metrics
from lmjax.sharding import Layout, path_of
from lmjax.step import abstract_state

FILES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
GOLDEN = ROOT / "tests" / "golden" / "losses.json"
ENCODERS = ("bert", "roberta", "albert", "electra", "ernie")
# Of the papers' sizes: GPT-1's release, GPT-2's four, and GPT-3 Small with its 2,048 positions;
# encoders with their heads, ELECTRA with its generator.
PARAMETERS = {
    "bert_tiny": 4_433_468,
    "bert_mini": 11_267_900,
    "bert_mini_cpu": 11_267_900 - (30_522 - 8192) * 257,
    "bert_small": 29_058_876,
    "bert_medium": 41_668_412,
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    "roberta_base": 124_697_433,
    "albert_base": 11_683_584 + 1_538 + 128_688,
    "electra_small": 13_549_057 + 647_162,
    "ernie_base": 100_477_778,
    "elmo": 93_600_848 + 407_050_623,
    "elmo_small": 13_593_296 + 793_471 * 129,
    "elmo_cpu": 13_593_296 + 10_000 * 129,
    "elmo_medium": 28_027_728 + 793_471 * 257,
    "elmo_zh": 18_907_136 + 12_288 * 257,
    "gpt1": 116_534_784,
    "gpt2_small": 124_439_808,
    "gpt2_small_hd128": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "gpt3_small": 125_226_240,
}
TOKENS_PER_STEP = {
    "gpt1": 64 * 512,
    "gpt3_small": 2**19,
    "roberta_base": 2048 * 512,
    "albert_base": 4096 * 512,
    "electra_small": 128 * 128,
    "ernie_base": 256 * 512,
    **dict.fromkeys((f for f in FILES if f.startswith("elmo")), 3 * 128 * 20),
    **dict.fromkeys((f for f in FILES if f.startswith("bert")), 256 * 128),
    "bert_mini_cpu": 16 * 128,
    "elmo_cpu": 16 * 20,
}  # GPT-2: the open recipe's 480 × 1,024
SOURCE = {
    "bert_base": "Devlin et al. 2018",
    "bert_large": "Devlin et al. 2018",
    **{
        f"bert_{size}": "Turc et al. 2019"
        for size in ("tiny", "mini", "mini_cpu", "small", "medium")
    },
    "roberta_base": "Liu et al. 2019",
    "albert_base": "Lan et al. 2019",
    "electra_small": "Clark et al. 2020",
    "ernie_base": "Sun et al. 2019",
    "elmo": "Peters et al. 2018",
    "elmo_small": "elmo.py",
    "elmo_medium": "elmo.py",
    "elmo_cpu": "elmo_small.py",
    "elmo_zh": "elmo_medium.py",
    "gpt1": "Radford et al. 2018",
    "gpt3_small": "Brown et al. 2020",
    "shakespeare_char": "Karpathy 2022",
    "demo": "documentation of the running Python",
}


def file_of(name: str) -> str:
    return f"experiments/{name}.py"


every_file = pytest.mark.parametrize("name", FILES)


def different_toys() -> list[str]:
    """The files but for those that share their `tiny` with another: BERT's sizes."""
    toys: list[object] = []
    names = []
    for name in FILES:
        toy = recipe.load(str(ROOT / file_of(name)), tiny=True)
        if toy not in toys:
            toys.append(toy)
            names.append(name)
    return names


def run(*arguments: str) -> None:
    """One command, in this process."""
    assert main(arguments) == 0, arguments


# --- what it is and costs -------------------------------------------------------------------------


@every_file
def test_describe_counts_what_the_paper_has_and_allocates_nothing(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = sum(x.nbytes for x in jax.live_arrays())
    run("describe", file_of(name), "--json")
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1e6
    (line,) = capsys.readouterr().out.splitlines()
    summary = json.loads(line)
    recorded, model = summary["run"], summary["run"]["model"]
    length = recorded["data"]["examples"]["length"]
    assert summary["steps"] == recorded["steps"]
    assert summary["tokens_per_step"] == recorded["batch"] * length
    widest = max(summary["tokens_per_step"], summary.get("phase2_tokens_per_step", 0))
    assert 0 < summary["tokens"] <= summary["steps"] * widest
    assert summary["flops_per_token"] > 6 * model["depth"] * 12 * model["width"] ** 2
    if name in PARAMETERS:
        assert summary["parameters"] == PARAMETERS[name]
        assert summary["tokens_per_step"] == TOKENS_PER_STEP.get(name, 480 * 1024)


@pytest.mark.parametrize(
    ("name", "depth", "width", "length"),
    [
        ("gpt2_small", 12, 768, 1024),
        ("gpt2_small_hd128", 12, 768, 1024),
        ("gpt2_medium", 24, 1024, 1024),
        ("gpt2_large", 36, 1280, 1024),
        ("gpt2_xl", 48, 1600, 1024),
        ("gpt3_small", 12, 768, 2048),
    ],
)
def test_flops_are_six_a_parameter_and_the_attention_on_top(name, depth, width, length):
    """6 N + 12 L D T (Chowdhery et al. 2022, appendix B); no product touches the positions."""
    model = recipe.load(str(ROOT / file_of(name))).model
    multiplied = PARAMETERS[name] - length * width
    assert model.flops_per_token(length) == 6 * multiplied + 12 * depth * width * length


@every_file
def test_the_file_opens_with_a_lab_note(name):
    note = ast.get_docstring(ast.parse((ROOT / file_of(name)).read_text("utf-8")))
    assert note is not None
    assert SOURCE.get(name, "Radford et al. 2019") in note
    command = f"    python -m lmjax train {re.escape(file_of(name))} --workdir=\\S+"
    assert re.search(command, note), note
    outcome = r"[Nn]ot yet run|see benchmarks/|nats"
    assert name == "demo" or re.search(outcome, note), "what was measured?"


# --- how it rests on a mesh -----------------------------------------------------------------------


def resting(name: str, layout: Layout) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    """Every array of the state of the full recipe by path, as a shape that is placed."""
    full = recipe.load(str(ROOT / file_of(name)))
    with sharding.use(layout.mesh()):
        state = abstract_state(full.model, full.optimiser(), full.batch)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [(path_of(path), x) for path, x in leaves]


@every_file
def test_rules_cover_the_whole_state_on_three_axes(name):
    model = recipe.load(str(ROOT / file_of(name))).model
    heads = (getattr(model, "heads", 1), getattr(model, "generator_heads", 2))
    even = all(n % 2 == 0 for n in heads)
    state = resting(name, Layout(2, 2, 2) if even else Layout(2, 4, 1))
    if not name.startswith((*ENCODERS, "elmo")):
        assert sum(path.endswith("kernel") for path, _ in state) == 3 * 4  # with two moments
    for path, x in state:  # of what is multiplied with, a device holds a quarter
        # A class is a column, and the filters over characters are few.
        small = re.search(r"(pair|replaced|conv_\d)/kernel$", path)
        if path.endswith(("kernel", "embedding")) and not small:
            assert math.prod(x.sharding.shard_shape(x.shape)) * 4 == x.size, path


@every_file
def test_nothing_large_rests_whole_on_four_devices(name):
    state = resting(name, Layout(2, 4, 1))
    whole = {path: x.size * x.dtype.itemsize for path, x in state if x.sharding.is_fully_replicated}
    # A number a word stays whole, 3.2 MB for ELMo's 793,471 words; and in gpt2_xl the inner biases
    # of all 48 layers, 1.2 MB, which only `tensor` splits.
    meant = r"output_bias$" + (r"|up/bias$" if name == "gpt2_xl" else "")
    large = {path: size for path, size in whole.items() if size > 2**20}
    assert all(re.search(meant, path) for path in large), large
    assert max(large.values(), default=0) < 4 * 2**20
    # The filters over characters have one size, whatever the vocabulary of the words is.
    filters = re.compile(r"conv_\d/kernel$")
    vectors = [size for path, size in whole.items() if not filters.search(path)]
    assert sum(vectors) < 0.01 * sum(x.size * x.dtype.itemsize for _, x in state)


# --- what it learns -------------------------------------------------------------------------------


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Meshes of the first device only: what a plain CPU has, and the golden losses are of."""
    whole = Layout.mesh
    with pytest.MonkeyPatch.context() as patch:
        one = jax.devices()[:1]
        patch.setattr(Layout, "mesh", lambda layout, devices=None: whole(layout, one))
        patch.chdir(ROOT)
        yield


def train_tiny(name: str, workdir: Path, text: Path) -> list[dict]:
    """The records of 20 steps of the file's `tiny` on `text`."""
    corpus = f"--data.corpus=files:{text}"
    run("train", file_of(name), "--tiny", f"--workdir={workdir}", corpus, "--steps=20")
    return read_metrics(workdir)


def marks(lines: list[dict]) -> list[float]:
    """First, middle and last training loss."""
    return [round(lines[at]["loss"], 6) for at in (0, len(lines) // 2, -1)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"))


def check_layout(name: str, workdir: Path) -> None:
    """Batches hold what their makers say, which `plan` believes."""
    train = open_prepared(workdir / "data").store.splits["train"]
    for maker in recipe.load(file_of(name), tiny=True).makers():
        batch = maker.train(train, 0, np.arange(2))
        said = {key: ((2, *shape), np.dtype(kind)) for key, (shape, kind) in maker.arrays().items()}
        assert {key: (x.shape, x.dtype) for key, x in batch.items()} == said


TOYS = different_toys()


@pytest.mark.parametrize("name", TOYS)
def test_the_toy_learns_and_is_scored_and_sampled(name, text, tmp_path, capsys):
    with one_device():
        lines = train_tiny(name, tmp_path, text)
        wanted = json.loads(GOLDEN.read_text("utf-8"))[name]
        assert marks(lines) == pytest.approx(wanted, abs=2e-4)
        assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
        assert [line["step"] for line in lines] == list(range(1, 21))
        check_layout(name, tmp_path)

        place = ("--tiny", f"--workdir={tmp_path}")
        run("evaluate", file_of(name), *place, *(PSEUDO if name.startswith(ENCODERS) else ()))
        capsys.readouterr()
        (path,) = tmp_path.glob("evaluation-*.json")
        scores = json.loads(path.read_text("utf-8"))
        if name.startswith(ENCODERS):
            check_encoder(name, place, scores, capsys)
            return
        if name.startswith("elmo"):
            check_words(name, place, scores, capsys)
            return
        run("generate", file_of(name), *place, "--prompt=the cat", "--tokens=12", "--greedy")
    out = capsys.readouterr().out
    assert out.startswith("the cat") and len(out) > len("the cat\n")
    check_evaluation(scores, lines[-1])


PSEUDO = ("--pseudo=100000",)


def check_encoder(name: str, place: tuple[str, ...], scores: dict, capsys) -> None:
    """What an encoder is for: words for masks, vectors, and scores under names of their own."""
    run("fill", file_of(name), *place, "--text=the [MASK] sat on a mat", "--top=3", "--json")
    (words,) = json.loads(capsys.readouterr().out)["masks"]
    assert len(words) == 3 and sum(word["probability"] for word in words) <= 1
    assert words[0]["probability"] >= words[1]["probability"] > 0
    run("embed", file_of(name), *place, "--text=the cat sat", "--layer=1")
    assert len(json.loads(capsys.readouterr().out)["vector"]) == 32
    assert scores["step"] == 20 and scores["documents"] > 0 and scores["masked_count"] > 5
    assert scores["masked_perplexity"] == pytest.approx(math.exp(scores["masked_loss"]))
    assert scores["pseudo_exact"] and scores["pseudo_perplexity_error"] == 0
    nats = scores["pseudo_loss"] * scores["pseudo_tokens"]
    bits = nats / math.log(2) / scores["bytes"]
    assert scores["pseudo_bits_per_byte"] == pytest.approx(bits)
    assert ("pair_accuracy" in scores) == name.startswith(("bert", "albert", "ernie"))
    asked = {"albert_base": "SOP"}.get(name, "NSP") if "pair_accuracy" in scores else ""
    assert asked in scores.get("pair_question", "")
    assert ("replaced_auc" in scores) == name.startswith("electra")
    assert set(scores["comparable_with"]) <= set(scores)
    assert scores["baselines"]["unigram_masked_accuracy"] < 0.5


def check_words(name: str, place: tuple[str, ...], scores: dict, capsys) -> None:
    """What ELMo is for: two directions, scored apart, and vectors of words in their context."""
    assert scores["step"] == 20 and scores["documents"] > 0 and scores["words"] > 32
    losses = [scores["forward_loss"], scores["backward_loss"]]
    assert scores["perplexity"] == pytest.approx(math.exp(sum(losses) / 2))
    assert set(scores["comparable_with"]) <= set(scores)
    run("embed", file_of(name), *place, "--text=the cat sat", "--layer=1")
    vectors = json.loads(capsys.readouterr().out)["vectors"]
    assert len(vectors) == 3 and len(vectors[0]) == 2 * 16


def check_evaluation(scores: dict, last: dict) -> None:
    assert scores["step"] == 20 and scores["tokens"] > 32 and scores["documents"] > 0
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    # Held out, but of the same few words: what training ended with is near.
    assert scores["loss"] == pytest.approx(last["held_out_loss"], abs=0.5)
    bits = scores["bits_per_byte"]
    if bits is None:
        assert "baselines" not in scores
    else:
        nats = scores["loss"] * scores["tokens"]
        assert bits == pytest.approx(nats / math.log(2) / scores["bytes"])
        assert set(scores["baselines"]) == {"unigram_bits_per_byte", "xz_bits_per_byte"}


def test_golden_losses_are_of_the_toys_that_exist():
    assert sorted(json.loads(GOLDEN.read_text("utf-8"))) == TOYS


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        corpus = write_text(Path(folder))
        for stem in TOYS:
            with one_device():
                found[stem] = marks(train_tiny(stem, Path(folder, stem), corpus))
    print(json.dumps(found, indent=1))
