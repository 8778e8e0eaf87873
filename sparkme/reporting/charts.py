"""The curves of a report: which metrics share a chart, and on which axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from sparkme.reporting.curves import Chart, Curve, draw_chart, swatch, thin
from sparkme.reporting.markup import TITLES, is_share, section, title_of
from sparkme.reporting.overview import measurements
from sparkme.reporting.runs import Run, Series
from sparkme.training.log import LEAST_POINTS

MOST_POINTS, ALL_POINTS = 1000, 100_000  # per curve, and per page
MOST_MORE = 24  # charts of further metrics
UNITS = {"memory_gib": " GiB", "step_ms": " ms", "loader_wait": "%"}
# Charts that are shown next to those of loss and accuracy.
MAIN = ("learning_rate", "images_per_s", "gradient_norm", "loader_wait", "memory_gib")
FROM_ZERO = ("learning_rate", "images_per_s", "loader_wait", "memory_gib", "step_ms", "not_finite", "weight_decay")
# Titles of charts of several metrics, by the first one; of all others, it is "accuracy".
SHARED_TITLES = {
    "val_map": "mean average precision",
    "val_box_ap": "average precision",
    "val_mask_ap": "average precision",
    "val_mean_iou": "IoU and accuracy",
}
HAS_LOG = ("loss", "gradient_norm", "learning_rate", "step_ms")
UNSHOWN = ("seconds_left",)


def curves(runs: Sequence[Run]) -> str:
    """The section. The accuracies of a single run share a chart; with several runs, each has its own."""
    names = {name for run in runs for name, series in run.series.items() if series.values} - set(UNSHOWN)
    if not names:
        return section("Curves", "<p>There are no metrics yet.</p>")
    measured = measurements(runs)
    rest = sorted(names - {"loss", *measured, *MAIN}, key=lambda name: (name not in TITLES, name))[:MOST_MORE]
    top = max(max(series.epochs) for run in runs for name, series in run.series.items() if name in names and series.values)
    x_range = (0.0, max(top, 1e-3))

    def drawn(groups: Iterable[Sequence[str]]) -> list[str]:
        charts = [_chart(runs, [name for name in group if name in names]) for group in groups]
        return [draw_chart(chart, x_range) for chart in charts if chart]

    shared = [measured] if len(runs) == 1 else [[name] for name in measured]
    charts = "\n".join(drawn([["loss"], *shared, *([name] for name in MAIN)]))
    more = drawn([name] for name in rest)
    others = f'<details><summary>{len(more)} more</summary>\n<div class="charts">\n{chr(10).join(more)}\n</div></details>'
    return section("Curves", f'{_legend(runs)}<div class="charts">\n{charts}\n</div>\n{others if more else ""}')


def _legend(runs: Sequence[Run]) -> str:
    """The runs with their lines, and a box to hide each; empty for a single run."""
    if len(runs) == 1:
        return ""
    entries = "\n".join(
        f'<li><label><input type="checkbox" class="script" value="{i}" checked>{swatch(i)} {escape(run.name)}</label></li>'
        for i, run in enumerate(runs)
    )
    return f'<ul class="legend runs" aria-label="runs in the curves">\n{entries}\n</ul>\n'


def _chart(runs: Sequence[Run], names: list[str]) -> Chart | None:
    if not names:
        return None
    most = min(MOST_POINTS, max(50, ALL_POINTS // sum(len(run.series) + 1 for run in runs)))
    name, scale = names[0], 100.0 if is_share(names[0]) or names[0] == "loader_wait" else 1.0
    curves, left_out = [], 0
    for i, run in enumerate(runs):
        for order, each in enumerate(names):
            if not (series := run.series.get(each)):
                continue
            left_out += series.left_out
            if series.values:
                label = run.name if len(runs) > 1 else title_of(each)
                curves.append(_curve(series, i, order if len(runs) == 1 else i, label, scale, most))
    if not curves:
        return None
    unit = "%" if is_share(name) else UNITS.get(name, "")
    largest = max(abs(value) for curve in curves for value in curve.values)
    return Chart(
        name=name if len(names) == 1 else "measured",
        title=(SHARED_TITLES.get(name, "accuracy") if len(names) > 1 else title_of(name))
        + (f", {unit.strip()}" if unit else ""),
        unit=unit,
        curves=curves,
        from_zero=name in FROM_ZERO,
        least_span=LEAST_POINTS if scale == 100 else 0.02 * largest,
        highest=100.0 if scale == 100 else float("inf"),
        has_log=name in HAS_LOG,
        notes=f"{left_out} values are left out: they are not finite, or too large." if left_out else "",
        legend=len(names) > 1,
    )


def _curve(series: Series, run: int, style: int, label: str, scale: float, most: int) -> Curve:
    kept = thin(series.values, most)
    columns = [[column[i] for i in kept] for column in (series.steps, series.epochs, series.values)]
    return Curve(run, style, label, columns[0], columns[1], [scale * value for value in columns[2]])
