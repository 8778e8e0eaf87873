"""The work of `sparkme.export --to onnx`: a fine-tuned network with its head as a file that runs without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from sparkme.data.dataset import as_floats
from sparkme.data.images import load_image
from sparkme.data.inputs import find_inputs
from sparkme.errors import UserError
from sparkme.networks.detectors import detect
from sparkme.settings.declare import as_text, check
from sparkme.settings.shared import MAX_SIDE, fixed_size
from sparkme.weights.finetuned import BEST, Finetuned, read_finetuned
from sparkme.weights.onnx import onnx_of_detector, onnx_of_scores
from sparkme.weights.settings import ExportSettings

MOST_COMPARED = 16  # images of the user

_START = """import numpy as np, onnxruntime
from PIL import Image{more}

session = onnxruntime.InferenceSession({path!r})
image = Image.open("photo.jpg").convert("RGB")
"""
_OF_TASK = {
    "classification": """image = ImageOps.fit(image, ({width}, {height}), Image.Resampling.BICUBIC, bleed=0.025)
(logits,) = session.run(None, {{"images": np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255}})
print({classes}[logits[0].argmax()])""",
    "segmentation": """image = image.resize(({width}, {height}), Image.Resampling.BICUBIC)
(logits,) = session.run(None, {{"images": np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255}})
labels = logits[0].argmax(0)  # (height, width), numbers of {classes}""",
    "detection": """scale = min({width} / image.width, {height} / image.height)
image = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)
pixels = np.tile(np.float32({mean}), ({height}, {width}, 1))
pixels[: image.height, : image.width] = np.asarray(image, np.float32) / 255
boxes, scores, labels{masks} = session.run(None, {{"images": pixels.transpose(2, 0, 1)[None]}})
boxes /= scale  # left, top, right, bottom in pixels of the photograph; labels are numbers of {classes}""",
}


def export_finetuned(args: ExportSettings, *, made_by: str) -> Path:
    """Writes the file once onnxruntime has computed what the network computes, and prints how to run it.

    Args:
        args: the settings.
        made_by: version of this project, for the metadata.

    Raises:
        UserError: it is no run of `sparkme.finetune`, flags do not fit, or the file computes something else.
    """
    check_flags(args)
    tuned = read_finetuned(args.checkpoint)
    output = args.output or tuned.path.parent / f"{tuned.model.replace(':', '-')}.onnx"
    if output.suffix != ".onnx":
        raise UserError(f"--output {output}: the suffix must be .onnx")
    if output.is_dir():
        raise UserError(f"{output} is a folder; choose another --output")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists; choose another --output, or pass --overwrite")
    size = size_of(tuned, args)
    images = find_images(tuned, args, size)
    on = f"on random images{f' and {len(images)} given ones' if images else ''}"
    if tuned.task == "detection":
        count = sum(len(found.labels) for image in images for found in detect(tuned.network, [image], [size]))
        difference = onnx_of_detector(tuned.network, size, output, metadata=metadata_of(tuned, size, made_by), images=images)
        text = f"{100 * difference:.2g} % of the objects differ {on}; {count} objects are found in the given ones"
    else:
        words: dict[str, Any] = {"metadata": metadata_of(tuned, size, made_by), "images": images}
        difference = onnx_of_scores(tuned.network, *tuned.statistics, size, output, **words)
        text = f"outputs differ by {difference:.1e} of the largest {on}"
    print(f"compared with onnxruntime: {text}")
    if tuned.task == "detection" and not count:
        print("note: random images may show no object; --images FILES with some makes the comparison a better one")
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB), {tuned.task}, images of {size[1]} x {size[0]} pixels")
    print(f"run it:\n\n{running(tuned, size, output)}")
    return output


