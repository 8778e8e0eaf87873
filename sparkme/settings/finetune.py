"""The settings of `sparkme.finetune`: its recipes, and the default of each setting that the command line leaves out."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparkme.errors import UserError
from sparkme.settings.declare import (
    check,
    filled,
    flag_of,
    found,
    in_images,
    in_network,
    in_optimisation,
    in_output,
    setting,
    varied,
)
from sparkme.settings.shared import (
    LabelledSettings,
    Machine,
    PixelSettings,
    TrainingSettings,
    WeightSettings,
    check_batch,
    check_warmup,
    check_workers,
    default_workers,
    fixed_size,
    with_precision,
)

SMALL_SET = 10_000  # training images; the recipe `small` is the default below


@dataclass(frozen=True)
class FinetuneRecipe:
    """Defaults of settings.

    Attributes:
        name: `paper` or `small`.
        source: where the values come from and why this recipe was chosen, for people.
        defaults: value by name of the setting.
    """

    name: str
    source: str
    defaults: dict[str, Any]


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

SMALL_STEPS, SMALL_EPOCHS = 200, 20  # the fewest of a run with few images, unless --epochs is given


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(WeightSettings, TrainingSettings, PixelSettings, LabelledSettings):
    """The settings of a run of fine-tuning."""

    # fmt: off
    weights: Path | None = setting(
        "checkpoint, exported weights, hub folder, or weights of torchvision, timm and others; not needed with "
        "--from-scratch --model", positional=True, nargs="?", metavar="CHECKPOINT_OR_WEIGHTS", fixed=True)
    recipe: str = setting(
        "the paper's fine-tuning settings for this network, or settings for small sets", "auto",
        otherwise=f"auto, which is small below {SMALL_SET:,} images, else paper", choices=("auto", "paper", "small"))
    from_scratch: bool = setting(
        "start from random weights, to compare pretraining with", False, fixed=True)

    shots: int | None = in_images(
        "train on N images of each class, drawn with --seed", otherwise="all", metavar="N", at_least=1, fixed=True)
    input_size: tuple[int, ...] = varied(TrainingSettings, "input_size", otherwise="the pretraining run's, or 224")
    flip: bool = in_images("mirror half of the crops left to right", True)
    auto_augment: str = in_images(
        "augmentation policy: torchvision's TrivialAugmentWide or RandAugment", choices=("none", "trivial", "rand"))
    random_erasing: float = in_images("share of the crops that get a box of noise", metavar="P", at_least=0, at_most=1)
    mixup: float = in_images("mixup's alpha, of the beta distribution; 0: no mixup", metavar="ALPHA", at_least=0)
    cutmix: float = in_images(
        "CutMix's alpha; 0: no CutMix. With mixup on, too, each batch gets one of the two at random", metavar="ALPHA",
        at_least=0)
    repeats: int = in_images("repeated augmentation: N crops of an image in a row", metavar="N", at_least=1, fixed=True)

    model: str = varied(
        TrainingSettings, "model", help="network, if the weights file does not name it; see sparkme.pretrain --model")
    head_init: str = in_network(
        "initial classifier: random, or the best linear one on the frozen features", choices=("random", "linear"))
    ema_decay: float = in_network(
        "decay of the running average of the weights, which is validated and saved; 0: no average", metavar="D", at_least=0,
        below=1)

    layer_decay: float = in_optimisation(
        "learning rate of a layer divided by the next layer's; with --from-scratch 1, unless given", metavar="D", above=0,
        at_most=1, fixed=True)
    loss: str = in_optimisation(
        "ce: cross entropy; bce: binary cross entropy of every class, the default for several labels", choices=("ce", "bce"))
    smoothing: float = in_optimisation("label smoothing", at_least=0, below=1)

    output: Path = varied(TrainingSettings, "output", otherwise="runs/finetune-MODEL, -scratch, -Nshots")
    eval_epochs: int = in_output(
        "validate every N epochs", otherwise="1; with --recipe small twenty times per run", metavar="N", at_least=1)

    command: str = found(default="finetune")
    channels: int = found("channels", fixed=True)
    num_train_images: int = found("training images", fixed=True)
    num_val_images: int = found()
    num_classes: int = found("classes", fixed=True)
    several_labels: bool = found(default=False)
    split_digest: str = found("as digest of the images, their classes and their split", fixed=True)
    ema_warmup: bool = found()
    # fmt: on

    def run_folder(self, model: str) -> Path:
        """The value of --output, or a name made of the model, --from-scratch and --shots."""
        name = "finetune-" + re.sub(r"[^\w.]+", "-", model) + "-scratch" * self.from_scratch
        return self.output or Path("runs", name + (f"-{self.shots}shots" if self.shots else ""))


GROUPS = ("data", "images", "network", "optimisation", "machine", "output")


def paper_recipe(model: str, norm: str) -> FinetuneRecipe:
    """The published settings for a network, or for the most similar network that has some.

    Args:
        model: the network's name.
        norm: `bn` if it has batch norms, else `ln`.
    """
    plain = model.rpartition(":")[2].partition(".")[0]
    if plain in PAPER:
        return FinetuneRecipe("paper", f"the paper's for {plain}", PAPER[plain])
    like = "convnextv2_base" if plain.startswith("convnextv2") else "resnet50" if norm == "bn" else "convnext_small"
    return FinetuneRecipe("paper", f"the paper's for {like}, since it has none for {plain}", PAPER[like])


def choose_recipe(settings: FinetuneSettings, norm: str) -> FinetuneRecipe:
    """The recipe for a network and a number of images; its `source` says why.

    Args:
        settings: as asked for, with the model, the number of images and `several_labels` filled in.
        norm: the network's kind, `bn` or `ln`.
    """
    images = settings.num_train_images
    small = settings.recipe == "small" or (settings.recipe == "auto" and images < SMALL_SET)
    recipe = FinetuneRecipe("small", "for small sets", SMALL) if small else paper_recipe(settings.model, norm)
    source, defaults = recipe.source, recipe.defaults
    if settings.recipe == "auto":
        least = f"{'fewer than' if small else 'at least'} {SMALL_SET:,}"
        source += f", chosen since there are {images:,} images, {least}"
    if settings.from_scratch:
        defaults = defaults | {"layer_decay": 1.0}
    if settings.several_labels:
        defaults = defaults | SEVERAL_LABELS
        source += "; for several labels per image: binary cross entropy, no mixup, CutMix or label smoothing"
    return FinetuneRecipe(recipe.name, source, defaults)


def resolve(
    asked: FinetuneSettings, recipe: FinetuneRecipe, machine: Machine, saved: FinetuneSettings | None = None
) -> FinetuneSettings:
    """The settings with every default filled in.

    Args:
        asked: from the command line, with what was found: the model, the images, and the pixel settings of the weights.
        recipe: see `choose_recipe`.
        machine: where it runs.
        saved: the settings of the run to continue.

    Raises:
        UserError: values that are out of range or do not fit together; names the flag.
    """
    check(asked)
    check_workers(asked.workers)
    settings = replace(
        asked,
        recipe=recipe.name,
        output=asked.run_folder(asked.model),
        processes=machine.processes,
        input_size=fixed_size(asked.input_size),
    )
    settings = _with_batch(settings, recipe, machine, saved)
    if recipe.name == "small":
        steps = settings.num_train_images // settings.batch_size
        settings = filled(settings, {"epochs": max(SMALL_EPOCHS, math.ceil(SMALL_STEPS / steps))})
        defaults = {"warmup_epochs": settings.epochs / 10, "eval_epochs": max(1, settings.epochs // 20)}
        settings = filled(settings, defaults)
    settings = filled(settings, recipe.defaults)
    settings = filled(
        settings,
        {"workers": default_workers(on_gpu=machine.on_gpu), "max_unreadable": max(10, settings.num_train_images // 100)},
    )
    if asked.warmup_epochs is None:
        settings = replace(settings, warmup_epochs=min(settings.warmup_epochs, settings.epochs / 10))
    settings = with_precision(settings, machine)
    _check_together(settings)
    return settings


def _with_batch(
    settings: FinetuneSettings, recipe: FinetuneRecipe, machine: Machine, saved: FinetuneSettings | None
) -> FinetuneSettings:
    """Fills in the batch size: the recipe's, as far as the machine and the number of images allow."""
    share, images = machine.processes * settings.accumulate, settings.num_train_images
    if saved is not None:
        settings = filled(settings, {"batch_size": saved.batch_size})
    wanted = min(recipe.defaults["batch_size"], (128 if machine.on_gpu else 32) * machine.processes, images)
    pairs = max(wanted // (2 * share), 1) * 2 * share if wanted >= 2 * share else share
    settings = filled(settings, {"batch_size": pairs})
    check_batch(settings)
    if settings.batch_size > images:
        raise UserError(f"--batch-size {settings.batch_size} is more than the {images} training images; lower it")
    return settings


def _check_together(settings: FinetuneSettings) -> None:
    """Raises UserError for values that exclude each other."""
    check_warmup(settings)
    if settings.auto_augment != "none" and settings.channels != 3:
        raise UserError(
            f"--auto-augment {settings.auto_augment} needs 3 channels, these images have {settings.channels}; use none"
        )
    if (settings.mixup or settings.cutmix) and settings.images_per_pass % 2:
        raise UserError(
            f"--batch-size {settings.batch_size} gives {settings.images_per_pass} images per forward pass; --mixup and "
            "--cutmix need an even number"
        )
    for name, value in SEVERAL_LABELS.items() if settings.several_labels else ():
        if getattr(settings, name) != value:
            raise UserError(
                f"{flag_of(name)} {getattr(settings, name)} is for images with one label, these have several; leave it out"
            )
