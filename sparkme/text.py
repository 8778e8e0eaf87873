"""Formats paths, values and durations as one line of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LONGEST_TEXT = 300  # characters of a value from a run's file


def printable(path: Path | str) -> str:
    """A path in one line, with unprintable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def shown(value: Any, length: int = LONGEST_TEXT) -> str:
    """A value as one line of at most `length` printable characters."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):
        text = f"a {type(value).__name__}"
    line = "".join(c if c.isprintable() else " " for c in text[: length + 1])
    return line if len(text) <= length else line[: length - 1] + "…"


def ended(text: str, length: int) -> str:
    """Shortens a text to `length` characters at its start."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def duration(seconds: float) -> str:
    """2 d 3 h, 4 h 05 min, 6 min 07 s or 8 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if h:
        return f"{h} h {m:02d} min"
    return f"{m} min {s:02d} s" if m else f"{s} s"
