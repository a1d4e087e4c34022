# SPDX-License-Identifier: Apache-2.0
"""The commands as a person meets them: help that works, errors of one line, quiet Ctrl-C."""

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import DEMO, ROOT, lmjax, start, tiny, write_text

import lmjax.train as training
from lmjax import recipe
from lmjax.__main__ import _parse, main
from lmjax.batches import batches
from lmjax.metrics import read_metrics
from lmjax.sharding import Layout
from lmjax.verbs import VERBS


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"))


def refused(capsys, *arguments: str) -> str:
    """The one line of error of a command that is refused."""
    try:
        code = main(arguments)
    except SystemExit as exit:  # argparse's
        code = exit.code
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert code == 2 and out == "" and "Traceback" not in err
    assert err.rstrip("\n").endswith(line)
    return line


# --- what is typed --------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_parses(verb: str, capsys):
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    example = out.partition("example:\n")[2].splitlines()[0]
    program, words = shlex.split(example)[:3], shlex.split(example)[3:]
    assert program == ["python", "-m", "lmjax"] and words[0] == verb
    arguments, keys = _parse(words)
    assert arguments.verb == verb
    assert VERBS[verb].summary in out and VERBS[verb].example in out
    takes = VERBS[verb].of_experiment
    assert all((key in out) == takes for key in ("--tiny", "EXPERIMENT", "--steps=100"))
    if takes:
        assert (ROOT / words[1]).is_file()
        recipe.override(recipe.load(words[1], arguments.tiny), keys)


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())  # the terminal's width may cut lines
    assert exit.value.code == 0 and all(verb.summary in out for verb in VERBS.values())


MISTYPED = {
    "no verb": ([], "VERB"),
    "verb": (["trian", DEMO, "--workdir=x"], "'trian' (choose from"),
    "no experiment": (["train", "--workdir=x"], "EXPERIMENT"),
    "experiment": (
        ["train", "experiments/gpt2_smal.py", "--workdir=x"],
        "experiments/gpt2_smal.py: no such experiment file; did you mean experiments/gpt2_small.py",
    ),
    "flag": (["train", DEMO, "--wrokdir=x"], "required: --workdir"),
    "abbreviated flag": (["train", DEMO, "--work=x"], "required: --workdir"),
    "flag of a verb": (["train", DEMO, "--workdir=x", "--alow=k"], "did you mean --allow?"),
    "flag like a key": (["generate", DEMO, "--workdir=x", "--token=5"], "did you mean --tokens?"),
    "number of a flag": (["generate", DEMO, "--workdir=x", "--tokens=few"], "'few'"),
    "key": (["describe", DEMO, "--bach=3"], "unknown key --bach; did you mean --batch?"),
    "key inside": (["describe", DEMO, "--model.dept=3"], "did you mean --model.depth?"),
    "key elsewhere": (["describe", DEMO, "--depth=3"], "did you mean --model.depth?"),
    "number": (["describe", DEMO, "--steps=many"], "--steps=many: a whole number is needed"),
    "no value": (["describe", DEMO, "--steps"], "--steps needs a value: --steps=…"),
    "value forgotten": (["describe", DEMO, "--steps", "--batch=8"], "--steps needs a value"),
    "stray word": (["describe", DEMO, "steps=3"], "unexpected argument 'steps=3'"),
    "choice": (["describe", DEMO, "--model.norm=past"], "allowed are pre, post; did you mean post"),
    "corpus": (["describe", DEMO, "--data.corpus=flies:a"], "did you mean 'files:GLOB'?"),
    "impossible": (["describe", DEMO, "--batch=0"], "batch=0: must be at least 1"),
    "no run": (["evaluate", DEMO, "--workdir=nowhere"], "nowhere/recipe.json does not exist"),
}


@pytest.mark.parametrize("case", MISTYPED)
def test_what_is_mistyped_is_one_line_of_error(case: str, capsys):
    words, says = MISTYPED[case]
    assert says in refused(capsys, *words)


def test_a_wrong_key_ends_a_process_with_code_2():
    out, err = lmjax("describe", DEMO, "--bach=3", code=2)
    assert out == "" and err.count("\n") == 1


