# SPDX-License-Identifier: Apache-2.0
"""Splits with sentences, built in memory, and what every encoder batch must satisfy."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

CONTROLS = {"pad": 0, "cls": 1, "sep": 2, "mask": 3}
ORDINARY = 10  # the token at place p of the stream has the id p + ORDINARY

# Documents as lists of sentence lengths; a document may have no sentence.
documents = st.lists(st.lists(st.integers(1, 30), max_size=9), min_size=1, max_size=8).filter(any)


@dataclass
class FakeSplit:
    """The attributes of `store.Split` that example makers read."""

    tokens: np.ndarray
    starts: np.ndarray
    sentences: np.ndarray | None
    marks: np.ndarray | None
    vocab: int
    controls: dict[str, int] = field(default_factory=lambda: dict(CONTROLS))
    name: str = "train"
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def n_documents(self) -> int:
        return len(self.starts) - 1


def split_of(lengths, ids=None, marks=None, vocab: int = 0, controls=None) -> Any:
    """A split of documents given as sentence lengths, each behind [SEP].

    ids, marks: of all sentences' tokens, one after the other; by default a token shows its place
    in the stream, and every third one begins a word.
    """
    sizes = [1 + sum(document) for document in lengths]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    begins = [
        start + 1 + sum(document[:i])
        for start, document in zip(starts, lengths, strict=False)
        for i in range(len(document))
    ]
    ordinary = np.ones(starts[-1], bool)
    ordinary[starts[:-1]] = False
    tokens = np.arange(starts[-1]) + ORDINARY
    if ids is not None:
        tokens[ordinary] = ids
    controls = dict(controls or CONTROLS)
    tokens[~ordinary] = controls["sep"]
    all_marks = np.zeros(starts[-1], np.uint8)
    all_marks[ordinary] = 3 * (np.arange(ordinary.sum()) % 3 == 0) if marks is None else marks
    all_marks[np.asarray(begins, int)] |= 3
    return FakeSplit(
        tokens.astype(np.uint32), starts, np.asarray(begins, np.int64), all_marks,
        vocab or int(starts[-1]) + ORDINARY, controls,
    )  # fmt: skip


def originals(batch) -> np.ndarray:
    """tokens_BL with every scored token put back."""
    tokens = batch["tokens_BL"].copy()
    rows, slots = np.nonzero(batch["weights_BP"])
    tokens[rows, batch["masked_BP"][rows, slots]] = batch["targets_BP"][rows, slots]
    return tokens


def check_batch(batch, rows: int, length: int, slots: int) -> None:
    """Shapes, types, and what holds for every scheme that never chooses a control."""
    shapes = {"BL": (rows, length), "BP": (rows, slots)}
    for key, value in batch.items():
        assert value.dtype == (np.float32 if "weights" in key else np.int32), key
        assert value.shape[:1] == (rows,) and value.shape == shapes.get(key[-2:], value.shape)
    used = batch["weights_BP"] > 0
    assert (used == (used.sum(1)[:, None] > np.arange(slots))).all()  # the first slots
    columns = np.where(used, batch["masked_BP"], length + np.arange(slots))
    assert (np.diff(columns, axis=1) > 0).all()
    assert not batch["masked_BP"][~used].any() and not batch["targets_BP"][~used].any()
    real = batch["segments_BL"] > 0
    assert (batch["tokens_BL"][~real] == CONTROLS["pad"]).all()
    before = originals(batch)
    scored = np.take_along_axis(before, batch["masked_BP"].astype(int), axis=1)[used]
    assert not np.isin(scored, [0, 1, 2]).any()
    assert (np.take_along_axis(batch["segments_BL"], batch["masked_BP"], 1)[used] > 0).all()


def same(one, other, rows=slice(None)) -> bool:
    """Whether two batches are equal; `rows` of the second."""
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k][rows]) for k in one)
