# SPDX-License-Identifier: Apache-2.0
"""ALBERT: one block applied many times, behind narrow embeddings (Lan et al. 2019).

Shapes: B batch, L length, E embedding width, D width, P scored tokens of a row, C sequences of a
row.
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


class ALBERT(nn.Module):
    """Encoder with factorised embeddings, shared layers and a sentence-order head.

    Args:
      embedding_width: of words, positions, types, and of the masked-token head.
      depth: how often the one block is applied.
      inner: width of its MLP; 0 is 4 · width.
      sequence_classes, token_classes: classes of heads on the pooled and on every state; 0: none.
    """

    vocab: int
    context: int
    depth: int
    width: int
    heads: int
    embedding_width: int = 128
    activation: Activation = "gelu_tanh"
    epsilon: float = 1e-12
    inner: int = 0
    types: int = 2
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
        check_sizes(self, "embedding_width")
        check_pooled(self)
        super().__post_init__()

    @property
    def padding(self) -> int:
        """Parameters in padding rows: stored, but no part of the model."""
        return (padded(self.vocab) - self.vocab) * (self.embedding_width + self.masked)

    def flops_per_token(self, length: int) -> int:
        """Training FLOPs per token: every application of the block counts."""
        blocks = self.depth * block_parameters(self.width, self.inner or 4 * self.width)
        narrow = self.embedding_width
        masked = self.masked * (self.width * narrow + narrow * self.vocab)
        return flops(blocks + narrow * self.width, self.depth, self.width, length, masked)

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False, states: bool = False) -> Outputs:
        """States (B, L, D) of `tokens_BL`, and the heads whose inputs the batch has."""
        embeddings = Embeddings(
            self.vocab, self.context, self.embedding_width, self.types, self.epsilon,
            self.dropout, True, name="embeddings",
        )  # fmt: skip
        stack = Stack(
            self.depth, self.width, self.heads, self.inner or 4 * self.width, self.activation,
            self.epsilon, self.dropout, self.attention_dropout, True, self.kernel, self.remat,
            self.unroll, shared=True, project=True, name="stack",
        )  # fmt: skip
        first_BLE = embeddings(batch, batch["tokens_BL"], compute_dtype(self.dtype), train)
        nn.share_scope(self, stack)
        hidden_BLD, states_NBLD = stack(first_BLE, batch, train, states)
        heads, bias_V = apply_heads(self, hidden_BLD, batch, train, self.embedding_width, True)
        table_VE: Any = embeddings.embedding
        return Outputs(hidden_BLD, Readout(table_VE, bias_V, self.vocab), states_NBLD, heads=heads)
