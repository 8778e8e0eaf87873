"""Images with any pixel type: arrays, 16-bit colour, and TIFF files that Pillow cannot read; scales them to [0, 1]."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor
from torchvision.io import ImageReadMode, decode_png

from sparkme.errors import first_line

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BYTES, INTEGERS, FLOATS = "bytes", "integers", "floats"  # kinds of pixel types, each with its own value range
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as in Pillow
_RGB, _ALPHA, _ORIENTATION = 2, (1, 2), 274  # codes of the TIFF format


class Pixels(NamedTuple):
    """How a data set's pixel values become numbers from 0 to 1.

    Attributes:
        ranges: the pixel values that become 0 and 1, by kind of pixel type; bytes default to 0 and 255. None, as in old runs:
            integers must lie in 0 to 65535 and floats in 0 to 1.
        upright: rotate images as their EXIF orientation says.
    """

    ranges: dict[str, list[float]] | None = None
    upright: bool = True

    def stretches_bytes(self) -> bool:
        """Whether 8-bit values are scaled."""
        return self.ranges is not None and self.ranges.get(BYTES, [0, 255]) != [0, 255]


class Planes(NamedTuple):
    """An image as an array.

    Attributes:
        values: (H, W, C) of any dtype, upright if requested.
        colours: number of leading bands that are grey or colour; alpha and others follow.
        has_alpha: whether the last band is alpha.
        pages: number of pages in the file.
        orientation: the file's EXIF orientation.
    """

    values: np.ndarray
    colours: int
    has_alpha: bool = False
    pages: int = 1
    orientation: int = 1


def kind_of(dtype: np.dtype[Any]) -> str:
    """The kind of a dtype. Raises OSError if it is no pixel type."""
    if dtype == np.uint8:
        return BYTES
    if dtype.kind in "iu":
        return INTEGERS
    if dtype.kind == "f":
        return FLOATS
    raise OSError(f"{dtype} is not a pixel type; use integers or floats")


def to_tensor(planes: Planes, channels: int, background: str, pixels: Pixels) -> Tensor:
    """(C, H, W) float32, scaled so that the value range is 0 to 1; values outside it stay outside.

    Raises:
        OSError: the channels differ, or the value range is not known.
    """
    check_channels(planes, channels)
    seen = planes.values if planes.values.shape[2] == channels else planes.values[..., : planes.colours]
    values = scaled(seen, pixels)
    if planes.has_alpha and seen.shape[2] < planes.values.shape[2]:
        values = _laid_on(background, values, _opacity(planes.values[..., -1:], pixels))
    if values.shape[2] != channels:
        values = values.repeat(3, 2) if channels == 3 else (values @ _GREY)[..., None]
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def check_channels(planes: Planes, channels: int) -> None:
    """Raises OSError if the image has another number of channels and is not convertible between grey and colour."""
    bands = planes.values.shape[2]
    if bands != channels and (planes.colours, channels) not in ((1, 3), (3, 1), (1, 1), (3, 3)):
        most = max(bands, planes.pages)
        raise OSError(
            f"it has {bands} channels and {planes.pages} pages, but --channels is {channels}; pretrain with --channels {most} "
            "to use all of them"
        )


def scaled(values: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Float32 values, scaled as `pixels` says."""
    low, high = range_of(values, pixels)
    numbers: Any = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    return ((numbers - low) / (high - low)).astype(np.float32)


def range_of(values: np.ndarray, pixels: Pixels) -> tuple[float, float]:
    """The pixel values that become 0 and 1. Raises OSError if they are not known, or if values are not finite."""
    kind = kind_of(values.dtype)
    if kind == FLOATS and not np.isfinite(values).all():
        raise OSError("it has NaN or infinite values")
    if kind == BYTES:
        low, high = (pixels.ranges or {}).get(BYTES, [0, 255])
    elif pixels.ranges is not None:
        if kind not in pixels.ranges:
            raise OSError(f"it holds {values.dtype}, but no sampled image holds {kind}; pass --value-range LOW HIGH")
        low, high = pixels.ranges[kind]
    else:
        low, high = 0, 65535 if kind == INTEGERS else 1
        if not (values.min() >= low and values.max() <= high):
            raise OSError(
                f"its values are not all from {low} to {high}, so their range is not known; pass --value-range LOW HIGH"
            )
    return low, high


