# SPDX-License-Identifier: Apache-2.0
"""One page that tells a run: `write_report(workdir)` makes `report.html` from the files there.

The page stands alone: styles and charts are inside it, it needs no script and no network, and it
opens from disk. The same files give the same bytes.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.charts import Curve, chart
from lmjax.metrics import METRICS_FILE, read_json_lines, read_metrics, write_atomically
from lmjax.report_page import card, compact, is_number, leaf, note, number, page, section, tree

_MEASURES = {
    "loss": ("Loss", "nats per token"),
    "perplexity": ("Perplexity", "per token"),
    "bits_per_byte": ("Bits per byte", "of text"),
}
_ENCODER_MEASURES = {
    "masked_loss": ("Masked tokens", "nats"),
    "masked_accuracy": ("Masked accuracy", "share"),
    "pair_accuracy": ("Pair accuracy", "share"),
    "replaced_accuracy": ("Replaced accuracy", "share"),
    "replaced_auc": ("Replaced AUC", "chance 0.5"),
    "pseudo_perplexity": ("Pseudo-perplexity", "one mask at a time"),
    "pseudo_bits_per_byte": ("Pseudo-bits per byte", "one mask at a time"),
}
_WORD_MEASURES = {
    "perplexity": ("Perplexity", "per word, both directions"),
    "forward_perplexity": ("Forward", "perplexity per word"),
    "backward_perplexity": ("Backward", "perplexity per word"),
    "bits_per_byte": ("Bits per byte", "of text"),
}
_BASELINES = {"unigram_bits_per_byte": "unigram model", "xz_bits_per_byte": "xz"}
_SMALL_CHARTS = {
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "tokens_per_second": "Tokens a second",
}
_OPTIONAL_CHARTS = {
    "mfu": "Model FLOPs utilisation",
    "held_out_masked_accuracy": "Held-out masked accuracy",
    "held_out_pair_accuracy": "Held-out pair accuracy",
    "held_out_replaced_accuracy": "Held-out replaced accuracy",
    "held_out_forward_loss": "Held-out loss, forward",
    "held_out_backward_loss": "Held-out loss, backward",
}

_SMOOTH = ("gradient_norm", "tokens_per_second", "mfu")

Records = Sequence[Mapping[str, Any]]


def write_report(workdir: Path) -> Path:
    """Writes `workdir/report.html` from the files of a run and returns its path.

    Reads recipe.json, metrics.jsonl, evaluation-<split>.json, samples.jsonl and environment.json;
    the page names those that are absent or unreadable. ValueError where there is no such folder.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ValueError(f"no folder {workdir}: a report is written from the folder of a run")
    recipe, recipe_problem = _read_object(workdir / "recipe.json")
    environment, environment_problem = _read_object(workdir / "environment.json")
    metrics = read_metrics(workdir)
    title = str(recipe.get("title") or recipe.get("name") or workdir.resolve().name)
    settings = _settings(recipe)
    sections = [
        _header(title, recipe),
        section("Results", _results(workdir, settings, metrics)),
        section("Curves", _curves(metrics)),
        section("Samples", _samples(workdir / "samples.jsonl")),
        section("Recipe", recipe_problem or tree(settings)),
        section("Environment", environment_problem or tree(environment)),
    ]
    path = workdir / "report.html"
    # Text from a model may hold halves of surrogate pairs, which no encoding knows.
    write_atomically(path, page(title, "\n".join(sections)).encode("utf-8", "replace"))
    return path


def _read_object(path: Path) -> tuple[dict[str, Any], str]:
    """The JSON object in `path`, and a paragraph saying why there is none."""
    if not path.exists():
        return {}, note(f"There is no {path.name} in this folder.")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, note(f"{path.name} cannot be read: {error}.")
    if not isinstance(content, dict):
        return {}, note(f"{path.name} cannot be read: it holds no JSON object.")
    return content, ""


