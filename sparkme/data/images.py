"""Decodes files, arrays and bytes to Pillow images, or to tensors if they have more than 8 bits or other channels."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from sparkme.data import planes
from sparkme.data.planes import Pixels, Planes
from sparkme.errors import UserError, first_line
from sparkme.text import printable

Decoded = Image.Image | Tensor
REDUCTIONS = (8, 4, 2)  # factors by which a JPEG decoder can shrink an image
_JPEG, _ORIENTATION = b"\xff\xd8\xff", 0x0112  # the first bytes of a file, and the EXIF tag
_GREY_PHOTOMETRIC, _CMYK_PHOTOMETRIC, _SIGNED, _UNSIGNED = (0, 1), 5, 2, 1  # codes of the TIFF format
# By EXIF orientation: the inverse of the rotation that makes an image upright.
_TURNED_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class Stored(NamedTuple):
    """An image as its source stores it: a file, its bytes, or decoded; and a one-line name for people."""

    name: str
    content: Path | bytes | Decoded


class OpenImage:
    """An image whose size is known, and whose pixels are decoded later if its format allows that.

    Attributes:
        size: height and width after decoding.
        mirrored: whether the file stores the bottom row first, and the right column first.
        outside: share of the pixel values that lie outside the value range and are clipped.
    """

    def __init__(
        self,
        size: tuple[int, int],
        jpeg: Image.Image | None = None,
        decoded: Decoded | None = None,
        orientation: int = 1,
        outside: float = 0.0,
    ) -> None:
        self.size, self._jpeg, self._decoded, self._orientation, self.outside = size, jpeg, decoded, orientation, outside
        self.mirrored = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)

    def decode(self, reduction: int = 1) -> Decoded:
        """The pixels. A JPEG decoder can divide the sides by 2, 4 or 8, rounded up, in a fraction of the time, since it then
        uses only the low frequencies of its 8x8 blocks."""
        if self._jpeg is None:
            assert self._decoded is not None
            return self._decoded
        image = self._jpeg
        if reduction > 1:
            image.draft(image.mode, (max(1, image.width // reduction), max(1, image.height // reduction)))
        image.load()
        if self._orientation != 1:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB")  # converting would copy it

    @property
    def can_reduce(self) -> bool:
        return self._jpeg is not None


@contextmanager
def open_image(
    stored: Stored,
    channels: int = 3,
    background: str = "white",
    pixels: Pixels = Pixels(),  # noqa: B008
) -> Iterator[OpenImage]:
    """Opens an image with any number of channels, see `load_image`.

    Raises:
        OSError: the image cannot be read, or has other channels; also for errors inside the `with` block, since a file can be
            broken anywhere.
    """
    try:
        if channels != 3 or pixels.stretches_bytes() or not _is_jpeg(stored.content):
            decoded, outside = _inside(_decode(stored, channels, background, pixels))
            height, width = functional.get_size(decoded)
            yield OpenImage((height, width), decoded=decoded, outside=outside)
            return
        with warnings.catch_warnings(), Image.open(_file(stored.content), formats=("JPEG", "MPO")) as opened:
            warnings.simplefilter("ignore")
            width, height = opened.size
            orientation = opened.getexif().get(_ORIENTATION, 1) if pixels.upright else 1
            if orientation in (5, 6, 7, 8):  # rotated by 90 degrees
                width, height = height, width
            yield OpenImage((height, width), jpeg=opened, orientation=orientation)
    except Exception as error:  # decoders may raise anything
        text = first_line(error)
        raise OSError(text if text.startswith(f"{stored.name}: ") else f"{stored.name}: {text}") from error


def _inside(decoded: Decoded) -> tuple[Decoded, float]:
    """Values clipped to 0 to 1, and the share that was clipped."""
    if isinstance(decoded, Image.Image):
        return decoded, 0.0
    cut = decoded.clamp(0, 1)
    return cut, float((cut != decoded).float().mean())


def _is_jpeg(content: Path | bytes | Decoded) -> bool:
    if isinstance(content, Path) and content.suffix.lower() in (".jpg", ".jpeg"):
        with content.open("rb", buffering=0) as file:
            return file.read(3) == _JPEG
    return isinstance(content, bytes) and content.startswith(_JPEG)


def _file(content: Path | bytes | Decoded) -> Path | io.BytesIO:
    assert isinstance(content, Path | bytes)
    return content if isinstance(content, Path) else io.BytesIO(content)


def check_background(colour: str) -> None:
    try:
        ImageColor.getrgb(colour)
    except ValueError:
        raise UserError(f"--background {colour} is not a colour; use a name, such as black, or #rrggbb") from None


def load_rgb(path: Path, background: str = "white") -> Image.Image:
    """Decodes an image to upright 8-bit RGB, see `load_image`."""
    image = load_image(path, 3, background)
    return image if isinstance(image, Image.Image) else functional.to_pil_image((image * 255).round().byte())


def load_image(
    stored: Stored | Path,
    channels: int = 3,
    background: str = "white",
    pixels: Pixels = Pixels(),  # noqa: B008
) -> Decoded:
    """Decodes an image with any number of channels.

    Args:
        stored: an image file or its bytes, or a `.npy` array (H, W), (H, W, C) or (C, H, W).
        channels: the network's number of channels. With 3, grey becomes colour; with 1, colour becomes grey; any other number
            must be that of the file's bands or of a TIFF file's grey pages.
        background: a name or #rrggbb, behind transparent pixels, whose own colour is arbitrary.
        pixels: conversion of pixel values.

    Returns:
        A Pillow RGB image for 8-bit images, so that bytes are copied to the device; otherwise a (C, H, W) float32 tensor of
        values from 0 to 1, with the precision of the file.

    Raises:
        OSError: the image cannot be read, has other channels, or has an unknown value range.
    """
    stored = Stored(printable(stored), stored) if isinstance(stored, Path) else stored
    try:
        return _inside(_decode(stored, channels, background, pixels))[0]
    except Exception as error:  # decoders may raise anything
        raise OSError(f"{stored.name}: {first_line(error)}") from error


def _decode(stored: Stored, channels: int, background: str, pixels: Pixels) -> Decoded:
    """As `load_image`, without clipping to 0 to 1."""
    with read(stored, channels, pixels) as found:
        if isinstance(found, Planes):
            return planes.to_tensor(found, channels, background, pixels)
        decoded = _from_pillow(found, channels, background, pixels)
    if not pixels.stretches_bytes():
        return decoded
    assert pixels.ranges is not None
    low, high = pixels.ranges[planes.BYTES]
    values = decoded if isinstance(decoded, Tensor) else functional.pil_to_tensor(decoded).float() / 255
    return (values * 255 - low) / (high - low)


@contextmanager
def read(stored: Stored, channels: int, pixels: Pixels) -> Iterator[Image.Image | Planes]:
    """An image before conversion of its channels: an 8-bit Pillow image that is not decoded yet, or `Planes`."""
    content = stored.content
    if isinstance(content, Image.Image):
        yield _planes(content, None, channels, pixels.upright) or content
    elif isinstance(content, Tensor):
        yield planes.planes_of_array(content.numpy(), channels)
    elif content.suffix.lower() == ".npy" if isinstance(content, Path) else content.startswith(planes.NPY):
        yield planes.load_array(content, channels)
    else:
        # Not by name: Pillow would then map it into memory, and rotate it wrongly.
        with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd palettes and tags that Pillow reads nevertheless
            logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # likewise; errors are raised
            try:
                opened: Image.Image = Image.open(file)
            except UnidentifiedImageError:
                file.seek(0)
                if not file.read(4).startswith(planes.TIFF):
                    raise
                yield planes.read_tiff(file, channels, pixels.upright)
                return
            yield _planes(opened, file, channels, pixels.upright) or opened


def _planes(opened: Image.Image, file: BinaryIO | None, channels: int, upright: bool) -> Planes | None:
    """The values of an image that Pillow's 8-bit modes cannot hold."""
    if opened.format == "TIFF":
        if file is not None and _exceeds_pillow(opened, channels):
            return planes.read_tiff(file, channels, upright)
        if channels > 1 and len(opened.getbands()) == 1 and num_pages(opened) == channels:
            return _stacked(opened, channels, upright)
    if is_deep(opened):
        orientation = orientation_of(opened)
        pages = num_pages(opened) if opened.format == "TIFF" else 1
        return Planes(_numbers(opened, upright)[:, :, None], 1, pages=pages, orientation=orientation)
    if file is not None and opened.format == "PNG" and bits_of(opened) == 16:
        return planes.read_deep_png(file, orientation_of(opened), upright)
    return None


