# SPDX-License-Identifier: Apache-2.0
"""Parts of the bidirectional encoders: embeddings, the stack, the head that scores masked tokens.

Shapes: B batch, L length, E embedding width, D width, V vocabulary, P scored tokens of a row,
C sequences packed in a row, T classes or types.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmjax import sharding
from lmjax.attention import Kernel
from lmjax.blocks import Block, Remat, stack_apply, stack_init
from lmjax.layers import (
    ACTIVATIONS,
    Activation,
    Batch,
    Dense,
    LayerNorm,
    embed,
    normal,
    padded,
    padded_normal,
)

STD = 0.02
MASKED_SHARE = 0.15  # of the tokens that recipes score: FLOPs are counted with it


class Embeddings(nn.Module):
    """Words, positions and sentence types, summed, normed and dropped (Devlin et al. 2018).

    The position table has `position_offset` rows more than `context`: RoBERTa's first token is at
    row 2.
    """

    vocab: int
    context: int
    width: int
    types: int
    epsilon: float
    dropout: float
    truncated: bool
    position_offset: int = 0

    def setup(self) -> None:
        rows, width = padded(self.vocab), self.width
        words = padded_normal(STD, self.vocab, self.truncated)
        self.embedding = self.param("embedding", words, (rows, width))
        init = normal(STD, self.truncated)
        places = (self.context + self.position_offset, width)
        self.positions = self.param("positions", init, places)
        if self.types:
            self.types_table = self.param("types", init, (self.types, width))
        self.norm = LayerNorm(self.epsilon)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, batch: Batch, tokens_BL: jax.Array, dtype: Any, train: bool = False
    ) -> jax.Array:
        """(B, L) to (B, L, E), with `positions_BL` and `types_BL` of the batch if it has them.

        Absent positions count from 0; absent types are 0.
        """
        table_VE: Any = self.embedding
        words_BLE: Any = embed(table_VE, tokens_BL, dtype)
        hidden_BLE = words_BLE + self._places(batch, tokens_BL, dtype)
        if self.types:
            types_BL = batch.get("types_BL", jnp.zeros_like(tokens_BL))
            # A product with a few rows: its gradient is a product too, not a scatter.
            weights = sharding.for_compute({"types": self.types_table}, dtype)
            choice_BLT = jax.nn.one_hot(types_BL, self.types, dtype=dtype)
            hidden_BLE = hidden_BLE + choice_BLT @ weights["types"]
        return self.drop(self.norm(hidden_BLE), deterministic=not train)

    def _places(self, batch: Batch, tokens_BL: jax.Array, dtype: Any) -> jax.Array:
        table = sharding.for_compute({"positions": self.positions}, dtype)["positions"]
        if "positions_BL" in batch:
            return table[batch["positions_BL"] + self.position_offset]
        return table[None, self.position_offset : self.position_offset + tokens_BL.shape[1]]


class Stack(nn.Module):
    """Post-norm blocks that see both sides, behind a projection where E is not D.

    `shared`: one block, applied `depth` times (ALBERT). What is not of the same segment, such as
    padding, is not seen.
    """

    depth: int
    width: int
    heads: int
    inner: int
    activation: Activation
    epsilon: float
    dropout: float
    attention_dropout: float
    truncated: bool
    kernel: Kernel
    remat: Remat
    unroll: int
    shared: bool = False
    project: bool = False

    @nn.compact
    def __call__(
        self, hidden_BLE: jax.Array, batch: Batch, train: bool = False, states: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Final states (B, L, D) and, if asked for, all of them (depth + 1, B, L, D)."""
        if self.project:
            dense = head_dense(self.width, self.truncated, "project")
            hidden_BLE = dense(hidden_BLE)
        block = Block(
            self.heads, self.inner, self.activation, False, "post", self.epsilon, STD, STD,
            self.dropout, self.attention_dropout, self.kernel, self.truncated, parent=None,
        )  # fmt: skip
        if self.shared:
            example = jnp.zeros((1, 1, self.width))
            weights = self.param("block", lambda key: block.init(key, example)["params"])
        else:
            weights = self.param("blocks", stack_init(block, self.depth, self.width))
        dropping = train and (self.dropout or self.attention_dropout)
        final_BLD, states_NBLD, _ = stack_apply(
            block, weights, hidden_BLE,
            dropout_key=self.make_rng("dropout") if dropping else None,
            states=states, remat=self.remat, unroll=self.unroll,
            repeat=self.depth if self.shared else 0,
            train=train, segments_BL=batch.get("segments_BL"),
        )  # fmt: skip
        return final_BLD, states_NBLD


