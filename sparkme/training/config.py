"""The command line of `sparkme.pretrain`, and the configuration it means with every default filled in."""

from __future__ import annotations

import argparse
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparkme.errors import Parser, UserError
from sparkme.networks.names import paper_drop_path

PAPER_BATCH, PAPER_WARMUP = 4096, 40
# With --on-nan: of the last so many steps, at most so many may be left out. More are no accident.
MOST_WORKERS = 32  # by default
RECENT_STEPS, MOST_NOT_FINITE = 100, 10


class Machine(NamedTuple):
    """What defaults follow from: how many processes train together, whether on GPUs, and whether these compute in bf16."""

    processes: int = 1
    on_gpu: bool = False
    has_bf16: bool = False


@dataclass(frozen=True)
class Recipe:
    """A published method with its settings, which stand wherever the command line says nothing else.

    Attributes:
        name: for people.
        reference: the paper.
        defaults: by the flags' names.
        crop_scale: of a data set; the few photographs of the demo have their own.
        rate_ends: learning rate at the start of the warm-up and at the end, as shares of the peak.
        largest_batch: up to which the batch grows with the number of processes.
    """

    name: str
    reference: str
    defaults: dict[str, Any]
    crop_scale: float
    rate_ends: tuple[float, float]
    largest_batch: int = PAPER_BATCH


_SPARK = {
    "model": "resnet50", "epochs": 1600, "mask_ratio": 0.6, "decoder_width": 768, "norm_pix_loss": True,
    "optimizer": "lamb", "base_lr": 2e-4, "weight_decay": 0.04, "weight_decay_end": 0.2, "clip_grad": 5.0,
}  # fmt: skip
SMALL_SET = 100_000  # images, below which the recipe `small` is the default
SMALL_CROPS, SMALL_EPOCHS = 400_000, 100  # that it trains on in a run, and the least number of epochs
RECIPES = {
    "spark": Recipe(
        "SparK",
        "SparK (Tian et al., ICLR 2023), arXiv:2301.03580",
        _SPARK,
        crop_scale=0.67,
        rate_ends=(0.005, 0.001),
    ),
    # Found by measurement, see benchmarks/results/small_data.json.
    "small": Recipe(
        "SparK for small sets",
        "SparK (Tian et al., ICLR 2023), arXiv:2301.03580",
        _SPARK | {"epochs": None, "decoder_width": 128, "base_lr": 0.04},
        crop_scale=0.67,
        rate_ends=(0.005, 0.001),
        largest_batch=256,
    ),
    "fcmae": Recipe(
        "FCMAE",
        "FCMAE (Woo et al., ConvNeXt V2, CVPR 2023), arXiv:2301.00808",
        {
            "model": "timm:convnextv2_tiny", "epochs": 800, "mask_ratio": 0.6, "decoder_width": 512, "norm_pix_loss": True,
            "optimizer": "adamw", "base_lr": 1.5e-4, "weight_decay": 0.05, "weight_decay_end": 0.05, "clip_grad": 0.0,
            "beta2": 0.95, "drop_path": 0.0,
        },
        crop_scale=0.2,
        rate_ends=(0.0, 0.0),
    ),
}  # fmt: skip


