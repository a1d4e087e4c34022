# SPDX-License-Identifier: Apache-2.0
"""The frame of a report and its small pieces of HTML; all text that comes in is escaped."""

import json
import math
from collections.abc import Mapping
from html import escape
from typing import Any, TypeGuard


def page(title: str, body: str) -> str:
    """A whole document around `body`, which is HTML already; the title is plain text."""
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)


def section(title: str, content: str) -> str:
    """A heading and the HTML under it."""
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def note(text: str) -> str:
    """A paragraph in passing: what is missing, or left out."""
    return f'<p class="note">{escape(text)}</p>'


def number(value: float) -> str:
    """A number for reading, with the exact one as the value of its HTML element."""
    if isinstance(value, int):
        shown = f"{value:,}"
    elif not math.isfinite(value):
        shown = "not a number" if math.isnan(value) else "infinite"
    elif value != 0 and not 1e-3 <= abs(value) < 1e6:
        shown = f"{value:.4g}"
    else:
        shown = f"{value:,.{4 if abs(value) < 10 else 2}f}"
    return f'<data value="{value}">{shown}</data>'


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value from a JSON file is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def card(label: str, value: str, unit: str) -> str:
    """A headline: `value` is HTML, the others are plain text."""
    return (
        f'<div class="card"><span class="label">{escape(label)}</span>'
        f"<strong>{value}</strong><small>{escape(unit)}</small></div>"
    )


def compact(count: int | float) -> tuple[str, str]:
    """A count in millions or billions where it is large, and the exact count."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(count) >= size:
            return (
                f'<data value="{count}">{count / size:.4g} {letter}</data>',
                f"{count:,}",
            )
    return number(count), ""


def leaf(value: Any) -> str:
    """Any value of a JSON file, for a cell of a table; null is a dash."""
    if value is None:
        return "–"
    if is_number(value):
        return number(value)
    if isinstance(value, str):
        return escape(value)
    return escape(json.dumps(value, ensure_ascii=False))


def tree(content: Mapping[str, Any]) -> str:
    """Nested settings as folded tables; plain values first, then the groups."""
    groups = {key: value for key, value in content.items() if isinstance(value, Mapping) and value}
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{_setting(value)}</td></tr>'
        for key, value in content.items()
        if key not in groups and key != "class"
    )
    shown = [f'<table class="settings">{rows}</table>' if rows else ""]
    for key, value in groups.items():
        kind = f" <small>{escape(str(value['class']))}</small>" if "class" in value else ""
        summary = f"<summary><b>{escape(str(key))}</b>{kind}</summary>"
        shown.append(f"<details>{summary}{tree(value)}</details>")
    return "\n".join(filter(None, shown)) or note("Nothing is set.")


def _setting(value: Any) -> str:
    # Not rounded, unlike a result.
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


_STYLE = """
:root { --paper: #fff; --ink: #1c2330; --soft: #5b6577; --grid: #e3e6ec; --raised: #f5f6f9;
  --main: #1f5fd0; --second: #c2410c; --faint: #a9c1ee; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #12151b; --ink: #e4e8f0;
  --soft: #9aa5b8; --grid: #2c333f; --raised: #1b2029; --main: #7aa8ff; --second: #ff9d66;
  --faint: #34548f; } }
* { box-sizing: border-box; }
body { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; }
h2 { margin: 3rem 0 1rem; font-size: 1.2rem; break-after: avoid; }
.lead { margin: 0.6rem 0 0; max-width: 44rem; color: var(--soft); white-space: pre-line; }
.note { margin: 0.75rem 0; color: var(--soft); font-style: italic; }
small, .label, figcaption, caption { color: var(--soft); font-size: 0.85rem; }
data { font-variant-numeric: tabular-nums; }
.cards { display: grid; gap: 0.75rem; grid-auto-columns: minmax(0, 1fr); grid-auto-flow: column;
  margin-bottom: 0.75rem; }
.cards:first-of-type strong { font-size: 2rem; }
.card { padding: 0.8rem 1rem; border-radius: 0.6rem; background: var(--raised);
  break-inside: avoid; }
.card > * { display: block; }
.card strong { font-size: 1.5rem; font-weight: 600; line-height: 1.35; }
table { border-collapse: collapse; }
caption { padding-bottom: 0.4rem; text-align: left; }
th { font-weight: 400; text-align: left; }
th, td { padding: 0.3rem 1rem 0.3rem 0; vertical-align: top; }
.wide { overflow-x: auto; overflow-wrap: normal; }
.bars { width: 100%; max-width: 44rem; margin: 1.75rem 0; overflow-wrap: normal; }
.bars th, .bars td:last-child { width: 1%; white-space: nowrap; }
.bars td:last-child { padding: 0.3rem 0; text-align: right; }
.bars i { display: block; height: 0.85rem; margin-top: 0.35rem; border-radius: 0.2rem;
  background: var(--faint); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.bars i.main { background: var(--main); }
.splits td, .splits th[scope=col] { padding-left: 1.5rem; text-align: right; }
.splits td:first-child { padding-left: 0; }
.splits tr + tr, .settings tr + tr { border-top: 1px solid var(--grid); }
.settings { width: 100%; table-layout: fixed; font-size: 0.92rem; }
.settings th { width: 34%; color: var(--soft); }
figure { margin: 0 0 1.25rem; break-inside: avoid; }
.charts figure { margin: 0; }
figure.slim { display: none; }
figcaption span { display: inline-block; margin-right: 1rem; }
figcaption i { display: inline-block; width: 1.1rem; height: 0.2rem; margin-right: 0.4rem;
  border-radius: 0.1rem; vertical-align: middle; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
figcaption .main { background: var(--main); }
figcaption .faint { background: var(--faint); }
figcaption .second { background: var(--second); }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
details { margin: 0.5rem 0; padding: 0.45rem 0 0.45rem 1rem; border-left: 2px solid var(--grid); }
summary { margin-left: -0.35rem; cursor: pointer; }
summary b { font-weight: 600; }
.sample { margin: 0.75rem 0; padding: 0.8rem 1rem; border-radius: 0.6rem;
  background: var(--raised); font-size: 0.95rem; white-space: pre-wrap; }
@media (max-width: 40rem) {
  body { padding-top: 1.5rem; } h2 { margin-top: 2.25rem; }
  figure.broad { display: none; } figure.slim { display: block; }
  .cards { grid-auto-flow: row; grid-template-columns: 1fr 1fr; gap: 0.6rem; }
  .cards:first-of-type { grid-template-columns: 1fr; }
  .cards:first-of-type .card { display: grid; grid-template-columns: 1fr auto; }
  .cards:first-of-type strong { grid-column: 2; grid-row: 1 / 3; align-self: center;
    font-size: 1.7rem; }
  .card strong { font-size: 1.25rem; }
  .splits td, .splits th[scope=col] { padding-left: 0.75rem; padding-right: 0; }
}
@media print {
  @page { margin: 16mm; } body { max-width: none; padding: 0; font-size: 10pt; }
  details::details-content { content-visibility: visible; }
}
"""


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
