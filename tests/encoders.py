# SPDX-License-Identifier: Apache-2.0
"""Small encoders of every family, batches for them, and what they minimise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import losses
from lmjax.models.albert import ALBERT
from lmjax.models.bert import BERT
from lmjax.models.electra import ELECTRA
from lmjax.step import init_params

VOCAB, WIDTH, LENGTH = 61, 16, 24
SIZES: dict[str, Any] = {"vocab": VOCAB, "context": 40, "depth": 2, "width": WIDTH, "heads": 2}
PLAIN: dict[str, Any] = {**SIZES, "dropout": 0.0, "attention_dropout": 0.0}
BERTS: dict[str, Any] = {"activation": "gelu_tanh", "epsilon": 1e-12}
HEADS: dict[str, Any] = {"sequence_classes": 3, "token_classes": 4}
MODELS = {
    "bert": BERT(**PLAIN, **BERTS, **HEADS),
    "roberta": BERT(
        **PLAIN, activation="gelu_erf", epsilon=1e-5, types=1, position_offset=2, pooler=False,
        pair=False, truncated_init=False,
    ),
    "ernie": BERT(**PLAIN, activation="relu", epsilon=1e-5),
    "albert": ALBERT(**PLAIN, embedding_width=8, **HEADS),
    "electra": ELECTRA(
        **PLAIN, embedding_width=8, generator_width=8, generator_heads=2, generator_depth=1
    ),
}  # fmt: skip


def params_of(model: Any) -> Any:
    """Parameters large enough that every path through the model counts."""
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x + 0.1, init_params(model, 0))


def example(rows: int = 4, length: int = LENGTH, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of different lengths, the last a full one, each with two sentences and three masks."""
    random = np.random.default_rng(seed)
    sizes = np.append(random.integers(8, length, rows - 1), length)
    column = np.arange(length)[None]
    inside = column < sizes[:, None]
    return {
        "tokens_BL": random.integers(5, VOCAB, (rows, length)).astype(np.int32) * inside,
        "segments_BL": inside.astype(np.int32),
        "types_BL": ((column >= sizes[:, None] // 2) & inside).astype(np.int32),
        "masked_BP": np.tile(np.array([1, 3, 6, 0], np.int32), (rows, 1)),
        "targets_BP": random.integers(5, VOCAB, (rows, 4)).astype(np.int32),
        "weights_BP": np.tile(np.array([1, 1, 1, 0], np.float32), (rows, 1)),
        "firsts_BC": np.zeros((rows, 1), np.int32),
        "pairs_BC": random.integers(0, 2, (rows, 1)).astype(np.int32),
        "pair_weights_BC": np.ones((rows, 1), np.float32),
    }


def batch_for(name: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without sentence types where the model has one only."""
    return {k: v for k, v in batch.items() if name != "roberta" or k != "types_BL"}


def loss_of(name: str) -> Any:
    return {"roberta": losses.masked_token, "electra": losses.ReplacedToken()}.get(
        name, losses.masked_token_and_pair
    )


def apply(model: Any, params: Any, batch: Any, **options: Any) -> Any:
    return model.apply({"params": params}, batch, rngs={"sample": jax.random.key(3)}, **options)


def total(name: str, params: Any, batch: Any) -> Any:
    """What is minimised, of one batch."""
    loss = loss_of(name)
    sums = loss(apply(MODELS[name], params, batch), batch)
    means = {key: s / jnp.maximum(w, 1) for key, (s, w) in sums.items()}
    return getattr(loss, "total", losses.total)(means)