def _of_recipes(name: str) -> str:
    """For --help: the value in each recipe."""
    values = ["by the number of images" if (v := recipe.defaults[name]) is None else str(v) for recipe in RECIPES.values()]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def choose_recipe(asked: str, num_images: int, saved: dict[str, Any] | None) -> tuple[str, str]:
    """The recipe's name, and why it is that one where it was not asked for.

    Args:
        asked: a name, or `auto`.
        num_images: found in the data.
        saved: the configuration of the run to continue, which stays with its recipe.
    """
    if asked != "auto":
        return asked, ""
    if saved is not None:
        return saved.get("recipe", "spark"), ", as before"
    if num_images < SMALL_SET:
        return "small", f", since there are {num_images:,} images, less than {SMALL_SET:,}; --recipe spark is the paper's"
    return "spark", f", since there are {num_images:,} images, not less than {SMALL_SET:,}"


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sparkme.pretrain",
        description="Pretrain a convolutional network on images without labels (SparK, ICLR 2023, or FCMAE, CVPR 2023).",
        epilog="Defaults are the recipe's; where several stand with strokes between them, they are those of spark, small and "
        "fcmae. The same command again resumes an interrupted run.",
    )
    parser.add_argument(
        "--recipe",
        choices=("auto", *RECIPES),
        default="auto",
        help="spark: the paper's settings; small: SparK with settings for small sets; fcmae: of ConvNeXt V2 (auto: small below "
        f"{SMALL_SET:,} images, else spark)",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=source_argument,
        nargs="+",
        action="extend",
        metavar="SOURCE",
        help="images, labels not needed: a folder, nested or flat; a list (.txt, .csv); tar shards, such as "
        "'shards/{000..146}.tar', also from a URL; Parquet; or package.module:dataset; or several of these, whose images come "
        "together (scikit-image's photographs)",
    )
    add_source(group)
    group.add_argument(
        "--crop-scale",
        type=float,
        metavar="S",
        help="smallest share of an image's area in a crop "
        f"({' / '.join(str(recipe.crop_scale) for recipe in RECIPES.values())}; 0.1 for the photographs)",
    )
    group.add_argument(
        "--samples-per-epoch",
        type=int,
        metavar="N",
        help="crops in an epoch (the number of images; 512 for the photographs)",
    )
    group.add_argument(
        "--max-unreadable",
        type=int,
        metavar="N",
        help="stop when more images than this cannot be read (10, or 1%% of the images if that is more)",
    )
    group.add_argument(
        "--channels",
        type=int,
        default=3,
        metavar="C",
        help="of the images: 3 for colour, 1 for grey, or as many as .npy arrays or the pages of TIFF files have (%(default)s)",
    )
    group.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="M",
        help="of each channel, of values from 0 to 1 (ImageNet's with 3 channels, else estimated once)",
    )
    group.add_argument("--std", type=float, nargs="+", metavar="S", help="deviation of each channel, likewise")
    group.add_argument(
        "--background",
        default="white",
        metavar="COLOUR",
        help="what transparent images are laid on, a name or #rrggbb (%(default)s)",
    )
    add_reduced_jpeg(group)
    add_workers(group)

    group = parser.add_argument_group("network")
    group.add_argument(
        "--model",
        help="a convolutional network: torchvision's NAME, timm:NAME, or your own, package.module:factory "
        f"({_of_recipes('model')})",
    )
    group.add_argument(
        "--list-models",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="print the names that were tried and work, those like PATTERN, such as 'timm:*next*', and leave",
    )
    group.add_argument(
        "--init",
        type=path_argument,
        metavar="FILE",
        help="start from weights of the same network: of torchvision, timm, the ConvNeXt authors, mmpretrain, the official "
        "SparK code, or a checkpoint of this project; behind whatever prefix",
    )
    add_weights(group)
    group.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        default=[224],
        metavar="PIXELS",
        help="side of the crops, or height and width (224)",
    )
    group.add_argument("--patch", type=int, metavar="PIXELS", help="side of a patch (the network's total stride, 32)")
    group.add_argument("--mask-ratio", type=float, help=f"share of patches to hide ({_of_recipes('mask_ratio')})")
    group.add_argument("--decoder-width", type=int, help=f"channels of the decoder's input ({_of_recipes('decoder_width')})")
    group.add_argument(
        "--norm-pix-loss",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare patches after taking away mean and deviation of each; SparK always does (on)",
    )
    group.add_argument(
        "--densify-norm",
        choices=("auto", "bn", "ln", "none"),
        default="auto",
        help="norm before mask tokens are filled in, with SparK (the network's own kind)",
    )
    group.add_argument(
        "--drop-path",
        type=float,
        metavar="P",
        help="drop path of the deepest block (SparK's for this model, else 0)",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help=f"({_of_recipes('epochs')})")
    group.add_argument("--warmup-epochs", type=float, help=f"linear warm-up ({PAPER_WARMUP}, at most a tenth of --epochs)")
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="GLOBAL batch, over all processes and accumulation steps (128 per GPU or 32 per CPU process, "
        "up to " + " / ".join(str(recipe.largest_batch) for recipe in RECIPES.values()) + " and the number of samples)",
    )
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="split each process's batch into N forward passes, to save memory (%(default)s)",
    )
    group.add_argument("--base-lr", type=float, help=f"peak learning rate per 256 images ({_of_recipes('base_lr')})")
    group.add_argument("--weight-decay", type=float, help=f"at the start ({_of_recipes('weight_decay')})")
    group.add_argument("--weight-decay-end", type=float, help=f"at the end, by a cosine ({_of_recipes('weight_decay_end')})")
    group.add_argument("--clip-grad", type=float, help=f"largest gradient norm; 0 for no limit ({_of_recipes('clip_grad')})")
    group.add_argument("--optimizer", choices=("lamb", "adamw"), help=f"({_of_recipes('optimizer')})")
    group.add_argument("--beta2", type=float, help="second moment's decay (0.999 for ConvNeXts with SparK, else 0.95)")

    group = parser.add_argument_group("machine")
    add_device(group)
    add_engine(group)
    add_precision(group)
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the encoder's stages and the decoder: minutes at the start, for a GPU (slower on the CPU)",
    )
    group.add_argument(
        "--cuda-graph",
        action="store_true",
        help="queue each step's forward and backward pass as one CUDA graph: faster where the host is slower than the GPU; for "
        "one process",
    )
    group.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="keep only what goes into the encoder's blocks, and compute them again for the gradient: less memory, more time",
    )
    add_seed(group)

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=path_argument, metavar="DIR", help="run folder (runs/MODEL-SIZE, or runs/fcmae-MODEL-SIZE)"
    )
    add_run(group)
    group.add_argument(
        "--panel-epochs",
        type=int,
        metavar="N",
        help="draw reconstructions every N epochs; 0 never (ten times in a run)",
    )
    group.add_argument(
        "--probe-data",
        type=source_argument,
        metavar="LABELLED",
        help="labelled images, a folder for each class or a .csv, to measure the frozen encoder's kNN accuracy on while it "
        "trains (none)",
    )
    group.add_argument("--probe-epochs", type=int, metavar="K", help="measure it every K epochs (ten times in a run)")
    return parser


