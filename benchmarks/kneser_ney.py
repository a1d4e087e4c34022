# SPDX-License-Identifier: Apache-2.0
"""Interpolated modified Kneser-Ney n-grams (Chen & Goodman 1999): the baseline of word models.

    python -m benchmarks.kneser_ney --workdir=runs/elmo [--order=5]
    python -m benchmarks.kneser_ney --train='files:a/*.txt' --test='files:b/*.txt' \\
        --vocabulary=vocab.txt --split=words

Reads the words of a run's store, or of texts. Prints, as JSON, the perplexity per word and end of
sentence, forward and for reversed sentences, as `lmjax evaluate` does for ELMo: words outside of
the vocabulary are one word, <UNK>, and no word is seen across the beginning of a sentence.

A count of k words that do not reach the longest is the number of words seen before them, but a
plain count if they begin a sentence, for nothing stands before <S>. Every order has three discounts
of its own, from how many of its counts are 1, 2, 3 and 4; the last resort is all words alike.

Words are kept as numbers: k words are the row, in the sorted table of order k, of the pair (row of
the first k - 1 words in the table below, last word). A count is then a bincount, a look-up a
binary search.
"""

import argparse
import json
import math
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

START, END, UNKNOWN = range(3)
BYTES = 256  # first ids past the words begin a word that is spelt, the rest goes on with it
ABSENT = -1
FALLBACK = (0.5, 1.0, 1.5)  # where counts of counts are too few to tell (as KenLM)


@dataclass(frozen=True)
class Order:
    """The table of k words.

    pairs: int64, sorted: row of the first k - 1 words · size + last word. counts: of each pair.
    discounts: of a count of 0, 1, 2, and 3 or more. sums: of the counts that share their first
    k - 1 words, by the row of these. left: the share of each such sum that discounts took away.
    """

    pairs: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray
    sums: np.ndarray
    left: np.ndarray


class KneserNey:
    """A model of streams: words in [0, size), each sentence after a START, which is no target."""

    def __init__(self, stream: np.ndarray, size: int, order: int = 5) -> None:
        """Counts a stream. Errors: ValueError where it has no words, or order is below 1."""
        if order < 1:
            raise ValueError(f"order={order}: at least 1")
        stream = np.asarray(stream, np.int64)
        if not (stream != START).any():
            raise ValueError("the training text has no words")
        assert stream[0] == START
        self.size, self.orders = size, []
        depth = _depth(stream)
        pairs = [np.arange(size)]
        found, rows = [], stream  # rows: of the k words that end at each place
        plain = [np.bincount(stream, minlength=size)]
        for k in range(2, order + 1):
            above = np.flatnonzero(depth >= k - 1)
            keys, last, inverse = np.unique(
                rows[above - 1] * size + stream[above], return_index=True, return_inverse=True
            )
            place = above[last]
            # Of k words: the row without the first of them, and whether that is a START.
            found.append((rows[place], depth[place] == k - 1))
            rows = np.full(len(stream), ABSENT)
            rows[above] = inverse
            pairs.append(keys)
            plain.append(np.bincount(inverse, minlength=len(keys)))
        for k in range(order):
            self._add(pairs[k], _adjusted(plain, found, k), len(pairs[k - 1]) if k else 1)

    def _add(self, pairs: np.ndarray, counts: np.ndarray, contexts: int) -> None:
        if not self.orders:
            counts[START] = 0
        discounts = discounts_of(counts)
        context = pairs // self.size
        taken = discounts[np.minimum(counts, 3)]
        sums = np.bincount(context, counts, contexts)
        left = np.bincount(context, taken, contexts) / np.maximum(sums, 1)
        self.orders.append(Order(pairs, counts, discounts, sums, left))

    def probabilities(self, stream: np.ndarray) -> np.ndarray:
        """Of each target of a stream, in order: each word that is no START, after those before."""
        stream = np.asarray(stream, np.int64)
        depth, targets = _depth(stream), np.flatnonzero(stream != START)
        first = self.orders[0]
        rows, counts = stream, first.counts[stream]
        p = (counts - first.discounts[np.minimum(counts, 3)]) / first.sums[0]
        p += first.left[0] / (self.size - 1)
        for k, table in enumerate(self.orders[1:], 2):
            at = np.flatnonzero(depth >= k - 1)
            context = rows[at - 1]
            at, context = at[context != ABSENT], context[context != ABSENT]
            row = _find(table.pairs, context * self.size + stream[at])
            counts = np.where(row == ABSENT, 0, table.counts[row])
            # A context that nothing followed says nothing.
            sums = table.sums[context]
            own = (counts - table.discounts[np.minimum(counts, 3)]) / np.maximum(sums, 1)
            p[at] = np.where(sums > 0, own + table.left[context] * p[at], p[at])
            rows = np.full(len(stream), ABSENT)
            rows[at] = row
        return p[targets]


