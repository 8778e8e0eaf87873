"""Settings that several commands have, in groups that their own settings inherit.

Python puts the fields of the last base class first, so a command names the group last that --help is to show first.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sparkme.errors import UserError
from sparkme.settings.declare import (
    LARGEST,
    Settings,
    as_text,
    found,
    in_data,
    in_images,
    in_machine,
    in_network,
    in_optimisation,
    in_output,
    path_argument,
)

MAX_CHANNELS, MAX_SIDE = 4096, 16384
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of each channel, of values in [0, 1]
MOST_WORKERS = 32  # by default
# With --on-nan: more skipped steps than this among the recent ones are no accident.
RECENT_STEPS, MOST_NOT_FINITE = 100, 10


class Machine(NamedTuple):
    """What defaults follow from: how many processes train together, whether on GPUs, and whether these compute in bf16."""

    processes: int = 1
    on_gpu: bool = False
    has_bf16: bool = False


def source_argument(text: str) -> str:
    """What `sparkme.data.sources` reads."""
    path_argument(text)
    if "\0" in text:
        raise argparse.ArgumentTypeError("has a character that no name has")
    return text


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Settings):
    """Where images are."""

    # fmt: off
    data: Any = in_data("images", parse=source_argument)
    root: Path | None = in_data(
        "folder that relative names in a list start from", otherwise="the list's own folder", metavar="DIR")
    shard_cache: Path | None = in_data(
        "folder for the index of tar shards and for copies of compressed or remote shards",
        otherwise="~/.cache/sparkme/shards", metavar="DIR")
    shard_cache_gib: float = in_data("GiB of shards kept in the cache", 50.0, metavar="G", at_least=0)
    max_pixels: int | None = in_data(
        "treat an image with more pixels as unreadable", otherwise="178956970, Pillow's limit", metavar="N")
    image_column: str | None = in_data(
        "Parquet column with the images", otherwise="found by its name and type", metavar="NAME")
    label_column: str | None = in_data(
        "Parquet column with the labels", otherwise="the first of label, labels, cls and class that exists", metavar="NAME")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class PixelSettings(Settings):
    """How pixel values become numbers from 0 to 1."""

    # fmt: off
    # Two numbers on the command line; in a run's settings one range for each pixel type, see `sparkme.data.planes`.
    value_range: Any = in_data(
        "pixel values of black and white, such as 0 4095 for 12 bits; values outside are clipped", parse=float, nargs=2,
        otherwise="0 255 for 8 bits; for more bits the range of the pretraining run, else estimated from some images",
        metavar=("LOW", "HIGH"))
    upright: bool = in_data(
        "rotate images as their EXIF or TIFF orientation says", otherwise="as in the pretraining run, else on", older=True)
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class LabelledSettings(SourceSettings):
    """Where labelled images are."""

    # fmt: off
    data: str = in_data(
        "labelled images: a folder with one folder per class, or with train and val folders of that form; a .csv; tar shards "
        "with .cls or .json entries; Parquet with a label column; or package.module:dataset with `targets`", metavar="LABELLED",
        parse=source_argument, required=True, once="link the class folders into one folder, or list the images in a .csv")
    labels: str | None = in_data(
        "table of path,label for the images in --data, with an optional split column (train or val); if --data is a table "
        "itself, the name of its label column. Several columns, separated by commas, of 0 and 1 or of names give each image "
        "several labels (finetune only)", metavar="FILE_OR_COLUMNS", parse=source_argument)
    label_separator: str | None = in_data(
        "text between several labels in one cell of a table, such as '|' (finetune only); '': each cell is one class",
        metavar="TEXT")
    val_share: float = in_data("share of each class to validate on, if the data has no split", 0.2, metavar="S")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class WeightSettings(Settings):
    """How weights are found in a file that other code wrote, see `sparkme.weights.prefixes`."""

    # fmt: off
    weights_key: str | None = in_network(
        "which weights to load if the file has several sets for this network: the name of a container or module, such as "
        "teacher, state_dict_ema or encoder_k", otherwise="trained weights rather than their running average", metavar="NAME")
    adapt_stem: str | None = in_network(
        "fit the first convolution to another number of channels: divide the sum of its channels evenly, give each their "
        "mean, or repeat them", otherwise="weights for another number of channels are refused",
        choices=("sum", "mean", "repeat"))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """Where the command computes."""

    # fmt: off
    device: str = in_machine("device: auto, cpu, cuda or cuda:N", "auto")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """What computes the sparse encoder."""

    # fmt: off
    engine: str = in_machine(
        "kernels of the sparse encoder", "auto", otherwise="auto, the first in this list that can run",
        choices=("auto", "cuda_ext", "minkowski", "masked-dense"))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class LoaderSettings(Settings):
    """How images are loaded, and the seed."""

    # fmt: off
    workers: int = in_machine(
        "processes that load images", otherwise="one per core, at most 32 with a GPU and 8 without", metavar="N", at_least=0)
    seed: int = in_machine("random seed", 0, at_least=0, fixed=True)
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class CropSettings(Settings):
    """Random crops of one size."""

    # fmt: off
    input_size: tuple[int, ...] = in_images(
        "side of the crops, or their height and width", metavar="PIXELS", nargs="+", fixed=True, at_least=1, at_most=MAX_SIDE)
    crop_scale: float = in_images("smallest area of a crop, as a share of the image's area", metavar="S", above=0, at_most=1)
    reduced_jpeg: bool = in_images(
        "decode JPEG files at 1/2, 1/4 or 1/8 of their size if the crop still has enough pixels: faster, and pixels differ by "
        "a few grey levels", True)
    # fmt: on

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the crops."""
        return self.input_size[0], self.input_size[-1]


