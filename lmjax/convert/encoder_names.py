# SPDX-License-Identifier: Apache-2.0
"""What the hub calls the tensors of BERT, ERNIE, RoBERTa, ALBERT and ELECTRA, and where ours are.

PyTorch stores linear layers as (out, in), ours are (in, out); queries, keys and values are three
layers there and one array here; layers are counted in names there and stacked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lmjax.layers import Activation


class Sizes(NamedTuple):
    """One encoder: what its config.json says. narrow: width of the embeddings."""

    vocab: int
    context: int
    offset: int
    types: int
    narrow: int
    width: int
    depth: int
    heads: int
    inner: int
    activation: Activation
    epsilon: float
    dropout: float
    attention_dropout: float


class Heads(NamedTuple):
    """Which heads an encoder has; the classes of the last two."""

    masked: bool = False
    pooler: bool = False
    pair: bool = False
    replaced: bool = False
    sequence: int = 0
    token: int = 0


@dataclass(frozen=True)
class Names:
    """What a family calls its parts; "" where it has none. `blocks` has a {} for the layer.

    parts: of a block, in the order of `_PARTS`. copies: tensors that repeat others.
    """

    blocks: str
    parts: tuple[str, ...]
    project: str = ""
    pooler: str = ""
    sequence_pooler: str = ""
    transform: str = ""
    transform_norm: str = ""
    bias: str = ""
    pair: str = ""
    sequence: str = ""
    token: str = ""
    copies: tuple[tuple[str, str], ...] = ()


_PARTS = ("query", "key", "value", "out", "norm_1", "up", "down", "norm_2")
_BERT_PARTS = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "attention.output.LayerNorm",
    "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
_ALBERT_PARTS = (
    "attention.query", "attention.key", "attention.value", "attention.dense",
    "attention.LayerNorm", "ffn", "ffn_output", "full_layer_layer_norm",
)  # fmt: skip
_WORDS = "embeddings.word_embeddings.weight"
_BERT = Names(
    "encoder.layer.{}", _BERT_PARTS,
    pooler="pooler.dense", sequence_pooler="pooler.dense",
    transform="cls.predictions.transform.dense",
    transform_norm="cls.predictions.transform.LayerNorm",
    bias="cls.predictions.bias", pair="cls.seq_relationship",
    sequence="classifier", token="classifier",
    copies=(
        ("cls.predictions.decoder.weight", _WORDS),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
)  # fmt: skip
FAMILIES = {
    "bert": _BERT,
    "ernie": _BERT,
    "roberta": Names(
        "encoder.layer.{}", _BERT_PARTS,
        pooler="pooler.dense", sequence_pooler="classifier.dense",
        transform="lm_head.dense", transform_norm="lm_head.layer_norm", bias="lm_head.bias",
        sequence="classifier.out_proj", token="classifier",
        copies=(("lm_head.decoder.weight", _WORDS), ("lm_head.decoder.bias", "lm_head.bias")),
    ),
    "albert": Names(
        "encoder.albert_layer_groups.0.albert_layers.0", _ALBERT_PARTS,
        project="encoder.embedding_hidden_mapping_in", pooler="pooler", sequence_pooler="pooler",
        transform="predictions.dense", transform_norm="predictions.LayerNorm",
        bias="predictions.bias", pair="sop_classifier.classifier",
        sequence="classifier", token="classifier",
        copies=(
            ("predictions.decoder.weight", _WORDS), ("predictions.decoder.bias", "predictions.bias")
        ),
    ),
    "electra": Names(
        "encoder.layer.{}", _BERT_PARTS, project="embeddings_project",
        transform="generator_predictions.dense", transform_norm="generator_predictions.LayerNorm",
        bias="generator_lm_head.bias", copies=(("generator_lm_head.weight", _WORDS),),
    ),
}  # fmt: skip
_REPLACED = ("discriminator_predictions.dense", "discriminator_predictions.dense_prediction")
# Parts of the encoder itself: on the hub the family's name comes before theirs, not before heads'.
_INNER = ("embeddings.", "encoder.", "pooler.", "embeddings_project.")


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the hub lies: its path and place in our parameters.

    shape: the hub's. turned: a kernel, (out, in) on the hub.
    """

    ours: str
    shape: tuple[int, ...]
    at: tuple[int | slice, ...] = ()
    turned: bool = False

    def put(self, flat: Mapping[str, np.ndarray], values: np.ndarray) -> None:
        """Writes the hub's values into our arrays."""
        view = flat[self.ours][self.at]
        view[...] = (values.T if self.turned else values).reshape(view.shape)

    def take(self, flat: Mapping[str, Any]) -> np.ndarray:
        """The hub's form of our values, float32."""
        values = np.asarray(flat[self.ours])[self.at]
        values = values.reshape(self.shape[::-1]).T if self.turned else values.reshape(self.shape)
        return np.ascontiguousarray(values, np.float32)


Slots = dict[str, Slot]


