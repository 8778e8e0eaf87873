"""The settings that detection and segmentation share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparkme.settings.declare import Settings, found, in_data, in_network, varied
from sparkme.settings.finetune import FinetuneSettings
from sparkme.settings.shared import PixelSettings


@dataclass(frozen=True, kw_only=True)
class SplitSettings(Settings):
    """How annotated images are split and read."""

    # fmt: off
    val_share: float = in_data(
        "share of the images to validate on, if the data has no split", 0.2, metavar="S", above=0, below=1)
    max_pixels: int | None = in_data(
        "treat an image with more pixels as unreadable", otherwise="178956970, Pillow's limit", metavar="N")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class DenseSettings(FinetuneSettings):
    """The settings of a task that predicts something for every place of an image."""

    small_steps: ClassVar[int] = 600

    # fmt: off
    upright: bool = varied(PixelSettings, "upright", is_found=True)
    recipe: str = varied(
        FinetuneSettings, "recipe", otherwise=f"auto, which is small below {FinetuneSettings.small_set:,} images, else paper")
    batch_norm: str = in_network(
        "batch norms of the pretrained network: trained with the statistics of each batch, over all processes; or frozen, "
        "with statistics estimated once on the training images", choices=("trained", "frozen"), fixed=True)
    typical_side: int = found()
    # fmt: on

    def usual_side(self, most: int) -> int:
        """The training images' shorter side, as a multiple of 32 from 64 to `most`."""
        return min(most, 32 * max(2, round((self.typical_side or 0) / 32)))
