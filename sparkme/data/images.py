"""Where training images come from: any folder of images, or the photographs that scikit-image ships."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sparkme.errors import UserError, first_line

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".npy", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# The colour photographs in scikit-image's wheel (skimage.data), all free to use; its other images are grey or drawings.
_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
                "retina.jpg", "rocket.jpg")  # fmt: skip


def find_images(folder: Path, leave_out: Path | None = None, *, flag: str = "--data") -> list[Path]:
    """All images below a folder, sorted, whatever its structure; follows links, each directory once.

    Args:
        folder: where to look.
        leave_out: a folder below it whose images do not count, such as the run's own pictures.
        flag: what the folder was given by, for messages.

    Raises:
        UserError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder")
    found: list[Path] = []
    seen: set[str] = {os.path.realpath(leave_out)} if leave_out else set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]  # thumbnails, checkpoints of notebooks
        found += [path for name in files if _is_image(name) and not _is_special(path := Path(root, name))]
    if not found:
        raise UserError(f"{flag} {folder} holds no images (looked for {', '.join(sorted(EXTENSIONS))}, in subfolders too)")
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


def _is_special(path: Path) -> bool:
    """A pipe, a device or a folder, which reading would wait for; a broken link is reported when it is read."""
    return path.exists() and not path.is_file()


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
                image = Image.fromarray((_sixteen_bits(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
            return image.convert("RGB")
    except Exception as error:  # decoders fail in all ways there are
        raise OSError(f"{printable(path)}: {first_line(error)}") from error


def load_image(path: Path, channels: int = 3, background: str = "white") -> Image.Image | Tensor:
    """Decodes an image of any number of channels.

    Args:
        path: an image file, or a `.npy` array (H, W), (H, W, C) or (C, H, W) of uint8, uint16, or floats from 0 to 1.
        channels: how many the network takes. With 3, files are read by `load_rgb`; with 1, colours become grey; with another
            number the channels of an array, or the grey pages of a TIFF file, have to be as many.
        background: see `load_rgb`.

    Returns:
        An RGB image of Pillow's, of bytes, which travel to the device as they are; or a (C, H, W) float32 tensor of values
        from 0 to 1, with all the precision that the file has.

    Raises:
        OSError: it cannot be read, or has other channels.
    """
    if path.suffix.lower() == ".npy":
        return _load_array(path, channels)
    if channels == 3 and not (path.suffix.lower() in (".tif", ".tiff") and _has_grey_pages(path, channels)):
        return load_rgb(path, background)
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")
            pages = getattr(opened, "n_frames", 1)
            if channels == 1:
                return _grey(ImageOps.exif_transpose(opened), background).unsqueeze(0)
            if pages == channels:
                planes = []
                for page in range(pages):
                    opened.seek(page)
                    if len(opened.getbands()) != 1:
                        raise OSError(
                            f"page {page + 1} has {len(opened.getbands())} channels; pages that are channels have one"
                        )
                    planes.append(_grey(opened, background))
                return torch.stack(planes)
            if len(opened.getbands()) == channels:
                values = np.asarray(opened).astype(np.float32) / 255
                return torch.from_numpy(values).permute(2, 0, 1).contiguous()
            raise OSError(f"it has {len(opened.getbands())} channels and {pages} pages, --channels is {channels}")
    except Exception as error:
        raise OSError(f"{printable(path)}: {first_line(error)}") from error


def _has_grey_pages(path: Path, channels: int) -> bool:
    """Whether a file has a page of one channel for each of the channels that are wanted."""
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore")
            return getattr(opened, "n_frames", 1) == channels and len(opened.getbands()) == 1
    except Exception:  # which reading will name
        return False


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise OSError("32-bit numbers have no known range; convert the image to 16 bits")
    return values


def _grey(image: Image.Image, background: str) -> Tensor:
    """(H, W) float32 from 0 to 1; 16 bits stay 16 bits."""
    if image.mode == "F":
        raise OSError("floating-point pixels have no known range; save them as .npy with values from 0 to 1")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return torch.from_numpy(_sixteen_bits(image).astype(np.float32) / 65535)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return torch.from_numpy(np.asarray(image.convert("L")).astype(np.float32) / 255)


def _load_array(path: Path, channels: int) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise OSError("it holds several arrays; save each by itself")
        if not array.size:
            raise OSError(f"an array {array.shape} has no pixels")
        array = array.astype(array.dtype.newbyteorder("="))
        if array.ndim == 2:
            array = array[:, :, None]
        if array.ndim != 3:
            raise OSError(f"an array of {array.ndim} axes is no image")
        if array.shape[2] != channels and array.shape[0] == channels:
            array = array.transpose(1, 2, 0)
        if array.shape[2] != channels:
            raise OSError(f"an array {array.shape} has not {channels} channels, first or last; see --channels")
        if array.dtype in (np.uint8, np.uint16):
            values = array.astype(np.float32) / np.iinfo(array.dtype).max
        elif array.dtype.kind == "f":
            values = array.astype(np.float32)
        else:
            raise OSError(f"an array of {array.dtype} has no known range; use uint8, uint16, or floats from 0 to 1")
        if not (values.min() >= 0 and values.max() <= 1):  # NaN too
            raise OSError("its values are not all from 0 to 1")
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
    except Exception as error:
        why = "it is no array of numbers" if "pickle" in str(error) else first_line(error)
        raise OSError(f"{printable(path)}: {why}") from error