def add_run(group: argparse._ArgumentGroup) -> None:
    """The flags of the loop."""
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue the run in --output; --no-resume starts it anew (%(default)s)",
    )
    group.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=10.0,
        metavar="M",
        help="save when the last save is older; 0 saves every epoch (%(default)s)",
    )
    group.add_argument("--keep-checkpoints", type=int, default=3, metavar="N", help="the newest N (%(default)s)")
    group.add_argument(
        "--keep-every", type=int, default=0, metavar="K", help="and, for good, that of every K-th epoch; 0: none (%(default)s)"
    )
    group.add_argument("--log-steps", type=int, default=10, metavar="N", help="steps between log lines (%(default)s)")
    group.add_argument(
        "--on-nan",
        choices=("stop", "skip", "rollback"),
        default="stop",
        help="a step whose loss or gradient is not finite: stop; leave it out; or leave it out and go on with the weights of "
        "the last checkpoint. The last two wait for the device in every step, and stop after "
        f"{MOST_NOT_FINITE} such steps of {RECENT_STEPS} (%(default)s)",
    )
    group.add_argument(
        "--on-full-disk",
        choices=("continue", "stop"),
        default="continue",
        help="what cannot be written: say so, go on, and try again; or save if possible, and stop (%(default)s)",
    )
    group.add_argument(
        "--hang-seconds",
        type=float,
        default=45.0,
        metavar="S",
        help="end a process where a step, waiting for images or for other processes takes longer than this and five usual "
        "steps, or where its start does nothing for ten minutes; 0: never (%(default)s)",
    )
    group.add_argument("--wandb", action="store_true", help="send the metrics to Weights & Biases, too, where it is installed")


def add_device(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")


def add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--engine",
        choices=("auto", "cuda_ext", "minkowski", "masked-dense"),
        default="auto",
        help="kernels of the encoder (%(default)s: the first of these that can run)",
    )


def add_weights(group: argparse._ArgumentGroup) -> None:
    """How weights are found in a file of another code, see `sparkme.weights.prefixes`."""
    group.add_argument(
        "--weights-key",
        metavar="NAME",
        help="which weights of a file that has several of this network: a container or module in it, such as teacher, "
        "state_dict_ema or encoder_k (what is trained itself, before an average of it)",
    )
    group.add_argument(
        "--adapt-stem",
        choices=("sum", "mean", "repeat"),
        help="change the first convolution of weights that are for another number of channels: each channel gets its share of "
        "the sum, or the mean, or the channels are repeated (such weights are refused)",
    )


