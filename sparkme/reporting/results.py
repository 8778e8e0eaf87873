"""Results of fine-tuning in a report: the best epoch, the accuracy of each class, and the most frequent mistakes."""

from __future__ import annotations

from html import escape
from typing import Any

from sparkme.reporting.curves import nice, number
from sparkme.reporting.markup import percent, section, table, td, th, title_of
from sparkme.reporting.pictures import Pictures, img
from sparkme.reporting.runs import Run
from sparkme.text import shown

MOST_CLASSES, MOST_MISTAKES = 100, 10


def results(run: Run, pictures: Pictures, heading: str, most_bytes: int) -> str:
    """The section; empty if there are no results. `most_bytes` limits the picture of the confusion matrix."""
    parts = [_best(run.results), _confusion(run, pictures, most_bytes)]
    classes = run.results.get("of_each_class", run.results.get("average_precision"))
    if isinstance(classes, dict):
        measured = "correct" if "of_each_class" in run.results else "average precision"
        parts += [_classes(classes, measured), _mistakes(run.results.get("confusion"), [*classes])]
    return section("Results", "\n".join(part for part in parts if part), heading) if any(parts) else ""


def _best(results: dict[str, Any]) -> str:
    best = results.get("best")
    if not isinstance(best, dict):
        return ""
    known = [(name, value) for name in ("top1", "top5", "map") if (value := number(best.get(name))) is not None]
    said = [f"{title_of(f'val_{name}')} {percent(value)}" for name, value in known]
    if (epoch := number(best.get("epoch"))) is not None:
        said.append(f"after epoch {nice(epoch)}")
    images = number(results.get("num_val"))
    return f"<p>Best: {escape(', '.join(said))}{f', on {images:,.0f} images' if images else ''}.</p>"


def _confusion(run: Run, pictures: Pictures, most_bytes: int) -> str:
    if run.confusion is None:
        return ""
    picture = pictures.get(run.confusion, most_bytes)
    if isinstance(picture, str):
        return f'<p class="small">confusion.png cannot be read: {escape(picture)}</p>'
    return img(picture, f"confusion matrix of {run.name}")


def _classes(classes: dict[str, Any], measured: str) -> str:
    known = [(name, share) for name, value in classes.items() if (share := number(value)) is not None and 0 <= share <= 1]
    known.sort(key=lambda item: item[1])
    rows = [
        f'<tr>{td(shown(name, 100), "name")}<td><div class="bar"><div style="width: {100 * share:.1f}%"></div></div></td>'
        f"{td(percent(share), 'number')}</tr>"
        for name, share in known[:MOST_CLASSES]
    ]
    more = f", the lowest {MOST_CLASSES} of {len(known)}" if len(known) > MOST_CLASSES else ""
    drawn = table([th("class"), th(""), th(measured, "number")], rows)
    return f"<details{' open' if len(known) <= 20 else ''}><summary>each class{more}</summary>\n{drawn}</details>"


def _mistakes(confusion: Any, classes: list[Any]) -> str:
    """The most frequent pairs of a true class and a wrong prediction."""
    count = len(classes)
    if not isinstance(confusion, list) or len(confusion) != count or not 2 <= count <= 5000:
        return ""
    pairs: list[tuple[float, float, int, int]] = []
    for i, row in enumerate(confusion):
        if not isinstance(row, list) or len(row) != count:
            return ""
        counts = [number(value) or 0.0 for value in row]
        total = sum(counts)
        pairs += [(counts[j], counts[j] / total, i, j) for j in range(count) if j != i and total > 0 and counts[j] > 0]
        pairs = sorted(pairs, reverse=True)[:MOST_MISTAKES]
    if not pairs:
        return ""
    rows = [
        f"<tr>{td(shown(classes[i], 100), 'name')}{td(shown(classes[j], 100), 'name')}{td(f'{n:.0f}', 'number')}"
        f"{td(percent(share), 'number')}</tr>"
        for n, share, i, j in pairs
    ]
    head = [th("true class"), th("predicted class"), th("images", "number"), th("share of the true class", "number")]
    return f"<details open><summary>most frequent mistakes</summary>\n{table(head, rows)}</details>"
