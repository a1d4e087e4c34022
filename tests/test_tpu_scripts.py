# SPDX-License-Identifier: Apache-2.0
"""tpu/*.sh with a stand-in for gcloud, which writes down its calls and fails where told to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TPU = Path(__file__).parent.parent / "tpu"
SCRIPTS = ("create", "setup", "run", "logs", "delete")
POD = ("--zone=z-1", "--name=pod")
MADE = ("--type=v5litepod-16", "--hours=2")

# Answers come from answers.json: for a part of a command a list of [exit code, output], of which
# the last goes on for ever; what is in none of them succeeds in silence.
GCLOUD = f"""#!{sys.executable}
import json, os, sys
folder = os.environ["STAND_IN"]
call = " ".join(sys.argv[1:])
with open(folder + "/calls", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
for word in sys.argv[1:]:
    if "startup-script=" in word:
        print(open(word.split("=")[-1]).read(), file=open(folder + "/startup", "w"))
with open(folder + "/answers.json") as file:
    answers = json.load(file)
for part, given in answers.items():
    if part in call:
        code, text = given.pop(0) if len(given) > 1 else given[0]
        json.dump(answers, open(folder + "/answers.json", "w"))
        print(text, end="", file=sys.stderr if code else sys.stdout)
        sys.exit(code)
"""


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A function (script, flags, answers, exit code) → (calls, output, errors)."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "gcloud"
    stand_in.write_text(GCLOUD)
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setenv("LMJAX_POLL", "0.05")

    def call(script, *flags, answers=None, code=0):
        (tmp_path / "calls").write_text("")
        (tmp_path / "answers.json").write_text(json.dumps(answers or {}))
        done = subprocess.run(
            [TPU / f"{script}.sh", *flags], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return calls, done.stdout, done.stderr

    return call


def made_of(calls):
    return [c for c in calls if "create" in c]


def verbs(calls):
    """Calls but for questions about the state: `queued-resources create`, `tpu-vm ssh` …"""
    return [" ".join(c[2:4]) for c in calls if "describe" not in c]


NOT_FOUND = [1, "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found\n"]
NONE = {"describe": [NOT_FOUND]}


def test_a_pod_is_queued_spot_or_not_and_deletes_itself(gcloud, tmp_path):
    queue = {
        "queued-resources describe": [NOT_FOUND, [0, "WAITING_FOR_RESOURCES\n"], [0, "ACTIVE\n"]],
        "tpu-vm describe": [NOT_FOUND],
    }
    calls, out, _ = gcloud("create", *POD, *MADE, "--spot", "--project=p", answers=queue)
    (made,) = made_of(calls)
    assert made[:5] == ["compute", "tpus", "queued-resources", "create", "pod"]
    wanted = {"--zone=z-1", "--project=p", "--spot", "--node-id=pod", "--scopes=cloud-platform"}
    assert wanted < set(made) and "--accelerator-type=v5litepod-16" in made
    assert "--runtime-version=v2-alpha-tpuv5-lite" in made
    assert "it deletes itself in 2 hours" in out
    cap = (tmp_path / "startup").read_text()
    assert "systemd-run --on-active=7200 gcloud compute tpus queued-resources delete pod" in cap
    assert "--force --zone=z-1 --project=p --quiet" in cap


def test_a_pod_without_the_queue(gcloud, tmp_path):
    states = {
        "queued-resources describe": [NOT_FOUND],
        "tpu-vm describe": [NOT_FOUND, [0, "READY\n"]],
    }
    calls, _, _ = gcloud("create", *POD, *MADE, "--on-demand", "--version=mine", answers=states)
    (made,) = made_of(calls)
    assert made[2:5] == ["tpu-vm", "create", "pod"] and "--version=mine" in made
    assert not {"--spot", "--node-id=pod"} & set(made)
    assert "gcloud compute tpus tpu-vm delete pod" in (tmp_path / "startup").read_text()


def test_what_is_there_is_not_made_again_and_what_is_left_over_is_said(gcloud):
    calls, out, _ = gcloud("create", *POD, *MADE, answers={"describe": [[0, "ACTIVE\n"]]})
    assert not made_of(calls) and "is there already" in out
    left = {"describe": [[0, "SUSPENDED\n"]]}
    _, _, err = gcloud("create", *POD, *MADE, answers=left, code=2)
    assert "left over: tpu/delete.sh --name=pod" in err
    failed = {"describe": [NOT_FOUND, NOT_FOUND, [0, "FAILED\n"]]}
    _, _, err = gcloud("create", *POD, *MADE, answers=failed, code=2)
    assert "pod was not given" in err
    _, _, err = gcloud("create", *POD, *MADE, answers={**NONE, "create": [[7, "no quota"]]}, code=7)


def test_every_host_gets_the_commit_and_the_lock(gcloud):
    calls, _, _ = gcloud("setup", *POD, "--bucket=mine")
    assert verbs(calls) == ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
    assert all("--worker=all" in call and "--zone=z-1" in call for call in calls)
    install, mount = (call[-2] for call in calls[1:])
    assert "make setup-tpu" in install and "gcsfuse --implicit-dirs mine bucket" in mount
    assert len(gcloud("setup", *POD)[0]) == 2
    _, _, err = gcloud("setup", *POD, "--bucket=gs://mine", code=2)
    assert "without gs://" in err


TRAIN = ("--", "train", "experiments/demo.py", "--workdir=../bucket/it's here")


def test_a_run_is_started_on_all_hosts_waited_for_and_paid_no_longer(gcloud, tmp_path):
    states = {
        "queued-resources describe": [[0, "ACTIVE\n"]],
        "cat lmjax/run.exit": [[0, ""], [255, ""], [0, "3\n"]],
    }
    calls, _, _ = gcloud("run", *POD, *MADE, "--bucket=mine", *TRAIN, answers=states, code=3)
    (start,) = [c for c in calls if "nohup" in " ".join(c)]
    assert "--worker=all" in start
    # What the hosts run is the command that was typed, whatever is in it.
    (tmp_path / "lmjax/.venv/bin").mkdir(parents=True)
    python = tmp_path / "lmjax/.venv/bin/python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    command = next(word for word in start if word.startswith("--command="))
    subprocess.run(["bash", "-c", command.removeprefix("--command=") + "\nwait"], cwd=tmp_path)
    lines = (tmp_path / "lmjax/run.log").read_text().splitlines()
    assert lines == ["-m", "lmjax", *TRAIN[1:]]
    assert (tmp_path / "lmjax/run.exit").read_text() == "0\n"
    assert verbs(calls)[-2:] == ["tpu-vm scp", "queued-resources delete"]
    assert verbs(gcloud("run", *POD, *MADE, "--keep", *TRAIN, answers=states, code=3)[0])[-1] == (
        "tpu-vm scp"
    )


def test_after_a_preemption_the_pod_is_made_again_and_the_run_goes_on(gcloud):
    states = {
        "queued-resources describe": [
            NOT_FOUND, [0, "ACTIVE\n"], [0, "ACTIVE\n"],  # made, and runs
            [0, "SUSPENDED\n"], [0, "SUSPENDED\n"],  # taken away, deleted
            NOT_FOUND, [0, "ACTIVE\n"],
        ],
        "tpu-vm describe": [NOT_FOUND],
        "cat lmjax/run.exit": [[0, ""], [0, "0\n"]],
    }  # fmt: skip
    calls, _, _ = gcloud("run", *POD, *MADE, "--spot", *TRAIN, answers=states)
    assert len(made_of(calls)) == 2 and all("--spot" in made for made in made_of(calls))
    assert sum("nohup" in " ".join(call) for call in calls) == 2
    assert verbs(calls).count("queued-resources delete") == 2


def test_no_room_after_a_preemption_is_waited_out(gcloud):
    states = {
        "queued-resources describe": [
            NOT_FOUND, [0, "ACTIVE\n"], [0, "SUSPENDED\n"], [0, "SUSPENDED\n"],  # taken, deleted
            NOT_FOUND, NOT_FOUND,  # no room: nothing to delete
            NOT_FOUND, [0, "ACTIVE\n"],
        ],
        "tpu-vm describe": [NOT_FOUND],
        "queued-resources create": [[0, ""], [1, "RESOURCE_EXHAUSTED\n"], [0, ""]],
        "cat lmjax/run.exit": [[0, "0\n"]],
    }  # fmt: skip
    calls, _, err = gcloud("run", *POD, *MADE, "--spot", *TRAIN, answers=states)
    assert len(made_of(calls)) == 3 and "RESOURCE_EXHAUSTED" in err
    assert sum("nohup" in " ".join(call) for call in calls) == 2
    # From the start it is no reason to wait: a type without quota, a zone that has none.
    refused = {**NONE, "create": [[7, "no quota"]]}
    assert len(made_of(gcloud("run", *POD, *MADE, *TRAIN, answers=refused, code=7)[0])) == 1


@pytest.mark.parametrize("part", ["tpu-vm scp", "make setup-tpu", "nohup"])
def test_a_pod_that_cannot_be_set_up_is_tried_thrice_and_deleted(gcloud, part):
    states = {"queued-resources describe": [[0, "ACTIVE\n"]], part: [[1, "broken pipe\n"]]}
    calls, _, err = gcloud("run", *POD, *MADE, *TRAIN, answers=states, code=2)
    assert sum(part in " ".join(call) for call in calls) == 3
    assert "pod could not be set up" in err and verbs(calls)[-1] == "queued-resources delete"


def test_without_a_network_nothing_is_made_or_deleted(gcloud):
    lost = {"describe": [[1, "ERROR: Unable to find the server\n"]]}
    for script, flags in (("create", MADE), ("delete", ()), ("run", (*MADE, *TRAIN))):
        calls, _, err = gcloud(script, *POD, *flags, answers=lost, code=2)
        assert verbs(calls) == [] and "Unable to find" in err and "could not be asked" in err
    blip = {
        "queued-resources describe": [[0, "ACTIVE\n"], [0, "ACTIVE\n"], *2 * lost["describe"]],
        "cat lmjax/run.exit": [[0, ""], [255, ""], [0, "0\n"]],
    }
    calls, _, _ = gcloud("run", *POD, *MADE, "--keep", *TRAIN, answers=blip)
    assert not [call for call in calls if "delete" in call]


def test_a_cap_ends_the_run(gcloud):
    states = {"queued-resources describe": [[0, "ACTIVE\n"]]}
    calls, _, err = gcloud(
        "run", *POD, "--type=v5litepod-16", "--hours=0.0003", *TRAIN, answers=states, code=2
    )
    assert "0.0003 hours are over" in err and verbs(calls)[-1] == "queued-resources delete"


BUSY = [1, "ERROR: an operation is in progress\n"]


def test_a_pod_that_is_not_deleted_at_once_is_tried_again(gcloud):
    states = {"queued-resources describe": [[0, "ACTIVE\n"]], "delete": [BUSY, BUSY, [0, ""]]}
    assert verbs(gcloud("delete", *POD, answers=states)[0]) == 3 * ["queued-resources delete"]
    # Or somebody else has deleted it meanwhile.
    gone = {
        "queued-resources describe": [[0, "DELETING\n"], NOT_FOUND],
        "tpu-vm describe": [NOT_FOUND],
    }
    assert len(verbs(gcloud("delete", *POD, answers={**gone, "delete": [BUSY]})[0])) == 1


@pytest.mark.parametrize(("said", "code"), [("0", 2), ("3", 3)])
def test_a_pod_that_is_still_there_is_said_and_the_commands_code_kept(gcloud, said, code):
    states = {
        "queued-resources describe": [[0, "ACTIVE\n"]],
        "cat lmjax/run.exit": [[0, f"{said}\n"]],
        "resources delete": [BUSY],
    }
    calls, _, err = gcloud("run", *POD, *MADE, *TRAIN, answers=states, code=code)
    assert verbs(calls)[-4:] == 4 * ["queued-resources delete"]
    wanted = "error: pod was NOT deleted and still costs: tpu/delete.sh --name=pod --zone=z-1\n"
    assert err.endswith(wanted) and err.count("NOT deleted") == 1


def test_hours_that_are_over_are_said_where_the_pod_is_still_there(gcloud):
    states = {"queued-resources describe": [[0, "ACTIVE\n"]], "resources delete": [BUSY]}
    flags = ("--type=v5litepod-16", "--hours=0.0003")
    _, _, err = gcloud("run", *POD, *flags, *TRAIN, answers=states, code=2)
    assert "NOT deleted" in err and "0.0003 hours are over" in err


def test_no_pod_is_made_for_less_time_than_it_takes(gcloud, monkeypatch):
    for hours in ("0", "0.0", "0.016"):
        calls, _, err = gcloud("create", *POD, MADE[0], f"--hours={hours}", answers=NONE, code=2)
        assert f"--hours={hours}: no pod is made for less than a minute" in err
        assert verbs(calls) == []
    monkeypatch.setenv("LMJAX_POLL", "45")
    for hours in ("0", "0.04"):  # 144 s
        calls, _, err = gcloud("run", *POD, MADE[0], f"--hours={hours}", *TRAIN, code=2)
        assert calls == [] and f"--hours={hours}: over before a pod is there" in err


def test_after_a_preemption_near_the_end_no_pod_is_made(gcloud, monkeypatch):
    active, taken = [0, "ACTIVE\n"], [0, "SUSPENDED\n"]
    states = {
        "queued-resources describe": [active, active, taken, taken, NOT_FOUND],
        "tpu-vm describe": [NOT_FOUND],
    }
    monkeypatch.setenv("LMJAX_POLL", "1.5")
    flags = ("--type=v5litepod-16", "--hours=0.002")  # 7 s, and 6 s are four polls
    calls, _, err = gcloud("run", *POD, *flags, *TRAIN, answers=states, code=2)
    assert made_of(calls) == [] and "0.002 hours are over" in err


def test_gcloud_that_is_not_there_is_said_once(gcloud, tmp_path, monkeypatch):
    few = tmp_path / "few"
    few.mkdir()
    for tool in ("bash", "dirname", "sed", "env"):
        (few / tool).symlink_to(shutil.which(tool) or "")
    monkeypatch.setenv("PATH", str(few))
    for script in SCRIPTS:
        flags = {"create": MADE, "run": (*MADE, *TRAIN)}.get(script, ())
        _, out, err = gcloud(script, *POD, *flags, code=2)
        assert err.startswith("error: no gcloud on PATH: https://") and err.count("\n") == 1
        gcloud(script, "--help")


def test_logs_are_of_host_0_and_deleting_finds_the_kind(gcloud):
    (call,), _, _ = gcloud("logs", *POD)
    assert call[2:4] == ["tpu-vm", "ssh"] and "--worker=0" in call
    assert "--command=tail -n 200 -F lmjax/run.log" in call
    kinds = {"queued-resources describe": [NOT_FOUND], "tpu-vm describe": [[0, "READY\n"]]}
    assert verbs(gcloud("delete", *POD, answers=kinds)[0]) == ["tpu-vm delete"]
    assert "there is no pod" in gcloud("delete", *POD, answers=NONE)[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_calls_nothing_and_says_what_it_would(gcloud, script):
    flags = {"create": MADE, "setup": ("--bucket=b",), "run": (*MADE, *TRAIN)}.get(script, ())
    calls, _, err = gcloud(script, *POD, "--dry-run", *flags)
    assert calls == [] and "+ gcloud compute tpus" in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_flags_that_no_script_has(gcloud, script):
    calls, out, _ = gcloud(script, "--help")
    assert calls == [] and f"tpu/{script}.sh" in out and "--dry-run" in out
    calls, _, err = gcloud(script, *POD, "--spt", code=2)
    assert calls == [] and "--spt" in err and "--dry-run" in err or "one of --type" in err
    _, _, err = gcloud(script, "--name=Bad_Name", code=2)
    assert "small letters" in err


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("create", ("--hours=2",), "--type=TYPE is needed"),
        ("create", ("--type=v5litepod-8",), "--hours=N is needed"),
        ("create", ("--type=v5litepod-8", "--hours=x"), "--hours=N is needed"),
        ("create", ("--type=v9-8", "--hours=1"), "no runtime is known"),
        ("run", MADE, "what to run is missing"),
        ("run", ("--type=v5litepod-8", *TRAIN), "nothing is paid for longer"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_called(gcloud, script, flags, message):
    calls, _, err = gcloud(script, *POD, *flags, code=2)
    assert message in err and made_of(calls) == []


@pytest.mark.parametrize("path", sorted(TPU.glob("*.sh")), ids=lambda path: path.stem)
def test_scripts_are_short_and_strict(path):
    text = path.read_text()
    assert "set -euo pipefail" in text and len(text.splitlines()) < 60


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", *TPU.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
