# SPDX-License-Identifier: Apache-2.0
"""Curves over steps as inline SVG: no link, no script, colours taken from the page's theme."""

import io
import re

import numpy as np

MOST_POINTS = 2000  # of one curve; more are thinned to the extremes of each stretch
# Charts are drawn in these colours; each is then replaced by the CSS variable of its name.
_COLOURS = {
    "ink": "#000011",
    "grid": "#000022",
    "faint": "#000033",
    "main": "#000044",
    "second": "#000055",
}

Curve = tuple[np.ndarray, np.ndarray]  # steps and values, finite, of one length


def chart(
    name: str,
    size: tuple[int, int],
    curve: Curve,
    points: Curve | None = None,
    smooth: bool = True,
    from_zero: bool = True,
) -> tuple[str, int]:
    """Draws a curve, and `points` over it, and returns the SVG and how many values are cut off.

    `size` is in pixels, at which letters are 13 pixels high. A noisy curve (`smooth`) is drawn
    thin, with its moving mean on top, and without the outliers that would flatten the rest.
    Needs matplotlib. The same arguments give the same text; `name` keeps its ids apart.
    """
    import matplotlib
    from matplotlib.figure import Figure

    everything = np.concatenate([curve[1], points[1] if points else np.empty(0)])
    top = everything.max()
    if smooth:
        top = min(
            top,
            max(4 * float(np.median(everything)), curve[1][:1].max(initial=-np.inf)),
        )
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the reader's own matplotlibrc has no say
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 13})
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        axes = figure.add_subplot()
        _plot(axes, curve, points, smooth)
        _dress(axes, everything.min(), top, from_zero)
        steps = np.concatenate([curve[0], points[0] if points else np.empty(0)])
        if steps.min() == steps.max():
            axes.set_xlim(steps[0] - 1, steps[0] + 1)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name), int((everything > top).sum())


def thin(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most `most` points of the curve: the lowest and the highest of each stretch of steps."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    stretches = np.array_split(np.arange(len(steps)), most // 2)
    ends = [(part[values[part].argmin()], part[values[part].argmax()]) for part in stretches]
    kept = np.unique(np.array(ends))
    return steps[kept], values[kept]


def smoothed(values: np.ndarray) -> np.ndarray:
    """The centred mean over a fiftieth of the curve, over less near its ends."""
    count = len(values)
    place = np.arange(count)
    # Narrow at the start, where the curve falls steeply; one-sided at the end, where it is flat.
    left = np.minimum(place, count // 100)
    right = np.minimum(left, count - 1 - place)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[place + right + 1] - total[place - left]) / (left + right + 1)


def _plot(axes, curve: Curve, points: Curve | None, smooth: bool) -> None:
    """Draws the curve, its moving mean and the points."""
    marker = "o" if len(curve[0]) == 1 else ""
    if smooth:
        axes.plot(*thin(curve), color=_COLOURS["faint"], linewidth=0.8, marker=marker)
        curve = (curve[0], smoothed(curve[1]))
    axes.plot(*thin(curve), color=_COLOURS["main"], linewidth=2, marker=marker)
    if points is not None:
        axes.plot(
            *thin(points),
            color=_COLOURS["second"],
            linewidth=1.2,
            marker="o",
            markersize=4,
        )


def _dress(axes, bottom: float, top: float, from_zero: bool) -> None:
    """Limits, ticks and a quiet frame."""
    from matplotlib.ticker import MaxNLocator

    bottom = min(0.0, bottom) if from_zero else bottom
    room = (top - bottom) * 0.06 or max(abs(top), 1.0) * 0.06
    axes.set_ylim(bottom if from_zero else bottom - room, top + room)
    axes.margins(x=0.02)
    wide = axes.figure.get_figwidth() > 8
    axes.xaxis.set_major_locator(MaxNLocator(10 if wide else 5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: _tick(value))
    axes.grid(axis="y", color=_COLOURS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_COLOURS["grid"])
    axes.tick_params(length=0, pad=6, labelcolor=_COLOURS["ink"])
    axes.set_xlabel("step", color=_COLOURS["ink"])


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _inline(svg: str, name: str) -> str:
    """The drawing as a part of a page: bare, scalable, in the page's colours and letters."""
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg class="{name}" {box[0]} role="img">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every chart, and never referred to
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = svg.replace("xlink:href", "href")
    for variable, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()
