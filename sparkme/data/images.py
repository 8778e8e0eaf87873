"""Decoding: files, arrays and bytes of any kind to Pillow's images, or to tensors where there is more than 8 bits of RGB."""

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
REDUCTIONS = (8, 4, 2)  # by which a JPEG decoder can leave pixels out
_JPEG, _ORIENTATION = b"\xff\xd8\xff", 0x0112  # the first bytes of a file, and the tag that says how it was held
_GREY_PHOTOMETRIC, _CMYK_PHOTOMETRIC, _SIGNED, _UNSIGNED = (0, 1), 5, 2, 1  # numbers of the TIFF format
# Back to how a file has it.
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
    """An image as its source keeps it: a file, the bytes of one, or decoded already; `name` is for people, in one line."""

    name: str
    content: Path | bytes | Decoded


class OpenImage:
    """An image whose size is known, and whose pixels are not read yet if its format allows that.

    Attributes:
        size: height and width, as they are decoded.
        mirrored: whether the file has the bottom row first, and the right column.
        outside: share of the pixels whose numbers lie outside of the data's range, and are cut to it.
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
        """The pixels. Of a JPEG file, sides may be divided by 2, 4 or 8 on the way, rounded up, for a fraction of the time:
        the decoder then transforms back the low frequencies of its 8x8 blocks only."""
        if self._jpeg is None:
            assert self._decoded is not None
            return self._decoded
        image = self._jpeg
        if reduction > 1:
            image.draft(image.mode, (max(1, image.width // reduction), max(1, image.height // reduction)))
        image.load()
        if self._orientation != 1:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it

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
    """Opens an image of any number of channels, see `load_image`.

    Raises:
        OSError: it cannot be read, or has other channels; also of what is done while it is open, since a file can be broken
            anywhere.
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
            if orientation in (5, 6, 7, 8):  # that lie on their side
                width, height = height, width
            yield OpenImage((height, width), jpeg=opened, orientation=orientation)
    except Exception as error:  # decoders fail in all ways there are
        text = first_line(error)
        raise OSError(text if text.startswith(f"{stored.name}: ") else f"{stored.name}: {text}") from error


def _inside(decoded: Decoded) -> tuple[Decoded, float]:
    """Values from 0 to 1, and the share of them that had to be cut for it."""
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
    """Raises UserError for what is no colour."""
    try:
        ImageColor.getrgb(colour)
    except ValueError:
        raise UserError(f"--background {colour} is no colour; use a name, such as black, or #rrggbb") from None


def load_rgb(path: Path, background: str = "white") -> Image.Image:
    """Decodes an image to RGB, upright if it says how it was held; more than 8 bits a channel are brought down to 8.

    A transparent image is laid on a background: what colour a file keeps under its transparent pixels is of chance.

    Args:
        path: the file.
        background: a name or #rrggbb, as PIL.ImageColor reads it.

    Raises:
        OSError: it cannot be read, whatever Pillow's own reason, or its numbers have no known range.
    """
    image = load_image(path, 3, background)
    return image if isinstance(image, Image.Image) else functional.to_pil_image((image * 255).round().byte())


def load_image(
    stored: Stored | Path,
    channels: int = 3,
    background: str = "white",
    pixels: Pixels = Pixels(),  # noqa: B008
) -> Decoded:
    """Decodes an image of any number of channels.

    Args:
        stored: an image file or its bytes, or a `.npy` array (H, W), (H, W, C) or (C, H, W) of any numbers.
        channels: how many the network takes. With 3, grey becomes colour; with 1, colours become grey; with another number the
            bands of a file, or the grey pages of a TIFF file, have to be as many.
        background: a name or #rrggbb. A transparent image is laid on it: what colour a file keeps under its transparent pixels
            is of chance.
        pixels: how numbers become values.

    Returns:
        An RGB image of Pillow's, of bytes, which travel to the device as they are, of what has 8 bits; or a (C, H, W) float32
        tensor of values from 0 to 1, with all the precision that the file has.

    Raises:
        OSError: it cannot be read, or has other channels, or its numbers have no known range.
    """
    stored = Stored(printable(stored), stored) if isinstance(stored, Path) else stored
    try:
        return _inside(_decode(stored, channels, background, pixels))[0]
    except Exception as error:  # decoders fail in all ways there are
        raise OSError(f"{stored.name}: {first_line(error)}") from error


