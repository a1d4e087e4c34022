# SPDX-License-Identifier: Apache-2.0
"""GPT: a causal decoder (Radford et al. 2018, 2019; Brown et al. 2020).

Shapes: B batch, L length, D width, V vocabulary, H heads, S cache length, K head width, N layers.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from lmjax import sharding
from lmjax.attention import Kernel
from lmjax.blocks import Block, Remat, stack_apply, stack_init
from lmjax.layers import (
    Batch,
    Dtype,
    LayerNorm,
    Outputs,
    Readout,
    check_sizes,
    compute_dtype,
    embed,
    padded,
    padded_normal,
)


class GPT(nn.Module):
    """Decoder-only transformer with learned positions and a tied readout without bias.

    `one_table` is GPT-1's: positions are rows of the token table, after the tokens, and the
    softmax runs over them too. `cross_documents` lets attention see earlier documents of the
    window, as GPT-2 and GPT-3 do; otherwise segments are kept apart and positions restart.
    """

    vocab: int
    context: int
    depth: int
    width: int
    heads: int
    norm: Literal["pre", "post"] = "pre"
    one_table: bool = False
    cross_documents: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    position_std: float = 0.02
    scale_residual_init: bool = True
    dtype: Dtype = "auto"
    kernel: Kernel = "auto"
    remat: Remat = "none"
    unroll: int = 0

    def __post_init__(self) -> None:
        check_sizes(self)
        super().__post_init__()

    @property
    def rows(self) -> int:
        """Rows of the table that mean something."""
        return self.vocab + (self.context if self.one_table else 0)

    @property
    def padding(self) -> int:
        """Parameters in padding rows: stored, but no part of the model."""
        return (padded(self.rows) - self.rows) * self.width

    def flops_per_token(self, length: int) -> int:
        """Training FLOPs per token: 6 N + 12 N_layers · D · L (Chowdhery et al. 2022, appendix B).

        N are the parameters that are multiplied with: all but the positions, unless they are rows
        of the readout. Attention counts as if every token saw the whole window, as there.
        """
        block = 12 * self.width**2 + 13 * self.width
        final = 2 * self.width if self.norm == "pre" else 0
        multiplied = self.rows * self.width + self.depth * block + final
        return 6 * multiplied + 12 * self.depth * self.width * length

    @nn.compact
    def __call__(
        self, batch: Batch, train: bool = False, cache: Any = None, states: bool = False
    ) -> Outputs:
        """Hidden states (B, L, D) for `tokens_BL`, with `segments_BL`, `positions_BL` if needed."""
        tokens_BL, dtype = batch["tokens_BL"], compute_dtype(self.dtype)
        rows, depth = self.rows, self.depth
        init = padded_normal(0.02, rows)
        table_VD = self.param("embedding", init, (padded(rows), self.width))
        drop = nn.Dropout(self.dropout, deterministic=not train)
        offset, layers = (None, None) if cache is None else (cache["offset"], cache["layers"])
        places: dict[str, Any] = {"offset": offset}
        if self.cross_documents or cache is not None:
            positions_BL = jnp.arange(tokens_BL.shape[1])[None] + (0 if offset is None else offset)
        else:
            positions_BL, places["segments_BL"] = batch["positions_BL"], batch["segments_BL"]

        place_BLD: Any
        if self.one_table:
            # GPT-1 drops entries of the table, so a dropped one leaves the readout too.
            table_VD = drop(table_VD)
            rows_BL = jnp.broadcast_to(self.vocab + positions_BL, tokens_BL.shape)
            place_BLD = embed(table_VD, rows_BL, dtype)
            hidden_BLD = embed(table_VD, tokens_BL, dtype) + place_BLD
        else:
            shape, std = (self.context, self.width), nn.initializers.normal(self.position_std)
            weights = {"positions": self.param("positions", std, shape)}
            place_BLD = sharding.for_compute(weights, dtype)["positions"][positions_BL]
            hidden_BLD = drop(embed(table_VD, tokens_BL, dtype) + place_BLD)

        out_std = 0.02 / math.sqrt(2 * depth) if self.scale_residual_init else 0.02
        block = Block(
            self.heads, 4 * self.width, "gelu_tanh", True, self.norm, 1e-5, 0.02, out_std,
            self.dropout, self.attention_dropout, self.kernel, parent=None,
        )  # fmt: skip
        blocks = self.param("blocks", stack_init(block, depth, self.width))
        dropping = train and (self.dropout or self.attention_dropout)
        hidden_BLD, states_NBLD, layers = stack_apply(
            block, blocks, hidden_BLD, layers,
            dropout_key=self.make_rng("dropout") if dropping else None,
            states=states, remat=self.remat, unroll=self.unroll, train=train, **places,
        )  # fmt: skip
        if self.norm == "pre":
            hidden_BLD = LayerNorm(1e-5, name="final_norm")(hidden_BLD)
        if cache is not None:
            cache = {"offset": cache["offset"] + tokens_BL.shape[1], "layers": layers}
        return Outputs(hidden_BLD, Readout(table_VD, rows=rows), states_NBLD, cache)

    def empty_cache(self, rows: int, length: int) -> Any:
        """Keys and values of no tokens yet, for `rows` sequences of up to `length`."""
        shape = (self.depth, rows, self.heads, length, self.width // self.heads)
        zeros_NBHSK = jnp.zeros(shape, compute_dtype(self.dtype))
        return {"offset": jnp.int32(0), "layers": (zeros_NBHSK, zeros_NBHSK)}
