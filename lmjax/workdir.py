# SPDX-License-Identifier: Apache-2.0
"""The run directory: what its files are called, and who may write them.

recipe.json, environment.json, tokenizer/, data/ (the token store), checkpoints/, metrics.jsonl,
tensorboard/, evaluation-<split>.json, samples.jsonl, report.html.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from lmjax import recipe, sharding
from lmjax.data import Prepared
from lmjax.document import redacted
from lmjax.run import Run, describe, replace
from lmjax.tokenizer import DESCRIPTION, Tokenizer, load_tokenizer

# What may change between two starts of one run: nothing here changes what a step computes.
FREE = re.compile(
    r"(steps|accumulate|log_every|evaluate_every|evaluate_windows|save_every|keep|workers"
    r"|max_skipped|check_every"
    r"|mesh\.\w+|model\.(kernel|remat|unroll)|data\.store|data\.corpus\.data_dir)"
)
_PARTS = ("model", "data", "loss", "optim")
_ABSENT = object()


class RunLock:
    """One writer per run directory: held from creation until the process ends."""

    def __init__(self, workdir: Path) -> None:
        """Raises ValueError if another process holds the lock of `workdir`."""
        self._file = open(workdir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            raise ValueError(
                f"{workdir} is being written by another process ({owner}); wait for it, stop it, "
                "or choose another --workdir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()}")
        self._file.flush()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process write."""
        self._file.close()


def refuse_edited_recipe(workdir: Path, step: int, saved: dict[str, Any]) -> None:
    """Raises ValueError if recipe.json is not what `step` was saved with, by its sealed recipe.

    What `--allow` let a later start change is named in recipe.json.
    """
    path = workdir / "recipe.json"
    recorded = dict(recipe.flatten(recorded_run(workdir)))
    allowed = read_json(path).get("allowed", [])
    lines = [
        f"  {key} is {recorded[key]}, and {value} was saved"
        for key, value in recipe.flatten(saved)
        if recorded.get(key, value) != value and not FREE.fullmatch(key) and key not in allowed
    ]
    if lines:
        text = "\n".join(lines)
        raise ValueError(
            f"{path} is not the recipe that step {step:,} was saved with:\n{redacted(text)}\n"
            "Restore these values in that file"
        )


def refuse_other_recipe(run: Run, workdir: Path, allow: tuple[str, ...]) -> None:
    """Raises ValueError, with the difference, if `workdir` was begun under another recipe."""
    recorded = recorded_run(workdir)
    changes = recipe.difference(recorded, recipe.to_json(run))
    # A field that is younger than the record had its default then.
    known, defaults = dict(recipe.flatten(recorded)), recipe.defaults(run)
    changes = [c for c in changes if c[0] in known or defaults.get(c[0], _ABSENT) != c[2]]
    allowed = set(allow)
    for key, old, new in changes:
        if FREE.fullmatch(key):
            print(redacted(f"changed since the last start: {key} {old} → {new}"))
    refused = [c for c in changes if not FREE.fullmatch(c[0]) and c[0] not in allowed]
    if refused:
        lines = [f"  {key}: {old} → {new}" for key, old, new in refused]
        keys = ",".join(key for key, _, _ in refused)
        raise ValueError(
            f"{workdir} was trained with another recipe:\n" + "\n".join(lines) + "\n"
            f"Restore these values, choose another --workdir, or name them: --allow={keys}"
        )


def refuse_skipping_the_past(run: Run, workdir: Path, step: int) -> None:
    """Raises ValueError if `skip_batches` changes what steps up to `step` have seen."""
    old = recorded_run(workdir).get("skip_batches", [])
    before = replace(run, skip_batches=tuple((a, b) for a, b in old))
    if step and run.plan().indices(step - 1)[-1] != before.plan().indices(step - 1)[-1]:
        end = before.plan().batches_of(step - 1)[1]
        raise ValueError(
            f"skip_batches={run.skip_batches}: {workdir} stands at step {step:,} and has seen the"
            f" batches up to {end:,} (with skip_batches={before.skip_batches}); skip later ones, or"
            f" move newer steps out of {workdir / 'checkpoints'} to go on from an older one"
        )


def check_data(run: Run, prepared: Prepared) -> None:
    """Raises ValueError for ids that the model has no rows for, and for less text than a batch."""
    tokenizer = prepared.tokenizer
    # A vocabulary of words has ids that spell the unknown ones; to the model they are one word.
    have, need = run.model.vocab, getattr(tokenizer, "words", tokenizer.vocab)
    if need > have:
        raise ValueError(
            f"the tokeniser has {need:,} ids but model.vocab={have:,}; set --model.vocab={need}"
        )
    split = prepared.store.splits["train"]
    for maker, batch in zip(run.makers(), run.batch_sizes(), strict=True):
        # An example holds `length` tokens at most, so much text needs no counting.
        if hasattr(maker, "epoch") and split.n_tokens < 4 * batch * maker.length:
            _check_batch(maker.epoch(split, run.seed), batch, maker.length)


