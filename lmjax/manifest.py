# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of itself: its step, recipe, shapes, dtypes and fingerprints, sealed.

The seal is a SHA-256 of all the rest, so that an edit of any of it is found before an array is
read.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_DTYPE = re.compile(r"[a-z0-9_]{1,40}")
Arrays = dict[str, Any]  # path → [shape, dtype]


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says why, in a few words."""


@dataclass(frozen=True)
class Manifest:
    """What a step holds, and the recipe that it was saved with.

    arrays: path → [shape, dtype]. fingerprints: by path, None where they were not saved. recipe:
    as JSON, empty where it was not sealed.
    """

    arrays: Arrays
    fingerprints: dict[str, str] | None
    recipe: dict[str, Any]


def seal(step: int, recipe: Any, arrays: Arrays, fingerprints: dict[str, str]) -> dict[str, Any]:
    """The manifest of a step as JSON."""
    content = {"step": step, "recipe": recipe, "arrays": arrays, "fingerprints": fingerprints}
    content = json.loads(json.dumps(content))
    return {**content, "seal": _digest(content)}


def opened(content: Any, step: int) -> Manifest:
    """The manifest of step `step` from its JSON.

    A checkpoint from before there were fingerprints has neither these nor a seal.

    Raises:
      Damaged: it was changed, is of another step, or is no manifest.
    """
    if not isinstance(content, dict) or not _are_arrays(content.get("arrays")):
        raise Damaged("it has no manifest")
    arrays = content["arrays"]
    if not content.keys() & {"seal", "fingerprints", "step"}:
        return Manifest(arrays, None, {})
    body = {k: v for k, v in content.items() if k != "seal"}
    if content.get("seal") != _digest(body):
        raise Damaged("its manifest was changed")
    if content.get("step") != step:
        raise Damaged(f"its manifest is of step {content.get('step')}")
    prints: Any = content.get("fingerprints")
    if not _are_fingerprints(prints) or prints.keys() != arrays.keys():
        raise Damaged("its manifest has no fingerprint of some array")
    found: Any = content.get("recipe")
    return Manifest(arrays, prints, found if isinstance(found, dict) else {})


def check_name(name: str) -> None:
    """Raises ValueError for a name that could stand for another place or another parameter."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name of a parameter: 1 to 100 letters, digits, _ and - are"
        )


def differences(saved: dict[str, str], found: dict[str, str]) -> list[str]:
    """Paths whose fingerprints are missing on one side or differ."""
    return sorted(k for k in saved.keys() | found.keys() if saved.get(k) != found.get(k))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _are_arrays(arrays: Any) -> bool:
    return isinstance(arrays, dict) and bool(arrays) and all(map(_is_array, arrays.values()))


def _is_array(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], list):
        return False
    shape, dtype = value
    sizes = all(type(n) is int and n >= 0 for n in shape)
    return sizes and isinstance(dtype, str) and bool(_DTYPE.fullmatch(dtype))


def _are_fingerprints(prints: Any) -> bool:
    return isinstance(prints, dict) and all(
        isinstance(v, str) and _FINGERPRINT.fullmatch(v) for v in prints.values()
    )
