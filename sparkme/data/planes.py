"""Images of any numbers: arrays, 16 bits of colour, and TIFF files that Pillow cannot read; and how numbers become values."""

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
BYTES, INTEGERS, FLOATS = "bytes", "integers", "floats"  # the kinds of numbers that have a range each
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as Pillow
_RGB, _ALPHA, _ORIENTATION = 2, (1, 2), 274  # numbers of the TIFF format


class Pixels(NamedTuple):
    """How the numbers of a data set's images become values from 0 to 1.

    Attributes:
        ranges: which numbers become 0 and 1, for each kind of them that the data has. 8 bits are from 0 to 255 if nothing is
            said. None, as in runs that did not ask the data: integers are from 0 to 65535 and floats from 0 to 1, or refused.
        upright: whether images are turned as their EXIF says.
    """

    ranges: dict[str, list[float]] | None = None
    upright: bool = True

    def stretches_bytes(self) -> bool:
        """Whether 8 bits are not taken as they are."""
        return self.ranges is not None and self.ranges.get(BYTES, [0, 255]) != [0, 255]


class Planes(NamedTuple):
    """An image as numbers.

    Attributes:
        values: (H, W, C) of any type, upright if that was asked for.
        colours: how many of the bands, from the first one, are what is to be seen. Alpha or others come after them.
        has_alpha: whether the last band says how opaque the pixels are.
        pages: of the file.
        orientation: that the file says, as EXIF counts.
    """

    values: np.ndarray
    colours: int
    has_alpha: bool = False
    pages: int = 1
    orientation: int = 1


def kind_of(dtype: np.dtype[Any]) -> str:
    """Which kind of numbers a type is of.

    Raises:
        OSError: of none.
    """
    if dtype == np.uint8:
        return BYTES
    if dtype.kind in "iu":
        return INTEGERS
    if dtype.kind == "f":
        return FLOATS
    raise OSError(f"{dtype} is no type of numbers that are pixels; use integers or floats")


def to_tensor(planes: Planes, channels: int, background: str, pixels: Pixels) -> Tensor:
    """(C, H, W) float32: the range of the data from 0 to 1, and what lies outside of the range outside.

    Raises:
        OSError: there are other channels, or the range of the numbers is not known.
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
    """Raises OSError where an image has not so many channels, and grey and colour cannot be had from it."""
    bands = planes.values.shape[2]
    if bands != channels and (planes.colours, channels) not in ((1, 3), (3, 1), (1, 1), (3, 3)):
        most = max(bands, planes.pages)
        raise OSError(
            f"it has {bands} channels and {planes.pages} pages, --channels is {channels}; pretraining with --channels {most} "
            "takes all of them"
        )


def scaled(values: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Float32; see `Pixels`."""
    low, high = range_of(values, pixels)
    numbers: Any = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    return ((numbers - low) / (high - low)).astype(np.float32)


def range_of(values: np.ndarray, pixels: Pixels) -> tuple[float, float]:
    """The numbers that become 0 and 1.

    Raises:
        OSError: they are not known; or some of the values are not finite.
    """
    kind = kind_of(values.dtype)
    if kind == FLOATS and not np.isfinite(values).all():
        raise OSError("it has values that are no numbers (NaN), or infinite")
    if kind == BYTES:
        low, high = (pixels.ranges or {}).get(BYTES, [0, 255])
    elif pixels.ranges is not None:
        if kind not in pixels.ranges:
            raise OSError(f"it holds {values.dtype}, and no image that was looked at holds {kind}; pass --value-range LOW HIGH")
        low, high = pixels.ranges[kind]
    else:
        low, high = 0, 65535 if kind == INTEGERS else 1
        if not (values.min() >= low and values.max() <= high):
            raise OSError(
                f"its values are not all from {low} to {high}, so their range is not known; pass --value-range LOW HIGH"
            )
    return low, high


def _opacity(alpha: np.ndarray, pixels: Pixels) -> np.ndarray:
    """From 0 to 1. Most writers count up to what the type holds, others up to what the colours do."""
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
    """(H, W, ...) upright, of an image that was held as EXIF's number says."""
    values = values.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else values
    values = values[::-1] if orientation in (3, 4, 7, 8) else values
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


def load_array(content: Path | bytes, channels: int) -> Planes:
    """The array of a `.npy` file."""
    try:
        # Mapped, so that a head which promises more than the file has takes no memory.
        array = _array_in(content) if isinstance(content, bytes) else np.load(content, allow_pickle=False, mmap_mode="r")
    except Exception as error:
        raise OSError(
            "it is no array of numbers" if "pickle" in str(error) or "object" in str(error) else first_line(error)
        ) from error
    if not isinstance(array, np.ndarray):
        raise OSError("it holds several arrays; save each by itself")
    return planes_of_array(array, channels)


def _array_in(content: bytes) -> np.ndarray:
    """The array whose file these bytes are, without a copy."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject:
        raise OSError("it is no array of numbers")
    count = int(np.prod(shape, dtype=object))
    return np.frombuffer(content, dtype, count, file.tell()).reshape(shape, order="F" if is_fortran else "C")


def planes_of_array(array: np.ndarray, channels: int) -> Planes:
    """(H, W), (H, W, C) or (C, H, W)."""
    if not array.size:
        raise OSError(f"an array {array.shape} has no pixels")
    array = np.asarray(array, array.dtype.newbyteorder("="))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise OSError(f"an array of {array.ndim} axes is no image")
    if array.shape[2] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)
    is_grey = array.shape[2] == 1 and channels == 3
    if array.shape[2] != channels and not is_grey:
        raise OSError(f"an array {array.shape} has not {channels} channels, first or last; see --channels")
    return Planes(array.astype(np.uint8) * 255 if array.dtype == bool else array, array.shape[2])


def read_deep_png(file: BinaryIO, orientation: int, upright: bool) -> Planes:
    """A PNG file with 16 bits of more than one channel, of which Pillow reads 8."""
    file.seek(0)
    decoded = decode_png(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    values = turned(decoded.permute(1, 2, 0).numpy(), orientation if upright else 1)
    has_alpha = values.shape[2] in (2, 4)
    return Planes(values, values.shape[2] - has_alpha, has_alpha, orientation=orientation)


def read_tiff(file: BinaryIO, channels: int, upright: bool) -> Planes:
    """A TIFF file as it is: any number of bands, interleaved or not, or as many grey pages; any type of numbers.

    Raises:
        OSError: tifffile is not installed, or cannot read it.
    """
    try:
        import tifffile  # noqa: PLC0415  (optional)
    except ModuleNotFoundError:
        raise OSError("Pillow cannot read this kind of TIFF with all its bands and bits; pip install 'sparkme[tiff]'") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong is raised
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        first: Any = tiff.pages[0]
        samples, pages = first.samplesperpixel, len(tiff.pages)
        most = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else None
        if most is not None and first.imagewidth * first.imagelength > most:
            raise OSError(f"{first.imagewidth} x {first.imagelength} pixels are more than {most:,}")
        if first.axes not in ("YX", "YXS", "SYX"):
            raise OSError(f"a TIFF with axes {first.axes} is no image")
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
