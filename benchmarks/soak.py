# SPDX-License-Identifier: Apache-2.0
"""Kills a run again and again for as long as asked, then compares its end with an unbroken run's.

    python -m benchmarks.soak --minutes=30 experiments/demo.py --steps=8000

The unbroken run comes first. Then the same recipe is started, killed with SIGKILL after a random 20
to 40 s, and started again, until it ends; the last line counts kills, resumes and lost steps, and
says whether the last states are equal to the bit.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lmjax.drill_runs import Trainer
from lmjax.verify import unequal_arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of kills, at most")
    parser.add_argument(
        "--pause", type=float, nargs=2, default=(20.0, 40.0), help="s between kills"
    )
    parser.add_argument("--seed", type=int, default=0)
    given, train = parser.parse_known_args()
    draw, folder = random.Random(given.seed), Path(tempfile.mkdtemp(prefix="lmjax-soak-"))
    store = f"--data.store={folder / 'store'}"
    trainer = Trainer((*train, store, "--log_every=1"), folder, timeout=3600)
    began = time.monotonic()
    trainer.run("unbroken")
    end = trainer.seen("unbroken")[-1].step
    print(f"unbroken: {end:,} steps in {time.monotonic() - began:.0f} s", flush=True)

    kills, stop = 0, time.monotonic() + 60 * given.minutes
    while time.monotonic() < stop:
        process = trainer.start("soaked")
        try:
            process.popen.wait(draw.uniform(*given.pause))
            break
        except subprocess.TimeoutExpired:
            process.popen.send_signal(signal.SIGKILL)
            process.popen.wait()
            kills += 1
            reached = max((s.step for s in trainer.seen("soaked")), default=0)
            print(f"kill {kills}: {reached:,} steps made", flush=True)
    trainer.run("soaked")
    seen = trainer.seen("soaked")
    logs = sorted(folder.glob("soaked.*.log"))
    resumes = sum(bool(re.search(r"resumed at step", p.read_text("utf-8"))) for p in logs)
    lost = len(seen) - end
    straight = {s.step: s for s in trainer.seen("unbroken")}
    other = [s.step for s in seen if s != straight[s.step]]
    equal = not unequal_arrays(folder / "unbroken", folder / "soaked", end)
    print(
        f"soak: {kills} kills, {resumes} resumes, {lost / max(kills, 1):.1f} steps made again a"
        f" kill; {len(other)} of {len(seen)} steps differ; the last states are"
        f" {'equal to the bit' if equal else 'NOT EQUAL'} ({folder})"
    )
    sys.exit(0 if equal and not other else 1)


if __name__ == "__main__":
    main()