T = TypeVar("T", bound="TrainingSettings")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(LoaderSettings, DeviceSettings):
    """Settings of pretraining and of every task of fine-tuning, which their loop and checkpoints read.

    Batches are counted over all processes and accumulation steps.
    """

    # fmt: off
    model: str = in_network("the network", fixed=True)
    max_unreadable: int = in_images(
        "stop after more than N unreadable images", otherwise="10, or 1% of the images if that is more", metavar="N",
        at_least=0)

    drop_path: float = in_network(
        "drop-path rate of the deepest block; it grows from 0 at the first", metavar="P", at_least=0, below=1)

    epochs: int = in_optimisation("epochs to train for", at_least=1)
    warmup_epochs: float = in_optimisation("epochs of linear learning-rate warm-up", at_least=0)
    batch_size: int = in_optimisation(
        "GLOBAL batch size, over all processes and accumulation steps", metavar="N", fixed=True, at_least=1)
    accumulate: int = in_optimisation(
        "split each process's batch into N forward passes to save memory", 1, metavar="N", at_least=1)
    optimizer: str = in_optimisation("optimiser", choices=("lamb", "adamw"), fixed=True)
    base_lr: float = in_optimisation("peak learning rate for a batch of 256; it scales linearly with the batch size", above=0)
    weight_decay: float = in_optimisation("weight decay", at_least=0)
    clip_grad: float = in_optimisation("clip the gradient norm to this; 0: no clipping", at_least=0)

    precision: str = in_machine(
        "float32, or autocast to bf16", "auto", otherwise="auto, bf16 on GPUs that have it",
        choices=("auto", "float32", "bf16"))
    tf32: bool = in_machine(
        "let a GPU multiply float32 numbers in TF32 (10 bits of mantissa) everywhere; off: nowhere", False)

    output: Path = in_output("run folder", metavar="DIR")
    resume: bool = in_output("continue the run in --output; --no-resume starts again", True, saved=False)
    checkpoint_minutes: float = in_output(
        "save a checkpoint when the last one is M minutes old; 0: after every epoch", 10.0, metavar="M", at_least=0)
    keep_checkpoints: int = in_output("keep the newest N checkpoints", 3, metavar="N", at_least=1)
    keep_every: int = in_output("also keep the checkpoint of every K-th epoch for good; 0: none", 0, metavar="K", at_least=0)
    log_steps: int = in_output("steps between log lines", 10, metavar="N", at_least=1)
    on_nan: str = in_output(
        "what to do with a step whose loss or gradient is not finite: stop training; skip the step; or rollback: skip it and "
        "load the last checkpoint's weights. skip and rollback synchronise with the device in every step, and stop after "
        f"{MOST_NOT_FINITE} such steps in {RECENT_STEPS}", "stop", choices=("stop", "skip", "rollback"))
    on_full_disk: str = in_output(
        "what to do when a file cannot be written: continue training and try again later; or stop, after saving if possible",
        "continue",
        choices=("continue", "stop"))
    hang_seconds: float = in_output(
        "end a process that hangs: a step, or waiting for images or other processes, takes longer than S seconds and than five "
        "usual steps, or start-up makes no progress for ten minutes; 0: never", 45.0, metavar="S", at_least=0)
    wandb: bool = in_output("also send the metrics to Weights & Biases, if it is installed", False)

    # Found in the data, on the machine or in the weights.
    command: str = found(default="")
    processes: int = found()
    channels: int = found()
    mean: tuple[float, ...] = found()
    std: tuple[float, ...] = found()
    background: str = found(default="white")
    # fmt: on

    @property
    def peak_rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.base_lr * self.batch_size / 256

    @property
    def images_per_pass(self) -> int:
        """Images in one forward pass of one process."""
        return self.batch_size // (self.processes * self.accumulate)