def add_precision(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bf16"),
        default="auto",
        help="autocast to bf16 (auto: on GPUs that have it)",
    )
    group.add_argument(
        "--tf32",
        action="store_true",
        help="let a GPU multiply float32 numbers in TF32, which has 10 bits of them: all products, or without this none",
    )


def add_workers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workers", type=int, metavar="N", help="processes that load images (as many as cores, at most 32, or 8 without a GPU)"
    )


def add_source(group: argparse._ArgumentGroup) -> None:
    """What goes with `--data`."""
    group.add_argument(
        "--root", type=path_argument, metavar="DIR", help="what the names in a list are below (the list's own folder)"
    )
    group.add_argument(
        "--shard-cache",
        type=path_argument,
        metavar="DIR",
        help="for what is known of tar shards, and for copies of those that are compressed or remote (~/.cache/sparkme/shards)",
    )
    group.add_argument(
        "--shard-cache-gib", type=float, default=50.0, metavar="G", help="that the copies may take together (%(default)s)"
    )
    group.add_argument(
        "--max-pixels", type=int, metavar="N", help="of an image; with more it counts as unreadable (178956970, Pillow's limit)"
    )
    group.add_argument(
        "--image-column", metavar="NAME", help="of Parquet: what has the bytes of images (found by its name and type)"
    )
    group.add_argument(
        "--label-column",
        metavar="NAME",
        help="of Parquet: what has the labels (label, labels, cls or class, whichever is there)",
    )
    add_pixels(group)


def add_pixels(group: argparse._ArgumentGroup) -> None:
    """How the numbers of images are read."""
    group.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="which numbers of the images are black and white, such as 0 4095 for 12 bits; others are cut (0 255 for 8 bits; "
        "for more, what the run found that is taken up, else what some of the images let one estimate)",
    )
    group.add_argument(
        "--upright",
        action=argparse.BooleanOptionalAction,
        help="turn images as their EXIF or TIFF says (as the run that is taken up, else on)",
    )


def add_reduced_jpeg(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--reduced-jpeg",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode JPEG files at 1/2, 1/4 or 1/8 of their size where a crop keeps as many pixels as it needs: faster, and a "
        "few grey levels different (on)",
    )


def add_seed(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=int, default=0, help="(%(default)s)")


def add_labelled_data(parser: argparse.ArgumentParser) -> None:
    """The group of flags that say where labelled images are."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=source_argument,
        required=True,
        action=_Once,
        metavar="LABELLED",
        help="a folder with a folder of images for each class, or with folders train and val of that kind; a .csv; tar shards "
        "with .cls or .json; Parquet with a column label; or package.module:dataset with `targets`",
    )
    add_source(group)
    group.add_argument(
        "--labels",
        type=source_argument,
        metavar="FILE_OR_COLUMNS",
        help="a table with lines of path,label for images in --data, whose column split may say train or val; or, where --data "
        "is a table, the column with labels. Several, with commas between, of 0 and 1 or of names: several labels an image "
        "(finetune only)",
    )
    group.add_argument(
        "--label-separator",
        metavar="TEXT",
        help="what parts several labels of an image in a table, such as '|' (finetune only); '' if each cell is one class",
    )
    group.add_argument(
        "--val-share",
        type=float,
        default=0.2,
        metavar="S",
        help="share of each class to measure on, where the data names no split (%(default)s)",
    )


class _Once(argparse.Action):
    """A flag of which the second would otherwise take the place of the first, in silence."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} is given twice; link the folders of classes into one folder, or name images in a .csv")
        setattr(namespace, self.dest, values)


LARGEST = 2**63  # of any number: what a float32 and an int64 hold
MAX_CHANNELS, MAX_SIDE = 4096, 16384


