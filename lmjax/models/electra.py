# SPDX-License-Identifier: Apache-2.0
"""ELECTRA: a small generator fills masked tokens, a discriminator finds them (Clark et al. 2020).

Shapes: B batch, L length, E embedding width, D width, V vocabulary, P scored tokens of a row.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmjax import sharding
from lmjax.attention import Kernel
from lmjax.blocks import Remat
from lmjax.encoder import (
    Embeddings,
    MaskedHead,
    Stack,
    block_parameters,
    flops,
    head_dense,
    pick,
)
from lmjax.layers import (
    ACTIVATIONS,
    Activation,
    Batch,
    Dtype,
    Outputs,
    Readout,
    check_sizes,
    compute_dtype,
    padded,
)

_SAMPLE_BYTES = 2**28


class Generator(nn.Module):
    """The small encoder and its masked-token head."""

    stack: Stack
    head: MaskedHead

    @nn.compact
    def __call__(self, first_BLE: jax.Array, batch: Batch, train: bool) -> tuple[Any, Any]:
        """What the readout scores at `masked_BP` (B, P, E), and its bias (V,)."""
        stack, head = (
            self.stack.clone(parent=self, name="encoder"),
            self.head.clone(parent=self, name="masked"),
        )
        nn.share_scope(self, stack)
        hidden_BLD, _ = stack(first_BLE, batch, train)
        return head(pick(hidden_BLD, batch["masked_BP"]))


class Discriminator(nn.Module):
    """The encoder that is kept, with a score a token: was it replaced?"""

    stack: Stack

    @nn.compact
    def __call__(
        self, first_BLE: jax.Array, batch: Batch, train: bool, states: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """States (B, L, D), float32 scores (B, L), and every layer's states if asked for."""
        stack = self.stack.clone(parent=self, name="encoder")
        nn.share_scope(self, stack)
        hidden_BLD, states_NBLD = stack(first_BLE, batch, train, states)
        dense = head_dense(stack.width, True, "dense")
        score = head_dense(1, True, "replaced")
        score_BL1 = score(ACTIVATIONS[stack.activation](dense(hidden_BLD)))
        return hidden_BLD, score_BL1[..., 0].astype(jnp.float32), states_NBLD


