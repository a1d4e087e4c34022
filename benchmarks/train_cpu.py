# SPDX-License-Identifier: Apache-2.0
"""Training tokens/s on this CPU against the same model in PyTorch, interleaved in one run.

    python -m benchmarks.train_cpu [--pairs=5] [--sizes=shakespeare,width384]

Each side is a process of its own that waits while another is timed: lmjax's step, PyTorch eager
and torch.compile (both with fused AdamW), float32, 2 threads. Needs `pip install torch`.
"""

import argparse
import json
import os
import statistics

from benchmarks.sides import THREADS, interleave, serve

SIZES = {
    "shakespeare": {"vocab": 65, "context": 64, "depth": 4, "width": 128, "heads": 4, "batch": 12},
    "width384": {"vocab": 65, "context": 256, "depth": 6, "width": 384, "heads": 6, "batch": 8},
}
STEPS = {"shakespeare": 40, "width384": 3}


def lmjax_side(size: dict[str, int]):
    """A function that runs n training steps of lmjax."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np

    from lmjax import cpu, sharding
    from lmjax.losses import next_token
    from lmjax.models.gpt import GPT
    from lmjax.optim import AdamW
    from lmjax.step import create_state, jit_train_step, make_train_step

    model = GPT(size["vocab"], size["context"], size["depth"], size["width"], size["heads"])
    cpu.keep_freed_memory()
    optim = AdamW(peak=1e-3, warmup=10)
    schedule = optim.schedule(1000, lambda step: step)
    transform = optim.transform(schedule)
    draw = np.random.default_rng(0).integers(0, size["vocab"], (size["batch"], size["context"] + 1))
    batch = {
        "tokens_BL": draw[:, :-1].astype(np.int32),
        "targets_BL": draw[:, 1:].astype(np.int32),
        "weights_BL": np.ones((size["batch"], size["context"]), np.float32),
    }
    with sharding.use(sharding.Layout().mesh()):
        state = create_state(model, transform, 0)
        step = jit_train_step(make_train_step(model, next_token, transform, schedule, 0), state)
        state, _ = step(state, batch)

    def run(steps: int) -> float:
        nonlocal state
        metrics = {}
        for _ in range(steps):
            state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def torch_side(size: dict[str, int], compiled: bool):
    """A function that runs n training steps of PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks import torch_gpt

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    fields = {k: v for k, v in size.items() if k != "batch"}
    model = torch_gpt.GPT(**fields)
    optimiser = torch_gpt.optimiser(model, fused=True)
    forward = torch.compile(model) if compiled else model
    draw = torch.randint(0, size["vocab"], (size["batch"], size["context"] + 1))
    tokens, targets = draw[:, :-1].contiguous(), draw[:, 1:].contiguous()

    def run(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            loss = forward(tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.item()

    run(1)
    return run


def compare(size: str, pairs: int) -> dict[str, float | str]:
    """Medians of interleaved timings, and the ratio to the faster PyTorch."""
    names = ("lmjax", "eager", "compile")
    seconds = interleave("benchmarks.train_cpu", names, size, STEPS[size], pairs)
    tokens = SIZES[size]["batch"] * SIZES[size]["context"] * STEPS[size]
    best = min(("eager", "compile"), key=lambda name: statistics.median(seconds[name]))
    ratios = [b / a for a, b in zip(seconds["lmjax"], seconds[best], strict=True)]
    return {
        "size": size,
        **{f"{n}_tokens_per_s": round(tokens / statistics.median(seconds[n])) for n in names},
        "peer": best,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def main() -> None:
    """Prints one JSON object a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--serve", default="")
    arguments = parser.parse_args()
    if arguments.serve:
        size = SIZES[arguments.sizes]
        lmjax = arguments.serve == "lmjax"
        return serve(lmjax_side(size) if lmjax else torch_side(size, arguments.serve == "compile"))
    for size in arguments.sizes.split(","):
        print(json.dumps(compare(size, arguments.pairs)), flush=True)


if __name__ == "__main__":
    main()
