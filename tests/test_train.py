# SPDX-License-Identifier: Apache-2.0
"""Whole runs: resumed after any stop, refused under another recipe, never waiting."""

import json
import random
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import lmjax, start, tiny, write_text

from lmjax import recipe, sharding
from lmjax.checkpoint import load_params
from lmjax.metrics import read_metrics
from lmjax.step import abstract_state

STEPS = ("--steps=24", "--save_every=4", "--evaluate_every=12")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    lmjax(*tiny(workdir, text, *STEPS))
    return workdir


def final_state(workdir: Path):
    """Every array of the newest checkpoint, by path, as numpy."""
    run = recipe.load("experiments/demo.py", tiny=True)
    with sharding.use(sharding.Layout().mesh(jax.devices()[:1])):
        state = abstract_state(run.model, run.optimiser())
        step, params = load_params(workdir, state.params)
    return step, {
        sharding.path_of(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


def deterministic(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"}
        for line in read_metrics(workdir)
    ]


def same_run(one: Path, other: Path) -> None:
    """Parameters, and the losses, gradient norms and rates of every step, are equal to the bit."""
    (step_1, params_1), (step_2, params_2) = final_state(one), final_state(other)
    assert step_1 == step_2 and params_1.keys() == params_2.keys()
    for path, value in params_1.items():
        assert np.array_equal(value, params_2[path]), path
    assert deterministic(one) == deterministic(other)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_run_ends_bit_equal_to_an_unbroken_one(seed, text, unbroken, tmp_path):
    draw = random.Random(seed)
    for _ in range(2):
        process = start(*tiny(tmp_path, text, *STEPS))
        # Into the middle of training, wherever this machine is by then.
        for line in process.stdout:
            if line.startswith("saved step"):
                time.sleep(draw.uniform(0, 0.1))
                break
        process.kill()
        process.communicate()
    out, _ = lmjax(*tiny(tmp_path, text, *STEPS))
    assert re.search(r"resumed at step \d+", out)
    same_run(unbroken, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_exits_0_and_the_run_goes_on(number, text, unbroken, tmp_path):
    process = start(*tiny(tmp_path, text, *STEPS))
    for line in process.stdout:
        if line.startswith("saved step 4"):
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    saved = int(re.findall(r"saved step (\d+)", rest)[-1])
    assert 4 < saved < 24 or "24" in rest
    lmjax(*tiny(tmp_path, text, *STEPS))
    params_1, params_2 = final_state(unbroken)[1], final_state(tmp_path)[1]
    assert all(np.array_equal(params_1[k], params_2[k]) for k in params_1)


def test_a_score_that_a_stop_left_out_is_made_when_the_run_goes_on(text, unbroken, tmp_path):
    """The last step before a stop is not scored: who stops a run is in a hurry."""
    lmjax(*tiny(tmp_path, text, *STEPS, "--until=12"))  # which scores; a signal would not have
    lines = deterministic(tmp_path)
    assert lines[-1]["step"] == 12 and "held_out_loss" in lines[-1]
    path = tmp_path / "metrics.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    kept[-1] = {k: v for k, v in kept[-1].items() if not k.startswith("held_out")}
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    lmjax(*tiny(tmp_path, text, *STEPS))
    same_run(unbroken, tmp_path)


def test_resuming_another_recipe_is_refused_with_the_difference(text, unbroken):
    for key, shown in (
        ("--optim.peak=0.5", "optim.peak: 0.002 → 0.5"),
        ("--model.depth=3", "model.depth: 2 → 3"),
        ("--data.examples.length=16", "data.examples.length: 32 → 16"),
        ("--batch=16", "batch: 8 → 16"),
    ):
        _, errors = lmjax(*tiny(unbroken, text, *STEPS, key), code=2)
        assert shown in errors and f"--allow={shown.split(':')[0]}" in errors


def test_named_change_and_free_change_are_allowed(text, tmp_path):
    lmjax(*tiny(tmp_path, text, "--steps=4", "--save_every=4"))
    more = ("--steps=6", "--optim.peak=0.001", "--allow=optim.peak")
    out, _ = lmjax(*tiny(tmp_path, text, *more))
    assert "steps 4 → 6" in out and "resumed at step 4" in out
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_second_writer_is_refused(text, unbroken, tmp_path):
    process = start(*tiny(tmp_path, text, "--steps=2000"))
    for line in process.stdout:
        if line.startswith("saved"):
            break
    _, errors = lmjax(*tiny(tmp_path, text, "--steps=2000"), code=2)
    process.kill()
    process.communicate()
    assert "is being written by another process (pid" in errors


def test_finished_run_is_left_as_it_is(text, unbroken):
    before = deterministic(unbroken)
    out, _ = lmjax(*tiny(unbroken, text, *STEPS))
    assert "finished" in out and deterministic(unbroken) == before


def test_records_are_complete(unbroken):
    lines = read_metrics(unbroken)
    assert [line["step"] for line in lines] == list(range(1, 25))
    wanted = {"loss", "learning_rate", "gradient_norm", "tokens", "tokens_per_second"}
    assert all(wanted <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [12, 24]
    assert (unbroken / "report.html").stat().st_size > 10_000
    assert list((unbroken / "tensorboard").iterdir())
    recorded = json.loads((unbroken / "recipe.json").read_text())
    assert recorded["run"]["steps"] == 24 and recorded["summary"]["parameters"] > 0
    environment = json.loads((unbroken / "environment.json").read_text())
    assert environment["devices"] == {"cpu": 1} and environment["jax"]


def test_mesh_shapes_see_the_same_losses(text, unbroken, tmp_path):
    for devices, mesh in ((8, "--mesh.fsdp=8"), (8, "--mesh.fsdp=2")):
        workdir = tmp_path / mesh[2:]
        tensor = "--mesh.tensor=2" if mesh.endswith("2") else "--mesh.tensor=1"
        check = "--check_every=8"  # a clean run raises no alarm, and computes the same
        out, _ = lmjax(*tiny(workdir, text, *STEPS, mesh, tensor, check), devices=devices)
        assert out.count(": computed twice, equal on 8 devices") == 3
        ours = [line["loss"] for line in read_metrics(workdir)]
        theirs = [line["loss"] for line in read_metrics(unbroken)]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
