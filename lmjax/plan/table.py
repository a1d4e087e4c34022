# SPDX-License-Identifier: Apache-2.0
"""Plans as a table for people: a column a topology."""

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]

FIRST_PHASE = "Step, MFU and tokens/s are the first phase's; peak, hours and cost the whole run's."
BAND = [
    "Step: the compiler's estimated cycles, and kernels and transfers at the peaks of the chip",
    "(roofline). The band is from cycles / 2 with all transfers hidden to cycles × 1.05 with none",
    "hidden, which holds the published speeds that it was tried on; no TPU was asked.",
]


def table(results: Sequence[Result]) -> str:
    """Rows of what was asked, columns of topologies, and below what the words mean."""
    rows = [("", [found["topology"] for found in results])]
    rows += [(name, [show(found) for found in results]) for name, show in _ROWS]
    rows = [(name, cells) for name, cells in rows if any(cells)]
    lines = columns([(name, *cells) for name, cells in rows])
    return "\n".join([*lines, "", *_notes(results)])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, wide, strict=True))
        ).rstrip()
        for row in rows
    ]


def _notes(results: Sequence[Result]) -> list[str]:
    found = ["Memory and collectives: the compiler's, exact; activations and the largest batch: a"]
    found += ["line through two compilations. Bytes are of one device."]
    if any(r["memory_from"] == "line" for r in results):
        found += ["A peak after > is a lower bound by the line: too much, and not compiled."]
    if any("phases" in r for r in results):
        found += [FIRST_PHASE]
    if any(r.get("step_from") == "compiler" for r in results):
        found += BAND
    if any(r.get("step_from") == "roofline" for r in results):
        found += ["A step marked ~ is a roofline alone: the compiler could not write its program."]
    if any(r["price_per_chip_hour"] for r in results):
        found += ["Cost: list prices on demand unless --price says otherwise; they change."]
    return found


def _gib(key: str):
    def show(found: Result) -> str:
        return "" if found.get(key) is None else f"{found[key] / 2**30:.2f} GiB"

    return show


def peak(found: Result) -> str:
    """Of memory; a lower bound, which nothing was compiled for, has a mark."""
    least = "> " if found["memory_from"] == "line" else ""
    return f"{least}{found['peak_hbm_bytes'] / 2**30:.2f} GiB"


def _fits(found: Result) -> str:
    return "yes" if found["fits"] else "NO"


def _mesh(found: Result) -> str:
    return " × ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1) or "one"


def _batch(found: Result) -> str:
    parts = found["accumulate"]
    return f"{found['batch']:,}" + (f" in {parts} parts" if parts > 1 else "")


def _largest(found: Result) -> str:
    most = found.get("largest_batch")
    return "" if most is None else f"{most:,}"


def _step(found: Result) -> str:
    if found["step_seconds"] is None:
        return "–"
    about = "~" if found["step_from"] == "roofline" else ""
    return about + seconds(found["step_seconds"])


def _band(found: Result) -> str:
    if found["step_seconds"] is None:
        return "–"
    return f"{seconds(found['step_seconds_low'])} – {seconds(found['step_seconds_high'])}"


def seconds(value: float) -> str:
    """A duration in a unit that suits it."""
    return f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _part(key: str):
    def show(found: Result) -> str:
        return "" if found.get(key) is None else seconds(found[key])

    return show


def _transfers(found: Result) -> str:
    sums: dict[str, int] = {}
    for c in found.get("collectives") or ():
        name = "×".join(c["axes"]) or "?"
        sums[name] = sums.get(name, 0) + c["bytes"]
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sums.items())


def _number(key: str, form: str):
    def show(found: Result) -> str:
        return "–" if found.get(key) is None else form.format(found[key])

    return show


_ROWS = (
    ("fits", _fits),
    ("mesh", _mesh),
    ("batch", _batch),
    ("remat", lambda found: found["remat"] or ""),
    ("peak memory", peak),
    ("  of", _gib("hbm_bytes")),
    ("  parameters", _gib("parameters_bytes")),
    ("  optimiser, carried state", _gib("optimizer_bytes")),
    ("  activations", _gib("activations_bytes")),
    ("  all temporaries", _gib("temporaries_bytes")),
    ("largest batch that fits", _largest),
    ("step", _step),
    ("  band", _band),
    ("  operations", _part("compute_seconds")),
    ("  kernels", _part("kernel_seconds")),
    ("  transfers", _part("transfer_seconds")),
    ("sent a step, by axis", _transfers),
    ("model FLOPs utilisation", _number("mfu", "{:.1%}")),
    ("tokens/s", _number("tokens_per_second", "{:,.0f}")),
    ("hours of the run", _number("hours", "{:,.1f}")),
    ("dollars of the run", _number("cost", "{:,.0f}")),
)
