"""A page of reconstructions in one file, with embedded pictures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from sparkme.files import replaced_when_whole
from sparkme.reporting.panel import COLUMNS, LARGEST_ERROR, colour_bar, to_image
from sparkme.reporting.pictures import Picture, encoded, img

# The policy in the header makes sure that the page loads nothing else.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{text}</p>
<p class="bar">error 0 {bar} {largest:g} or more</p>
<table>
<tr><th>image</th><th class="number">mask ratio</th><th class="number">visible patches</th><th class="number">seed</th>
<th class="number">loss</th></tr>
{losses}
</table>
<details><summary>Settings of the run</summary>
<table>
{settings}
</table>
</details>
{sections}
</body>
</html>
"""


class Result(NamedTuple):
    """One image under one mask.

    `loss` is the run's training loss on this image; `visible` of `patches` patches are visible; `pictures` is (4, 3, H, W)
    float32 in [0, 1], in the order of `panel.COLUMNS`.
    """

    name: str
    mask_ratio: float
    seed: int
    visible: int
    patches: int
    loss: float
    pictures: Tensor

    @property
    def setting(self) -> str:
        return f"mask ratio {self.mask_ratio:g} ({self.visible} of {self.patches} patches visible), seed {self.seed}"


def write_page(output: Path, title: str, results: list[Result], text: str, settings: Mapping[str, Any]) -> None:
    """Writes the page. `results` are grouped by image, `text` explains the pictures, `settings` are those of the run.

    Raises:
        UserError: the page cannot be written; then `output` stays as it was.
    """
    sections = []
    for name, group in groupby(results, key=lambda result: result.name):
        rows = "\n".join(_row(result) for result in group)
        sections.append(f"<section>\n<h2>{escape(name)}</h2>\n{rows}\n</section>")
    page = PAGE.format(
        title=escape(title),
        style=Path(__file__).with_suffix(".css").read_text(encoding="utf-8"),
        text=escape(text),
        bar=_embedded(colour_bar(200, 14), "colours of the error"),
        largest=LARGEST_ERROR,
        losses="\n".join((*map(_losses, results), _mean_loss(results))),
        settings="\n".join(
            f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in settings.items()
        ),
        sections="\n".join(sections),
    )
    with replaced_when_whole(output) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _losses(result: Result) -> str:
    numbers = (f"{result.mask_ratio:g}", f"{result.visible} of {result.patches}", str(result.seed), f"{result.loss:.4f}")
    return f"<tr><td>{escape(result.name)}</td>" + "".join(f'<td class="number">{n}</td>' for n in numbers) + "</tr>"


def _mean_loss(results: list[Result]) -> str:
    if len(results) < 2:
        return ""
    mean = sum(result.loss for result in results) / len(results)
    return f'<tr><td>mean</td><td></td><td></td><td></td><td class="number">{mean:.4f}</td></tr>'


def _row(result: Result) -> str:
    figures = "\n".join(
        f"<figure>{_embedded(to_image(picture), f'{result.name}, {column}')}<figcaption>{column}</figcaption></figure>"
        for column, picture in zip(COLUMNS, result.pictures, strict=True)
    )
    return f'<h3>{result.setting}, loss {result.loss:.4f}</h3>\n<div class="row">\n{figures}\n</div>'


def _embedded(picture: Image.Image, text: str) -> str:
    return img(Picture(encoded(picture, "PNG", optimize=True), picture.width, picture.height), text)
