# SPDX-License-Identifier: Apache-2.0
"""What a search found, as a table for people: a row a combination, the fastest first."""

from collections.abc import Sequence
from typing import Any

from lmjax.plan.table import BAND, FIRST_PHASE, columns, peak, seconds

Result = dict[str, Any]
_HEAD = (
    "", "mesh", "remat", "parts", "unroll", "peak memory", "from", "step", "band", "from", "MFU",
    "tokens/s", "hours", "dollars", "expected: step", "memory",
)  # fmt: skip
_NOTES = (
    "From the compiler: its program for the chip; roofline: the peaks of the chip alone; line: by",
    "traces (> as a lower bound). Expected: what the choice to compile rested on.",
)


def winners(found: Sequence[Result]) -> str:
    """Rows of combinations, what to write down for the best of them, and what the words mean."""
    best = found[0]
    room = best["hbm_bytes"] / 2**30
    lines = [f"{best['topology']}, batch {best['batch']:,}, {room:.2f} GiB a device", ""]
    lines += [*columns([_HEAD, *map(_row, found)]), ""]
    if best["fits"]:
        lines += ["Into Run(…) of the experiment file:", f"  {best['line']}"]
        if best["model_line"]:
            lines += ["into its model:", f"  {best['model_line']}"]
        lines += ["or on the command line:", f"  {best['flags']}", ""]
    else:
        lines += ["Nothing that was compiled fits; more devices or a smaller batch would.", ""]
    phases = [FIRST_PHASE] if "phases" in best else []
    return "\n".join([*lines, *_NOTES, *phases, *BAND])


def _row(found: Result) -> tuple[str, ...]:
    """A combination, in the order of the head."""
    mesh = " × ".join(f"{axis} {n}" for axis, n in found["mesh"].items() if n > 1) or "one"
    unroll = "–" if found["unroll"] is None else str(max(1, found["unroll"]))
    known = (
        str(found["rank"]), mesh, found["remat"] or "–", str(found["accumulate"]), unroll,
        peak(found), found["memory_from"],
    )  # fmt: skip
    expected = (
        f"~{seconds(found['roofline_seconds'])}", f"~{found['line_bytes'] / 2**30:.2f} GiB"
    )  # fmt: skip
    if not found["fits"]:
        return (*known, "does not fit", *["–"] * 6, *expected)
    return (
        *known,
        seconds(found["step_seconds"]),
        f"{seconds(found['step_seconds_low'])} – {seconds(found['step_seconds_high'])}",
        found["step_from"],
        f"{found['mfu']:.1%}",
        f"{found['tokens_per_second']:,.0f}",
        f"{found['hours']:,.1f}",
        "–" if found["cost"] is None else f"{found['cost']:,.0f}",
        *expected,
    )