def _decode(stored: Stored, channels: int, background: str, pixels: Pixels) -> Decoded:
    """As `load_image`; values may lie outside of 0 to 1."""
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
    """An image before its channels become the network's: Pillow's, of 8 bits and not decoded yet; or numbers."""
    content = stored.content
    if isinstance(content, Image.Image):
        yield _planes(content, None, channels, pixels.upright) or content
    elif isinstance(content, Tensor):
        yield planes.planes_of_array(content.numpy(), channels)
    elif content.suffix.lower() == ".npy" if isinstance(content, Path) else content.startswith(planes.NPY):
        yield planes.load_array(content, channels)
    else:
        # Not by its name: what Pillow then maps into memory, it turns wrongly.
        with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of palettes and tags that Pillow finds odd, and reads nevertheless
            logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # likewise; what is wrong is raised
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
    """The numbers of what has more than Pillow's images of 8 bits can hold."""
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
    """Of each band in the file, as far as it tells; Pillow's image has 8, or one band of more."""
    if opened.format == "TIFF":
        return int(max(opened.tag_v2.get(258, (1,))))
    argument = opened.tile[0][3] if getattr(opened, "tile", None) else None  # what the decoder is told
    if opened.format == "PNG":
        return 16 if str(argument).endswith(";16B") else 8
    if opened.format == "PPM":
        return int(argument[-1]).bit_length() if isinstance(argument, tuple) and isinstance(argument[-1], int) else 8
    if opened.format == "JPEG2000" and opened.fp is not None:
        opened.fp.seek(0)
        head = opened.fp.read(256)
        place = head.find(b"ihdr") + 14 if b"ihdr" in head else 42  # in the container, or in the bare codestream
        return (head[place] & 0x7F) + 1
    return 8


def _exceeds_pillow(opened: Any, channels: int) -> bool:
    """Whether a TIFF file has more bands, or more bits in several bands, than Pillow reads of it."""
    tags = opened.tag_v2
    bits, samples, photometric = max(tags.get(258, (1,))), int(tags.get(277, 1)), tags.get(262)
    is_colour_or_grey = channels in (1, 3)
    if photometric == _CMYK_PHOTOMETRIC and is_colour_or_grey:
        return False
    if samples != len(opened.getbands()):  # with an extra band beside colour or grey, Pillow leaves it out
        return not is_colour_or_grey or bits > 8 or (photometric in _GREY_PHOTOMETRIC and samples > 2)
    return samples > 1 and bits > 8


def is_deep(opened: Image.Image) -> bool:
    """Whether it has one band of more than 8 bits, or of signed ones."""
    signed = opened.format == "TIFF" and max(getattr(opened, "tag_v2", {}).get(339, (_UNSIGNED,))) == _SIGNED
    return opened.mode in ("I", "F") or opened.mode.startswith("I;16") or (opened.mode == "L" and signed)


def _numbers(opened: Any, upright: bool) -> np.ndarray:
    """(H, W) of one band; of the types that Pillow holds otherwise, as the file has it."""
    tags = getattr(opened, "tag_v2", {}) if opened.format == "TIFF" else {}
    is_unsigned, deep = tags.get(339, (_UNSIGNED,)) == (_UNSIGNED,), is_deep(opened)
    values = np.asarray(_held(opened, upright) if deep else _held(opened, upright).convert("L"))
    if opened.mode == "I" and is_unsigned and tags:
        return values.view(np.uint32)
    return values.view(np.int8) if deep and opened.mode == "L" else values.astype(values.dtype.newbyteorder("="))


def _stacked(opened: Any, channels: int, upright: bool) -> Planes:
    """A page for each channel. Pages that do not say how they are held are held as the first one."""
    orientation, pages = orientation_of(opened), []
    for page in range(channels):
        opened.seek(page)
        if len(opened.getbands()) != 1:
            raise OSError(f"page {page + 1} has {len(opened.getbands())} channels; pages that are channels have one")
        says = _ORIENTATION in opened.tag_v2
        pages.append(planes.turned(_numbers(opened, upright), 1 if says or not upright else orientation))
    if len(different := {page.dtype for page in pages}) > 1:
        raise OSError(f"its pages hold different numbers: {', '.join(sorted(map(str, different)))}")
    return Planes(np.stack(pages, 2), channels, pages=channels, orientation=orientation)


def orientation_of(opened: Any) -> int:
    """How the image is held, from 1 to 8 as EXIF counts."""
    orientation = opened.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _TURNED_BACK else 1


def num_pages(opened: Image.Image) -> int:
    """Pages, or frames of an animation."""
    try:
        return int(getattr(opened, "n_frames", 1))
    except Exception:  # which reading will name
        return 1


def _held(opened: Image.Image, upright: bool) -> Image.Image:
    """Upright, or as the file has it; Pillow itself turns TIFF files."""
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
    """Raises OSError where an image of 8 bits has not so many channels, and grey and colour cannot be had from it."""
    bands = len(opened.getbands())
    if channels not in (1, 3) and bands != channels:
        raise OSError(f"it has {bands} channels and {num_pages(opened)} pages, --channels is {channels}")
