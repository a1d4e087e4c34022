# SPDX-License-Identifier: Apache-2.0
"""ELMo from the command line: killed and resumed with its carried state, scored alike anywhere."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import lmjax, start, write_text

from lmjax import recipe, sharding
from lmjax.checkpoint import Checkpoints
from lmjax.metrics import read_metrics
from lmjax.step import abstract_state

ELMO = "experiments/elmo.py"
TOY = Path(__file__).parents[2] / "shared" / "data" / "fixtures" / "elmo_bilm" / "train"
STEPS = ("--steps=24", "--save_every=4", "--data.examples.shuffle=documents")


def train(workdir: Path, text: Path) -> tuple[str, ...]:
    return ("train", ELMO, "--tiny", f"--workdir={workdir}", f"--data.corpus=files:{text}", *STEPS)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    lmjax(*train(workdir, text))
    return workdir


def state_of(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint by path: parameters, optimiser, and what is carried."""
    run = recipe.load(ELMO, tiny=True)
    with sharding.use(sharding.Layout().mesh(jax.devices()[:1])):
        wanted = abstract_state(run.model, run.optimiser(), run.batch)
        recorded = json.loads((workdir / "recipe.json").read_text("utf-8"))
        checkpoints = Checkpoints(workdir, recorded, run.keep, print)
        state = checkpoints.restore(wanted)
        checkpoints.close()
    return {
        sharding.path_of(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def test_a_killed_run_ends_bit_equal_with_the_state_that_it_carries(text, unbroken, tmp_path):
    process = start(*train(tmp_path, text))
    for line in process.stdout:
        if line.startswith("saved step 8"):
            break
    process.kill()
    process.communicate()
    out, _ = lmjax(*train(tmp_path, text))
    assert re.search(r"resumed at step (8|12|16|20)", out), out
    whole, resumed = state_of(unbroken), state_of(tmp_path)
    assert whole.keys() == resumed.keys() and whole["step"] == 24
    assert np.abs(whole["carry/cell_BXNH"]).max() > 0.01
    for path, value in whole.items():
        assert np.array_equal(value, resumed[path]), path
    losses = [[line["loss"] for line in read_metrics(w)] for w in (unbroken, tmp_path)]
    assert losses[0] == losses[1]


def test_scores_depend_on_neither_batch_nor_devices(unbroken):
    found = []
    for keys, devices in (((), 1), (("--batch=24",), 1), (("--batch=16",), 8)):
        lmjax("evaluate", ELMO, "--tiny", f"--workdir={unbroken}", *keys, devices=devices)
        found.append(json.loads((unbroken / "evaluation-test.json").read_text("utf-8")))
    first = found[0]
    for other in found[1:]:
        for name in ("loss", "forward_loss", "backward_loss", "bits_per_byte", "words"):
            assert other[name] == pytest.approx(first[name], rel=1e-5), name
    assert first["forward_loss"] != first["backward_loss"]
    assert first["loss"] == pytest.approx((first["forward_loss"] + first["backward_loss"]) / 2)
    assert first["perplexity"] == pytest.approx(np.exp(first["loss"]))
    bits = first["forward_loss"] * first["words"] / np.log(2) + first["spelling_bits"]
    assert first["forward_bits_per_byte"] == pytest.approx(bits / first["bytes"])


def test_a_second_phase_is_refused():
    run = recipe.load(ELMO, tiny=True)
    from lmjax.run import Phase, replace

    with pytest.raises(ValueError, match="phase2: a model that carries its state has one phase"):
        replace(run, phase2=Phase(0.1, run.data.examples))


@pytest.mark.slow
@pytest.mark.skipif(not TOY.is_dir(), reason=f"{TOY} is not here")
def test_fifty_epochs_of_the_originals_toy_text_bring_its_perplexity_below_twenty(tmp_path):
    for name in ("learnt", "scored"):
        (tmp_path / f"{name}.txt").write_bytes((TOY / "data.txt").read_bytes())
    words = (TOY / "data.txt").read_text().split()
    batch, length = 2, 10
    run = (
        ELMO, "--tiny", f"--workdir={tmp_path / 'run'}", f"--data.corpus=files:{tmp_path}/*.txt",
        "--data.corpus.document=file", "--data.held_out=scored.txt", "--data.test=0",
        "--data.tokenizer.split=blanks",
        f"--data.tokenizer.path={TOY / 'vocab.txt'}", f"--data.examples.length={length}",
        f"--batch={batch}", f"--steps={50 * (len(words) + 5) // (batch * length)}",
        "--model.negatives=0", "--model.dropout=0",
    )  # fmt: skip
    lmjax("train", *run)
    lmjax("evaluate", *run[:3], "--split=validation")
    scores = json.loads((tmp_path / "run" / "evaluation-validation.json").read_text("utf-8"))
    assert scores["words"] == len(words) + 5
    assert scores["perplexity"] < 20