def _adjusted(plain: list[np.ndarray], found: list[Any], k: int) -> np.ndarray:
    """Counts of the table at `k`: plain ones of what begins a sentence, or is the longest."""
    if k + 1 == len(plain):
        return plain[k].copy()
    counts = np.bincount(found[k][0], minlength=len(plain[k]))
    return counts if not k else np.where(found[k - 1][1], plain[k], counts)


def discounts_of(counts: np.ndarray) -> np.ndarray:
    """What is taken from a count of 0, 1, 2, and 3 or more."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    if n[1:5].all():
        y = n[1] / (n[1] + 2 * n[2])
        found = [j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3)]
        if all(0 <= d <= j for j, d in enumerate(found, 1)):
            return np.array([0.0, *found])
    return np.array([0.0, *FALLBACK])


def _depth(stream: np.ndarray) -> np.ndarray:
    """Words since the START of each place's sentence."""
    here = np.arange(len(stream))
    return here - np.maximum.accumulate(np.where(stream == START, here, 0))


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rows of the wanted keys among the sorted ones, or ABSENT."""
    if not len(keys):
        return np.full(len(wanted), ABSENT)
    row = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[row] == wanted, row, ABSENT)


def stream_of(tokens: np.ndarray, size: int, backward: bool = False) -> np.ndarray:
    """A stored stream as START, words, END, …, each sentence reversed if backward."""
    words = np.asarray(tokens).astype(np.int64)
    words = words[words < size + BYTES]
    words[words >= size] = UNKNOWN
    if len(words) and words[-1] != END:
        words = np.append(words, END)
    if backward:  # of the reversed stream, each END comes before its sentence
        words = np.append(words[::-1][1:], END)
    starts = np.concatenate([[0], np.flatnonzero(words == END)[:-1] + 1])
    return np.insert(words, starts, START)


def perplexities(train: Any, test: Any, size: int, order: int) -> dict[str, Any]:
    """Held-out scores of both directions; train and test are stored streams of tokens."""
    result: dict[str, Any] = {"order": order, "vocabulary": size}
    nats = []
    for name, backward in (("forward", False), ("backward", True)):
        began = time.perf_counter()
        model = KneserNey(stream_of(train, size, backward), size, order)
        built = time.perf_counter()
        held = stream_of(test, size, backward)
        nats.append(float(-np.log(model.probabilities(held)).mean()))
        result |= {
            f"{name}_perplexity": math.exp(nats[-1]),
            f"{name}_build_seconds": round(built - began, 1),
            f"{name}_score_seconds": round(time.perf_counter() - built, 1),
            f"{name}_discounts": [o.discounts[1:].round(4).tolist() for o in model.orders],
            "ngrams": [len(o.pairs) for o in model.orders],
        }
    result["perplexity"] = math.exp(sum(nats) / 2)
    held = held[held != START]
    result |= {"words": len(held), "unknown_words": int((held == UNKNOWN).sum())}
    result["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return result


def stored(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens of the training and validation splits of a store, and the words of its vocabulary."""
    from lmjax.data import open_prepared
    from lmjax.vocabulary import VocabularyTokenizer

    prepared = open_prepared(folder)
    if not isinstance(prepared.tokenizer, VocabularyTokenizer):
        raise ValueError(f"{folder}: its tokens are no words; a store of Vocabulary() is needed")
    splits = prepared.store.splits
    if "validation" not in splits:
        raise ValueError(f"{folder}: has no validation split, only {', '.join(splits)}")
    return splits["train"].tokens, splits["validation"].tokens, prepared.tokenizer.words


def read(train: str, test: str, vocabulary: str, split: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """`stored` of corpora, as `--data.corpus` names them."""
    from lmjax.document import Report
    from lmjax.text import corpus_from_string
    from lmjax.vocabulary import Vocabulary, load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        Vocabulary(path=vocabulary, split=split).build(iter([]), Path(folder))
        tokenizer: Any = load_tokenizer(folder)

        def tokens(corpus: str) -> np.ndarray:
            documents = corpus_from_string(corpus).documents(Report())
            return np.concatenate([tokenizer.encode_batch([d.text])[0] for d in documents])

        return tokens(train), tokens(test), tokenizer.words


def main() -> None:
    """Prints the scores, a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a run, or a folder of its store")
    parser.add_argument("--train", help="a corpus, such as files:books/*.txt")
    parser.add_argument("--test", help="another corpus")
    parser.add_argument("--vocabulary", help="a file of words, as bilm-tf's")
    parser.add_argument("--split", default="words", choices=("words", "blanks", "chinese"))
    parser.add_argument("--order", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.workdir:
        inside = arguments.workdir / "data"
        train, test, size = stored(inside if inside.is_dir() else arguments.workdir)
    elif arguments.train and arguments.test and arguments.vocabulary:
        train, test, size = read(
            arguments.train, arguments.test, arguments.vocabulary, arguments.split
        )
    else:
        parser.error("give --workdir, or all of --train, --test and --vocabulary")
    print(json.dumps(perplexities(train, test, size, arguments.order)))


if __name__ == "__main__":
    main()
