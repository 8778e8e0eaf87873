"""The limit on pixels per image: a small file may claim any number."""

from __future__ import annotations

from PIL import Image

from sparkme.errors import UserError

MAX_PIXELS = 178_956_970  # Pillow's own limit


def limit_pixels(most: int | None) -> None:
    """Sets the limit on pixels per image in this process and its loaders; None stands for Pillow's. Raises UserError."""
    if most is not None and not 1 <= most < 2**62:
        raise UserError(f"--max-pixels {most} must be at least 1, and below 2^62")
    Image.MAX_IMAGE_PIXELS = ((most or MAX_PIXELS) + 1) // 2  # Pillow warns at this number and refuses twice as many


def scaled(most_bytes: int) -> int:
    """A limit on bytes for Pillow's limit on pixels, scaled to the current limit."""
    return most_bytes * max(1, 2 * (Image.MAX_IMAGE_PIXELS or 0) // MAX_PIXELS)
