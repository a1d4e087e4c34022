# SPDX-License-Identifier: Apache-2.0
"""Held-out scores of a bidirectional model over words: its two directions, apart and on average."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lmjax.evaluator import Evaluator
from lmjax.store import Split

COMPARABLE = {
    "perplexity": "bidirectional models of the same vocabulary and words, full softmax; it is "
    "exp of the mean of both directions' losses, and the unknown word counts as one word",
    "forward_perplexity": "models of the same vocabulary that read from left to right",
    "bits_per_byte": "models of any vocabulary on the same text that read in one direction; "
    "unknown words are paid for letter by letter, the blanks between words are not",
}


def report(score: Evaluator, means: Mapping[str, float], train: Split | None) -> dict[str, Any]:
    """The contents of `evaluation-<split>.json` of a bidirectional language model.

    Args:
      means: what `score(params)` gave.
      train: the training split, whose unknown words say how those of this split are spelt; None:
        every byte costs 8 bits.
    """
    split = score.split
    words = int(means["forward_loss_weight"])
    spelling, unknown = spelling_bits(split, train)
    result: dict[str, Any] = {
        "loss": means["loss"],
        "perplexity": _perplexity(means["loss"]),
        "bits_per_byte": _bits(means["loss"] * words, spelling, split),
    }
    for name in ("forward", "backward"):
        loss = means[f"{name}_loss"]
        result |= {
            f"{name}_loss": loss,
            f"{name}_perplexity": _perplexity(loss),
            f"{name}_bits_per_byte": _bits(loss * words, spelling, split),
        }
    return result | {
        "words": words,
        "unknown_words": unknown,
        "spelling_bits": spelling,
        "bytes": split.n_bytes,
        "documents": split.n_documents,
        "comparable_with": COMPARABLE,
    }


def spelling_bits(split: Split, train: Split | None) -> tuple[float, int]:
    """Bits that spell the unknown words of `split`, and how many these are.

    The code of a word is its first byte, its others and an end, each by its frequency among the
    unknown words of `train`, plus one.
    """
    first, rest = _spelt(split)
    if train is None:
        return 8.0 * (first.sum() + rest.sum()), int(first.sum())
    bits = 0.0
    for counts, known in zip((first, rest), _spelt(train), strict=True):
        bits -= float((counts * np.log2((known + 1) / (known + 1).sum())).sum())
    return bits, int(first.sum())


def _spelt(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Counts of first bytes [256], and of further bytes and ends [257], of unknown words."""
    words = split.vocab - 512
    spelt = np.bincount(split.tokens, minlength=split.vocab)[words:]
    return spelt[:256], np.append(spelt[256:], spelt[:256].sum())


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


def _bits(nats: float, spelling: float, split: Split) -> float:
    return (nats / math.log(2) + spelling) / split.n_bytes


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The result in words."""
    yield (
        f"{result['split']} split at step {result['step']:,}: {result['words']:,} words and ends of"
        f" sentences, {result['unknown_words']:,} of them unknown, {result['bytes']:,} bytes"
    )
    yield f"  {'':<14}{'forward':>12}{'backward':>12}{'average':>12}"
    for name, label in (
        ("loss", "nats per word"),
        ("perplexity", "perplexity"),
        ("bits_per_byte", "bits per byte"),
    ):
        each = (result[f"forward_{name}"], result[f"backward_{name}"], result[name])
        yield f"  {label:<14}" + "".join(f"{value:>12.4f}" for value in each)
    yield "  compare them only with:"
    for name, other in result["comparable_with"].items():
        yield f"    {name}: {other}"
