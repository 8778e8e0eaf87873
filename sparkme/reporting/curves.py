"""Draws the curves of `sparkme.report` as SVG of any width, without a library.

A chart has three layers. Lines and points lie in a box of 1000 by 1000 that is stretched to the page. Ticks and labels are
placed by percent, so that labels keep their size. The script that shows values reads the numbers from JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

LARGEST_NUMBER = 1e30  # larger values are not drawn
BOX = 1000  # units of the drawing, in both directions
COLOURS, DASHES = 7, 4  # classes c0, c1, ... and d0, d1, ... of the style sheet
FEW_POINTS, FEW_OF_MANY = 60, 12  # a curve with at most so many points has dots; the second holds for more than three curves


def number(value: Any) -> float | None:
    """The value if it can be drawn, else None; tiny values become 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) <= LARGEST_NUMBER:  # also true of NaN
        return None
    return float(value) if abs(value) >= 1 / LARGEST_NUMBER else 0.0


class Curve(NamedTuple):
    """A line of run number `run` in style number `style`; `steps`, `epochs` and `values` are finite and in order."""

    run: int
    style: int
    label: str
    steps: Sequence[float]
    epochs: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: its name in the page's script and address.
        title: its heading.
        unit: appended to values, such as `%` or ` ms`.
        curves: at least one.
        from_zero: the axis starts at 0.
        least_span: smallest length of the axis, so that a flat curve does not look steep.
        highest: largest end of the axis.
        has_log: a button switches to a logarithmic axis.
        notes: a note below the chart.
        legend: the chart has its own legend.
    """

    name: str
    title: str
    unit: str
    curves: list[Curve]
    from_zero: bool = False
    least_span: float = 0.0
    highest: float = math.inf
    has_log: bool = False
    notes: str = ""
    legend: bool = False


def thin(values: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` (at least 4) points to draw: the first, the last, and the extremes of equal parts."""
    count = len(values)
    if count <= most:
        return list(range(count))
    parts = (most - 2) // 2
    kept = {0, count - 1}
    for part in range(parts):
        span = range(part * count // parts, (part + 1) * count // parts)
        kept |= {min(span, key=values.__getitem__), max(span, key=values.__getitem__)}
    return sorted(kept)


class Axis(NamedTuple):
    """An axis from `low` to `high`, both base-10 logarithms if `log`; `ticks` are (value, label)."""

    low: float
    high: float
    log: bool
    ticks: list[tuple[float, str]]

    def place(self, value: float) -> float:
        """The position of a value, from 0 at the start to 1 at the end."""
        at = math.log10(value) if self.log else value
        return (at - self.low) / (self.high - self.low)


def linear_axis(low: float, high: float, *, most: int = 6, tight: bool = False) -> Axis:
    """A linear axis with at most `most` round ticks. It ends at `low` and `high` if `tight`, else a little beyond them."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a single value
        pad = 0.05 * abs(low) or 1.0
        low, high = (low, high + pad) if tight else (low - pad, high + pad)
    rough = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * m for m in (1, 2, 5, 10) if magnitude * m >= rough * 0.999)
    ends = (low, high) if tight else (low - 0.04 * (high - low), high + 0.04 * (high - low))
    first, last = math.ceil(ends[0] / step - 1e-6), math.floor(ends[1] / step + 1e-6)
    ticks = [(i * step, tick_text(i * step, step)) for i in range(first, last + 1)]
    return Axis(*ends, False, ticks)


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis of positive values."""
    ends = [math.log10(low), math.log10(high)]
    if ends[1] - ends[0] < 0.02:
        ends = [ends[0] - 0.05, ends[1] + 0.05]
    pad = 0.04 * (ends[1] - ends[0])
    low, high = ends[0] - pad, ends[1] + pad
    decades = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, math.ceil(len(decades) / 7))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [(m * 10.0**d, f"{m * 10.0**d:.3g}") for d in decades if d % every == 0 for m in factors]
        ticks = [(value, text) for value, text in ticks if low <= math.log10(value) <= high]
        if len(ticks) >= 3:
            return Axis(low, high, True, ticks)
    plain = linear_axis(10.0**low, 10.0**high, tight=True).ticks  # less than a decade
    return Axis(low, high, True, [(value, text) for value, text in plain if value > 0])


def tick_text(value: float, step: float) -> str:
    """A tick's label, with as few digits as its neighbours allow."""
    if value == 0:
        return "0"
    if abs(step) < 1e-3 or abs(value) >= 1e5:
        digits = max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(step * 1.001)))
        return compact(value, digits + 1)
    decimals = max(0, -math.floor(math.log10(step * 1.001)))
    return f"{value:.{decimals}f}"


def compact(value: float, digits: int) -> str:
    """A number with `digits` digits in its shortest form: 4e-4 instead of 0.0004, 2e6 instead of 2e+06."""
    mantissa, _, exponent = f"{value:.{max(0, digits - 1)}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    if -3 <= int(exponent) <= 4:
        return f"{float(f'{value:.{digits}g}'):.{max(digits - 1 - int(exponent), 0)}f}"
    return f"{mantissa}e{int(exponent)}"


