"""The page of `sparkme.report`: a file by itself, with curves, pictures and a small script in it, that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sparkme.reporting.curves import COLOURS, DASHES, Chart, Curve, draw_chart, nice, number, swatch, thin
from sparkme.reporting.runs import Run, Series
from sparkme.text import duration, shown
from sparkme.training.log import LEAST_POINTS

MARK = '<meta name="generator" content="sparkme.report">'  # of pages that may be replaced; stands in their first bytes
MOST_POINTS, ALL_POINTS = 1000, 100_000  # of a curve, and of all curves of a page together
MOST_MORE = 24  # curves that nobody knows
MOST_PICTURES, ALL_PICTURES = 24, 96  # of a run, and of all runs together
MOST_WIDTH, MOST_HEIGHT = 1200, 4000  # pixels of a picture in the page
PICTURE_BYTES, ALL_BYTES = 600_000, 7_000_000  # of a picture, and of all; a page has a third more of them, as text
READ_BYTES, READ_PIXELS = 64 * 2**20, 50e6  # that a picture file may have
MOST_ROWS, MOST_SETTINGS = 2000, 600  # of the notes, and of the settings, of all runs together, if that is enough

SHARES = ("knn", "top1", "top5", "accuracy", "val_map")  # parts of the names of measurements from 0 to 1
TITLES = {"loss": "loss", "knn": "kNN accuracy", "val_top1": "top-1 accuracy", "val_top5": "top-5 accuracy",
          "val_top1_average": "top-1 accuracy, averaged weights", "val_top5_average": "top-5 accuracy, averaged weights",
          "val_map": "mean average precision", "val_map_average": "mean average precision, averaged weights",
          "learning_rate": "learning rate", "images_per_s": "images per second", "gradient_norm": "gradient norm",
          "loader_wait": "time spent waiting for images", "memory_gib": "memory", "weight_decay": "weight decay",
          "step_ms": "time of a step", "not_finite": "steps that were not finite"}  # fmt: skip
UNITS = {"memory_gib": " GiB", "step_ms": " ms", "loader_wait": "%"}
FIRST = ("loss",)  # the other curves that are always of interest follow what was measured
MAIN = ("learning_rate", "images_per_s", "gradient_norm", "loader_wait", "memory_gib")
UNSHOWN = ("seconds_left",)

# Told apart with any kind of colour vision, in the same order on white and on black; after Okabe and Ito.
ON_LIGHT = ("#0068a8", "#c94f00", "#00805c", "#b04a86", "#8a6d00", "#5b5fc7", "#555555")
ON_DARK = ("#5ab4f0", "#ff8c42", "#34c99a", "#e89ac7", "#e3c04a", "#a6a8ff", "#bdbdbd")

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 15%, Canvas);
  --soft: color-mix(in srgb, CanvasText 62%, Canvas); --panel: color-mix(in srgb, CanvasText 4%, Canvas); @LIGHT@ }
@media (prefers-color-scheme: dark) { :root { @DARK@ } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: Canvas; color: CanvasText;
  font: 0.95rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 0.2rem; overflow-wrap: anywhere; line-height: 1.25; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; padding-bottom: 0.2rem; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 0.95rem; margin: 1.2rem 0 0.4rem; overflow-wrap: anywhere; }
p { margin: 0.4rem 0; }
a { color: inherit; }
.small, .meta { font-size: 0.85rem; color: var(--soft); }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.2rem 1.1rem 0.2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td.text { overflow-wrap: anywhere; min-width: 12rem; }
td.value { overflow-wrap: anywhere; }
td.name, table.compare th { overflow-wrap: anywhere; min-width: 9rem; }
thead th { vertical-align: bottom; }
th.number { white-space: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.when { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.default { color: var(--soft); overflow-wrap: anywhere; }
table.compare td.same { color: var(--soft); }
.state { font-weight: 600; white-space: nowrap; }
.state::before { content: ""; display: inline-block; width: 0.6em; height: 0.6em; margin-right: 0.45em; border-radius: 50%;
  border: 2px solid var(--soft); }
.running::before { background: var(--c2); border-color: var(--c2); }
.done::before { background: var(--c0); border-color: var(--c0); }
.stopped::before, .silent::before { background: var(--c1); border-color: var(--c1); border-radius: 0; }
.progress { height: 0.5rem; border-radius: 0.25rem; background: var(--line); margin: 0.7rem 0; overflow: hidden; }
.progress div { height: 100%; background: var(--c0); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.6rem; margin: 0.8rem 0; }
.facts div { background: var(--panel); border-radius: 0.4rem; padding: 0.45rem 0.7rem; min-width: 0; }
.facts dt { font-size: 0.8rem; color: var(--soft); }
.facts dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.facts .long { grid-column: span 2; }
.facts .long dd { font-size: 0.95rem; line-height: 1.75rem; }
.facts .bad dd { color: var(--c1); font-weight: 600; }
.command { display: flex; gap: 0.6rem; align-items: flex-start; margin: 0.5rem 0; }
.command code { flex: 1; min-width: 0; padding: 0.5rem 0.7rem; background: var(--panel); border-radius: 0.4rem;
  font: 0.82rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
button { font: inherit; font-size: 0.8rem; padding: 0.1rem 0.6rem; border: 1px solid var(--line); border-radius: 0.3rem;
  background: var(--panel); color: inherit; cursor: pointer; }
button[aria-pressed=true] { background: CanvasText; color: Canvas; }
html:not(.js) .script { display: none; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 1.4rem 1.6rem; }
figure { margin: 0; min-width: 0; }
.chart { break-inside: avoid; }
.chart figcaption { display: flex; gap: 0.8rem; align-items: baseline; margin-bottom: 0.3rem; }
.chart h3 { margin: 0; flex: 1; }
.now { font-variant-numeric: tabular-nums; color: var(--soft); font-size: 0.9rem; }
.plot { position: relative; height: 15rem; padding: 0.4rem 1rem 1.7rem 3.6rem; outline-offset: 2px; }
.plot[hidden] { display: none; }
.plot > svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot svg svg { overflow: visible; }
.plot text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
polyline, .swatch line { fill: none; stroke-width: 1.6; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.dots { fill: none; stroke-width: 5; stroke-linecap: round; vector-effect: non-scaling-stroke;
  stroke-dasharray: none !important; }
@STROKES@
.off { display: none; }
.rule { position: absolute; width: 1px; background: var(--soft); pointer-events: none; }
.mark { position: absolute; width: 9px; height: 9px; margin: -4.5px; border-radius: 50%; border: 2px solid Canvas;
  pointer-events: none; }
.tip { position: absolute; z-index: 3; pointer-events: none; background: Canvas; border: 1px solid var(--soft);
  border-radius: 0.3rem; padding: 0.2rem 0.5rem; font-size: 0.8rem; line-height: 1.4; max-width: 16rem; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.tip i { display: inline-block; width: 0.7em; height: 0.7em; margin-right: 0.4em; border-radius: 50%; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; margin: 0.3rem 0 0; padding: 0;
  font-size: 0.85rem; }
.runs { position: sticky; top: 0; z-index: 2; background: Canvas; padding: 0.4rem 0; margin: 0 0 0.8rem; max-height: 30vh;
  overflow-y: auto; }
.legend label { display: flex; align-items: center; gap: 0.4rem; overflow-wrap: anywhere; }
.legend input { margin: 0; }
.named { display: flex; gap: 0.4rem; align-items: center; }
.swatch { flex: none; vertical-align: middle; }
.controls { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 0.4rem 1.2rem; align-items: center;
  padding: 0.5rem 0; background: Canvas; }
.js .controls.script { display: flex; }
.controls label { display: flex; gap: 0.5rem; align-items: center; }
.controls .slide { flex: 1 1 16rem; }
.controls input { flex: 1; min-width: 6rem; }
.controls output { min-width: 8.5rem; font-variant-numeric: tabular-nums; }
select { font: inherit; max-width: 100%; min-width: 0; }
.frames { display: flex; flex-wrap: wrap; gap: 1rem; }
.frames h3 { flex-basis: 100%; margin-bottom: 0; }
html:not(.js) .frame { flex: 1 1 20rem; }
.frame figcaption { font-size: 0.85rem; color: var(--soft); }
html:not(.js) .frame:not(.edge) { display: none; }
.js .frames, .js .frame { display: none; }
.js .frames.shown, .js .frame.shown { display: block; }
img { display: block; max-width: 100%; height: auto; border-radius: 0.2rem; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; }
details.run { border: 1px solid var(--line); border-radius: 0.4rem; padding: 0.5rem 0.8rem; margin: 0.6rem 0; }
details.run > summary { font-weight: 600; overflow-wrap: anywhere; }
.bar { display: inline-block; width: 7rem; height: 0.6rem; background: var(--line); border-radius: 0.2rem; overflow: hidden; }
.bar div { height: 100%; background: var(--c0); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.warning { border-left: 4px solid var(--c1); padding-left: 0.7rem; }
.warning ul { margin: 0.2rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  body { padding: 0.7rem; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .command { flex-direction: column; }
  .command code { width: 100%; flex: none; }
  .plot { height: 13rem; padding-left: 3.2rem; }
  th, td { padding-right: 0.7rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 9pt; }
  .script, .tip, .rule, .mark { display: none !important; }
  .runs, .controls { position: static; max-height: none; }
  .charts { grid-template-columns: 1fr 1fr; }
  .plot { height: 11rem; }
  h2, h3 { break-after: avoid; }
}
"""

