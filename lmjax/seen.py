# SPDX-License-Identifier: Apache-2.0
"""What a step saw: the documents of its batch, from the arithmetic that made it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.data import Prepared, open_prepared
from lmjax.run import Run
from lmjax.store import Split
from lmjax.tokenizer import Tokenizer

_SHOWN = 60  # characters of a text
_READ = 40  # tokens that are enough for them


def documents_seen(run: Run, prepared: Prepared, step: int) -> dict[str, Any]:
    """The rows of the batch of step `step` (from 1), and what of which documents is in them.

    JSON: step, batches ([a, b), to be named in `skip_batches`), split, rows. Of each row: its
    example, counted in the phase, and the stretches of documents that it reads, each with the
    document's id, its tokens from … to (of so many) and how the text begins.
    """
    plan, split = run.plan(), prepared.store.splits["train"]
    examples = plan.indices(step - 1)
    maker = run.makers()[plan.stage(step - 1).phase]
    first, end = plan.batches_of(step - 1)
    ids = split.document_ids()
    rows = []
    for number, stretches in zip(
        examples.tolist(), maker.places(split, run.seed, examples), strict=True
    ):
        parts = [part for a, b in stretches for part in _documents(split, a, b)]
        described = [_described(split, prepared.tokenizer, ids, *part) for part in parts]
        rows.append({"example": number, "documents": described})
    return {"step": step, "batches": [first + 1, end + 1], "split": split.name, "rows": rows}


def show_batch(run: Run, workdir: Path, step: int, as_json: bool = False) -> None:
    """Prints what step `step` saw of a run directory's data.

    Raises:
      ValueError: there is no such step, or the data is no longer there.
    """
    if not 1 <= step <= run.steps:
        raise ValueError(f"step {step}: the run has steps 1 to {run.steps:,}")
    seen = documents_seen(run, open_prepared(run.data.folder(workdir)), step)
    if as_json:
        print(json.dumps(seen, ensure_ascii=False))
        return
    a, b = seen["batches"]
    numbers = f"batch {a:,}" if b == a + 1 else f"batches {a:,} to {b - 1:,}"
    print(f"step {step:,} saw {numbers} of the {seen['split']} split (--skip_batches={a}:{b})")
    for row, content in enumerate(seen["rows"]):
        for document in content["documents"]:
            place = f"tokens {document['from']:,} to {document['to']:,} of {document['of']:,}"
            print(f"row {row}  {document['document']}  {place}  {document['text']!r}")


def _documents(split: Split, a: int, b: int) -> Iterator[tuple[int, int, int]]:
    """(document, from, to) of tokens a … b − 1, which may be of several documents."""
    while a < b:
        number = int(np.searchsorted(split.starts, a, side="right")) - 1
        end = min(b, int(split.starts[number + 1]))
        yield number, a, end
        a = end


def _described(
    split: Split, tokenizer: Tokenizer, ids: list[str], number: int, a: int, b: int
) -> dict[str, Any]:
    start, end = int(split.starts[number]), int(split.starts[number + 1])
    text = tokenizer.decode(split.tokens[a : min(b, a + _READ)])
    short = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    return {"document": ids[number], "from": a - start, "to": b - start, "of": end - start,
            "text": short}  # fmt: skip
