"""The settings of `sparkme.pretrain`: its recipes, and the default of each setting that the command line leaves out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparkme.errors import UserError
from sparkme.networks.names import paper_drop_path
from sparkme.settings.declare import (
    as_text,
    check,
    filled,
    found,
    in_data,
    in_machine,
    in_network,
    in_optimisation,
    in_output,
    setting,
    varied,
)
from sparkme.settings.shared import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_CHANNELS,
    CropSettings,
    EngineSettings,
    Machine,
    PixelSettings,
    SourceSettings,
    TrainingSettings,
    WeightSettings,
    check_batch,
    check_warmup,
    check_workers,
    checked_range,
    default_workers,
    fixed_size,
    source_argument,
    with_precision,
)

PAPER_BATCH, PAPER_WARMUP = 4096, 40
SMALL_SET = 100_000  # images; the recipe `small` is the default below
SMALL_CROPS, SMALL_EPOCHS = 400_000, 100  # crops of a whole run with that recipe, and its fewest epochs
DEMO_CROPS, DEMO_CROP_SCALE = 512, 0.1  # of scikit-image's photographs


@dataclass(frozen=True)
class Recipe:
    """A method and the defaults of its settings.

    Attributes:
        name: for people.
        reference: the paper.
        method: module and class, a `sparkme.methods.base.MaskedAutoencoder`.
        defaults: value by name of the setting.
        crop_scale: default for a data set; the few photographs of the demo have their own.
        rate_ends: learning rate at the start of the warm-up and at the end, as shares of the peak.
        largest_batch: the default batch size grows with the number of processes up to this.
        crops: how many crops of an image follow each other in a batch.
        folder: prefix of the names of run folders.
        without: settings that the method lacks: the value that they must keep, and the error for another value, `{}`.
    """

    name: str
    reference: str
    method: str
    defaults: dict[str, Any]
    crop_scale: float
    rate_ends: tuple[float, float]
    largest_batch: int = PAPER_BATCH
    crops: int = 1
    folder: str = ""
    without: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


_SPARK = {
    "model": "resnet50", "epochs": 1600, "mask_ratio": 0.6, "decoder_width": 768, "norm_pix_loss": True,
    "optimizer": "lamb", "base_lr": 2e-4, "weight_decay": 0.04, "weight_decay_end": 0.2, "clip_grad": 5.0,
}  # fmt: skip
_NOT_SPARK = {
    "norm_pix_loss": (True, "--no-norm-pix-loss is for --recipe fcmae; SparK always normalises patches"),
}
RECIPES = {
    "spark": Recipe(
        "SparK",
        "SparK (Tian et al., ICLR 2023), arXiv:2301.03580",
        "sparkme.methods.spark:SparK",
        _SPARK,
        crop_scale=0.67,
        rate_ends=(0.005, 0.001),
        without=_NOT_SPARK,
    ),
    # Found by measurement, see benchmarks/results/small_data.json.
    "small": Recipe(
        "SparK for small sets",
        "SparK (Tian et al., ICLR 2023), arXiv:2301.03580",
        "sparkme.methods.spark:SparK",
        _SPARK | {"epochs": None, "decoder_width": 128, "base_lr": 0.04},
        crop_scale=0.67,
        rate_ends=(0.005, 0.001),
        largest_batch=256,
        without=_NOT_SPARK,
    ),
    "fcmae": Recipe(
        "FCMAE",
        "FCMAE (Woo et al., ConvNeXt V2, CVPR 2023), arXiv:2301.00808",
        "sparkme.methods.fcmae:FCMAE",
        {
            "model": "timm:convnextv2_tiny", "epochs": 800, "mask_ratio": 0.6, "decoder_width": 512, "norm_pix_loss": True,
            "optimizer": "adamw", "base_lr": 1.5e-4, "weight_decay": 0.05, "weight_decay_end": 0.05, "clip_grad": 0.0,
            "beta2": 0.95, "drop_path": 0.0,
        },
        crop_scale=0.2,
        rate_ends=(0.0, 0.0),
        folder="fcmae-",
        without={"densify_norm": ("auto", "--densify-norm {} is for SparK (--recipe spark or small); FCMAE has no norm there")},
    ),
}  # fmt: skip
RECIPES["contrastive"] = replace(
    RECIPES["small"],
    name="SparK with a contrastive term",
    reference="SparK (Tian et al., ICLR 2023) and SimCLR (Chen et al., ICML 2020)",
    method="sparkme.methods.contrastive:ContrastiveSparK",
    defaults=RECIPES["small"].defaults | {"decoder_width": 64},
    crop_scale=0.5,
    crops=2,
    folder="contrastive-",
)
# The paper's ablations: `small` with one thing of SparK changed, see `sparkme.methods.ablations`.
ABLATIONS = {
    name: replace(
        RECIPES["small"],
        name=title,
        reference=f"{title}: an ablation of {RECIPES['small'].reference}",
        method=f"sparkme.methods.ablations:{method}",
        folder=f"{name}-",
    )
    for name, title, method in (
        ("spark-zeroed", "SparK, hidden pixels at zero", "ZeroedSparK"),
        ("spark-single-scale", "SparK, deepest scale alone", "SingleScaleSparK"),
        ("spark-loss-on-all", "SparK, loss on all patches", "LossOnAllSparK"),
    )
}
IN_HELP = {name: RECIPES[name] for name in ("spark", "small", "fcmae")}  # the others have the values of `small`, or name theirs
RECIPES |= ABLATIONS


def _together(values: Iterable[Any]) -> str:
    """For --help: the value in each recipe."""
    texts = ["by the number of images" if value is None else str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


OF_RECIPES = {name: _together(recipe.defaults[name] for recipe in IN_HELP.values()) for name in _SPARK}


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(WeightSettings, EngineSettings, TrainingSettings, CropSettings, PixelSettings, SourceSettings):
    """The settings of a run of pretraining."""

    # fmt: off
    recipe: str = setting(
        "spark: the paper's settings; small: SparK with settings for small sets; contrastive: small with a contrastive term, "
        "--decoder-width 64 and --crop-scale 0.5; fcmae: ConvNeXt V2's method; spark-*: small without one part of SparK, for "
        "comparisons", "auto",
        otherwise=f"auto, which is small below {SMALL_SET:,} images, else spark", choices=("auto", *RECIPES), fixed=True,
        older="spark")
    data: str | tuple[str, ...] | None = in_data(
        "images without labels: a folder, nested or flat; a list (.txt, .csv); tar shards, such as 'shards/{000..146}.tar', "
        "local or from a URL; Parquet; a .npy array of images; or package.module:dataset. Several sources are joined",
        otherwise="scikit-image's photographs", metavar="SOURCE", parse=source_argument, nargs="+", extends=True)
    samples_per_epoch: int = in_data(
        "crops per epoch", otherwise=f"the number of images; {DEMO_CROPS} for the photographs", metavar="N", at_least=1,
        fixed=True)
    channels: int = in_data(
        "channels per image: 3 for colour, 1 for grey, any number for .npy arrays and TIFF files of several pages", 3,
        metavar="C", at_least=1, at_most=MAX_CHANNELS, fixed=True, older=3)
    mean: tuple[float, ...] = in_data(
        "mean of each channel, for pixel values from 0 to 1", otherwise="ImageNet's for 3 channels, else estimated once",
        metavar="M", nargs="+")
    std: tuple[float, ...] = in_data("standard deviation of each channel", otherwise="as for --mean", metavar="S", nargs="+")
    background: str = in_data("colour behind transparent pixels, a name or #rrggbb", "white", metavar="COLOUR", older="white")
    crop_scale: float = varied(
        CropSettings, "crop_scale",
        otherwise=f"{_together(r.crop_scale for r in IN_HELP.values())}; {DEMO_CROP_SCALE} for the photographs")
    model: str = varied(
        TrainingSettings, "model",
        help="convolutional network: NAME of torchvision, timm:NAME, or your own as package.module:factory")
    init: Path | None = in_network(
        "start from weights of the same network: from torchvision, timm, the ConvNeXt authors, mmpretrain, the official SparK "
        "code or a checkpoint of this project, under any prefix of names", metavar="FILE")
    input_size: tuple[int, ...] = varied(CropSettings, "input_size", default=(224,))
    patch: int | None = in_network(
        "side of a patch", otherwise="the network's total stride, 32", metavar="PIXELS", at_least=1, fixed=True)
    mask_ratio: float = in_network("share of patches to hide")
    decoder_width: int = in_network("channels of the decoder's input", fixed=True)
    norm_pix_loss: bool = in_network(
        "normalise each target patch by its own mean and standard deviation; SparK always does", otherwise="on")
    densify_norm: str = in_network(
        "SparK's norm of the features before mask tokens are filled in", "auto", otherwise="auto, the network's own kind",
        choices=("auto", "bn", "ln", "none"), fixed=True)
    drop_path: float = varied(TrainingSettings, "drop_path", otherwise="SparK's for this model, else 0")
    warmup_epochs: float = varied(
        TrainingSettings, "warmup_epochs", otherwise=f"{PAPER_WARMUP}, at most a tenth of --epochs")
    batch_size: int = varied(
        TrainingSettings, "batch_size", otherwise="128 per GPU or 32 per CPU process, up to "
        f"{_together(recipe.largest_batch for recipe in IN_HELP.values())} and the number of samples")
    weight_decay: float = varied(TrainingSettings, "weight_decay", help="weight decay at the start of training")
    weight_decay_end: float = in_optimisation("weight decay at the end; a cosine leads to it", at_least=0)
    beta2: float = in_optimisation(
        "decay of the optimiser's second moment", otherwise="0.999 for ConvNeXts with SparK, else 0.95", at_least=0, below=1,
        fixed=True)

    compile: bool = in_machine(
        "torch.compile the encoder's stages and the decoder: minutes at the start; meant for GPUs, slower on the CPU", False)
    cuda_graph: bool = in_machine(
        "replay each step's forward and backward pass as one CUDA graph: faster if the host is slower than the GPU; for "
        "one process only", False)
    checkpoint_activations: bool = in_machine(
        "store only the inputs of the encoder's blocks and recompute the rest in the backward pass: less memory, more time",
        False)

    output: Path = varied(
        TrainingSettings, "output", otherwise="runs/MODEL-SIZE; runs/RECIPE-MODEL-SIZE with fcmae and spark-*")
    panel_epochs: int = in_output(
        "draw reconstructions every N epochs; 0: never", otherwise="ten times per run", metavar="N", at_least=0)
    probe_data: str | None = in_output(
        "labelled images, one folder per class or a .csv, for the frozen encoder's kNN accuracy during training",
        otherwise="none", metavar="LABELLED", parse=source_argument)
    probe_epochs: int = in_output(
        "measure kNN accuracy every K epochs", otherwise="ten times per run", metavar="K", at_least=1)
    command: str = found(default="pretrain")
    num_images: int = found()
    # fmt: on

    def run_folder(self) -> Path:
        """The value of --output, or a name made of the model and the size."""
        recipe = RECIPES.get(self.recipe, RECIPES["spark"])
        model = re.sub(r"[^\w.]+", "-", self.model or recipe.defaults["model"])
        return self.output or Path("runs", f"{recipe.folder}{model}-{'x'.join(map(str, self.input_size))}")


GROUPS = ("data", "images", "network", "optimisation", "machine", "output")


def choose_recipe(asked: str, num_images: int, saved: PretrainSettings | None) -> tuple[str, str]:
    """The recipe's name, and the reason for it if it was not asked for.

    Args:
        asked: a name, or `auto`.
        num_images: found in the data.
        saved: the settings of the run to continue, which keeps its recipe.
    """
    if asked != "auto":
        return asked, ""
    if saved is not None:
        return saved.recipe, ", as before"
    if num_images < SMALL_SET:
        images = f"{num_images:,} image{'s' * (num_images != 1)}"
        return "small", f", chosen for {images}, fewer than {SMALL_SET:,}; --recipe spark is the paper's"
    return "spark", f", chosen for {num_images:,} images, at least {SMALL_SET:,}"


def resolve(
    asked: PretrainSettings, num_images: int, machine: Machine, saved: PretrainSettings | None = None
) -> PretrainSettings:
    """The settings with every default filled in, except those that are estimated from the pixels.

    Args:
        asked: from the command line.
        num_images: found in the data.
        machine: where it runs.
        saved: the settings of the run to continue, which keeps what followed from its number of images.

    Raises:
        UserError: values that are out of range or do not fit together; names the flag.
    """
    check(asked)
    check_workers(asked.workers)
    _check_together(asked)
    name, _ = choose_recipe(asked.recipe, num_images, saved)
    settings = replace(
        asked,
        recipe=name,
        output=asked.run_folder(),
        num_images=num_images,
        processes=machine.processes,
        data=asked.data[0] if isinstance(asked.data, tuple) and len(asked.data) == 1 else asked.data,
        input_size=fixed_size(asked.input_size),
        value_range=checked_range(asked.value_range),
    )
    settings = _with_statistics(filled(settings, RECIPES[name].defaults), saved)
    for other, (value, text) in RECIPES[name].without.items():
        if getattr(settings, other) != value:
            raise UserError(text.format(getattr(settings, other)))
    settings = with_precision(_with_batch(_with_epochs(settings, saved), machine, saved), machine)
    return filled(settings, {"workers": default_workers(on_gpu=machine.on_gpu)})


def _check_together(asked: PretrainSettings) -> None:
    """Raises UserError for flags that need another flag."""
    if (asked.weights_key or asked.adapt_stem) and not asked.init:
        raise UserError("--weights-key and --adapt-stem need --init, the weights to read")
    if asked.probe_epochs is not None and not asked.probe_data:
        raise UserError("--probe-epochs needs --probe-data, the labelled images to measure on")
    if asked.label_column is not None and not asked.probe_data:
        raise UserError("--label-column needs --probe-data: pretraining itself takes no labels")


def _with_statistics(settings: PretrainSettings, saved: PretrainSettings | None) -> PretrainSettings:
    """Fills in mean and standard deviation: those of the run to continue if it has as many channels, or ImageNet's."""
    if saved is not None and saved.channels == settings.channels:
        settings = filled(settings, {"mean": saved.mean, "std": saved.std})
    if settings.channels == 3 and settings.mean is None and settings.std is None:
        settings = replace(settings, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    for name in ("mean", "std"):
        values: tuple[float, ...] | None = getattr(settings, name)
        if values is None:
            continue
        if len(values) != settings.channels:
            raise UserError(f"--{name} takes {settings.channels} numbers, one for each of --channels; got {len(values)}")
        if any(not 0 <= v <= 1 for v in values):
            raise UserError(f"--{name} {as_text(values)} must be from 0 to 1, as pixel values are; divide by 255")
    if settings.std is not None and 0 in settings.std:
        raise UserError(f"--std {as_text(settings.std)} must be above 0")
    if (settings.mean is None) != (settings.std is None):
        raise UserError("--mean and --std go together; give both or none")
    return settings


def _with_epochs(settings: PretrainSettings, saved: PretrainSettings | None) -> PretrainSettings:
    """Fills in what follows from the model, the number of images and the number of epochs."""
    demo = settings.data is None
    before = saved.samples_per_epoch if saved is not None else None
    settings = filled(settings, {"samples_per_epoch": before or (DEMO_CROPS if demo else settings.num_images)})
    settings = filled(settings, {"epochs": max(SMALL_EPOCHS, math.ceil(SMALL_CROPS / max(1, settings.samples_per_epoch)))})
    tenth = max(1, settings.epochs // 10)
    settings = filled(
        settings,
        {
            "crop_scale": DEMO_CROP_SCALE if demo else RECIPES[settings.recipe].crop_scale,
            "warmup_epochs": min(PAPER_WARMUP, settings.epochs / 10),
            "drop_path": paper_drop_path(settings.model),
            "beta2": 0.999 if settings.model.removeprefix("timm:").startswith("convnext") else 0.95,
            "max_unreadable": max(10, settings.num_images // 100),
            "panel_epochs": tenth,
            "probe_epochs": tenth if settings.probe_data else 0,
        },
    )
    check_warmup(settings)
    return settings


def _with_batch(settings: PretrainSettings, machine: Machine, saved: PretrainSettings | None) -> PretrainSettings:
    """Fills in the batch size: that of the run to continue, or what the machine and the number of samples allow."""
    if saved is not None:
        settings = filled(settings, {"batch_size": saved.batch_size})
    recipe = RECIPES[settings.recipe]
    wanted = min(recipe.largest_batch, (128 if machine.on_gpu else 32) * machine.processes, settings.samples_per_epoch)
    share = machine.processes * settings.accumulate * recipe.crops  # the batch is a multiple of it
    settings = filled(settings, {"batch_size": max(wanted // share, 1) * share})
    check_batch(settings, recipe.crops)
    if settings.batch_size > settings.samples_per_epoch:
        raise UserError(
            f"--batch-size {settings.batch_size} is more than the {settings.samples_per_epoch} crops per epoch; lower it, or "
            f"raise --samples-per-epoch to at least {settings.batch_size}"
        )
    return settings
