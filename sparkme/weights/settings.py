"""The settings of `sparkme.export`. Its formats come from their table. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparkme.settings.declare import Settings, setting
from sparkme.settings.shared import source_argument
from sparkme.weights.format import STATE_DICTS
from sparkme.weights.formats import FORMATS

# Suffixes of the formats whose files are no state dicts.
SPECIAL = {name: form.suffixes[0] for name, form in FORMATS.items() if STATE_DICTS[0] not in form.suffixes}
ONNX = "onnx"  # which takes fine-tuned networks, and no others
SPECIAL[ONNX] = ".onnx"


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """The settings of `sparkme.export`."""

    # fmt: off
    checkpoint: Path = setting(
        "checkpoint of sparkme.pretrain, such as runs/x/checkpoints/last.pt; with --to onnx the folder of a run of "
        "sparkme.finetune", positional=True)
    to: str | None = setting(
        f"library whose names and layout the weights get: {', '.join(form.whose for form in FORMATS.values())}; or "
        "onnx, a fine-tuned network with its head, of any task, which runs without torch",
        otherwise="the library that the network came from", choices=(*FORMATS, ONNX), group="what is written")
    output: Path | None = setting(
        f"file to write: .safetensors or .pth; {', '.join(f'{suffix} for {name}' for name, suffix in SPECIAL.items())}",
        otherwise="MODEL.safetensors, or MODEL.onnx, in the run folder", metavar="FILE", group="what is written")
    overwrite: bool = setting("replace an existing file", False, group="what is written")
    hub_folder: Path | None = setting(
        "with --to timm: write a folder with config, weights and model card for timm.create_model('local-dir:DIR') instead",
        metavar="DIR", group="what is written")
    push_to_hub: str | None = setting(
        "upload the hub folder to the Hugging Face hub", metavar="NAME/REPO", group="what is written")
    input_size: tuple[int, ...] | None = setting(
        "with --to onnx: side of the images that the file takes, or their height and width",
        otherwise="the run's; of a detector --val-side, as a square", metavar="PIXELS", at_least=1, group="what is written")
    images: tuple[str, ...] = setting(
        "with --to onnx: images to compare the file with the network on, besides random ones; of a detector some with objects",
        (), metavar="IMAGES", parse=source_argument, group="checks and batch norm")
    verify: bool = setting(
        "compare every stage of the dense model with the sparse encoder before writing", True, group="checks and batch norm")
    recalibrate_bn: Path | None = setting(
        "re-estimate batch norm's running statistics on whole images of this folder", metavar="DATA",
        group="checks and batch norm")
    recalibrate_images: int = setting(
        "use at most N images for that", 1024, metavar="N", at_least=2, group="checks and batch norm")
    # fmt: on