def fixed_size(sides: Sequence[int]) -> tuple[int, int]:
    """Height and width from the values of --input-size.

    Raises:
        UserError: too many numbers.
    """
    if len(sides) > 2:
        raise UserError(f"--input-size takes a side, or height and width; got {len(sides)} numbers")
    return sides[0], sides[-1]


def checked_range(values: Sequence[float] | None) -> list[float] | None:
    """The values of --value-range, whole numbers as integers. Raises UserError if they are no range."""
    if values is None:
        return None
    low, high = (int(v) if math.isfinite(v) and v % 1 == 0 else v for v in values)
    if not (all(math.isfinite(v) and abs(v) <= LARGEST for v in (low, high)) and low < high):
        raise UserError(f"--value-range {as_text(values)}: takes two finite numbers, the lower one first")
    return [low, high]


def check_workers(workers: int | None) -> None:
    """Raises UserError for more loading processes than the machine can usefully run."""
    cores = len(os.sched_getaffinity(0))
    if workers is not None and workers > (most := max(16, 4 * cores)):
        raise UserError(f"--workers {workers} is more than {most} (4 per core of {cores} cores, or 16); use fewer")


def default_workers(*, on_gpu: bool) -> int:
    """Processes that load images: the cores, shared among the training processes of this machine.

    On a CPU they take cores from training. A GPU that takes thousands of images a second wants dozens of them.
    """
    most = MOST_WORKERS if on_gpu else 8
    return min(most, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def with_precision(settings: T, machine: Machine) -> T:
    """The settings with `auto` precision resolved for the machine."""
    if settings.precision != "auto":
        return settings
    return replace(settings, precision="bf16" if machine.has_bf16 else "float32")


def check_batch(settings: TrainingSettings, crops: int = 1) -> None:
    """Raises UserError for a batch that cannot be shared out evenly, with so many crops of an image together."""
    batch, share = settings.batch_size, settings.processes * settings.accumulate * crops
    if batch % share:
        together = f" x {crops} crops of an image" if crops > 1 else ""
        raise UserError(
            f"--batch-size {batch} is not a multiple of {settings.processes} processes x --accumulate {settings.accumulate}"
            f"{together}; use {max(1, round(batch / share)) * share}"
        )


def check_warmup(settings: TrainingSettings) -> None:
    """Raises UserError for a warm-up that never ends."""
    if settings.warmup_epochs >= settings.epochs:
        raise UserError(f"--warmup-epochs {settings.warmup_epochs} must be less than --epochs {settings.epochs}")
