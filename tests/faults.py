# SPDX-License-Identifier: Apache-2.0
"""Accidents that happen to checkpoints, drawn from a seed and done to a folder of steps.

Every accident is one of KINDS, done to the newest step (or beside it): what disks, kills, copies
and hands do. All are described by `Fault`, so that a failure can be done again.
"""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

METADATA = "_CHECKPOINT_METADATA"


@dataclass(frozen=True)
class Fault:
    """What was done: a kind, where, and a detail."""

    kind: str
    path: str
    detail: str


def inject(checkpoints: Path, seed: int) -> Fault:
    """Does one accident to the newest step of a folder of checkpoints."""
    draw = random.Random(seed)
    step = max((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    kind = list(KINDS)[seed % len(KINDS)]  # each as often as the others
    where, detail = KINDS[kind](step, draw)
    return Fault(kind, str(where.relative_to(checkpoints)), detail)


def _files(step: Path) -> list[Path]:
    return sorted(p for p in step.rglob("*") if p.is_file())


def _arrays(step: Path) -> list[Path]:
    """The files that hold values, the largest first."""
    found = [p for p in _files(step) if p.parent.name == "d"]
    return sorted(found, key=lambda p: -p.stat().st_size)


def _write(path: Path, place: int, change: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[place : place + len(change)] = change
    path.write_bytes(raw)


def _flip(path: Path, draw: random.Random) -> tuple[Path, str]:
    place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
    _write(path, place, bytes([path.read_bytes()[place] ^ 1 << bit]))
    return path, f"bit {bit} of byte {place}"


def flip_in_arrays(step: Path, draw: random.Random):
    return _flip(_arrays(step)[0], draw)


def flip_in_metadata(step: Path, draw: random.Random):
    return _flip(
        draw.choice([p for p in _files(step)[:] if p != _arrays(step)[0] and p.stat().st_size]),
        draw,
    )


def zeros_in_arrays(step: Path, draw: random.Random):
    path = _arrays(step)[0]
    size = min(512, path.stat().st_size // 2)
    place = draw.randrange(path.stat().st_size - size)
    _write(path, place, bytes(size))
    return path, f"{size} zeros at {place}"


def noise_in_arrays(step: Path, draw: random.Random):
    path = _arrays(step)[0]
    place = draw.randrange(path.stat().st_size - 64)
    _write(path, place, draw.randbytes(64))
    return path, f"64 random bytes at {place}"


def truncate(step: Path, draw: random.Random):
    path = draw.choice([p for p in _files(step) if p.stat().st_size])
    size = draw.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return path, f"cut to {size} bytes"


def empty_file(step: Path, draw: random.Random):
    path = draw.choice([p for p in _files(step) if p.stat().st_size])
    path.write_bytes(b"")
    return path, "emptied"


def delete_file(step: Path, draw: random.Random):
    path = draw.choice(_files(step))
    path.unlink()
    return path, "deleted"


def delete_half(step: Path, draw: random.Random):
    """A deletion, or a copy, that was killed half-way."""
    gone = draw.sample(_files(step), len(_files(step)) // 2)
    for path in gone:
        path.unlink()
    return step, f"{len(gone)} files deleted"


def delete_folder(step: Path, draw: random.Random):
    path = draw.choice(sorted(p for p in step.rglob("*") if p.is_dir()))
    shutil.rmtree(path)
    return path, "folder deleted"


def empty_step(step: Path, draw: random.Random):
    shutil.rmtree(step)
    step.mkdir()
    return step, "emptied"


def empty_newer_step(step: Path, draw: random.Random):
    newer = step.with_name(str(int(step.name) + draw.randrange(1, 5)))
    newer.mkdir()
    return newer, "an empty folder"


def leftover(step: Path, draw: random.Random):
    """What a killed save leaves."""
    name = f"{int(step.name) + 1}.orbax-checkpoint-tmp" + draw.choice(["", "-1795766616838"])
    shutil.copytree(step, step.with_name(name))
    for path in draw.sample(_files(step.with_name(name)), 3):
        path.unlink()
    return step.with_name(name), "left over"


def renamed(step: Path, draw: random.Random):
    newer = step.with_name(str(int(step.name) + draw.randrange(1, 5)))
    step.rename(newer)
    return newer, f"was {step.name}"


def swap_with_older(step: Path, draw: random.Random):
    """A file of the step before in the place of this step's: a sync that went wrong."""
    older = min((p for p in step.parent.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    shutil.copy(_arrays(older)[0], _arrays(step)[0])
    return _arrays(step)[0], "that of the step before"


def _edit(step: Path, change) -> tuple[Path, str]:
    content = json.loads((step / METADATA).read_text())
    detail = change(content["custom_metadata"])
    (step / METADATA).write_text(json.dumps(content))
    return step / METADATA, detail


def edit_fingerprint(step: Path, draw: random.Random):
    def change(own: dict) -> str:
        path = draw.choice(sorted(own["fingerprints"]))
        own["fingerprints"][path] = f"{draw.getrandbits(64):016x}"
        return f"another fingerprint of {path}"

    return _edit(step, change)


def edit_shape(step: Path, draw: random.Random):
    def change(own: dict) -> str:
        path = draw.choice(sorted(own["arrays"]))
        own["arrays"][path] = [[7, 3], "float32"]
        return f"another shape of {path}"

    return _edit(step, change)


def edit_step(step: Path, draw: random.Random):
    return _edit(step, lambda own: own.update(step=own["step"] - 1) or "another step")


def drop_key(step: Path, draw: random.Random):
    def change(own: dict) -> str:
        key = draw.choice(sorted(own))
        del own[key]
        return f"without {key}"

    return _edit(step, change)


def drop_array(step: Path, draw: random.Random):
    def change(own: dict) -> str:
        path = draw.choice(sorted(own["arrays"]))
        del own["arrays"][path], own["fingerprints"][path]
        return f"without {path}"

    return _edit(step, change)


def other_json(step: Path, draw: random.Random):
    text = draw.choice(
        ["{}", "[]", "null", '{"custom_metadata": 3}', '{"custom_metadata": {}}', "{"]
    )
    (step / METADATA).write_text(text)
    return step / METADATA, text


KINDS = {
    f.__name__: f
    for f in (
        flip_in_arrays, flip_in_metadata, zeros_in_arrays, noise_in_arrays, truncate, empty_file,
        delete_file, delete_half, delete_folder, empty_step, empty_newer_step, leftover, renamed,
        swap_with_older, edit_fingerprint, edit_shape, edit_step, drop_key, drop_array, other_json,
    )
}  # fmt: skip
