"""Pictures of what a detector or a segmenter predicts, beside what is true, and the figure of each picture.

The functions take tensors and Pillow images, so that training and `sparkme.predict` draw alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import to_pil_image

from sparkme.reporting.fonts import font, has_glyphs, shortened
from sparkme.seeds import derived_seed
from sparkme.text import shown
from sparkme.training.metrics import Detections, GroundTruth, decode_masks

Colour = tuple[int, int, int]

IGNORED = 255  # label of pixels that are of no class
BACKGROUND = "background"  # a class of this name is black; its pixels stay grey in pictures
BLACK, WHITE, WRONG = (0, 0, 0), (255, 255, 255), (213, 94, 0)
PAPER, INK, FAINT = "white", "#222222", "#666666"

# Colours of the classes, which files of masks keep: never change one. The first seven are Okabe and Ito's. Each of the others
# is as far as possible from those before it, and three times as far from the last six. Distances are those of OKLab, for full
# colour vision, protanopia and deuteranopia (Machado, Oliveira and Fernandes, 2009).
PALETTE = """
    e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 6000ff 60e0ff a02060 ffc020 00a0ff 808040 ff80a0 8040e0 60ffe0 c00080
    60c000 a0c0ff 606000 ffe080 6060ff ffa0a0 c040a0 80a040 8000c0 c00000 a0ffa0 6080ff e0c0e0 606080 00c080 e000c0 e00020
    c0e060 c080ff ffc0ff 208060 c0a060 8040a0 600000 002080 ff60c0 e0ff00 ffe0ff 806040 a0c060 600040 2000e0 c060e0 e0a0c0
    204080 c04060 c0e0a0 800000 2080a0 ff00e0 60e020 4000a0 e04060 ffc0c0 800040 ff80e0 8060c0 a06000 0040a0 c08080 e0c080
    602060 c0a0ff 204020 c0ffc0 40a0c0 20e0e0 6040ff 802060 0000c0 e0a080 60ff80 ff40c0 80e0c0 a06080 206040 402060 ffa060
    00a020 ff60e0 60ffff c0ff60 a02040 800080 00e080 e08040 e040a0 404000 4080e0 c02040 40ff20 e0c0a0 c08060 8020e0 a0a000
    e000a0 604020 e080a0 8000a0 4080c0 804060 c08020 a06040 e0c060 60a060 a020c0 006000 00c0ff 60c0a0 a060e0 006080 802040
    402040 804020 ff4040 60a080 c040c0 e00060 80c0c0 c0e080 40ffc0 ff4060 c0a040 a04080 c0c000 806020 ffa0c0 ff40a0 c080c0
    e08060 c0ffe0 ff6000 a04000 ff40ff a0c040 600020 ff4080 20a040 608020 a0e0e0 60c0e0 e0e000 a00000 c0a080 a040ff 40ff60
    4020e0 c0a0c0 e0c040 a0c0a0 a0c0e0 e000e0 802080 00e060 a0a0e0 a020a0 80c080 ffc0e0 0020c0 ff00a0 ffe0c0 a0a060 c0ff80
    8040c0 e0c0ff ffa080 800020 ff4020 a0e040 804040 00e0a0 408080 c02060 604000 c02020 404060 a0a0ff 40c040 ffe060 206020
    0040c0 a0e0ff 402080 e04020 004060 208040 006060 a020e0 c020a0 00e0c0 20ffa0 e00040 0000ff ff6080 a0a040 400080 4020a0
    c0c040 808020 e0e0a0 40c060 2080ff e0e060 606020 e0c000 80a0e0 c0c0ff 0060a0 00a060 c00040 ff0000 a0c020 ffa000 0060c0
    8080ff 00a080 ff0060 60a020 a000ff a0ff00 404080 0000a0 ffa0e0 60a0ff ff0080 ffa040 804080 406000 e08020 ffc040 608060
    ff2040 a0e0a0 a0e060 6020ff c080a0 e040ff 80c060 208020 00c0c0 a0e080 e04080 0020a0 60a040 80c040 c06000 80c0ff c00060