def _opacity(alpha: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Alpha from 0 to 1. Its maximum is that of the dtype in most files, and that of the colours in others."""
    if alpha.dtype.kind == "f":
        return alpha.astype(np.float32).clip(0, 1)
    highest = np.iinfo(alpha.dtype).max
    high = (pixels.ranges or {}).get(kind_of(alpha.dtype), [0, highest])[1]
    return (alpha.astype(np.float32) / (high if alpha.max() <= high else highest)).clip(0, 1)


def _laid_on(background: str, values: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    colour = np.array(ImageColor.getrgb(background)[:3], dtype=np.float32) / 255
    if values.shape[2] == 1:
        colour = (colour @ _GREY)[None]
    return values * opacity + colour * (1 - opacity)


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) upright, for an EXIF orientation."""
    values = values.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else values
    values = values[::-1] if orientation in (3, 4, 7, 8) else values
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


def load_array(content: Path | bytes, channels: int) -> Planes:
    """The array of a `.npy` file."""
    try:
        # Memory-mapped, so that a header that claims more than the file has takes no memory.
        array = _array_in(content) if isinstance(content, bytes) else np.load(content, allow_pickle=False, mmap_mode="r")
    except Exception as error:
        raise OSError(
            "it is not an array of numbers" if "pickle" in str(error) or "object" in str(error) else first_line(error)
        ) from error
    if not isinstance(array, np.ndarray):
        raise OSError("it holds several arrays; save each in its own file")
    return planes_of_array(array, channels)


def _array_in(content: bytes) -> np.ndarray:
    """The array in the bytes of a .npy file, without a copy."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject:
        raise OSError("it is not an array of numbers")
    count = int(np.prod(shape, dtype=object))
    return np.frombuffer(content, dtype, count, file.tell()).reshape(shape, order="F" if is_fortran else "C")


def planes_of_array(array: np.ndarray, channels: int) -> Planes:
    """Planes of an array (H, W), (H, W, C) or (C, H, W)."""
    if not array.size:
        raise OSError(f"an array {array.shape} has no pixels")
    array = np.asarray(array, array.dtype.newbyteorder("="))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise OSError(f"an array with {array.ndim} axes is not an image")
    if array.shape[2] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)
    is_grey = array.shape[2] == 1 and channels == 3
    if array.shape[2] != channels and not is_grey:
        raise OSError(f"an array {array.shape} does not have {channels} channels as its first or last axis; see --channels")
    return Planes(array.astype(np.uint8) * 255 if array.dtype == bool else array, array.shape[2])


def read_deep_png(file: BinaryIO, orientation: int, upright: bool) -> Planes:
    """A 16-bit PNG file with several channels, of which Pillow would read 8 bits."""
    file.seek(0)
    decoded = decode_png(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    values = turned(decoded.permute(1, 2, 0).numpy(), orientation if upright else 1)
    has_alpha = values.shape[2] in (2, 4)
    return Planes(values, values.shape[2] - has_alpha, has_alpha, orientation=orientation)


def read_tiff(file: BinaryIO, channels: int, upright: bool) -> Planes:
    """A TIFF file with any pixel type: bands, interleaved or not, or grey pages. Raises OSError if tifffile cannot read it."""
    try:
        import tifffile  # noqa: PLC0415  (optional)
    except ModuleNotFoundError:
        raise OSError("Pillow cannot read this kind of TIFF with all its bands and bits; pip install 'sparkme[tiff]'") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors are raised
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        first: Any = tiff.pages[0]
        samples, pages = first.samplesperpixel, len(tiff.pages)
        most = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else None
        if most is not None and first.imagewidth * first.imagelength > most:
            raise OSError(f"{first.imagewidth} x {first.imagelength} pixels are more than {most:,}; raise --max-pixels")
        if first.axes not in ("YX", "YXS", "SYX"):
            raise OSError(f"a TIFF file with axes {first.axes} is not an image")
        is_stack = samples == 1 and pages == channels
        planes = [_page(page) for page in (tiff.pages if is_stack else (first,))]
        values = np.stack(planes, 2) if is_stack else planes[0][..., None] if samples == 1 else planes[0]
        values = values.transpose(1, 2, 0) if first.axes == "SYX" else values
        orientation = int(first.tags[_ORIENTATION].value) if _ORIENTATION in first.tags else 1
        has_alpha = bool(first.extrasamples) and first.extrasamples[-1] in _ALPHA
        colours = 3 if first.photometric == _RGB else values.shape[2] - has_alpha
    return Planes(turned(values, orientation if upright else 1), colours, has_alpha, pages, orientation)


def _page(page: Any) -> np.ndarray:
    try:
        values: np.ndarray = page.asarray()
    except ValueError as error:
        missing = "; pip install 'sparkme[tiff]'" if "imagecodecs" in str(error) else ""
        raise OSError(f"{first_line(error)}{missing}") from error
    return values
