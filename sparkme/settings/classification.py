"""The settings of fine-tuning for classification, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from sparkme.errors import UserError
from sparkme.settings.declare import flag_of, found, in_images, in_network, in_optimisation, varied
from sparkme.settings.finetune import FinetuneRecipe, FinetuneSettings
from sparkme.settings.shared import CropSettings, LabelledSettings, fixed_size

# From the official code (downstream_imagenet/arg.py), and from ConvNeXt V2's for networks that FCMAE pretrained.
_PAPER: dict[str, Any] = {
    "weight_decay": 0.02, "clip_grad": 0.0, "ema_decay": 0.9999, "ema_warmup": False, "cutmix": 1.0, "smoothing": 0.1,
    "auto_augment": "trivial", "random_erasing": 0.25, "crop_scale": 0.08, "head_init": "random", "eval_epochs": 1,
}  # fmt: skip
_PAPER_RESNET = _PAPER | {
    "optimizer": "lamb", "base_lr": 2e-3, "batch_size": 2048, "epochs": 300, "warmup_epochs": 5.0, "layer_decay": 0.7,
    "mixup": 0.1, "repeats": 1, "drop_path": 0.05, "loss": "bce",
}  # fmt: skip
_PAPER_CONVNEXT = _PAPER | {
    "optimizer": "adamw", "base_lr": 2e-4, "batch_size": 4096, "epochs": 400, "warmup_epochs": 20.0, "layer_decay": 0.7,
    "weight_decay": 0.01, "mixup": 0.8, "repeats": 3, "drop_path": 0.3, "loss": "ce",
}  # fmt: skip
PAPER = {
    "resnet50": _PAPER_RESNET,
    "resnet101": _PAPER_RESNET | {"base_lr": 1e-3, "layer_decay": 0.8, "drop_path": 0.2},
    "convnext_small": _PAPER_CONVNEXT,
    "convnext_base": _PAPER_CONVNEXT | {"base_lr": 1e-4, "drop_path": 0.4},
    "convnext_large": _PAPER_CONVNEXT
    | {"base_lr": 1e-4, "epochs": 200, "warmup_epochs": 10.0, "weight_decay": 0.02, "drop_path": 0.5},
    "convnextv2_base": _PAPER_CONVNEXT
    | {"base_lr": 6.25e-4, "batch_size": 1024, "epochs": 100, "layer_decay": 0.6, "weight_decay": 0.05, "repeats": 1,
       "drop_path": 0.1},
}  # fmt: skip
PAPER["resnet152"] = PAPER["resnet200"] = PAPER["resnet101"]

# Found by benchmarks.transfer and its trials, see benchmarks/results/finetune_small.json.
SMALL: dict[str, Any] = {
    "optimizer": "adamw", "base_lr": 0.016, "batch_size": 32, "layer_decay": 0.7, "weight_decay": 0.05, "clip_grad": 0.0,
    "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.1, "loss": "ce", "auto_augment": "none", "random_erasing": 0.0,
    "crop_scale": 0.35, "repeats": 1, "drop_path": 0.0, "ema_decay": 0.0, "ema_warmup": True, "head_init": "linear",
}  # fmt: skip
# For images with several labels: mixing or blurring classes has no meaning there.
SEVERAL_LABELS = {"loss": "bce", "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(FinetuneSettings, CropSettings, LabelledSettings):
    """The settings of fine-tuning for classification."""

    small = SMALL
    gpu_batch: ClassVar[int] = 128
    cpu_batch: ClassVar[int] = 32

    # fmt: off
    recipe: str = varied(
        FinetuneSettings, "recipe", help="the paper's fine-tuning settings for this network, or settings for small sets",
        otherwise=f"auto, which is small below {FinetuneSettings.small_set:,} images, else paper")
    input_size: tuple[int, ...] = varied(CropSettings, "input_size", otherwise="the pretraining run's, or 224")
    flip: bool = varied(FinetuneSettings, "flip", help="mirror half of the crops left to right")
    auto_augment: str = in_images(
        "augmentation policy: torchvision's TrivialAugmentWide or RandAugment", choices=("none", "trivial", "rand"))
    random_erasing: float = in_images("share of the crops that get a box of noise", metavar="P", at_least=0, at_most=1)
    mixup: float = in_images("mixup's alpha, of the beta distribution; 0: no mixup", metavar="ALPHA", at_least=0)
    cutmix: float = in_images(
        "CutMix's alpha; 0: no CutMix. With mixup on, too, each batch gets one of the two at random", metavar="ALPHA",
        at_least=0)
    repeats: int = in_images("repeated augmentation: N crops of an image in a row", metavar="N", at_least=1, fixed=True)
    head_init: str = in_network(
        "initial classifier: random, or the best linear one on the frozen features", choices=("random", "linear"))
    loss: str = in_optimisation(
        "ce: cross entropy; bce: binary cross entropy of every class, the default for several labels", choices=("ce", "bce"))
    smoothing: float = in_optimisation("label smoothing", at_least=0, below=1)
    several_labels: bool = found(default=False)
    # fmt: on

    @classmethod
    def paper_recipe(cls, model: str, norm: str) -> FinetuneRecipe:
        plain = model.rpartition(":")[2].partition(".")[0]
        if plain in PAPER:
            return FinetuneRecipe("paper", f"the paper's for {plain}", PAPER[plain])
        like = "convnextv2_base" if plain.startswith("convnextv2") else "resnet50" if norm == "bn" else "convnext_small"
        return FinetuneRecipe("paper", f"the paper's for {like}, since it has none for {plain}", PAPER[like])

    def adapted(self, recipe: FinetuneRecipe) -> FinetuneRecipe:
        if not self.several_labels:
            return recipe
        source = f"{recipe.source}; for several labels per image: binary cross entropy, no mixup, CutMix or label smoothing"
        return FinetuneRecipe(recipe.name, source, {**recipe.defaults, **SEVERAL_LABELS})

    def prepared(self) -> Self:
        return replace(self, input_size=fixed_size(self.input_size or (224,)))

    def check_together(self) -> None:
        super().check_together()
        if self.auto_augment != "none" and self.channels != 3:
            raise UserError(f"--auto-augment {self.auto_augment} needs 3 channels, these images have {self.channels}; use none")
        if (self.mixup or self.cutmix) and self.images_per_pass % 2:
            raise UserError(
                f"--batch-size {self.batch_size} gives {self.images_per_pass} images per forward pass; --mixup and "
                "--cutmix need an even number"
            )
        for name, value in SEVERAL_LABELS.items() if self.several_labels else ():
            if getattr(self, name) != value:
                raise UserError(
                    f"{flag_of(name)} {getattr(self, name)} is for images with one label, these have several; leave it out"
                )