class MaskedHead(nn.Module):
    """Dense, activation and norm before the tied table, at the scored tokens only."""

    vocab: int
    width: int
    activation: Activation
    epsilon: float
    truncated: bool

    @nn.compact
    def __call__(self, hidden_BPD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """States of the scored tokens to what the table is multiplied with, and the bias (V,)."""
        dense = head_dense(self.width, self.truncated, "transform")
        norm = LayerNorm(self.epsilon, name="norm")
        bias_V = self.param("output_bias", nn.initializers.zeros, (padded(self.vocab),))
        return norm(ACTIVATIONS[self.activation](dense(hidden_BPD))), bias_V


def apply_heads(
    model: Any, hidden_BLD: jax.Array, batch: Batch, train: bool, narrow: int, truncated: bool
) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """The heads that the fields of `model` ask for and the batch has inputs of, and the readout's
    bias (V,) if it was needed. For a model's compact method: the parameters are the model's.

    Masked tokens are scored at `masked_BP`; pairs and sequences are pooled at `firsts_BC`.
    """
    heads: dict[str, jax.Array] = {}
    bias_V = None

    def classes(name: str, x: jax.Array, number: int, dropout: float) -> jax.Array:
        x = nn.Dropout(dropout, deterministic=not train)(x)
        return head_dense(number, truncated, name)(x).astype(jnp.float32)

    if model.masked and "masked_BP" in batch:
        head = MaskedHead(
            model.vocab, narrow, model.activation, model.epsilon, truncated, name="masked"
        )
        heads["masked_BPE"], bias_V = head(pick(hidden_BLD, batch["masked_BP"]))
    if model.pooler and "firsts_BC" in batch:
        dense = head_dense(model.width, truncated, "pooler")
        pooled_BCD = jnp.tanh(dense(pick(hidden_BLD, batch["firsts_BC"])))
        heads["pooled_BCD"] = pooled_BCD
        if model.pair:
            heads["pair_BCT"] = classes("pair", pooled_BCD, 2, 0.0)
        if number := model.sequence_classes:
            heads["sequence_BCT"] = classes("sequence", pooled_BCD, number, model.dropout)
    if number := model.token_classes:
        heads["token_BLT"] = classes("token", hidden_BLD, number, model.dropout)
    return heads, bias_V


def head_dense(features: int, truncated: bool, name: str) -> Dense:
    """A dense layer outside the stack, which fetches its weights from where they rest."""
    return Dense((features,), STD, truncated=truncated, at_rest=True, name=name)


@jax.vmap
def pick(hidden_LD: jax.Array, columns_P: jax.Array) -> jax.Array:
    """States (B, L, D) at columns (B, P): (B, P, D), each row from its own."""
    return hidden_LD[columns_P]


def check_pooled(model: Any) -> None:
    """Raises ValueError for heads on the pooled state without a pooler."""
    if (model.pair or model.sequence_classes) and not model.pooler:
        raise ValueError("model.pooler=False: pair and sequence heads read the pooled state")


def block_parameters(width: int, inner: int) -> int:
    """Parameters of one block."""
    attention = 4 * width**2 + 4 * width
    return attention + 2 * width * inner + inner + width + 4 * width


def flops(
    multiplied: int, depth: int, width: int, length: int, masked: int, share: float = MASKED_SHARE
) -> int:
    """Training FLOPs per token: 6 N + 12 N_layers · D · L + 6 · share · M.

    N are the encoder's parameters that are multiplied with, M those of the masked-token head and
    its table, which run at the scored share of the tokens only. The first two terms are those of
    Chowdhery et al. (2022, appendix B); empty slots and the head for pairs, which runs once a
    sequence, are not counted.
    """
    return 6 * multiplied + 12 * depth * width * length + int(6 * share * masked)
