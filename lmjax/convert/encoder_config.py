# SPDX-License-Identifier: Apache-2.0
"""config.json of BERT, ERNIE, RoBERTa, ALBERT and ELECTRA, and what our models say of the same."""

from pathlib import Path
from typing import Any

from lmjax.convert import hub
from lmjax.convert.encoder_names import FAMILIES, Heads, Sizes
from lmjax.layers import Activation
from lmjax.models.albert import ALBERT
from lmjax.models.bert import BERT
from lmjax.models.electra import ELECTRA

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
# What changes the function and has one value that our models can express.
_FIXED: hub.Settings = (
    ("position_embedding_type", ("absolute",)),
    ("is_decoder", (False,)),
    ("add_cross_attention", (False,)),
    ("tie_word_embeddings", (True,)),
    ("pruned_heads", ({}, None)),
    ("quantization_config", (None,)),
    ("use_task_id", (False,)),
    ("num_hidden_groups", (1,)),
    ("inner_group_num", (1,)),
)
_HEADED = {
    "bert": "Bert", "ernie": "Ernie", "roberta": "Roberta", "albert": "Albert",
    "electra": "Electra",
}  # fmt: skip


def family_of(config: dict[str, Any], path: Path) -> str:
    """The family that config.json names."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type={family!r}; allowed are {', '.join(FAMILIES)}")
    return family


def read_sizes(config: dict[str, Any], path: Path) -> Sizes:
    """The encoder that config.json describes.

    Raises:
      ValueError: a size is missing, or a setting is one that our models cannot express.
    """
    family = family_of(config, path)
    narrow = "embedding_size" if family in ("albert", "electra") else "hidden_size"
    hub.check_sizes(config, path, (*_SIZES, narrow))
    hub.check_settings(config, path, _FIXED)
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act={activation!r}; allowed are {', '.join(ACTIVATIONS)}")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ValueError(
            f"{path}: hidden_size={width} is not a multiple of num_attention_heads={heads}"
        )
    offset = _padding_id(config, path) + 1 if family == "roberta" else 0
    if config["max_position_embeddings"] <= offset:
        raise ValueError(
            f"{path}: max_position_embeddings={config['max_position_embeddings']}; the first"
            f" {offset} rows are before the first token, so more are needed"
        )
    epsilon = config.get("layer_norm_eps", 1e-12)
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        raise ValueError(f"{path}: layer_norm_eps={epsilon!r}; allowed are numbers from 0 to 1")
    return Sizes(
        config["vocab_size"], config["max_position_embeddings"] - offset, offset,
        config["type_vocab_size"], config[narrow], width, config["num_hidden_layers"], heads,
        config["intermediate_size"], ACTIVATIONS[activation], float(epsilon),
        hub.rate(config, "hidden_dropout_prob", path),
        hub.rate(config, "attention_probs_dropout_prob", path),
    )  # fmt: skip


def _padding_id(config: dict[str, Any], path: Path) -> int:
    """The id that RoBERTa counts positions from."""
    pad = config.get("pad_token_id", 1)
    if type(pad) is not int or pad < 0:
        raise ValueError(f"{path}: pad_token_id={pad!r}; a whole number is needed")
    return pad


def write_config(
    family: str, sizes: Sizes, heads: Heads, controls: dict[str, int]
) -> dict[str, Any]:
    """config.json of an encoder. controls: ids of pad, and of cls and sep for RoBERTa."""
    words = {ours: word for word, ours in reversed(ACTIVATIONS.items())}
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [_HEADED[family] + _architecture(family, heads)],
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.inner,
        "hidden_act": words[sizes.activation],
        "hidden_dropout_prob": sizes.dropout,
        "attention_probs_dropout_prob": sizes.attention_dropout,
        "max_position_embeddings": sizes.context + sizes.offset,
        "type_vocab_size": sizes.types,
        "initializer_range": 0.02,
        "layer_norm_eps": sizes.epsilon,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "pad_token_id": sizes.offset - 1 if sizes.offset else controls.get("pad", 0),
    }
    if family in ("albert", "electra"):
        config["embedding_size"] = sizes.narrow
    if family == "roberta":
        config |= {"bos_token_id": controls.get("cls"), "eos_token_id": controls.get("sep")}
    if classes := heads.sequence or heads.token:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(classes)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(classes)}
    return config


def _architecture(family: str, heads: Heads) -> str:
    """The library's class that has most of these heads."""
    if heads.replaced or (heads.masked and heads.pair):
        return "ForPreTraining"
    found = (
        (heads.sequence, "ForSequenceClassification"),
        (heads.token, "ForTokenClassification"),
        (heads.masked, "ForMaskedLM"),
        (heads.pair and family in ("bert", "ernie"), "ForNextSentencePrediction"),
    )
    return next((word for has, word in found if has), "Model")


