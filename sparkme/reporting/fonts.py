"""The font of pictures, and texts that fit."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from sparkme.text import LONGEST_TEXT, shown

FONT_SIZE = 12


def _path() -> str:
    """Matplotlib's font, which has more alphabets than Pillow's."""
    return str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@lru_cache
def font(size: int = FONT_SIZE) -> Any:
    """Pillow's font object; `size` is in pixels."""
    return ImageFont.truetype(_path(), size)


@lru_cache
def _characters() -> frozenset[int]:
    return frozenset(FT2Font(_path()).get_charmap())


def has_glyphs(text: str) -> bool:
    """Whether the font has every character of a text."""
    return {*map(ord, text)} <= _characters()


def shortened(text: str, width: float, size: int = FONT_SIZE, *, keep: str = "end") -> str:
    """A text as one line of at most `width` pixels. It keeps its `end`, which tells files apart, or its `start`; empty if not
    even one character fits."""
    line = shown(text[-LONGEST_TEXT:] if keep == "end" else text[:LONGEST_TEXT])
    if font(size).getlength(line) <= width:
        return line
    for count in range(len(line) - 1, 0, -1):
        short = f"…{line[-count:]}" if keep == "end" else f"{line[:count].rstrip()}…"
        if font(size).getlength(short) <= width:
            return short
    return ""
