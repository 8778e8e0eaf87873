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
# With --on-nan: of the last so many steps, at most so many may be left out. More are no accident.
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
        "the folder that the names in a list start from", otherwise="the list's own folder", metavar="DIR")
    shard_cache: Path | None = in_data(
        "folder for the index of tar shards, and for copies of shards that are compressed or remote",
        otherwise="~/.cache/sparkme/shards", metavar="DIR")
    shard_cache_gib: float = in_data("GiB of shards kept in the cache", 50.0, metavar="G", at_least=0)
    max_pixels: int | None = in_data(
        "an image with more pixels counts as unreadable", otherwise="178956970, Pillow's limit", metavar="N")
    image_column: str | None = in_data(
        "column of a Parquet file with the images", otherwise="found by its name and type", metavar="NAME")
    label_column: str | None = in_data(
        "column of a Parquet file with the labels", otherwise="label, labels, cls or class, whichever is there", metavar="NAME")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class PixelSettings(Settings):
    """How the numbers of images become values from 0 to 1."""

    # fmt: off
    # Two numbers as they are given; in a run's settings the range of each kind of numbers, as `sparkme.data.planes` has it.
    value_range: Any = in_data(
        "the numbers that are black and white, such as 0 4095 for 12 bits; others are cut", parse=float, nargs=2,
        otherwise="0 255 for 8 bits; for more bits those of the run whose weights are read, else estimated from some images",
        metavar=("LOW", "HIGH"))
    upright: bool = in_data(
        "turn images as their EXIF or TIFF says", otherwise="as the run whose weights are read, else on", older=True)
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class LabelledSettings(SourceSettings):
    """Where labelled images are."""

    # fmt: off
    data: str = in_data(
        "a folder with a folder of images for each class, or with folders train and val of that kind; a .csv; tar shards with "
        ".cls or .json; Parquet with a column label; or package.module:dataset with `targets`", metavar="LABELLED",
        parse=source_argument, required=True, once="link the folders of classes into one folder, or name images in a .csv")
    labels: str | None = in_data(
        "a table with lines of path,label for images in --data, whose column split may say train or val; or, where --data is a "
        "table, the column with labels. Several, with commas between, of 0 and 1 or of names: several labels an image, for "
        "finetune only", metavar="FILE_OR_COLUMNS", parse=source_argument)
    label_separator: str | None = in_data(
        "what separates several labels of an image in a table, such as '|', for finetune only; '' if each cell is one class",
        metavar="TEXT")
    val_share: float = in_data("share of each class to measure on, where the data names no split", 0.2, metavar="S")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class WeightSettings(Settings):
    """How weights are found in a file of another code, see `sparkme.weights.prefixes`."""

    # fmt: off
    weights_key: str | None = in_network(
        "which weights to take of a file that has several of this network: a container or module in it, such as teacher, "
        "state_dict_ema or encoder_k", otherwise="what is trained itself, before an average of it", metavar="NAME")
    adapt_stem: str | None = in_network(
        "change the first convolution of weights that are for another number of channels: each channel gets its share of the "
        "sum, or the mean, or the channels are repeated", otherwise="such weights are refused",
        choices=("sum", "mean", "repeat"))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """What computes."""

    # fmt: off
    device: str = in_machine("auto, cpu, cuda or cuda:N", "auto")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """What computes the sparse encoder."""

    # fmt: off
    engine: str = in_machine(
        "kernels of the encoder", "auto", otherwise="auto: the first of these that can run",
        choices=("auto", "cuda_ext", "minkowski", "masked-dense"))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class LoaderSettings(Settings):
    """How images are loaded, and what is drawn at random."""

    # fmt: off
    workers: int = in_machine(
        "processes that load images", otherwise="as many as cores, at most 32, or 8 without a GPU", metavar="N", at_least=0)
    seed: int = in_machine("seed of all that is random", 0, at_least=0, fixed=True)
    # fmt: on


