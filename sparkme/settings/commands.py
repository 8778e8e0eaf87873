"""The settings of the commands that train nothing: export, probe, visualize, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkme.errors import UserError
from sparkme.settings.declare import Settings, as_text, check, setting, varied
from sparkme.settings.shared import (
    DeviceSettings,
    EngineSettings,
    LabelledSettings,
    LoaderSettings,
    PixelSettings,
    WeightSettings,
    check_workers,
    checked_range,
)


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """The settings of `sparkme.export`."""

    # fmt: off
    checkpoint: Path = setting(
        help="a checkpoint of sparkme.pretrain, such as runs/x/checkpoints/last.pt", positional=True
    )
    to: str | None = setting(
        help="whose names and layouts the weights get: torchvision, timm, the ConvNeXt authors', mmpretrain, detectron2, the "
        "official SparK code", otherwise="those of the library that the network came from", group="what is written",
        choices=("torchvision", "timm", "convnext", "mmpretrain", "detectron2", "spark"),
    )
    output: Path | None = setting(
        help=".safetensors or .pth, for detectron2 .pkl", otherwise="MODEL.safetensors in the run folder",
        group="what is written", metavar="FILE",
    )
    overwrite: bool = setting(False, help="replace an existing file", group="what is written")
    hub_folder: Path | None = setting(
        help="with --to timm: a folder with config, weights and model card, for timm.create_model('local-dir:DIR')",
        group="what is written", metavar="DIR",
    )
    push_to_hub: str | None = setting(
        help="send the hub folder to the Hugging Face hub", group="what is written", metavar="NAME/REPO"
    )
    verify: bool = setting(
        True, help="compare every stage of the dense model with the sparse encoder before writing",
        group="checks and batch norm",
    )
    recalibrate_bn: Path | None = setting(
        help="estimate batch norm's running statistics anew, on whole images of this folder", group="checks and batch norm",
        metavar="DATA",
    )
    recalibrate_images: int = setting(
        1024, help="on at most so many", group="checks and batch norm", metavar="N", at_least=2
    )
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(LoaderSettings, EngineSettings, DeviceSettings, WeightSettings, PixelSettings, LabelledSettings):
    """The settings of `sparkme.probe`."""

    # fmt: off
    weights: Path = setting(
        help="a checkpoint, exported weights, a hub folder, or weights of torchvision, timm and others", positional=True,
        metavar="CHECKPOINT_OR_WEIGHTS",
    )
    model: str | None = setting(
        help="the network, where the file does not say it (see sparkme.pretrain --model)", group="network"
    )
    compare: tuple[str, ...] = setting(
        (), help="more rows for the table: random, for random weights of the same network, or other checkpoints and weights",
        group="what is measured", metavar="WHAT",
    )
    stage: tuple[str, ...] = setting(
        ("all",), help="strides of the maps: all, last, or numbers", group="what is measured", metavar="STRIDE"
    )
    linear: bool = setting(True, help="fit the linear classifier", group="what is measured")
    shots: int | None = setting(
        help="learn from N images of each class only", otherwise="all of them", group="what is measured", metavar="N",
        at_least=1,
    )
    draws: int = setting(
        5, help="with --shots: so many times, averaged", group="what is measured", metavar="N", at_least=1
    )
    input_size: tuple[int, ...] = setting(
        help="side of the images, or height and width, for all rows", otherwise="the first file's, or 224",
        group="what is measured", metavar="PIXELS", at_least=1,
    )
    batch_size: int = setting(64, help="images at a time", group="machine", metavar="N", at_least=1)
    output: Path | None = setting(
        help=".json for the numbers and the settings", otherwise="none", group="output", metavar="FILE"
    )
    overwrite: bool = setting(False, help="replace an existing file", group="output")
    # fmt: on

    def check(self) -> None:
        """Raises UserError for what cannot be meant, before anything is read."""
        check(self)
        check_workers(self.workers)
        checked_range(self.value_range)
        if self.input_size is not None and len(self.input_size) > 2:
            raise UserError(f"--input-size {as_text(self.input_size)}: takes a side, or height and width, in pixels")
        for stage in self.stage:
            if stage not in ("all", "last") and not stage.isdecimal():
                raise UserError(f"--stage {stage} is neither all, nor last, nor the stride of a map in pixels, such as 32")
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
        help="a checkpoint of sparkme.pretrain", group="what is shown", positional=True, nargs="?", metavar="CHECKPOINT"
    )
    images: tuple[Path, ...] = setting(
        (), help="image files, and folders of them, nested or flat", otherwise="scikit-image's photographs",
        group="what is shown", positional=True, nargs="*", metavar="IMAGE",
    )
    max_images: int | None = setting(
        help="show at most so many, spread over what was given", otherwise="8", group="what is shown", metavar="N"
    )
    size: tuple[int, ...] | None = setting(
        help="size of the images, side or height and width: any multiple of the patch", otherwise="the run's --input-size",
        group="what is shown", metavar="PIXELS",
    )
    statistics: str | None = setting(
        help="where hidden patches get their mean and standard deviation from: true: their own, as in the paper; predicted: "
        "the visible patches around, without a look at hidden pixels", otherwise="true", group="what is shown",
        choices=("true", "predicted"),
    )
    value_range: Any = varied(PixelSettings, "value_range", group="what is shown")
    upright: bool = varied(PixelSettings, "upright", group="what is shown")
    mask_ratio: tuple[float, ...] | None = setting(
        help="share of patches to hide", otherwise="the run's", group="masks", metavar="R"
    )
    seeds: tuple[int, ...] | None = setting(
        help="a mask for each seed, the same for all images", otherwise="the run's", group="masks", metavar="N"
    )
    num_seeds: int | None = setting(help="the seeds 0 to N - 1", group="masks", metavar="N")
    mask_pattern: bool = setting(
        False, help="needs no checkpoint: draw what becomes of a mask in dense convolutions and in this project's sparse ones",
        group="why sparse convolutions",
    )
    layers: int | None = setting(
        help="how many convolutions", otherwise="16", group="why sparse convolutions", metavar="N"
    )
    output: Path | None = setting(
        help=".png, or .html for one page that needs no other file",
        otherwise="visualize.png in the run's folder, mask_pattern.png", group="output", metavar="FILE",
    )
    overwrite: bool = setting(False, help="replace an existing file", group="output")
    # fmt: on


VISUALIZE_GROUPS = ("what is shown", "masks", "why sparse convolutions", "machine", "output")


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """The settings of `sparkme.report`."""

    # fmt: off
    runs: tuple[Path, ...] = setting(
        help="a run's folder, or a folder of runs, which stands for all", positional=True, nargs="+", metavar="RUN"
    )
    output: Path | None = setting(
        help=".html; a report that is there is replaced",
        otherwise="report.html in the run's folder, of several in the one they share", metavar="FILE",
    )
    title: str | None = setting(help="title of the page", otherwise="the runs' names", metavar="TEXT")
    watch: float | None = setting(
        help="write the page anew every so often, until Ctrl-C; an open page shows it by itself", metavar="SECONDS"
    )
    # fmt: on
