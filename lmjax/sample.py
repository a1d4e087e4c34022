# SPDX-License-Identifier: Apache-2.0
"""Samples from a run directory: restores, generates, prints and records."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lmjax import sharding
from lmjax.checkpoint import load_params
from lmjax.generate import Sampling, beam_text, generate_text
from lmjax.report import write_report
from lmjax.run import Run
from lmjax.step import abstract_params
from lmjax.workdir import run_tokenizer


def sample(
    run: Run,
    workdir: Path,
    prompt: str,
    sampling: Sampling,
    tokens: int = 200,
    beams: int = 1,
    stop: Sequence[str] = (),
) -> str:
    """Prints a continuation as it comes, appends it to samples.jsonl and renews the report.

    Raises:
      ValueError: no checkpoint or tokeniser in `workdir`, or an option out of range.
    """
    if beams < 1:
        raise ValueError(f"beams={beams}: allowed are 1 (no beam search) and above")
    tokenizer = run_tokenizer(workdir)
    with sharding.use(sharding.Layout().mesh()):
        step, params = load_params(workdir, abstract_params(run.model))
        print(prompt, end="", flush=True)
        if beams > 1:
            best = beam_text(run.model, params, tokenizer, prompt, beams, tokens, stop)
            pieces = iter([best])
        else:
            pieces = generate_text(run.model, params, tokenizer, prompt, sampling, tokens, stop)
        text = ""
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
        print()
    with open(workdir / "samples.jsonl", "a", encoding="utf-8") as file:
        line = {"step": step, "prompt": prompt, "text": text}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"report: {write_report(workdir)}", file=sys.stderr)
    return text
