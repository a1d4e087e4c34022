# SPDX-License-Identifier: Apache-2.0
"""The plan of five recipes on four topologies, as Markdown; needs the TPU compiler, no TPU.

    python -m benchmarks.plan_table [--quick] [gpt2_small …] [v5e:4x4 …]

Batches are the papers': 512 windows for GPT-2, 256 sequences for BERT, and 128 streams a chip for
ELMo, with as many steps as read the tokens of the recipe. Mesh, remat and microbatches are the
first by the roofline that `plan --search` has; one compilation a phase, two to five minutes each,
kept. With --quick nothing is compiled: what is not kept is "not run".
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from lmjax.plan import chips, crashes
from lmjax.plan.plan import Result, plan
from lmjax.plan.search import consider

from lmjax import recipe  # isort: skip
from lmjax.run import Run, replace

TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8")
BATCHES = {"gpt2_small": 512, "gpt2_xl": 512, "bert_base": 256, "bert_large": 256, "elmo": 128}
HEAD = (
    "recipe", "topology", "batch", "mesh (data × fsdp × tensor)", "remat", "peak HBM, GiB",
    "step, ms (band)", "MFU", "tokens/s", "hours", "dollars",
)  # fmt: skip


class NotKept(Exception):
    """A compilation that would have to be made."""


def sized(name: str, topology: str) -> Run:
    """The recipe with the paper's batch and the recipe's tokens."""
    run: Run = recipe.load(f"experiments/{name}.py")
    batch = BATCHES[name] * (len(chips.devices(topology)) if name == "elmo" else 1)
    return replace(run, batch=batch, steps=round(run.steps * run.batch / batch))


def cells(name: str, topology: str, found: Result | None) -> list[str]:
    """A row of the table."""
    if found is None:
        return [name, topology, *["not run"] * (len(HEAD) - 2)]
    mesh = " × ".join(str(found["mesh"][axis]) for axis in ("data", "fsdp", "tensor"))
    parts = f", {found['accumulate']} parts" if found["accumulate"] > 1 else ""
    shown = [name, topology, f"{found['batch']:,}{parts}", mesh, found["remat"] or "–"]
    shown.append(f"{found['peak_hbm_bytes'] / 2**30:.2f}")
    if not found["fits"]:
        return [*shown, "does not fit", *["–"] * 4]
    about = "~" if found["step_from"] == "roofline" else ""
    low, step, high = (1e3 * found[f"step_seconds{end}"] for end in ("_low", "", "_high"))
    shown.append(f"{about}{step:.1f} ({low:.1f}–{high:.1f})")
    shown += [f"{found['mfu']:.0%}", f"{found['tokens_per_second']:,.0f}"]
    return [*shown, f"{found['hours']:,.1f}", f"{found['cost']:,.0f}"]


def find(name: str, topology: str, quick: bool) -> Result | None:
    """The plan of a cell; None where it would have to be compiled and may not."""

    def say(message: str) -> None:
        if quick:
            raise NotKept
        print(message, file=sys.stderr, flush=True)

    ranked = consider(sized(name, topology), topology).ranked
    try:
        return plan(ranked[0].run, topology, largest=False, say=say)
    except NotKept:
        return None


def main() -> None:
    """Prints the table; names of recipes and topologies choose rows."""
    given = [word for word in sys.argv[1:] if word != "--quick"]
    quick = len(given) < len(sys.argv) - 1
    crashes.outlive()
    names = [n for n in BATCHES if n in given] or list(BATCHES)
    topologies = [t for t in TOPOLOGIES if t in given] or list(TOPOLOGIES)
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|", flush=True)
    for name in names:
        for topology in topologies:
            row = cells(name, topology, find(name, topology, quick))
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
