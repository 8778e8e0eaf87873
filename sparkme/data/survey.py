"""Samples a data set to find its pixel types, value ranges and orientation; a line reports them, and a run keeps them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sparkme.data.dataset import as_source
from sparkme.data.images import bits_of, check_bands, num_pages, orientation_of, read
from sparkme.data.planes import BYTES, FLOATS, INTEGERS, Pixels, Planes, check_channels, kind_of, range_of
from sparkme.data.sources import ImageSource
from sparkme.errors import UserError, first_line

LOOKED_AT = 64  # images
_BLOCKS = 8  # that those images come from, if a source has blocks
_KEPT = 2**16  # values of an image
_ROOM = 0.05  # margin, as a share of the span of values
_DARK = 0.1  # floats that stay below it are not assumed to be from 0 to 1


class Spread(NamedTuple):
    """Statistics of the pixel values of an image.

    Attributes:
        kind: see `kind_of`.
        extremes: the smallest and the largest value.
        common: the range that whole blocks of 2 x 2 pixels reach, which single defective pixels do not change.
        tail: all values outside `common`.
        some: a sample of all values.
        size: number of values.
    """

    kind: str
    extremes: tuple[float, float]
    common: tuple[float, float]
    tail: np.ndarray
    some: np.ndarray
    size: int


class Look(NamedTuple):
    """An image's type, remarks about its conversion, and its value statistics if it has more than 8 bits."""

    name: str
    remarks: list[str]
    spread: Spread | None


def find_pixels(
    images: ImageSource | Sequence[Path],
    channels: int,
    background: str,
    *,
    known: Pixels | None,
    given: list[float] | None,
    upright: bool | None,
    flag: str = "--data",
) -> tuple[Pixels, str]:
    """The conversion of pixel values: as given, as in an earlier run, or estimated from a sample of the images.

    Args:
        images: a source, or files.
        channels, background: see `load_image`.
        known: that of the run whose weights or checkpoint are used, if any.
        given: low and high from the command line, if any.
        upright: whether to rotate images as their EXIF orientation says, from the command line.
        flag: the command-line flag of the images, for messages.

    Returns:
        The conversion, and a line for people about the images.

    Raises:
        UserError: no sampled image can be read.
    """
    source, looks, problem = as_source(images), [], ""
    if upright is None:
        upright = known is None or known.upright
    is_strict = known is not None and known.ranges is None and given is None
    chosen = _chosen(source)
    for number in chosen:
        try:
            looks.append(_look_at(source, number, channels, background, upright, is_strict))
        except OSError as error:
            problem = str(error)
    if not looks:
        raise UserError(f"{flag}: none of the sampled images can be read, such as {problem}")
    spreads: dict[str, list[Spread]] = {}
    for look in looks:
        if look.spread is not None:
            spreads.setdefault(look.spread.kind, []).append(look.spread)
    pixels = Pixels(_ranges(spreads, known, given, is_part=len(chosen) < len(source)), upright)
    texts = [_range_text(kind, found, pixels, _origin(kind, known, given)) for kind, found in sorted(spreads.items())]
    if pixels.ranges is not None and pixels.stretches_bytes() and BYTES not in spreads:
        texts.append(f"{BYTES}: {_words(pixels.ranges[BYTES])} become 0 to 1, {_origin(BYTES, known, given)}")
    elif given is not None and any(look.spread is None or look.spread.kind == BYTES for look in looks):
        texts.append(f"{BYTES}: 0 to 255 become 0 to 1, since --value-range is for the deeper images")
    if len(looks) < len(chosen):
        texts.append(f"{len(chosen) - len(looks)} cannot be read, such as {problem}")
    names = f"{_names_text(looks)} ({len(chosen)} of {len(source):,} sampled)"
    return pixels, "; ".join([names, *_remarks(looks), *filter(None, texts)])


def _ranges(
    spreads: dict[str, list[Spread]], known: Pixels | None, given: list[float] | None, *, is_part: bool
) -> dict[str, list[float]] | None:
    """The range of each kind of values. A given range applies to 8 bits only if there are no deeper images."""
    deep = {kind: found for kind, found in spreads.items() if kind != BYTES}
    if given is not None:
        return dict.fromkeys((INTEGERS, FLOATS) if deep else (BYTES, INTEGERS, FLOATS), given)
    if known is None:
        return {kind: estimate_range(found, is_part=is_part) for kind, found in deep.items()}
    if known.ranges is None:
        return None
    return {
        kind: estimate_range(found, is_part=is_part) for kind, found in deep.items() if kind not in known.ranges
    } | known.ranges


