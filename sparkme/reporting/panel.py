"""Pictures of reconstructed images, with titles and a caption. `pretrain` draws them in training, `visualize` afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from sparkme.data.dataset import denormalise
from sparkme.data.statistics import Statistics
from sparkme.methods.base import MaskedAutoencoder
from sparkme.reporting.fonts import FONT_SIZE, font, shortened

GREY = 0.5  # hidden patches in the masked picture
BLANK = 0.85  # visible patches in the error picture
LARGEST_ERROR = 0.5  # end of its colour scale, on a scale where black is 0 and white is 1
COLOURS = "inferno"

COLUMNS = ("original", "masked", "reconstruction", "error")
ERROR_CAPTION = (
    "Error: mean over the channels of |reconstruction - original|, where black is 0 and white is 1; visible patches are blank."
)

LEAST_SIDE = 128  # smaller pictures are enlarged by an integer, so that their titles fit
GAP = 6
PAPER, INK = "white", "#222222"


class Row(NamedTuple):
    """A row of a panel: pictures (K, 3, H, W), float32 in [0, 1], and an optional line above them."""

    pictures: Tensor
    label: str = ""


def reconstruction_panel(
    model: MaskedAutoencoder,
    images: Tensor,
    active: Tensor,
    statistics: Statistics | None = None,
    *,
    patch_statistics: str = "true",
) -> Tensor:
    """Draws original, masked and reconstructed images side by side, a row per image, with titles and a caption.

    Args:
        model: the network; it runs in eval mode and returns to its own mode.
        images: (B, C, H, W), normalised. If there are not three channels, their mean is drawn in grey.
        active: (B, 1, f_h, f_w) bool, True = visible.
        statistics: mean and standard deviation of the normalisation; ImageNet's if None.
        patch_statistics: mean and deviation of painted patches, `true` or `predicted`; see `MaskedAutoencoder.paint`.

    Returns:
        (3, height, width) float32 in [0, 1], on the CPU.

    Raises:
        ValueError: `patch_statistics` is neither, or the network does not normalise patches.
    """
    was_training = model.training
    try:
        _, painted = model.eval().reconstruct(images, active, statistics=patch_statistics)
    finally:
        model.train(was_training)
    visible = model.grid(images, active).mask(1, torch.bool)
    pictures = masked_pictures(images, painted, visible, statistics or Statistics())
    rows = [Row(picture) for picture in pictures]
    panel = draw_panel(COLUMNS[:3], rows, caption(model, images.shape[1], patch_statistics))
    return pil_to_tensor(panel).float() / 255


def masked_pictures(images: Tensor, painted: Tensor, visible: Tensor, statistics: Statistics) -> Tensor:
    """Original, masked and painted pictures of (B, C, H, W) normalised images: (B, 3, 3, H, W) float32, on the CPU."""
    original, reconstruction = (in_colour(denormalise(x.float(), statistics).cpu()) for x in (images, painted))
    return torch.stack((original, torch.where(visible.cpu(), original, GREY), reconstruction), dim=1)


def in_colour(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 3, H, W). If there are not three channels, their mean becomes grey."""
    return images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def error_pictures(images: Tensor, painted: Tensor, visible: Tensor, statistics: Statistics) -> Tensor:
    """Absolute errors of hidden pixels, averaged over channels, as colours: (B, 3, H, W) float32 in [0, 1], on the CPU."""
    original, reconstruction = (denormalise(x.float(), statistics).cpu() for x in (images, painted))
    error = (original - reconstruction).abs().mean(1)
    colours = colormaps[COLOURS](error.div(LARGEST_ERROR).clamp(0, 1).numpy())[..., :3]
    return torch.where(visible.cpu(), BLANK, torch.from_numpy(colours).permute(0, 3, 1, 2).float())


def caption(model: MaskedAutoencoder, channels: int, patch_statistics: str) -> str:
    """Explains which parts of a painted patch are not predicted by the network."""
    if not model.normalise_patches:
        text = "Hidden patches are the network's prediction alone; they contain nothing of the original."
    elif patch_statistics == "true":
        text = (
            "The network predicts hidden patches without their brightness and contrast. These pictures add each patch's TRUE "
            "mean and deviation, taken from the original, as in the paper."
        )
    else:
        text = (
            "The network predicts hidden patches without their brightness and contrast. In these pictures mean and deviation "
            "are PREDICTED from the visible patches around them; no hidden pixel is used."
        )
    return text if channels in (1, 3) else f"{text} The pictures show the mean of {channels} channels."


def draw_panel(titles: Sequence[str], rows: Sequence[Row], caption: str, *, error_bar: bool = False) -> Image.Image:
    """Arranges rows of pictures of one size under column titles, with a caption below, in an RGB image.

    Pictures with sides below `LEAST_SIDE` are enlarged, pixel by pixel. With `error_bar`, the colour scale of `error_pictures`
    is drawn under the last column.
    """
    height, width = rows[0].pictures.shape[-2:]
    factor = max(1, ceil(LEAST_SIDE / min(height, width)))
    height, width = height * factor, width * factor
    total = len(titles) * (width + GAP) + GAP
    line = FONT_SIZE + GAP
    above = line if any(row.label for row in rows) else 0
    lines = _broken(caption, total - 2 * GAP)
    bar_height = 2 * line if error_bar else 0
    panel = Image.new(
        "RGB", (total, line + GAP + len(rows) * (above + height + GAP) + bar_height + len(lines) * line + GAP), PAPER
    )
    draw = ImageDraw.Draw(panel)
    for column, title in enumerate(titles):
        middle = GAP + column * (width + GAP) + width // 2
        draw.text((middle, GAP), title, INK, font(), anchor="ma")
    y = line + GAP
    for row in rows:
        if row.label:
            draw.text((GAP, y), shortened(row.label, total - 2 * GAP), INK, font())
        y += above
        for column, picture in enumerate(row.pictures):
            enlarged = to_image(picture).resize((width, height), Image.Resampling.NEAREST)
            panel.paste(enlarged, (GAP + column * (width + GAP), y))
        y += height + GAP
    if error_bar:
        left, right = total - GAP - width, total - GAP
        panel.paste(colour_bar(width, FONT_SIZE), (left, y))
        for x, text, anchor in ((left, "0", "la"), ((left + right) // 2, "error", "ma"), (right, f"{LARGEST_ERROR}+", "ra")):
            draw.text((x, y + line - 2), text, INK, font(), anchor=anchor)
        y += bar_height
    for number, text in enumerate(lines):
        draw.text((GAP, y + number * line), text, INK, font())
    return panel


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) float32 in [0, 1] as a Pillow image."""
    return Image.fromarray(picture.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy())


def colour_bar(width: int, height: int) -> Image.Image:
    """The colour scale of `error_pictures`, from zero at the left to the largest error at the right."""
    colours = colormaps[COLOURS](np.linspace(0, 1, width))[:, :3]
    return Image.fromarray((255 * colours).round().astype(np.uint8)[None].repeat(height, axis=0))


def _broken(text: str, width: int) -> list[str]:
    """Breaks text into lines of at most `width` pixels, unless a word is longer."""
    lines: list[str] = []
    for word in text.split():
        if lines and font().getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
