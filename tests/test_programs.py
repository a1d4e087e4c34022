# SPDX-License-Identifier: Apache-2.0
"""Compiled steps: when they are compiled, where they are kept, and who may bring them along."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from commands import DEMO, ROOT, environment, lmjax, tiny, write_text
from jax.experimental.compilation_cache import compilation_cache

from lmjax import compilation, executables, programs, recipe, sharding
from lmjax.__main__ import main
from lmjax.batches import Ramp
from lmjax.examples.windows import Windows
from lmjax.metrics import read_metrics
from lmjax.plan import chips
from lmjax.run import Run, replace
from lmjax.sharding import Layout
from lmjax.step import abstract_state
from lmjax.text import Files
from lmjax.train import Recorder, train

SMALL = ("--model.depth=1", "--model.width=32", "--model.heads=2")
needs_compiler = pytest.mark.skipif(not chips.installed(), reason=chips.MISSING)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"))


def small(text: Path, **changes) -> Run:
    run = recipe.load(str(ROOT / DEMO), tiny=True)
    run = replace(run, data=replace(run.data, corpus=Files(str(text)), examples=Windows(length=16)))
    model = run.model.clone(depth=1, width=32, heads=2)
    return replace(
        run, **{"model": model, "batch": 8, "accumulate": 1, "evaluate_every": 0, **changes}
    )


# --- when a step is compiled ----------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
    """What XLA compiles or takes from its cache, by name, and the steps that are told, in order."""
    seen: list[str | int] = []

    def hear(event: str, _: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(about["fun_name"])

    whole = Recorder.step

    def step(self, number, *rest, **more) -> None:
        seen.append(number)
        whole(self, number, *rest, **more)

    monkeypatch.setattr(Recorder, "step", step)
    jax.monitoring.register_event_duration_secs_listener(hear)
    yield seen
    jax.monitoring.unregister_event_duration_listener(hear)


STEP = "jit(train_step)"


def test_a_ramp_compiles_once_a_size_and_says_so(text, tmp_path, capsys, compilations):
    ramp = Ramp(start=8, increment=8, tokens=8 * 48)  # 3 steps of 8, then 16
    run = small(text, batch=16, ramp=ramp, steps=7, mesh=Layout(8, 1, 1), log_every=1)
    assert [stage.first_step for stage in run.plan().stages] == [0, 3]
    train(run, tmp_path / "run", {"name": "ramp", "description": ""})

    first, second = (i for i, seen in enumerate(compilations) if seen == STEP)
    # A step is told once the next one is on its way. Nothing else is compiled within a stage; what
    # is after it is the validation's.
    assert compilations[first + 1 : second] == [1, 2]
    assert compilations[second + 1 :][:4] == [3, 4, 5, 6]

    said = [line for line in capsys.readouterr().out.split("\n") if line.startswith("batch ")]
    how = r"(compiled the step|the step came from the compilation cache) in \d+\.\d s"
    forms = [
        rf"batch 8 × 16: {how}",
        r"batch 16 × 16 from step 4: compiling",
        rf"batch 16 × 16: {how}",
    ]
    assert len(said) == len(forms)
    assert all(re.fullmatch(form, line) for form, line in zip(forms, said, strict=True)), said


def test_phases_of_one_shape_share_a_program():
    run = recipe.load(str(ROOT / "experiments" / "bert_base.py"), tiny=True)
    short, long = run.plan().stages
    assert programs._shape(run, short) != programs._shape(run, long)
    assert run.phase2 is not None
    same = replace(run, phase2=replace(run.phase2, examples=run.data.examples))
    short, long = same.plan().stages
    assert programs._shape(same, short) == programs._shape(same, long)
    parts = replace(same, phase2=replace(same.phase2, accumulate=2))
    assert programs._shape(parts, parts.plan().stages[1]) != programs._shape(same, long)


# --- the cache of the user ------------------------------------------------------------------------


def test_a_second_start_takes_the_step_from_the_cache(text, tmp_path):
    env = {name: x for name, x in environment().items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def said(name: str) -> str:
        command = tiny(tmp_path / name, text, "--steps=1", *SMALL)
        done = subprocess.run(
            [sys.executable, "-m", "lmjax", *command],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert re.search(r"batch 8 × 32: compiled the step in \d+\.\d s", said("first"))
    folder = tmp_path / "cache" / "lmjax" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.glob("*/jit_train_step-*"))
    assert re.search(r"the step came from the compilation cache in \d+\.\d s", said("second"))


@pytest.fixture
def asked(monkeypatch):
    """What JAX is told by `turn_on`, in place of telling it."""
    told: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", lambda key, value: told.update({key: value}))
    return told


def test_the_users_folder_and_switch_win(asked, tmp_path):
    mine = {"XDG_CACHE_HOME": str(tmp_path)}
    compilation.turn_on({**mine, "JAX_COMPILATION_CACHE_DIR": "/elsewhere"})
    compilation.turn_on({**mine, "LMJAX_COMPILATION_CACHE": "off"})
    assert not asked and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="LMJAX_COMPILATION_CACHE=no: on or off"):
        compilation.turn_on({**mine, "LMJAX_COMPILATION_CACHE": "no"})
    compilation.turn_on(mine)
    folder = Path(str(asked["jax_compilation_cache_dir"]))
    assert folder.parent == tmp_path / "lmjax" / "compiled"
    assert asked["jax_persistent_cache_min_compile_time_secs"] == 0.5


def test_a_folder_that_cannot_be_had_is_one_line_and_no_error(asked, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    compilation.turn_on({"XDG_CACHE_HOME": str(tmp_path / "file")})
    folder = tmp_path / "lmjax" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    compilation.turn_on({"XDG_CACHE_HOME": str(tmp_path)})
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    compilation.turn_on({"XDG_CACHE_HOME": str(tmp_path)})
    file, opened, other = capsys.readouterr().err.strip().split("\n")
    assert file.startswith("no compilation cache: ") and "file" in file
    assert opened == (
        f"no compilation cache: {folder} is open to other users (mode 777): chmod 700 it"
    )
    assert "belongs to another user" in other
    assert not asked


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    for age, name in enumerate(("new", "older", "oldest")):
        path = tmp_path / f"jit_{name}-cache"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    compilation._make_room(tmp_path, 200)
    assert {path.name for path in tmp_path.iterdir()} == {"jit_new-cache", "jit_older-cache"}


@pytest.fixture
def cache(tmp_path):
    """JAX's cache in a folder of the test's, for every program."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled() -> compilation.Compiled:
    def cube(x):
        return x * x * x

    return compilation.compiled(lambda: jax.jit(cube).lower(jnp.float32(3)))


