# SPDX-License-Identifier: Apache-2.0
"""GPT-1 and GPT-2 folders of the Hugging Face hub: config.json and safetensors, in and out.

The hub's kernels of these two are (in, out), as ours are, and the fused projection lists queries,
keys, values and in each the heads; so every tensor is the same row of numbers in both formats, and
conversion is a new name and a reshape. Only the tables differ: ours have padding, and GPT-1's
positions are rows of the token table.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lmjax import sharding
from lmjax.layers import padded
from lmjax.models.gpt import GPT
from lmjax.recipe import dump
from lmjax.workdir import read_json

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OURS = ("config.json", "generation_config.json", WEIGHTS)

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
_FIXED: dict[str, tuple[tuple[str, tuple[Any, ...]], ...]] = {
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
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Info:
    """What a folder says beside the model.

    model_type: "gpt2" or "openai-gpt". eos: id of the end of text, if named. notes: what was read
    in another way than the folder says.
    """

    model_type: str
    eos: int | None
    notes: tuple[str, ...]


def import_gpt2(folder: Path | str) -> tuple[GPT, Any, Info]:
    """The model in a folder with GPT-2's or GPT-1's config.json and safetensors.

    Returns:
      The model, its parameters as float32 numpy arrays in our layout, and what else was said.

    Raises:
      ValueError: a file is missing or damaged; a setting is one that `GPT` cannot express; tensors
        are missing, extra, of another shape or not tied.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a folder in the hub's format has one")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object")
    model, notes = _model(config, path)
    tensors = dict(_without_copies(_stored(folder), _TABLES[_model_type(model)][0], folder))
    _check_names(tensors, hub_shapes(model), folder)
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
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder")
    config = _config(model, eot)
    others = _tokenizer_contents(tokenizer_files)
    params = jax.device_get(params)
    tensors = hub_tensors(model, params)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        ends = {"bos_token_id": eot, "eos_token_id": eot}
        texts = {"config.json": dump(config), "generation_config.json": dump(ends)}
        for name, content in ({n: t.encode() for n, t in texts.items()} | others).items():
            (temporary / name).write_bytes(content)
        shutil.copymode(temporary / "config.json", temporary / WEIGHTS)  # it comes as 0600
        _check_written(temporary, model, params)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    wanted = _our_shapes(model)
    found = {name: tuple(np.shape(x)) for name, x in flat.items()}
    if found != wanted:
        differing = sorted(k for k in found | wanted if found.get(k) != wanted.get(k))
        raise ValueError(f"these parameters are not the model's: {', '.join(differing)}")
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
    for name, shape in _our_shapes(model).items():
        if name.startswith("blocks/"):
            hub = next(h for h, (ours, _) in _BLOCK.items() if name == f"blocks/{ours}")
            layers = [tensors.pop(f"h.{layer}.{hub}") for layer in range(model.depth)]
            flat[name] = np.stack(layers).reshape(shape)
    flat |= {ours: tensors.pop(hub) for hub, ours in _FINAL.items() if hub in tensors}
    assert {k: v.shape for k, v in flat.items()} == _our_shapes(model) and not tensors
    return traverse_util.unflatten_dict(flat, sep="/")


def _our_shapes(model: GPT) -> dict[str, tuple[int, ...]]:
    tokens_BL = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = jax.eval_shape(_plain(model).init, jax.random.key(0), {"tokens_BL": tokens_BL})
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(init["params"], sep="/"))
    return {name: x.shape for name, x in flat.items()}


