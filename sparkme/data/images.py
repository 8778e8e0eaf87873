"""Where training images come from: any folder of images, or the photographs that scikit-image ships."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sparkme.errors import UserError, first_line

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# The colour photographs in scikit-image's wheel (skimage.data), all free to use; its other images are grey or drawings.
_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
                "retina.jpg", "rocket.jpg")  # fmt: skip


def find_images(folder: Path, leave_out: Path | None = None) -> list[Path]:
    """All images below a folder, sorted, whatever its structure; follows links, each directory once.

    Args:
        folder: where to look.
        leave_out: a folder below it whose images do not count, such as the run's own pictures.

    Raises:
        UserError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder")
    found: list[Path] = []
    seen: set[str] = {os.path.realpath(leave_out)} if leave_out else set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(root, name) for name in files if _is_image(name)]
    if not found:
        raise UserError(f"--data {folder} holds no images (looked for {', '.join(sorted(EXTENSIONS))}, in subfolders too)")
    return sorted(found)


def demo_photographs() -> list[Path]:
    """The colour photographs in scikit-image's wheel.

    Raises:
        UserError: scikit-image is not installed, or ships none of them any more.
    """
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "without --data, training runs on scikit-image's photographs, and scikit-image is not installed; "
            "pass --data FOLDER or install the extra: pip install 'sparkme[demo]'"
        )
    folder = Path(spec.submodule_search_locations[0], "data")
    found = [folder / name for name in _PHOTOGRAPHS if (folder / name).is_file()]
    if not found:
        raise UserError(f"scikit-image ships none of its photographs in {folder}; pass --data FOLDER")
    return found


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("._")  # macOS's companions of files


def printable(path: Path) -> str:
    """A path in one line, whatever characters its name has."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def load_rgb(path: Path, background: str = "white") -> Image.Image:
    """Decodes an image to RGB, upright if it says how it was held; 16 bits a channel are brought down to 8.

    A transparent image is laid on a background: what colour a file keeps under its transparent pixels is of chance.

    Args:
        path: the file.
        background: a name or #rrggbb, as PIL.ImageColor reads it.

    Raises:
        OSError: it cannot be read, whatever Pillow's own reason, or its numbers have no known range.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")  # of palettes and tags that Pillow finds odd, and reads nevertheless
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise OSError("floating-point pixels have no known range; convert the image to 8 or 16 bits")
            if image.mode == "I" or image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise OSError(f"{printable(path)}: {first_line(error)}") from error
