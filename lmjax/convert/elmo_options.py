# SPDX-License-Identifier: Apache-2.0
"""bilm-tf's options.json as the fields of `ELMo`, and back."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.convert import hub
from lmjax.models.elmo import ELMo
from lmjax.recipe import nearest

# Options of the network, each with whether it must be there.
_LSTM = {
    "dim": True,
    "projection_dim": True,
    "n_layers": False,
    "cell_clip": False,
    "proj_clip": False,
    "use_skip_connections": False,
}
_CNN = {
    "n_characters": True,
    "max_characters_per_token": True,
    "embedding": True,
    "filters": True,
    "activation": True,
    "n_highway": False,
}
_ACTIVATIONS = ("relu", "tanh")
# Rows of the table: bytes and the signs of words and sentences. A reader adds one for padding, so
# its options say 262 of the same file.
_CHARACTERS = (261, 262)
# Options of the original's training run, which is over.
_TRAINING = (
    "all_clip_norm_val", "batch_size", "learning_rate", "n_epochs", "n_train_tokens", "n_gpus",
    "unroll_steps", "sample_softmax", "n_tokens_vocab",
)  # fmt: skip


def read(options: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], int, tuple[str, ...]]:
    """(fields of `ELMo`, the most characters of a word or 0, notes on what was not read).

    Raises:
      ValueError: an option is missing, unknown or cannot be expressed; names it and what can.
    """
    lstm = _part(options, "lstm", _LSTM, path)
    hub.check_settings(options, path, (("bidirectional", (True,)),))
    fields = _of_lstm(lstm, path)
    if "char_cnn" in options:
        cnn = _part(options, "char_cnn", _CNN, path)
        hub.check_settings(options, path, (("share_embedding_softmax", (False,)),))
        fields |= _of_cnn(cnn, path)
        characters = cnn["max_characters_per_token"]
    else:
        tied = _flag(options, "share_embedding_softmax", path)
        fields |= {"input": "words", "tied": tied}
        characters = 0
    if "dropout" in options:
        fields["dropout"] = hub.rate(options, "dropout", path)
    if "n_negative_samples_batch" in options:
        hub.check_sizes(options, path, ("n_negative_samples_batch",))
        fields["negatives"] = options["n_negative_samples_batch"]
    known = {"lstm", "char_cnn", "bidirectional", "share_embedding_softmax", "dropout"}
    others = sorted(set(options) - known - {"n_negative_samples_batch", *_TRAINING})
    notes = (f"{path} has options that are not read: {', '.join(others)}",) if others else ()
    return fields, characters, notes


def written(model: ELMo, characters: int) -> dict[str, Any]:
    """The options.json of a model whose words have so many characters at most."""
    lstm = {
        "use_skip_connections": model.skip,
        "projection_dim": model.width,
        "cell_clip": _clip_written(model.cell_clip),
        "proj_clip": _clip_written(model.projection_clip),
        "dim": model.cells,
        "n_layers": model.depth,
    }
    if model.input == "words":
        tied = {"share_embedding_softmax": True} if model.tied else {}
        return {"lstm": lstm, "n_tokens_vocab": model.vocab, **tied}
    cnn = {
        "activation": model.activation,
        "filters": [list(pair) for pair in model.filters],
        "n_highway": model.highways,
        "embedding": {"dim": model.embedding},
        "n_characters": _CHARACTERS[1],
        "max_characters_per_token": characters,
    }
    return {"lstm": lstm, "char_cnn": cnn}


def _part(
    options: Mapping[str, Any], name: str, keys: Mapping[str, bool], path: Path
) -> dict[str, Any]:
    """One of the two objects, with the keys that it must have and no unknown ones."""
    part = options.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"{path}: {name}={part!r}; an object with {', '.join(keys)} is needed")
    for key in part:
        if key not in keys:
            near = nearest(key, keys)
            raise ValueError(f"{path}: unknown option {name}.{key}; did you mean {near}?")
    missing = [key for key, needed in keys.items() if needed and key not in part]
    if missing:
        raise ValueError(f"{path}: {name} has no {', '.join(missing)}")
    return part


def _of_lstm(lstm: dict[str, Any], path: Path) -> dict[str, Any]:
    lstm = {"n_layers": 1, **lstm}
    hub.check_sizes(lstm, path, ("dim", "projection_dim", "n_layers"))
    if lstm["projection_dim"] > lstm["dim"]:
        raise ValueError(
            f"{path}: projection_dim={lstm['projection_dim']} is above dim={lstm['dim']}; allowed"
            " are projections to as many or fewer"
        )
    # Without a projection, which equal sizes have not, the original does not clip it.
    same = lstm["projection_dim"] == lstm["dim"]
    return {
        "depth": lstm["n_layers"],
        "cells": lstm["dim"],
        "width": lstm["projection_dim"],
        "cell_clip": _clip(lstm, "cell_clip", path),
        "projection_clip": 0.0 if same else _clip(lstm, "proj_clip", path),
        "skip": _flag(lstm, "use_skip_connections", path),
    }


def _of_cnn(cnn: dict[str, Any], path: Path) -> dict[str, Any]:
    if cnn["n_characters"] not in _CHARACTERS:
        raise ValueError(
            f"{path}: n_characters={cnn['n_characters']!r}; allowed are 261 (of training) and 262"
        )
    _check_length(cnn, path)
    hub.check_settings(cnn, path, (("activation", _ACTIVATIONS),))
    embedding = cnn["embedding"] if isinstance(cnn["embedding"], dict) else {}
    hub.check_sizes(embedding, path, ("dim",))
    highways = cnn.get("n_highway") or 0
    if type(highways) is not int or highways < 0:
        raise ValueError(f"{path}: n_highway={highways!r}; a whole number or null is needed")
    return {
        "input": "characters",
        "tied": False,
        "embedding": embedding["dim"],
        "filters": _filters(cnn["filters"], cnn["max_characters_per_token"], path),
        "highways": highways,
        "activation": cnn["activation"],
    }


def _check_length(cnn: dict[str, Any], path: Path) -> None:
    longest = cnn["max_characters_per_token"]
    if type(longest) is not int or longest < 3:
        raise ValueError(
            f"{path}: max_characters_per_token={longest!r}; at least 3 are needed, for a word has"
            " two ends"
        )


def _filters(found: Any, longest: int, path: Path) -> tuple[tuple[int, int], ...]:
    pairs = found if isinstance(found, list) else []
    if not pairs or not all(_is_filter(pair, longest) for pair in pairs):
        raise ValueError(
            f"{path}: filters={found!r}; a list of [width, number] is needed, no width above"
            f" max_characters_per_token={longest}"
        )
    return tuple((width, count) for width, count in pairs)


def _is_filter(pair: Any, longest: int) -> bool:
    whole = isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
    return whole and 1 <= pair[0] <= longest and pair[1] >= 1


def _clip(part: Mapping[str, Any], key: str, path: Path) -> float:
    """A bound, 0.0 for none: null, an absent key and 0 all mean that to AllenNLP."""
    value = part.get(key) or 0
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{path}: {key}={value!r}; a number above 0, or null, is needed")
    return float(value)


def _clip_written(value: float) -> float | int | None:
    if not value:
        return None
    return int(value) if value == int(value) else value


def _flag(part: Mapping[str, Any], key: str, path: Path) -> bool:
    value = part.get(key) or False
    if type(value) is not bool:
        raise ValueError(f"{path}: {key}={value!r}; true or false is needed")
    return value
