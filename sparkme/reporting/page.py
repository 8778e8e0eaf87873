"""The page of `sparkme.report`: one file with curves, pictures and a small script, which loads nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sparkme.reporting.charts import curves
from sparkme.reporting.details import details, each_run, settings
from sparkme.reporting.frames import reconstructions
from sparkme.reporting.markup import moment
from sparkme.reporting.overview import head_of, overview, problems
from sparkme.reporting.pictures import Pictures
from sparkme.reporting.results import results
from sparkme.reporting.runs import Run

MARK = '<meta name="generator" content="sparkme.report">'  # in the first bytes; only such files are replaced


def report_page(
    runs: Sequence[Run], title: str | None, pictures: Pictures, *, now: float, reload_s: float | None = None
) -> str:
    """The page of at least one run.

    Args:
        runs: the runs.
        title: the page's title; None: the name or the number of runs.
        pictures: a cache of pictures.
        now: Unix time in seconds.
        reload_s: seconds after which an open page reloads.
    """
    one = runs[0] if len(runs) == 1 else None
    title = title or (one.name if one else f"{len(runs)} runs")
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    written = f"sparkme report, written {moment(now)}"
    reload = ""
    if reload_s is not None:
        reload = f'<noscript><meta http-equiv="refresh" content="{max(1, round(reload_s))}"></noscript>\n'
        box = f'<label class="script"><input type="checkbox" id="reload" value="{reload_s:g}" checked>'
        written += f"; {box} reload every {reload_s:g} s</label>"
    sections = [
        head_of(one, now) if one else overview(runs, now),
        *(problems(run, named=not one) for run in runs),
        curves(runs),
        reconstructions(runs, pictures),
        *([results(one, pictures, "h2")] if one else []),
        settings(runs),
        *([details(one, 1, "h2")] if one else [each_run(runs, pictures, now)]),
    ]
    pictures.forget()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{reload}<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="meta">{written}</p>
</header>
<main>
{"".join(section + chr(10) for section in sections if section)}</main>
<script>
{script}</script>
</body>
</html>
"""
