# SPDX-License-Identifier: Apache-2.0
"""Host memory of a save: how much more than the state, and whether many saves let it grow.

    python -m benchmarks.save_memory [--megabytes=64,128,256] [--saves=30]

For each size a process of its own makes a state of that many megabytes on the CPU, saves it, and
says by how much its resident memory rose at most while it did. The slope is bytes of memory a byte
of state. Then the smallest state is saved again and again. glibc allocates from one arena, as in
training on CPUs; or each thread that saves keeps a part of what it freed. Prints one JSON object;
Linux only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (the most since `forget`), in bytes."""
    text = Path("/proc/self/status").read_text("utf-8")
    found = re.search(rf"{key}:\s+(\d+) kB", text)
    assert found, "Linux says what a process holds"
    return int(found[1]) * 1024


def forget() -> None:
    """The most begins again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")


def measure(megabytes: int, saves: int) -> dict[str, list[int] | int]:
    """In this process: the rise of each save over what was held before the first."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lmjax.checkpoint import Checkpoints
    from lmjax.step import State

    random = np.random.default_rng(0)
    count = megabytes * 2**20 // 4 // 8
    arrays = {f"w{i}": jnp.asarray(random.normal(size=count).astype(np.float32)) for i in range(8)}
    state = jax.block_until_ready(State(jnp.int32(0), arrays, ()))
    peaks, after = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), {}, 1, lambda line: None)
        before = resident("VmRSS")
        for step in range(1, saves + 1):
            forget()
            checkpoints.save(step, state)
            checkpoints.finish()
            peaks.append(resident("VmHWM") - before)
            after.append(resident("VmRSS") - before)
        checkpoints.close()
    return {"state": count * 8 * 4, "peaks": peaks, "after": after}


def apart(megabytes: int, saves: int) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.save_memory", f"--one={megabytes}:{saves}"]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, check=True, capture_output=True, env=environment)
    return json.loads(done.stdout)


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", default="64,128,256")
    parser.add_argument("--saves", type=int, default=30)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*map(int, arguments.one.split(":")))))
        return
    sizes = [int(text) for text in arguments.megabytes.split(",")]
    found = [apart(size, 1) for size in sizes]
    rises = [(one["state"], one["peaks"][0]) for one in found]
    (a, low), (b, high) = rises[0], rises[-1]
    many = apart(sizes[0], arguments.saves)
    tenth = max(1, arguments.saves // 10)
    print(json.dumps({
        "rise_by_state_bytes": dict(rises),
        "bytes_of_memory_a_byte_of_state": round((high - low) / (b - a), 2),
        "saves": arguments.saves,
        "held_after_the_first_tenth": max(many["after"][:tenth]),
        "held_after_the_last_tenth": max(many["after"][-tenth:]),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