def test_tiny_is_the_toy_and_keys_apply_to_it(capsys):
    summaries = []
    for words in ((), ("--tiny",), ("--tiny", "--steps", "7"), ("--steps=7", "--tiny")):
        assert main(["describe", DEMO, "--json", *words]) == 0
        summaries.append(json.loads(capsys.readouterr().out))
    full, toy, *seven = summaries
    assert full["run"]["model"]["width"] == 128 and toy["run"]["model"]["width"] == 32
    assert full["steps"] == 1200 and toy["steps"] == 20
    assert seven == [seven[0]] * 2 and seven[0]["run"] == {**toy["run"], "steps": 7}


# --- Ctrl-C ---------------------------------------------------------------------------------------


def interrupt(process: subprocess.Popen[str]) -> str:
    """Sends SIGINT: 130 and no traceback, or 0 where training says that it saves first."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err and "Exception" not in err, err
    assert process.returncode == (0 if "SIGINT: saving" in out else 130), err
    return out


def until(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("library", "seconds"), [("numpy", 0), ("jaxlib", 0), ("jaxlib", 0.4)])
def test_interrupted_while_importing(library: str, seconds: float, text, tmp_path):
    """Interrupted inside a library's C code, an import may end as any error, or crash."""
    process = start(*tiny(tmp_path, text, "--steps=5000"))
    until(lambda: f"site-packages/{library}/" in Path(f"/proc/{process.pid}/maps").read_text())
    time.sleep(seconds)
    interrupt(process)


def test_interrupted_while_tokenising(tmp_path):
    text = tmp_path / "long.txt"
    lines = (np.random.default_rng(0).integers(0, 10**6, 12).tolist() for _ in range(60_000))
    text.write_text("\n".join(" ".join(map(str, line)) for line in lines))
    process = start(*tiny(tmp_path / "run", text))
    until(lambda: list((tmp_path / "run").glob(".data.building-*")))
    time.sleep(0.3)
    interrupt(process)
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_interrupted_while_compiling(seconds: float, text, tmp_path, monkeypatch):
    """The compiler is not Python: it ends first, and the process must still end in order."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    process = start(*tiny(tmp_path, text, "--steps=5000"))
    assert any(line.startswith("test: ") for line in process.stdout)
    time.sleep(seconds)
    interrupt(process)


def test_interrupted_while_training_and_while_generating(text, tmp_path):
    process = start(*tiny(tmp_path, text, "--steps=5000", "--save_every=10"))
    assert any(line.startswith("saved step 10") for line in process.stdout)
    out = interrupt(process)
    assert "SIGINT: saving" in out and "\nsaved step " in out and "report: " in out

    more = ("--tiny", f"--workdir={tmp_path}", "--prompt=the cat", "--tokens=1000000")
    process = start("generate", DEMO, *more)
    assert process.stdout.read(len("the cat") + 3).startswith("the cat")
    interrupt(process)


# --- the loop -------------------------------------------------------------------------------------


@pytest.fixture
def train_here(text, tmp_path, monkeypatch) -> Callable[[], Path]:
    """Trains a very small model on one device of this process."""
    whole = Layout.mesh
    monkeypatch.setattr(Layout, "mesh", lambda layout: whole(layout, jax.devices()[:1]))
    keys = ("--steps=4", "--model.depth=1", "--data.tokenizer.vocab=300", "--evaluate_every=2")

    def train() -> Path:
        assert main(tiny(tmp_path, text, *keys, "--evaluate_windows=8")) == 0
        return tmp_path

    return train


def test_the_loop_makes_no_transfer_that_is_not_asked_for(train_here):
    assert [line["step"] for line in read_metrics(train_here())] == [1, 2, 3, 4]


def test_a_batch_that_the_step_would_fetch_itself_is_refused(train_here, monkeypatch):
    """Left on the host, each batch would be sent when the step is called, and the device waits."""

    def unplaced(*arguments):
        for batch in batches(*arguments):
            yield jax.device_get(batch)

    monkeypatch.setattr(training, "batches", unplaced)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train_here()


def test_a_model_that_no_memory_holds_is_said_in_one_line(tmp_path):
    wide = ("--model.width=65536", "--model.heads=64", "--steps=1")
    _, err = lmjax(*tiny(tmp_path / "run", write_text(tmp_path), *wide), code=2)
    assert err.startswith("error: out of memory, allocating ") and "--mesh.fsdp" in err
    assert len(err.splitlines()) == 1