def test_a_damaged_entry_is_compiled_again_and_replaced(cache):
    assert not compiled().cached and compiled().cached
    (path,) = cache.glob("jit_cube-*-cache")
    path.write_bytes(path.read_bytes()[:20])  # as a kill or a full disk leaves it
    again = compiled()
    assert not again.cached and float(again.program(jnp.float32(3))) == 27
    assert not compiled().cached and compiled().cached


def test_a_disk_that_takes_no_more_is_a_warning(cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.warns(UserWarning, match="Error writing persistent compilation cache entry"):
            done = compiled()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert float(done.program(jnp.float32(2))) == 8


# --- steps that are brought along -----------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(text, tmp_path_factory) -> tuple[Run, Path]:
    """A run, and the folder of its compiled steps for the devices at hand."""
    run = small(text, steps=3, mesh=Layout(4, 2, 1), log_every=1)
    folder = tmp_path_factory.mktemp("steps") / "saved"
    with sharding.use(run.mesh.mesh()):
        (path,) = programs.save(run, folder, lambda _: None)
    assert path.parent == folder and folder.stat().st_mode & 0o777 == 0o700
    return run, folder


def losses(run: Run, workdir: Path, compiled: Path | None) -> list[float]:
    train(run, workdir, {"name": "run", "description": ""}, compiled=compiled)
    return [line["loss"] for line in read_metrics(workdir)]


def test_a_saved_step_trains_as_the_compiled_one(saved, tmp_path, capsys, compilations):
    run, folder = saved
    brought = losses(run, tmp_path / "brought", folder)
    assert f"batch 8 × 16: the step was compiled before, in {folder}" in capsys.readouterr().out
    assert STEP not in compilations
    assert losses(run, tmp_path / "compiled", None) == brought and len(brought) == 3
    assert STEP in compilations

    other = replace(run, seed=1)
    assert losses(other, tmp_path / "other", folder) != brought
    out = capsys.readouterr().out
    assert re.search(r"compiling anew: \S+\.step is of recipe.seed 0; here it is 1\n", out)


def refusal(run: Run, folder: Path, **changes) -> str:
    """Why a step is not loaded for `run` with something of what it depends on changed."""
    with sharding.use(run.mesh.mesh()) as mesh:
        (stage,) = run.plan().stages
        about = programs._about(run, stage)
        for key, value in changes.items():
            part, _, name = key.partition("__")
            about[part] = {**about[part], name: value} if name else value
        state = abstract_state(run.model, run.optimiser(), run.batch)
        batch = programs.batch_shapes(run, 0, run.batch)
        found = executables.load(folder, about, state, batch, list(mesh.devices.flat))
    return found if isinstance(found, str) else ""


def test_a_step_is_loaded_only_where_everything_agrees(saved, tmp_path):
    run, folder = saved
    assert refusal(run, folder) == ""
    for key, value, words in [
        ("versions__jax", "0.0.1", f"jax {jax.__version__}; here it is 0.0.1"),
        ("versions__libtpu", "9", "is of libtpu "),
        ("source", "0", "other source code of lmjax"),
        ("flags__XLA_FLAGS", "", "flags.XLA_FLAGS --xla.*; here it is none"),
        ("devices__kind", "TPU v4", "devices.kind cpu; here it is TPU v4"),
        ("devices__order", [[0]], "the same devices in another order"),
        ("batch", 16, "batch 8; here it is 16"),
    ]:
        assert re.search(words, refusal(run, folder, **{key: value})), key
    assert "mesh.data 4; here it is 8" in refusal(replace(run, mesh=Layout(8, 1, 1)), folder)
    other = replace(run, optim=replace(run.optim, peak=0.5))
    assert "here it is 0.5" in refusal(other, folder)
    # What the step does not know of may differ.
    assert refusal(replace(run, save_every=7, keep=9, workers=3), folder) == ""

    (tmp_path / "empty").mkdir(mode=0o700)
    assert refusal(run, tmp_path / "empty").endswith("holds no compiled step")
    assert "cannot be read" in refusal(run, tmp_path / "absent")


def test_a_step_is_loaded_only_from_a_private_folder_and_whole(saved, monkeypatch):
    run, folder = saved
    folder.chmod(0o750)
    try:
        assert "is open to other users (mode 750): chmod 700 it" in refusal(run, folder)
        with pytest.raises(ValueError, match="is open to other users"):
            executables.save(None, folder, {})
    finally:
        folder.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12_345)
        assert "belongs to another user" in refusal(run, folder)

    (path,) = folder.glob("*.step")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert refusal(run, folder).endswith(".step is damaged")
    path.write_bytes(whole)
    (manifest,) = folder.glob("*.json")
    words = manifest.read_text("utf-8")
    manifest.write_text("{", "utf-8")
    assert refusal(run, folder).endswith(".json is damaged")
    manifest.write_text(words, "utf-8")
    assert refusal(run, folder) == ""