"""  # fmt: skip

FILL, GREY = 0.35, 0.6  # share of a mask's colour over the picture, and of a class's over grey
LEAST_SCORE, LEAST_IOU = 0.5, 0.5  # of detections that are drawn and counted, and of a box that is found

PICTURE_WIDTH, PICTURE_HEIGHT = 480, 640  # pixels of a picture in a sheet, at most
SHEET_WIDTH, MOST_ROWS, MOST_LEGEND = 1200, 24, 60  # so a sheet has at most 20 million pixels
SHEET_COLUMNS = 5  # of pictures with a class
GAP, TEXT_SIZE = 8, 13


def class_colours(classes: Sequence[str]) -> list[Colour]:
    """The colour of each class, (red, green, blue); from the 256th class on, the first colours again."""
    values = [tuple(bytes.fromhex(text)) for text in PALETTE.split()]
    return [
        BLACK if name.strip().lower() == BACKGROUND else values[i % len(values)]  # type: ignore[misc]
        for i, name in enumerate(classes)
    ]


def class_name(classes: Sequence[str], number: int) -> str:
    """The name of a class, or its number where the font lacks a character of the name."""
    name = " ".join(shown(classes[number]).split()) if 0 <= number < len(classes) else ""
    return name if name and has_glyphs(name) else f"class {number}"


# Pictures.


def draw_objects(
    image: Image.Image | Tensor,
    boxes: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    scores: Tensor | None = None,
    masks: Tensor | None = None,
    crowd: Tensor | None = None,
    *,
    fit: tuple[int, int] | None = None,
) -> Image.Image:
    """Draws objects on an image: boxes with labels, masks as a translucent fill with an outline.

    Args:
        image: a Pillow image, or (C, H, W) uint8; if there are not three channels, their mean is drawn in grey.
        boxes: (N, 4), left, top, right and bottom in pixels of the image. What lies outside of it is cut off.
        labels: (N,) integers, index of the class.
        classes: their names.
        scores: (N,) from 0 to 1, written in percent; the highest is drawn last.
        masks: (N, H, W) bool.
        crowd: (N,) bool, regions of many objects, which are drawn with a dashed outline.
        fit: width and height in pixels that the picture is scaled to, with its proportions; the image's own size if None.

    Returns:
        An RGB image.

    Raises:
        ValueError: the image is not uint8, or arrays do not fit each other.
    """
    whole = to_rgb(image)
    picture, scale = _scaled(whole, fit)
    boxes, labels = torch.as_tensor(boxes).reshape(-1, 4).double().cpu(), torch.as_tensor(labels).long().cpu()
    for name, values in (("labels", labels), ("scores", scores), ("masks", masks), ("crowd", crowd)):
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"{len(boxes)} boxes and {len(values)} {name}")
    if masks is not None and len(masks) and tuple(masks.shape[1:]) != (whole.height, whole.width):
        raise ValueError(f"masks of {tuple(masks.shape[1:])} pixels for an image of {(whole.height, whole.width)}")
    colours = class_colours(classes)
    line, size = max(1, round(min(picture.size) / 180)), max(11, round(min(picture.size) / 34))
    order = torch.as_tensor(scores).argsort().tolist() if scores is not None else range(len(boxes))
    drawn = [_Drawn.of(boxes[i] * scale, picture.size, colours[labels[i] % len(colours)], i) for i in order]
    known = [each for each in drawn if each is not None]
    if masks is not None:
        for each in known:
            picture = _with_mask(picture, masks[each.number], each.colour, line)
    draw = ImageDraw.Draw(picture)
    for each in known:
        _outline(draw, each, line, dashed=crowd is not None and bool(crowd[each.number]))
    taken: list[tuple[int, int, int, int]] = []
    for each in reversed(known):  # the highest score first has its place
        name = class_name(classes, int(labels[each.number]))
        end = " (crowd)" if crowd is not None and bool(crowd[each.number]) else ""
        end += f" {100 * float(scores[each.number]):.0f} %" if scores is not None else ""
        _write_label(draw, picture.size, each, name, end, size, taken)
    return picture


def draw_labels(
    image: Image.Image | Tensor, labels: Tensor, classes: Sequence[str], *, fit: tuple[int, int] | None = None
) -> Image.Image:
    """Draws the class of each pixel as a colour over the image in grey.

    Args:
        image: as in `draw_objects`.
        labels: (H, W) integers, index of the class; `IGNORED` pixels are light.
        classes: their names.
        fit: as in `draw_objects`.

    Raises:
        ValueError: the image is not uint8, or of another size than the labels.
    """
    table = np.full((256, 3), WHITE, np.float32)
    table[: min(255, len(classes))] = class_colours(classes)[:255]
    grey, (shown_labels,) = _grey_and_labels(image, [labels], fit)
    colours = table[shown_labels]
    return Image.fromarray((grey + GREY * (colours - grey)).round().astype(np.uint8))


def draw_differences(
    image: Image.Image | Tensor, predicted: Tensor, true: Tensor, *, fit: tuple[int, int] | None = None
) -> Image.Image:
    """Draws pixels of a wrong class in vermilion over the image in grey; pixels whose class is `IGNORED` are light.

    Args:
        image: as in `draw_objects`.
        predicted, true: (H, W) integers, index of the class.
        fit: as in `draw_objects`.
    """
    grey, (found, truth) = _grey_and_labels(image, [predicted, true], fit)
    colours = np.where((found != truth)[..., None], np.array(WRONG, np.float32), grey)
    colours = np.where((truth == IGNORED)[..., None], np.array(WHITE, np.float32), colours)
    return Image.fromarray((grey + 0.85 * (colours - grey)).round().astype(np.uint8))


def index_png(labels: Tensor, classes: Sequence[str]) -> Image.Image:
    """(H, W) uint8 as an image of mode "P": its numbers are the classes, 255 is `IGNORED`, and its colours are for people."""
    values = np.ascontiguousarray(labels.cpu().numpy())
    if values.dtype != np.uint8 or values.ndim != 2:
        raise ValueError(f"labels are {values.dtype} of {values.shape}, and must be uint8 (H, W)")
    picture = Image.frombytes("P", (values.shape[1], values.shape[0]), values.tobytes())
    colours = [*class_colours(classes)[:255], *[BLACK] * 255][:255]
    picture.putpalette([value for colour in (*colours, WHITE) for value in colour])
    return picture


def to_rgb(image: Image.Image | Tensor) -> Image.Image:
    """A Pillow image of any mode, or (C, H, W) uint8, as an RGB image of its own."""
    if isinstance(image, Image.Image):
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    if image.dtype != torch.uint8 or image.ndim != 3:
        raise ValueError(f"an image is {image.dtype} of {tuple(image.shape)}, and must be uint8 (C, H, W)")
    colours = image if len(image) == 3 else image.float().mean(0, keepdim=True).round().byte().expand(3, -1, -1)
    return to_pil_image(colours.contiguous().cpu())


def _scaled(picture: Image.Image, fit: tuple[int, int] | None) -> tuple[Image.Image, float]:
    """The picture, and the factor by which it was scaled."""
    if fit is None:
        return picture, 1.0
    factor = min(fit[0] / picture.width, fit[1] / picture.height)
    size = max(1, round(factor * picture.width)), max(1, round(factor * picture.height))
    return picture.resize(size, Image.Resampling.LANCZOS), factor


def _grey_and_labels(
    image: Image.Image | Tensor, labels: Sequence[Tensor], fit: tuple[int, int] | None
) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.uint8]]]:
    """The picture's grey values (H, W, 3), and labels of its size."""
    whole = to_rgb(image)
    for each in labels:
        if tuple(each.shape) != (whole.height, whole.width):
            raise ValueError(f"labels of {tuple(each.shape)} pixels for an image of {(whole.height, whole.width)}")
    picture, _ = _scaled(whole, fit)
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    bytes_ = (Image.fromarray(each.cpu().numpy().astype(np.uint8)) for each in labels)
    return grey, [np.asarray(each.resize(picture.size, Image.Resampling.NEAREST)) for each in bytes_]


