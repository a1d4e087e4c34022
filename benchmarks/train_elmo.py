# SPDX-License-Identifier: Apache-2.0
"""A small ELMo's training on this CPU against the same biLM in PyTorch, interleaved in one run.

    python -m benchmarks.train_elmo [--pairs=5] [--sizes=small,lstm]

float32, 2 threads, 64 streams of 20 words in each direction, full softmax over 10,000 words,
Adagrad, gradients clipped at 10, no dropout, state carried from step to step. The text is the
documentation of Python, whose 10,000 most frequent words are the vocabulary. Sides: lmjax and
PyTorch, each spelling every word or (`_once`) every distinct word of a batch only once. PyTorch's
LSTM has no bounds of cells and projections, which lmjax computes. `lstm` is the recurrent layers
alone, forward and backward, without optimiser. Needs `pip install torch`.
"""

import argparse
import json
import os
import re
import statistics
from collections import Counter
from typing import Any

import numpy as np

from benchmarks.sides import THREADS, interleave, serve

FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
SIZES: dict[str, dict[str, Any]] = {
    "small": {"cells": 1024, "width": 128, "depth": 2, "filters": FILTERS, "highways": 1},
    "lstm": {"cells": 1024, "width": 128, "depth": 2},
}
SIDES = {"small": ("lmjax", "lmjax_once", "torch", "torch_once"), "lstm": ("lmjax", "torch")}
VOCAB, ROWS, LENGTH, LETTERS, STEPS = 10_000, 64, 20, 50, 1
SHAPE = (ROWS, 2, LENGTH)


def batch() -> dict[str, np.ndarray]:
    """Both directions' rows of running text, each at a place of its own."""
    from lmjax.text import Builtin, Report

    text = " ".join(document.text.decode() for document in Builtin().documents(Report()))
    text = re.findall(r"\w+|[^\w\s]", text)
    known = [word for word, _ in Counter(text).most_common(VOCAB)]
    ids = {word: n for n, word in enumerate(known)}
    characters_VC = np.full((VOCAB, LETTERS), 260, np.int16)
    for n, word in enumerate(known):
        spelt = [258, *word.encode()[: LETTERS - 2], 259]
        characters_VC[n, : len(spelt)] = spelt
    stream = np.array([ids[word] for word in text if word in ids], np.int32)
    starts = np.random.default_rng(0).integers(0, len(stream) - LENGTH, SHAPE[:2])
    words_BXL = stream[starts[..., None] + np.arange(LENGTH + 1)]
    words_BXL[:, 1] = words_BXL[:, 1, ::-1]
    words_BXL, targets_BXL = words_BXL[..., :-1], words_BXL[..., 1:]
    return {
        "words_BXL": words_BXL,
        "spellings_BXL": words_BXL,
        "characters_BXLC": characters_VC[words_BXL],
        "targets_BXL": targets_BXL,
        "weights_BXL": np.ones(SHAPE, np.float32),
    }


