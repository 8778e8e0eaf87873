"""How large an image may be: a small file may promise any number of pixels."""

from __future__ import annotations

from PIL import Image

from sparkme.errors import UserError

MAX_PIXELS = 178_956_970  # Pillow's own limit


def limit_pixels(most: int | None) -> None:
    """Sets how many pixels an image may have, in this process and in those that it starts to load images.

    Args:
        most: or None for Pillow's limit.

    Raises:
        UserError: it is no number of pixels.
    """
    if most is not None and not 1 <= most < 2**62:
        raise UserError(f"--max-pixels {most} must be at least 1, and below 2^62")
    Image.MAX_IMAGE_PIXELS = ((most or MAX_PIXELS) + 1) // 2  # of which Pillow only warns; it refuses twice as many


def scaled(most_bytes: int) -> int:
    """As many bytes as files may have with Pillow's limit, for the limit that is set."""
    return most_bytes * max(1, 2 * (Image.MAX_IMAGE_PIXELS or 0) // MAX_PIXELS)
