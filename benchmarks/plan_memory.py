# SPDX-License-Identifier: Apache-2.0
"""Parameters and optimiser of a device on ever more devices, as Markdown; needs the TPU compiler's
package for its topologies, and no TPU.

    python -m benchmarks.plan_memory [--compile] [gpt2_xl …]

By the shardings, which is exact and takes seconds; with --compile also what the compiler says that
a program of the same mesh is given and needs, of one row a device, minutes each and kept.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from lmjax.plan import chips, crashes, memory
from lmjax.plan.plan import plan

from lmjax import recipe  # isort: skip
from lmjax.run import Run, replace
from lmjax.sharding import Layout

TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")
# (recipe, tensor): the rest of the devices is fsdp. BERT-large has 16 heads, GPT-2 XL 25.
SERIES = (("gpt2_xl", 1), ("bert_large", 1), ("bert_large", 4), ("bert_large", 16))


def meshes(tensor: int) -> list[tuple[str, Layout]]:
    """The topologies that are large enough, with what tensor parallelism leaves as fsdp."""
    sized = [(topology, len(chips.devices(topology))) for topology in TOPOLOGIES]
    return [(t, Layout(1, n // tensor, tensor)) for t, n in sized if n >= tensor]


def main() -> None:
    """Prints a line a recipe and topology; names choose recipes."""
    crashes.outlive()
    chosen = [series for series in SERIES if series[0] in sys.argv[1:]] or SERIES
    print("| recipe | topology | fsdp × tensor | MiB a device | × devices, GiB | more than split |")
    print("|---" * 6 + "|", flush=True)
    for name, tensor in chosen:
        run: Run = recipe.load(f"experiments/{name}.py")
        for topology, layout in meshes(tensor):
            count = layout.fsdp * layout.tensor
            one = replace(run, phase2=None, batch=count, accumulate=1, mesh=layout)
            shape = f"{layout.fsdp} × {layout.tensor}"
            try:
                rests = memory.resting_bytes(one, topology)
            except ValueError as error:
                print(f"| {name} | {topology} | {shape} | {error} | | |", flush=True)
                continue
            state = rests.parameters + rests.optimiser
            stored = 12 * (run.parameters() + run.model.padding)
            cells = f"{state / 2**20:.1f} | {count * state / 2**30:.2f}"
            cells += f" | {count * state / stored - 1:.1%}"
            if "--compile" in sys.argv:
                found = plan(one, topology, largest=False, say=lambda _: None)
                given = state + found["batch_and_padding_bytes"]
                cells += f"; by the compiler {given / 2**20:.1f} MiB with a batch of one row and"
                cells += f" padding, {count * given / stored - 1:.1%}; peak"
                cells += f" {found['peak_hbm_bytes'] / 2**20:.1f}"
            print(f"| {name} | {topology} | {shape} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