class _Drawn(NamedTuple):
    """An object in a picture: its first and last column and row, its colour and its number."""

    left: int
    top: int
    right: int
    bottom: int
    colour: Colour
    number: int

    @classmethod
    def of(cls, box: Tensor, size: tuple[int, int], colour: Colour, number: int) -> _Drawn | None:
        """None for a box that is not finite, or is not in the picture."""
        if not bool(box.isfinite().all()):
            return None
        x1, y1, x2, y2 = (float(value) for value in box)
        if x2 <= 0 or y2 <= 0 or x1 >= size[0] or y1 >= size[1]:
            return None
        left, top = min(max(0, round(x1)), size[0] - 1), min(max(0, round(y1)), size[1] - 1)
        right, bottom = min(size[0], max(left + 1, round(x2))) - 1, min(size[1], max(top + 1, round(y2))) - 1
        return cls(left, top, right, bottom, colour, number)


def _with_mask(picture: Image.Image, mask: Tensor, colour: Colour, line: int) -> Image.Image:
    """The picture with a mask: a fill, and an outline inside of it."""
    whole = Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255)
    resized = whole.resize(picture.size, Image.Resampling.NEAREST) if whole.size != picture.size else whole
    if (area := resized.getbbox()) is None:
        return picture
    # One pixel more, so that the blur sees where the mask ends; beyond the picture it goes on.
    area = max(0, area[0] - 1), max(0, area[1] - 1), min(picture.width, area[2] + 1), min(picture.height, area[3] + 1)
    part = resized.crop(area)
    inside = part.filter(ImageFilter.BoxBlur(line)).point(lambda value: 255 * (value == 255))
    opacity = Image.composite(inside.point(lambda value: round(FILL * value)), part, inside)
    picture.paste(Image.new("RGB", part.size, colour), area[:2], opacity)
    return picture


