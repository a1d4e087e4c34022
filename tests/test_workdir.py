# SPDX-License-Identifier: Apache-2.0
"""Run folders: what is refused as one, what is damaged in one, and output that nobody reads."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from commands import lmjax, start, tiny, write_text

from lmjax import recipe
from lmjax.__main__ import main
from lmjax.data import local_folder
from lmjax.workdir import keep_tokenizer, read_json, recorded_run, refuse_other_recipe
from lmjax.workdir import write_text as write_text_whole

DEMO = str(Path(__file__).parent.parent / "experiments/demo.py")
VERBS = (
    ["train", DEMO, "--tiny"],
    ["evaluate", DEMO, "--tiny"],
    ["generate", DEMO, "--tiny"],
    ["import", DEMO, "--tiny", "--from=x"],
    ["export", DEMO, "--tiny", "--to=x"],
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A wrong folder must not land in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
@pytest.mark.parametrize("name", ["gs://bucket/x", "s3://bucket/x", ""])
def test_every_verb_refuses_what_is_no_folder_here(verb: list[str], name: str, capsys):
    assert main([*verb, f"--workdir={name}"]) == 2
    assert "--workdir=" in capsys.readouterr().err
    assert os.listdir() == []


def test_a_bucket_is_refused_with_the_way_out(tmp_path: Path):
    for name in ("gs://bucket/x", Path("gs://bucket/x")):
        with pytest.raises(ValueError, match="--data.store=gs:.*mount the bucket"):
            local_folder("data.store", name)
    assert local_folder("workdir", tmp_path / "a:b") == tmp_path / "a:b"


def test_a_file_is_no_folder(tmp_path: Path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert main(["train", DEMO, "--tiny", "--workdir=notes"]) == 2
    assert "--workdir=notes is a file" in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == "mine"


def test_errors_of_the_system_name_the_file_first(capsys):
    assert main(["train", DEMO, "--tiny", "--workdir=/proc/none"]) == 2
    assert capsys.readouterr().err == "error: /proc/none: No such file or directory\n"


def test_a_prompt_of_broken_bytes_is_refused_by_its_key(capsys):
    assert main(["generate", DEMO, "--tiny", "--workdir=x", "--prompt=\udcff"]) == 2
    assert "--prompt=" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[1]", '{"run": {"model": {}}}', "{", b"\xff\xfe"])
def test_a_damaged_recipe_is_named_by_its_file(tmp_path: Path, content: str | bytes, capsys):
    path = tmp_path / "run" / "recipe.json"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        recorded_run(path.parent)
    assert main(["evaluate", DEMO, "--tiny", "--workdir=run"]) == 2
    assert f"{path.relative_to(tmp_path)} is damaged" in capsys.readouterr().err


def test_a_field_younger_than_the_record_had_its_default_then(tmp_path: Path):
    run = recipe.load(DEMO, tiny=True)
    recorded = recipe.to_json(run)
    for part, name in (("optim", "count"), ("optim", "bias_correction"), ("data", "held_out")):
        del recorded[part][name]
    (tmp_path / "recipe.json").write_text(json.dumps({"run": recorded}))
    refuse_other_recipe(run, tmp_path, ())
    other = recipe.override(run, [("optim.count", "before"), ("data.held_out", "a*")])
    with pytest.raises(ValueError, match="optim.count: None → before") as error:
        refuse_other_recipe(other, tmp_path, ())
    assert "--allow=data.held_out,optim.count" in str(error.value)


def test_a_run_is_not_gone_on_with_in_the_tokens_of_another_text(tmp_path: Path):
    text, workdir = write_text(tmp_path), tmp_path / "run"
    lmjax(*tiny(workdir, text, "--steps=2"))
    kept = (workdir / "tokenizer" / "description.json").read_bytes()
    shutil.rmtree(workdir / "data")
    text.write_text(text.read_text().replace("cat", "zebra"))
    _, err = lmjax(*tiny(workdir, text, "--steps=3"), code=2)
    assert f"{workdir}/tokenizer" in err and "another tokeniser" in err
    assert (workdir / "tokenizer" / "description.json").read_bytes() == kept
    keep_tokenizer(workdir / "data" / "tokenizer", tmp_path / "new")  # nothing trained there yet
    assert read_json(tmp_path / "new/tokenizer/description.json") != json.loads(kept)


def test_records_that_were_edited_or_a_start_that_is_refused_change_nothing(tmp_path: Path):
    text, workdir = write_text(tmp_path), tmp_path / "run"
    lmjax(*tiny(workdir, text, "--steps=2"))
    path = workdir / "recipe.json"
    kept = path.read_text()
    # Refused by its checkpoint, after the recipe was let pass.
    deeper = ("--steps=3", "--model.depth=3", "--allow=model.depth")
    _, err = lmjax(*tiny(workdir, text, *deeper), code=2)
    assert "does not fit the model" in err and path.read_text() == kept
    # Edited: what was trained with it is sealed in the step.
    path.write_text(kept.replace('"heads": 2', '"heads": 1'))
    for command in (
        tiny(workdir, text, "--steps=3", "--model.heads=1"),
        ("evaluate", DEMO, "--tiny", f"--workdir={workdir}"),
        ("verify", str(workdir)),
    ):
        _, err = lmjax(*command, code=2)
        assert f"{path} is not the recipe that step 2 was saved with" in err
        assert "model.heads is 1, and 2 was saved" in err
    path.write_text(kept)
    # Changed with leave, and not saved since.
    more = ("--steps=2", "--seed=7", "--allow=seed")
    lmjax(*tiny(workdir, text, *more))
    assert read_json(path)["allowed"] == ["seed"] and recorded_run(workdir)["seed"] == 7
    lmjax("verify", str(workdir))
    lmjax(*tiny(workdir, text, "--steps=3", "--seed=7"))
    assert "allowed" in read_json(path)  # step 2, which it began with, had another


def test_a_run_is_not_gone_on_with_in_another_text(tmp_path: Path):
    """Though the tokeniser, which was given, is the same."""
    text, first, workdir = write_text(tmp_path), tmp_path / "first", tmp_path / "run"
    lmjax(*tiny(first, text, "--steps=1"))
    given = f"--data.tokenizer.path={first / 'tokenizer/sentencepiece.model'}"
    lmjax(*tiny(workdir, text, "--steps=2", given))
    shutil.rmtree(workdir / "data")
    lmjax(*tiny(workdir, text, "--steps=3", given))  # built again from the same text
    shutil.rmtree(workdir / "data")
    text.write_text(text.read_text().replace("cat", "dog"))
    _, err = lmjax(*tiny(workdir, text, "--steps=4", given), code=2)
    assert "holds other tokens than those that" in err and "--allow=data" in err
    out, _ = lmjax(*tiny(workdir, text, "--steps=4", given, "--allow=data"))
    assert "resumed at step 3" in out


def test_metrics_without_a_step_are_not_passed_over_in_silence(tmp_path: Path):
    text, workdir = write_text(tmp_path), tmp_path / "run"
    lmjax(*tiny(workdir, text, "--steps=2"))
    shutil.rmtree(workdir / "checkpoints")
    out, _ = lmjax(*tiny(workdir, text, "--steps=2"))
    assert f"{workdir} holds metrics, but no step: starting from the beginning" in out


def test_a_file_that_cannot_be_written_is_named_and_leaves_no_half(tmp_path: Path, monkeypatch):
    def full(self: Path, text: str, **_: str) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device: '.*/report.json'"):
        write_text_whole(tmp_path / "report.json", "{}")
    assert list(tmp_path.iterdir()) == []


def test_training_outlives_the_reader_of_its_output(tmp_path: Path):
    process = start(*tiny(tmp_path / "run", write_text(tmp_path), "--steps=2"))
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_other_verbs_end_quietly_when_their_reader_leaves():
    process = start("describe", DEMO, "--tiny")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (141, "")
