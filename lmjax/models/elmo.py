# SPDX-License-Identifier: Apache-2.0
"""ELMo (Peters et al. 2018): two stacks of projected LSTMs over words spelt by characters.

Shapes: B rows, X directions (0 forward, 1 backward), L words, C characters of a word, D width
between layers, H cells, N layers, V vocabulary, S negatives, R touched rows of the softmax. Every
array is in the order of processing: rows of direction 1 hold words from last to first.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmjax import sampled, sharding
from lmjax.characters import CharacterEncoder
from lmjax.layers import (
    Batch,
    Dtype,
    Outputs,
    Readout,
    check_ranges,
    compute_dtype,
    embed,
    padded,
    padded_normal,
)
from lmjax.recurrent import ProjectedLSTM
from lmjax.sparse import Drawn

_INPUTS = ("characters", "words")
_ACTIVATIONS = ("relu", "tanh")
_FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))


class ELMo(nn.Module):
    """A bidirectional language model whose directions share the input layer and the softmax.

    Args:
      vocab: words of the softmax, by falling frequency: the sampler of negatives relies on it.
      depth: layers of each direction.
      cells: cells of an LSTM.
      width: numbers that an LSTM's cells are projected to, and the width of the input layer.
      input: "characters" spells each word; "words" looks it up in a table.
      tied: the table of words is the softmax's (for input="words").
      embedding: numbers of a character.
      filters: (characters, how many) of each convolution.
      highways: highway layers after the convolutions.
      cell_clip, projection_clip: bounds of a cell and of its projection; 0 for none.
      skip: each layer but the first adds its input.
      dropout: of each layer's input, which the skip carries too, and of the last output.
      negatives: words that the softmax of a training step scores beside the right one, drawn for
        each direction; 0 scores all.
      distinct: share of a batch's words up to which each distinct word is spelt only once.
    """

    vocab: int
    depth: int = 2
    cells: int = 4096
    width: int = 512
    input: Literal["characters", "words"] = "characters"
    tied: bool = False
    embedding: int = 16
    filters: tuple[tuple[int, int], ...] = _FILTERS
    highways: int = 2
    activation: Literal["relu", "tanh"] = "relu"
    cell_clip: float = 3.0
    projection_clip: float = 3.0
    skip: bool = True
    dropout: float = 0.1
    negatives: int = 8192
    distinct: float = 0.5
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()

    @property
    def padding(self) -> int:
        """Parameters in padding rows: stored, but no part of the model."""
        tables = 1 if self.input == "characters" or self.tied else 2
        return (padded(self.vocab) - self.vocab) * (tables * self.width + 1)

    def flops_per_token(self, length: int) -> int:
        """Training FLOPs per word of both directions: 6 per multiplication of the forward pass,
        as a weight that is multiplied with costs in Kaplan et al. (2020, section 2.1).

        Of each direction: a projected LSTM (Sak et al. 2014) has 4 H (D + D) + H D of them a layer,
        the softmax D for each word that it scores, and spelling (Kim et al. 2016) one for each
        place of each filter, 2 F² a highway layer and F D. A word is spelt in each direction,
        whatever `distinct` saves.
        """
        lstm = self.depth * self.cells * (8 * self.width + self.width)
        scored = min(self.negatives + 1, self.vocab) if self.negatives else self.vocab
        return 6 * 2 * (self._spelling() + lstm + scored * self.width)

    def _spelling(self) -> int:
        """Multiplications that make the vector of a word."""
        if self.input == "words":
            return 0
        top = sum(count for _, count in self.filters)
        places = sum((51 - wide) * wide * self.embedding * n for wide, n in self.filters)
        return places + self.highways * 2 * top**2 + top * self.width

    def smallest_batch(self) -> Batch:
        """A batch of one word a row and device, to initialise with."""
        rows = sharding.axis_size(*sharding.BATCH_AXES)
        words_BXL = jnp.zeros((rows, 2, 1), jnp.int32)
        letters = max(50, *(wide for wide, _ in self.filters))
        return {
            "words_BXL": words_BXL,
            "spellings_BXL": words_BXL,
            "characters_BXLC": jnp.zeros((rows, 2, 1, letters), jnp.int16),
        }

    def initial_carry(self, rows: int) -> Any:
        """The state of the LSTMs before any word."""
        return {
            "cell_BXNH": jnp.zeros((rows, 2, self.depth, self.cells)),
            "hidden_BXND": jnp.zeros((rows, 2, self.depth, self.width)),
        }

    def draw(self, batch: Batch, key: jax.Array) -> Drawn | None:
        """The negatives of a training step, and the rows of the softmax that it touches."""
        if not self.negatives:
            return None
        words_BXL = batch["words_BXL"] if self.tied else None
        return sampled.draw(
            batch["targets_BXL"], key, min(self.negatives, self.vocab), self.vocab, words_BXL
        )

    @nn.compact
    def __call__(
        self, batch: Batch, train: bool = False, carry: Any = None, states: bool = False
    ) -> Outputs:
        """Hidden states (B, X, L, D) of `words_BXL`, spelt `characters_BXLC`; new carry in `cache`.

        Args:
          batch: with `lengths_B`, the state of a row stays what it was after that many words.
          carry: where the LSTMs begin; None is `initial_carry`.
          states: also the input layer's output and every layer's.
        """
        drop = nn.Dropout(self.dropout, deterministic=not train)
        softmax = _Softmax(self.vocab, self.width, name="softmax")
        table_VD, bias_V = softmax()
        # A training step's table may hold the touched rows only (lmjax/sparse.py).
        readout = Readout(table_VD, bias_V, self.vocab, batch.get("negatives"))
        x_BXLD = self._words(batch, readout)
        carry = self.initial_carry(x_BXLD.shape[0]) if carry is None else carry
        layers, carries = [x_BXLD], []
        for n in range(self.depth):
            # The skip carries what was dropped, the recurrence what the skip was not added to.
            dropped_BXLD = drop(x_BXLD)
            lstm = ProjectedLSTM(
                self.cells, self.width, self.cell_clip, self.projection_clip, name=f"layer_{n}"
            )
            begin = carry["cell_BXNH"][:, :, n], carry["hidden_BXND"][:, :, n]
            x_BXLD, end = lstm(dropped_BXLD, begin, batch.get("lengths_B"))
            if self.skip and n:
                x_BXLD = x_BXLD + dropped_BXLD
            layers.append(x_BXLD)
            carries.append(end)
        cells, hiddens = zip(*carries, strict=True)
        cache = {"cell_BXNH": jnp.stack(cells, 2), "hidden_BXND": jnp.stack(hiddens, 2)}
        kept = jnp.stack(layers) if states else None
        return Outputs(drop(x_BXLD), readout, kept, cache)

    def _words(self, batch: Batch, readout: Readout) -> jax.Array:
        """The input layer (B, X, L, D)."""
        dtype = compute_dtype(self.dtype)
        if self.input == "characters":
            encoder = CharacterEncoder(
                self.embedding, self.filters, self.highways, self.width, self.activation,
                self.distinct, name="characters",
            )  # fmt: skip
            return encoder(batch["characters_BXLC"], batch["spellings_BXL"], dtype)
        words_BXL, table_VD = batch["words_BXL"], readout.table_VD
        if not self.tied:
            table_VD = _Words(self.vocab, self.width, name="words")()
        elif readout.negatives is not None:
            words_BXL = readout.negatives.place(words_BXL)
        flat_BLD: Any = embed(table_VD, words_BXL.reshape(words_BXL.shape[0], -1), dtype)
        return sharding.split_batch(flat_BLD.reshape(*words_BXL.shape, self.width))


class _Softmax(nn.Module):
    """The table that both directions are scored with; never the one of the characters."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self) -> tuple[Any, Any]:
        """Table (V, D) and bias (V,); or of the rows that a step takes out of them."""
        if not self.is_initializing():  # `param` would insist on all rows
            return self.get_variable("params", "embedding"), self.get_variable(
                "params", "output_bias"
            )
        rows = padded(self.vocab)
        init = padded_normal(1 / math.sqrt(self.width), self.vocab)
        table_VD = self.param("embedding", init, (rows, self.width))
        return table_VD, self.param("output_bias", nn.initializers.zeros, (rows,))


class _Words(nn.Module):
    """A table of words, for input that is not spelt."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self) -> Any:
        """Table (V, D)."""
        init = padded_normal(1.0, self.vocab)
        return self.param("embedding", init, (padded(self.vocab), self.width))


def _check(model: ELMo) -> None:
    check_ranges(model, "vocab", "depth", "cells", "width", "embedding")
    for name in ("cell_clip", "projection_clip", "distinct"):
        if getattr(model, name) < 0:
            raise ValueError(f"model.{name}={getattr(model, name)}: must be 0 or more")
    if not 0 <= model.dropout < 1:
        raise ValueError(f"model.dropout={model.dropout}: a rate from 0 up to 1")
    for name, allowed in (("input", _INPUTS), ("activation", _ACTIVATIONS)):
        if getattr(model, name) not in allowed:
            raise ValueError(f"model.{name}={getattr(model, name)}: one of {', '.join(allowed)}")
    if not model.filters or any(len(f) != 2 or min(f) < 1 for f in model.filters):
        raise ValueError(f"model.filters={model.filters}: pairs (characters, how many), above 0")
    if model.tied and model.input != "words":
        raise ValueError("model.tied: only the table of words (model.input=words) can be tied")
