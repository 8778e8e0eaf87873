"""Pictures in a page: read from files, made smaller if necessary, and embedded as `data:` URLs."""

from __future__ import annotations

import base64
import io
import os
import warnings
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sparkme.text import shown

MOST_WIDTH, MOST_HEIGHT = 1200, 4000  # pixels of a picture in the page
PICTURE_BYTES, ALL_BYTES = 600_000, 7_000_000  # per picture, and per page, before base64 adds a third
READ_BYTES, READ_PIXELS = 64 * 2**20, 50e6  # limits of a picture file


class Picture(NamedTuple):
    """A PNG or JPEG file, and the width and height in pixels at which it is shown."""

    data: bytes
    width: int
    height: int


def img(picture: Picture, text: str) -> str:
    """The HTML element, with the picture embedded."""
    kind = "png" if picture.data.startswith(b"\x89PNG") else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(picture.data).decode()}"
    return f'<img src="{source}" alt="{escape(text)}" width="{picture.width}" height="{picture.height}">'


class Pictures:
    """A cache of embedded pictures. A file is read again only after it changed."""

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], Picture | str] = {}
        self.asked: set[tuple[Any, ...]] = set()

    def get(self, path: Path, most_bytes: int) -> Picture | str:
        """The picture in about `most_bytes` or less, or the reason why it cannot be read."""
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
        """Drops pictures that were not used since the last call."""
        self.made = {key: made for key, made in self.made.items() if key in self.asked}
        self.asked.clear()


def _embedded(path: Path, most_bytes: int) -> Picture | str:
    if not path.is_file() or path.stat().st_size > READ_BYTES:
        return f"it is not a file, or larger than {READ_BYTES // 2**20} MiB"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are refused below
            with Image.open(path, formats=("PNG", "JPEG")) as opened:
                if opened.width * opened.height > READ_PIXELS:
                    return f"it has too many pixels, {opened.width} x {opened.height}"
                picture = _on_white(opened)
    except Exception as error:  # a torn file can fail anywhere in the decoder
        return shown(str(error) or type(error).__name__, 100).replace(str(path), path.name)
    scale = min(1.0, MOST_WIDTH / picture.width, MOST_HEIGHT / picture.height)
    picture = _scaled(picture, scale)
    best = encoded(picture, "PNG", optimize=False)
    for factor, quality in ((1.0, 90), (1.0, 75), (0.75, 75), (0.5, 70), (0.33, 60), (0.2, 50)):
        if len(best) <= most_bytes:
            break
        smaller = _scaled(picture, factor)
        data = encoded(smaller, "JPEG", quality=quality)
        best = data if len(data) < len(best) else best
    return Picture(best, picture.width, picture.height)


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


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    """The PNG or JPEG file of a picture, with Pillow's options."""
    buffer = io.BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()
