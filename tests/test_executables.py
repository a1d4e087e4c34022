# SPDX-License-Identifier: Apache-2.0
"""Compiled steps in files: the flags that they depend on, and files that are not whole."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from commands import ROOT

from lmjax import executables
from lmjax.executables import TPU_FLAGS

STACKS, BARRIER = TPU_FLAGS

# --- flags ----------------------------------------------------------------------------------------

ASKS = """
import os, jax
from lmjax import executables
print(executables.here(jax.devices())["flags"]["LIBTPU_INIT_ARGS"])
print(os.environ.get("LIBTPU_INIT_ARGS", ""))
"""


def flags(given: str | None, head: str = "", **more: str) -> list[str]:
    """What a fresh process records, and what libtpu is told there."""
    env = {name: value for name, value in os.environ.items() if name != "LIBTPU_INIT_ARGS"}
    env |= {"JAX_PLATFORMS": "cpu", **more}
    if given is not None:
        env["LIBTPU_INIT_ARGS"] = given
    done = subprocess.run(
        [sys.executable, "-c", head + ASKS],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:2]


@pytest.mark.parametrize(
    "given",
    [
        None,
        "--xla_tpu_scoped_vmem_limit_kib=65536",
        STACKS,
        "--fibers_default_thread_stack_size=8388608 --a=1",
        "--xla_tpu_use_enhanced_launch_barrier=false",
    ],
)
def test_what_plan_records_is_what_train_asks_for(given):
    plans, told = flags(given, "from lmjax.plan import chips")
    trains, _ = flags(given)
    # JAX then does as it does where it finds a TPU, which adds a flag of its own.
    on_tpu, there = flags(given, JAX_FORCE_TPU_INIT="1")
    assert plans == trains == on_tpu
    assert "--xla_tpu_use_enhanced_launch_barrier=" in there
    # Each flag once, and as the user has it.
    names = [flag.partition("=")[0] for flag in told.split()]
    assert len(set(names)) == len(names) and {f.partition("=")[0] for f in TPU_FLAGS} <= {*names}
    assert {*(given or "").split()} <= {*told.split()}


def test_a_flag_that_may_change_the_program_is_recorded():
    other = "--xla_tpu_scoped_vmem_limit_kib=65536"
    assert flags(f"{STACKS} {other}")[0] == other
    off = "--xla_tpu_use_enhanced_launch_barrier=false"
    assert flags(f"{off} {STACKS}", "from lmjax.plan import chips")[0] == off


# --- files that are not whole ---------------------------------------------------------------------

ABOUT = {"batch": 8, "length": 16}
STATE, BATCH = {"weight": jnp.ones(3)}, {"tokens": jnp.ones(3)}


def step(state, batch):
    loss = (state["weight"] * batch["tokens"]).sum()
    return {"weight": state["weight"] + loss}, {"loss": loss, "norm": loss + 1}


@pytest.fixture
def saved(tmp_path) -> Path:
    """The file of a step that was compiled for the first device."""
    program = jax.jit(step).lower(STATE, BATCH).compile()
    return executables.save(program, tmp_path / "steps", ABOUT)


def load(path: Path, about: executables.About = ABOUT):
    return executables.load(path.parent, about, STATE, BATCH, jax.devices()[:1])


def edit(path: Path, **changes) -> None:
    """Changes a manifest; a key that is None goes."""
    manifest = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}), "utf-8")


def test_a_step_comes_back_as_it_was(saved):
    state, metrics = load(saved)(STATE, BATCH)
    assert float(metrics["loss"]) == 3 and float(metrics["norm"]) == 4
    assert state["weight"].tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": None},
        {"metrics": ["loss"]},
        {"metrics": ["loss", "other"]},
        {"metrics": ["loss", 3]},
        {"metrics": 3},
        {"about": None},
        {"about": [1]},
        {"sha256": None},
        {"sha256": 1},
    ],
    ids=str,
)
def test_a_manifest_that_is_not_whole_is_said_to_be_damaged(saved, changes):
    edit(saved.with_suffix(".json"), **changes)
    said = load(saved)
    assert isinstance(said, str) and re.search(rf"{saved.stem}\.(step|json) is damaged$", said)


@pytest.mark.parametrize("text", ["", "[]", "3", '"x"', "{", "[" * 100_000, "\x00"])
def test_a_manifest_that_is_none_is_said_to_be_damaged(saved, text):
    saved.with_suffix(".json").write_text(text, "utf-8")
    assert load(saved).endswith(f"{saved.stem}.json is damaged")


def test_a_program_that_is_not_there_is_said_to_be_damaged(saved):
    saved.unlink()
    assert load(saved).endswith(f"{saved.stem}.step is damaged (No such file or directory)")


def test_other_files_do_not_hide_a_step(saved):
    for name, text in (("package", "{}"), ("notes", "{"), ("list", "[]"), ("0" * 16, "{")):
        (saved.parent / f"{name}.json").write_text(text, "utf-8")
    assert not isinstance(load(saved), str)
    assert load(saved, {**ABOUT, "batch": 9}).endswith("is of batch 8; here it is 9")
    saved.unlink()
    saved.with_suffix(".json").unlink()
    assert load(saved).endswith(f"{'0' * 16}.json is damaged")
    (saved.parent / f"{'0' * 16}.json").unlink()
    assert load(saved) == f"{saved.parent} holds no compiled step"
