"""The settings of probe, predict, visualize and report. Those of export stand in `sparkme.weights.settings`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkme.errors import UserError
from sparkme.settings.declare import Settings, as_text, check, in_data, in_machine, in_network, in_output, setting, varied
from sparkme.settings.shared import (
    DeviceSettings,
    EngineSettings,
    LabelledSettings,
    LoaderSettings,
    PixelSettings,
    SourceSettings,
    WeightSettings,
    check_workers,
    checked_range,
    source_argument,
)


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(LoaderSettings, EngineSettings, DeviceSettings, WeightSettings, PixelSettings, LabelledSettings):
    """The settings of `sparkme.probe`."""

    # fmt: off
    weights: Path = setting(
        "checkpoint, exported weights, hub folder, or weights of torchvision, timm and others", positional=True,
        metavar="CHECKPOINT_OR_WEIGHTS")
    model: str | None = in_network("network, if the weights file does not name it; see sparkme.pretrain --model")
    compare: tuple[str, ...] = setting(
        "more rows of the table: random (random weights of the same network), or other checkpoints and weights", (),
        metavar="WHAT", group="what is measured")
    stage: tuple[str, ...] = setting(
        "maps to measure, by stride: all, last, or numbers", ("all",), metavar="STRIDE", group="what is measured")
    linear: bool = setting("also fit a linear classifier", True, group="what is measured")
    shots: int | None = setting(
        "train on N images of each class", otherwise="all", metavar="N", at_least=1, group="what is measured")
    draws: int = setting("with --shots: average over N random draws", 5, metavar="N", at_least=1, group="what is measured")
    input_size: tuple[int, ...] = setting(
        "side of the images, or their height and width, the same in all rows", otherwise="the first file's, or 224",
        metavar="PIXELS", at_least=1, group="what is measured")
    batch_size: int = in_machine("images per forward pass", 64, metavar="N", at_least=1)
    output: Path | None = in_output(".json file for the numbers and the settings", otherwise="none", metavar="FILE")
    overwrite: bool = in_output("replace an existing file", False)
    # fmt: on

    def check(self) -> None:
        """Raises UserError for values that are out of range or do not fit together."""
        check(self)
        check_workers(self.workers)
        checked_range(self.value_range)
        if self.input_size is not None and len(self.input_size) > 2:
            raise UserError(f"--input-size {as_text(self.input_size)}: give one side, or height and width, in pixels")
        for stage in self.stage:
            if stage not in ("all", "last") and not stage.isdecimal():
                raise UserError(f"--stage {stage} must be all, last, or the stride of a map in pixels, such as 32")
        if self.output is not None and self.output.suffix != ".json":
            raise UserError(f"--output {self.output}: the suffix must be .json")
        if self.output is not None and self.output.exists() and not self.overwrite:
            raise UserError(f"{self.output} exists; choose another --output, or pass --overwrite")


PROBE_GROUPS = ("data", "network", "what is measured", "machine", "output")


@dataclass(frozen=True, kw_only=True)
class VisualizeSettings(EngineSettings, DeviceSettings, PixelSettings):
    """The settings of `sparkme.visualize`."""

    # fmt: off
    checkpoint: Path | None = setting(
        "checkpoint of sparkme.pretrain", positional=True, nargs="?", metavar="CHECKPOINT", group="what is shown")
    images: tuple[Path, ...] = setting(
        "image files or folders, nested or flat", (), otherwise="scikit-image's photographs", positional=True,
        nargs="*", metavar="IMAGE", group="what is shown")
    max_images: int | None = setting(
        "show at most N images, spread evenly over those given", otherwise="8", metavar="N", group="what is shown")
    size: tuple[int, ...] | None = setting(
        "side of the images, or their height and width: any multiples of the patch", otherwise="the run's --input-size",
        metavar="PIXELS", group="what is shown")
    statistics: str | None = setting(
        "mean and standard deviation of the hidden patches: true: their own, as in the paper; predicted: estimated from the "
        "visible patches around them", otherwise="true", choices=("true", "predicted"),
        group="what is shown")
    value_range: Any = varied(PixelSettings, "value_range", group="what is shown")
    upright: bool = varied(PixelSettings, "upright", group="what is shown")
    mask_ratio: tuple[float, ...] | None = setting(
        "share of patches to hide", otherwise="the run's", metavar="R", group="masks")
    seeds: tuple[int, ...] | None = setting(
        "seeds of masks: one mask per seed, the same for all images", otherwise="the run's", metavar="N", group="masks")
    num_seeds: int | None = setting("use the seeds 0 to N - 1", metavar="N", group="masks")
    mask_pattern: bool = setting(
        "draw what dense convolutions and this project's sparse ones do to a mask; needs no checkpoint", False,
        group="why sparse convolutions")
    layers: int | None = setting("number of convolutions", otherwise="16", metavar="N", group="why sparse convolutions")
    output: Path | None = in_output(
        "file to write: .png, or .html for a self-contained page", otherwise="visualize.png in the run's folder; "
        "mask_pattern.png", metavar="FILE")
    overwrite: bool = in_output("replace an existing file", False)
    # fmt: on


VISUALIZE_GROUPS = ("what is shown", "masks", "why sparse convolutions", "machine", "output")


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """The settings of `sparkme.report`."""

    # fmt: off
    runs: tuple[Path, ...] = setting(
        "run folder, or a folder with several of them", positional=True, nargs="+", metavar="RUN")
    output: Path | None = setting(
        ".html file to write, replaced if it exists", otherwise="report.html in the run's folder, or in the folder that the "
        "runs share", metavar="FILE")
    title: str | None = setting("page title", otherwise="the runs' names", metavar="TEXT")
    watch: float | None = setting(
        "rewrite the page every SECONDS until Ctrl-C; an open page reloads itself", metavar="SECONDS")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class PredictSettings(DeviceSettings, SourceSettings):
    """The settings of `sparkme.predict`."""

    # fmt: off
    run: Path = setting(
        "folder of a run of sparkme.finetune, or its best.safetensors", positional=True, metavar="RUN")
    images: tuple[str, ...] = setting(
        "images: files, folders, lists, tar shards, Parquet, .npy or package.module:dataset", positional=True, nargs="+",
        metavar="IMAGES", parse=source_argument)
    data: Any = varied(SourceSettings, "data", is_found=True)
    label_column: str | None = varied(SourceSettings, "label_column", is_found=True)
    annotations: Path | None = in_data(
        "detection: COCO's .json of the images, whose image ids the predictions get; images that it does not name are left out",
        otherwise="ids are 1, 2, 3, ...", metavar="FILE")
    max_unreadable: int | None = in_data(
        "stop after more than N unreadable images", otherwise="no limit; they are left out", metavar="N", at_least=0)

    score: float | None = setting(
        "least score of an object, or of a label if images have several", otherwise="0.05 of an object, 0.5 of a label",
        metavar="S", at_least=0, at_most=1, group="what is predicted")

    batch_size: int | None = in_machine(
        "images that are loaded, and as far as possible predicted, together", otherwise="64 for classification, else 4",
        metavar="N", at_least=1)
    workers: int | None = varied(LoaderSettings, "workers")
    precision: str = in_machine(
        "float32, or autocast to bf16", "auto", otherwise="auto, the run's on GPUs that have it, else float32",
        choices=("auto", "float32", "bf16"))

    output: Path | None = in_output("folder to write", otherwise="predictions in the run's folder", metavar="DIR")
    overwrite: bool = in_output("replace earlier predictions in that folder", False)
    pictures: int = in_output("draw the predictions of the first N images, of classes at most 120", 16, metavar="N", at_least=0)
    # fmt: on

    def check(self) -> None:
        """Raises UserError for values that are out of range."""
        check(self)
        check_workers(self.workers)


PREDICT_GROUPS = ("data", "what is predicted", "machine", "output")