class ELECTRA(nn.Module):
    """Generator and discriminator over one set of embeddings, trained in one step.

    Args:
      embedding_width: of words, positions and types, which both share; a projection follows where
        an encoder is of another width.
      generator_width, generator_heads, generator_inner: sizes of the generator; its depth is
        `generator_depth`.
      temperature: of the draws that replace masked tokens.
    """

    vocab: int
    context: int
    depth: int
    width: int
    heads: int
    embedding_width: int
    generator_width: int
    generator_heads: int
    generator_depth: int
    inner: int = 0
    generator_inner: int = 0
    activation: Activation = "gelu_erf"
    epsilon: float = 1e-12
    types: int = 2
    temperature: float = 1.0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: Dtype = "auto"
    kernel: Kernel = "auto"
    remat: Remat = "none"
    unroll: int = 0

    def __post_init__(self) -> None:
        more = ("embedding_width", "generator_width", "generator_heads", "generator_depth")
        check_sizes(self, *more)
        if self.generator_width % self.generator_heads:
            raise ValueError(
                f"model.generator_width={self.generator_width} is not a multiple of"
                f" generator_heads={self.generator_heads}"
            )
        if self.temperature <= 0:
            raise ValueError(f"model.temperature={self.temperature}: must be above 0")
        super().__post_init__()

    @property
    def padding(self) -> int:
        """Parameters in padding rows: stored, but no part of the model."""
        return (padded(self.vocab) - self.vocab) * (self.embedding_width + 1)

    def discriminator_parameters(self) -> int:
        """Parameters that are kept after pretraining: the embeddings and the discriminator."""
        width, narrow = self.width, self.embedding_width
        embeddings = (self.vocab + self.context + self.types + 2) * narrow
        project = (narrow + 1) * width if narrow != width else 0
        blocks = self.depth * block_parameters(width, self.inner or 4 * width)
        return embeddings + project + blocks + width**2 + 2 * width + 1

    def flops_per_token(self, length: int) -> int:
        """Training FLOPs per token of both encoders and their heads (`encoder.flops`).

        The draws that replace masked tokens read scores that the generator's loss computes.
        """
        big, small, narrow = self.width, self.generator_width, self.embedding_width
        kept = self.depth * block_parameters(big, self.inner or 4 * big) + big**2
        inner = self.generator_inner or 4 * small
        helper = self.generator_depth * block_parameters(small, inner)
        kept += narrow * big if big != narrow else 0
        helper += narrow * small if small != narrow else 0
        masked = small * narrow + narrow * self.vocab
        return flops(kept, self.depth, big, length, 0) + flops(
            helper, self.generator_depth, small, length, masked
        )

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False, states: bool = False) -> Outputs:
        """The discriminator's states (B, L, D), and the generator's scores of `masked_BP`.

        With masked tokens in the batch, each is replaced by a draw from the generator (stream
        "sample"), and `is_replaced_BL` says where the draw is not the original. Without them the
        discriminator reads the tokens as they are.
        """
        embeddings = Embeddings(
            self.vocab, self.context, self.embedding_width, self.types, self.epsilon,
            self.dropout, True, name="embeddings",
        )  # fmt: skip
        dtype, tokens_BL = compute_dtype(self.dtype), batch["tokens_BL"]
        heads: dict[str, jax.Array] = {}
        table_VE, bias_V = None, None
        if "masked_BP" in batch:
            first_BLE = embeddings(batch, tokens_BL, dtype, train)
            table_VE = embeddings.embedding
            generator = Generator(self._stack(True), self._head(), name="generator")
            heads["masked_BPE"], bias_V = generator(first_BLE, batch, train)
            readout = Readout(table_VE, bias_V, self.vocab)
            if "targets_BP" in batch:
                drawn_BP = self._draw(heads["masked_BPE"], readout)
                tokens_BL, heads["is_replaced_BL"] = replace(batch, drawn_BP)
        discriminator = Discriminator(self._stack(False), name="discriminator")
        first_BLE = embeddings(batch, tokens_BL, dtype, train)
        found = discriminator(first_BLE, batch, train, states)
        hidden_BLD, heads["replaced_BL"], states_NBLD = found
        readout = Readout(embeddings.embedding, bias_V, self.vocab)  # type: ignore[arg-type]
        return Outputs(hidden_BLD, readout, states_NBLD, heads=heads)

    def _stack(self, generator: bool) -> Stack:
        sizes = (
            (self.generator_depth, self.generator_width, self.generator_heads, self.generator_inner)
            if generator
            else (self.depth, self.width, self.heads, self.inner)
        )
        depth, width, heads, inner = sizes
        return Stack(
            depth, width, heads, inner or 4 * width, self.activation, self.epsilon, self.dropout,
            self.attention_dropout, True, self.kernel, self.remat, self.unroll,
            project=width != self.embedding_width, parent=None,
        )  # fmt: skip

    def _head(self) -> MaskedHead:
        return MaskedHead(
            self.vocab, self.embedding_width, self.activation, self.epsilon, True, parent=None
        )

    def _draw(self, hidden_BPE: jax.Array, readout: Readout) -> jax.Array:
        """Token ids (B, P) drawn from the generator's distribution; no gradient passes."""
        hidden_BPE = jax.lax.stop_gradient(hidden_BPE)
        return draw(hidden_BPE, readout, self.make_rng("sample"), self.temperature)


def draw(hidden_BPE: jax.Array, readout: Readout, key: jax.Array, temperature: float) -> jax.Array:
    """One word (B, P) from the softmax of each token's scores, a chunk of scores at a time."""
    places = hidden_BPE.shape[1]
    rows = hidden_BPE.shape[0] // sharding.axis_size(*sharding.BATCH_AXES)
    wanted = -(-places * rows * readout.rows * 4 // _SAMPLE_BYTES)
    chunks = next(n for n in range(min(wanted, places), places + 1) if places % n == 0)
    # The table is a constant here, or its gradient would be asked for through the draws.
    readout = jax.lax.stop_gradient(readout)

    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BPE, key = inputs
        scores_BPV = readout.logits(hidden_BPE) / temperature
        return jax.random.categorical(key, scores_BPV, axis=-1).astype(jnp.int32)

    parts = jnp.moveaxis(
        hidden_BPE.reshape(hidden_BPE.shape[0], chunks, -1, hidden_BPE.shape[2]), 1, 0
    )
    drawn = jax.lax.map(one, (parts, jax.random.split(key, chunks)))
    return jnp.moveaxis(drawn, 0, 1).reshape(hidden_BPE.shape[:2])


def replace(batch: Batch, drawn_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens with the draws at `masked_BP`, and where they are not the originals (B, L)."""
    used_BP = batch["weights_BP"] > 0
    length = batch["tokens_BL"].shape[1]
    columns_BP = jnp.where(used_BP, batch["masked_BP"], length)  # out of the row: dropped

    @jax.vmap
    def put(row_L: jax.Array, columns_P: jax.Array, values_P: jax.Array) -> jax.Array:
        return row_L.at[columns_P].set(values_P, mode="drop")

    wrong_BP = (drawn_BP != batch["targets_BP"]).astype(jnp.int32)
    replaced_BL = put(jnp.zeros_like(batch["tokens_BL"]), columns_BP, wrong_BP)
    return put(batch["tokens_BL"], columns_BP, drawn_BP), replaced_BL
