# SPDX-License-Identifier: Apache-2.0
"""Accidents to the newest checkpoint: what plain Orbax makes of them, and what lmjax does.

    python -m benchmarks.faults [--faults=240] [--first=0]

The same seeded accidents (tests/faults.py: 20 kinds, as many of each) are done to copies of a
folder with two steps, of the toy states of three families in turn. Of each: what was saved comes
back (right), other values come back without an error (wrong), or an error and no way on (stuck);
and whether the next save and its restore succeed.
"""

import argparse
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).parent.parent

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lmjax import disk, recipe, sharding
from lmjax.checkpoint import Checkpoints
from lmjax.step import State, abstract_state
from lmjax.steps import folder
from tests.faults import KINDS, inject

FAMILIES = ("demo", "bert_base", "elmo")


def _say_nothing(line: str) -> None:
    pass


class Plain:
    """Orbax by its guide: the newest step, a limit on their number, leftovers cleaned up."""

    def __init__(self, workdir: Path) -> None:
        newest: Any = ocp.training.preservation_policies.LatestN(2)
        self._manager = ocp.training.Checkpointer(
            str(folder(workdir)), preservation_policy=newest, cleanup_tmp_directories=True
        )

    def restore(self, target: State) -> State:
        """The newest step."""
        return self._manager.load(None, target)

    def save(self, step: int, state: State) -> None:
        """A step more."""
        if not self._manager.save(step, state, force=True):
            raise RuntimeError("declined")

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()


class Ours:
    """The same by lmjax."""

    def __init__(self, workdir: Path) -> None:
        self._checkpoints = Checkpoints(workdir, {}, 2, _say_nothing)

    def restore(self, target: State) -> State:
        """The newest step that verifies."""
        return self._checkpoints.restore(target)

    def save(self, step: int, state: State) -> None:
        """A step more, waited for."""
        self._checkpoints.save(step, state)
        self._checkpoints.finish()

    def close(self) -> None:
        """Lets go of the folder."""
        self._checkpoints.close()


def bits(tree: Any) -> list[bytes]:
    """The bytes of every array."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def states(target: State) -> dict[int, State]:
    """Two random states, by step."""

    def draw(random: np.random.Generator, path: Any, x: Any, step: int) -> jax.Array:
        is_step = sharding.path_of(path) == "step"
        value = np.int32(step) if is_step else random.normal(size=x.shape).astype(x.dtype)
        return jax.device_put(value, x.sharding)

    found = {}
    for step in (10, 20):
        random = np.random.default_rng(step)
        found[step] = jax.tree_util.tree_map_with_path(
            lambda path, x, r=random, s=step: draw(r, path, x, s), target
        )
    return found


def outcome(side: Any, workdir: Path, target: State, saved: dict[int, list[bytes]]) -> str:
    """right, wrong or stuck, and of the next save: saved or not."""
    try:
        checkpoints = side(workdir)
        state = checkpoints.restore(target)
        result = "right" if bits(state) in saved.values() else "wrong"
    except Exception:
        return "stuck"
    try:
        step = int(state.step) + 7
        checkpoints.save(step, state.replace(step=state.step + 7))
        checkpoints.close()
        again = side(workdir).restore(target)
        return result if int(again.step) == step else f"{result}, next save lost"
    except Exception:
        return f"{result}, next save lost"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--faults", type=int, default=240)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    disk.quiet()
    counts: dict[str, Counter] = {"Orbax": Counter(), "lmjax": Counter()}
    kinds: dict[str, Counter] = defaultdict(Counter)
    with (
        tempfile.TemporaryDirectory() as base,
        sharding.use(sharding.Layout().mesh(jax.devices()[:1])),
    ):
        made = {}
        for family in FAMILIES:
            run = recipe.load(str(ROOT / f"experiments/{family}.py"), tiny=True)
            target = abstract_state(run.model, run.optimiser(), run.batch)
            checkpoints = Checkpoints(Path(base) / family, {}, 2, _say_nothing)
            saved = states(target)
            for step, state in saved.items():
                checkpoints.save(step, state)
            checkpoints.close()
            made[family] = target, {step: bits(state) for step, state in saved.items()}
        for seed in range(arguments.first, arguments.first + arguments.faults):
            family = FAMILIES[seed // len(KINDS) % len(FAMILIES)]
            for name, side in (("Orbax", Plain), ("lmjax", Ours)):
                here = Path(base) / "run"
                shutil.copytree(Path(base) / family, here)
                fault = inject(folder(here), seed)
                result = outcome(side, here, *made[family])
                counts[name][result] += 1
                kinds[fault.kind][f"{name} {result}"] += 1
                shutil.rmtree(here)
    for kind, found in kinds.items():
        print(f"{kind:>18}  " + "; ".join(f"{k} {n}" for k, n in sorted(found.items())))
    for name, found in counts.items():
        print(f"{name}: " + ", ".join(f"{k} {n}" for k, n in sorted(found.items())))


if __name__ == "__main__":
    main()