def _model(config: dict[str, Any], path: Path) -> tuple[GPT, tuple[str, ...]]:
    model_type = config.get("model_type")
    if model_type not in _TABLES:
        raise ValueError(f"{path}: model_type={model_type!r}; allowed are {', '.join(_TABLES)}")
    for key in _SIZES:
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{path}: {key}={config.get(key)!r}; a whole number is needed")
    width, context = config["n_embd"], config["n_positions"]
    allowed = (
        ("n_inner", (None, 4 * width)),
        ("n_ctx", (context, None)),
        *_FIXED[model_type],
        *_FIXED_IN_BOTH,
    )
    for key, values in allowed:
        value = config.get(key, values[0])
        if value not in values:
            named = " or ".join(json.dumps(v) for v in values)
            raise ValueError(f"{path}: {key}={json.dumps(value)}; allowed: {named}")
    if width % config["n_head"]:
        raise ValueError(f"{path}: n_embd={width} is not a multiple of n_head={config['n_head']}")
    rates = {key: _rate(config, key, path) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
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


def _rate(config: dict[str, Any], key: str, path: Path) -> float:
    rate = config.get(key, 0.1)
    if type(rate) not in (int, float) or not 0 <= rate < 1:
        raise ValueError(f"{path}: {key}={rate!r}; allowed are numbers from 0 to below 1")
    return float(rate)


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


def _stored(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name without prefix, float32 values) of every tensor in a folder that is a weight."""
    index = folder / _INDEX
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif index.is_file():
        found = read_json(index)
        weight_map = found.get("weight_map") if isinstance(found, dict) else None
        files = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if not files or any(Path(f).name != f for f in files):
            raise ValueError(f"{index}: weight_map names {files}; allowed: files of this folder")
    else:
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {_INDEX}; only safetensors are read")
    for file in files:
        try:
            with safe_open(folder / file, framework="numpy") as opened:
                for name in opened.keys():
                    if not _BUFFERS.search(name):
                        dtype = opened.get_slice(name).get_dtype()
                        if dtype not in _FLOATS:
                            raise ValueError(
                                f"{folder / file}: {name} is {dtype}; allowed: {', '.join(_FLOATS)}"
                            )
                        values = np.asarray(opened.get_tensor(name), np.float32)
                        yield name.removeprefix("transformer."), values
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} cannot be read: {error}") from None


def _without_copies(
    stored: Iterator[tuple[str, np.ndarray]], table: str, folder: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors without a tied readout, which must equal the table."""
    seen: set[str] = set()
    held: dict[str, np.ndarray] = {}
    for name, values in stored:
        if name in seen:
            raise ValueError(f"{folder}: tensor {name} is stored twice")
        seen.add(name)
        if name in (table, "lm_head.weight"):
            held[name] = values
        if name != "lm_head.weight":
            yield name, values
    head = held.get("lm_head.weight")
    if head is not None and table in held and not np.array_equal(head, held[table]):
        raise ValueError(
            f"{folder}: lm_head.weight differs from {table}; allowed is a readout tied to the table"
        )


def _check_names(
    tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Raises ValueError with every tensor that is missing, extra or of another shape."""
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    other = [
        f"{name} {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    found = (("missing", missing), ("extra", extra), ("of another shape", other))
    parts = [f"{word}: {', '.join(names)}" for word, names in found if names]
    if parts:
        raise ValueError(f"{folder}: the tensors do not fit config.json; {'; '.join(parts)}")


def _tokenizer_contents(files: Mapping[str, bytes] | Path | None) -> dict[str, bytes]:
    if isinstance(files, Path):
        if not files.is_dir():
            raise ValueError(f"{files} is no folder of tokenizer files")
        files = {p.name: p.read_bytes() for p in sorted(files.iterdir()) if p.is_file()}
    contents = dict(files or {})
    bad = [name for name in contents if name in _OURS or Path(name).name != name]
    if bad:
        raise ValueError(f"tokenizer files {', '.join(bad)}: allowed are names but {_OURS}")
    return contents


def _check_written(folder: Path, model: GPT, params: Any) -> None:
    """Raises ValueError unless the files give the logits of `params`, bit for bit."""
    again, read_params, _ = import_gpt2(folder)
    rows = padded(2, sharding.axis_size(*sharding.BATCH_AXES))
    random = np.random.default_rng(0)
    tokens_BL = random.integers(0, model.vocab, (rows, min(model.context, 16)), np.int32)
    first, second = _logits(model, params, tokens_BL), _logits(again, read_params, tokens_BL)
    if not np.array_equal(first, second, equal_nan=True):
        raise ValueError(f"{folder}: the files that were written do not give the model's logits")


def _logits(model: GPT, params: Any, tokens_BL: np.ndarray) -> np.ndarray:
    @jax.jit
    def logits(params: Any) -> jax.Array:
        outputs: Any = _plain(model).apply({"params": params}, {"tokens_BL": tokens_BL})
        return outputs.readout.logits(outputs.hidden_BLD)

    return np.asarray(logits(params))


def _plain(model: GPT) -> GPT:
    """The same weights without what training chose, so that equal models are equal programs."""
    return model.clone(dtype="float32", kernel="auto", unroll=0, cross_documents=True)
