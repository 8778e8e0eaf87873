"""Decoding: files, arrays and bytes of any kind to Pillow's images, or to tensors where there is more than 8 bits of RGB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional

from sparkme.errors import first_line

Decoded = Image.Image | Tensor
REDUCTIONS = (8, 4, 2)  # by which a JPEG decoder can leave pixels out
_JPEG, _ORIENTATION = b"\xff\xd8\xff", 0x0112  # the first bytes of a file, and the tag that says how it was held


class Stored(NamedTuple):
    """An image as its source keeps it: a file, the bytes of one, or decoded already; `name` is for people, in one line."""

    name: str
    content: Path | bytes | Decoded


class OpenImage:
    """An image whose size is known, and whose pixels are not read yet if its format allows that.

    Attributes:
        size: height and width, upright.
        mirrored: whether the file has the bottom row first, and the right column.
    """

    def __init__(
        self, size: tuple[int, int], jpeg: Image.Image | None = None, decoded: Decoded | None = None,
        mirrored: tuple[bool, bool] = (False, False),
    ) -> None:  # fmt: skip
        self.size, self._jpeg, self._decoded, self.mirrored = size, jpeg, decoded, mirrored

    def decode(self, reduction: int = 1) -> Decoded:
        """The pixels. Of a JPEG file, sides may be divided by 2, 4 or 8 on the way, rounded up, for a fraction of the time:
        the decoder then transforms back the low frequencies of its 8x8 blocks only."""
        if self._jpeg is None:
            assert self._decoded is not None
            return self._decoded
        image = self._jpeg
        if reduction > 1:
            image.draft(image.mode, (max(1, image.width // reduction), max(1, image.height // reduction)))
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it

    @property
    def can_reduce(self) -> bool:
        return self._jpeg is not None


@contextmanager
def open_image(stored: Stored, channels: int = 3, background: str = "white") -> Iterator[OpenImage]:
    """Opens an image of any number of channels, see `load_image`.

    Raises:
        OSError: it cannot be read, or has other channels; also of what is done while it is open, since a file can be broken
            anywhere.
    """
    try:
        if channels != 3 or not _is_jpeg(stored.content):
            decoded = _decode(stored, channels, background)
            height, width = functional.get_size(decoded)
            yield OpenImage((height, width), decoded=decoded)
            return
        with warnings.catch_warnings(), Image.open(_file(stored.content), formats=("JPEG", "MPO")) as opened:
            warnings.simplefilter("ignore")
            width, height = opened.size
            orientation = opened.getexif().get(_ORIENTATION, 1)
            if orientation in (5, 6, 7, 8):  # that lie on their side
                width, height = height, width
            yield OpenImage((height, width), jpeg=opened, mirrored=(orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)))
    except Exception as error:  # decoders fail in all ways there are
        text = first_line(error)
        raise OSError(text if text.startswith(f"{stored.name}: ") else f"{stored.name}: {text}") from error


def _is_jpeg(content: Path | bytes | Decoded) -> bool:
    if isinstance(content, Path) and content.suffix.lower() in (".jpg", ".jpeg"):
        with content.open("rb", buffering=0) as file:
            return file.read(3) == _JPEG
    return isinstance(content, bytes) and content.startswith(_JPEG)


def _file(content: Path | bytes | Decoded) -> Path | io.BytesIO:
    assert isinstance(content, Path | bytes)
    return content if isinstance(content, Path) else io.BytesIO(content)


def printable(path: Path | str) -> str:
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
        return _rgb(path, background)
    except Exception as error:  # decoders fail in all ways there are
        raise OSError(f"{printable(path)}: {first_line(error)}") from error


def load_image(stored: Stored | Path, channels: int = 3, background: str = "white") -> Decoded:
    """Decodes an image of any number of channels.

    Args:
        stored: an image file or its bytes, or a `.npy` array (H, W), (H, W, C) or (C, H, W) of uint8, uint16, or floats from 0
            to 1.
        channels: how many the network takes. With 3, files are read by `load_rgb`; with 1, colours become grey; with another
            number the channels of an array, or the grey pages of a TIFF file, have to be as many.
        background: see `load_rgb`.

    Returns:
        An RGB image of Pillow's, of bytes, which travel to the device as they are; or a (C, H, W) float32 tensor of values
        from 0 to 1, with all the precision that the file has.

    Raises:
        OSError: it cannot be read, or has other channels.
    """
    stored = Stored(printable(stored), stored) if isinstance(stored, Path) else stored
    try:
        return _decode(stored, channels, background)
    except Exception as error:  # decoders fail in all ways there are
        raise OSError(f"{stored.name}: {first_line(error)}") from error


def _decode(stored: Stored, channels: int, background: str) -> Decoded:
    content = stored.content
    if isinstance(content, Image.Image):
        return _from_pillow(content, channels, background)
    if isinstance(content, Tensor):
        return _from_array(content.numpy(), channels)
    if content.suffix.lower() == ".npy" if isinstance(content, Path) else content.startswith(_NPY):
        return _load_array(content, channels)
    if channels == 3 and not (_may_have_pages(content) and _has_grey_pages(content, channels)):
        return _rgb(content, background)
    with warnings.catch_warnings(), Image.open(_file(content)) as opened:
        warnings.simplefilter("ignore")
        return _from_pillow(opened, channels, background)


def _rgb(content: Path | bytes, background: str) -> Image.Image:
    with warnings.catch_warnings(), Image.open(_file(content)) as opened:
        warnings.simplefilter("ignore")  # of palettes and tags that Pillow finds odd, and reads nevertheless
        return _to_rgb(opened, background)


def _to_rgb(opened: Image.Image, background: str) -> Image.Image:
    image = ImageOps.exif_transpose(opened)
    if image.mode == "F":
        raise OSError("floating-point pixels have no known range; convert the image to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((_sixteen_bits(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _from_pillow(opened: Image.Image, channels: int, background: str) -> Decoded:
    pages, bands = getattr(opened, "n_frames", 1), len(opened.getbands())
    if channels == 3 and not (pages == 3 and bands == 1):
        return _to_rgb(opened, background)
    if channels == 1:
        return _grey(ImageOps.exif_transpose(opened), background).unsqueeze(0)
    if pages == channels:
        planes = []
        for page in range(pages):
            opened.seek(page)
            if len(opened.getbands()) != 1:
                raise OSError(f"page {page + 1} has {len(opened.getbands())} channels; pages that are channels have one")
            planes.append(_grey(opened, background))
        return torch.stack(planes)
    if bands == channels:
        values = np.asarray(opened).astype(np.float32) / 255
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()
    raise OSError(f"it has {bands} channels and {pages} pages, --channels is {channels}")


def _may_have_pages(content: Path | bytes) -> bool:
    if isinstance(content, Path):
        return content.suffix.lower() in (".tif", ".tiff")
    return content[:4] in (b"II*\0", b"MM\0*")


def _has_grey_pages(content: Path | bytes, channels: int) -> bool:
    """Whether a file has a page of one channel for each of the channels that are wanted."""
    try:
        with warnings.catch_warnings(), Image.open(_file(content)) as opened:
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


_NPY = b"\x93NUMPY"


def _load_array(content: Path | bytes, channels: int) -> Tensor:
    try:
        # Mapped, so that a head which promises more than the file has takes no memory.
        array = _array_in(content) if isinstance(content, bytes) else np.load(content, allow_pickle=False, mmap_mode="r")
    except Exception as error:
        raise OSError(
            "it is no array of numbers" if "pickle" in str(error) or "object" in str(error) else first_line(error)
        ) from error
    if not isinstance(array, np.ndarray):
        raise OSError("it holds several arrays; save each by itself")
    return _from_array(array, channels)


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


def _from_array(array: np.ndarray, channels: int) -> Tensor:
    if not array.size:
        raise OSError(f"an array {array.shape} has no pixels")
    array = np.asarray(array, array.dtype.newbyteorder("="))
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
