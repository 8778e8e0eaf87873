"""What the images of a data set are like: found once from some of them, told in a line, and kept with a run."""

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
_BLOCKS = 8  # that those images come from, where it is slow to read one by itself
_KEPT = 2**16  # numbers of an image
_ROOM = 0.05  # of what the numbers span
_DARK = 0.1  # floats that stay below it are not taken to be from 0 to 1


class Spread(NamedTuple):
    """The numbers of an image.

    Attributes:
        kind: see `kind_of`.
        extremes: the least and the largest.
        common: likewise, of those that a whole block of 2 x 2 pixels does not fall below, or exceed; single defective pixels do
            not change them.
        tail: all that lie outside of `common`.
        some: a part of all of them.
        size: how many there are.
    """

    kind: str
    extremes: tuple[float, float]
    common: tuple[float, float]
    tail: np.ndarray
    some: np.ndarray
    size: int


class Look(NamedTuple):
    """What an image is, what becomes of it, and its numbers if they are more than Pillow's 8 bits."""

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
    """How the images' numbers become values: as given, as known, or as some of the images let one estimate.

    Args:
        images: a source, or files.
        channels, background: see `load_image`.
        known: what a run before this one, whose weights or checkpoint are taken, found; None if there is none.
        given: low and high, where the command line says them.
        upright: whether to turn images as their EXIF says, where the command line says so.
        flag: what the images were given by, for messages.

    Returns:
        It, and for people what the images are and what becomes of them.

    Raises:
        UserError: none of them can be read.
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
        raise UserError(f"{flag}: none of the images that were looked at can be read, such as {problem}")
    spreads: dict[str, list[Spread]] = {}
    for look in looks:
        if look.spread is not None:
            spreads.setdefault(look.spread.kind, []).append(look.spread)
    pixels = Pixels(_ranges(spreads, known, given, is_part=len(chosen) < len(source)), upright)
    texts = [_range_text(kind, found, pixels, _origin(kind, known, given)) for kind, found in sorted(spreads.items())]
    if pixels.ranges is not None and pixels.stretches_bytes() and BYTES not in spreads:
        texts.append(f"{BYTES}: {_words(pixels.ranges[BYTES])} become 0 to 1, {_origin(BYTES, known, given)}")
    elif given is not None and any(look.spread is None or look.spread.kind == BYTES for look in looks):
        texts.append(f"{BYTES}: 0 to 255 become 0 to 1, since others have more than 8 bits")
    if len(looks) < len(chosen):
        texts.append(f"{len(chosen) - len(looks)} cannot be read, such as {problem}")
    names = f"{_names_text(looks)} ({len(chosen)} of {len(source):,} looked at)"
    return pixels, "; ".join([names, *_remarks(looks), *filter(None, texts)])


def _ranges(
    spreads: dict[str, list[Spread]], known: Pixels | None, given: list[float] | None, *, is_part: bool
) -> dict[str, list[float]] | None:
    """Of each kind of numbers. 8 bits have one of their own if it is given, and nothing deeper is there."""
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
    """Numbers of images all over the source; of few blocks where a source has blocks."""
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
    except Exception as error:  # decoders fail in all ways there are
        raise OSError(f"{stored.name}: {first_line(error)}") from error


def _look_at_planes(planes: Planes, channels: int, background: str, upright: bool, is_strict: bool) -> Look:
    check_channels(planes, channels)
    bands, remarks = planes.values.shape[2], []
    if planes.orientation != 1:
        remarks.append(_turned(upright))
    if planes.pages > 1:
        remarks.append("whose pages are the channels" if planes.pages == bands else _first_page(planes.pages, is_tiff=True))
    if bands != channels:
        left = bands - planes.colours - planes.has_alpha
        remarks += [f"with alpha, laid on {background} (--background)"] if planes.has_alpha else []
        remarks += [_left_out(bands, planes.colours)] if left else []
        remarks += _recoloured(planes.colours, channels)
    colours = planes.values[..., : planes.colours] if planes.has_alpha or bands != channels else planes.values
    if is_strict:
        range_of(colours, Pixels())  # refuses what it does not hold
    return Look(f"{bands} channel{'s' * (bands > 1)} of {colours.dtype}", remarks, spread_of(colours))


def _look_at_image(opened: Image.Image, channels: int, background: str, upright: bool) -> Look:
    check_bands(opened, channels)
    bands, pages, bits = len(opened.getbands()), num_pages(opened), bits_of(opened)
    stored = int(getattr(opened, "tag_v2", {}).get(277, bands)) if opened.format == "TIFF" else bands
    remarks = [_turned(upright)] if orientation_of(opened) != 1 else []
    if pages > 1 and opened.format != "MPO":  # whose further images are previews of the first one
        remarks.append(_first_page(pages, is_tiff=opened.format == "TIFF"))
    if stored > bands:
        remarks.append(_left_out(stored, bands))
    if channels in (1, 3) and opened.has_transparency_data:
        remarks.append(f"with alpha, laid on {background} (--background)")
    if bits > 8:
        remarks.append(f"brought down from {bits} bits to 8, since Pillow reads no more of colours in {opened.format}")
    remarks += _recoloured(1 if opened.mode in ("1", "L", "LA") else 3, channels)
    return Look({"1": "1 bit", "P": "a palette of 8 bits"}.get(opened.mode, f"{opened.mode} of 8 bits"), remarks, None)


def _turned(upright: bool) -> str:
    return "turned as their EXIF says (--no-upright)" if upright else "not turned, though their EXIF says so (--no-upright)"


def _first_page(pages: int, *, is_tiff: bool) -> str:
    if is_tiff:
        return f"with {pages} pages, of which the first is taken (--channels {pages} takes grey pages for channels)"
    return f"with {pages} frames, of which the first is taken"


def _left_out(stored: int, taken: int) -> str:
    return f"with {stored} bands, of which the first {taken} are taken (--channels {stored} takes all)"


def _recoloured(colours: int, channels: int) -> list[str]:
    if (colours, channels) == (1, 3):
        return ["grey, taken as three equal channels"]
    return ["of colour, made grey"] if (colours, channels) == (3, 1) else []


def spread_of(values: np.ndarray) -> Spread:
    """Of (H, W, C) numbers.

    Raises:
        OSError: there are some that are not finite.
    """
    kind = kind_of(values.dtype)
    if kind == FLOATS and not np.isfinite(values).all():
        raise OSError("it has values that are no numbers (NaN), or infinite")
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
    """Low and high of what the numbers of images can be expected to be.

    Numbers of single pixels count unless they lie farther outside of the others than half of those span, as those of defective
    pixels do. Where zero is near, it is the low end; then whole numbers have the largest number of so many bits for high end.
    Other ends leave room for images that are not among these, if `is_part`.
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
    return "as before" if known.ranges is not None else "which their type can hold, as before (--value-range LOW HIGH)"


def _range_text(kind: str, spreads: list[Spread], pixels: Pixels, origin: str) -> str:
    least, most = min(s.extremes[0] for s in spreads), max(s.extremes[1] for s in spreads)
    usual = {BYTES: [0, 255], INTEGERS: [0, 65535], FLOATS: [0, 1]}[kind]
    low, high = usual if pixels.ranges is None else pixels.ranges.get(kind, usual)
    if kind == BYTES and [low, high] == usual:
        return ""
    text = f"{kind} from {_words([least, most])}, of which {_words([low, high])} become 0 to 1, {origin}"
    outside = sum(_num_outside(s, low, high) for s in spreads) / sum(s.size for s in spreads)
    return f"{text}; {100 * outside:.2g} % of them lie outside and are cut" if outside else text


def _num_outside(spread: Spread, low: float, high: float) -> float:
    """How many numbers of an image are outside; estimated where the range cuts into the common ones."""
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
