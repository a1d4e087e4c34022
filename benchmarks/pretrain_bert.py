# SPDX-License-Identifier: Apache-2.0
"""transformers' BERT on the data of a run, for a fixed time, scored on the run's held-out examples.

    python -m lmjax train experiments/bert_mini.py --workdir=runs/mini …
    python -m benchmarks.pretrain_bert experiments/bert_mini.py --workdir=runs/mini --minutes=20

Takes the run's tokens, pairs, sizes, dropout, batch and optimiser; masks them with
DataCollatorForLanguageModeling and trains BertForPreTraining (eager, the faster one here) with
AdamW, warm-up over the first 5 % of the time and a linear fall to its end. Prints a JSON line at
each twentieth of the time. Needs `pip install torch transformers`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    BertConfig,
    BertForPreTraining,
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
)

from lmjax import recipe
from lmjax.data import open_prepared
from lmjax.workdir import recorded_run

SCORED = 256  # held-out examples


def peer(run: Any) -> Any:
    """The model of the recipe as transformers builds it."""
    model = run.model
    act = {"gelu_tanh": "gelu_new", "gelu_erf": "gelu", "relu": "relu"}[model.activation]
    return BertForPreTraining(
        BertConfig(
            vocab_size=model.vocab, hidden_size=model.width, num_hidden_layers=model.depth,
            num_attention_heads=model.heads, intermediate_size=model.inner or 4 * model.width,
            hidden_act=act, max_position_embeddings=model.context,
            hidden_dropout_prob=model.dropout, attention_probs_dropout_prob=model.attention_dropout,
        )
    )  # fmt: skip


def unmasked(batch: dict[str, np.ndarray]) -> np.ndarray:
    """The tokens of a batch with the originals put back."""
    tokens = batch["tokens_BL"].copy()
    row, slot = np.nonzero(batch["weights_BP"])
    tokens[row, batch["masked_BP"][row, slot]] = batch["targets_BP"][row, slot]
    return tokens


def long(array: np.ndarray) -> Any:
    """As PyTorch indexes with."""
    return torch.tensor(array, dtype=torch.long)


def inputs_of(batch: dict[str, np.ndarray], tokens: Any) -> dict[str, Any]:
    """What the model reads."""
    return {
        "input_ids": tokens,
        "attention_mask": long(batch["segments_BL"]),
        "token_type_ids": long(batch["types_BL"]),
        "next_sentence_label": long(batch["pairs_BC"][:, 0]),
    }


def score(model: Any, run: Any, split: Any) -> dict[str, float]:
    """Masked and pair accuracy, and masked loss, on the first held-out examples of the run."""
    model.eval()
    sums = np.zeros(5)
    with torch.no_grad():
        for first in range(0, SCORED, run.batch):
            batch = run.data.examples.held_out(split, np.arange(first, first + run.batch))
            out = model(**inputs_of(batch, long(batch["tokens_BL"])))
            row, slot = np.nonzero(batch["weights_BP"])
            scores = out.prediction_logits[row, batch["masked_BP"][row, slot]]
            targets = long(batch["targets_BP"][row, slot])
            nll = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
            pairs = out.seq_relationship_logits.argmax(-1) == long(batch["pairs_BC"][:, 0])
            hits = (scores.argmax(-1) == targets).sum()
            sums += [nll.item(), hits.item(), len(row), pairs.sum().item(), len(pairs)]
    model.train()
    return {
        "masked_loss": sums[0] / sums[2],
        "masked_accuracy": sums[1] / sums[2],
        "pair_accuracy": sums[3] / sums[4],
    }


def main() -> None:
    """Trains for the time that was asked for; the clock stands still while it is scored."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--store", type=Path, default=None)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    run = recipe.from_json(recipe.load(arguments.experiment), recorded_run(arguments.workdir))
    splits = open_prepared(arguments.store or arguments.workdir / "data").store.splits
    vocabulary = arguments.workdir / "tokenizer"
    collate = DataCollatorForLanguageModeling(
        BertTokenizerFast(tokenizer_file=str(vocabulary / "tokenizer.json")), mlm_probability=0.15
    )
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = peer(run).train()
    optimiser = torch.optim.AdamW(
        model.parameters(), run.optim.peak, (run.optim.b1, run.optim.b2), run.optim.epsilon,
        weight_decay=run.optim.weight_decay, fused=True,
    )  # fmt: skip
    budget, spent, step, next_score = 60 * arguments.minutes, 0.0, 0, 0.0
    while spent < budget:
        began = time.perf_counter()
        done = spent / budget
        rate = run.optim.peak * min(done / 0.05, (1 - done) / 0.95)
        for group in optimiser.param_groups:
            group["lr"] = rate
        examples = np.arange(step * run.batch, (step + 1) * run.batch)
        batch = run.data.examples.train(splits["train"], run.seed, examples)
        plain = unmasked(batch)
        controls = list(splits["train"].controls.values())
        special = torch.tensor((batch["segments_BL"] == 0) | np.isin(plain, controls))
        tokens, labels = collate.torch_mask_tokens(long(plain), special_tokens_mask=special)
        model(**inputs_of(batch, tokens), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step, spent = step + 1, spent + time.perf_counter() - began
        if spent >= min(next_score, budget):
            line = {
                "step": step,
                "seconds": round(spent, 1),
                **score(model, run, splits["validation"]),
            }
            print(json.dumps(line), flush=True)
            next_score += budget / 20


if __name__ == "__main__":
    main()