def slots(family: str, sizes: Sizes, heads: Heads, where: str = "") -> Slots:
    """Every tensor of an encoder by its name on the hub, without the family's prefix.

    where: the path of the stack and the heads in our parameters, such as "generator/".
    """
    names, width = FAMILIES[family], sizes.width
    found = _embeddings(sizes)
    if names.project and (family == "albert" or sizes.narrow != width):
        found |= _dense(names.project, f"{where}project", sizes.narrow, width)
    if family == "albert":
        found |= _block(names, names.blocks, f"{where}block", (), sizes)
    else:
        for layer in range(sizes.depth):
            found |= _block(names, names.blocks.format(layer), f"{where}blocks", (layer,), sizes)
    pooler = names.sequence_pooler if heads.sequence else names.pooler
    classes = ((names.sequence, "sequence", heads.sequence), (names.token, "token", heads.token))
    if heads.pooler:
        found |= _dense(pooler, f"{where}pooler", width, width)
    if heads.masked:
        found |= _dense(names.transform, f"{where}masked/transform", width, sizes.narrow)
        found |= _norm(names.transform_norm, f"{where}masked/norm", sizes.narrow)
        rows = (slice(sizes.vocab),)
        found[names.bias] = Slot(f"{where}masked/output_bias", (sizes.vocab,), rows)
    if heads.pair:
        found |= _dense(names.pair, f"{where}pair", width, 2)
    if heads.replaced:
        found |= _dense(_REPLACED[0], f"{where}dense", width, width)
        found |= _dense(_REPLACED[1], f"{where}replaced", width, 1)
    for name, ours, number in classes:
        found |= _dense(name, f"{where}{ours}", width, number) if number else {}
    return found


def plain_name(name: str, family: str) -> str:
    """A name without the family's prefix, and a norm's by today's words for scale and shift."""
    name = name.removeprefix(f"{family}.")
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def full_name(name: str, family: str) -> str:
    """The inverse of `plain_name`."""
    return f"{family}.{name}" if name.startswith(_INNER) else name


def find_heads(family: str, shapes: Mapping[str, tuple[int, ...]], token: bool | None) -> Heads:
    """The heads whose tensors are there; `token`: whether `classifier` scores tokens, if known."""
    names = FAMILIES[family]
    classes = {n: shapes.get(f"{n}.weight", (0,))[0] for n in (names.sequence, names.token) if n}
    pooler = f"{names.pooler}.weight" in shapes
    if family == "roberta":
        sequence, tokens = classes[names.sequence], classes[names.token]
    else:
        found = classes.get(names.token, 0)
        token = not pooler if token is None else token
        sequence, tokens = (0, found) if token else (found, 0)
    return Heads(
        masked=bool(names.transform) and f"{names.transform}.weight" in shapes,
        pooler=pooler or f"{names.sequence_pooler}.weight" in shapes,
        pair=bool(names.pair) and f"{names.pair}.weight" in shapes,
        replaced=f"{_REPLACED[0]}.weight" in shapes,
        sequence=sequence,
        token=tokens,
    )


def _embeddings(sizes: Sizes) -> Slots:
    width = sizes.narrow
    rows = (slice(sizes.vocab),)
    found = {
        _WORDS: Slot("embeddings/embedding", (sizes.vocab, width), rows),
        "embeddings.position_embeddings.weight": Slot(
            "embeddings/positions", (sizes.context + sizes.offset, width)
        ),
    }
    if sizes.types:
        types = Slot("embeddings/types", (sizes.types, width))
        found["embeddings.token_type_embeddings.weight"] = types
    return found | _norm("embeddings.LayerNorm", "embeddings/norm", width)


def _block(names: Names, hub: str, ours: str, at: tuple[int, ...], sizes: Sizes) -> Slots:
    name = {part: f"{hub}.{word}" for part, word in zip(_PARTS, names.parts, strict=True)}
    width, inner = sizes.width, sizes.inner
    found: Slots = {}
    for index, part in enumerate(("query", "key", "value")):
        found |= _dense(name[part], f"{ours}/attention/qkv", width, width, at, (index,))
    found |= _dense(name["out"], f"{ours}/attention/out", width, width, at)
    found |= _norm(name["norm_1"], f"{ours}/norm_1", width, at)
    found |= _dense(name["up"], f"{ours}/mlp/up", width, inner, at)
    found |= _dense(name["down"], f"{ours}/mlp/down", inner, width, at)
    return found | _norm(name["norm_2"], f"{ours}/norm_2", width, at)


def _dense(
    hub: str,
    ours: str,
    inputs: int,
    outputs: int,
    at: tuple[int, ...] = (),
    part: tuple[int, ...] = (),
) -> Slots:
    """A linear layer; `part`: which of several that share one kernel, after its inputs."""
    place = (*at, slice(None), *part) if part else at
    return {
        f"{hub}.weight": Slot(f"{ours}/kernel", (outputs, inputs), place, turned=True),
        f"{hub}.bias": Slot(f"{ours}/bias", (outputs,), (*at, *part)),
    }


def _norm(hub: str, ours: str, width: int, at: tuple[int, ...] = ()) -> Slots:
    return {
        f"{hub}.weight": Slot(f"{ours}/scale", (width,), at),
        f"{hub}.bias": Slot(f"{ours}/bias", (width,), at),
    }