def _outline(draw: ImageDraw.ImageDraw, box: _Drawn, line: int, *, dashed: bool) -> None:
    left, top, right, bottom, colour, _ = box
    if not dashed:
        draw.rectangle((left, top, right, bottom), outline=colour, width=line)
        return
    dash = 4 * line
    for x in range(left, right + 1, 2 * dash):
        for y in (top, max(top, bottom - line + 1)):
            draw.rectangle((x, y, min(x + dash - 1, right), min(y + line - 1, bottom)), fill=colour)
    for y in range(top, bottom + 1, 2 * dash):
        for x in (left, max(left, right - line + 1)):
            draw.rectangle((x, y, min(x + line - 1, right), min(y + dash - 1, bottom)), fill=colour)


def _write_label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: _Drawn,
    name: str,
    end: str,
    text_size: int,
    taken: list[tuple[int, int, int, int]],
) -> None:
    """Writes a label above the box, or else where it is in the picture and over no other label, as far as possible."""
    pad = max(2, text_size // 6)
    most = min(size[0], max(size[0] // 2, box.right - box.left)) - 2 * pad
    text = shortened(name, most - font(text_size).getlength(end), text_size, keep="start") + end
    width, height = round(font(text_size).getlength(text)) + 2 * pad, sum(font(text_size).getmetrics()) + pad // 2
    if width > size[0] or height > size[1]:
        return
    lefts = [min(max(0, x), size[0] - width) for x in (box.left, box.right + 1 - width)]
    tops = [y for y in (box.top - height, box.top, box.bottom + 1, box.bottom + 1 - height) if 0 <= y <= size[1] - height]
    places = [(x, y, x + width, y + height) for y in tops or [min(max(0, box.top), size[1] - height)] for x in lefts]
    place = next((p for p in places if not any(_overlap(p, other) for other in taken)), places[0])
    taken.append(place)
    draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=box.colour)
    draw.text((place[0] + pad, place[1] + pad // 4), text, _on(box.colour), font(text_size))


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _on(colour: Colour) -> Colour:
    """Black or white: the one that is legible on a colour, by the contrast of WCAG 2."""
    linear = [(value / 255 / 12.92) if value < 11 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return BLACK if luminance > 0.179 else WHITE


# Sheets.


def pictures_of_detection(
    image: Image.Image | Tensor, found: Detections, truth: GroundTruth, classes: Sequence[str]
) -> list[Image.Image]:
    """A row of a sheet: what is true, and what was found with a score of at least `LEAST_SCORE`. The image has `truth.size`."""
    scores = torch.as_tensor(np.asarray(found.scores))
    kept = (scores >= LEAST_SCORE).nonzero().flatten()
    boxes, labels = (torch.as_tensor(np.asarray(values)) for values in (found.boxes, found.labels))
    masks = None if found.masks is None else decode_masks([found.masks[i] for i in kept.tolist()], truth.size)
    crowd = None if truth.crowd is None else torch.as_tensor(truth.crowd)
    true_masks = None if truth.masks is None else decode_masks(truth.masks, truth.size)
    true_boxes, true_labels = torch.as_tensor(truth.boxes), torch.as_tensor(truth.labels)
    fit = PICTURE_WIDTH, PICTURE_HEIGHT
    return [
        draw_objects(image, true_boxes, true_labels, classes, masks=true_masks, crowd=crowd, fit=fit),
        draw_objects(image, boxes.reshape(-1, 4)[kept], labels[kept], classes, scores[kept], masks, fit=fit),
    ]


def pictures_of_segmentation(
    image: Image.Image | Tensor, predicted: Tensor, true: Tensor, classes: Sequence[str]
) -> list[Image.Image]:
    """A row of a sheet: the image, the true classes, the predicted ones, and where they differ. See `draw_labels`."""
    fit = PICTURE_WIDTH, PICTURE_HEIGHT
    return [
        _scaled(to_rgb(image), fit)[0],
        draw_labels(image, true, classes, fit=fit),
        draw_labels(image, predicted, classes, fit=fit),
        draw_differences(image, predicted, true, fit=fit),
    ]


DETECTION_TITLES = ("truth", "prediction")
SEGMENTATION_TITLES = ("image", "truth", "prediction", "where they differ")


def legend_of(classes: Sequence[str], labels: Iterable[Tensor]) -> list[tuple[str, Colour]]:
    """Names and colours of the classes that are in some labels (H, W), in the order of their numbers."""
    present = sorted({number for each in labels for number in each.unique().tolist()})
    colours = class_colours(classes)
    legend = [(class_name(classes, number), colours[number]) for number in present if number < len(classes)]
    return legend + [("ignored", WHITE)] * (IGNORED in present)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    captions: Sequence[str],
    legend: Sequence[tuple[str, Colour]] = (),
) -> Image.Image:
    """Arranges rows of pictures under the columns' titles, with a caption above each row.

    A picture is at most `PICTURE_WIDTH` wide and `PICTURE_HEIGHT` high, and the sheet at most `SHEET_WIDTH` wide. It has
    at most `MOST_ROWS` rows; later ones are left out.

    Args:
        rows: the pictures, one for each title; at least one row.
        titles: of the columns.
        captions: a line for each row, such as the image's name and its figure.
        legend: names and colours, see `legend_of`.

    Raises:
        ValueError: there is no row, or a row has not one picture for each title.
    """
    if not rows or len(rows) != len(captions) or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"{len(rows)} rows of {[*map(len, rows)]} pictures, {len(titles)} titles, {len(captions)} captions")
    rows, line = rows[:MOST_ROWS], TEXT_SIZE + GAP
    widest = min(PICTURE_WIDTH, (SHEET_WIDTH - GAP) // len(titles) - GAP)
    sizes = [[_fitted(picture, widest) for picture in row] for row in rows]
    total = len(titles) * (widest + GAP) + GAP
    entries, legend_height = _placed_legend(legend, total)
    heights = [max(height for _, height in row) for row in sizes]
    height = GAP + line + sum(line + each + GAP for each in heights) + legend_height
    sheet = Image.new("RGB", (total, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        text = shortened(title, widest, TEXT_SIZE, keep="start")
        draw.text((GAP + column * (widest + GAP) + widest // 2, GAP), text, INK, font(TEXT_SIZE), anchor="ma")
    y = GAP + line
    for row, row_sizes, row_height, caption in zip(rows, sizes, heights, captions, strict=False):
        draw.text((GAP, y), shortened(caption, total - 2 * GAP, TEXT_SIZE), FAINT, font(TEXT_SIZE))
        for column, (picture, size) in enumerate(zip(row, row_sizes, strict=True)):
            resized = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
            sheet.paste(resized, (GAP + column * (widest + GAP) + (widest - size[0]) // 2, y + line))
        y += line + row_height + GAP
    for x, below, name, colour in entries:
        if colour is not None:
            draw.rectangle((x, y + below, x + TEXT_SIZE, y + below + TEXT_SIZE), fill=colour, outline=FAINT)
        draw.text((x + TEXT_SIZE + 5, y + below - 1), name, INK, font(TEXT_SIZE))
    return sheet


def class_sheet(pictures: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Arranges pictures in rows of at most `SHEET_COLUMNS`, each with its caption below.

    Raises:
        ValueError: there is no picture.
    """
    if not pictures:
        raise ValueError("a sheet needs a picture")
    columns, line = min(SHEET_COLUMNS, len(pictures)), TEXT_SIZE + GAP
    side = SHEET_WIDTH // SHEET_COLUMNS - GAP
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + line + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(pictures):
        x, y = GAP + number % columns * (side + GAP), GAP + number // columns * (side + line + GAP)
        factor = side / max(picture.size)
        size = max(1, round(factor * picture.width)), max(1, round(factor * picture.height))
        resized = picture.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(resized, (x + (side - size[0]) // 2, y + side - size[1]))
        text = shortened(caption, side, TEXT_SIZE, keep="start")
        draw.text((x + side // 2, y + side + GAP // 2), text, INK, font(TEXT_SIZE), anchor="ma")
    return sheet


def _fitted(picture: Image.Image, widest: int) -> tuple[int, int]:
    factor = min(widest / picture.width, PICTURE_HEIGHT / picture.height)
    return max(1, round(factor * picture.width)), max(1, round(factor * picture.height))


def _placed_legend(legend: Sequence[tuple[str, Colour]], total: int) -> tuple[list[tuple[int, int, str, Colour | None]], int]:
    """Entries with their places below the pictures, and the height of all."""
    listed: list[tuple[str, Colour | None]] = [*legend[:MOST_LEGEND]]
    if len(legend) > MOST_LEGEND:
        listed.append((f"and {len(legend) - MOST_LEGEND} more", None))
    entries, x, y, line = list[tuple[int, int, str, Colour | None]](), GAP, GAP, TEXT_SIZE + GAP
    for name, colour in listed:
        text = shortened(name, min(220, total - 2 * GAP - TEXT_SIZE), TEXT_SIZE, keep="start")
        width = TEXT_SIZE + 5 + round(font(TEXT_SIZE).getlength(text)) + 2 * GAP
        if x > GAP and x + width > total:
            x, y = GAP, y + line
        entries.append((x, y, text, colour))
        x += width
    return entries, y + line + GAP if entries else 0


# Which images, and the figure of each.


def choose(scores: Mapping[int, float | None], count: int, seed: int = 0) -> dict[str, list[int]]:
    """Numbers of images to show.

    Args:
        scores: the figure of each image by its number; None, or one that is not finite, where there is none.
        count: of images for each purpose, at most.
        seed: of the sample.

    Returns:
        `best` and `worst`: the images with the highest and the lowest figures, the most extreme first; no image is in both.
        `sample`: drawn by the seed alone, so the same in every epoch and every run with these images; in order.
    """
    known = [(value, number) for number, value in scores.items() if value is not None and isfinite(value)]
    known.sort(key=lambda pair: (-pair[0], pair[1]))
    most = min(count, (len(known) + 1) // 2)
    worst = known[max(most, len(known) - count) :]
    drawn = sorted(scores, key=lambda number: derived_seed(seed, "pictures", number))[:count]
    return {
        "best": [number for _, number in known[:most]],
        "worst": [number for _, number in reversed(worst)],
        "sample": sorted(drawn),
    }


def image_score(found: Detections | Tensor, truth: GroundTruth | Tensor) -> float | None:
    """The figure of one image: `box_f1` of detections, or `mean_iou` of labels (H, W)."""
    if isinstance(found, Tensor):
        assert isinstance(truth, Tensor)
        return mean_iou(found, truth)
    assert isinstance(truth, GroundTruth)
    crowd = None if truth.crowd is None else torch.as_tensor(np.asarray(truth.crowd))
    boxes, labels, scores = (torch.as_tensor(np.asarray(each)) for each in (found.boxes, found.labels, found.scores))
    return box_f1(boxes, labels, scores, torch.as_tensor(truth.boxes), torch.as_tensor(truth.labels), crowd)


def box_f1(
    boxes: Tensor, labels: Tensor, scores: Tensor, true_boxes: Tensor, true_labels: Tensor, crowd: Tensor | None = None
) -> float:
    """F1 of an image's detections with a score of at least `LEAST_SCORE`.

    From the highest score on, a detection finds the object of its class, not found before, with which its intersection over
    union is highest and at least `LEAST_IOU`. One that finds none, and of which that share lies in a crowd region of its class,
    is not counted; nor are these regions.

    Args:
        boxes, labels, scores: (N, 4), (N,) and (N,), of the detections.
        true_boxes, true_labels: (M, 4) and (M,).
        crowd: (M,) bool.

    Returns:
        From 0 to 1; 1 where there is nothing to find and nothing is found.
    """
    kept = (scores >= LEAST_SCORE).nonzero().flatten()
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    boxes, labels, true_boxes = boxes.reshape(-1, 4).double()[kept], labels[kept], true_boxes.reshape(-1, 4).double()
    regions = torch.zeros(len(true_boxes), dtype=torch.bool) if crowd is None else crowd.bool()
    same = labels[:, None] == true_labels[None]
    overlaps = torch.where(same & ~regions, box_iou(boxes, true_boxes), 0.0)
    in_crowd = (torch.where(same & regions, _share_inside(boxes, true_boxes), 0.0) >= LEAST_IOU).any(1)
    hits = wrong = 0
    for overlap, ignored in zip(overlaps, in_crowd.tolist(), strict=True):
        if len(true_boxes) and float(overlap.max()) >= LEAST_IOU:
            overlaps[:, int(overlap.argmax())] = 0.0
            hits += 1
        else:
            wrong += not ignored
    total = hits + wrong + int((~regions).sum())
    return 2 * hits / total if total else 1.0


def _share_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """(N, M), the share of each box that lies in each region."""
    sides = (
        torch.minimum(boxes[:, None, 2:], regions[None, :, 2:]) - torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    ).clamp_min(0)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(1)
    return sides.prod(2) / areas[:, None].clamp_min(1e-9)


def mean_iou(predicted: Tensor, true: Tensor) -> float | None:
    """Mean intersection over union of the classes that a pixel is of or is taken for; None if every pixel is `IGNORED`.

    Args:
        predicted, true: (H, W) integers, index of the class.
    """
    counted = true != IGNORED
    found, truth = predicted[counted].long(), true[counted].long()
    if not len(truth):
        return None
    count = int(max(found.max(), truth.max())) + 1
    right = torch.bincount(truth[found == truth], minlength=count)
    union = torch.bincount(found, minlength=count) + torch.bincount(truth, minlength=count) - right
    present = union > 0
    return float((right[present] / union[present]).double().mean())