# The text of the page ----------------------------------------------------------------------------


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what the header shows, its `summary` and `run` laid open."""
    settings = {key: recipe[key] for key in recipe if key not in ("title", "description")}
    for key in ("summary", "run"):
        if isinstance(settings.get(key), dict):
            settings |= settings.pop(key)
    return settings


def _header(title: str, recipe: Mapping[str, Any]) -> str:
    description = recipe.get("description")
    paragraph = f'<p class="lead">{escape(str(description))}</p>' if description else ""
    return f"<header><h1>{escape(title)}</h1>{paragraph}</header>"


def _results(workdir: Path, settings: Mapping[str, Any], metrics: Records) -> str:
    """The headline numbers, the bits per byte beside simple models, and the table of splits."""
    splits: dict[str, dict[str, Any]] = {}
    problems = []
    for path in sorted(workdir.glob("evaluation-*.json")):
        content, problem = _read_object(path)
        problems.append(problem)
        if content:
            splits[path.stem.removeprefix("evaluation-")] = content
    if not splits:
        problems.append(note("There is no evaluation-<split>.json in this folder."))
    headline = next((name for name in ("test", "validation", *splits) if name in splits), None)
    scores = _score_cards(splits[headline], headline) if headline else _last_look(metrics)
    shown = [_cards(scores), _cards(_size_cards(settings, metrics)), *problems]
    if headline:
        shown += [_compared(splits[headline]), _split_table(splits)]
    return "\n".join(filter(None, shown))


def _cards(cards: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _score_cards(scores: Mapping[str, Any], split: str) -> list[str]:
    return [
        card(label, number(scores[key]), f"{unit}, {split} split")
        for key, (label, unit) in _measures(scores).items()
        if is_number(scores.get(key))
    ]


def _measures(scores: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    if "masked_loss" in scores:
        return _ENCODER_MEASURES
    return _WORD_MEASURES if "backward_loss" in scores else _MEASURES


def _last_look(metrics: Records) -> list[str]:
    """The held-out loss during training, for a run that has not been evaluated."""
    steps, losses = _curve(metrics, "held_out_loss")
    if not len(steps):
        return []
    unit = f"{_MEASURES['loss'][1]}, at step {int(steps[-1]):,}"
    return [card("Held-out loss", number(float(losses[-1])), unit)]


def _size_cards(settings: Mapping[str, Any], metrics: Records) -> list[str]:
    cards = []
    parameters = settings.get("parameters")
    if is_number(parameters):
        cards.append(card("Parameters", *compact(parameters)))
    if metrics:
        planned = settings.get("steps")
        unit = f"of {planned:,}" if is_number(planned) else ""
        cards.append(card("Steps", number(metrics[-1]["step"]), unit))
    tokens = [record["tokens"] for record in metrics if is_number(record.get("tokens"))]
    if tokens:
        cards.append(card("Training tokens", *compact(tokens[-1])))
    rates = _curve(metrics, "tokens_per_second")[1]
    if len(rates):
        median = round(statistics.median(rates.tolist()))
        cards.append(card("Tokens a second", number(median), "median"))
    return cards


def _compared(scores: Mapping[str, Any]) -> str:
    """Bars of bits per byte: this model, and the simple ones where the evaluation has them."""
    rows: list[tuple[str, Any]] = [("this model", scores.get("bits_per_byte"))]
    baselines = scores.get("baselines")
    for key, value in baselines.items() if isinstance(baselines, Mapping) else ():
        if not str(key).endswith("_bits_per_byte"):
            continue
        name = _BASELINES.get(str(key), str(key).removesuffix("_bits_per_byte").replace("_", " "))
        rows.append((name, value))
    bars = [(name, value) for name, value in rows if is_number(value) and math.isfinite(value)]
    if len(bars) < 2:
        return ""
    longest = max(max(value for _, value in bars), 1e-9)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar"><i style="width:'
        f'{100 * max(value, 0) / longest:.1f}%"{" class=main" if place == 0 else ""}></i></td>'
        f"<td>{number(value)}</td></tr>"
        for place, (name, value) in enumerate(bars)
    )
    caption = "Bits per byte on the same text: fewer is better"
    return f'<table class="bars"><caption>{caption}</caption>{body}</table>'


def _split_table(splits: Mapping[str, Mapping[str, Any]]) -> str:
    keys = dict.fromkeys(key for scores in splits.values() for key in scores)
    for key in ("baselines", "comparable_with"):
        keys.pop(key, None)
    head = "".join(f'<th scope="col">{escape(split)}</th>' for split in splits)
    rows = "".join(
        f'<tr><th scope="row">{escape(key.replace("_", " ").capitalize())}</th>'
        + "".join(f"<td>{leaf(scores.get(key, ''))}</td>" for scores in splits.values())
        + "</tr>"
        for key in keys
    )
    table = f'<table class="splits"><tr><td></td>{head}</tr>{rows}</table>'
    return f'<div class="wide">{table}</div>{_comparable(splits)}'


def _comparable(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """What each number may be compared with, where the evaluation says so."""
    said: dict[str, str] = {}
    for scores in splits.values():
        others = scores.get("comparable_with")
        said |= {str(k): str(v) for k, v in others.items()} if isinstance(others, Mapping) else {}
    if not said:
        return ""
    lines = "; ".join(f"{key.replace('_', ' ')}: {other}" for key, other in said.items())
    return note(f"Compare only with. {lines}.")


def _samples(path: Path) -> str:
    records, damaged = read_json_lines(path)
    if not records:
        return note(f"There is no {path.name} in this folder, or it is empty: no samples.")
    by_step: dict[Any, list[str]] = {}
    for record in records:
        by_step.setdefault(record.get("step", "?"), []).append(_sample(record))
    shown = [note(f"{damaged} unreadable line(s) left out.")] if damaged else []
    for place, (step, samples) in enumerate(reversed(by_step.items())):
        at = f"{step:,}" if is_number(step) else escape(str(step))
        opened = " open" if place == 0 else ""
        summary = f"<summary><b>Step {at}</b></summary>"
        shown.append(f"<details{opened}>{summary}{''.join(samples)}</details>")
    return "\n".join(shown)


def _sample(record: Mapping[str, Any]) -> str:
    prompt, text = str(record.get("prompt") or ""), str(record.get("text") or "")
    rest = text.removeprefix(prompt)
    return f'<div class="sample" dir="auto"><b>{escape(prompt)}</b>{escape(rest)}</div>'


# Charts ------------------------------------------------------------------------------------------


def _curves(metrics: Records) -> str:
    if not metrics:
        return note(f"There is no {METRICS_FILE} in this folder, or it is empty: no curves.")
    curves = {key: _curve(metrics, key) for key in ("loss", "held_out_loss", *_SMALL_CHARTS)}
    absent = [key for key, (steps, _) in curves.items() if not len(steps)]
    charts = dict(_SMALL_CHARTS)
    for key, label in _OPTIONAL_CHARTS.items():
        if len((curve := _curve(metrics, key))[0]):
            curves[key], charts[key] = curve, label
    try:
        shown = _loss_figures(curves["loss"], curves["held_out_loss"])
        small = [
            _figure(label, key, (360, 230), curves[key], smooth=key in _SMOOTH)
            for key, label in charts.items()
            if key not in absent
        ]
    except ImportError:
        return note("Charts need matplotlib, which is not installed: pip install matplotlib")
    if small:
        shown.append(f'<div class="charts">{"".join(small)}</div>')
    if absent:
        shown.append(note(f"Not in {METRICS_FILE}: {', '.join(absent)}."))
    return "\n".join(shown)


def _curve(metrics: Records, key: str) -> Curve:
    """The steps at which `key` was recorded as a finite number, and its values."""
    pairs = [(record["step"], record[key]) for record in metrics if is_number(record.get(key))]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _loss_figures(loss: Curve, held_out: Curve) -> list[str]:
    legend = []
    if len(loss[0]):
        legend += [
            '<i class="main"></i>training, moving mean',
            '<i class="faint"></i>as recorded',
        ]
    if len(held_out[0]):
        legend.append('<i class="second"></i>held out')
    if not legend:
        return []
    label = "".join(f"<span>{part}</span>" for part in ["Loss, nats per token", *legend])
    points = held_out if len(held_out[0]) else None
    # Two drawings, of which a page shows the one that keeps its letters readable.
    return [
        _figure(label, name, size, loss, points, from_zero=False)
        for name, size in (("broad", (1000, 340)), ("slim", (400, 290)))
    ]


def _figure(label: str, name: str, size: tuple[int, int], *curves: Any, **options: Any) -> str:
    svg, cut = chart(name, size, *curves, **options)
    if cut:
        label += f" ({cut} above the frame)"
    return f'<figure class="{name}"><figcaption>{label}</figcaption>{svg}</figure>'
