# SPDX-License-Identifier: Apache-2.0
"""A run seen from outside: its sockets, its children, and what it writes of what it was told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import DEMO, ROOT, environment, start, tiny, write_text
from processes import beyond_loopback, descendants, listening, wait_until_gone

from lmjax import hosts, recipe
from lmjax.__main__ import main
from lmjax.document import redacted
from lmjax.report import write_report

SECRET = "cAnArY"
SECRETS = {
    name: f"{SECRET}-{number}"
    for number, name in enumerate(
        ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN", "PGPASSWORD")
    )
}
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


class Watched:
    """A training run in the C locale, with secrets in its environment and a worker that reads
    ahead; watched until it has saved, then killed."""

    def __init__(self, folder: Path) -> None:
        text = write_text(folder)
        text = text.rename(folder / "é☃.txt")
        text.write_text(text.read_text("utf-8").replace("cat", "naïve ☃"), "utf-8")
        self.workdir, self.text = folder / "run", text
        keys = ("--steps=5000", "--save_every=2", "--evaluate_every=0", "--workers=1")
        command = [sys.executable, "-u", "-m", "lmjax", *tiny(self.workdir, text, *keys)]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment(), **SECRETS, **C_LOCALE},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        said, self.sockets, self.family = b"", set(), set()
        for line in process.stdout:
            said += line
            self.sockets |= listening(process.pid)
            self.family |= descendants(process.pid)
            if line.startswith(b"saved step 4"):
                break
        process.kill()
        process.wait()
        self.left = wait_until_gone(self.family, 10)
        for pid in self.left:  # who outlives it holds its output open
            os.kill(pid, signal.SIGKILL)
        self.said = said + process.communicate()[0]


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Watched:
    return Watched(tmp_path_factory.mktemp("watched"))


def test_a_run_listens_at_no_address_beyond_loopback(watched: Watched):
    assert b"saved step 4" in watched.said and len(watched.family) > 1
    assert not beyond_loopback(watched.sockets)


def test_no_process_outlives_a_killed_run(watched: Watched):
    assert not watched.left


def test_a_run_in_the_c_locale_reads_and_writes_utf8(watched: Watched):
    assert b"60 documents" in watched.said and b"Error" not in watched.said
    recorded = json.loads((watched.workdir / "recipe.json").read_text("utf-8"))
    glob = recorded["run"]["data"]["corpus"]["glob"]
    assert os.fsencode(glob) == os.fsencode(watched.text)
    manifest = json.loads((watched.workdir / "data" / "manifest.json").read_text("utf-8"))
    assert manifest["sources"] == [["é☃.txt", watched.text.stat().st_size]]


def test_secrets_of_the_environment_are_in_no_output(watched: Watched):
    assert SECRET.encode() not in watched.said
    write_report(watched.workdir)
    found = [path for path in watched.workdir.rglob("*") if path.is_file()]
    names = {path.name for path in found}
    assert {"recipe.json", "environment.json", "metrics.jsonl", "report.html"} <= names
    assert any("checkpoints" in path.parts for path in found)
    assert any("tensorboard" in path.parts for path in found)
    for path in found:
        assert SECRET.encode() not in path.read_bytes(), path


URL = f"https://me:{SECRET}@host.example/a/b.txt?token={SECRET}&x={SECRET}#{SECRET}"
PLACES = {
    "corpus": ["train", f"--data.corpus=files:{URL}", "--workdir=run"],
    "workdir": ["train", f"--workdir={URL}"],
    "store": ["train", f"--data.store={URL}", "--workdir=run"],
    "tokenizer": ["train", f"--data.tokenizer.path={URL}", "--workdir=run"],
    "import": ["import", f"--from={URL}", "--workdir=run"],
    "a key": ["train", f"--{URL}=1", "--workdir=run"],
    "a word": ["train", URL, "--workdir=run"],
    "a number": ["train", f"--steps={URL}", "--workdir=run"],
    "a glob": ["train", f"--data.corpus={URL}", "--workdir=run"],
}


@pytest.mark.parametrize("place", PLACES)
def test_secrets_in_urls_are_in_no_output(place: str, tmp_path: Path, capfd, monkeypatch):
    demo = str(ROOT / DEMO)
    (tmp_path / "a.txt").write_text("a\nb\nc\n")
    monkeypatch.chdir(tmp_path)
    verb, *words = PLACES[place]
    if place in ("tokenizer", "store"):
        words.append("--data.corpus=files:a.txt")
    assert main([verb, demo, "--tiny", *words]) == 2
    out, err = capfd.readouterr()
    assert "host.example" in err or place == "import"
    assert SECRET not in out + err
    for path in tmp_path.rglob("*"):
        assert SECRET not in path.name
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:a/b+c@bucket/x: no", "s3://***@bucket/x: no"),
        ("'https://host/x?token=1&y' is", "'https://host/x?***' is"),
        ("gs:/user@bucket/x", "gs:/***@bucket/x"),
        ("https://host/a#frag", "https://host/a?***"),
        ("C:/x and /tmp/a@b and e:mail@host", "C:/x and /tmp/a@b and e:mail@host"),
    ],
)
def test_what_urls_say_of_people_is_hidden(text: str, shown: str):
    assert redacted(text) == shown


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_describe_hides_what_urls_say_of_people(capsys, flags: list[str]):
    keys = [
        "--data.store=gs://u:hunter2@x/y",
        "--data.corpus=files:https://u:hunter2@h/x?t=hunter2",
    ]
    assert main(["describe", DEMO, "--tiny", *keys, *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("gs://***@x/y") == out.count("https://***@h/x?***") == (1 if flags else 2)
    assert "hunter2" not in out


NAMES = ["../../x", "/tmp/x", "a/b", "..", "a.b", "a b", "a\nb", "é", "x" * 101]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path, capsys, monkeypatch):
    """What is typed as a name becomes a file's; folders are typed as paths, and are where they say.

    The names in manifests and tokenizers are held by their own tests.
    """
    demo = str(ROOT / DEMO)
    run = recipe.load(demo, tiny=True)
    (tmp_path / "run").mkdir()
    about = {"run": recipe.to_json(run)}
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(about), "utf-8")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", demo, "--tiny", "--workdir=run", f"--split={name}"]) == 2
    assert "a name of letters, digits, - and _" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


# --- the helpers ----------------------------------------------------------------------------------

LISTENER = """
import socket, subprocess, sys
if len(sys.argv) > 2:
    subprocess.Popen([sys.executable, "-c", sys.argv[2], *sys.argv[1:2]], stdout=sys.stdout)