def _check_batch(examples: int, batch: int, length: int) -> None:
    if examples < batch:
        raise ValueError(
            f"the train split makes {examples:,} examples of length {length:,}, fewer than one"
            f" batch of {batch:,}; add text, or make --batch or --data.examples.length smaller"
        )


def refuse_other_text(prepared: Prepared, workdir: Path, allow: tuple[str, ...]) -> None:
    """Raises ValueError if the store holds other tokens than those that `workdir` was trained on.

    As where it was deleted and built again from a text that has changed since.
    """
    known = read_json(workdir / "recipe.json").get("tokens", "")
    changed = known and known != _tokens_of(prepared)
    if changed and not any(key.partition(".")[0] == "data" for key in allow):
        raise ValueError(
            f"{prepared.store.directory} holds other tokens than those that {workdir} was trained"
            " on: the text must have changed since. Bring back the text or the token store, choose"
            " another --workdir, or go on with the other text: --allow=data"
        )


def _tokens_of(prepared: Prepared) -> str:
    """A hash of all splits of a store."""
    content = json.dumps(prepared.store.manifest["splits"], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def keep_tokenizer(directory: Path, workdir: Path) -> None:
    """Copies a tokeniser into the run directory, which then needs no store to generate.

    Raises:
      ValueError: what was trained there so far knows another one.
    """
    mine = workdir / "tokenizer"
    if any((workdir / "checkpoints").glob("[0-9]*")) and (mine / DESCRIPTION).exists():
        if load_tokenizer(mine).fingerprint != load_tokenizer(directory).fingerprint:
            raise ValueError(
                f"{directory} is another tokeniser than {mine}, which the checkpoints of {workdir} "
                "were trained with: the text must have changed. Bring back the text or the token "
                f"store, choose another --workdir, or remove {mine} to go on with other ids"
            )
        return
    shutil.copytree(directory, mine, dirs_exist_ok=True)


def run_tokenizer(workdir: Path) -> Tokenizer:
    """The tokeniser that a run directory keeps.

    Raises:
      ValueError: it keeps none, or a damaged one.
    """
    folder = workdir / "tokenizer"
    if not folder.is_dir():
        raise ValueError(f"{workdir} has no tokeniser: train there, or import one with the weights")
    return load_tokenizer(folder)


def record(
    run: Run,
    workdir: Path,
    about: dict[str, str],
    prepared: Prepared | None = None,
    saved: dict[str, Any] | None = None,
) -> None:
    """Writes recipe.json and environment.json.

    Args:
      prepared: the data, of which recipe.json has a hash.
      saved: the recipe of the step that the run goes on from; where they differ was allowed.
    """
    mine = recipe.to_json(run)
    changes = recipe.difference(saved, mine) if saved else []
    content = {**about, "summary": describe(run), "run": mine}
    if prepared is not None:
        content["tokens"] = _tokens_of(prepared)
    if allowed := [key for key, _, _ in changes if not FREE.fullmatch(key)]:
        content["allowed"] = allowed
    write_text(workdir / "recipe.json", recipe.dump(content))
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    mesh = sharding.mesh()
    assert mesh is not None
    devices = [d.device_kind for d in mesh.devices.flat]
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "devices": {kind: devices.count(kind) for kind in sorted(set(devices))},
        **{name: metadata.version(name) for name in packages},
    }
    write_text(workdir / "environment.json", recipe.dump(environment))


def recorded_run(workdir: Path) -> dict[str, Any]:
    """The recipe that a run directory recorded, as JSON.

    Raises:
      ValueError: its recipe.json is missing or damaged.
    """
    path = workdir / "recipe.json"
    content = read_json(path)
    run = content.get("run") if isinstance(content, dict) else None
    if not isinstance(run, dict) or not all(isinstance(run.get(k), dict) for k in _PARTS):
        raise ValueError(f"{path} is damaged: it holds no recipe; restore it, or start elsewhere")
    return run


def read_json(path: Path) -> Any:
    """The JSON in a file of a run directory.

    Raises:
      ValueError: it is missing or cut; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; is {path.parent} a run directory?") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is damaged: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a file of a run directory whole or not at all. Errors: OSError, of that file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