def check_flags(args: ExportSettings) -> None:
    """Raises UserError for what is no run of `sparkme.finetune`, and for flags of other formats."""
    check(args)
    path = args.checkpoint
    if path.suffix in (".pt", ".pth") or (path.is_dir() and not (path / BEST).is_file()):
        raise UserError(
            f"--to onnx takes the folder of a run of sparkme.finetune, which {path} is not; fine-tune a pretraining checkpoint "
            f"first, with python -m sparkme.finetune {path} --data ..., or choose another --to"
        )
    others = {"--hub-folder": args.hub_folder, "--push-to-hub": args.push_to_hub, "--recalibrate-bn": args.recalibrate_bn}
    for flag, value in {**others, "--no-verify": not args.verify}.items():
        if value:
            raise UserError(f"{flag} is not for --to onnx; leave it out")


def size_of(tuned: Finetuned, args: ExportSettings) -> tuple[int, int]:
    """Height and width of the images that the file takes."""
    if args.input_size is not None:
        size = fixed_size(args.input_size)
        if not all(32 <= side <= MAX_SIDE for side in size):
            raise UserError(f"--input-size {as_text(args.input_size)}: sides must be from 32 to {MAX_SIDE}")
        return size
    if tuned.task == "detection":
        return tuned.settings["val_side"], tuned.settings["val_side"]
    height, *_, width = tuned.settings["input_size"]
    return (height, width) if tuned.task == "classification" else (max(height, width),) * 2


def find_images(tuned: Finetuned, args: ExportSettings, size: tuple[int, int]) -> list[Tensor]:
    """Images to compare on, (C, H, W) from 0 to 1: scaled to fit into the size, beside the mean."""
    found: list[Tensor] = []
    source = find_inputs(args.images, output=Path("none")).source if args.images else ()
    for number in range(min(len(source), MOST_COMPARED)):
        try:
            image = as_floats(load_image(source.read(number), tuned.channels, tuned.background, tuned.pixels))  # type: ignore[union-attr]
        except OSError as error:
            raise UserError(f"--images: {error}") from error
        scale = min(side / whole for side, whole in zip(size, image.shape[1:]))
        inner = [max(1, round(scale * whole)) for whole in image.shape[1:]]
        small = v2.functional.resize(image, inner, antialias=True) - torch.tensor(tuned.statistics.mean).view(-1, 1, 1)
        padded = F.pad(small, (0, size[1] - inner[1], 0, size[0] - inner[0]))
        found.append((padded + torch.tensor(tuned.statistics.mean).view(-1, 1, 1)).clamp(0, 1))
    return found


def metadata_of(tuned: Finetuned, size: Sequence[int], made_by: str) -> dict[str, str]:
    kept = ("category_ids", "several_labels", "head")
    return {
        "task": tuned.task,
        "network": tuned.model,
        "classes": json.dumps(tuned.classes),
        "channels": str(tuned.channels),
        "input_size": json.dumps([*size]),
        "mean": json.dumps(tuned.statistics.mean),
        "value_range": json.dumps(tuned.pixels.ranges),
        **{name: json.dumps(tuned.settings[name]) for name in kept if name in tuned.settings},
        "made_by": made_by,
    }


def running(tuned: Finetuned, size: tuple[int, int], path: Path) -> str:
    """Lines of code that run the file on a photograph."""
    if tuned.channels != 3 or tuned.pixels.stretches_bytes():
        shape = f"(batch, {tuned.channels}, {size[0]}, {size[1]})"
        return (
            f"import onnxruntime\nsession = onnxruntime.InferenceSession({str(path)!r})\n"
            f'outputs = session.run(None, {{"images": images}})  # float32 {shape}, from 0 to 1'
        )
    start = _START.format(path=str(path), more=", ImageOps" if tuned.task == "classification" else "")
    named = "classes" if len(tuned.classes) > 10 else repr(tuned.classes)
    if named == "classes":
        start = "import json\n" + start + 'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])\n'
    masks = ", masks" if tuned.settings.get("head") == "mask-rcnn" else ""
    mean = [round(value, 6) for value in tuned.statistics.mean]
    return start + _OF_TASK[tuned.task].format(width=size[1], height=size[0], classes=named, masks=masks, mean=mean)
