# SPDX-License-Identifier: Apache-2.0
"""BERT pretraining on this CPU against transformers' BertForPreTraining, interleaved in one run.

    python -m benchmarks.train_bert [--pairs=5] [--sizes=mini]

float32, 2 threads, sequences of up to 128 with the lengths of create_pretraining_data on ordinary
prose (55 % full, the others anywhere below), dropout 0.1, 15 % masked, AdamW, clip 1. Sides: lmjax
on padded rows, lmjax on the same sequences packed into fewer rows, PyTorch eager and torch.compile.
Needs `pip install torch transformers`.
"""

import argparse
import json
import os
import statistics
from typing import Any

import numpy as np

from benchmarks.sides import THREADS, interleave, serve

SIZES: dict[str, dict[str, Any]] = {
    "mini": {"vocab": 30_522, "context": 512, "depth": 4, "width": 256, "heads": 4},
}
BATCH, LENGTH, SCORED, STEPS = 32, 128, 20, 2


def sequences() -> list[dict[str, Any]]:
    """The batch as single sequences: ids, type boundary, masked columns, their ids, a label."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(BATCH):
        size = LENGTH if random.random() < 0.55 else int(random.integers(16, LENGTH))
        count = min(SCORED, max(1, round(size * 0.15)))
        columns = np.sort(random.permutation(np.arange(1, size - 1))[:count])
        ids = random.integers(1000, 30_000, size)
        targets = ids[columns].copy()
        ids[columns] = 103
        label = int(random.integers(2))
        found.append({"ids": ids, "columns": columns, "targets": targets, "label": label})
    return found


def rows(packed: bool) -> dict[str, np.ndarray]:
    """The sequences as lmjax reads them, one a row or best-fit into as few rows as hold them."""
    groups: list[list[dict[str, Any]]] = []
    for one in sorted(sequences(), key=lambda s: -len(s["ids"])):
        fits = [g for g in groups if _size(g, one) <= LENGTH and _scored(g, one) <= SCORED]
        if packed and fits:
            max(fits, key=lambda g: _size(g, one)).append(one)
        else:
            groups.append([one])
    most = max(map(len, groups))
    shapes = {"BL": LENGTH, "BP": SCORED, "BC": most}
    names = ("tokens_BL", "segments_BL", "types_BL", "positions_BL", "masked_BP", "targets_BP")
    batch: dict[str, Any] = {
        n: np.zeros((len(groups), shapes[n[-2:]]), np.int32)
        for n in (*names, "firsts_BC", "pairs_BC")
    }
    batch["weights_BP"] = np.zeros((len(groups), SCORED), np.float32)
    batch["pair_weights_BC"] = np.zeros((len(groups), most), np.float32)
    for row, group in enumerate(groups):
        first = slot = 0
        for place, one in enumerate(group):
            size, count = len(one["ids"]), len(one["columns"])
            here, slots = slice(first, first + size), slice(slot, slot + count)
            batch["tokens_BL"][row, here] = one["ids"]
            batch["segments_BL"][row, here] = place + 1
            batch["types_BL"][row, first + size // 2 : first + size] = 1
            batch["positions_BL"][row, here] = np.arange(size)
            batch["masked_BP"][row, slots] = one["columns"] + first
            batch["targets_BP"][row, slots] = one["targets"]
            batch["weights_BP"][row, slots] = 1
            batch["firsts_BC"][row, place] = first
            batch["pairs_BC"][row, place] = one["label"]
            batch["pair_weights_BC"][row, place] = 1
            first, slot = first + size, slot + count
    if not packed:
        del batch["positions_BL"]
    return batch


def _size(group: list[dict[str, Any]], one: dict[str, Any]) -> int:
    return sum(len(s["ids"]) for s in [*group, one])


def _scored(group: list[dict[str, Any]], one: dict[str, Any]) -> int:
    return sum(len(s["columns"]) for s in [*group, one])


def lmjax_side(size: dict[str, Any], packed: bool):
    """A function that runs n pretraining steps of lmjax."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from lmjax import cpu, sharding
    from lmjax.losses import masked_token_and_pair
    from lmjax.models.bert import BERT
    from lmjax.optim import AdamW
    from lmjax.step import create_state, jit_train_step, make_train_step

    model = BERT(**size, activation="gelu_erf", epsilon=1e-12)
    cpu.keep_freed_memory()
    optim = AdamW(peak=1e-4, warmup=10, b2=0.999, weight_decay=0.01)
    schedule = optim.schedule(1000, lambda step: step)
    transform = optim.transform(schedule)
    batch: Any = rows(packed)
    with sharding.use(sharding.Layout().mesh()):
        state = create_state(model, transform, 0)
        plain = make_train_step(model, masked_token_and_pair, transform, schedule, 0)
        step = jit_train_step(plain, state)

    def run(steps: int) -> float:
        nonlocal state
        metrics: Any = {}
        for _ in range(steps):
            state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def torch_side(size: dict[str, Any], compiled: bool):
    """A function that runs n pretraining steps of transformers on PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
        BertConfig,
        BertForPreTraining,
    )

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size["vocab"], hidden_size=size["width"], num_hidden_layers=size["depth"],
        num_attention_heads=size["heads"], intermediate_size=4 * size["width"],
    )  # fmt: skip
    model = BertForPreTraining(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.01, fused=True)
    forward = torch.compile(model) if compiled else model
    batch = rows(packed=False)
    labels = np.full((BATCH, LENGTH), -100)
    row, slot = np.nonzero(batch["weights_BP"])
    labels[row, batch["masked_BP"][row, slot]] = batch["targets_BP"][row, slot]
    inputs = {
        "input_ids": torch.tensor(batch["tokens_BL"], dtype=torch.long),
        "attention_mask": torch.tensor(batch["segments_BL"], dtype=torch.long),
        "token_type_ids": torch.tensor(batch["types_BL"], dtype=torch.long),
        "labels": torch.tensor(labels, dtype=torch.long),
        "next_sentence_label": torch.tensor(batch["pairs_BC"][:, 0], dtype=torch.long),
    }

    def run(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            loss = forward(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return run


def compare(size: str, pairs: int) -> dict[str, float | str]:
    """Medians of interleaved timings, and ratios to the faster PyTorch."""
    names = ("lmjax", "packed", "eager", "compile")
    seconds = interleave("benchmarks.train_bert", names, size, STEPS, pairs)
    median = {name: statistics.median(seconds[name]) for name in names}
    best = min(("eager", "compile"), key=median.__getitem__)
    tokens = sum(len(one["ids"]) for one in sequences()) * STEPS
    result: dict[str, float | str] = {"size": size, "peer": best}
    result |= {f"{n}_examples_per_s": round(BATCH * STEPS / median[n], 2) for n in names}
    result |= {f"{n}_real_tokens_per_s": round(tokens / median[n]) for n in names}
    for side in ("lmjax", "packed"):
        ratios = [b / a for a, b in zip(seconds[side], seconds[best], strict=True)]
        result |= {
            f"{side}_ratio_median": round(statistics.median(ratios), 3),
            f"{side}_ratio_min": round(min(ratios), 3),
            f"{side}_ratio_max": round(max(ratios), 3),
        }
    result["rows_packed"] = len(rows(packed=True)["tokens_BL"])
    return result


def main() -> None:
    """Prints one JSON object a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--serve", default="")
    arguments = parser.parse_args()
    side = arguments.serve
    if side in ("lmjax", "packed"):
        return serve(lmjax_side(SIZES[arguments.sizes], side == "packed"))
    if side:
        return serve(torch_side(SIZES[arguments.sizes], side == "compile"))
    for size in arguments.sizes.split(","):
        print(json.dumps(compare(size, arguments.pairs)), flush=True)


if __name__ == "__main__":
    main()
