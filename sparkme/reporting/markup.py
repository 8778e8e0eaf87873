"""Parts of a report's page: tables, times, percentages, and titles of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from html import escape

from sparkme.text import shown
from sparkme.training.log import DETAILS, MEASURES

# Metrics with such a part in their name lie in [0, 1].
SHARES = ("knn", "top1", "top5", "accuracy", "val_map", "box_ap", "box_ar", "mask_ap", "mask_ar", "mean_iou")
TITLES = {
    "loss": "loss",
    "knn": "kNN accuracy",
    **{
        f"val_{name}{end}": title + more
        for titles in (*MEASURES[1:], DETAILS)
        for end, more in (("", ""), ("_average", ", averaged weights"))
        for name, title in titles.items()
    },
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
