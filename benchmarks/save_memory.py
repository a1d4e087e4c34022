# SPDX-License-Identifier: Apache-2.0
"""Memory of the host while a state is saved, by the size of the state, and over many saves.

    python -m benchmarks.save_memory

Each size has a process of its own, which reads its peak from the kernel: before any
save, after one, and after thirty. The last line is the slope: bytes of host memory a byte of state.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 2**20


def peak() -> float:
    """MiB that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(mib: int, saves: int) -> None:
    """Saves a state of `mib` MiB; prints the peak before, after one and after all saves."""
    import jax
    import jax.numpy as jnp

    from lmjax.checkpoint import Checkpoints
    from lmjax.sharding import Layout, use
    from lmjax.step import State

    with use(Layout().mesh(jax.devices()[:1])), tempfile.TemporaryDirectory() as folder:
        shape = (mib // 8, MIB // 4)
        keys = jax.random.split(jax.random.key(0), 8)
        leaves = {f"kernel_{i}": jax.random.normal(key, shape) for i, key in enumerate(keys)}
        state = State(jnp.zeros((), jnp.int32), leaves, ())
        jax.block_until_ready(state)
        before = peak()
        checkpoints = Checkpoints(Path(folder), {}, 2, lambda _: None)
        found = []
        for step in range(1, saves + 1):
            checkpoints.save(step, state)
            checkpoints.finish()
            found.append(peak())
        checkpoints.close()
    print(before, found[0], found[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--saves", type=int, default=30)
    given = parser.parse_args()
    if given.one:
        one(given.one, given.saves)
        return
    extra = {}
    print("state MiB   before a save   peak of one save   of", given.saves)
    for mib in (64, 128, 256, 512):
        command = [sys.executable, "-m", "benchmarks.save_memory", f"--one={mib}"]
        command.append(f"--saves={given.saves}")
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        printed = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        before, first, last = map(float, printed.stdout.split()[-3:])
        extra[mib] = last - before
        print(f"{mib:9}   {before:13.0f}   {first:16.0f}   {last:5.0f}", flush=True)
    slope = (extra[512] - extra[64]) / (512 - 64)
    print(f"{slope:.2f} bytes of host memory a byte of state, beside the state itself")


if __name__ == "__main__":
    main()