T = TypeVar("T", bound="TrainingSettings")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(LoaderSettings, DeviceSettings):
    """What pretraining and fine-tuning share, and what their loop and their checkpoints read.

    Batches are counted over all processes and accumulation steps.
    """

    # fmt: off
    model: str = in_network("the network", fixed=True)
    input_size: tuple[int, ...] = in_images(
        "side of the crops, or height and width", metavar="PIXELS", nargs="+", fixed=True, at_least=1, at_most=MAX_SIDE)
    crop_scale: float = in_images("smallest share of an image's area in a crop", metavar="S", above=0, at_most=1)
    max_unreadable: int = in_images(
        "stop when more images than this cannot be read", otherwise="10, or 1% of the images if that is more", metavar="N",
        at_least=0)
    reduced_jpeg: bool = in_images(
        "decode JPEG files at 1/2, 1/4 or 1/8 of their size where a crop keeps as many pixels as it needs: faster, and a few "
        "grey levels different", True)

    drop_path: float = in_network("drop path of the deepest block, from 0 at the first", metavar="P", at_least=0, below=1)

    epochs: int = in_optimisation("epochs to train for", at_least=1)
    warmup_epochs: float = in_optimisation("linear warm-up", at_least=0)
    batch_size: int = in_optimisation(
        "GLOBAL batch, over all processes and accumulation steps", metavar="N", fixed=True, at_least=1)
    accumulate: int = in_optimisation(
        "split each process's batch into N forward passes, to save memory", 1, metavar="N", at_least=1)
    optimizer: str = in_optimisation("optimiser", choices=("lamb", "adamw"), fixed=True)
    base_lr: float = in_optimisation("peak learning rate per 256 images", above=0)
    weight_decay: float = in_optimisation("weight decay", at_least=0)
    clip_grad: float = in_optimisation("largest gradient norm; 0 for no limit", at_least=0)

    precision: str = in_machine(
        "autocast to bf16", "auto", otherwise="auto: on GPUs that have it", choices=("auto", "float32", "bf16"))
    tf32: bool = in_machine(
        "let a GPU multiply float32 numbers in TF32, which keeps 10 bits of them, in all products; without this in none", False)

    output: Path = in_output("run folder", metavar="DIR")
    resume: bool = in_output("continue the run in --output; --no-resume starts it anew", True, saved=False)
    checkpoint_minutes: float = in_output(
        "save when the last save is older; 0 saves every epoch", 10.0, metavar="M", at_least=0)
    keep_checkpoints: int = in_output("keep the newest N checkpoints", 3, metavar="N", at_least=1)
    keep_every: int = in_output("and keep that of every K-th epoch for good; 0: none", 0, metavar="K", at_least=0)
    log_steps: int = in_output("steps between log lines", 10, metavar="N", at_least=1)
    on_nan: str = in_output(
        "a step whose loss or gradient is not finite: stop; skip: leave it out; or rollback: leave it out and go "
        "on with the weights of the last checkpoint. skip and rollback wait for the device in every step, and stop after "
        f"{MOST_NOT_FINITE} such steps of {RECENT_STEPS}", "stop", choices=("stop", "skip", "rollback"))
    on_full_disk: str = in_output(
        "what to do where a file cannot be written: say so, go on, and try again; or save if possible, and stop", "continue",
        choices=("continue", "stop"))
    hang_seconds: float = in_output(
        "end a process where a step, waiting for images or for other processes takes longer than this and five usual steps, or "
        "where its start does nothing for ten minutes; 0: never", 45.0, metavar="S", at_least=0)
    wandb: bool = in_output("send the metrics to Weights & Biases, too, where it is installed", False)

    # What is found, or known from the weights.
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

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the crops."""
        return self.input_size[0], self.input_size[-1]


def fixed_size(sides: Sequence[int]) -> tuple[int, int]:
    """Height and width of what --input-size was given.

    Raises:
        UserError: too many numbers.
    """
    if len(sides) > 2:
        raise UserError(f"--input-size takes a side, or height and width; got {len(sides)} numbers")
    return sides[0], sides[-1]


def checked_range(values: Sequence[float] | None) -> list[float] | None:
    """What --value-range was given; whole numbers as integers, for people.

    Raises:
        UserError: it is no range.
    """
    if values is None:
        return None
    low, high = (int(v) if math.isfinite(v) and v % 1 == 0 else v for v in values)
    if not (all(math.isfinite(v) and abs(v) <= LARGEST for v in (low, high)) and low < high):
        raise UserError(f"--value-range {as_text(values)}: takes two finite numbers, the lower one first")
    return [low, high]


def check_workers(workers: int | None) -> None:
    """Raises UserError for more processes than a machine is well with."""
    cores = len(os.sched_getaffinity(0))
    if workers is not None and workers > (most := max(16, 4 * cores)):
        raise UserError(f"--workers {workers} is more than {most}, four for each of {cores} cores or 16; lower it")


def default_workers(*, on_gpu: bool) -> int:
    """Processes that load images: the cores, shared among the training processes of this machine.

    On a CPU they take cores from training. A GPU that takes thousands of images a second wants dozens of them.
    """
    most = MOST_WORKERS if on_gpu else 8
    return min(most, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def with_precision(settings: T, machine: Machine) -> T:
    """With the precision that the machine is best at, where it was left to it."""
    if settings.precision != "auto":
        return settings
    return replace(settings, precision="bf16" if machine.has_bf16 else "float32")


def check_batch(settings: TrainingSettings) -> None:
    """Raises UserError for a batch that cannot be shared out evenly."""
    batch, share = settings.batch_size, settings.processes * settings.accumulate
    if batch % share:
        raise UserError(
            f"--batch-size {batch} is not a multiple of {settings.processes} processes x --accumulate {settings.accumulate}; "
            f"use {max(1, round(batch / share)) * share}"
        )


def check_warmup(settings: TrainingSettings) -> None:
    """Raises UserError for a warm-up that never ends."""
    if settings.warmup_epochs >= settings.epochs:
        raise UserError(f"--warmup-epochs {settings.warmup_epochs} must be less than --epochs {settings.epochs}")
