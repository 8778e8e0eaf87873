"""Results of fine-tuning in a report: the best epoch, figures of each class, the most frequent mistakes, and pictures."""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

from sparkme.reporting.curves import nice, number
from sparkme.reporting.markup import percent, section, table, td, th, title_of
from sparkme.reporting.pictures import ALL_BYTES, PICTURE_BYTES, Pictures, img
from sparkme.reporting.runs import PICTURES, Run
from sparkme.text import shown
from sparkme.training.log import COCO_FIGURES, MEASURES

MOST_CLASSES, MOST_MISTAKES = 100, 10
CONFUSION_BYTES = 60_000  # on a page of several runs


class Measured(NamedTuple):
    """Titles of the figures of each class by their keys in results.json, and what a confusion matrix counts."""

    titles: dict[str, str]
    counted: str = "images"


# The first of which a file has every key says what it measured.
MEASURED = (
    Measured({"mask_ap_of_each_class": "mask AP", "box_ap_of_each_class": "box AP"}),
    Measured({"box_ap_of_each_class": "box AP"}),
    Measured({"of_each_class": "IoU", "accuracy_of_each_class": "correct pixels"}, "pixels"),
    Measured({"of_each_class": "correct"}),
    Measured({"average_precision": "average precision"}),
)


def results(run: Run, pictures: Pictures, heading: str, num_runs: int = 1) -> str:
    """The section; empty if there are no results. With several runs on a page, pictures are smaller."""
    parts = [_best(run.results), _figures(run.results), *(_picture(run, name, pictures, num_runs) for name in run.pictures)]
    measured = next((each for each in MEASURED if {*each.titles} <= {*run.results}), None)
    if measured is not None:
        columns = {title: run.results[key] for key, title in measured.titles.items()}
        if all(isinstance(column, dict) for column in columns.values()):
            parts += [
                _classes(columns),
                _mistakes(run.results.get("confusion"), [*next(iter(columns.values()))], measured.counted),
            ]
    return section("Results", "\n".join(part for part in parts if part), heading) if any(parts) else ""


def _best(results: dict[str, Any]) -> str:
    best = results.get("best")
    if not isinstance(best, dict):
        return ""
    names = [name for titles in MEASURES for name in titles]
    known = [(name, value) for name in names if (value := number(best.get(name))) is not None]
    said = [f"{title_of(f'val_{name}')} {percent(value)}" for name, value in known]
    if (epoch := number(best.get("epoch"))) is not None:
        said.append(f"after epoch {nice(epoch)}")
    images = number(results.get("num_val"))
    return f"<p>Best: {escape(', '.join(said))}{f', on {images:,.0f} images' if images else ''}.</p>"


def _figures(results: dict[str, Any]) -> str:
    """COCO's twelve figures of boxes and masks."""
    kinds = {kind: results[key] for key, kind in (("box", "boxes"), ("mask", "masks")) if isinstance(results.get(key), dict)}
    rows = []
    for name, title in COCO_FIGURES.items():
        cells = [_share(figures.get(name)) for figures in kinds.values()]
        if any(cells):
            rows.append(f"<tr>{td(title, 'name')}{''.join(td(cell or '—', 'number') for cell in cells)}</tr>")
    if not rows:
        return ""
    said = (
        "AP is the mean of the average precision at IoU from 50 to 95 %; AP50 and AP75 are that at one IoU; AR is the average "
        "recall. Objects are small below 32 x 32 pixels, and large from 96 x 96."
    )
    epoch = number(results.get("epoch"))
    drawn = table(
        [th(f"after epoch {nice(epoch)}" if epoch is not None else ""), *(th(kind, "number") for kind in kinds)], rows
    )
    return f'<details open><summary>COCO\'s figures</summary>\n{drawn}<p class="small">{said}</p></details>'


def _share(value: Any) -> str:
    """In percent; empty for what is no share."""
    share = number(value)
    return percent(share) if share is not None and 0 <= share <= 1 else ""


def _picture(run: Run, name: str, pictures: Pictures, num_runs: int) -> str:
    """A picture; those of predictions in a part of the page that opens."""
    is_sheet = name != "confusion.png"
    most = PICTURE_BYTES if num_runs == 1 else min(PICTURE_BYTES if is_sheet else CONFUSION_BYTES, ALL_BYTES // (8 * num_runs))
    picture = pictures.get(run.pictures[name], most)
    if isinstance(picture, str):
        return f'<p class="small">{name} cannot be read: {escape(picture)}</p>'
    drawn = img(picture, f"{PICTURES[name]} of {run.name}")
    if not is_sheet:
        return drawn
    is_open = " open" if name == next(iter(run.pictures)) else ""
    return f"<details{is_open}><summary>{PICTURES[name]}</summary>\n{drawn}</details>"


def _classes(columns: dict[str, dict[str, Any]]) -> str:
    """A row for each class, the lowest first by the first column, which has a bar. Columns are by their titles."""
    first, *others = columns.values()
    known = [(name, share) for name, value in first.items() if (share := number(value)) is not None and 0 <= share <= 1]
    known.sort(key=lambda item: item[1])
    rows = [
        f'<tr>{td(shown(name, 100), "name")}<td><div class="bar"><div style="width: {100 * share:.1f}%"></div></div></td>'
        f"{td(percent(share), 'number')}{''.join(td(_share(other.get(name)), 'number') for other in others)}</tr>"
        for name, share in known[:MOST_CLASSES]
    ]
    more = f", the lowest {MOST_CLASSES} of {len(known)}" if len(known) > MOST_CLASSES else ""
    drawn = table([th("class"), th(""), *(th(title, "number") for title in columns)], rows)
    return f"<details{' open' if len(known) <= 20 else ''}><summary>each class{more}</summary>\n{drawn}</details>"


def _mistakes(confusion: Any, classes: list[Any], counted: str) -> str:
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
        f"<tr>{td(shown(classes[i], 100), 'name')}{td(shown(classes[j], 100), 'name')}{td(f'{n:,.0f}', 'number')}"
        f"{td(percent(share), 'number')}</tr>"
        for n, share, i, j in pairs
    ]
    head = [th("true class"), th("predicted class"), th(counted, "number"), th("share of the true class", "number")]
    return f"<details open><summary>most frequent mistakes</summary>\n{table(head, rows)}</details>"