def _chosen(source: ImageSource) -> list[int]:
    """Numbers of images spread over the source, from few blocks if it has blocks."""
    if source.blocks is None:
        return _over(range(len(source)), LOOKED_AT)
    ends = source.blocks.tolist()
    blocks = [range(ends[k], ends[k + 1]) for k in _over(range(len(ends) - 1), _BLOCKS)]
    return [number for block in blocks for number in _over(block, LOOKED_AT // len(blocks))]


def _over(numbers: range, count: int) -> list[int]:
    return [numbers[i * len(numbers) // count] for i in range(count)] if len(numbers) > count else [*numbers]


def _look_at(source: ImageSource, number: int, channels: int, background: str, upright: bool, is_strict: bool) -> Look:
    stored = source.read(number)
    try:
        with read(stored, channels, Pixels(upright=upright)) as found:
            if isinstance(found, Planes):
                return _look_at_planes(found, channels, background, upright, is_strict)
            return _look_at_image(found, channels, background, upright)
    except Exception as error:  # decoders may raise anything
        raise OSError(f"{stored.name}: {first_line(error)}") from error


def _look_at_planes(planes: Planes, channels: int, background: str, upright: bool, is_strict: bool) -> Look:
    check_channels(planes, channels)
    bands, remarks = planes.values.shape[2], []
    if planes.orientation != 1:
        remarks.append(_turned(upright))
    if planes.pages > 1:
        remarks.append("with one page per channel" if planes.pages == bands else _first_page(planes.pages, is_tiff=True))
    if bands != channels:
        left = bands - planes.colours - planes.has_alpha
        remarks += [f"with alpha, laid on {background} (--background)"] if planes.has_alpha else []
        remarks += [_left_out(bands, planes.colours)] if left else []
        remarks += _recoloured(planes.colours, channels)
    colours = planes.values[..., : planes.colours] if planes.has_alpha or bands != channels else planes.values
    if is_strict:
        range_of(colours, Pixels())  # raises if values are outside
    return Look(f"{bands} channel{'s' * (bands > 1)} of {colours.dtype}", remarks, spread_of(colours))


def _look_at_image(opened: Image.Image, channels: int, background: str, upright: bool) -> Look:
    check_bands(opened, channels)
    bands, pages, bits = len(opened.getbands()), num_pages(opened), bits_of(opened)
    stored = int(getattr(opened, "tag_v2", {}).get(277, bands)) if opened.format == "TIFF" else bands
    remarks = [_turned(upright)] if orientation_of(opened) != 1 else []
    if pages > 1 and opened.format != "MPO":  # MPO's further images are previews of the first
        remarks.append(_first_page(pages, is_tiff=opened.format == "TIFF"))
    if stored > bands:
        remarks.append(_left_out(stored, bands))
    if channels in (1, 3) and opened.has_transparency_data:
        remarks.append(f"with alpha, laid on {background} (--background)")
    if bits > 8:
        remarks.append(f"reduced from {bits} bits to 8, since Pillow reads no more of {opened.format} colours")
    remarks += _recoloured(1 if opened.mode in ("1", "L", "LA") else 3, channels)
    return Look({"1": "1 bit", "P": "a palette of 8 bits"}.get(opened.mode, f"{opened.mode} of 8 bits"), remarks, None)


def _turned(upright: bool) -> str:
    return "rotated as their EXIF says (--no-upright)" if upright else "not rotated as their EXIF says (--no-upright)"


def _first_page(pages: int, *, is_tiff: bool) -> str:
    if is_tiff:
        return f"with {pages} pages, the first is used (--channels {pages} uses grey pages as channels)"
    return f"with {pages} frames, the first is used"


def _left_out(stored: int, taken: int) -> str:
    return f"with {stored} bands, the first {taken} are used (--channels {stored} uses all)"


def _recoloured(colours: int, channels: int) -> list[str]:
    if (colours, channels) == (1, 3):
        return ["grey, copied to three channels"]
    return ["colour, converted to grey"] if (colours, channels) == (3, 1) else []


def spread_of(values: np.ndarray) -> Spread:
    """The statistics of (H, W, C) values. Raises OSError if some are not finite."""
    kind = kind_of(values.dtype)
    if kind == FLOATS and not np.isfinite(values).all():
        raise OSError("it has NaN or infinite values")
    low = high = values
    for axis in (0, 1):
        if values.shape[axis] > 1:
            before, after = (slice(None),) * axis + (slice(-1),), (slice(None),) * axis + (slice(1, None),)
            high, low = np.minimum(high[before], high[after]), np.maximum(low[before], low[after])
    common = float(low.min()), float(high.max())
    common = min(common), max(common)
    tail = values[(values < common[0]) | (values > common[1])].astype(np.float64)
    some = values.reshape(-1)[:: max(1, values.size // _KEPT)].astype(np.float64)
    return Spread(kind, (float(values.min()), float(values.max())), common, tail, some, values.size)


def estimate_range(spreads: list[Spread], *, is_part: bool = False) -> list[float]:
    """The expected value range of images, low and high.

    Values of single pixels count unless they lie outside the others by more than half of their span, as those of defective
    pixels do. If zero is near, it is the low end, and the high end of integers is the largest number with as many bits. Other
    ends get a margin for images outside the sample, if `is_part`.
    """
    low, high = min(s.common[0] for s in spreads), max(s.common[1] for s in spreads)
    reach = (high - low) / 2
    tail = np.concatenate([s.tail for s in spreads])
    tail = tail[(tail >= low - reach) & (tail <= high + reach)] if reach else tail
    low, high = float(tail.min(initial=low)), float(tail.max(initial=high))
    is_whole = all((s.some % 1 == 0).all() for s in spreads)
    if spreads[0].kind == FLOATS and low >= 0 and _DARK <= high <= 1:
        return [0.0, 1.0]
    room = _ROOM * (high - low) if is_part else 0.0
    is_from_zero = 0 <= low <= high / 2 or 0 <= low == high
    bottom = 0.0 if is_from_zero else low - room
    top = float(max(1, 2 ** int(high).bit_length() - 1)) if is_from_zero and is_whole else high + room
    if bottom == top:
        top += 1
    return [math.floor(bottom), math.ceil(top)] if spreads[0].kind == INTEGERS else [bottom, top]


def _origin(kind: str, known: Pixels | None, given: list[float] | None) -> str:
    if given is not None:
        return "as given"
    if known is None or (known.ranges is not None and kind not in known.ranges):
        return "estimated (--value-range LOW HIGH)"
    return "as before" if known.ranges is not None else "the range of their type, as before (--value-range LOW HIGH)"


def _range_text(kind: str, spreads: list[Spread], pixels: Pixels, origin: str) -> str:
    least, most = min(s.extremes[0] for s in spreads), max(s.extremes[1] for s in spreads)
    usual = {BYTES: [0, 255], INTEGERS: [0, 65535], FLOATS: [0, 1]}[kind]
    low, high = usual if pixels.ranges is None else pixels.ranges.get(kind, usual)
    if kind == BYTES and [low, high] == usual:
        return ""
    text = f"{kind} from {_words([least, most])}; {_words([low, high])} become 0 to 1, {origin}"
    outside = sum(_num_outside(s, low, high) for s in spreads) / sum(s.size for s in spreads)
    return f"{text}; {100 * outside:.2g} % of them lie outside and are clipped" if outside else text


def _num_outside(spread: Spread, low: float, high: float) -> float:
    """How many values of an image are outside; estimated if the range clips common values."""
    if low <= spread.common[0] and spread.common[1] <= high:
        return int(((spread.tail < low) | (spread.tail > high)).sum())
    return float(((spread.some < low) | (spread.some > high)).mean()) * spread.size


def _words(numbers: list[float]) -> str:
    return " to ".join(f"{number:.6g}" if isinstance(number, float) and number % 1 else f"{int(number)}" for number in numbers)


def _names_text(looks: list[Look]) -> str:
    names = Counter(look.name for look in looks).most_common()
    return names[0][0] if len(names) == 1 else ", ".join(f"{name} in {count}" for name, count in names)


def _remarks(looks: list[Look]) -> list[str]:
    return [f"{count} {text}" for text, count in Counter(text for look in looks for text in look.remarks).most_common()]
