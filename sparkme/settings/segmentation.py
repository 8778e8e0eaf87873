"""The settings of fine-tuning for semantic segmentation, and its recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from sparkme.errors import UserError
from sparkme.settings.declare import in_data, in_images, in_network, in_optimisation, varied
from sparkme.settings.dense import DenseSettings, SplitSettings
from sparkme.settings.finetune import FinetuneRecipe, FinetuneSettings
from sparkme.settings.shared import MAX_SIDE, fixed_size

HEADS = ("unet", "fcn", "deeplabv3")

# ConvNeXt's for ADE20K (its official code, semantic_segmentation/configs): 160,000 steps of 16 images. SparK has no such task.
PAPER: dict[str, Any] = {
    "optimizer": "adamw", "base_lr": 1.6e-3, "batch_size": 16, "weight_decay": 0.05, "epochs": 127, "warmup_epochs": 1.2,
    "layer_decay": 0.9, "clip_grad": 0.0, "drop_path": 0.4, "ema_decay": 0.0, "ema_warmup": True, "batch_norm": "trained",
    "short_side": 512, "scale_range": (0.5, 2.0), "colour_jitter": 0.4, "head": "unet", "head_channels": 256,
    "loss": "ce", "class_weights": "none", "eval_epochs": 1,
}  # fmt: skip

# As for detection, see there.
SMALL: dict[str, Any] = {
    "optimizer": "adamw", "base_lr": 0.064, "batch_size": 16, "weight_decay": 0.05, "layer_decay": 0.7, "clip_grad": 1.0,
    "drop_path": 0.0, "ema_decay": 0.0, "ema_warmup": True, "batch_norm": "trained", "scale_range": (0.75, 1.5),
    "colour_jitter": 0.0, "head": "unet", "head_channels": 128, "loss": "ce+dice", "class_weights": "none",
}  # fmt: skip
LARGEST_SMALL_SIDE = 512


@dataclass(frozen=True, kw_only=True)
class SegmentedSettings(SplitSettings):
    """Where images with masks are."""

    # fmt: off
    data: str = in_data(
        "folder with images and masks by the same names: images/ and masks/, train/images/ and train/masks/, or as Cityscapes "
        "or Pascal VOC has them", metavar="DIR", required=True)
    classes: Path | None = in_data(
        "file with a line NAME, NAME,NUMBER or NAME,#rrggbb for each class",
        otherwise="classes.txt or class_dict.csv in --data, else each number or colour in the masks", metavar="FILE")
    ignore_index: int | None = in_data(
        "number in the masks that is not learnt and not counted", otherwise="255", metavar="N", at_least=0)
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings(DenseSettings, SegmentedSettings):
    """The settings of fine-tuning for semantic segmentation."""

    small: ClassVar[Mapping[str, Any]] = SMALL
    gpu_batch: ClassVar[int] = 16
    cpu_batch: ClassVar[int] = 16

    # fmt: off
    task: str = varied(FinetuneSettings, "task", default="segmentation")
    input_size: tuple[int, ...] = in_images(
        "side of the crops, or their height and width; larger images are predicted in windows of this size",
        otherwise="--short-side", metavar="PIXELS", nargs="+", fixed=True, at_least=32, at_most=MAX_SIDE)
    short_side: int = in_images(
        "shorter side that images are resized to before they are scaled, and for prediction",
        otherwise="512; with --recipe small about the images' own, at most 512", metavar="PIXELS", at_least=32,
        at_most=MAX_SIDE)
    scale_range: tuple[float, ...] = in_images(
        "training images are scaled by a random factor in this range before they are cropped", metavar=("LOW", "HIGH"),
        nargs=2, above=0, at_most=100)
    colour_jitter: float = in_images(
        "strength of random changes of brightness, contrast and saturation", metavar="S", at_least=0, at_most=1)

    head: str = in_network(
        "a UNet decoder, or torchvision's FCN or DeepLabV3 head", choices=HEADS, fixed=True)
    head_channels: int = in_network("channels of the head", metavar="C", at_least=8, at_most=4096, fixed=True)

    loss: str = in_optimisation(
        "ce: cross entropy of each pixel; ce+dice: also the Dice loss of each class, which helps rare classes",
        choices=("ce", "ce+dice"))
    class_weights: str = in_optimisation(
        "weights of the classes in the cross entropy: none, or balanced, which is the inverse root of each class's pixels",
        choices=("none", "balanced"))
    # fmt: on

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the crops."""
        return self.input_size[0], self.input_size[-1]

    @classmethod
    def paper_recipe(cls, model: str, norm: str) -> FinetuneRecipe:
        drop_path = {} if norm == "ln" else {"drop_path": 0.0}
        return FinetuneRecipe("paper", "ConvNeXt's for ADE20K, since SparK has no such task", PAPER | drop_path)

    def adapted(self, recipe: FinetuneRecipe) -> FinetuneRecipe:
        defaults = dict(recipe.defaults)
        if "short_side" not in defaults:
            defaults["short_side"] = self.usual_side(LARGEST_SMALL_SIDE)
        if (self.head or defaults["head"]) == "deeplabv3":
            defaults["head_channels"] = 256  # it has no others
        if self.channels != 3:
            defaults["colour_jitter"] = 0.0
        side = self.short_side or defaults["short_side"]
        defaults["input_size"] = (side, side)
        if self.from_scratch:
            defaults["batch_norm"] = "trained"
        return FinetuneRecipe(recipe.name, recipe.source, defaults)

    def prepared(self) -> Self:
        return replace(self, input_size=fixed_size(self.input_size)) if self.input_size else self

    def check_together(self) -> None:
        super().check_together()
        low, high = self.scale_range
        if low > high:
            raise UserError(f"--scale-range {low} {high}: the lower number comes first")
        if self.colour_jitter and self.channels != 3:
            raise UserError(f"--colour-jitter needs 3 channels, these images have {self.channels}; use 0")
