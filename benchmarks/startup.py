# SPDX-License-Identifier: Apache-2.0
"""Seconds from the command to the first finished step: cold, and with JAX's compilation cache.

    python -m benchmarks.startup [--experiment=experiments/demo.py] [--repeats=5]

The token store is built before; each start trains in a new folder and is killed after its first
step is on record.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def first_step(experiment: str, folder: Path, cache: Path) -> float:
    """Seconds until metrics.jsonl of a fresh run has a line."""
    workdir = Path(tempfile.mkdtemp(dir=folder))
    command = [
        *(sys.executable, "-m", "lmjax", "train", experiment, f"--workdir={workdir}"),
        *(f"--data.store={folder / 'store'}", "--log_every=1", "--evaluate_every=0"),
    ]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    if process.poll() is not None:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    process.kill()
    process.wait()
    shutil.rmtree(workdir)
    return seconds


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="experiments/demo.py")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first_step(arguments.experiment, folder, folder / "store-building")
        pairs = []
        for number in range(arguments.repeats):
            cache = folder / f"cache-{number}"
            pairs.append([first_step(arguments.experiment, folder, cache) for _ in range(2)])
    cold, warm = (round(statistics.median(times), 2) for times in zip(*pairs, strict=True))
    print(json.dumps({"experiment": arguments.experiment, "cold_s": cold, "cached_s": warm}))


if __name__ == "__main__":
    main()
