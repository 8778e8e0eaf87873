"""The command line of `sparkme.finetune`, its recipes, and the configuration it means with every default filled in."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkme.errors import Parser, UserError
from sparkme.training.config import (
    LARGEST,
    MAX_SIDE,
    Machine,
    add_device,
    add_labelled_data,
    add_precision,
    add_reduced_jpeg,
    add_run,
    add_seed,
    add_weights,
    add_workers,
    check_seed,
    check_workers,
    default_workers,
    fill_in,
    flag_of,
    path_argument,
)

SMALL_SET = 10_000  # images to learn from, below which the recipe `small` is the default


@dataclass(frozen=True)
class FinetuneRecipe:
    """Settings that stand wherever the command line says nothing else.

    Attributes:
        source: where they are from, for people.
        defaults: by the flags' names.
    """

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


def paper_recipe(model: str, norm: str) -> FinetuneRecipe:
    """The published settings for a network or, where there are none, those of the one that is most like it.

    Args:
        model: the network's name.
        norm: `bn` if it has batch norms, else `ln`.
    """
    plain = model.rpartition(":")[2].partition(".")[0]
    if plain in PAPER:
        return FinetuneRecipe(f"the paper's for {plain}", PAPER[plain])
    like = "convnextv2_base" if plain.startswith("convnextv2") else "resnet50" if norm == "bn" else "convnext_small"
    return FinetuneRecipe(f"the paper's for {like}, as it has none for {plain}", PAPER[like])


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.finetune",
        description="Train the ordinary dense network on labelled images, from pretrained weights or from scratch.",
        epilog="The same command again resumes an interrupted run.",
    )
    parser.add_argument(
        "weights",
        type=path_argument,
        nargs="?",
        metavar="CHECKPOINT_OR_WEIGHTS",
        help="a checkpoint, exported weights, a hub folder, or weights of torchvision, timm and others; not needed with "
        "--from-scratch --model",
    )
    parser.add_argument(
        "--recipe",
        choices=("auto", "paper", "small"),
        default="auto",
        help=f"settings: the paper's fine-tuning of this network, or those for small sets (small below {SMALL_SET:,} images)",
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="random weights of the same network: what pretraining is to be compared with",
    )
    add_labelled_data(parser)
    group = parser.add_argument_group("images")
    group.add_argument("--shots", type=int, metavar="N", help="learn from N images of each class, drawn by --seed (all)")
    group.add_argument(
        "--input-size", type=int, nargs="+", metavar="PIXELS", help="side of the crops, or height and width (the run's, or 224)"
    )
    group.add_argument("--crop-scale", type=float, metavar="S", help="smallest share of an image's area in a crop")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the crops (on)")
    group.add_argument(
        "--auto-augment", choices=("none", "trivial", "rand"), help="torchvision's TrivialAugmentWide or RandAugment"
    )
    group.add_argument("--random-erasing", type=float, metavar="P", help="paint a box of noise into a share of the crops")
    group.add_argument("--mixup", type=float, metavar="ALPHA", help="of the beta distribution; 0 for none")
    group.add_argument("--cutmix", type=float, metavar="ALPHA", help="likewise; one of both is drawn for every batch")
    group.add_argument("--repeats", type=int, metavar="N", help="repeated augmentation: so many crops of an image in a row")
    group.add_argument("--max-unreadable", type=int, metavar="N", help="stop when more images than this cannot be read")
    add_reduced_jpeg(group)
    add_workers(group)

    group = parser.add_argument_group("network")
    group.add_argument("--model", help="the network, where the file does not say it (see sparkme.pretrain --model)")
    add_weights(group)
    group.add_argument("--drop-path", type=float, metavar="P", help="of the deepest block, from 0 at the first")
    group.add_argument(
        "--head-init",
        choices=("random", "linear"),
        help="how the classifier starts: at random, or as the best linear one on the frozen features",
    )
    group.add_argument(
        "--ema-decay", type=float, metavar="D", help="measure and keep a running average of the weights; 0: none"
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int)
    group.add_argument("--warmup-epochs", type=float, help="linear warm-up")
    group.add_argument("--batch-size", type=int, metavar="N", help="GLOBAL batch, over all processes and accumulation steps")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="forward passes of a batch (%(default)s)")
    group.add_argument("--optimizer", choices=("lamb", "adamw"))
    group.add_argument("--base-lr", type=float, help="peak learning rate per 256 images")
    group.add_argument("--layer-decay", type=float, metavar="D", help="rate of a layer over that of the next (1 from scratch)")
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--clip-grad", type=float, help="largest gradient norm; 0 for no limit")
    group.add_argument(
        "--loss", choices=("ce", "bce"), help="cross entropy, or binary cross entropy of every class (bce of several labels)"
    )
    group.add_argument("--smoothing", type=float, help="label smoothing")

    group = parser.add_argument_group("machine")
    add_device(group)
    add_precision(group)
    add_seed(group)

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=path_argument, metavar="DIR", help="run folder (runs/finetune-MODEL, -scratch, -Nshots)"
    )
    add_run(group)
    group.add_argument(
        "--eval-epochs", type=int, metavar="N", help="measure every N epochs (1, or twenty times with --recipe small)"
    )
    return parser


# What a resumed run must share with its checkpoint.
FIXED = ("model", "weights", "channels", "num_classes", "num_train_images", "split_digest", "input_size", "optimizer",
         "layer_decay", "batch_size", "repeats", "from_scratch", "shots", "seed")  # fmt: skip

_AT_LEAST = {"epochs": 1, "accumulate": 1, "log_steps": 1, "keep_checkpoints": 1, "keep_every": 0, "hang_seconds": 0,
             "shard_cache_gib": 0,
             "batch_size": 1, "repeats": 1, "shots": 1,
             "eval_epochs": 1, "max_unreadable": 0, "weight_decay": 0, "clip_grad": 0, "checkpoint_minutes": 0,
             "warmup_epochs": 0, "mixup": 0, "cutmix": 0}  # fmt: skip
_SHARES = {"random_erasing": (0, 1), "smoothing": (0, 1), "drop_path": (0, 1), "ema_decay": (0, 1)}


def output_folder(args: argparse.Namespace, model: str) -> Path:
    """The run folder that was asked for, or the one that the model and what is learnt from stand for."""
    name = "finetune-" + re.sub(r"[^\w.]+", "-", model)
    name += "-scratch" if args.from_scratch else ""
    return args.output or Path("runs", name + (f"-{args.shots}shots" if args.shots else ""))


def resolve_config(
    args: argparse.Namespace, known: dict[str, Any], norm: str, machine: Machine, saved: dict[str, Any] | None = None
) -> tuple[dict[str, Any], str]:
    """The configuration with every default filled in, as config.json and the checkpoints keep it.

    Args:
        args: the command line.
        known: `model`, `num_train_images`, `num_val_images`, `num_classes`, `several_labels`, and what the weights expect:
            `channels`, `mean`, `std`, `background`, `value_range`, `input_size` or None.
        norm: the network's kind, `bn` or `ln`.
        machine: where it runs.
        saved: the configuration of the run to continue.

    Returns:
        The configuration, and which recipe it is and why.

    Raises:
        UserError: values that are out of range or do not fit together; names the flag.
    """
    config = {name: value for name, value in vars(args).items() if name != "resume"}
    config |= {
        name: str(value) if (value := getattr(args, name)) else None
        for name in ("weights", "data", "labels", "root", "shard_cache")
    }
    config |= {
        "command": "finetune",
        "output": str(output_folder(args, known["model"])),
        "processes": machine.processes,
        **known,
    }
    num_train = known["num_train_images"]
    small = args.recipe == "small" or (args.recipe == "auto" and num_train < SMALL_SET)
    config["recipe"] = "small" if small else "paper"
    recipe = FinetuneRecipe("for small sets", SMALL) if small else paper_recipe(known["model"], norm)
    why = "" if args.recipe != "auto" else f", chosen since there are {num_train:,} images, " + (
        f"less than {SMALL_SET:,}" if small else f"not less than {SMALL_SET:,}"
    )  # fmt: skip
    check_seed(args.seed)
    check_workers(args.workers)
    _choose_size(config, args, known)
    _choose_batch(config, args, recipe, machine, saved)
    steps = num_train // config["batch_size"]
    if small:
        fill_in(config, {"epochs": max(SMALL_EPOCHS, math.ceil(SMALL_STEPS / steps))})
        fill_in(config, {"warmup_epochs": config["epochs"] / 10, "eval_epochs": max(1, config["epochs"] // 20)})
    defaults = recipe.defaults | ({"layer_decay": 1.0} if args.from_scratch else {})
    if known["several_labels"]:
        defaults |= SEVERAL_LABELS
        why += "; of several labels an image: binary cross entropy, without mixup, cutmix and label smoothing"
    config["ema_warmup"] = defaults["ema_warmup"]
    fill_in(config, defaults)
    fill_in(config, {"workers": default_workers(on_gpu=machine.on_gpu), "max_unreadable": max(10, num_train // 100)})
    if args.warmup_epochs is None:
        config["warmup_epochs"] = min(config["warmup_epochs"], config["epochs"] / 10)
    if config["precision"] == "auto":
        config["precision"] = "bf16" if machine.has_bf16 else "float32"
    _check(config, machine.processes)
    if known["several_labels"]:
        _check_several(config)
    return config, recipe.source + why


def _check_several(config: dict[str, Any]) -> None:
    for name, value in SEVERAL_LABELS.items():
        if config[name] != value:
            raise UserError(
                f"{flag_of(name)} {config[name]} is for images with one class, and these have several labels; leave it out"
            )


def _choose_size(config: dict[str, Any], args: argparse.Namespace, known: dict[str, Any]) -> None:
    if args.input_size is not None and len(args.input_size) > 2:
        raise UserError(f"--input-size takes a side, or height and width; got {len(args.input_size)} numbers")
    size = args.input_size or known["input_size"] or [224]
    if min(size) < 1 or max(size) > MAX_SIDE:
        raise UserError(f"--input-size {max(size)} must be from 1 to {MAX_SIDE}")
    config["input_size"] = [size[0], size[-1]]


def _choose_batch(
    config: dict[str, Any], args: argparse.Namespace, recipe: FinetuneRecipe, machine: Machine, saved: dict[str, Any] | None
) -> None:
    """The recipe's batch, as far as the machine and the number of images go."""
    share = machine.processes * max(1, args.accumulate)
    if config["batch_size"] is None and saved is not None:
        config["batch_size"] = saved.get("batch_size")
    if config["batch_size"] is None:
        per_device = 128 if machine.on_gpu else 32
        wanted = min(recipe.defaults["batch_size"], per_device * machine.processes, config["num_train_images"])
        config["batch_size"] = max(wanted // (2 * share), 1) * 2 * share if wanted >= 2 * share else share
    batch = config["batch_size"]
    if batch < 1 or batch % share:
        raise UserError(
            f"--batch-size {batch} is not a multiple of {machine.processes} processes x --accumulate {args.accumulate}; use "
            f"{max(1, round(batch / share)) * share}"
        )
    if batch > config["num_train_images"]:
        raise UserError(f"--batch-size {batch} is more than the {config['num_train_images']} images to learn from; lower it")


def _check(config: dict[str, Any], processes: int) -> None:
    for name, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag_of(name)} {value} is not a finite number")
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise UserError(f"{flag_of(name)} has a number that is too large")
    for name, least in _AT_LEAST.items():
        if config[name] is not None and config[name] < least:
            raise UserError(f"{flag_of(name)} {config[name]} must be at least {least}")
    for name, (low, high) in _SHARES.items():
        if not low <= config[name] < high and not (name == "random_erasing" and config[name] == 1):
            raise UserError(f"{flag_of(name)} {config[name]} is outside [{low}, {high})")
    if not config["base_lr"] > 0:
        raise UserError(f"--base-lr {config['base_lr']} must be above 0")
    if not 0 < config["layer_decay"] <= 1:
        raise UserError(f"--layer-decay {config['layer_decay']} is outside (0, 1]")
    if not 0 < config["crop_scale"] <= 1:
        raise UserError(f"--crop-scale {config['crop_scale']} is outside (0, 1]")
    if config["warmup_epochs"] >= config["epochs"]:
        raise UserError(f"--warmup-epochs {config['warmup_epochs']} must be less than --epochs {config['epochs']}")
    if config["auto_augment"] != "none" and config["channels"] != 3:
        raise UserError(f"--auto-augment {config['auto_augment']} changes colours; with {config['channels']} channels use none")
    if (config["mixup"] or config["cutmix"]) and (config["batch_size"] // (processes * config["accumulate"])) % 2:
        raise UserError(f"--batch-size {config['batch_size']}: --mixup and --cutmix pair images, so its parts must be even")