PLAN = ("plan", str(ROOT / DEMO), "--tiny")


@needs_compiler
def test_plan_finds_what_is_wrong_before_it_makes_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, flags in {
        "v5e has two dimensions": ("--topology=v5e:1x1,v5e:4x4x4",),
        "mesh data=3×.* does not fit 1 devices": ("--topology=v5e:1x1", "--mesh.data=3"),
        "batch=3 cannot be split over 4 devices": ("--topology=v5e:2x2", "--batch=3"),
        "without --search": ("--topology=v5e:1x1", "--search"),
    }.items():
        assert main((*PLAN, *flags, "--save=new")) == 2
        assert re.search(words, capsys.readouterr().err), words
        assert not list(tmp_path.iterdir())
    Path("open").mkdir(mode=0o750)
    assert main((*PLAN, "--topology=v5e:1x1", "--save=open")) == 2
    assert "is open to other users" in capsys.readouterr().err


def test_plan_saves_into_a_folder_of_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for typed, words in (("gs://bucket/x", "mount the bucket"), ("", "name a folder")):
        assert main((*PLAN, "--topology=v5e:1x1", f"--save={typed}")) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_compiler
@pytest.mark.slow
def test_a_step_for_tpus_is_saved_by_plan_and_refused_elsewhere(text, tmp_path):
    folder = tmp_path / "steps"
    keys = ("--batch=8", "--accumulate=1", *SMALL, "--steps=2")
    lmjax("plan", DEMO, "--tiny", *keys, "--topology=v5e:2x2", "--quick", f"--save={folder}")
    (path,) = folder.glob("*.step")
    about = json.loads(path.with_suffix(".json").read_text("utf-8"))["about"]
    assert about["devices"]["kind"] == "TPU v5 lite" and about["devices"]["count"] == 4
    assert about["mesh"]["data"] == 4 and path.stat().st_size > 100_000
    out, _ = lmjax(*tiny(tmp_path / "run", text, *keys, f"--compiled={folder}"), devices=4)
    assert "devices.kind TPU v5 lite; here it is cpu" in out
    assert "compiled the step in" in out or "from the compilation cache" in out
