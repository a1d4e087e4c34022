# SPDX-License-Identifier: Apache-2.0
"""What a step saw is what its batch is made of, for every kind of example."""

import numpy as np
import pytest
from commands import ROOT

from lmjax import recipe
from lmjax.__main__ import main
from lmjax.run import Run
from lmjax.seen import documents_seen

CORPUS = "\n".join(
    " ".join(f"{word}{n} runs and walks. The {word} sees {n} birds." for word in ("cat", "dog"))
    for n in range(40)
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """For each family, its toy recipe and its data."""
    found = {}
    for name in ("demo", "bert_base", "roberta_base", "elmo"):
        folder = tmp_path_factory.mktemp(name)
        (folder / "text.txt").write_text(CORPUS * 3)
        run: Run = recipe.load(str(ROOT / f"experiments/{name}.py"), tiny=True)
        run = recipe.override(run, [("data.corpus", f"files:{folder}/text.txt")])
        found[name] = run, run.data.prepare(folder, say=lambda line: None), folder
    return found


def batch_of(run: Run, split, step: int) -> dict[str, np.ndarray]:
    plan = run.plan()
    maker = run.makers()[plan.stage(step - 1).phase]
    return maker.train(split, run.seed, plan.indices(step - 1))


def tokens_named(split, row: dict) -> list[int]:
    """The ids that a row's documents have at the places that are named."""
    ids, found = split.document_ids(), []
    for part in row["documents"]:
        start = split.starts[ids.index(part["document"])]
        found += split.tokens[start + part["from"] : start + part["to"]].tolist()
    return found


@pytest.mark.parametrize("step", [1, 5])
def test_windows_are_the_tokens_that_are_named(prepared, step):
    run, data, _ = prepared["demo"]
    split = data.store.splits["train"]
    seen, batch = documents_seen(run, data, step), batch_of(run, split, step)
    assert len(seen["rows"]) == len(batch["tokens_BL"]) and seen["batches"] == [step, step + 1]
    for row, inputs, targets in zip(
        seen["rows"], batch["tokens_BL"], batch["targets_BL"], strict=True
    ):
        assert tokens_named(split, row) == [*inputs.tolist(), int(targets[-1])]


@pytest.mark.parametrize("name", ["bert_base", "roberta_base"])
def test_rows_are_made_of_the_tokens_that_are_named(prepared, name):
    run, data, _ = prepared[name]
    split = data.store.splits["train"]
    for step in (1, run.steps):  # both phases, where there are two
        seen, batch = documents_seen(run, data, step), batch_of(run, split, step)
        controls = set(split.controls.values())
        for r, row in enumerate(seen["rows"]):
            whole = batch["tokens_BL"][r].copy()  # with the words that are masked
            count = int(batch["weights_BP"][r].sum())
            whole[batch["masked_BP"][r, :count]] = batch["targets_BP"][r, :count]
            text = [int(t) for t in whole if int(t) not in controls]
            assert text == [t for t in tokens_named(split, row) if t not in controls] and text


def test_streams_are_made_of_the_words_that_are_named(prepared):
    run, data, _ = prepared["elmo"]
    split = data.store.splits["train"]
    seen, batch = documents_seen(run, data, 3), batch_of(run, split, 3)
    words = data.tokenizer.words
    for r, row in enumerate(seen["rows"]):
        named = set(tokens_named(split, row))
        targets = {int(t) for t in batch["targets_BXL"][r, 0] if t > 2}  # but marks and unknown
        assert targets and targets <= named
        read = batch["targets_BXL"][r].size
        assert sum(t < words + 256 for t in tokens_named(split, row)) <= read  # and no others


def test_skipped_batches_move_what_a_step_saw(prepared):
    run, data, _ = prepared["demo"]
    skipping = recipe.override(run, [("skip_batches", "3:5")])
    one, other = documents_seen(run, data, 7), documents_seen(skipping, data, 5)
    assert one["rows"] == other["rows"] and other["batches"] == [7, 8]


def test_a_step_that_the_run_has_not_is_refused(tmp_path, capsys):
    run = recipe.load(str(ROOT / "experiments/demo.py"), tiny=True)
    content = {"run": recipe.to_json(run)}
    (tmp_path / "recipe.json").write_text(recipe.dump(content))
    for step in ("0", str(run.steps + 1)):
        command = ["batch", str(ROOT / "experiments/demo.py"), "--tiny", f"--workdir={tmp_path}"]
        assert main([*command, step]) == 2
        assert f"step {step}: the run has steps 1 to {run.steps}" in capsys.readouterr().err
    assert main([*command, "1"]) == 2  # its data is not there
    assert "error: " in capsys.readouterr().err
