"""The settings of `sparkme.finetune`: its recipes, and what each setting becomes where the command line does not say."""

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

SMALL_SET = 10_000  # images to learn from, below which the recipe `small` is the default


@dataclass(frozen=True)
class FinetuneRecipe:
    """Settings that stand wherever the command line says nothing else.

    Attributes:
        name: `paper` or `small`.
        source: where they are from and why they were chosen, for people.
        defaults: by the settings' names.
    """

    name: str
    source: str
    defaults: dict[str, Any]


# Of the official code (downstream_imagenet/arg.py), and of ConvNeXt V2's for networks that FCMAE pretrained.
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
# Of images with several labels: what mixes or blurs classes has no meaning there.
SEVERAL_LABELS = {"loss": "bce", "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}

SMALL_STEPS, SMALL_EPOCHS = 200, 20  # the least of a run with few images, where --epochs does not say


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(WeightSettings, TrainingSettings, PixelSettings, LabelledSettings):
    """The settings of a run of fine-tuning."""

    # fmt: off
    weights: Path | None = setting(
        "a checkpoint, exported weights, a hub folder, or weights of torchvision, timm and others; not needed with "
        "--from-scratch --model", positional=True, nargs="?", metavar="CHECKPOINT_OR_WEIGHTS", fixed=True)
    recipe: str = setting(
        "the paper's fine-tuning of this network, or settings for small sets", "auto",
        otherwise=f"auto: small below {SMALL_SET:,} images, else paper", choices=("auto", "paper", "small"))
    from_scratch: bool = setting(
        "random weights of the same network: what pretraining is to be compared with", False, fixed=True)

    shots: int | None = in_images(
        "learn from N images of each class, drawn by --seed", otherwise="all", metavar="N", at_least=1, fixed=True)
    input_size: tuple[int, ...] = varied(TrainingSettings, "input_size", otherwise="the run's, or 224")
    flip: bool = in_images("mirror half of the crops", True)
    auto_augment: str = in_images("torchvision's TrivialAugmentWide or RandAugment", choices=("none", "trivial", "rand"))
    random_erasing: float = in_images("share of the crops that get a box of noise", metavar="P", at_least=0, at_most=1)
    mixup: float = in_images("mixup's parameter of the beta distribution; 0 for none", metavar="ALPHA", at_least=0)
    cutmix: float = in_images("CutMix's; 0 for none; one of both is drawn for every batch", metavar="ALPHA", at_least=0)
    repeats: int = in_images("repeated augmentation: so many crops of an image in a row", metavar="N", at_least=1, fixed=True)

    model: str = varied(
        TrainingSettings, "model", help="the network, where the file does not say it (see sparkme.pretrain --model)")
    head_init: str = in_network(
        "how the classifier starts: at random, or as the best linear one on the frozen features", choices=("random", "linear"))
    ema_decay: float = in_network(
        "measure and keep a running average of the weights; 0: none", metavar="D", at_least=0, below=1)

    layer_decay: float = in_optimisation(
        "learning rate of a layer over that of the next; 1 from scratch", metavar="D", above=0, at_most=1, fixed=True)
    loss: str = in_optimisation(
        "cross entropy, or binary cross entropy of every class (bce of several labels)", choices=("ce", "bce"))
    smoothing: float = in_optimisation("label smoothing", at_least=0, below=1)

    output: Path = varied(TrainingSettings, "output", otherwise="runs/finetune-MODEL, -scratch, -Nshots")
    eval_epochs: int = in_output(
        "measure every N epochs", otherwise="1, or twenty times with --recipe small", metavar="N", at_least=1)

    command: str = found(default="finetune")
    channels: int = found("channels", fixed=True)
    num_train_images: int = found("images to learn from", fixed=True)
    num_val_images: int = found()
    num_classes: int = found("classes", fixed=True)
    several_labels: bool = found(default=False)
    split_digest: str = found("as digest of the images, their classes and which of them are measured on", fixed=True)
    ema_warmup: bool = found()
    # fmt: on

    def run_folder(self, model: str) -> Path:
        """The run folder that is asked for, or the one that the model and what is learnt from stand for."""
        name = "finetune-" + re.sub(r"[^\w.]+", "-", model) + "-scratch" * self.from_scratch
        return self.output or Path("runs", name + (f"-{self.shots}shots" if self.shots else ""))


GROUPS = ("data", "images", "network", "optimisation", "machine", "output")


def paper_recipe(model: str, norm: str) -> FinetuneRecipe:
    """The published settings for a network or, where there are none, those of the one that is most like it.

    Args:
        model: the network's name.
        norm: `bn` if it has batch norms, else `ln`.
    """
    plain = model.rpartition(":")[2].partition(".")[0]
    if plain in PAPER:
        return FinetuneRecipe("paper", f"the paper's for {plain}", PAPER[plain])
    like = "convnextv2_base" if plain.startswith("convnextv2") else "resnet50" if norm == "bn" else "convnext_small"
    return FinetuneRecipe("paper", f"the paper's for {like}, as it has none for {plain}", PAPER[like])


def choose_recipe(settings: FinetuneSettings, norm: str) -> FinetuneRecipe:
    """The recipe for a network and a number of images, and in its `source` why it is that one.

    Args:
        settings: as asked for, with the model, the number of images and whether they have several labels.
        norm: the network's kind, `bn` or `ln`.
    """
    images = settings.num_train_images
    small = settings.recipe == "small" or (settings.recipe == "auto" and images < SMALL_SET)
    recipe = FinetuneRecipe("small", "for small sets", SMALL) if small else paper_recipe(settings.model, norm)
    source, defaults = recipe.source, recipe.defaults
    if settings.recipe == "auto":
        least = f"{'' if small else 'not '}less than {SMALL_SET:,}"
        source += f", chosen since there are {images:,} images, {least}"
    if settings.from_scratch:
        defaults = defaults | {"layer_decay": 1.0}
    if settings.several_labels:
        defaults = defaults | SEVERAL_LABELS
        source += "; of several labels an image: binary cross entropy, without mixup, cutmix and label smoothing"
    return FinetuneRecipe(recipe.name, source, defaults)


def resolve(
    asked: FinetuneSettings, recipe: FinetuneRecipe, machine: Machine, saved: FinetuneSettings | None = None
) -> FinetuneSettings:
    """The settings with every default filled in.

    Args:
        asked: on the command line, with what was found: the model, the images, and what the weights expect of them.
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
    """The recipe's batch, as far as the machine and the number of images go."""
    share, images = machine.processes * settings.accumulate, settings.num_train_images
    if saved is not None:
        settings = filled(settings, {"batch_size": saved.batch_size})
    wanted = min(recipe.defaults["batch_size"], (128 if machine.on_gpu else 32) * machine.processes, images)
    pairs = max(wanted // (2 * share), 1) * 2 * share if wanted >= 2 * share else share
    settings = filled(settings, {"batch_size": pairs})
    check_batch(settings)
    if settings.batch_size > images:
        raise UserError(f"--batch-size {settings.batch_size} is more than the {images} images to learn from; lower it")
    return settings


def _check_together(settings: FinetuneSettings) -> None:
    """Raises UserError for values that exclude each other."""
    check_warmup(settings)
    if settings.auto_augment != "none" and settings.channels != 3:
        raise UserError(f"--auto-augment {settings.auto_augment} changes colours; with {settings.channels} channels use none")
    if (settings.mixup or settings.cutmix) and settings.images_per_pass % 2:
        raise UserError(f"--batch-size {settings.batch_size}: --mixup and --cutmix pair images, so its parts must be even")
    for name, value in SEVERAL_LABELS.items() if settings.several_labels else ():
        if getattr(settings, name) != value:
            raise UserError(
                f"{flag_of(name)} {getattr(settings, name)} is for images with one class, and these have several labels; leave "
                "it out"
            )
