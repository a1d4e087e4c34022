# SPDX-License-Identifier: Apache-2.0
"""Examples/s that one core makes for encoders, and the seconds that a pass takes to lay out.

    python -m benchmarks.examples [--repeats=5] [--sentences=1000000]

Synthetic text: documents of 30 sentences on average, sentences of 25 tokens on average, words of
1.4. Where transformers and torch are installed, its DataCollatorForLanguageModeling masks rows of
the same length beside them; its rows lie ready in memory, and it pairs nothing.
"""

import argparse
import json
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from lmjax.examples.full_sentences import FullSentences
from lmjax.examples.masks import BertMasks, ElectraMasks, ErnieMasks
from lmjax.examples.pairs import SentencePairs

VOCAB, CLS, SEP, MASK = 30_522, 101, 102, 103


def synthetic(sentences: int) -> Any:
    """A split of that many sentences, with the attributes of `store.Split` that makers read."""
    draw = np.random.default_rng(0)
    sizes = np.clip(draw.lognormal(3.05, 0.6, sentences).astype(np.int64), 2, 400)
    first = draw.random(sentences) < 1 / 30  # of a document
    first[0] = True
    begins = np.cumsum(sizes + first) - sizes
    starts = np.append(begins[first] - 1, begins[-1] + sizes[-1])
    tokens = draw.integers(1000, VOCAB, starts[-1]).astype(np.uint16)
    tokens[starts[:-1]] = SEP
    marks = 3 * (draw.random(starts[-1]) < 1 / 1.4).astype(np.uint8)
    marks[begins] = 3
    return SimpleNamespace(
        name="train", tokens=tokens, starts=starts, sentences=begins, marks=marks, vocab=VOCAB,
        controls={"pad": 0, "cls": CLS, "sep": SEP, "mask": MASK}, memo={},
        n_documents=len(starts) - 1,
    )  # fmt: skip


def makers(length: int) -> dict[str, Any]:
    """One maker a scheme."""
    most = round(0.155 * length)
    return {
        "pairs": SentencePairs(length, masks=BertMasks(predictions=most)),
        "whole_word": SentencePairs(length, masks=BertMasks(predictions=most, whole_word=True)),
        "ngram": SentencePairs(length, "order", masks=BertMasks(predictions=most, ngram=3)),
        "ernie": SentencePairs(length, positive=1, masks=ErnieMasks()),
        "electra": SentencePairs(length, "segments", short=0.05, masks=ElectraMasks()),
        "roberta": FullSentences(length),
        "packed": SentencePairs(length, short=0.5, masks=BertMasks(predictions=most), pack=True),
    }


def rate(make, batch: int, repeats: int) -> int:
    """Examples per CPU second, the median of `repeats` runs of at least 0.3 s."""
    rates, step = [], 1
    for _ in range(repeats):
        began, made = time.process_time(), 0
        while time.process_time() - began < 0.3:
            make(np.arange(step * batch, (step + 1) * batch))
            step, made = step + 1, made + batch
        rates.append(made / (time.process_time() - began))
    return round(statistics.median(rates))


def collator(length: int):
    """transformers' masking of ready rows of `length`, on one core; None where it is absent."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from tokenizers import Tokenizer, models
        from transformers import (  # pyright: ignore[reportMissingImports]
            DataCollatorForLanguageModeling,
            PreTrainedTokenizerFast,
        )
    except ImportError:
        return None
    torch.set_num_threads(1)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w100")),
        mask_token=f"w{MASK}", pad_token="w0", cls_token=f"w{CLS}", sep_token=f"w{SEP}",
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer)
    rows = torch.randint(1000, VOCAB, (4096, length))
    rows[:, 0], rows[:, -1] = CLS, SEP

    def make(examples: np.ndarray) -> None:
        picked = rows[torch.from_numpy(examples % len(rows))]
        controls = (picked == CLS) | (picked == SEP)
        collate.torch_mask_tokens(picked, special_tokens_mask=controls)

    return make


def main() -> None:
    """Prints one line of JSON a length and batch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sentences", type=int, default=1_000_000)
    given = parser.parse_args()
    split = synthetic(given.sentences)
    for length in (128, 512):
        layout = {}
        for name, maker in makers(length).items():
            began = time.process_time()
            maker.train(split, 0, np.arange(2))
            layout[name] = round(time.process_time() - began, 2)
        print(json.dumps({"length": length, "seconds_a_pass": layout}), flush=True)
        for batch in (256, 32):
            rates = {
                name: rate(lambda e, m=maker: m.train(split, 0, e), batch, given.repeats)
                for name, maker in makers(length).items()
            }
            if collate := collator(length):
                rates["transformers"] = rate(collate, batch, given.repeats)
            print(json.dumps({"length": length, "batch": batch, "examples_s": rates}), flush=True)


if __name__ == "__main__":
    main()
