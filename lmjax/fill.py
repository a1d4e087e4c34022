# SPDX-License-Identifier: Apache-2.0
"""Words for the masks of a text, from the newest checkpoint of a masked language model."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import sharding
from lmjax.checkpoint import load_params
from lmjax.run import Run
from lmjax.step import abstract_params
from lmjax.tokenizer import Tokenizer
from lmjax.workdir import run_tokenizer


def fill(run: Run, workdir: Path, text: str, top: int = 5, as_json: bool = False) -> list[Any]:
    """Prints the likeliest words of each mask with their probabilities, and returns them.

    Each mask is filled for itself, the others staying masked.

    Args:
      text: with the tokeniser's mask word, or [MASK], at least once.
      top: words a mask.

    Raises:
      ValueError: no mask, a text longer than the model's context, a model or tokeniser that knows
        no masks, or no checkpoint in `workdir`.
    """
    tokenizer = _tokenizer(workdir)
    if not 1 <= top <= run.model.vocab:
        raise ValueError(f"--top={top}: from 1 to {run.model.vocab:,}, the vocabulary")
    tokens_BL = _row(tokenizer, text, run.model.context)
    columns = np.flatnonzero(tokens_BL[0] == tokenizer.controls["mask"])
    if not len(columns):
        raise ValueError(f"--text={text!r} has no mask; write [MASK] where a word is wanted")
    with sharding.use(sharding.Layout().mesh(jax.devices()[:1])):
        step, params = load_params(workdir, abstract_params(run.model))
        probs_PV = np.asarray(probabilities(run.model, params, tokens_BL, columns[None]))[0]
    known = min(tokenizer.vocab, probs_PV.shape[1])
    best_PK = np.argsort(-probs_PV[:, :known], axis=1, kind="stable")[:, :top]
    found = [
        [{"word": tokenizer.piece(int(i)), "id": int(i), "probability": float(row[i])} for i in ids]
        for row, ids in zip(probs_PV, best_PK, strict=True)
    ]
    if as_json:
        print(json.dumps({"text": text, "step": step, "masks": found}, ensure_ascii=False))
        return found
    for number, words in enumerate(found, 1):
        if len(found) > 1:
            print(f"mask {number}")
        for word in words:
            print(f"  {word['probability']:.4f}  {word['word']}")
    return found


def _tokenizer(workdir: Path) -> Tokenizer:
    tokenizer = run_tokenizer(workdir)
    if "mask" not in tokenizer.controls:
        raise ValueError(f"the tokeniser of {workdir} knows no mask: its model fills in no words")
    return tokenizer


def _row(tokenizer: Tokenizer, text: str, context: int) -> np.ndarray:
    """[CLS] text [SEP] as ids (1, L)."""
    controls, ids = tokenizer.controls, tokenizer.encode_masked(text)
    if len(ids) + 2 > context:
        raise ValueError(f"--text has {len(ids):,} tokens; {context - 2:,} are the most that fit")
    return np.array([[controls["cls"], *ids, controls["sep"]]], np.int32)


def probabilities(
    model: Any, params: Any, tokens_BL: np.ndarray, columns_BP: np.ndarray
) -> jax.Array:
    """softmax of the scores at some columns of whole rows, (B, P, V) in float32."""

    @jax.jit
    def scored(params: Any, tokens_BL: jax.Array, columns_BP: jax.Array) -> jax.Array:
        batch = {"tokens_BL": tokens_BL, "masked_BP": columns_BP}
        outputs: Any = model.apply({"params": params}, batch)
        if "masked_BPE" not in outputs.heads:
            raise ValueError("the model has no masked-token head (model.masked=False)")
        return jax.nn.softmax(outputs.readout.logits(outputs.heads["masked_BPE"]), axis=-1)

    return scored(params, jnp.asarray(tokens_BL), jnp.asarray(columns_BP, jnp.int32))
