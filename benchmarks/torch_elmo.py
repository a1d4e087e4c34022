# SPDX-License-Identifier: Apache-2.0
"""The peer of ELMo's benchmarks, in PyTorch; as a command, trained on the batches of a run.

    python -m lmjax train experiments/elmo_small.py --workdir=runs/elmo …
    python -m benchmarks.torch_elmo experiments/elmo_small.py --workdir=runs/elmo --minutes=20

The same sizes, weights before step 0 by the same rules, batches, held-out rows and optimiser, whose
schedule is stretched to the time. What PyTorch's LSTM has not is left out: bounds of cells and
projections. The softmax is full whatever `model.negatives` says. Prints a JSON line at each
twentieth of the time, in which the clock stands still; --out also writes them as one list. Needs
`pip install torch`.

Shapes: B rows, X directions, L words, C characters, D width.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

ALPHABET = 261


class Characters(nn.Module):
    """Vectors of words (n, D) from their characters (n, C)."""

    def __init__(
        self, width: int, filters: Any, highways: int, embedding: int, activation: str
    ) -> None:
        super().__init__()
        top = sum(count for _, count in filters)
        self.letters = nn.Embedding(ALPHABET, embedding)
        self.convolutions = nn.ModuleList(nn.Conv1d(embedding, n, wide) for wide, n in filters)
        self.carry = nn.ModuleList(nn.Linear(top, top) for _ in range(highways))
        self.transform = nn.ModuleList(nn.Linear(top, top) for _ in range(highways))
        self.project = nn.Linear(top, width)
        self.activation = {"relu": torch.relu, "tanh": torch.tanh}[activation]
        self._initialise(activation)

    def _initialise(self, activation: str) -> None:
        nn.init.uniform_(self.letters.weight, -1.0, 1.0)
        for conv in self.convolutions:
            if activation == "relu":
                nn.init.uniform_(conv.weight, -0.05, 0.05)
            else:
                nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
            nn.init.zeros_(conv.bias)
        for linear in (*self.carry, *self.transform, self.project):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.constant_(linear.bias, -2.0 if linear in list(self.carry) else 0.0)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        letters = self.letters(characters).transpose(1, 2)
        tops = [conv(letters).max(-1).values for conv in self.convolutions]
        x = self.activation(torch.cat(tops, -1))
        for carry, transform in zip(self.carry, self.transform, strict=True):
            gate = torch.sigmoid(carry(x))
            x = gate * torch.relu(transform(x)) + (1 - gate) * x
        return self.project(x)


class Direction(nn.Module):
    """The LSTMs of one direction, whose words come in the order of reading."""

    def __init__(self, cells: int, width: int, depth: int, skip: bool, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.LSTM(width, cells, proj_size=width, batch_first=True) for _ in range(depth)
        )
        self.skip, self.drop = skip, nn.Dropout(dropout)
        glorot = math.sqrt(6 / (2 * width + 4 * cells))
        for lstm in self.layers:
            nn.init.uniform_(lstm.weight_ih_l0, -glorot, glorot)
            nn.init.uniform_(lstm.weight_hh_l0, -glorot, glorot)
            nn.init.xavier_uniform_(lstm.weight_hr_l0)
            nn.init.zeros_(lstm.bias_hh_l0).requires_grad_(False)  # one bias is enough
            nn.init.zeros_(lstm.bias_ih_l0)
            nn.init.ones_(lstm.bias_ih_l0[cells : 2 * cells])  # of the forget gate

    def forward(self, x: torch.Tensor, carry: Any) -> tuple[torch.Tensor, Any]:
        after = []
        for n, lstm in enumerate(self.layers):
            x = self.drop(x)
            y, end = lstm(x, None if carry is None else carry[n])
            x = x + y if self.skip and n else y
            after.append([state.detach() for state in end])
        return self.drop(x), after


class ELMo(nn.Module):
    """`forward` gives hidden states (B, X, L, D) and the carry; `softmax` scores them."""

    def __init__(self, characters: Characters, directions: list[Direction], vocab: int) -> None:
        super().__init__()
        self.characters, self.directions = characters, nn.ModuleList(directions)
        width = characters.project.out_features
        self.softmax = nn.Linear(width, vocab)
        nn.init.normal_(self.softmax.weight, std=width**-0.5)
        nn.init.zeros_(self.softmax.bias)

    def forward(
        self, characters: torch.Tensor, carry: Any = None, spellings: Any = None
    ) -> tuple[torch.Tensor, Any]:
        """characters: (B, X, L, C). spellings: (B, X, L); those alike are computed once."""
        shape, flat = characters.shape[:3], characters.flatten(0, 2).long()
        if spellings is None:
            words = self.characters(flat)
        else:
            distinct, which = torch.unique(spellings.flatten(), return_inverse=True)
            first = torch.empty(len(distinct), dtype=torch.long, device=which.device)
            first[which] = torch.arange(len(which), device=which.device)
            words = self.characters(flat[first])[which]
        words = words.view(*shape, -1)
        hidden, after = [], []
        for x, direction in enumerate(self.directions):
            y, end = direction(words[:, x], None if carry is None else carry[x])
            hidden.append(y)
            after.append(end)
        return torch.stack(hidden, 1), after

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Nats (B, X, L) of the targets."""
        scores = self.softmax(hidden).flatten(0, 2)
        nats = F.cross_entropy(scores, targets.flatten().long(), reduction="none")
        return nats.view(targets.shape)