def check_heads(family: str, sizes: Sizes, heads: Heads) -> None:
    """Raises ValueError for heads that a folder of the family cannot hold."""
    if heads.sequence and heads.token:
        raise ValueError(
            f"sequence_classes={heads.sequence} and token_classes={heads.token}: the hub has one"
            " name for both heads; export one of them"
        )
    if family == "roberta" and heads.pair:
        raise ValueError("pair=True: RoBERTa has no pair head on the hub; export without it")
    if not masked_head_fits(family, sizes, heads):
        raise ValueError(
            f"activation={sizes.activation!r}: on the hub {_HEADED[family]}'s masked-token head has"
            " gelu_erf whatever its layers have"
        )


def masked_head_fits(family: str, sizes: Sizes, heads: Heads) -> bool:
    """Whether the library's masked-token head has the activation of the layers, as ours has."""
    fixed = family in ("roberta", "electra") and heads.masked
    return not fixed or sizes.activation == "gelu_erf"


def encoder_of(model: BERT | ALBERT) -> tuple[str, Sizes, Heads]:
    """Family, sizes and heads of a model in the hub's terms.

    ERNIE 1.0 is BERT with other constants, and so is its folder.
    """
    albert = isinstance(model, ALBERT)
    offset = 0 if isinstance(model, ALBERT) else model.position_offset
    family = "albert" if albert else "roberta" if offset else "bert"
    narrow = model.embedding_width if isinstance(model, ALBERT) else model.width
    sizes = Sizes(
        model.vocab, model.context, offset, model.types, narrow, model.width, model.depth,
        model.heads, model.inner or 4 * model.width, model.activation, model.epsilon,
        model.dropout, model.attention_dropout,
    )  # fmt: skip
    heads = Heads(
        masked=model.masked, pooler=model.pooler, pair=model.pair,
        sequence=model.sequence_classes, token=model.token_classes,
    )  # fmt: skip
    return family, sizes, heads


def encoder_model(family: str, sizes: Sizes, heads: Heads) -> BERT | ALBERT:
    """The inverse of `encoder_of`."""
    common: dict[str, Any] = {
        "vocab": sizes.vocab, "context": sizes.context, "depth": sizes.depth,
        "width": sizes.width, "heads": sizes.heads, "activation": sizes.activation,
        "epsilon": sizes.epsilon, "inner": _inner(sizes), "types": sizes.types,
        "masked": heads.masked, "pooler": heads.pooler, "pair": heads.pair,
        "sequence_classes": heads.sequence, "token_classes": heads.token,
        "dropout": sizes.dropout, "attention_dropout": sizes.attention_dropout,
    }  # fmt: skip
    if family == "albert":
        return ALBERT(embedding_width=sizes.narrow, **common)
    return BERT(position_offset=sizes.offset, **common)


def electra_sizes(model: ELECTRA) -> tuple[Sizes, Sizes]:
    """Discriminator and generator of a model."""
    big = Sizes(
        model.vocab, model.context, 0, model.types, model.embedding_width, model.width,
        model.depth, model.heads, model.inner or 4 * model.width, model.activation,
        model.epsilon, model.dropout, model.attention_dropout,
    )  # fmt: skip
    width = model.generator_width
    small = big._replace(
        width=width, depth=model.generator_depth, heads=model.generator_heads,
        inner=model.generator_inner or 4 * width,
    )  # fmt: skip
    return big, small


def electra_model(big: Sizes, small: Sizes) -> ELECTRA:
    """The inverse of `electra_sizes`."""
    return ELECTRA(
        vocab=big.vocab, context=big.context, depth=big.depth, width=big.width, heads=big.heads,
        embedding_width=big.narrow, generator_width=small.width, generator_heads=small.heads,
        generator_depth=small.depth, inner=_inner(big), generator_inner=_inner(small),
        activation=big.activation, epsilon=big.epsilon, types=big.types, dropout=big.dropout,
        attention_dropout=big.attention_dropout,
    )  # fmt: skip


def _inner(sizes: Sizes) -> int:
    """The field of our models: 0 stands for 4 · width."""
    return 0 if sizes.inner == 4 * sizes.width else sizes.inner
