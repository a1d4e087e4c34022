# SPDX-License-Identifier: Apache-2.0
"""A compiler that ends its process ends neither a plan nor a search."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import lmjax
from processes import wait_until_gone

from lmjax import recipe
from lmjax.plan import chips, facts, kept
from lmjax.plan import search as searches
from lmjax.plan.facts import Crashed, described, find
from lmjax.plan.search import search

GPT = str(Path(__file__).parent.parent / "experiments/gpt2_small.py")
needs_compiler = pytest.mark.skipif(not chips.installed(), reason=chips.MISSING)
HEAD = """
import os, signal, sys, time
from lmjax.plan import crashes
crashes.outlive()
from lmjax.plan import kept
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def start(script: str, before: str = "") -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", before + HEAD + script], stdout=pipe, stderr=pipe, text=True
    )


def test_what_was_compiled_when_the_process_crashed_is_written_down_and_all_else_goes_on():
    child = start("""
for name in ("a", "b", "c"):
    if kept.read(name) is None:
        with crashes.compiling(name):
            if name != "a":
                os.kill(os.getpid(), signal.SIGSEGV)
        kept.write(name, {"pid": os.getpid()})
print([kept.read(name).get("crash") for name in ("a", "b", "c")])
sys.exit(3)
""")
    out, err = child.communicate(timeout=60)
    assert child.returncode == 3 and out == "[None, 'SIGSEGV', 'SIGSEGV']\n"
    assert err.count("the TPU compiler ended with SIGSEGV; going on without it") == 2
    compiled = kept.read("a")
    assert compiled is not None and compiled["pid"] != child.pid


@pytest.mark.parametrize(
    ("script", "code"),
    [
        # No program to blame, so the same would happen again.
        ("os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV),
        # Not of the compiler's making: the kernel's for want of memory, or a person's.
        ("with crashes.compiling('a'): os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("sys.exit(2)", 2),
        ("", 0),
    ],
)
def test_any_other_end_is_the_end(script: str, code: int):
    child = start(script)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code and "going on" not in err
    assert kept.read("a") is None


def test_a_crash_that_cannot_be_written_down_ends_it():
    child = start("with crashes.compiling('no/such'): os.kill(os.getpid(), signal.SIGSEGV)")
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGSEGV and err.count("going on without it") == 1


# The child is there long before its parent goes on.
SLOW = """
import os, time
fork = os.fork
def slow():
    child = fork()
    time.sleep(0.5 if child else 0)
    return child
os.fork = slow
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(
    ("crash", "before"), [("", ""), ("", SLOW), ("os.kill(os.getpid(), signal.SIGSEGV)", "")]
)
def test_a_request_to_end_ends_the_child_as_well(number: signal.Signals, crash: str, before: str):
    """Also one that began after a crash, and before its parent could wait for it."""
    child = start(
        f"""
if not kept.read("a"):
    with crashes.compiling("a"):
        {crash or "pass"}
print(os.getpid(), flush=True); time.sleep(60)
""",
        before,
    )
    with child:
        assert child.stdout is not None
        inner = int(child.stdout.readline())
        child.send_signal(number)
        _, err = child.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert child.returncode == -number
    else:
        assert child.returncode == 128 + number and err.endswith("\ninterrupted\n")
    assert not wait_until_gone({inner}, 10)


def test_one_whose_starter_ignores_its_children_sees_its_own_end():
    child = start("sys.exit(2)", "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)")
    child.communicate(timeout=60)
    assert child.returncode == 2


@needs_compiler
@pytest.mark.slow
def test_a_program_that_overflows_the_compilers_usual_stacks_is_compiled():
    keys = ("--tiny", "--model.remat=full", "--topology=v5e:1x1", "--quick", "--json")
    out, err = lmjax("plan", GPT.replace("gpt2_small", "bert_tiny"), *keys)
    assert json.loads(out)["fits"] and "going on without it" not in err


@needs_compiler
def test_a_program_that_crashed_is_refused_with_a_way_out(monkeypatch):
    run = recipe.load(GPT, tiny=True)
    names = []
    monkeypatch.setattr(facts.kept, "read", lambda name: names.append(name) or {"crash": "SIGSEGV"})
    with pytest.raises(Crashed, match=r"data -?1.*ends with SIGSEGV.*another mesh.*rm .*\.json"):
        find(run, "v5e:1x1", 0, print)
    assert len(names) == 1


@needs_compiler
def test_a_search_leaves_out_what_the_compiler_crashes_on(monkeypatch):
    run = recipe.load(GPT, tiny=True)
    tried, said = [], []

    def plan(run, topology, price, largest, say):
        tried.append(described(run))
        if "remat names, accumulate 1" not in described(run):
            raise Crashed(f"crashed on {described(run)}")
        return {"fits": True, "hours": 1.0}

    monkeypatch.setattr(searches, "plan", plan)
    found = search(run, "v5e:1x1", say=said.append)
    assert len(found) == 1 and found[0]["flags"].endswith("--model.remat=names")
    assert len(tried) == len(set(tried)) > len(found)
    assert sum(line.startswith("left out: crashed on") for line in said) == len(tried) - len(found)

    def nothing(run, *_, **__):
        raise Crashed(f"crashed on {described(run)}")

    monkeypatch.setattr(searches, "plan", nothing)
    with pytest.raises(Crashed, match="crashed on"):
        search(run, "v5e:1x1", say=said.append)
