# SPDX-License-Identifier: Apache-2.0
"""What each step of a run saw and gave, written down so that two runs can be held side by side."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lmjax import hosts
from lmjax.fingerprint import fingerprints


class Seen(NamedTuple):
    """One step: the digest of its batch, equal on every mesh, and the bits of its loss."""

    step: int
    batch: str
    loss: str

    @property
    def value(self) -> float:
        """The loss as a number."""
        return float.fromhex(self.loss)


class Witness:
    """Appends a line a step to a file, at once; it waits for each step, which a run never does."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8") if hosts.is_first() else None  # noqa: SIM115

    def step(self, step: int, batch: Any, metrics: Any) -> None:
        """After `step` steps: the batch of the last and what came of it; all processes call it."""
        with jax.transfer_guard("allow"):
            prints = fingerprints(batch)
            loss = float(jax.device_get(metrics["loss"]))
        if self._file is None:
            return
        digest = hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()[:16]
        self._file.write(json.dumps([step, digest, loss.hex()]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Lets go of the file."""
        if self._file is not None:
            self._file.close()


def seen(path: Path) -> list[Seen]:
    """All steps that a file tells of, in the order in which they ran; a cut last line is none."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    found = []
    for line in lines[:-1]:
        if line.endswith("]"):  # a killed process may have left a part of a line before this one
            found.append(Seen(*json.loads(line[line.rindex("[") :])))
    return found
