# SPDX-License-Identifier: Apache-2.0
"""BERT: a bidirectional encoder (Devlin et al. 2018); with other constants RoBERTa (Liu et al.
2019) and ERNIE 1.0 (Sun et al. 2019).

Shapes: B batch, L length, D width, V vocabulary, P scored tokens of a row, C sequences of a row.
"""

from typing import Any

import flax.linen as nn

from lmjax.attention import Kernel
from lmjax.blocks import Remat
from lmjax.encoder import (
    Embeddings,
    Stack,
    apply_heads,
    block_parameters,
    check_pooled,
    flops,
)
from lmjax.layers import (
    Activation,
    Batch,
    Dtype,
    Outputs,
    Readout,
    check_sizes,
    compute_dtype,
    padded,
)


class BERT(nn.Module):
    """Encoder with learned positions, post-norm blocks and the heads that its fields ask for.

    Args:
      context: positions that a sequence may have.
      inner: width of the MLPs; 0 is 4 · width.
      types: rows of the sentence-type table; 0 for none.
      position_offset: rows of the position table before the first token's (RoBERTa: 2).
      truncated_init: N(0, 0.02²) cut at two deviations, as Google draws; plain otherwise.
      masked: the masked-token head, tied to the word table, with a bias of its own.
      pooler: dense and tanh on each sequence's first state.
      pair: next-sentence head on the pooled state.
      sequence_classes: classes of a head on the pooled state; 0 for none.
      token_classes: classes of a head on every state; 0 for none.
    """

    vocab: int
    context: int
    depth: int
    width: int
    heads: int
    activation: Activation
    epsilon: float
    inner: int = 0
    types: int = 2
    position_offset: int = 0
    truncated_init: bool = True
    masked: bool = True
    pooler: bool = True
    pair: bool = True
    sequence_classes: int = 0
    token_classes: int = 0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: Dtype = "auto"
    kernel: Kernel = "auto"
    remat: Remat = "none"
    unroll: int = 0

    def __post_init__(self) -> None:
        check_sizes(self)
        check_pooled(self)
        super().__post_init__()

    @property
    def padding(self) -> int:
        """Parameters in padding rows: stored, but no part of the model."""
        rows = padded(self.vocab) - self.vocab
        return rows * (self.width + self.masked)

    def flops_per_token(self, length: int) -> int:
        """Training FLOPs per token, with the masked-token head at its share of the tokens."""
        blocks = self.depth * block_parameters(self.width, self.inner or 4 * self.width)
        masked = self.masked * (self.width**2 + self.width * self.vocab)
        return flops(blocks, self.depth, self.width, length, masked)

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False, states: bool = False) -> Outputs:
        """States (B, L, D) of `tokens_BL`, and the heads whose inputs the batch has."""
        embeddings = Embeddings(
            self.vocab, self.context, self.width, self.types, self.epsilon, self.dropout,
            self.truncated_init, self.position_offset, name="embeddings",
        )  # fmt: skip
        stack = Stack(
            self.depth, self.width, self.heads, self.inner or 4 * self.width, self.activation,
            self.epsilon, self.dropout, self.attention_dropout, self.truncated_init,
            self.kernel, self.remat, self.unroll, name="stack",
        )  # fmt: skip
        first_BLD = embeddings(batch, batch["tokens_BL"], compute_dtype(self.dtype), train)
        nn.share_scope(self, stack)
        hidden_BLD, states_NBLD = stack(first_BLD, batch, train, states)
        heads, bias_V = apply_heads(self, hidden_BLD, batch, train, self.width, self.truncated_init)
        table_VD: Any = embeddings.embedding
        return Outputs(hidden_BLD, Readout(table_VD, bias_V, self.vocab), states_NBLD, heads=heads)
