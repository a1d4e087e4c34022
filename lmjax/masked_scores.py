# SPDX-License-Identifier: Apache-2.0
"""Held-out scores of encoders, each with what it may be compared with."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lmjax.evaluator import Evaluator
from lmjax.pseudo import Pseudo, pseudo_likelihood
from lmjax.run import Run
from lmjax.store import Split

COMPARABLE = {
    "masked_loss": "masked models of the same vocabulary and the same masks; "
    "never with the loss of a model that reads from left to right",
    "masked_accuracy": "masked models of the same vocabulary and the same masks",
    "pair_accuracy": "models that were asked the same question of the same pairs",
    "replaced_accuracy": "this model at other steps: the generator that it is asked about differs",
    "replaced_auc": "this model at other steps; 0.5 is chance",
    "pseudo_perplexity": "masked models of the same vocabulary and window, one token masked at a "
    "time; never with the perplexity of a model that reads from left to right",
    "pseudo_bits_per_byte": "masked models of any vocabulary on the same text; below what any code "
    "could reach, for each token is told both of its sides",
}


# What the label of a pair answers, by the example maker's pairing.
_QUESTIONS = {
    "next": "does the second text follow the first? (NSP)",
    "order": "are two texts that follow each other swapped? (SOP)",
}


def report(
    run: Run,
    score: Evaluator,
    means: Mapping[str, float],
    params: Any,
    train: Split | None,
    pseudo: int,
) -> dict[str, Any]:
    """The contents of `evaluation-<split>.json` for an encoder.

    Args:
      means: what `score(params)` gave.
      train: the training split, whose token counts are the unigram baseline's; None for none.
      pseudo: how many tokens to score one by one at most; 0 for none.
    """
    split = score.split
    result: dict[str, Any] = {"loss": means["loss"], "length": score.length}
    if pairing := _QUESTIONS.get(getattr(score.examples, "pairing", "")):
        result["pair_question"] = pairing
    for name, mean in means.items():
        if name != "loss" and not name.endswith("_weight"):
            result[name] = mean
        if name.endswith("_loss"):
            result[name.removesuffix("loss") + "count"] = int(means[f"{name}_weight"])
    result["masked_perplexity"] = math.exp(min(means["masked_loss"], 700))
    if "replaced_loss" in means:
        result["replaced_auc"] = area_under_curve(*score.collect(params, _replaced))
    if pseudo and split.eot is not None and split.sentences is not None:
        found = pseudo_likelihood(run.model, params, split, score.length, score.rows, pseudo)
        result |= pseudo_scores(found, split.n_bytes)
    result |= {"bytes": split.n_bytes, "documents": split.n_documents}
    result["baselines"] = baselines(score, train, run.model.vocab)
    result["comparable_with"] = {k: v for k, v in COMPARABLE.items() if k in result}
    return result


def pseudo_scores(found: Pseudo, n_bytes: int) -> dict[str, Any]:
    """The numbers of a pseudo-likelihood by name; errors are half of a 95 % interval."""
    per_byte = found.tokens / math.log(2) / n_bytes
    perplexity = math.exp(min(found.loss, 700))
    return {
        "pseudo_loss": found.loss,
        "pseudo_perplexity": perplexity,
        "pseudo_bits_per_byte": found.loss * per_byte,
        "pseudo_exact": found.scored == found.tokens,
        "pseudo_scored": found.scored,
        "pseudo_tokens": found.tokens,
        "pseudo_loss_error": found.error,
        "pseudo_perplexity_error": perplexity * found.error,
        "pseudo_bits_per_byte_error": found.error * per_byte,
    }


def _replaced(outputs: Any, batch: Any) -> Any:
    return outputs.heads["replaced_BL"], outputs.heads["is_replaced_BL"], batch["segments_BL"] > 0


def area_under_curve(scores: np.ndarray, labels: np.ndarray, counted: np.ndarray) -> float | None:
    """Chance that a replaced token scores above an original one, ties counting half.

    None where there are not both.
    """
    scores, labels = scores[counted], labels[counted] > 0
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        return None
    _, where, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # from 1, the mean rank of equal scores
    above = rank[where][labels].sum() - positive * (positive + 1) / 2
    return float(above / positive / negative)


def baselines(score: Evaluator, train: Split | None, vocab: int) -> dict[str, float]:
    """What needs no model: the commonest token and its counts, the commoner label."""
    found: dict[str, float] = {}
    held = score.host_arrays("targets_BP", "weights_BP", "pairs_BC", "pair_weights_BC")
    targets, weights = held["targets_BP"], held["weights_BP"]
    if train is not None:
        counts = np.bincount(train.tokens, minlength=vocab) + 1.0
        if train.eot is not None:
            counts[train.eot] = 1.0  # the ids between documents are no text
        nll = np.log(counts.sum()) - np.log(counts)
        total = weights.sum()
        found["unigram_masked_loss"] = float((nll[targets] * weights).sum() / total)
        hits = targets == counts.argmax()
        found["unigram_masked_accuracy"] = float((hits * weights).sum() / total)
    if "pairs_BC" in held:
        labels, weights = held["pairs_BC"], held["pair_weights_BC"]
        share = float((labels * weights).sum() / weights.sum())
        found["majority_pair_accuracy"] = max(share, 1 - share)
    return found


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The result in words."""
    base = result["baselines"]
    yield (
        f"{result['split']} split at step {result['step']:,}: {result['documents']:,} documents,"
        f" {result['bytes']:,} bytes, in sequences of up to {result['length']:,} tokens"
    )
    yield f"  masked tokens    {result['masked_count']:,}"
    unigram = base.get("unigram_masked_loss")
    yield f"    loss           {result['masked_loss']:.4f} nats" + _beside(unigram, "unigram")
    accuracy = base.get("unigram_masked_accuracy")
    yield f"    accuracy       {result['masked_accuracy']:.4f}" + _beside(accuracy, "unigram")
    if "pair_accuracy" in result:
        majority = base.get("majority_pair_accuracy")
        question = result.get("pair_question", "as their labels say")
        yield f"  sentence pairs   {result['pair_count']:,}: {question}"
        yield f"    accuracy       {result['pair_accuracy']:.4f}" + _beside(majority, "one label")
    if "replaced_accuracy" in result:
        share = 1 - result["replaced_share"]
        yield f"  replaced tokens  among {result['replaced_count']:,}"
        yield f"    accuracy       {result['replaced_accuracy']:.4f}" + _beside(share, "never")
        if result["replaced_auc"] is not None:
            yield f"    AUC            {result['replaced_auc']:.4f}  (chance 0.5)"
    if "pseudo_loss" in result:
        yield from _pseudo_lines(result)
    yield "  compare them only with:"
    for name, other in result["comparable_with"].items():
        yield f"    {name}: {other}"


def _pseudo_lines(result: Mapping[str, Any]) -> Iterator[str]:
    exact = "exact" if result["pseudo_exact"] else "sampled; ± half of a 95 % interval"
    yield (
        f"  one at a time    {result['pseudo_scored']:,} of {result['pseudo_tokens']:,} tokens"
        f" ({exact})"
    )
    for name, label in (
        ("pseudo_perplexity", "pseudo-perplexity"),
        ("pseudo_bits_per_byte", "pseudo-bits/byte"),
    ):
        error = "" if result["pseudo_exact"] else f" ± {result[f'{name}_error']:.4f}"
        yield f"    {label:<18}{result[name]:.4f}{error}"


def _beside(value: float | None, name: str) -> str:
    return "" if value is None else f"  ({name} {value:.4f})"
