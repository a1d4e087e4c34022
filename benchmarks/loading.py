# SPDX-License-Identifier: Apache-2.0
"""Tokens/s that the input pipeline feeds alone, beside what the training step eats.

    python -m benchmarks.loading [--repeats=7]

Packed windows from a sealed store of 50 M tokens in documents of 400 on average: the example
maker alone (one core), and whole device batches as `train` gets them, read by a thread or by
grain's worker processes.
"""

import argparse
import json
import os
import resource
import statistics
import time
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from lmjax import sharding
from lmjax.batches import Plan, batches
from lmjax.examples.windows import Windows
from lmjax.store import Split

TOKENS, DOCUMENT = 50_000_000, 400
SHAPES = {"shakespeare": (12, 64), "gpt2_small": (64, 1024)}  # batch, length


def split() -> Split:
    """A train split of random tokens and document lengths."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 50_257, TOKENS).astype(np.uint16)
    cuts = np.unique(draw.integers(1, TOKENS, TOKENS // DOCUMENT))
    starts = np.concatenate([[0], cuts, [TOKENS]])
    return Split("train", tokens, starts, np.diff(starts), Path("ids"), TOKENS, 50_256)


def median(rates: list[float]) -> int:
    """Median, as a whole number."""
    return round(statistics.median(rates))


def cpu_seconds() -> float:
    """CPU time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def maker_alone(make, batch: int, tokens: int, repeats: int) -> int:
    """Tokens per CPU second of the example maker."""
    rates = []
    steps = max(1, 4_000_000 // tokens)
    for repeat in range(repeats):
        began = cpu_seconds()
        for step in range(repeat * steps, (repeat + 1) * steps):
            make(np.arange(step * batch, (step + 1) * batch))
        rates.append(steps * tokens / (cpu_seconds() - began))
    return median(rates)


def device_batches(make, batch: int, length: int, workers: int, repeats: int) -> int:
    """Tokens per second of wall time, on the device."""
    plan, rates = Plan(batch, length), []
    steps = max(50, 8_000_000 // (batch * length))
    for _ in range(repeats):
        source = batches((make,), plan, 0, steps, workers)
        for _ in range(10):  # starting the processes is not what is measured
            next(source)
        began = time.perf_counter()
        for batch_on_device in source:
            jax.block_until_ready(batch_on_device)
        rates.append((steps - 10) * batch * length / (time.perf_counter() - began))
    return median(rates)


def main() -> None:
    """Prints one JSON object a shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    data = split()
    with sharding.use(sharding.Layout().mesh()):
        for name, (batch, length) in SHAPES.items():
            make = partial(Windows(length).train, data, 0)
            result = {
                "shape": name,
                "maker_tokens_per_cpu_s": maker_alone(make, batch, batch * length, repeats),
                **{
                    f"batches_tokens_per_s_workers_{w}": device_batches(
                        make, batch, length, w, repeats if w == 0 else 1
                    )
                    for w in (0, 1)
                },
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
