"""Settings, notes, unreadable images and checkpoints in a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from sparkme.reporting.curves import swatch
from sparkme.reporting.markup import moment, section, table, td, th
from sparkme.reporting.overview import command, facts, state_of
from sparkme.reporting.pictures import Pictures
from sparkme.reporting.results import results
from sparkme.reporting.runs import Run
from sparkme.text import shown

MOST_ROWS, MOST_SETTINGS = 2000, 600  # rows of notes and of settings on a page; each run may have at least 10 and 80
MOST_DIFFERING, MOST_CHECKPOINTS = 100, 100
NO_CONFIG = "<p>config.json is missing or unreadable.</p>"


def settings(runs: Sequence[Run]) -> str:
    """The settings of a single run, or those that differ between several."""
    if len(runs) == 1:
        return section("Settings", _own_settings(runs[0], 1))
    names = dict.fromkeys(name for run in runs for name in run.config if name not in ("output", "recipe_reason"))
    values = {name: [shown(run.config.get(name)) for run in runs] for name in names}
    differing = [name for name in names if len({*values[name]}) > 1][:MOST_DIFFERING]
    if not differing:
        return section("Settings", "<p>The runs have the same settings.</p>")
    common = {name: max(values[name], key=values[name].count) for name in differing}

    def cell(run: Run, name: str) -> str:
        return td(_setting(run.config.get(name)), "same" if shown(run.config.get(name)) == common[name] else "value")

    if len(runs) <= 4 or len(differing) > len(runs):
        head = [th("setting"), *(th(run.name) for run in runs)]
        rows = [_row(shown(name, 60), (cell(run, name) for run in runs)) for name in differing]
    else:  # many runs: a row per run, so that the table does not become too wide
        head = [th("run"), *(th(shown(name, 60)) for name in differing)]
        rows = [_row(run.name, (cell(run, name) for name in differing)) for run in runs]
    return section("Settings that differ between the runs", table(head, rows, ' class="compare"'))


def _row(name: str, cells: Iterable[str]) -> str:
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def _own_settings(run: Run, num_runs: int) -> str:
    if not run.config:
        return NO_CONFIG
    rows = [_row(name, (td(_setting(v), "value"), td(_setting(default), "default"))) for name, v, default in run.differences]
    head = [th("setting"), th("value"), th("default")]
    own = table(head, rows) if rows else "<p>All settings are the defaults.</p>"
    most = max(80, MOST_SETTINGS // num_runs)
    every = [_row(shown(name, 60), [td(_setting(value), "value")]) for name, value in [*run.config.items()][:most]]
    return f"{own}\n<details><summary>all {len(run.config)} settings</summary>\n{table([], every)}</details>"


def _setting(value: Any) -> str:
    if isinstance(value, list) and len(value) <= 20 and not any(isinstance(item, list | dict) for item in value):
        return " ".join(shown(item, 60) for item in value)
    words = {None: "—", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else shown(value)


def details(run: Run, num_runs: int, heading: str) -> str:
    """Notes, unreadable images and checkpoints, as far as the run has them."""
    most = max(10, min(200, MOST_ROWS // num_runs))
    parts = _notes(run, most, heading), _unreadable(run, most, heading), _checkpoints(run, heading)
    return "\n".join(part for part in parts if part)


def _notes(run: Run, most: int, heading: str) -> str:
    if not run.notes:
        return ""
    notes = [*run.notes][-most:][::-1]
    rows = [
        f"<tr>{td(moment(note.time), 'when')}{td(_step(note.step), 'number')}{td(note.kind.replace('_', ' '))}"
        f"{td(shown(note.text), 'text')}</tr>"
        for note in notes
    ]
    total = run.num_notes.total() - run.num_notes["unreadable"]
    title = f"Notes, the last {len(notes)} of {total}" if total > len(notes) else "Notes"
    return section(title, table([th("time"), th("step", "number"), th("kind"), th("text")], rows), heading)


def _unreadable(run: Run, most: int, heading: str) -> str:
    if not run.unreadable:
        return ""
    listed = [*run.unreadable.values()][:most]
    rows = [f"<tr>{td(_step(note.step), 'number')}{td(note.text, 'text')}</tr>" for note in listed]
    more = f", the first {len(listed)}" if len(listed) < run.num_unreadable else ""
    drawn = table([th("step", "number"), th("image")], rows)
    body = f"<details{' open' if len(listed) <= 10 else ''}><summary>the list</summary>\n{drawn}</details>"
    return section(f"{run.num_unreadable:,} unreadable images{more}", body, heading)


def _checkpoints(run: Run, heading: str) -> str:
    if not run.checkpoints:
        return ""
    rows = [
        f"<tr>{td(shown(c.name, 80) + (f' → {shown(c.target, 80)}' if c.target else ''), 'name')}"
        f"{td(_size(c.size), 'number')}{td(moment(c.time), 'when')}</tr>"
        for c in run.checkpoints[:MOST_CHECKPOINTS]
    ]
    count = len(run.checkpoints)
    more = f", the newest {MOST_CHECKPOINTS} of {count}" if count > MOST_CHECKPOINTS else ""
    return section(f"Checkpoints{more}", table([th("file"), th("size", "number"), th("written")], rows), heading)


def _step(step: float | None) -> str:
    return "" if step is None else f"{step:.0f}"


def _size(size: float) -> str:
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 1024:.0f} KiB"


def each_run(runs: Sequence[Run], pictures: Pictures, now: float) -> str:
    """A block per run that opens, with all about it."""
    blocks = []
    for i, run in enumerate(runs):
        parts = [
            state_of(run, now),
            facts(run, now),
            command(run, now),
            f"<h3>Settings</h3>\n{_own_settings(run, len(runs))}" if run.config else NO_CONFIG,
            results(run, pictures, "h3", len(runs)),
            details(run, len(runs), "h3"),
        ]
        body = "\n".join(part for part in parts if part)
        summary = f"<summary>{swatch(i)} {escape(run.name)}</summary>"
        blocks.append(f'<details class="run" id="run-{i}">\n{summary}\n{body}\n</details>')
    return section("Each run", "\n".join(blocks))
