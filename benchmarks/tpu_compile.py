# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler says of steps: GPT-2 small with 8 windows of 1,024 a chip, BERT-base with
64 sequences of 128, ELECTRA-small with 128, and ELMo with 128 streams of 20 words; needs no TPU.

    python -m benchmarks.tpu_compile [bert_base …]

Memory, aliasing and collectives are exact. Milliseconds are the compiler's own estimate without
attention kernels and transfers: they rank variants and are no measured speed.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from lmjax import recipe
from lmjax.plan import chips
from lmjax.plan.program import compile_step, lower_step
from lmjax.run import replace
from lmjax.sharding import Layout

ROWS = {
    "gpt2_small": 8,
    "gpt2_small_hd128": 8,
    "bert_base": 64,
    "electra_small": 128,
    "elmo": 128,
}
CASES = [
    ("gpt2_small", "v5e:1x1", Layout()),
    ("gpt2_small_hd128", "v5e:1x1", Layout()),
    ("gpt2_small", "v5e:4x4", Layout(16, 1, 1)),
    ("gpt2_small", "v5e:4x4", Layout(1, 16, 1)),
    ("bert_base", "v5e:1x1", Layout()),
    ("bert_base", "v5e:4x4", Layout(1, 16, 1)),
    ("electra_small", "v5e:1x1", Layout()),
    ("elmo", "v5e:1x1", Layout()),
    ("elmo", "v5e:2x4", Layout(8, 1, 1)),
    ("elmo", "v5e:2x4", Layout(2, 4, 1)),
]


def main() -> None:
    """Prints one JSON object a case; names on the command line choose experiments."""
    chosen = sys.argv[1:] or list(ROWS)
    for name, topology, layout in CASES:
        if name not in chosen:
            continue
        run = recipe.load(f"experiments/{name}.py")
        batch = ROWS[name] * len(chips.devices(topology))
        program = compile_step(
            lower_step(replace(run, batch=batch, accumulate=1, mesh=layout), topology)
        )
        memory = program.memory
        gathered = sum(c.bytes * c.times for c in program.collectives("all-gather"))
        result = {
            "experiment": name,
            "topology": topology,
            "mesh": [layout.data, layout.fsdp, layout.tensor],
            "peak_gib": round(program.peak_bytes / 2**30, 2),
            "arguments_mib": round(memory.argument_size_in_bytes / 2**20, 1),
            "aliased_mib": round(memory.alias_size_in_bytes / 2**20, 1),
            "estimated_ms": round(1e3 * program.compute_seconds, 1),
            "gathered_over_bf16_parameters": round(gathered / (2 * run.parameters()), 2),
            "collectives": {
                kind: sum(c.times for c in program.collectives(kind))
                for kind in sorted({c.kind for c in program.collectives()})
            },
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
