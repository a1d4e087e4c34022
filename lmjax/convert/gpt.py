# SPDX-License-Identifier: Apache-2.0
"""GPT-1 and GPT-2 in folders of the Hugging Face hub.

The hub's kernels of these two are (in, out), as ours are, and the fused projection lists queries,
keys, values and in each the heads; so every tensor is the same row of numbers in both formats, and
conversion is a new name and a reshape. Only the tables differ: ours have padding, and GPT-1's
positions are rows of the token table.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lmjax import sharding
from lmjax.convert import hub
from lmjax.convert.hub import Info
from lmjax.layers import padded
from lmjax.models.gpt import GPT

# In each block: the hub's name, ours, and the hub's shape in widths.
_BLOCK = {
    "ln_1.weight": ("norm_1/scale", (1,)),
    "ln_1.bias": ("norm_1/bias", (1,)),
    "attn.c_attn.weight": ("attention/qkv/kernel", (1, 3)),
    "attn.c_attn.bias": ("attention/qkv/bias", (3,)),
    "attn.c_proj.weight": ("attention/out/kernel", (1, 1)),
    "attn.c_proj.bias": ("attention/out/bias", (1,)),
    "ln_2.weight": ("norm_2/scale", (1,)),
    "ln_2.bias": ("norm_2/bias", (1,)),
    "mlp.c_fc.weight": ("mlp/up/kernel", (1, 4)),
    "mlp.c_fc.bias": ("mlp/up/bias", (4,)),
    "mlp.c_proj.weight": ("mlp/down/kernel", (4, 1)),
    "mlp.c_proj.bias": ("mlp/down/bias", (1,)),
}
_FINAL = {"ln_f.weight": "final_norm/scale", "ln_f.bias": "final_norm/bias"}
# Causal masks and place numbers, which some files store among the weights.
_BUFFERS = re.compile(r"(h\.\d+\.attn\.(bias|masked_bias)|position_ids)$")

# What changes the function and has one value that `GPT` can express: (key, allowed values). An
# absent key has the library's default, which is the first one. GPT-1's "gelu" is the tanh form.
_FIXED: dict[str, hub.Settings] = {
    "gpt2": (
        ("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
        ("scale_attn_weights", (True,)),
        ("scale_attn_by_inverse_layer_idx", (False,)),
        ("reorder_and_upcast_attn", (False,)),
        ("add_cross_attention", (False,)),
    ),
    "openai-gpt": (("afn", ("gelu",)),),
}
_FIXED_IN_BOTH = (
    ("layer_norm_epsilon", (1e-5,)),
    ("tie_word_embeddings", (True,)),
    ("pruned_heads", ({}, None)),
    ("quantization_config", (None,)),
)
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_TABLES = {
    "gpt2": ("wte.weight", "wpe.weight"),
    "openai-gpt": ("tokens_embed.weight", "positions_embed.weight"),
}


def import_gpt2(folder: Path | str) -> tuple[GPT, Any, Info]:
    """The model in a folder with GPT-2's or GPT-1's config.json and safetensors.

    Returns:
      The model, its parameters as float32 numpy arrays in our layout, and what else was said.

    Raises:
      ValueError: a file is missing or damaged; a setting is one that `GPT` cannot express; tensors
        are missing, extra, of another shape or not tied.
    """
    folder = Path(folder)
    config, path = hub.read_config(folder)
    model, notes = _model(config, path)
    found = hub.stored(folder, lambda name: name.removeprefix("transformer."), _BUFFERS)
    table = _TABLES[_model_type(model)][0]
    tensors = dict(hub.without_copies(found, {"lm_head.weight": table}, folder))
    hub.check_names(tensors, hub_shapes(model), folder)
    eos = config.get("eos_token_id")
    info = Info(_model_type(model), eos if type(eos) is int else None, notes)
    return model, _to_params(model, tensors), info


def export_gpt2(
    folder: Path | str,
    model: GPT,
    params: Any,
    tokenizer_files: Mapping[str, bytes] | Path | None = None,
    eot: int | None = None,
) -> None:
    """Writes a folder that `GPT2LMHeadModel.from_pretrained` reads; GPT-1's form as `openai-gpt`.

    What was written is read again and must give the same logits; the folder appears whole or not
    at all. `tokenizer_files` (contents by name, or a folder of files) go beside the weights; `eot`
    is the id that generation ends with.

    Raises:
      ValueError: the folder exists and is not empty, the format cannot express the model, or the
        parameters are not the model's.
    """
    config = _config(model, eot)
    others = hub.tokenizer_contents(tokenizer_files)
    params = jax.device_get(params)
    tensors = hub_tensors(model, params)
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    with hub.appearing(folder) as temporary:
        jsons = {"config.json": config, "generation_config.json": ends}
        hub.fill(temporary, tensors, jsons, others)
        again, read_params, _ = import_gpt2(temporary)
        rows = padded(2, sharding.axis_size(*sharding.BATCH_AXES))
        random = np.random.default_rng(0)
        tokens_BL = random.integers(0, model.vocab, (rows, min(model.context, 16)), np.int32)
        first, second = _logits(model, params, tokens_BL), _logits(again, read_params, tokens_BL)
        hub.check_equal(temporary, {"logits": first}, {"logits": second})


def hub_shapes(model: GPT) -> dict[str, tuple[int, ...]]:
    """The hub's tensors of a model: shape by name, in the hub's order."""
    tokens, positions = _TABLES[_model_type(model)]
    shapes = {tokens: (model.vocab, model.width), positions: (model.context, model.width)}
    for layer in range(model.depth):
        for name, (_, widths) in _BLOCK.items():
            shapes[f"h.{layer}.{name}"] = tuple(n * model.width for n in widths)
    return shapes | ({} if model.one_table else {name: (model.width,) for name in _FINAL})


def hub_tensors(model: GPT, params: Any) -> dict[str, np.ndarray]:
    """Parameters (or gradients) of a model under the hub's names, in its shapes, without padding.

    Raises:
      ValueError: `params` does not have the arrays of `model`.
    """
    flat = hub.our_arrays(model, params)
    tables = _TABLES[_model_type(model)]
    if model.one_table:
        both = np.split(flat["embedding"][: model.rows], [model.vocab])
    else:
        both = [flat["embedding"][: model.vocab], flat["positions"]]
    tensors = dict(zip(tables, both, strict=True))
    for name, shape in hub_shapes(model).items():
        if name in _FINAL:
            tensors[name] = flat[_FINAL[name]]
        elif name not in tables:
            _, layer, inner = name.split(".", 2)
            tensors[name] = flat[f"blocks/{_BLOCK[inner][0]}"][int(layer)].reshape(shape)
    return {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}


def _to_params(model: GPT, tensors: dict[str, np.ndarray]) -> Any:
    """The inverse of `hub_tensors`; takes the tensors out of the dict as it goes."""
    tokens, positions = (tensors.pop(name) for name in _TABLES[_model_type(model)])
    flat: dict[str, np.ndarray] = {}
    if model.one_table:
        tokens = np.concatenate([tokens, positions])
    else:
        flat["positions"] = positions
    flat["embedding"] = np.pad(tokens, ((0, padded(model.rows) - model.rows), (0, 0)))
    for name, shape in hub.our_shapes(model).items():
        if name.startswith("blocks/"):
            theirs = next(h for h, (ours, _) in _BLOCK.items() if name == f"blocks/{ours}")
            layers = [tensors.pop(f"h.{layer}.{theirs}") for layer in range(model.depth)]
            flat[name] = np.stack(layers).reshape(shape)
    flat |= {ours: tensors.pop(name) for name, ours in _FINAL.items() if name in tensors}
    assert {k: v.shape for k, v in flat.items()} == hub.our_shapes(model) and not tensors
    return traverse_util.unflatten_dict(flat, sep="/")


def _model(config: dict[str, Any], path: Path) -> tuple[GPT, tuple[str, ...]]:
    model_type = config.get("model_type")
    if model_type not in _TABLES:
        raise ValueError(f"{path}: model_type={model_type!r}; allowed are {', '.join(_TABLES)}")
    hub.check_sizes(config, path, _SIZES)
    width, context = config["n_embd"], config["n_positions"]
    sizes = (("n_inner", (None, 4 * width)), ("n_ctx", (context, None)))
    hub.check_settings(config, path, (*sizes, *_FIXED[model_type], *_FIXED_IN_BOTH))
    if width % config["n_head"]:
        raise ValueError(f"{path}: n_embd={width} is not a multiple of n_head={config['n_head']}")
    rates = {
        key: hub.rate(config, key, path) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    }
    notes = ()
    if rates["resid_pdrop"] != rates["embd_pdrop"]:
        notes = (f"embd_pdrop={rates['embd_pdrop']} is read as resid_pdrop={rates['resid_pdrop']}",)
    first = model_type == "openai-gpt"
    model = GPT(
        vocab=config["vocab_size"], context=context, depth=config["n_layer"], width=width,
        heads=config["n_head"], norm="post" if first else "pre", one_table=first,
        dropout=rates["resid_pdrop"], attention_dropout=rates["attn_pdrop"],
    )  # fmt: skip
    return model, notes


def _model_type(model: GPT) -> str:
    forms = {("pre", False): "gpt2", ("post", True): "openai-gpt"}
    if (model.norm, model.one_table) not in forms:
        raise ValueError(
            f"norm={model.norm!r} with one_table={model.one_table} has no format on the hub; "
            "allowed: norm='pre' without one_table (GPT-2), norm='post' with it (GPT-1)"
        )
    return forms[model.norm, model.one_table]


def _config(model: GPT, eot: int | None) -> dict[str, Any]:
    if eot is not None and not 0 <= eot < model.vocab:
        raise ValueError(f"eot={eot}: allowed are 0 to {model.vocab - 1}")
    first = _model_type(model) == "openai-gpt"
    act = {"afn": "gelu"} if first else {"activation_function": "gelu_new", "n_inner": None}
    return {
        "model_type": _model_type(model),
        "architectures": ["OpenAIGPTLMHeadModel" if first else "GPT2LMHeadModel"],
        "vocab_size": model.vocab,
        "n_positions": model.context,
        "n_embd": model.width,
        "n_layer": model.depth,
        "n_head": model.heads,
        **act,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
    }


def _logits(model: GPT, params: Any, tokens_BL: np.ndarray) -> np.ndarray:
    @jax.jit
    def logits(params: Any) -> jax.Array:
        outputs: Any = _plain(model).apply({"params": params}, {"tokens_BL": tokens_BL})
        return outputs.readout.logits(outputs.hidden_BLD)

    return np.asarray(logits(params))


def _plain(model: GPT) -> GPT:
    """The same weights without what training chose, so that equal models are equal programs."""
    return model.clone(dtype="float32", kernel="auto", unroll=0, cross_documents=True)