# What is chosen is kept in the page's address, so that it outlives a reload and can be sent.
SCRIPT = """
'use strict';
(function () {
  var root = document.documentElement;
  window.addEventListener('error', function (event) { root.dataset.error = event.message; });
  root.classList.add('js');
  var all = function (selector, within) { return Array.from((within || document).querySelectorAll(selector)); };
  var state = new URLSearchParams(location.hash.slice(1));
  function list(name) { return (state.get(name) || '').split(',').filter(Boolean); }
  function keep(name, value) {
    if (value === '') { state.delete(name); } else { state.set(name, value); }
    var hash = state.toString();
    history.replaceState(null, '', hash ? '#' + hash : location.pathname + location.search);
  }
  function toggled(name, item, on) {
    var items = list(name).filter(function (other) { return other !== item; });
    if (on) { items.push(item); }
    keep(name, items.join(','));
  }

  // Logarithmic axes.
  all('button[data-log]').forEach(function (button) {
    var name = button.dataset.log, figure = button.closest('.chart');
    function show(on) {
      button.setAttribute('aria-pressed', String(on));
      figure.querySelector('.log').hidden = !on;
      figure.querySelector('.linear').hidden = on;
    }
    button.addEventListener('click', function () {
      var on = button.getAttribute('aria-pressed') !== 'true';
      show(on);
      toggled('log', name, on);
    });
    show(list('log').includes(name));
  });

  // Runs that are shown.
  var hidden = new Set(list('hide'));
  function showRuns() {
    all('svg [data-run]').forEach(function (line) { line.classList.toggle('off', hidden.has(line.dataset.run)); });
  }
  all('.runs input').forEach(function (box) {
    box.checked = !hidden.has(box.value);
    box.addEventListener('change', function () {
      if (box.checked) { hidden.delete(box.value); } else { hidden.add(box.value); }
      toggled('hide', box.value, !box.checked);
      showRuns();
    });
  });
  showRuns();

  // Values under the pointer, or stepped through with the arrow keys.
  function nearest(xs, x) {
    var low = 0, high = xs.length - 1;
    while (high - low > 1) {
      var middle = (low + high) >> 1;
      if (xs[middle] < x) { low = middle; } else { high = middle; }
    }
    return x - xs[low] <= xs[high] - x ? low : high;
  }
  function text(value) {
    if (value === 0) { return '0'; }
    var size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
  }
  function element(parent, tag, name) {
    var made = document.createElement(tag);
    made.className = name;
    return parent.appendChild(made);
  }
  all('.chart').forEach(function (figure) {
    var data = JSON.parse(figure.querySelector('script').textContent);
    all('.plot', figure).forEach(function (plot) {
      var xs = plot.dataset.x.split(' ').map(Number), ys = plot.dataset.y.split(' ').map(Number);
      var log = plot.classList.contains('log'), drawn = [], at = null;
      function clear() { drawn.forEach(function (part) { part.remove(); }); drawn = []; }
      function visible() { return data.curves.filter(function (curve) { return !hidden.has(String(curve.run)); }); }
      function draw(x) {
        clear();
        var curves = visible();
        if (!curves.length) { return; }
        var outer = plot.getBoundingClientRect(), inner = plot.querySelector('svg').getBoundingClientRect();
        var left = inner.left - outer.left, top = inner.top - outer.top;
        function across(value) { return left + inner.width * (value - xs[0]) / (xs[1] - xs[0]); }
        var found = curves.map(function (curve) { return { curve: curve, i: nearest(curve.x, x) }; });
        found.sort(function (a, b) { return Math.abs(a.curve.x[a.i] - x) - Math.abs(b.curve.x[b.i] - x); });
        at = found[0].curve.x[found[0].i];
        var rule = element(plot, 'div', 'rule'), tip = element(plot, 'div', 'tip');
        drawn.push(rule, tip);
        rule.style.left = across(at) + 'px'; rule.style.top = top + 'px'; rule.style.height = inner.height + 'px';
        element(tip, 'div', '').textContent = 'epoch ' + text(at) + ', step ' + found[0].curve.s[found[0].i];
        var near = found.filter(function (item) {
          return Math.abs(across(item.curve.x[item.i]) - across(at)) < 24 && (!log || item.curve.y[item.i] > 0);
        });
        near.sort(function (a, b) { return b.curve.y[b.i] - a.curve.y[a.i]; });
        near.forEach(function (item, order) {
          var value = item.curve.y[item.i], colour = 'var(--' + item.curve.style + ')';
          var up = ((log ? Math.log10(value) : value) - ys[0]) / (ys[1] - ys[0]);
          var mark = element(plot, 'div', 'mark');
          mark.style.left = across(item.curve.x[item.i]) + 'px';
          mark.style.top = top + inner.height * (1 - up) + 'px';
          mark.style.background = colour;
          drawn.push(mark);
          if (order === 12) { element(tip, 'div', '').textContent = near.length - 12 + ' more'; }
          if (order >= 12) { return; }
          var row = element(tip, 'div', '');
          if (data.curves.length > 1) { element(row, 'i', '').style.background = colour; }
          row.append((data.curves.length > 1 ? item.curve.label + ': ' : '') + text(value) + data.unit);
        });
        var width = tip.offsetWidth, place = across(at) + 12;
        if (place + width > outer.width) { place = across(at) - 12 - width; }
        tip.style.left = Math.max(0, Math.min(place, outer.width - width)) + 'px';
        tip.style.top = top + 'px';
      }
      plot.addEventListener('pointermove', function (event) {
        var inner = plot.querySelector('svg').getBoundingClientRect();
        draw(xs[0] + (xs[1] - xs[0]) * Math.min(1, Math.max(0, (event.clientX - inner.left) / inner.width)));
      });
      plot.addEventListener('pointerleave', clear);
      plot.addEventListener('blur', clear);
      plot.addEventListener('keydown', function (event) {
        var step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], curves = visible();
        if (event.key === 'Escape') { clear(); }
        if (!step || !curves.length) { return; }
        event.preventDefault();
        var points = curves[0].x, i = at === null ? points.length - 1 - step : nearest(points, at);
        draw(points[Math.min(points.length - 1, Math.max(0, i + step))]);
      });
    });
  });

  // Reconstructions.
  all('.viewer').forEach(function (viewer) {
    var groups = all('.frames', viewer), slider = viewer.querySelector('input'), select = viewer.querySelector('select');
    var output = viewer.querySelector('output'), run = 0, frames = [];
    function epochOf(frame) { return Number(frame.dataset.epoch); }
    function show(i) {
      frames.forEach(function (frame, number) { frame.classList.toggle('shown', number === i); });
      slider.value = i;
      var words = 'epoch ' + epochOf(frames[i]) + ' of ' + epochOf(frames[frames.length - 1]);
      output.textContent = words;
      slider.setAttribute('aria-valuetext', words);
    }
    function choose(number, epoch) {
      run = number;
      groups.forEach(function (group, other) { group.classList.toggle('shown', other === run); });
      frames = all('.frame', groups[run]);
      slider.max = frames.length - 1;
      slider.disabled = frames.length < 2;
      var best = frames.length - 1;
      frames.forEach(function (frame, i) {
        if (epoch !== null && Math.abs(epochOf(frame) - epoch) < Math.abs(epochOf(frames[best]) - epoch)) { best = i; }
      });
      show(best);
    }
    var asked = state.get('epoch');
    var first = groups.findIndex(function (group) { return group.dataset.run === state.get('run'); });
    choose(Math.max(0, first), asked === null || isNaN(Number(asked)) ? null : Number(asked));
    slider.addEventListener('input', function () {
      show(Number(slider.value));
      keep('epoch', Number(slider.value) === frames.length - 1 ? '' : String(epochOf(frames[slider.value])));
    });
    if (select) {
      select.value = groups[run].dataset.run;
      select.addEventListener('change', function () {
        choose(select.selectedIndex, epochOf(frames[slider.value]));
        keep('run', select.value);
      });
    }
  });

  // Commands to copy.
  all('button.copy').forEach(function (button) {
    button.addEventListener('click', function () {
      var code = button.parentElement.querySelector('code'), range = document.createRange(), selection = getSelection();
      range.selectNodeContents(code);
      selection.removeAllRanges();
      selection.addRange(range);
      function say(word) { button.textContent = word; setTimeout(function () { button.textContent = 'copy'; }, 1500); }
      if (navigator.clipboard) {
        navigator.clipboard.writeText(code.textContent).then(function () { say('copied'); }, function () { say('selected'); });
      } else { say(document.execCommand('copy') ? 'copied' : 'selected'); }
    });
  });
  all('a[data-opens]').forEach(function (link) {
    link.addEventListener('click', function (event) {
      var details = document.getElementById(link.dataset.opens);
      event.preventDefault();
      details.open = true;
      details.scrollIntoView();
    });
  });

  // A page that is written anew.
  var box = document.querySelector('#reload');
  if (box) {
    box.checked = state.get('reload') !== 'no';
    box.addEventListener('change', function () { keep('reload', box.checked ? '' : 'no'); });
    setInterval(function () { if (box.checked) { location.reload(); } }, 1000 * Number(box.value));
  }
  root.dataset.ready = 'yes';
}());
"""


