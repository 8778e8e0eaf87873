"""Reconstructions in a report: a picture per epoch, chosen with a slider."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sparkme.reporting.markup import section
from sparkme.reporting.pictures import ALL_BYTES, PICTURE_BYTES, Pictures, img
from sparkme.reporting.runs import Run

MOST_PICTURES, ALL_PICTURES = 24, 96  # per run, and per page
MOST_NOTES = 30


def reconstructions(runs: Sequence[Run], pictures: Pictures) -> str:
    """The section, with pictures spread evenly over the epochs; empty if there are none."""
    painted = [(i, run) for i, run in enumerate(runs) if run.reconstructions]
    if not painted:
        return ""
    most = min(MOST_PICTURES, max(2, ALL_PICTURES // len(painted)))
    most_bytes = min(PICTURE_BYTES, ALL_BYTES // (len(painted) * most + len(runs)))
    groups, options, lost = [], [], list[str]()
    for i, run in painted:
        chosen = [run.reconstructions[at] for at in spread(len(run.reconstructions), most)]
        figures = []
        for epoch, path in chosen:
            picture = pictures.get(path, most_bytes)
            if isinstance(picture, str):
                lost.append(f"{run.name}, {path.name}: {picture}")
            else:
                text = f"original, masked and reconstructed images of {run.name} after epoch {epoch}"
                figures.append((epoch, img(picture, text)))
        if not figures:
            continue
        named = f'<h3 class="frames-of">{escape(run.name)}</h3>\n' if len(runs) > 1 else ""
        groups.append(f'<div class="frames" data-run="{i}">\n{named}{_frames(figures)}\n</div>')
        options.append(f'<option value="{i}">{escape(run.name)}</option>')
        if len(chosen) < len(run.reconstructions):
            lost.append(f"{run.name}: {len(figures)} of {len(run.reconstructions)} pictures are shown")
    notes = "".join(f'\n<p class="small">{escape(note)}</p>' for note in lost[:MOST_NOTES])
    if not groups:
        return section("Reconstructions", f"<p>No picture can be read.</p>{notes}")
    select = f"<label>run <select>{''.join(options)}</select></label>" if len(runs) > 1 else ""
    slider = '<label class="slide">epoch <input type="range" min="0" value="0" step="1" aria-label="epoch"></label>'
    controls = f'<div class="controls script">{select}{slider}<output></output></div>'
    return section("Reconstructions", "\n".join(['<div class="viewer">', controls, *groups, f"</div>{notes}"]))


def _frames(figures: Sequence[tuple[int, str]]) -> str:
    """Pictures with their epochs. Without JavaScript, and in print, only the first and the last appear."""
    edges = (0, len(figures) - 1)
    return "\n".join(
        f'<figure class="frame{" edge" if i in edges else ""}" data-epoch="{epoch}">{picture}'
        f"<figcaption>epoch {epoch}</figcaption></figure>"
        for i, (epoch, picture) in enumerate(figures)
    )


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices, evenly spaced from 0 to `count` - 1."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
