"""The overview of a report: each run's progress, its results so far, and the command that continues it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sparkme.reporting.curves import nice, swatch
from sparkme.reporting.markup import TITLES, is_share, moment, percent, table, td, th, title_of
from sparkme.reporting.runs import Run
from sparkme.text import duration, shown
from sparkme.training.log import is_detail

STATES = {"done": "done", "running": "running", "stopped": "stopped", "silent": "stopped without note", "empty": "not started"}


def head_of(run: Run, now: float) -> str:
    """The section of a single run."""
    parts = [state_of(run, now, percent(run.share) if run.share is not None else "")]
    if run.share is not None:
        value = f"{100 * run.share:.1f}"
        parts.append(
            f'<div class="progress" role="progressbar" aria-label="progress of the run" aria-valuemin="0" '
            f'aria-valuemax="100" aria-valuenow="{value}"><div style="width: {value}%"></div></div>'
        )
    parts += [facts(run, now), command(run, now)]
    return f'<section aria-label="overview">\n{chr(10).join(parts)}\n</section>'


def overview(runs: Sequence[Run], now: float) -> str:
    """The section of several runs: a table with a row for each."""
    measured = _compared(runs)
    going_on = any(run.seconds_left(now) is not None for run in runs)
    head = [th("run"), th("state"), th("done", "number"), th("epoch", "number"), th("loss", "number")]
    head += [th(f"best {title_of(name)}", "number") for name in measured]
    last = ("images/s", *(["time left"] if going_on else []), "unreadable images", "steps not finite")
    head += [th(text, "number") for text in last]
    rows = []
    for i, run in enumerate(runs):
        left = run.seconds_left(now)
        link = f'<a href="#run-{i}" data-opens="run-{i}">{escape(run.name)}</a>'
        cells = [f'<td class="name"><span class="named">{swatch(i)} {link}</span></td>', f"<td>{_badge(run, now)}</td>"]
        values = [percent(run.share) if run.share is not None else ""]
        values += [nice(round(run.epoch, 2)) + (f" of {run.epochs:g}" if run.epochs else "") if run.epoch is not None else ""]
        values += [nice(run.last["loss"]) if "loss" in run.last else ""]
        values += [percent(best[0]) if (best := _best_of(run, name)) else "" for name in measured]
        values += [nice(run.last["images_per_s"]) if "images_per_s" in run.last else ""]
        values += [duration(min(left, 1e9)) if left is not None else ""] if going_on else []
        values += [str(run.num_unreadable), str(run.num_not_finite)]
        rows.append(f"<tr>{''.join(cells)}{''.join(td(value, 'number') for value in values)}</tr>")
    return f'<section aria-label="overview">\n{table(head, rows)}\n</section>'


def state_of(run: Run, now: float, done: str = "") -> str:
    """A line with the run's state, its step and epoch, and `done`."""
    words = (escape(text) for text in (_progress(run), done, run.state(now).text) if text)
    return f"<p>{' · '.join((_badge(run, now), *words))}</p>"


def _badge(run: Run, now: float) -> str:
    kind = run.state(now).kind
    return f'<span class="state {kind}">{STATES[kind]}</span>'


def problems(run: Run, *, named: bool) -> str:
    if not run.problems:
        return ""
    of = f" in {escape(run.name)}" if named else ""
    listed = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f'<div class="warning"><strong>Problems with files{of}</strong><ul>{listed}</ul></div>'


def facts(run: Run, now: float) -> str:
    """The most important numbers; bad ones stand out."""
    config, last = run.config, run.last
    known: list[tuple[str, str, bool]] = []
    if "loss" in last:
        known.append(("last loss", nice(last["loss"]), False))
    for name in measurements([run])[:4]:
        if best := _best_of(run, name):
            known.append((f"best {title_of(name)}, epoch {nice(best[1])}", percent(best[0]), False))
    if (left := run.seconds_left(now)) is not None:
        words = duration(min(left, 1e9))
        if run.state(now).kind == "running" and left < 30 * 86400:
            words += f" (until {moment(now + left, '%a %H:%M')})"
        known.append(("time left" if run.state(now).kind == "running" else "time left after resuming", words, False))
    if "images_per_s" in last:
        known.append(("images per second", nice(last["images_per_s"]), False))
    if "memory_gib" in last:
        known.append(("memory", f"{nice(last['memory_gib'])} GiB", False))
    if "loader_wait" in last:
        known.append(("time spent waiting for images", f"{100 * last['loader_wait']:.0f} %", last["loader_wait"] > 0.25))
    known.append(("unreadable images", str(run.num_unreadable), run.num_unreadable > 0))
    known.append(("steps not finite", str(run.num_not_finite), run.num_not_finite > 0))
    images = config.get("num_images", config.get("num_train_images", config.get("num_train")))
    for label, value in (("network", config.get("model")), ("recipe", config.get("recipe")), ("images", images)):
        if value is not None:
            known.append((label, f"{value:,}" if type(value) is int else shown(value, 80), False))
    entries = []
    for name, value, bad in known:
        kind = " class=bad" if bad else " class=long" if len(value) > 17 else ""
        entries.append(f"<div{kind}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>")
    return f'<dl class="facts">\n{chr(10).join(entries)}\n</dl>'


def command(run: Run, now: float) -> str:
    """The command line that continues the run, with a button to copy it."""
    if not run.continuing:
        return ""
    words = "Its command" if run.state(now).kind == "done" else "The command that continues it"
    whence = "as it was started" if run.started else "built from its settings; paths are relative to the folder it started in"
    return (
        f'<p class="small">{words}, {whence}:</p>\n<div class="command"><code>{escape(run.continuing)}</code>'
        '<button type="button" class="copy script">copy</button></div>'
    )


def _progress(run: Run) -> str:
    if run.step is None or run.epoch is None:
        return ""
    of_steps = f" of {run.total_steps:,}" if run.total_steps else ""
    of_epochs = f" of {run.epochs:g}" if run.epochs else ""
    return f"step {run.step:,.0f}{of_steps}, epoch {nice(round(run.epoch, 2))}{of_epochs}"


def _best_of(run: Run, name: str) -> tuple[float, float] | None:
    """The highest value of a metric, and its epoch."""
    series = run.series.get(name)
    if not series or not series.values:
        return None
    i = max(range(len(series.values)), key=series.values.__getitem__)
    return series.values[i], series.epochs[i]


def _compared(runs: Sequence[Run]) -> list[str]:
    """The metrics that the table compares: up to four, or the first two of each run where tasks differ."""
    names = measurements(runs)
    if len(names) <= 4:
        return names
    first = {name for run in runs for name in measurements([run])[:2]}
    return [name for name in names if name in first][:6]


def measurements(runs: Sequence[Run]) -> list[str]:
    """Names of the metrics in percent without details, in the order of the titles."""
    shares = {name for run in runs for name, series in run.series.items() if is_share(name) and series.values}
    names = [name for name in shares if not is_detail(name)]
    return sorted(names, key=lambda name: ([*TITLES].index(name) if name in TITLES else len(TITLES), name))
