# SPDX-License-Identifier: Apache-2.0
"""`verify`: every step of a run directory read whole and held against what was saved."""

import contextlib
from pathlib import Path

from lmjax.checkpoint import Finding, examine, saved_recipe, stored_fingerprints
from lmjax.manifest import differences
from lmjax.steps import all_steps, damaged_folders, is_there, set_aside
from lmjax.workdir import RunLock, refuse_edited_recipe


def verify(workdir: Path, aside: bool = False) -> None:
    """Prints a line for each step: its arrays, its bytes, and whether it is what was saved.

    Args:
      aside: also gives damaged steps a name that says so.

    Raises:
      ValueError: a step is damaged, there is none, or recipe.json is not what was saved with them.
    """
    steps = all_steps(workdir)
    before = damaged_folders(workdir)
    if not steps:
        more = f", only steps that were set aside: {', '.join(before)}" if before else ""
        raise ValueError(f"{workdir} holds no step{more}; is it a run directory?")
    with RunLock(workdir) if aside else contextlib.nullcontext():
        print(f"{'step':>12}  {'arrays':>6}  {'bytes':>15}")
        bad, gone = [], []
        for step in steps:
            found = examine(workdir, step)
            if not is_there(workdir, step):
                gone.append(step)  # training goes on, and it was the oldest
                continue
            print(_line(step, found))
            if found.reason:
                bad.append(step)
                if aside:
                    print(f"{'':>12}  set aside as checkpoints/{set_aside(workdir, step).name}")
    for name in before:
        print(f"set aside before: checkpoints/{name}")
    steps = [step for step in steps if step not in gone]
    good = [step for step in steps if step not in bad]
    goes_on = f"a run goes on from step {good[-1]:,}" if good else "a run cannot go on"
    result = f"{len(good)} of {len(steps)} steps are good; {goes_on}"
    if bad:
        raise ValueError(result)
    if (workdir / "recipe.json").exists():  # a folder of checkpoints alone has none
        refuse_edited_recipe(workdir, *saved_recipe(workdir))
    print(result)


def _line(step: int, found: Finding) -> str:
    if found.reason:
        return f"{step:>12,}  {'':>6}  {'':>15}  damaged: {found.reason}"
    verdict = "good" if found.verified else "readable, saved without fingerprints"
    return f"{step:>12,}  {found.arrays:>6,}  {found.size:>15,}  {verdict}"


def unequal_arrays(one: Path, other: Path, step: int) -> list[str]:
    """Paths of the arrays that two runs hold with other bits at a step, by their fingerprints.

    Raises:
      ValueError: one of them has no such step, or none with fingerprints.
    """
    for workdir in (one, other):
        if step not in all_steps(workdir):
            raise ValueError(f"{workdir} has no step {step:,}")
    return differences(stored_fingerprints(one, step), stored_fingerprints(other, step))
