# SPDX-License-Identifier: Apache-2.0
"""Held-out evaluation: every token of a split scored once, in numbers that can be compared."""

import lzma
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmjax import hosts, masked_scores, sharding, word_scores
from lmjax.checkpoint import load_params
from lmjax.data import Prepared, hold_out, open_prepared
from lmjax.evaluator import Evaluator
from lmjax.progress import Work
from lmjax.recipe import dump
from lmjax.report import write_report
from lmjax.run import Run
from lmjax.step import abstract_params
from lmjax.store import Split, is_occupied
from lmjax.text import Corpus
from lmjax.tokenizer import Tokenizer, load_tokenizer
from lmjax.workdir import write_text

# xz needs the text in memory; beyond this a comparison takes minutes and tells nothing new.
_XZ_LIMIT = 64 * 2**20
PSEUDO_TOKENS = 1024


def next_token_report(score: Evaluator, means: Mapping[str, float]) -> dict[str, Any]:
    """The contents of `evaluation-<split>.json` of a decoder, in nats and bits.

    Bits per byte divide by the bytes of the split's text; the ends of documents are paid for as
    well. A tokeniser that loses text has none (null).
    """
    tokens = int(means["loss_weight"])
    bits = means["loss"] * tokens / math.log(2)
    return {
        "loss": means["loss"],
        "perplexity": math.exp(min(means["loss"], 700)),
        "bits_per_byte": bits / score.split.n_bytes if score.lossless else None,
        "accuracy": means["accuracy"],
        "tokens": tokens,
        "bytes": score.split.n_bytes,
        "documents": score.split.n_documents,
    }


def evaluate(
    run: Run,
    workdir: Path,
    split: str = "",
    corpus: Corpus | None = None,
    pseudo: int = PSEUDO_TOKENS,
) -> dict[str, Any]:
    """Scores the newest checkpoint of `workdir`; prints, and writes `evaluation-<split>.json`.

    Args:
      split: default "test", or "validation" where the recipe holds out no test split.
      corpus: score all of this one instead of a split of the run's own; `split` names the result.
      pseudo: tokens that an encoder scores one by one, each alone masked; 0 for none.

    Raises:
      ValueError: no checkpoint, no such split, or a store that is damaged.
    """
    if split and not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", split):
        raise ValueError(f"--split={split}: a name of letters, digits, - and _")
    if pseudo < 0:
        raise ValueError(f"--pseudo={pseudo}: 0 (none) or more")
    own = run.data.folder(workdir)
    with sharding.use(run.mesh.mesh()):
        prepared, part = _held_out(run, workdir, split, corpus)
        step, params = load_params(workdir, abstract_params(run.model))
        phase = run.plan().stage(max(step, 1) - 1).phase
        score = Evaluator(run, prepared, part, phase=phase)
        means = score(params)
        counted = prepared
        if corpus is not None:  # another text's; what was trained on is counted in the run's own
            counted = open_prepared(own) if is_occupied(own) else None
        lines, train = _lines, counted.store.splits["train"] if counted else None
        if "masked_loss" in means:
            lines = masked_scores.lines
            result = masked_scores.report(run, score, means, params, train, pseudo)
        elif "backward_loss" in means:
            lines = word_scores.lines
            result = word_scores.report(score, means, train)
        else:
            result = next_token_report(score, means)
            if score.lossless:
                result["baselines"] = baselines(prepared.tokenizer, score.split, counted)
    name = split or (part if corpus is None else "corpus")
    result |= {"split": name, "step": step}
    if not hosts.is_first():
        return result
    write_text(workdir / f"evaluation-{name}.json", dump(result))
    for line in lines(result):
        print(line)
    print(f"report: {write_report(workdir)}")
    return result


def _held_out(run: Run, workdir: Path, split: str, corpus: Corpus | None) -> tuple[Prepared, str]:
    """The store to score, and the name of its split."""
    if corpus is not None:
        tokenizer = load_tokenizer(workdir / "tokenizer")
        work = Work("tokenising")
        return hold_out(corpus, tokenizer, workdir, work, run.data.units), "test"
    own = run.data.folder(workdir)
    if not is_occupied(own):
        raise ValueError(f"{own} holds no token store; name a corpus: --data.corpus=…")
    prepared = open_prepared(own)
    return prepared, split or ("test" if "test" in prepared.store.splits else "validation")


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