def bits_of(opened: Any) -> int:
    """Bits per band in the file, if known; Pillow's image has 8, or one band with more."""
    if opened.format == "TIFF":
        return int(max(opened.tag_v2.get(258, (1,))))
    argument = opened.tile[0][3] if getattr(opened, "tile", None) else None  # the decoder's arguments
    if opened.format == "PNG":
        return 16 if str(argument).endswith(";16B") else 8
    if opened.format == "PPM":
        return int(argument[-1]).bit_length() if isinstance(argument, tuple) and isinstance(argument[-1], int) else 8
    if opened.format == "JPEG2000" and opened.fp is not None:
        opened.fp.seek(0)
        head = opened.fp.read(256)
        place = head.find(b"ihdr") + 14 if b"ihdr" in head else 42  # in the container or in the bare codestream
        return (head[place] & 0x7F) + 1
    return 8


def _exceeds_pillow(opened: Any, channels: int) -> bool:
    """Whether a TIFF file has more bands, or more bits in several bands, than Pillow reads."""
    tags = opened.tag_v2
    bits, samples, photometric = max(tags.get(258, (1,))), int(tags.get(277, 1)), tags.get(262)
    is_colour_or_grey = channels in (1, 3)
    if photometric == _CMYK_PHOTOMETRIC and is_colour_or_grey:
        return False
    if samples != len(opened.getbands()):  # Pillow drops an extra band beside colour or grey
        return not is_colour_or_grey or bits > 8 or (photometric in _GREY_PHOTOMETRIC and samples > 2)
    return samples > 1 and bits > 8