def _styles() -> str:
    light, dark = (" ".join(f"--c{i}: {c};" for i, c in enumerate(colours)) for colours in (ON_LIGHT, ON_DARK))
    strokes = [f".c{i} {{ stroke: var(--c{i}); }}" for i in range(COLOURS)]
    strokes += [f".d{i} {{ stroke-dasharray: {d}; }}" for i, d in zip(range(1, DASHES), ("7 4", "2 3", "9 3 2 3"), strict=True)]
    return STYLE.replace("@LIGHT@", light).replace("@DARK@", dark).replace("@STROKES@", "\n".join(strokes))


def report_page(
    runs: Sequence[Run], title: str | None, pictures: Pictures, *, now: float, reload_s: float | None = None
) -> str:
    """The whole page.

    Args:
        runs: at least one.
        title: of the page, or None for the runs' names.
        pictures: what was read of pictures before.
        now: unix seconds.
        reload_s: after which an open page loads itself anew.
    """
    one = runs[0] if len(runs) == 1 else None
    title = title or (one.name if one else f"{len(runs)} runs")
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    written = f"sparkme report, written {_moment(now)}"
    reload = ""
    if reload_s is not None:
        reload = f'<noscript><meta http-equiv="refresh" content="{max(1, round(reload_s))}"></noscript>\n'
        box = f'<label class="script"><input type="checkbox" id="reload" value="{reload_s:g}" checked>'
        written += f"; {box} loads itself anew every {reload_s:g} s</label>"
    sections = [
        _head(one, now) if one else _overview(runs, now),
        *(_problems(run, named=not one) for run in runs),
        _curves(runs),
        _reconstructions(runs, pictures),
        *([_results(one, pictures, "h2", PICTURE_BYTES)] if one else []),
        _settings(runs),
        *([_details(one, 1, "h2")] if one else [_each_run(runs, pictures, now)]),
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
<style>{_styles()}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="meta">{written}</p>
</header>
<main>
{"".join(section + chr(10) for section in sections if section)}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _moment(seconds: float | None, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Local time; empty for one that no calendar has."""
    if seconds is None or not 0 <= seconds < 4e9:
        return ""
    return time.strftime(form, time.localtime(seconds))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _size(size: float) -> str:
    return (
        f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 1024:.0f} KiB"
    )


def is_share(name: str) -> bool:
    """Whether a measurement is a share from 0 to 1, which people read as percent."""
    return any(part in name for part in SHARES)


def _title(name: str) -> str:
    return TITLES.get(name) or shown(name.replace("_", " "), 60)


def _table(head: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """A table that scrolls by itself where it is too wide; head and rows are HTML."""
    cells = f"<thead><tr>{''.join(head)}</tr></thead>" if head else ""
    return f'<div class="wide"><table{kind}>{cells}<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>'


def _th(text: str, kind: str = "") -> str:
    return f'<th scope="col"{f" class={kind}" if kind else ""}>{escape(text)}</th>'


def _td(text: str, kind: str = "") -> str:
    return f"<td{f' class={kind}' if kind else ''}>{escape(text)}</td>"


# How far it is.


def _progress(run: Run) -> str:
    """Step and epoch in words."""
    if run.step is None or run.epoch is None:
        return ""
    of_steps = f" of {run.total_steps:,}" if run.total_steps else ""
    of_epochs = f" of {run.epochs:g}" if run.epochs else ""
    return f"step {run.step:,.0f}{of_steps}, epoch {nice(round(run.epoch, 2))}{of_epochs}"


def best_of(run: Run, name: str) -> tuple[float, float] | None:
    """The best of a measurement, and the epoch of it."""
    series = run.series.get(name)
    if not series or not series.values:
        return None
    i = max(range(len(series.values)), key=series.values.__getitem__)
    return series.values[i], series.epochs[i]


def _measured(runs: Sequence[Run]) -> list[str]:
    """Names of what was measured, in the order of the titles."""
    names = {name for run in runs for name, series in run.series.items() if is_share(name) and series.values}
    return sorted(names, key=lambda name: ([*TITLES].index(name) if name in TITLES else len(TITLES), name))


def _head(run: Run, now: float) -> str:
    state = run.state(now)
    words = [
        escape(text) for text in (_progress(run), _percent(run.share) if run.share is not None else "", state.text) if text
    ]
    parts = [f'<p><span class="state {state.kind}">{_STATES[state.kind]}</span>{"".join(f" · {w}" for w in words)}</p>']
    if run.share is not None:
        value = f"{100 * run.share:.1f}"
        parts.append(f'<div class="progress" role="progressbar" aria-label="how far the run is" aria-valuemin="0" '
                     f'aria-valuemax="100" aria-valuenow="{value}"><div style="width: {value}%"></div></div>')  # fmt: skip
    parts += [_facts(run, now), _command(run, state.kind)]
    return f'<section aria-label="overview">\n{chr(10).join(parts)}\n</section>'


_STATES = {"done": "done", "running": "running", "stopped": "stopped", "silent": "stopped without a word", "empty": "not begun"}


def _facts(run: Run, now: float) -> str:
    config, last = run.config, run.last
    facts: list[tuple[str, str, bool]] = []
    if "loss" in last:
        facts.append(("last loss", nice(last["loss"]), False))
    for name in _measured([run])[:4]:
        if best := best_of(run, name):
            facts.append((f"best {_title(name)}, epoch {nice(best[1])}", _percent(best[0]), False))
    if (left := run.seconds_left(now)) is not None:
        words = duration(min(left, 1e9))
        if run.state(now).kind == "running" and left < 30 * 86400:
            words += f" (till {_moment(now + left, '%a %H:%M')})"
        facts.append(("time left" if run.state(now).kind == "running" else "time left, once continued", words, False))
    if "images_per_s" in last:
        facts.append(("images per second", nice(last["images_per_s"]), False))
    if "memory_gib" in last:
        facts.append(("memory", f"{nice(last['memory_gib'])} GiB", False))
    if "loader_wait" in last:
        facts.append(("time spent waiting for images", f"{100 * last['loader_wait']:.0f} %", last["loader_wait"] > 0.25))
    facts.append(("unreadable images", str(run.num_unreadable), run.num_unreadable > 0))
    facts.append(("steps not finite", str(run.num_not_finite), run.num_not_finite > 0))
    images = config.get("num_images", config.get("num_train_images", config.get("num_train")))
    for label, value in (("network", config.get("model")), ("recipe", config.get("recipe")), ("images", images)):
        if value is not None:
            facts.append((label, f"{value:,}" if type(value) is int else shown(value, 80), False))
    entries = []
    for name, value, bad in facts:
        kind = " class=bad" if bad else " class=long" if len(value) > 17 else ""
        entries.append(f"<div{kind}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>")
    return f'<dl class="facts">\n{chr(10).join(entries)}\n</dl>'


def _command(run: Run, kind: str) -> str:
    if not (command := run.continuing):
        return ""
    words = "The command that continues it" if kind != "done" else "Its command"
    from_where = (
        "as it was started" if run.started else "from its settings; paths are those of the folder that it was started in"
    )
    return (
        f'<p class="small">{words}, {from_where}:</p>\n<div class="command"><code>{escape(command)}</code>'
        '<button type="button" class="copy script">copy</button></div>'
    )


def _overview(runs: Sequence[Run], now: float) -> str:
    measured = _measured(runs)[:4]
    going_on = any(run.seconds_left(now) is not None for run in runs)
    head = [_th("run"), _th("state"), _th("done", "number"), _th("epoch", "number"), _th("loss", "number")]
    head += [_th(f"best {_title(name)}", "number") for name in measured]
    last = ("images/s", *(["time left"] if going_on else []), "unreadable images", "steps not finite")
    head += [_th(text, "number") for text in last]
    rows = []
    for i, run in enumerate(runs):
        state, left = run.state(now), run.seconds_left(now)
        link = f'<a href="#run-{i}" data-opens="run-{i}">{escape(run.name)}</a>'
        cells = [f'<td class="name"><span class="named">{swatch(i)} {link}</span></td>',
                 f'<td><span class="state {state.kind}">{_STATES[state.kind]}</span></td>']  # fmt: skip
        values = [_percent(run.share) if run.share is not None else ""]
        values += [nice(round(run.epoch, 2)) + (f" of {run.epochs:g}" if run.epochs else "") if run.epoch is not None else ""]
        values += [nice(run.last["loss"]) if "loss" in run.last else ""]
        values += [_percent(best[0]) if (best := best_of(run, name)) else "" for name in measured]
        values += [nice(run.last["images_per_s"]) if "images_per_s" in run.last else ""]
        values += [duration(min(left, 1e9)) if left is not None else ""] if going_on else []
        values += [str(run.num_unreadable), str(run.num_not_finite)]
        rows.append(f"<tr>{''.join(cells)}{''.join(_td(value, 'number') for value in values)}</tr>")
    return f'<section aria-label="overview">\n{_table(head, rows)}\n</section>'


def _problems(run: Run, *, named: bool) -> str:
    if not run.problems:
        return ""
    of = f" of {escape(run.name)}" if named else ""
    listed = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f'<div class="warning"><strong>What could not be read{of}</strong><ul>{listed}</ul></div>'


# Curves.


def _curves(runs: Sequence[Run]) -> str:
    names = {name for run in runs for name, series in run.series.items() if series.values} - set(UNSHOWN)
    if not names:
        return "<section>\n<h2>Curves</h2>\n<p>There are no numbers to draw yet.</p>\n</section>"
    measured = _measured(runs)
    rest = sorted(names - {*FIRST, *measured, *MAIN}, key=lambda name: (name not in TITLES, name))[:MOST_MORE]
    top = max(max(series.epochs) for run in runs for name, series in run.series.items() if name in names and series.values)
    x_range = (0.0, max(top, 1e-3))

    def chart(*wanted: str) -> list[str]:
        return [draw_chart(made, x_range) for made in [_chart(runs, [name for name in wanted if name in names])] if made]

    # Of a single run what was measured shares a chart; of several each measurement has its own.
    shared = [chart(*measured)] if len(runs) == 1 else [chart(name) for name in measured]
    charts = [drawn for part in [chart("loss"), *shared, *(chart(name) for name in MAIN)] for drawn in part]
    more = [drawn for name in rest for drawn in chart(name)]
    legend = ""
    if len(runs) > 1:
        entries = "\n".join(
            f'<li><label><input type="checkbox" class="script" value="{i}" checked>{swatch(i)} {escape(run.name)}</label></li>'
            for i, run in enumerate(runs)
        )
        legend = f'<ul class="legend runs" aria-label="runs in the curves">\n{entries}\n</ul>\n'
    others = f'<details><summary>{len(more)} more</summary>\n<div class="charts">\n{chr(10).join(more)}\n</div></details>'
    drawn = f'<div class="charts">\n{chr(10).join(charts)}\n</div>'
    return f"<section>\n<h2>Curves</h2>\n{legend}{drawn}\n{others if more else ''}\n</section>"


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
                label = run.name if len(runs) > 1 else _title(each)
                curves.append(_curve(series, i, order if len(runs) == 1 else i, label, scale, most))
    if not curves:
        return None
    unit = "%" if is_share(name) else UNITS.get(name, "")
    largest = max(abs(value) for curve in curves for value in curve.values)
    return Chart(
        name=name if len(names) == 1 else "measured",
        title=("accuracy" if len(names) > 1 and name != "val_map" else _title(name)) + (f", {unit.strip()}" if unit else ""),
        unit=unit,
        curves=curves,
        from_zero=name
        in ("learning_rate", "images_per_s", "loader_wait", "memory_gib", "step_ms", "not_finite", "weight_decay"),
        least_span=LEAST_POINTS if scale == 100 else 0.02 * largest,
        highest=100.0 if scale == 100 else float("inf"),
        has_log=name in ("loss", "gradient_norm", "learning_rate", "step_ms"),
        notes=f"{left_out} values that are not finite or too large are left out." if left_out else "",
        legend=len(names) > 1,
    )


def _curve(series: Series, run: int, style: int, label: str, scale: float, most: int) -> Curve:
    kept = thin(series.values, most)
    columns = [[column[i] for i in kept] for column in (series.steps, series.epochs, series.values)]
    return Curve(run, style, label, columns[0], columns[1], [scale * value for value in columns[2]])


# Pictures.


class Picture(NamedTuple):
    """`source` is a data: address; width and height in pixels."""

    source: str
    width: int
    height: int


class Pictures:
    """Pictures as a page holds them, read once as long as their files stay the same."""

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], Picture | str] = {}
        self.asked: set[tuple[Any, ...]] = set()

    def get(self, path: Path, most_bytes: int) -> Picture | str:
        """The picture, in at most about so many bytes, or why there is none."""
        try:
            status = os.stat(path)
        except OSError as error:
            return error.strerror or type(error).__name__
        key = (str(path), status.st_mtime_ns, status.st_size, most_bytes)
        self.asked.add(key)
        if key not in self.made:
            self.made[key] = _embedded(path, most_bytes)
        return self.made[key]

    def forget(self) -> None:
        """Forgets what was not asked for since the last time."""
        self.made = {key: made for key, made in self.made.items() if key in self.asked}
        self.asked.clear()


def _embedded(path: Path, most_bytes: int) -> Picture | str:
    if not path.is_file() or path.stat().st_size > READ_BYTES:
        return f"it is no file, or has more than {READ_BYTES // 2**20} MiB"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused here
            with Image.open(path, formats=("PNG", "JPEG")) as opened:
                if opened.width * opened.height > READ_PIXELS:
                    return f"it has {opened.width} x {opened.height} pixels, which are too many"
                picture = _on_white(opened)
    except Exception as error:  # a torn file can fail anywhere in the decoder
        return shown(str(error) or type(error).__name__, 100).replace(str(path), path.name)
    scale = min(1.0, MOST_WIDTH / picture.width, MOST_HEIGHT / picture.height)
    picture = _scaled(picture, scale)
    best = _encoded(picture, "PNG", optimize=False)
    for factor, quality in ((1.0, 90), (1.0, 75), (0.75, 75), (0.5, 70), (0.33, 60), (0.2, 50)):
        if len(best) <= most_bytes:
            break
        smaller = _scaled(picture, factor)
        data = _encoded(smaller, "JPEG", quality=quality)
        best = data if len(data) < len(best) else best
    kind = "png" if best.startswith(b"\x89PNG") else "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(best).decode()}", picture.width, picture.height)


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture.copy()
    picture = picture.convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(paper, picture).convert("RGB")


def _scaled(picture: Image.Image, factor: float) -> Image.Image:
    if factor >= 1:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()


def _img(picture: Picture, text: str) -> str:
    return f'<img src="{picture.source}" alt="{escape(text)}" width="{picture.width}" height="{picture.height}">'


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` numbers, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _reconstructions(runs: Sequence[Run], pictures: Pictures) -> str:
    painted = [(i, run) for i, run in enumerate(runs) if run.reconstructions]
    if not painted:
        return ""
    most = min(MOST_PICTURES, max(2, ALL_PICTURES // len(painted)))
    most_bytes = min(PICTURE_BYTES, ALL_BYTES // (len(painted) * most + len(runs)))
    groups, options, lost = [], [], []
    for i, run in painted:
        frames, chosen = [], spread(len(run.reconstructions), most)
        for at in chosen:
            epoch, path = run.reconstructions[at]
            picture = pictures.get(path, most_bytes)
            if isinstance(picture, str):
                lost.append(f"{run.name}, {path.name}: {picture}")
                continue
            text = f"original, masked and reconstructed images of {run.name} after epoch {epoch}"
            frames.append((epoch, _img(picture, text)))
        if not frames:
            continue
        figures = [
            f'<figure class="frame{" edge" if j in (0, len(frames) - 1) else ""}" data-epoch="{epoch}">{img}'
            f"<figcaption>epoch {epoch}</figcaption></figure>"
            for j, (epoch, img) in enumerate(frames)
        ]
        named = f'<h3 class="frames-of">{escape(run.name)}</h3>\n' if len(runs) > 1 else ""
        groups.append(f'<div class="frames" data-run="{i}">\n{named}{chr(10).join(figures)}\n</div>')
        options.append(f'<option value="{i}">{escape(run.name)}</option>')
        if len(chosen) < len(run.reconstructions):
            lost.append(f"{run.name}: {len(frames)} of {len(run.reconstructions)} are shown")
    notes = "".join(f'<p class="small">{escape(note)}</p>\n' for note in lost[:30])
    if not groups:
        return f"<section>\n<h2>Reconstructions</h2>\n<p>None of them can be read.</p>\n{notes}</section>"
    select = f"<label>run <select>{''.join(options)}</select></label>" if len(runs) > 1 else ""
    slider = '<label class="slide">epoch <input type="range" min="0" value="0" step="1" aria-label="epoch"></label>'
    return f"""<section>
<h2>Reconstructions</h2>
<div class="viewer">
<div class="controls script">{select}{slider}<output></output></div>
{chr(10).join(groups)}
</div>
{notes}</section>"""


# Fine-tuning.


def _results(run: Run, pictures: Pictures, heading: str, most_bytes: int) -> str:
    """What fine-tuning wrote: the best epoch, each class, and which are taken for each other."""
    parts = []
    results = run.results
    best = results.get("best")
    if isinstance(best, dict):
        said = [
            f"{_title(f'val_{name}')} {_percent(value)}"
            for name in ("top1", "top5", "map")
            if (value := number(best.get(name))) is not None
        ]
        if (epoch := number(best.get("epoch"))) is not None:
            said.append(f"after epoch {nice(epoch)}")
        images = number(results.get("num_val"))
        parts.append(f"<p>The best: {escape(', '.join(said))}{f', of {images:,.0f} images' if images else ''}.</p>")
    if run.confusion is not None:
        picture = pictures.get(run.confusion, most_bytes)
        if isinstance(picture, str):
            parts.append(f'<p class="small">confusion.png cannot be read: {escape(picture)}</p>')
        else:
            parts.append(_img(picture, f"how often each class of {run.name} was taken for each"))
    measured = "right" if "of_each_class" in results else "average precision"
    classes = results.get("of_each_class", results.get("average_precision"))
    if isinstance(classes, dict):
        known = [(name, share) for name, value in classes.items() if (share := number(value)) is not None and 0 <= share <= 1]
        known.sort(key=lambda item: item[1])
        rows = [
            f'<tr>{_td(shown(name, 100), "name")}<td><div class="bar"><div style="width: {100 * share:.1f}%"></div></div></td>'
            f"{_td(_percent(share), 'number')}</tr>"
            for name, share in known[:100]
        ]
        more = f", the lowest 100 of {len(known)}" if len(known) > 100 else ""
        table = _table([_th("class"), _th(""), _th(measured, "number")], rows)
        parts.append(f"<details{' open' if len(known) <= 20 else ''}><summary>each class{more}</summary>\n{table}</details>")
        parts.append(_mistakes(results.get("confusion"), [*classes]))
    if not any(parts):
        return ""
    return f"<section>\n<{heading}>Results</{heading}>\n{chr(10).join(part for part in parts if part)}\n</section>"


def _mistakes(confusion: Any, classes: list[Any]) -> str:
    """The classes that are most often taken for another."""
    count = len(classes)
    if not isinstance(confusion, list) or len(confusion) != count or not 2 <= count <= 5000:
        return ""
    pairs = []
    for i, row in enumerate(confusion):
        if not isinstance(row, list) or len(row) != count:
            return ""
        counts = [number(value) or 0.0 for value in row]
        total = sum(counts)
        pairs += [(counts[j], counts[j] / total, i, j) for j in range(count) if j != i and total > 0 and counts[j] > 0]
        pairs = sorted(pairs, reverse=True)[:10]
    rows = [
        f"<tr>{_td(shown(classes[i], 100), 'name')}{_td(shown(classes[j], 100), 'name')}{_td(f'{n:.0f}', 'number')}"
        f"{_td(_percent(share), 'number')}</tr>"
        for n, share, i, j in pairs
    ]
    if not rows:
        return ""
    head = [_th("class"), _th("taken for"), _th("images", "number"), _th("of the class", "number")]
    return f"<details open><summary>most frequent mistakes</summary>\n{_table(head, rows)}</details>"


# Settings.


def _setting(value: Any) -> str:
    if isinstance(value, list) and len(value) <= 20 and not any(isinstance(item, list | dict) for item in value):
        return " ".join(shown(item, 60) for item in value)
    words = {None: "—", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else shown(value)


def _settings(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        run = runs[0]
        if not run.config:
            return "<section>\n<h2>Settings</h2>\n<p>There is no config.json that can be read.</p>\n</section>"
        return f"<section>\n<h2>Settings</h2>\n{_own_settings(run, 1)}\n</section>"
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    differing = [n for n in names if n not in ("output", "recipe_reason") and len({shown(r.config.get(n)) for r in runs}) > 1][
        :100
    ]
    # One row for each run where runs are many, so that a table grows downwards.
    if not differing:
        return "<section>\n<h2>Settings</h2>\n<p>The runs have the same settings.</p>\n</section>"
    common = {name: max(values := [shown(run.config.get(name)) for run in runs], key=values.count) for name in differing}

    def cell(run: Run, name: str) -> str:
        return _td(_setting(run.config.get(name)), "same" if shown(run.config.get(name)) == common[name] else "value")

    if len(runs) <= 4 or len(differing) > len(runs):
        head = [_th("setting"), *(_th(run.name) for run in runs)]
        rows = [
            f'<tr><th scope="row">{escape(shown(name, 60))}</th>{"".join(cell(r, name) for r in runs)}</tr>'
            for name in differing
        ]
    else:
        head = [_th("run"), *(_th(shown(name, 60)) for name in differing)]
        rows = [f'<tr><th scope="row">{escape(r.name)}</th>{"".join(cell(r, name) for name in differing)}</tr>' for r in runs]
    table = _table(head, rows, ' class="compare"')
    return f"<section>\n<h2>Settings that differ between the runs</h2>\n{table}\n</section>"


def _own_settings(run: Run, num_runs: int) -> str:
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>{_td(_setting(value), "value")}{_td(_setting(default), "default")}</tr>'
        for name, value, default in run.differences
    ]
    head = [_th("setting"), _th("value"), _th("default")]
    own = _table(head, rows) if rows else "<p>All settings are the defaults.</p>"
    every = [
        f'<tr><th scope="row">{escape(shown(name, 60))}</th>{_td(_setting(value), "value")}</tr>'
        for name, value in [*run.config.items()][: max(80, MOST_SETTINGS // num_runs)]
    ]
    return f"{own}\n<details><summary>all {len(run.config)} settings</summary>\n{_table([], every)}</details>"


# Notes, images, checkpoints.


def _details(run: Run, num_runs: int, heading: str) -> str:
    most = max(10, min(200, MOST_ROWS // num_runs))
    parts = []
    if run.notes:
        notes = [*run.notes][-most:][::-1]
        rows = [
            f"<tr>{_td(_moment(note.time), 'when')}{_td('' if note.step is None else f'{note.step:.0f}', 'number')}"
            f"{_td(note.kind.replace('_', ' '))}{_td(shown(note.text), 'text')}</tr>"
            for note in notes
        ]
        total = run.num_notes.total() - run.num_notes["unreadable"]
        word = f"Notes, the last {len(notes)} of {total}" if total > len(notes) else "Notes"
        head = [_th("time"), _th("step", "number"), _th("kind"), _th("text")]
        parts.append(f"<{heading}>{word}</{heading}>\n{_table(head, rows)}")
    if run.unreadable:
        listed = [*run.unreadable.values()][:most]
        rows = [f"<tr>{_td('' if n.step is None else f'{n.step:.0f}', 'number')}{_td(n.text, 'text')}</tr>" for n in listed]
        word = f"{run.num_unreadable:,} unreadable images" + (
            f", the first {len(listed)}" if len(listed) < run.num_unreadable else ""
        )
        table = _table([_th("step", "number"), _th("image")], rows)
        is_open = " open" if len(listed) <= 10 else ""
        parts.append(f"<{heading}>{word}</{heading}>\n<details{is_open}><summary>the list</summary>\n{table}</details>")
    if run.checkpoints:
        rows = [
            f"<tr>{_td(shown(c.name, 80) + (f' → {shown(c.target, 80)}' if c.target else ''), 'name')}"
            f"{_td(_size(c.size), 'number')}{_td(_moment(c.time), 'when')}</tr>"
            for c in run.checkpoints[:100]
        ]
        more = f", the newest 100 of {len(run.checkpoints)}" if len(run.checkpoints) > 100 else ""
        head = [_th("file"), _th("size", "number"), _th("written")]
        parts.append(f"<{heading}>Checkpoints{more}</{heading}>\n{_table(head, rows)}")
    return "\n".join(f"<section>\n{part}\n</section>" for part in parts)


def _each_run(runs: Sequence[Run], pictures: Pictures, now: float) -> str:
    blocks = []
    for i, run in enumerate(runs):
        state = run.state(now)
        words = " · ".join(escape(text) for text in (_progress(run), state.text) if text)
        body = [
            f'<p><span class="state {state.kind}">{_STATES[state.kind]}</span>{" · " if words else ""}{words}</p>',
            _facts(run, now),
            _command(run, state.kind),
            f"<h3>Settings</h3>\n{_own_settings(run, len(runs))}"
            if run.config
            else "<p>There is no config.json that can be read.</p>",
            _results(run, pictures, "h3", min(60_000, ALL_BYTES // (4 * len(runs)))),
            _details(run, len(runs), "h3"),
        ]
        summary = f"<summary>{swatch(i)} {escape(run.name)}</summary>"
        blocks.append(
            f'<details class="run" id="run-{i}">\n{summary}\n{chr(10).join(part for part in body if part)}\n</details>'
        )
    return f"<section>\n<h2>Each run</h2>\n{chr(10).join(blocks)}\n</section>"