def make_model(
    cells: int, width: int, depth: int, vocab: int, filters: Any, highways: int, embedding: int,
    activation: str, skip: bool, dropout: float,
) -> ELMo:  # fmt: skip
    """An ELMo of these sizes, as lmjax.models.elmo.ELMo names them; width must be below cells."""
    directions = [Direction(cells, width, depth, skip, dropout) for _ in range(2)]
    return ELMo(Characters(width, filters, highways, embedding, activation), directions, vocab)


def model_of(model: Any) -> ELMo:
    """The peer of a recipe's model."""
    names = "cells width depth vocab filters highways embedding activation skip dropout".split()
    return make_model(**{name: getattr(model, name) for name in names})


def optimiser_of(optim: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Adagrad or AdamW as the recipe has it; decay on matrices and tables."""
    if type(optim).__name__ == "Adagrad":
        return torch.optim.Adagrad(
            [p for p in model.parameters() if p.requires_grad], optim.peak,
            initial_accumulator_value=optim.accumulator, eps=0.0, fused=True,
        )  # fmt: skip
    if type(optim).__name__ != "AdamW":
        raise ValueError(f"optim={type(optim).__name__}: this peer has Adagrad and AdamW")
    many = [p for p in model.parameters() if p.ndim >= 2]
    few = [p for p in model.parameters() if p.ndim < 2 and p.requires_grad]
    groups = [
        {"params": many, "weight_decay": optim.weight_decay},
        {"params": few, "weight_decay": 0.0},
    ]
    betas = (optim.b1, optim.b2)
    return torch.optim.AdamW(groups, optim.peak, betas, optim.epsilon, fused=True)


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The arrays of a batch by the first part of their names."""
    return {name.split("_")[0]: torch.from_numpy(array) for name, array in batch.items()}


def score(model: ELMo, maker: Any, split: Any, batch: int, windows: int) -> dict[str, float]:
    """Held-out perplexity of both directions, on the first `windows` rows (0: all)."""
    model.eval()
    count = maker.held_out_count(split)
    count = min(windows, count) if windows else count
    nats, weights = torch.zeros(2, dtype=torch.double), torch.zeros(2, dtype=torch.double)
    with torch.no_grad():
        for first in range(0, count, batch):
            rows = np.arange(first, min(first + batch, count))
            held = tensors(maker.held_out(split, rows))
            hidden, _ = model(held["characters"], None, held["spellings"])
            for row in range(len(rows)):  # the scores of a whole batch would not fit
                here = slice(row, row + 1)
                found = model.losses(hidden[here], held["targets"][here]) * held["weights"][here]
                nats += found.sum((0, 2)).double()
            weights += held["weights"].sum((0, 2)).double()
    model.train()
    forward, backward = (nats / weights).tolist()
    return {
        "forward_perplexity": math.exp(forward),
        "backward_perplexity": math.exp(backward),
        "perplexity": math.exp((forward + backward) / 2),
        "words": int(weights[0]),
    }


class Trainer:
    """A model, its optimiser and its carry; `step` trains on one batch."""

    def __init__(self, run: Any) -> None:
        self.model = model_of(run.model).train()
        self.optimiser, self.schedule = optimiser_of(run.optim, self.model), run.schedule()
        self.optim, self.steps, self.carry = run.optim, run.steps, None

    def step(self, batch: dict[str, torch.Tensor], done: float) -> float:
        """The loss before the update; `done` is the share of the run that is behind."""
        rate = float(self.schedule(round(done * self.steps)))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        hidden, self.carry = self.model(batch["characters"], self.carry, batch["spellings"])
        loss = self.model.losses(hidden, batch["targets"]).mean()
        (loss * getattr(self.optim, "gradient_scale", 1.0)).backward()
        if self.optim.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.item()


def train(run: Any, splits: Any, minutes: float, windows: int) -> list[dict[str, float]]:
    """Trains for so long; returns what it prints."""
    trainer, maker = Trainer(run), run.makers()[0]
    budget, spent, step, next_score, curve = 60 * minutes, 0.0, 0, 0.0, []
    while spent < budget:
        began = time.perf_counter()
        examples = np.arange(step * run.batch, (step + 1) * run.batch)
        batch = tensors(maker.train(splits["train"], run.seed, examples))
        loss = trainer.step(batch, spent / budget)
        step, spent = step + 1, spent + time.perf_counter() - began
        if spent >= min(next_score, budget):
            found = score(trainer.model, maker, splits["validation"], run.batch, windows)
            curve.append({"step": step, "seconds": round(spent, 1), "train_loss": loss, **found})
            print(json.dumps(curve[-1]), flush=True)
            next_score += budget / 20
    return curve


def main() -> None:
    """Reads a run, trains its peer and writes the curve."""
    from lmjax import cpu, recipe
    from lmjax.data import open_prepared
    from lmjax.workdir import recorded_run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--store", type=Path, default=None)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=None, help="held-out rows; 0 is all")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    run = recipe.from_json(recipe.load(arguments.experiment), recorded_run(arguments.workdir))
    cpu.keep_freed_memory()  # as lmjax has it: a third of PyTorch's step went into fresh pages
    splits = open_prepared(arguments.store or arguments.workdir / "data").store.splits
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    windows = run.evaluate_windows if arguments.windows is None else arguments.windows
    curve = train(run, splits, arguments.minutes, windows)
    if arguments.out:
        arguments.out.write_text(json.dumps(curve, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