def is_deep(opened: Image.Image) -> bool:
    """Whether it has one band with more than 8 bits or with signed values."""
    signed = opened.format == "TIFF" and max(getattr(opened, "tag_v2", {}).get(339, (_UNSIGNED,))) == _SIGNED
    return opened.mode in ("I", "F") or opened.mode.startswith("I;16") or (opened.mode == "L" and signed)


def _numbers(opened: Any, upright: bool) -> np.ndarray:
    """(H, W) of one band, in the file's dtype."""
    tags = getattr(opened, "tag_v2", {}) if opened.format == "TIFF" else {}
    is_unsigned, deep = tags.get(339, (_UNSIGNED,)) == (_UNSIGNED,), is_deep(opened)
    values = np.asarray(_held(opened, upright) if deep else _held(opened, upright).convert("L"))
    if opened.mode == "I" and is_unsigned and tags:
        return values.view(np.uint32)
    return values.view(np.int8) if deep and opened.mode == "L" else values.astype(values.dtype.newbyteorder("="))


def _stacked(opened: Any, channels: int, upright: bool) -> Planes:
    """Planes of one page per channel. Pages without an orientation have the first page's."""
    orientation, pages = orientation_of(opened), []
    for page in range(channels):
        opened.seek(page)
        if len(opened.getbands()) != 1:
            raise OSError(f"page {page + 1} has {len(opened.getbands())} channels; each page must have one")
        says = _ORIENTATION in opened.tag_v2
        pages.append(planes.turned(_numbers(opened, upright), 1 if says or not upright else orientation))
    if len(different := {page.dtype for page in pages}) > 1:
        raise OSError(f"its pages have different dtypes: {', '.join(sorted(map(str, different)))}")
    return Planes(np.stack(pages, 2), channels, pages=channels, orientation=orientation)


def orientation_of(opened: Any) -> int:
    """The EXIF orientation, from 1 to 8."""
    orientation = opened.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _TURNED_BACK else 1


def num_pages(opened: Image.Image) -> int:
    """Pages, or frames of an animation."""
    try:
        return int(getattr(opened, "n_frames", 1))
    except Exception:  # reading the image will report it
        return 1


def _held(opened: Image.Image, upright: bool) -> Image.Image:
    """The image upright, or as the file stores it; Pillow always rotates TIFF files."""
    if upright:
        return ImageOps.exif_transpose(opened)
    orientation = orientation_of(opened)
    opened.load()
    return opened.transpose(_TURNED_BACK[orientation]) if opened.format == "TIFF" and orientation != 1 else opened


def _from_pillow(opened: Image.Image, channels: int, background: str, pixels: Pixels) -> Decoded:
    check_bands(opened, channels)
    image = _held(opened, pixels.upright)
    if channels not in (1, 3):
        values = np.asarray(image).astype(np.float32) / 255
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if channels == 3:
        return image.convert("RGB")
    return torch.from_numpy(np.asarray(image.convert("L")).astype(np.float32) / 255).unsqueeze(0)


def check_bands(opened: Image.Image, channels: int) -> None:
    """Raises OSError if an 8-bit image has another number of channels and is not convertible between grey and colour."""
    bands = len(opened.getbands())
    if channels not in (1, 3) and bands != channels:
        raise OSError(f"it has {bands} channels and {num_pages(opened)} pages, but --channels is {channels}")
