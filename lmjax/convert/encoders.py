# SPDX-License-Identifier: Apache-2.0
"""BERT, ERNIE, RoBERTa, ALBERT and ELECTRA from published folders, and as such folders.

A folder of the hub has config.json and safetensors; Google's has bert_config.json and a TensorFlow
checkpoint. ELECTRA's two encoders are two folders, `discriminator` and `generator`, in one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lmjax import sharding
from lmjax.convert import encoder_config, hub
from lmjax.convert.encoder_config import read_sizes, write_config
from lmjax.convert.encoder_names import (
    FAMILIES,
    Heads,
    Sizes,
    Slots,
    find_heads,
    full_name,
    plain_name,
    slots,
)
from lmjax.convert.google import google_prefix, read_google
from lmjax.convert.hub import Info
from lmjax.layers import padded
from lmjax.models.albert import ALBERT
from lmjax.models.bert import BERT
from lmjax.models.electra import ELECTRA
from lmjax.step import init_params

Encoder = BERT | ALBERT | ELECTRA
Tensors = dict[str, np.ndarray]
PARTS = ("discriminator", "generator")
# Place numbers and types, which some files store among the weights.
_BUFFERS = re.compile(r"embeddings\.(position_ids|token_type_ids)$")
_TYPES = "embeddings.token_type_embeddings.weight"


def import_encoder(source: Path | str, like: Any = None) -> tuple[Encoder, Any, Info]:
    """The model in a published folder, with the heads whose tensors are there.

    source: a folder of the hub, one with ELECTRA's two, or Google's (or its checkpoint's prefix).
    like: a model that settles what a folder leaves open: which GELU Google's is (tanh without one),
      the sizes of an absent generator (a quarter of the discriminator's without one).

    Returns:
      The model, its parameters as float32 numpy arrays in our layout, and what else was said.

    Raises:
      ValueError: a file is missing or damaged; a setting is one that the models cannot express;
        tensors are missing, extra, of another shape or not tied.
    """
    source = Path(source)
    exact = getattr(like, "activation", "") == "gelu_erf"
    if all((source / part / "config.json").is_file() for part in PARTS):
        return _electra(source / PARTS[0], source / PARTS[1], like)
    prefix = None if (source / "config.json").is_file() else google_prefix(source)
    if prefix is not None:
        config, path, tensors, notes = read_google(prefix, "gelu_erf" if exact else "gelu_tanh")
        return _single(config, path, tensors, notes)
    config, path = hub.read_config(source)
    if encoder_config.family_of(config, path) == "electra":
        return _electra(source, None, like)
    return _single(config, path, _read(source, encoder_config.family_of(config, path)), ())


def export_encoder(
    folder: Path | str,
    model: Encoder,
    params: Any,
    tokenizer_files: Mapping[str, bytes] | Path | None = None,
    controls: Mapping[str, int] | None = None,
) -> None:
    """Writes a folder that the transformers library reads; of ELECTRA, one with its two.

    What was written is read again and must give the same outputs of every head, bit for bit; the
    folder appears whole or not at all. `tokenizer_files` (contents by name, or a folder of files)
    go beside the weights; `controls` are the tokeniser's ids of cls, sep, mask and pad.

    Raises:
      ValueError: the folder exists and is not empty, the format cannot express the model, or the
        parameters are not the model's.
    """
    others = hub.tokenizer_contents(tokenizer_files)
    flat = hub.our_arrays(model, params)
    parts = _parts(model, dict(controls or {}))
    with hub.appearing(folder) as temporary:
        for name, (config, wanted) in parts.items():
            (temporary / name).mkdir(exist_ok=True)
            tensors = _published(config["model_type"], wanted, flat)
            hub.fill(temporary / name, tensors, {"config.json": config}, others)
        again, read_params, _ = import_encoder(temporary)
        batch = _example(model)
        wrote, read = _outputs(model, params, batch), _outputs(again, read_params, batch)
        hub.check_equal(temporary, wrote, read)


def hub_tensors(model: BERT | ALBERT, params: Any) -> Tensors:
    """Parameters (or gradients) under the hub's names, in its shapes, without padding."""
    family, sizes, heads = encoder_config.encoder_of(model)
    return _published(family, slots(family, sizes, heads), hub.our_arrays(model, params))


def _single(
    config: dict[str, Any], path: Path, tensors: Tensors, notes: tuple[str, ...]
) -> tuple[Encoder, Any, Info]:
    """A model with one encoder from its settings and tensors."""
    family, sizes = config["model_type"], read_sizes(config, path)
    heads = find_heads(family, _shapes(tensors), _scores_tokens(config))
    if family == "roberta" and heads.sequence and "pooler.dense.weight" in tensors:
        tensors = {name: x for name, x in tensors.items() if not name.startswith("pooler.")}
        notes += ("the pooler is not read: RoBERTa's classifier has one of its own",)
    if (heads.pair or heads.sequence) and not heads.pooler:
        raise ValueError(f"{path.parent}: a head on the pooled state, but no pooler")
    _check_activation(family, sizes, heads, path.parent)
    model = encoder_config.encoder_model(family, sizes, heads)
    params = _assemble(model, ((slots(family, sizes, heads), tensors, path.parent),))
    return model, params, Info(family, None, notes)


def _electra(discriminator: Path, generator: Path | None, like: Any) -> tuple[ELECTRA, Any, Info]:
    """ELECTRA from one or both of its folders; without a generator, a new one is drawn."""
    big, tensors = _electra_part(discriminator, Heads(replaced=True))
    wanted = slots("electra", big, Heads(replaced=True), "discriminator/")
    read = [(wanted, tensors, discriminator)]
    if generator is None:
        small = _new_generator(big, like)
        model = encoder_config.electra_model(big, small)
        drawn = jax.jit(lambda: init_params(model, 0))()
        note = f"{discriminator} has no generator: a new one of width {small.width} was drawn"
        return model, _assemble(model, tuple(read), drawn), Info("electra", None, (note,))
    small, helper = _electra_part(generator, Heads(masked=True))
    _check_pair(big, small, generator)
    for name in wanted:
        if name.startswith("embeddings.") and not np.array_equal(helper[name], tensors[name]):
            raise ValueError(f"{generator}: {name} differs from the discriminator's; they share it")
    read.append((slots("electra", small, Heads(masked=True), "generator/"), helper, generator))
    model = encoder_config.electra_model(big, small)
    return model, _assemble(model, tuple(read)), Info("electra", None, ())


def _electra_part(folder: Path, wanted: Heads) -> tuple[Sizes, Tensors]:
    """One of ELECTRA's encoders, which has that head; its tensors are checked."""
    config, path = hub.read_config(folder)
    if config.get("model_type") != "electra":
        raise ValueError(f"{path}: model_type={config.get('model_type')!r}; allowed is electra")
    sizes, tensors = read_sizes(config, path), _read(folder, "electra")
    if find_heads("electra", _shapes(tensors), None) != wanted:
        kind = PARTS[wanted.masked]
        raise ValueError(f"{folder} holds no {kind}; name a folder with {' and '.join(PARTS)}")
    _check_activation("electra", sizes, wanted, folder)
    shapes = {name: slot.shape for name, slot in slots("electra", sizes, wanted).items()}
    hub.check_names(tensors, shapes, folder)
    return sizes, tensors


def _check_pair(big: Sizes, small: Sizes, folder: Path) -> None:
    """Raises ValueError where the generator is no helper of this discriminator."""
    same = ("vocab", "context", "types", "narrow", "epsilon", "activation")
    for key in same:
        if getattr(big, key) != getattr(small, key):
            raise ValueError(
                f"{folder}: {key}={getattr(small, key)}, the discriminator's is"
                f" {getattr(big, key)}; allowed is the same"
            )


def _check_activation(family: str, sizes: Sizes, heads: Heads, folder: Path) -> None:
    if not encoder_config.masked_head_fits(family, sizes, heads):
        raise ValueError(
            f"{folder}: hidden_act is not gelu, which this family's masked-token head has in any"
            " case; allowed is gelu"
        )


def _new_generator(big: Sizes, like: Any) -> Sizes:
    """A generator of the sizes of `like`, or of a quarter of the width (Clark et al. 2020)."""
    if isinstance(like, ELECTRA):
        small = encoder_config.electra_sizes(like)[1]
        return big._replace(
            width=small.width, depth=small.depth, heads=small.heads, inner=small.inner
        )
    heads = max(1, big.heads // 4)
    width = heads * (big.width // big.heads)
    return big._replace(width=width, heads=heads, inner=4 * width)


def _read(folder: Path, family: str) -> Tensors:
    """A folder's tensors by their plain names, without copies."""
    found = hub.stored(folder, lambda name: plain_name(name, family), _BUFFERS)
    copies = dict(FAMILIES[family].copies)
    return dict(hub.without_copies(found, copies, folder))


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: values.shape for name, values in tensors.items()}


def _scores_tokens(config: dict[str, Any]) -> bool | None:
    """Whether `classifier` is a head on tokens, if the folder's class says so."""
    named = config.get("architectures")
    words = " ".join(map(str, named)) if isinstance(named, list) else ""
    if "ForTokenClassification" in words:
        return True
    return False if "ForSequenceClassification" in words else None


def _assemble(
    model: Encoder, read: tuple[tuple[Slots, Tensors, Path], ...], params: Any = None
) -> Any:
    """Our parameters from checked tensors; `params` are those that no folder has."""
    if params is None:
        flat = {name: np.zeros(shape, np.float32) for name, shape in hub.our_shapes(model).items()}
    else:
        drawn: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
        flat = {name: np.array(x, np.float32) for name, x in drawn.items()}
    for wanted, tensors, folder in read:
        hub.check_names(tensors, {name: slot.shape for name, slot in wanted.items()}, folder)
        for name, slot in wanted.items():
            slot.put(flat, tensors.pop(name))
    return traverse_util.unflatten_dict(flat, sep="/")


def _parts(model: Encoder, controls: dict[str, int]) -> dict[str, tuple[dict[str, Any], Slots]]:
    """Each folder to write, "" for the target itself: its config.json and its tensors."""
    if isinstance(model, ELECTRA):
        small = encoder_config.electra_sizes(model)[1]
        encoder_config.check_heads("electra", small, Heads(masked=True))
        kinds = zip(
            PARTS, encoder_config.electra_sizes(model), (Heads(replaced=True), Heads(masked=True)),
            strict=True,
        )  # fmt: skip
        return {
            part: (
                write_config("electra", _typed(sizes), heads, controls),
                slots("electra", sizes, heads, f"{part}/"),
            )
            for part, sizes, heads in kinds
        }
    family, sizes, heads = encoder_config.encoder_of(model)
    encoder_config.check_heads(family, sizes, heads)
    if sizes.offset and controls.get("pad", sizes.offset - 1) != sizes.offset - 1:
        raise ValueError(
            f"position_offset={sizes.offset}: the hub counts positions from the padding id, which"
            f" is {controls['pad']} here; allowed is {sizes.offset - 1}"
        )
    config = write_config(family, _typed(sizes), heads, controls)
    return {"": (config, slots(family, sizes, heads))}


def _typed(sizes: Sizes) -> Sizes:
    """The hub's models have a row for the first type at least."""
    return sizes._replace(types=max(1, sizes.types))


def _published(family: str, wanted: Slots, flat: Mapping[str, Any]) -> Tensors:
    tensors = {full_name(name, family): slot.take(flat) for name, slot in wanted.items()}
    if _TYPES not in wanted:
        width = flat["embeddings/embedding"].shape[1]
        tensors[full_name(_TYPES, family)] = np.zeros((1, width), np.float32)
    return tensors


def _example(model: Encoder) -> dict[str, np.ndarray]:
    """Random tokens, with two of them scored and padding in the second half of the rows."""
    rows = padded(2, sharding.axis_size(*sharding.BATCH_AXES))
    length, random = min(model.context, 16), np.random.default_rng(0)
    tokens_BL = random.integers(0, model.vocab, (rows, length), np.int32)
    segments_BL = np.ones((rows, length), np.int32)
    segments_BL[rows // 2 :, -(length // 3) :] = 0
    return {
        "tokens_BL": tokens_BL,
        "segments_BL": segments_BL,
        "types_BL": random.integers(0, max(1, model.types), (rows, length), np.int32),
        "masked_BP": np.tile(np.array([0, length - 1], np.int32), (rows, 1)),
        "firsts_BC": np.zeros((rows, 1), np.int32),
    }


def _outputs(model: Encoder, params: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """States, logits and every head's scores, in float32."""
    # The same weights without what training chose, so that equal models are equal programs.
    plain = model.clone(dtype="float32", kernel="auto", remat="none", unroll=0)

    @jax.jit
    def run(params: Any) -> dict[str, jax.Array]:
        inputs = {name: jnp.asarray(x) for name, x in batch.items()}
        outputs: Any = plain.apply({"params": params}, inputs)
        found = {"states": outputs.hidden_BLD, **outputs.heads}
        if "masked_BPE" in found:
            found["logits"] = outputs.readout.logits(found["masked_BPE"])
        return found

    return {name: np.asarray(x) for name, x in run(params).items()}
