"""Parts of a report's page: tables, times, percentages, and titles of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from html import escape

from sparkme.text import shown

SHARES = ("knn", "top1", "top5", "accuracy", "val_map")  # metrics with such a part in their name lie in [0, 1]
TITLES = {
    "loss": "loss",
    "knn": "kNN accuracy",
    "val_top1": "top-1 accuracy",
    "val_top5": "top-5 accuracy",
    "val_top1_average": "top-1 accuracy, averaged weights",
    "val_top5_average": "top-5 accuracy, averaged weights",
    "val_map": "mean average precision",
    "val_map_average": "mean average precision, averaged weights",
    "learning_rate": "learning rate",
    "images_per_s": "images per second",
    "gradient_norm": "gradient norm",
    "loader_wait": "time spent waiting for images",
    "memory_gib": "memory",
    "weight_decay": "weight decay",
    "step_ms": "time of a step",
    "not_finite": "steps that were not finite",
}


def moment(seconds: float | None, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Local time; empty if `seconds` is no sensible time."""
    if seconds is None or not 0 <= seconds < 4e9:
        return ""
    return time.strftime(form, time.localtime(seconds))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def is_share(name: str) -> bool:
    """Whether a metric lies in [0, 1] and is shown in percent."""
    return any(part in name for part in SHARES)


def title_of(name: str) -> str:
    return TITLES.get(name) or shown(name.replace("_", " "), 60)


def section(title: str, body: str, heading: str = "h2") -> str:
    return f"<section>\n<{heading}>{escape(title)}</{heading}>\n{body}\n</section>"


def table(head: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """A table, which scrolls if it is too wide; head and rows are HTML."""
    cells = f"<thead><tr>{''.join(head)}</tr></thead>" if head else ""
    return f'<div class="wide"><table{kind}>{cells}<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>'


def th(text: str, kind: str = "") -> str:
    return f'<th scope="col"{f" class={kind}" if kind else ""}>{escape(text)}</th>'


def td(text: str, kind: str = "") -> str:
    return f"<td{f' class={kind}' if kind else ''}>{escape(text)}</td>"
