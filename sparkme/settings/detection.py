"""The settings of fine-tuning for object detection and instance segmentation, and its recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sparkme.errors import UserError
from sparkme.settings.declare import found, in_data, in_images, in_network, in_optimisation, varied
from sparkme.settings.dense import DenseSettings, SplitSettings
from sparkme.settings.finetune import FinetuneRecipe, FinetuneSettings
from sparkme.settings.shared import MAX_SIDE

HEADS = ("mask-rcnn", "faster-rcnn", "retinanet", "fcos")
MASK_HEADS = ("mask-rcnn",)

# From the official code: downstream_d2/configs for ResNets, downstream_mmdet/configs for ConvNeXts, both for COCO.
_PAPER: dict[str, Any] = {
    "optimizer": "adamw", "batch_size": 16, "clip_grad": 0.0, "ema_decay": 0.0, "ema_warmup": True, "batch_norm": "trained",
    "long_side": 1333, "fpn_channels": 256, "regions": 512, "proposals": 2000, "eval_epochs": 1,
}  # fmt: skip
_PAPER_RESNET = _PAPER | {
    "base_lr": 4e-3, "weight_decay": 1e-4, "epochs": 12, "warmup_epochs": 0.136, "decay_epochs": (8.0, 10.67),
    "decay_factor": 0.25, "layer_decay": 0.6, "drop_path": 0.0, "head_norm": True, "random_crop": 0.0,
    "short_side": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800, 832, 864, 896), "val_side": 800,
}  # fmt: skip
_PAPER_CONVNEXT = _PAPER | {
    "base_lr": 3.2e-3, "weight_decay": 0.05, "epochs": 36, "warmup_epochs": 0.136, "decay_epochs": (27.0, 33.0),
    "decay_factor": 0.2, "layer_decay": 0.65, "drop_path": 0.5, "head_norm": False, "random_crop": 0.5,
    "short_side": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800), "val_side": 800,
}  # fmt: skip

# The rate was tried on benchmarks.scenes with a small ResNet. The rest is a guess: classification's recipe for small sets where
# it has the setting, and what two cores can train.
SMALL: dict[str, Any] = {
    "optimizer": "adamw", "base_lr": 0.064, "batch_size": 8, "weight_decay": 0.05, "layer_decay": 0.7, "clip_grad": 1.0,
    "ema_decay": 0.0, "ema_warmup": True, "batch_norm": "trained", "decay_epochs": (), "decay_factor": 0.1, "drop_path": 0.0,
    "head_norm": False, "random_crop": 0.0, "long_side": 1333, "fpn_channels": 128, "regions": 128,
    "proposals": 500,
}  # fmt: skip
SMALL_SIDES = (0.75, 0.875, 1.0, 1.125, 1.25)  # sizes in training with that recipe, as a share of the typical one
LARGEST_SMALL_SIDE = 640


@dataclass(frozen=True, kw_only=True)
class AnnotatedSettings(SplitSettings):
    """Where images with boxes are."""

    # fmt: off
    data: str | None = in_data(
        "annotated images: a folder as COCO, YOLO or Pascal VOC has it, a data.yaml, or COCO's .json", metavar="ANNOTATED",
        otherwise="--train and --val")
    train: Path | None = in_data("COCO's .json of the training images, in place of --data", metavar="FILE")
    val: Path | None = in_data(
        "COCO's .json of the validation images", otherwise="a part of --train", metavar="FILE")
    root: Path | None = in_data("folder of the images", otherwise="found beside the annotations", metavar="DIR")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class DetectionSettings(DenseSettings, AnnotatedSettings):
    """The settings of fine-tuning for detection."""

    small: ClassVar[Mapping[str, Any]] = SMALL
    gpu_batch: ClassVar[int] = 4
    cpu_batch: ClassVar[int] = 8

    # fmt: off
    task: str = varied(FinetuneSettings, "task", default="detection")
    short_side: tuple[int, ...] = in_images(
        "shorter side that training images are resized to, one of these at random",
        otherwise="the paper's; with --recipe small about the images' own, at most 640", metavar="PIXELS", nargs="+",
        at_least=32, at_most=MAX_SIDE)
    val_side: int = in_images(
        "shorter side that images are resized to for validation and prediction", metavar="PIXELS", at_least=32,
        at_most=MAX_SIDE)
    long_side: int = in_images(
        "most pixels of the longer side after resizing", metavar="PIXELS", at_least=32, at_most=MAX_SIDE)
    random_crop: float = in_images(
        "share of the training images that are cropped at random", metavar="P", at_least=0, at_most=1)

    head: str = in_network(
        "detector: torchvision's Mask R-CNN, Faster R-CNN, RetinaNet or FCOS, on a feature pyramid network",
        otherwise="mask-rcnn if every object has a mask, else faster-rcnn", choices=HEADS, fixed=True)
    fpn_channels: int = in_network("channels of the feature pyramid", metavar="C", at_least=8, at_most=4096, fixed=True)
    head_norm: bool = in_network("batch norms in the pyramid and the heads", fixed=True)
    regions: int = in_network(
        "regions per image that the box head of an R-CNN is trained on", metavar="N", at_least=1, at_most=4096)
    proposals: int = in_network(
        "regions that an R-CNN proposes per image in training; half as many in prediction", metavar="N", at_least=2,
        at_most=100_000)

    decay_epochs: tuple[float, ...] = in_optimisation(
        "epochs after which the learning rate falls by --decay-factor",
        otherwise="the paper's, as shares of --epochs; a cosine with --recipe small", metavar="E", nargs="+", above=0)
    decay_factor: float = in_optimisation("see --decay-epochs", metavar="F", above=0, at_most=1)
    has_masks: bool = found()
    # fmt: on

    @property
    def has_mask_head(self) -> bool:
        return self.head in MASK_HEADS

    @classmethod
    def paper_recipe(cls, model: str, norm: str) -> FinetuneRecipe:
        plain = model.rpartition(":")[2].partition(".")[0]
        like, defaults = ("ResNet-50", _PAPER_RESNET) if norm == "bn" else ("ConvNeXt-B", _PAPER_CONVNEXT)
        return FinetuneRecipe("paper", f"the paper's on COCO for {like}, for {plain}", defaults)

    def adapted(self, recipe: FinetuneRecipe) -> FinetuneRecipe:
        defaults = {**recipe.defaults, "head": "mask-rcnn" if self.has_masks else "faster-rcnn"}
        if "short_side" not in defaults:
            side = self.usual_side(LARGEST_SMALL_SIDE)
            defaults |= {"short_side": tuple(round(side * share / 32) * 32 for share in SMALL_SIDES), "val_side": side}
        if self.short_side:
            defaults["val_side"] = sorted(self.short_side)[len(self.short_side) // 2]
        if self.epochs and "epochs" in defaults:  # the rate falls after the same shares of a longer or shorter run
            defaults["decay_epochs"] = tuple(self.epochs / defaults["epochs"] * epoch for epoch in defaults["decay_epochs"])
        if self.from_scratch:
            defaults["batch_norm"] = "trained"
        return FinetuneRecipe(recipe.name, recipe.source, defaults)

    def check_together(self) -> None:
        super().check_together()
        if self.has_mask_head and not self.has_masks:
            raise UserError(f"--head {self.head} learns masks, but some objects have none; use faster-rcnn")
        if self.long_side < max(self.short_side):
            raise UserError(f"--long-side {self.long_side} is less than --short-side {max(self.short_side)}")
