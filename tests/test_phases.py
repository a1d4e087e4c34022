# SPDX-License-Identifier: Apache-2.0
"""Two phases in one run: BERT's short sequences, then long ones, resumed in either."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, write_text

from lmjax import recipe, sharding
from lmjax.__main__ import main
from lmjax.batches import Plan, Ramp, Stage, host_batches
from lmjax.checkpoint import load_params
from lmjax.data import open_prepared
from lmjax.evaluator import Evaluator
from lmjax.metrics import read_metrics
from lmjax.run import Phase, describe, replace
from lmjax.sharding import Layout
from lmjax.step import abstract_params

BERT = "experiments/bert_base.py"
STEPS = ("--steps=20", "--phase2.share=0.5", "--save_every=4", "--evaluate_every=10")


def test_the_second_phase_counts_its_examples_from_zero_and_tokens_go_on():
    plan = Plan(6, 32, phase2=(10, 3, 128))
    assert plan.examples(9) == (54, 6) and plan.examples(10) == (0, 3)
    assert plan.examples(12) == (6, 3)
    assert [plan.stage(s).phase for s in (0, 9, 10, 99)] == [0, 0, 1, 1]
    assert plan.tokens_after(10) == 10 * 6 * 32
    assert plan.tokens_after(12) == 10 * 6 * 32 + 2 * 3 * 128
    steps = np.arange(14)
    traced = jax.jit(jax.vmap(plan.tokens_after))(jnp.asarray(steps))
    assert traced.tolist() == [plan.tokens_after(int(s)) for s in steps]


def test_a_ramp_ends_where_the_second_phase_begins():
    ramp = Ramp(start=2, increment=2, tokens=1000)
    plan = Plan(6, 10, ramp, phase2=(30, 4, 20))
    assert [stage.size for stage in plan.stages] == [2, 4, 4]
    assert plan.stages[-1] == Stage(30, 4, 20, 1, 0, plan.tokens_after(30))


def test_each_phase_reads_its_own_maker():
    makers = [lambda i: {"x": i}, lambda i: {"x": -i}]
    got = [b["x"].tolist() for b in host_batches(makers, Plan(2, 1, phase2=(2, 3, 1)), 0, 4)]
    assert got == [[0, 1], [2, 3], [0, -1, -2], [-3, -4, -5]]


def test_microbatches_of_each_phase_must_divide_its_batch():
    with sharding.use(Layout(2, 2, 2).mesh()):
        plan = Plan(8, 1, phase2=(5, 12, 1))
        plan.check(2, 3)
        with pytest.raises(ValueError, match="batch=12 .*accumulate=2.*multiple of 8"):
            plan.check(2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, "phase2.share=0.0"),
        ({"share": 1.0}, "phase2.share=1.0"),
        ({"batch": -1}, "phase2.batch=-1"),
    ],
)
def test_a_phase_of_no_sense_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Phase(**{"share": 0.1, "examples": None, **changes})


def test_the_phase_begins_where_the_steps_say_and_must_fit_the_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    run = recipe.load(BERT)
    plan = run.plan()
    assert plan.stages[-1].first_step == 900_000 and plan.stages[-1].example_tokens == 512
    assert plan.stages[-1].size == 256  # the paper keeps 256 sequences at both lengths
    summary = describe(run)
    assert summary["phase2_first_step"] == 900_000
    assert summary["tokens"] == 256 * (900_000 * 128 + 100_000 * 512)
    assert replace(run, steps=1000).plan().stages[-1].first_step == 900
    with pytest.raises(ValueError, match="phase2.examples.length=1024 is longer"):
        recipe.override(run, [("phase2.examples.length", "1024")])


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def train(monkeypatch, text):
    monkeypatch.chdir(ROOT)

    def train(workdir: Path, *keys: str) -> list[dict]:
        corpus = f"--data.corpus=files:{text}"
        place = (f"--workdir={workdir}", corpus, "--mesh.data=1", "--mesh.fsdp=8")
        assert main(["train", BERT, "--tiny", *place, *STEPS, *keys]) == 0
        return [
            {k: v for k, v in line.items() if k != "tokens_per_second"}
            for line in read_metrics(workdir)
        ]

    return train


def stop_after(step: int, monkeypatch) -> None:
    """As a signal after that step would."""
    from lmjax import train as training

    whole = training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: whole(*a, **{**k, "stop_at": step}))


@pytest.mark.parametrize("step", [6, 10, 15])
def test_a_run_that_stops_in_either_phase_ends_as_an_unbroken_one(
    step: int, train, tmp_path, monkeypatch, text
):
    unbroken = train(tmp_path / "unbroken")
    assert [line["step"] for line in unbroken] == list(range(1, 21))
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        assert train(tmp_path / "broken")[-1]["step"] == step
    lines = train(tmp_path / "broken")
    # Where it stopped it was scored as well: that line alone has more to say.
    for one, other in zip(unbroken, lines, strict=True):
        assert one == {k: other[k] for k in one}
    run = recipe.load(BERT, tiny=True)
    with sharding.use(Layout(1, 8, 1).mesh()):
        states = [
            load_params(tmp_path / name, abstract_params(run.model))
            for name in ("unbroken", "broken")
        ]
    for x, y in zip(*(jax.tree.leaves(params) for _, params in states), strict=True):
        assert np.array_equal(x, y)


def test_scores_are_of_the_phase_that_is_asked_for(train, tmp_path):
    train(tmp_path)
    run = recipe.load(BERT, tiny=True)
    prepared = open_prepared(tmp_path / "data")
    with sharding.use(Layout().mesh()):
        lengths = [Evaluator(run, prepared, "validation", phase=p).length for p in (0, 1)]
    assert lengths == [32, 64]
    smaller = recipe.override(run, [("phase2.batch", "8")])
    with sharding.use(Layout().mesh()):
        rows = [Evaluator(smaller, prepared, "validation", phase=p).rows for p in (0, 1)]
    assert rows == [16, 8]