def lmjax_side(size: str, once: bool):
    """A function that runs n training steps of lmjax."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from lmjax import cpu, sharding
    from lmjax.losses import bidirectional
    from lmjax.models.elmo import ELMo
    from lmjax.optim import Adagrad
    from lmjax.step import create_state, jit_train_step, make_train_step

    cpu.keep_freed_memory()
    if size == "lstm":
        return _lmjax_lstm()
    model = ELMo(VOCAB, **SIZES[size], negatives=0, dropout=0.0, distinct=0.5 if once else 0.0)
    optim = Adagrad()
    schedule = optim.schedule(1000, lambda step: step)
    transform = optim.transform(schedule)
    rows: Any = batch()
    with sharding.use(sharding.Layout().mesh()):
        rows = jax.device_put(rows)
        state = create_state(model, transform, 0, ROWS)
        step = jit_train_step(make_train_step(model, bidirectional, transform, schedule, 0), state)

    def run(steps: int) -> float:
        nonlocal state
        metrics: Any = {}
        for _ in range(steps):
            state, metrics = step(state, rows)
        return float(metrics["loss"])

    return run


def _lmjax_lstm():
    import jax
    import jax.numpy as jnp

    from lmjax import cpu, sharding
    from lmjax.recurrent import ProjectedLSTM

    cells, width, depth = (SIZES["lstm"][name] for name in ("cells", "width", "depth"))
    layers = [ProjectedLSTM(cells, width, 3.0, 3.0, name=f"layer_{n}") for n in range(depth)]
    carry = (jnp.zeros((ROWS, 2, cells)), jnp.zeros((ROWS, 2, width)))
    x_BXLD = jnp.asarray(np.random.default_rng(0).normal(size=(*SHAPE, width)), jnp.float32)

    def stack(params: Any, x_BXLD: jax.Array) -> jax.Array:
        for n, layer in enumerate(layers):
            y_BXLD: Any = layer.apply({"params": params[n]}, x_BXLD, carry)[0]
            x_BXLD = x_BXLD + y_BXLD if n else y_BXLD
        return x_BXLD

    with sharding.use(sharding.Layout().mesh()):
        params = [layer.init(jax.random.key(0), x_BXLD, carry)["params"] for layer in layers]
        both: Any = jax.jit(
            lambda params, x: jax.vjp(stack, params, x)[1](x),
            compiler_options=cpu.compiler_options(),
        )

    def run(steps: int) -> None:
        for _ in range(steps):
            jax.block_until_ready(both(params, x_BXLD))

    return run


def torch_side(size: str, once: bool):
    """A function that runs n training steps of PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks.torch_elmo import make_model

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    sizes = {"filters": FILTERS, "highways": 1, **SIZES[size]}
    model = make_model(
        **sizes, vocab=VOCAB, embedding=16, activation="relu", skip=True, dropout=0.0
    ).train()
    if size == "lstm":
        return _torch_lstm(model.directions)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adagrad(
        trained, 0.2, initial_accumulator_value=1.0, eps=0.0, fused=True
    )
    rows = {name: torch.from_numpy(array) for name, array in batch().items()}
    spellings = rows["spellings_BXL"] if once else None
    carry: Any = None

    def run(steps: int) -> float:
        nonlocal carry
        loss = torch.zeros(())
        for _ in range(steps):
            hidden, carry = model(rows["characters_BXLC"], carry, spellings)
            loss = model.losses(hidden, rows["targets_BXL"]).mean()
            (loss * LENGTH).backward()
            torch.nn.utils.clip_grad_norm_(trained, 10.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return run


def _torch_lstm(directions: Any):
    import torch  # pyright: ignore[reportMissingImports]

    width = SIZES["lstm"]["width"]
    x = torch.randn(2, ROWS, LENGTH, width, requires_grad=True)

    def run(steps: int) -> None:
        for _ in range(steps):
            for direction, rows in zip(directions, x, strict=True):
                direction(rows, None)[0].backward(rows.detach())
            directions.zero_grad(set_to_none=True)

    return run


def compare(size: str, pairs: int) -> dict[str, Any]:
    """Medians of interleaved timings, and the ratio of each side to the PyTorch that does alike."""
    names = SIDES[size]
    seconds = interleave("benchmarks.train_elmo", names, size, STEPS, pairs)
    words = ROWS * LENGTH * STEPS  # of one direction: a token is read in both
    result: dict[str, Any] = {"size": size}
    for name in names:
        result[f"{name}_tokens_per_s"] = round(words / statistics.median(seconds[name]))
    for side in (name for name in names if name.startswith("lmjax")):
        peer = seconds[side.replace("lmjax", "torch")]
        ratios = [b / a for a, b in zip(seconds[side], peer, strict=True)]
        result[f"{side}_ratio_median"] = round(statistics.median(ratios), 3)
        result[f"{side}_ratio_min"] = round(min(ratios), 3)
        result[f"{side}_ratio_max"] = round(max(ratios), 3)
    if size != "lstm":
        words_BXL = batch()["words_BXL"]
        result["distinct_share"] = round(len(np.unique(words_BXL)) / words_BXL.size, 3)
    return result


def main() -> None:
    """Prints one JSON object a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--serve", default="")
    arguments = parser.parse_args()
    if arguments.serve:
        side = lmjax_side if arguments.serve.startswith("lmjax") else torch_side
        return serve(side(arguments.sizes, arguments.serve.endswith("_once")))
    for size in arguments.sizes.split(","):
        print(json.dumps(compare(size, arguments.pairs)), flush=True)


if __name__ == "__main__":
    main()
