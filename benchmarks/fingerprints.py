# SPDX-License-Identifier: Apache-2.0
"""What fingerprints cost: beside a save, a restore and a step of a model of 124 million parameters.

    python -m benchmarks.fingerprints [--experiment=experiments/gpt2_small.py] [--repeats=3]

The state (parameters and both moments) is fingerprinted, hashed by SHA-256 on the host, saved and
restored with verification, in turns; a step reads one row of 1,024 tokens, the least there is.
Prints one JSON object of medians in seconds.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import disk, manifest, recipe, sharding
from lmjax.fingerprint import fingerprints
from lmjax.step import abstract_state, create_state, jit_train_step, make_train_step


def seconds(action: Any) -> float:
    """How long a call takes, its result waited for."""
    began = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - began


def sha256(state: Any) -> str:
    """What a digest of the bytes would be, for comparison."""
    digest = hashlib.sha256()
    for x in jax.tree.leaves(state):
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experiment", default="experiments/gpt2_small.py")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    run = recipe.load(arguments.experiment)
    times: dict[str, list[float]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as base,
        sharding.use(sharding.Layout().mesh(jax.devices()[:1])),
    ):
        state = create_state(run.model, run.optimiser(), run.seed, run.batch)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        times["first_fingerprint"].append(seconds(lambda: fingerprints(state)))  # compiles
        for number in range(arguments.repeats):
            path = Path(base) / str(number)
            times["fingerprint"].append(seconds(lambda: fingerprints(state)))
            times["sha256"].append(seconds(lambda: sha256(state)))
            content = manifest.seal(number, {}, disk.arrays_of(state), fingerprints(state))
            save = lambda: disk.start_save(path, state, content).result()  # noqa: B023, E731
            times["save"].append(seconds(save))
            target = abstract_state(run.model, run.optimiser(), run.batch)
            times["restore"].append(seconds(lambda: disk.read(path, target)))  # noqa: B023
        step = make_train_step(
            run.model, run.loss, run.optimiser(), run.schedule(), run.seed, accumulate=1
        )
        rows = jnp.zeros((1, run.data.examples.length), jnp.int32)
        batch = {f"{name}_BL": rows for name in ("tokens", "targets", "positions")}
        batch |= {"segments_BL": rows + 1, "weights_BL": jnp.ones(rows.shape)}
        compiled = jit_train_step(step, state)
        for number in range(arguments.repeats + 1):
            began = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready((state, metrics))
            if number:
                times["step_of_one_row"].append(time.perf_counter() - began)
    medians = {name: round(statistics.median(values), 4) for name, values in times.items()}
    cost = medians["fingerprint"]
    shares = {
        "gigabytes_per_second": round(size / 1e9 / cost, 1),
        "share_of_a_save": round(cost / (cost + medians["save"]), 4),
        "share_of_a_restore": round(cost / (cost + medians["restore"]), 4),
        "share_of_a_step_at_save_every_1000": round(cost / (1000 * medians["step_of_one_row"]), 7),
    }
    print(json.dumps({"state_bytes": size, **medians, **shares}, indent=1))


if __name__ == "__main__":
    main()