server = socket.socket()
server.bind((sys.argv[1], 0))
server.listen()
print("listening", flush=True)
server.accept()
"""


def test_who_listens_is_found_in_children_as_well():
    command = [sys.executable, "-c", LISTENER, "0.0.0.0", LISTENER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["listening\n"] * 2
        found, family = listening(process.pid), descendants(process.pid)
        process.kill()
        process.wait()
        (orphan,) = wait_until_gone(family, 0.2)
        os.kill(orphan, signal.SIGKILL)
    assert len(found) == len(family) == 2 and beyond_loopback(found) == found
    assert not wait_until_gone(family, 5)


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "bound"), [("127.0.0.1:1234", "127.0.0.1:1234"), ("node7:1234", None)]
)
def test_one_machine_s_coordinator_is_bound_to_loopback(address: str, bound, monkeypatch):
    asked = {}
    monkeypatch.setattr(hosts, "call_the_roll", lambda place, seconds: None)
    monkeypatch.setattr("jax.distributed.initialize", lambda *a, **named: asked.update(named))
    settings = {"LMJAX_COORDINATOR": address, "LMJAX_PROCESSES": "2", "LMJAX_PROCESS": "0"}
    hosts.join(settings)
    assert asked["coordinator_bind_address"] == bound


@pytest.mark.slow
def test_two_processes_listen_at_no_address_beyond_loopback(tmp_path: Path):
    from test_hosts import command, start_two

    both = start_two(*command(tmp_path / "run", write_text(tmp_path)))
    sockets = set()
    while not any((tmp_path / "run").glob("checkpoints/[0-9]*")):
        for process in both:
            assert process.poll() in (None, 0)
            sockets |= listening(process.pid)
        time.sleep(0.02)
    for process in both:
        process.kill()
        process.communicate()
    assert sockets and not beyond_loopback(sockets)


# --- accidents in a row ---------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_kills_leave_no_debris_and_no_orphans(tmp_path: Path):
    text, workdir = write_text(tmp_path), tmp_path / "run"
    keys = ("--steps=100000", "--save_every=2", "--evaluate_every=0", "--workers=2", "--keep=2")
    family: set[int] = set()
    for number in range(20):
        process = start(*tiny(workdir, text, *keys))
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("saved step"):
                break
        time.sleep(0.03 * (number % 7))
        family |= descendants(process.pid)
        process.kill()
        process.communicate()
        found = [path.name for path in (workdir / "checkpoints").iterdir()]
        assert len(found) <= 2 + 2, found  # kept, the one being written, the one being deleted
    assert not wait_until_gone(family, 10)
    hidden = sorted(path.name for path in workdir.iterdir() if path.name.startswith("."))
    assert hidden == [".data.lock", ".lock"]