def draw_chart(chart: Chart, x_range: tuple[float, float]) -> str:
    """The figure of a chart over the epochs `x_range`, with a linear axis and, if it `has_log`, a hidden logarithmic one."""
    x_axis = linear_axis(*x_range, most=5, tight=True)
    values = [value for curve in chart.curves for value in curve.values]
    plots = [_plot(chart, x_axis, _linear(chart, min(values), max(values)))]
    positive = [value for value in values if value > 0]
    has_log = chart.has_log and bool(positive)
    notes = [chart.notes] if chart.notes else []
    if has_log:
        plots.append(_plot(chart, x_axis, log_axis(min(positive), max(positive))))
    last = f'<span class="now">{nice(chart.curves[0].values[-1])}{escape(chart.unit)}</span>' if len(chart.curves) == 1 else ""
    button = f'<button type="button" class="switch script" data-log="{escape(chart.name)}" aria-pressed="false" '
    button += 'title="logarithmic axis">log</button>'
    numbers = [
        {
            "run": c.run,
            "style": f"c{c.style % COLOURS}",
            "label": c.label,
            "s": [*map(_round, c.steps)],
            "x": [*map(_round, c.epochs)],
            "y": [*map(_round, c.values)],
        }
        for c in chart.curves
    ]
    data = json.dumps({"unit": chart.unit, "curves": numbers}, separators=(",", ":")).replace("<", "\\u003c")
    legend = ""
    if chart.legend:
        entries = (f"<li>{swatch(curve.style)} {escape(curve.label)}</li>" for curve in chart.curves)
        legend = f'<ul class="legend">{"".join(entries)}</ul>'
    return "\n".join(
        [
            f'<figure class="chart" data-name="{escape(chart.name)}">',
            f"<figcaption><h3>{escape(chart.title)}</h3>{last}{button if has_log else ''}</figcaption>",
            *plots,
            legend,
            *(f'<p class="small">{escape(note)}</p>' for note in notes),
            f'<script type="application/json">{data}</script>',
            "</figure>",
        ]
    )


def _linear(chart: Chart, low: float, high: float) -> Axis:
    if chart.from_zero:
        low = min(low, 0.0)
    if high - low < chart.least_span:
        middle = min((low + high) / 2, chart.highest - chart.least_span / 2)
        low = low if chart.from_zero else middle - chart.least_span / 2
        high = low + chart.least_span
    axis = linear_axis(low, high)
    start = 0.0 if chart.from_zero and low == 0 else axis.low
    end = min(axis.high, max(chart.highest, high))
    return axis._replace(low=start, high=end, ticks=[tick for tick in axis.ticks if start <= tick[0] <= end])


def _plot(chart: Chart, x_axis: Axis, y_axis: Axis) -> str:
    kind = "log" if y_axis.log else "linear"
    parts = []
    for value, text in y_axis.ticks:
        y = f"{100 * (1 - y_axis.place(value)):.2f}%"
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="-8" y="{y}" dy="0.32em" text-anchor="end">{text}</text>')
    for value, text in x_axis.ticks:
        x = f"{100 * x_axis.place(value):.2f}%"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="100%"/>')
        parts.append(f'<text x="{x}" y="100%" dy="1.5em" text-anchor="middle">{text}</text>')
    parts.append('<text x="-8" y="100%" dy="1.5em" text-anchor="end">epoch</text>')
    few = FEW_POINTS if len(chart.curves) <= 3 else FEW_OF_MANY
    lines = "\n".join(_line(curve, x_axis, y_axis, few) for curve in chart.curves)
    words = f"{chart.title} over epochs, {'logarithmic' if y_axis.log else 'linear'} axis. " + "; ".join(
        f"{curve.label}: from {nice(curve.values[0])} to {nice(curve.values[-1])}{chart.unit}, "
        f"lowest {nice(min(curve.values))}, highest {nice(max(curve.values))}"
        for curve in chart.curves[:8]
    )
    return (
        f'<div class="plot {kind}" data-x="{x_axis.low!r} {x_axis.high!r}" data-y="{y_axis.low!r} {y_axis.high!r}"'
        f'{" hidden" if y_axis.log else ""} tabindex="0">\n'
        f'<svg role="img" aria-label="{escape(words)}">\n'
        f"{''.join(parts)}\n"
        f'<svg viewBox="0 0 {BOX} {BOX}" preserveAspectRatio="none" width="100%" height="100%">\n{lines}\n</svg>\n'
        f'<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>\n</svg>\n</div>'
    )


def _line(curve: Curve, x_axis: Axis, y_axis: Axis, few: int) -> str:
    points = [
        f"{BOX * x_axis.place(x):.4g},{BOX * (1 - y_axis.place(y)):.4g}"
        for x, y in zip(curve.epochs, curve.values, strict=True)
        if not y_axis.log or y > 0
    ]
    style = f"c{curve.style % COLOURS} d{curve.style // COLOURS % DASHES}"
    line = f'<polyline class="{style}" data-run="{curve.run}" points="{" ".join(points)}"/>'
    if len(points) <= few:  # a path of length zero stays a round dot in the stretched box
        line += f'<path class="{style} dots" data-run="{curve.run}" d="{"".join(f"M{point}h0" for point in points)}"/>'
    return line


def swatch(style: int) -> str:
    """A sample of a run's line."""
    classes = f"c{style % COLOURS} d{style // COLOURS % DASHES}"
    line = f'<line class="{classes}" x1="1" x2="25" y1="5" y2="5"/>'
    return f'<svg class="swatch" width="26" height="10" aria-hidden="true">{line}</svg>'


def nice(value: float) -> str:
    """A number as text, with four digits."""
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 else compact(value, 4)


def _round(value: float) -> float:
    """Rounds to six digits, more than a screen resolves."""
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
