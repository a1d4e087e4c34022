# SPDX-License-Identifier: Apache-2.0
"""Google's BERT checkpoints (bert_config.json and bert_model.ckpt.*) in the hub's terms."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.convert import hub
from lmjax.convert.tf_checkpoint import Checkpoint
from lmjax.layers import Activation

CONFIG = "bert_config.json"
# What training keeps beside the weights.
_STATE = re.compile(r"(/adam_[mv]|/AdamWeightDecayOptimizer(_\d)?|^global_step)$")
_RENAMED = (
    (r"^(cls/\w+)/output_bias$", r"\1/bias"),
    (r"^(cls/\w+)/output_weights$", r"\1/weight"),
    (r"^(bert/embeddings/\w+_embeddings)$", r"\1/weight"),
    (r"/layer_(\d+)/", r"/layer/\1/"),
    (r"/(kernel|gamma)$", "/weight"),
    (r"/beta$", "/bias"),
)
_OURS = re.compile(r"bert/|cls/(predictions|seq_relationship)/")


def google_prefix(source: Path) -> Path | None:
    """The prefix of the checkpoint that `source` is or holds; None if it is no such thing.

    Raises:
      ValueError: the folder has several checkpoints and none of Google's usual name.
    """
    if Path(f"{source}.index").is_file():
        return source
    if not (source / CONFIG).is_file():
        return None
    found = sorted(p.with_suffix("") for p in source.glob("*.index"))
    usual = source / "bert_model.ckpt"
    if usual in found or not found:
        return usual
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{source} has several checkpoints; name one of them: {source}/({names})")
    return found[0]


def read_google(
    prefix: Path, gelu: Activation
) -> tuple[dict[str, Any], Path, dict[str, np.ndarray], tuple[str, ...]]:
    """Settings, their file, tensors by the hub's names without prefix, and notes.

    gelu: what the word "gelu" stands for. Google's code computed the exact function until February
    2019 and the tanh formula since, and writes the same word for both.

    Raises:
      ValueError: a file is missing, damaged, or not of BERT.
    """
    path = prefix.parent / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist; Google's checkpoints come with one")
    written = hub.read_object(path)
    config = {"layer_norm_eps": 1e-12, "type_vocab_size": 16} | written | {"model_type": "bert"}
    notes: list[str] = []
    if config.get("hidden_act") == "gelu":
        config["hidden_act"] = "gelu" if gelu == "gelu_erf" else "gelu_new"
        other = "gelu_tanh" if gelu == "gelu_erf" else "gelu_erf"
        notes.append(
            f"{CONFIG} says gelu, which is exact (gelu_erf) in Google's code of 2018 and a tanh"
            f" formula since February 2019: read as {gelu}; import with --model.activation={other}"
            " for the other"
        )
    checkpoint = Checkpoint(prefix)
    weights = [name for name in checkpoint if not _STATE.search(name)]
    others = [name for name in weights if not _OURS.match(name)]
    if others:
        notes.append(f"not read: {', '.join(others)}")
    tensors: dict[str, np.ndarray] = {}
    for name in weights:
        if name not in others:
            if not checkpoint.is_float32(name):
                raise ValueError(f"{prefix}: {name} is not of float32")
            values = checkpoint[name]
            tensors[hub_name(name)] = values.T if name.endswith("/kernel") else values
    return config, path, tensors, tuple(notes)


def hub_name(name: str) -> str:
    """The hub's name, without prefix, of one of Google's tensors."""
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name.replace("/", ".").removeprefix("bert.")
