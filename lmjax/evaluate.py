# SPDX-License-Identifier: Apache-2.0
"""Held-out evaluation: every token of a split scored once, in numbers that can be compared."""

import lzma
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax import batches, cpu, sharding
from lmjax.checkpoint import load_params
from lmjax.data import Prepared, hold_out, open_prepared
from lmjax.progress import Work
from lmjax.recipe import dump, nearest
from lmjax.report import write_report
from lmjax.run import Run
from lmjax.step import abstract_params, make_eval_step
from lmjax.store import Split, is_occupied
from lmjax.text import Corpus
from lmjax.tokenizer import Tokenizer, load_tokenizer
from lmjax.workdir import write_text

# xz needs the text in memory; beyond this a comparison takes minutes and tells nothing new.
_XZ_LIMIT = 64 * 2**20


class Evaluator:
    """Scores one split of a run's data; compiled once, used as often as wanted."""

    def __init__(self, run: Run, prepared: Prepared, split: str, windows: int = 0) -> None:
        """The first `windows` windows of `split`, or all of them.

        Raises:
          ValueError: no such split, or one with fewer tokens than a window.
        """
        splits = prepared.store.splits
        if split not in splits:
            near = nearest(split, splits)
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"there is no {split} split: one of {', '.join(splits)}{hint}")
        self.split = splits[split]
        self._examples = run.data.examples
        unknown = prepared.store.manifest["splits"][split]["unknown"]
        self.lossless = prepared.tokenizer.lossless and not unknown
        count = self._examples.held_out_count(self.split)
        self.windows = min(windows, count) if windows else count
        self._plan = batches.Plan(run.batch, self._examples.length)
        step = make_eval_step(run.model, run.loss)
        self._step = jax.jit(step, compiler_options=cpu.compiler_options())

    def __call__(self, params: Any) -> dict[str, float]:
        """Mean of every loss per unit of weight, and `<name>_weight`, the units."""
        steps = -(-self.windows // self._plan.sizes[-1])

        def make(windows: np.ndarray) -> batches.Arrays:
            batch = self._examples.held_out(self.split, windows)
            batch["weights_BL"] *= (windows < self.windows)[:, None]
            return batch

        parts = [self._step(params, b) for b in batches.batches(make, self._plan, 0, steps)]
        result = {}
        for name in parts[0]:  # summed on the host: float32 would lose the last digits
            sums, weights = zip(*(jax.device_get(part[name]) for part in parts), strict=True)
            weight = float(np.sum(weights, dtype=np.float64))
            result[name] = float(np.sum(sums, dtype=np.float64)) / weight
            result[f"{name}_weight"] = weight
        return result

    def report(self, params: Any, step: int) -> dict[str, Any]:
        """The contents of `evaluation-<split>.json`: the whole split, in nats and bits.

        Bits per byte divide by the bytes of the split's text; the ends of documents are paid for
        as well. A tokeniser that loses text has none (null).
        """
        scores = self(params)
        tokens = int(scores["loss_weight"])
        bits = scores["loss"] * tokens / math.log(2)
        return {
            "split": self.split.name,
            "loss": scores["loss"],
            "perplexity": math.exp(min(scores["loss"], 700)),
            "bits_per_byte": bits / self.split.n_bytes if self.lossless else None,
            "accuracy": scores["accuracy"],
            "tokens": tokens,
            "bytes": self.split.n_bytes,
            "documents": self.split.n_documents,
            "step": step,
        }


def evaluate(
    run: Run, workdir: Path, split: str = "", corpus: Corpus | None = None
) -> dict[str, Any]:
    """Scores the newest checkpoint of `workdir`; prints, and writes `evaluation-<split>.json`.

    Args:
      split: default "test", or "validation" where the recipe holds out no test split.
      corpus: score all of this one instead of a split of the run's own; `split` names the result.

    Raises:
      ValueError: no checkpoint, no such split, or a store that is damaged.
    """
    if split and not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", split):
        raise ValueError(f"--split={split}: a name of letters, digits, - and _")
    own = run.data.folder(workdir)
    with sharding.use(run.mesh.mesh()):
        if corpus is None:
            if not is_occupied(own):
                raise ValueError(f"{own} holds no token store; name a corpus: --data.corpus=…")
            prepared = open_prepared(own)
            split = split or ("test" if "test" in prepared.store.splits else "validation")
            score = Evaluator(run, prepared, split)
        else:
            tokenizer = load_tokenizer(workdir / "tokenizer")
            prepared = hold_out(corpus, tokenizer, workdir, Work("tokenising"))
            score = Evaluator(run, prepared, "test")
        step, params = load_params(workdir, abstract_params(run.model))
        result = score.report(params, step)
    name = split or "corpus"
    result["split"] = name
    if score.lossless:
        counted = open_prepared(own) if is_occupied(own) else None
        result["baselines"] = baselines(prepared.tokenizer, score.split, counted)
    write_text(workdir / f"evaluation-{name}.json", dump(result))
    for line in _lines(result):
        print(line)
    print(f"report: {write_report(workdir)}")
    return result


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{result['split']} split at step {result['step']:,}: {result['tokens']:,} tokens, "
        f"{result['bytes']:,} bytes, {result['documents']:,} documents"
    )
    yield f"  loss           {result['loss']:.4f} nats per token"
    yield f"  perplexity     {result['perplexity']:.3f} per token"
    if result["bits_per_byte"] is None:
        yield "  bits per byte  none: the tokeniser does not keep all of this text"
        return
    yield f"  bits per byte  {result['bits_per_byte']:.4f}"
    for name, value in result.get("baselines", {}).items():
        if value is not None:
            yield f"    {name.split('_')[0]:<12} {value:.4f}  (the same text)"


def baselines(
    tokenizer: Tokenizer, held_out: Split, trained_on: Prepared | None
) -> dict[str, float | None]:
    """Bits per byte of a unigram model of the same tokens and of xz on the same text.

    The unigram model has the token counts of the training split, plus one.
    """
    unigram = xz = None
    if trained_on is not None:
        train = trained_on.store.splits["train"]
        counts = np.bincount(train.tokens, minlength=tokenizer.vocab) + 1.0
        bits = -np.log2(counts / counts.sum())
        unigram = float(bits[held_out.tokens].sum()) / held_out.n_bytes
    if held_out.n_bytes <= _XZ_LIMIT:
        xz = 8 * len(lzma.compress(split_text(tokenizer, held_out), preset=9)) / held_out.n_bytes
    return {"unigram_bits_per_byte": unigram, "xz_bits_per_byte": xz}


def split_text(tokenizer: Tokenizer, split: Split) -> bytes:
    """The text of a split, documents one after the other."""
    skip = split.eot is not None
    bounds = zip(split.starts[:-1], split.starts[1:], strict=True)
    return b"".join(tokenizer.decode(split.tokens[a + skip : b]).encode() for a, b in bounds)