def path_argument(text: str) -> Path:
    """A path from the command line; an empty one, as of a variable that is not set, would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no valid UTF-8") from None
    return Path(text)


def source_argument(text: str) -> str:
    """What `sparkme.data.sources` reads."""
    path_argument(text)
    if "\0" in text:
        raise argparse.ArgumentTypeError("has a character that no name has")
    return text


# What a resumed run must share with its checkpoint: the network, the optimiser's state, and what a step is.
FIXED = ("recipe", "model", "channels", "input_size", "patch", "decoder_width", "densify_norm", "optimizer", "beta2",
         "batch_size", "samples_per_epoch", "seed")  # fmt: skip

OLDER = {"recipe": "spark", "channels": 3}  # what checkpoints mean that do not say

_AT_LEAST = {"epochs": 1, "accumulate": 1, "log_steps": 1, "keep_checkpoints": 1, "keep_every": 0, "hang_seconds": 0,
             "shard_cache_gib": 0,
             "batch_size": 1, "samples_per_epoch": 1,
             "patch": 1, "channels": 1, "max_unreadable": 0, "weight_decay": 0, "weight_decay_end": 0,
             "clip_grad": 0, "checkpoint_minutes": 0, "panel_epochs": 0, "probe_epochs": 1, "warmup_epochs": 0}  # fmt: skip


def output_folder(args: argparse.Namespace) -> Path:
    """The run folder that was asked for, or the one that the model and the size stand for."""
    default = RECIPES["fcmae" if args.recipe == "fcmae" else "spark"].defaults["model"]
    model = re.sub(r"[^\w.]+", "-", args.model or default)
    model = f"fcmae-{model}" if args.recipe == "fcmae" else model
    return args.output or Path("runs", f"{model}-{'x'.join(map(str, args.input_size))}")


def resolve_config(
    args: argparse.Namespace, num_images: int, machine: Machine, saved: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The configuration with every default filled in, as config.json and the checkpoints keep it; and, for people, as
    `recipe_reason` why it is that recipe.

    Args:
        args: the command line.
        num_images: found in the data.
        machine: where it runs.
        saved: the configuration of the run to continue; what follows from the number of images stays as it was there.

    Raises:
        UserError: values that are out of range or do not fit together; names the flag.
    """
    config = {name: value for name, value in vars(args).items() if name not in ("resume", "list_models")}
    config |= {
        name: str(value) if (value := getattr(args, name)) else None for name in ("root", "shard_cache", "init", "probe_data")
    }
    config["data"] = args.data[0] if isinstance(args.data, list) and len(args.data) == 1 else args.data
    config |= {
        "command": "pretrain",
        "output": str(output_folder(args)),
        "num_images": num_images,
        "processes": machine.processes,
    }
    if (args.weights_key or args.adapt_stem) and not args.init:
        raise UserError("--weights-key and --adapt-stem say how --init is read, which is missing")
    if args.probe_epochs is not None and not args.probe_data:
        raise UserError("--probe-epochs needs --probe-data, the labelled images to measure on")
    if args.label_column is not None and not args.probe_data:
        raise UserError("--label-column needs --probe-data: pretraining itself takes no labels")
    config["recipe"], config["recipe_reason"] = choose_recipe(args.recipe, num_images, saved)
    recipe = RECIPES[config["recipe"]]
    fill_in(config, recipe.defaults)
    fill_in(config, {"samples_per_epoch": saved.get("samples_per_epoch") if saved else num_images if args.data else 512})
    if config["epochs"] is None:
        config["epochs"] = max(SMALL_EPOCHS, math.ceil(SMALL_CROPS / max(1, config["samples_per_epoch"])))
    epochs = config["epochs"]
    check_seed(args.seed)
    for name, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag_of(name)} {value} is not a finite number")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and abs(number) > LARGEST:
                raise UserError(f"{flag_of(name)} has a number that is too large")
    for name, least in _AT_LEAST.items():
        if config[name] is not None and config[name] < least:
            raise UserError(f"{flag_of(name)} {config[name]} must be at least {least}")
    check_workers(args.workers)
    check_value_range(args.value_range)
    if args.channels > MAX_CHANNELS:
        raise UserError(f"--channels {args.channels} must be at most {MAX_CHANNELS}")
    if max(args.input_size) > MAX_SIDE:
        raise UserError(f"--input-size {as_text(args.input_size)} must be at most {MAX_SIDE}")
    if not config["base_lr"] > 0:
        raise UserError(f"--base-lr {config['base_lr']} must be above 0")
    if config["recipe"] != "fcmae" and not config["norm_pix_loss"]:
        raise UserError("--no-norm-pix-loss is for --recipe fcmae; SparK always normalises patches")
    if args.recipe == "fcmae" and args.densify_norm != "auto":
        raise UserError(f"--densify-norm {args.densify_norm} is for SparK (--recipe spark or small); FCMAE has no norm there")
    if config["beta2"] is not None and not 0 <= config["beta2"] < 1:
        raise UserError(f"--beta2 {config['beta2']} is outside [0, 1)")
    if len(args.input_size) > 2:
        raise UserError(f"--input-size takes a side, or height and width; got {len(args.input_size)} numbers")
    config["input_size"] = [args.input_size[0], args.input_size[-1]]

    kept = saved if saved and saved.get("channels", 3) == args.channels else {}
    for name in ("mean", "std"):
        values = config[name] = config[name] or kept.get(name)
        if values is not None and len(values) != args.channels:
            raise UserError(f"--{name} takes {args.channels} numbers, one for each of --channels; got {len(values)}")
        if values is not None and not all(math.isfinite(v) and (v > 0 or name == "mean") for v in values):
            raise UserError(f"--{name} {as_text(values)} must be finite{'' if name == 'mean' else ' and above 0'}")
        if values is not None and any(not 0 <= v <= 1 for v in values):
            raise UserError(f"--{name} {as_text(values)}: pixels are numbers from 0 to 1, so these are, too; divide by 255")
    if (config["mean"] is None) != (config["std"] is None):
        raise UserError("--mean and --std go together; give both or none")

    fill_in(config, {
        "crop_scale": recipe.crop_scale if args.data else 0.1,
        "batch_size": saved.get("batch_size") if saved else None,
        "warmup_epochs": min(PAPER_WARMUP, epochs / 10),
        "drop_path": paper_drop_path(config["model"]),
        "beta2": 0.999 if config["model"].removeprefix("timm:").startswith("convnext") else 0.95,
        "workers": default_workers(on_gpu=machine.on_gpu),
        "max_unreadable": max(10, num_images // 100),
        "panel_epochs": max(1, epochs // 10),
        "probe_epochs": max(1, epochs // 10) if args.probe_data else 0,
    })  # fmt: skip
    if config["precision"] == "auto":
        config["precision"] = "bf16" if machine.has_bf16 else "float32"
    if not 0 < config["crop_scale"] <= 1:
        raise UserError(f"--crop-scale {config['crop_scale']} is outside (0, 1]")
    if config["warmup_epochs"] >= epochs:
        raise UserError(f"--warmup-epochs {config['warmup_epochs']} must be less than --epochs {epochs}")

    samples = config["samples_per_epoch"]
    share = machine.processes * args.accumulate  # the global batch is a multiple of it
    if config["batch_size"] is None:
        wanted = min(recipe.largest_batch, (128 if machine.on_gpu else 32) * machine.processes, samples)
        config["batch_size"] = max(wanted // share, 1) * share
    batch = config["batch_size"]
    if batch % share:
        raise UserError(
            f"--batch-size {batch} is not a multiple of {machine.processes} processes x --accumulate {args.accumulate}; use "
            f"{max(1, round(batch / share)) * share}"
        )
    if batch > samples:
        raise UserError(
            f"--batch-size {batch} is more than the {samples} crops of an epoch; lower it, or raise --samples-per-epoch to at "
            f"least {batch}"
        )
    return config


def check_value_range(values: list[float] | None) -> None:
    """Raises UserError for what is no range; whole numbers become integers, for people."""
    if values is None:
        return
    if not (all(math.isfinite(v) and abs(v) <= LARGEST for v in values) and values[0] < values[1]):
        raise UserError(f"--value-range {as_text(values)}: takes two finite numbers, the lower one first")
    values[:] = [int(v) if v % 1 == 0 else v for v in values]


def check_workers(workers: int | None) -> None:
    """Raises UserError for more processes than a machine is well with."""
    cores = len(os.sched_getaffinity(0))
    if workers is not None and workers < 0:
        raise UserError(f"--workers {workers} must be at least 0")
    if workers is not None and workers > (most := max(16, 4 * cores)):
        raise UserError(f"--workers {workers} is more than {most}, four for each of {cores} cores or 16; lower it")


def default_workers(*, on_gpu: bool) -> int:
    """Processes that load images: the cores, shared among the training processes of this machine.

    On a CPU they take cores from training. A GPU that takes thousands of images a second wants dozens of them.
    """
    most = MOST_WORKERS if on_gpu else 8
    return min(most, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that torch cannot take."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed} must be {'at least 0' if seed < 0 else 'below 2^63'}")


def fill_in(config: dict[str, Any], defaults: dict[str, Any]) -> None:
    config.update({name: value for name, value in defaults.items() if config[name] is None})


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
