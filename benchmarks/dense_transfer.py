"""Measures the benefit of pretraining for detection and segmentation, on scenes or on any COCO set.

    python -m benchmarks.transfer --task detection                            # scenes with emoji by npm
    python -m benchmarks.transfer --task segmentation --work runs/transfer-scenes
    python -m benchmarks.transfer --task detection --data coco/ --unlabelled photos/ --model resnet50
    python -m benchmarks.transfer --task detection --write   # the table in docs/detection.md, from benchmarks/results

The steps, with this project's own commands:

1. `benchmarks.scenes` writes training, validation and test scenes, and scenes without labels. The emoji of the test scenes are
   in no other scene. With `--data`, a COCO set takes their place: its validation images are the test images, and a share of its
   training images is held out to choose rates.
2. `sparkme.pretrain` trains the network on the unlabelled images.
3. `sparkme.finetune --task` trains it on N labelled images, for each N, from pretrained and from random weights (the two
   sides), at every rate of a list. Each side keeps its best rate on the validation images.
4. With that rate, `--seeds` runs with other labelled images and other random numbers are measured on the test images, after the
   last epoch. Both sides get the same images, steps and augmentation.
5. `benchmarks.pixel_probe` measures what frozen maps of both tell about the pixels of the test images.

The JSON file has `settings`, `pretraining`, `minutes_of_finetuning` (all runs), `frozen` (the last step), and `finetuning`: for
each number of images and side the figure of every rate, the chosen rate, the figures of each seed, mean and standard error, and
the difference of the sides over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import sparkme
from benchmarks import scenes
from benchmarks.flops import provenance
from benchmarks.pixel_probe import labels_of, probe_pixels, read_pixels
from benchmarks.plot import read_page
from benchmarks.plot import write as write_page
from benchmarks.transfer import (
    SIDES,
    fine_tune,
    in_parallel,
    keep_settings,
    mean,
    minutes_of_runs,
    pretrain,
    pretraining_of,
    standard_error,
)
from sparkme.data.annotations import Annotated, find_annotated
from sparkme.data.sources.files import Files
from sparkme.errors import UserError
from sparkme.networks.create import create_dense
from sparkme.seeds import derived_seed
from sparkme.settings.tasks import settings_of_task

MOST_PROBED = 300  # images of a part for the probe
# What is measured, by task; rates are chosen by the first.
FIGURES = {"detection": ("mask_ap", "box_ap"), "segmentation": ("mean_iou", "pixel_accuracy")}
TITLES = {"mask_ap": "mask AP", "box_ap": "box AP", "mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy"}
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "detection.md"
SETTINGS = ("task", "model", "input_size", "pretrained", "pretrain_flags", "finetune_flags", "data", "scenes", "base_lr")


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer", description="Compare pretrained with random weights on detection or segmentation."
    )
    parser.add_argument("--task", choices=[*FIGURES], required=True)
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, metavar="COCO", help="annotated images (default: scenes with emoji, by `npm pack`)")
    group.add_argument("--unlabelled", type=Path, metavar="DIR", help="images to pretrain on; with --data")
    group.add_argument(
        "--scenes",
        type=int,
        nargs=4,
        default=[1000, 100, 200, 4000],
        help="scenes (default: %(default)s)",
        metavar=("TRAIN", "VAL", "TEST", "UNLABELLED"),
    )
    group.add_argument("--emoji", type=Path, metavar="DIR", help="folder of the emoji (default: WORK/emoji)")
    group = parser.add_argument_group("what is compared")
    group.add_argument("--model", default="benchmarks.transfer:half_resnet18", help="network (default: %(default)s)")
    group.add_argument(
        "--input-size", type=int, default=128, metavar="PIXELS", help="side of the images (default: %(default)s)"
    )
    group.add_argument("--pretrained", type=Path, metavar="FILE", help="use this checkpoint instead of pretraining")
    group.add_argument(
        "--pretrain-flags",
        default="--epochs 36 --decoder-width 64",
        metavar="'FLAGS'",
        help="flags of sparkme.pretrain (default: %(default)s)",
    )
    group.add_argument("--finetune-flags", metavar="'FLAGS'", help="flags of sparkme.finetune, on both sides")
    group.add_argument(
        "--images",
        type=int,
        nargs="+",
        default=[50, 0],
        metavar="N",
        help="labelled training images; 0: all (default: %(default)s)",
    )
    group.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[400, 400],
        metavar="N",
        help="steps of sparkme.finetune for each of --images, in whole epochs (default: %(default)s)",
    )
    group.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds per comparison (default: %(default)s)")
    group.add_argument("--base-lr", type=float, help="learning rate (default: that of --recipe small)")
    group.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.25, 1.0],
        metavar="F",
        help="factors of --base-lr to try (default: %(default)s)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--work", type=Path, metavar="DIR", help="folder of the runs (default: runs/transfer-TASK)")
    group.add_argument("--json", type=Path, metavar="FILE", help="results file (default: WORK/transfer.json)")
    group.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="fine-tuning runs at a time (default: cores)"
    )
    group.add_argument("--write", action="store_true", help="only write the table of docs/detection.md, from --json")
    return parser


def main(argv: list[str]) -> int:
    """Runs all missing steps, and writes the numbers. Returns the exit code."""
    args = create_parser().parse_args(argv)
    if args.write:
        return write(args)
    check(args)
    args.work.mkdir(parents=True, exist_ok=True)
    keep_settings(args.work, {name: getattr(args, name) for name in SETTINGS})
    found = find_images(args)
    checkpoint = args.pretrained or pretrain(found["unlabelled"], args)
    parts = Parts(args, found)
    finetuning = [compare(count, steps, checkpoint, parts, args) for count, steps in zip(args.images, args.steps, strict=True)]
    record = {
        **provenance(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "images": {name: len(part) for name, part in parts.of.items()},
        "classes": parts.of["test"].classes,
        "pretraining": pretraining_of(checkpoint),
        "minutes_of_finetuning": minutes_of_runs(args.work, args.processes),
        "frozen": probe(checkpoint, parts, args),
        "finetuning": finetuning,
    }
    path = args.json or args.work / "transfer.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(table(record))
    print(f"wrote {path}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Fills in what is left out. Raises UserError for invalid arguments, before anything runs."""
    args.work = args.work or Path("runs", f"transfer-{args.task}")
    if args.base_lr is None:
        args.base_lr = settings_of_task(args.task).small["base_lr"]
    if args.finetune_flags is None:
        small = {"detection": "--fpn-channels 32 --regions 32 --proposals 256", "segmentation": "--head-channels 64"}
        args.finetune_flags = small[args.task]
    if args.seeds < 1 or args.processes < 1:
        raise UserError("--seeds and --processes must be at least 1")
    if min(args.images) < 0:
        raise UserError(f"--images {min(args.images)} must be at least 0; 0 stands for all")
    if len(args.steps) == 1:
        args.steps = args.steps * len(args.images)
    if len(args.steps) != len(args.images) or min(args.steps) < 1:
        raise UserError("--steps needs one number, or one for each of --images, and each at least 1")
    if not all(rate > 0 for rate in (*args.rates, args.base_lr)):
        raise UserError("--rates and --base-lr must be above 0")
    if args.data is not None and args.unlabelled is None and args.pretrained is None:
        raise UserError("--data needs --unlabelled DIR to pretrain on, or --pretrained FILE")


def find_images(args: argparse.Namespace) -> dict[str, Path]:
    """The COCO set and the unlabelled images, which are drawn first if no data is given."""
    if args.data is not None:
        return {"data": args.data, "unlabelled": args.unlabelled}
    made = args.work / "scenes"
    if not (made / "README.txt").is_file():
        numbers = zip(("--train", "--val", "--test", "--unlabelled"), args.scenes, strict=True)
        words = [str(word) for pair in numbers for word in pair]
        emoji = str(args.emoji or args.work / "emoji")
        words += ["--size", str(args.input_size), "--objects", "3", "--object-sides", "0.2", "0.7"]  # for small networks to see
        if scenes.main(["--output", str(made), "--emoji", emoji, *words]):
            raise UserError("the scenes could not be made, see above")
    return {"data": made, "unlabelled": made / "unlabelled"}


class Parts:
    """Labelled images by purpose, and their files for `sparkme.finetune`.

    Attributes:
        of: `train`, `choose` (to choose rates) and `test`.
    """

    def __init__(self, args: argparse.Namespace, found: dict[str, Path]) -> None:
        self.args, data = args, found["data"]
        if args.data is None:
            names = {"train": "train", "choose": "val", "test": "test"}
            files = {part: data / "annotations" / f"instances_{name}.json" for part, name in names.items()}
            self.of: dict[str, Annotated] = {}
            for part, file in files.items():
                self.of[part] = find_annotated(train=files["train"], val=file).val if part != "train" else self._train(files)
        else:
            split = find_annotated(data)
            held_out = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(0))
            count = max(1, len(split.train) // 7)
            self.of = {
                "train": split.train.subset(held_out[count:].sort().values),
                "choose": split.train.subset(held_out[:count].sort().values),
                "test": split.val,
            }

    @staticmethod
    def _train(files: dict[str, Path]) -> Annotated:
        return find_annotated(train=files["train"], val=files["choose"]).train

    def flags(self, count: int, seed: int, measured: str) -> list[object]:
        """Flags of `sparkme.finetune` for `count` training images, drawn by the seed, and the images it is measured on."""
        train = self.of["train"]
        if count:
            generator = torch.Generator().manual_seed(derived_seed(seed, "images"))
            train = train.subset(torch.randperm(len(train), generator=generator)[:count].sort().values)
        folder = self.args.work / f"data-{count or 'all'}-seed{seed if count else 0}-{measured}"
        if self.args.task == "detection":
            return self._as_coco(folder, train, self.of[measured])
        return self._as_masks(folder, train, self.of[measured])

    def _as_coco(self, folder: Path, train: Annotated, val: Annotated) -> list[object]:
        folder.mkdir(exist_ok=True)
        for name, part in (("train", train), ("val", val)):
            content = part.to_coco(masks=True)
            for entry, number in zip(content["images"], range(len(part)), strict=True):
                entry["file_name"] = str(_file(part, number).resolve().relative_to("/"))
            (folder / f"{name}.json").write_text(json.dumps(content))
        return ["--train", folder / "train.json", "--val", folder / "val.json", "--root", "/"]

    def _as_masks(self, folder: Path, train: Annotated, val: Annotated) -> list[object]:
        """Links to the images, and masks in which later objects cover earlier ones; 0 is the background."""
        classes = ["background", *train.classes]
        for name, part in (("train", train), ("val", val)):
            for kind in ("images", "masks"):
                (folder / kind / name).mkdir(parents=True, exist_ok=True)
            for number in range(len(part)):
                image = _file(part, number)
                link = folder / "images" / name / image.name
                if not link.is_symlink():
                    link.symlink_to(image.resolve())
                    Image.fromarray(labels_of(part, number).numpy()).save(folder / "masks" / name / f"{image.stem}.png")
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
        return ["--data", folder]


def _file(part: Annotated, number: int) -> Path:
    assert isinstance(part.images, Files)
    return part.images.path(number)


def probe(checkpoint: Path, parts: Parts, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What frozen maps of pretrained and random weights tell about pixels, for each number of images."""
    pretrained = sparkme.pyramid(checkpoint)
    torch.manual_seed(0)
    random = sparkme.pyramid(create_dense(args.model))
    random.mean, random.std = pretrained.mean, pretrained.std
    choose, test = (
        read_pixels(part, range(min(len(part), MOST_PROBED)), args.input_size)
        for part in (parts.of["choose"], parts.of["test"])
    )
    found = []
    for count in args.images:
        count = min(count or MOST_PROBED, len(parts.of["train"]))
        train = read_pixels(parts.of["train"], range(count), args.input_size)
        for weights, pyramid in (("random", random), ("pretrained", pretrained)):
            figures = probe_pixels(pyramid, train, choose, test, len(parts.of["train"].classes))
            found.append({"images": count, "weights": weights, **figures})
    return found


def compare(count: int, steps: int, checkpoint: Path, parts: Parts, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes both sides with so many labelled images: finds the best rate of each, then runs every seed."""
    figures, num_images = FIGURES[args.task], count or len(parts.of["train"])
    epochs = math.ceil(steps / max(1, num_images // settings_of_task(args.task).small["batch_size"]))
    for seed in range(args.seeds):
        parts.flags(count, seed, "test")  # written before several processes read them
    parts.flags(count, 0, "choose")

    def measure(side: str, factor: float, seed: int, measured: str) -> dict[str, float]:
        folder = args.work / f"{side}-{count or 'all'}-epochs{epochs}-rate{factor:g}-seed{seed}-{measured}"
        words = ["--task", args.task, *parts.flags(count, seed, measured), "--epochs", epochs, *args.finetune_flags.split()]
        last = fine_tune(checkpoint, side, args.base_lr * factor, seed, folder, words)
        return {name: last[f"val_{name}"] for name in figures}

    jobs = [(side, rate, 0, "choose") for side in SIDES for rate in args.rates]
    scores = dict(zip(jobs, in_parallel(measure, jobs, args.processes), strict=True))
    result: dict[str, Any] = {"images": num_images, "epochs": epochs}
    chosen = {}
    for side in SIDES:
        of_rates = {rate: scores[side, rate, 0, "choose"][figures[0]] for rate in args.rates}
        chosen[side] = max(of_rates, key=lambda rate: of_rates[rate])
        rates = {f"{args.base_lr * rate:g}": value for rate, value in of_rates.items()}
        result[side] = {"figure_of_rates": rates, "rate": args.base_lr * chosen[side]}
    jobs = [(side, chosen[side], seed, "test") for seed in range(args.seeds) for side in SIDES]
    found = dict(zip(jobs, in_parallel(measure, jobs, args.processes), strict=True))
    result["gain"] = {}
    for name in figures:
        of_sides = {side: [found[side, chosen[side], seed, "test"][name] for seed in range(args.seeds)] for side in SIDES}
        for side, values in of_sides.items():
            result[side][name] = {"values": values, "mean": mean(values), "standard_error": standard_error(values)}
        gains = [a - b for a, b in zip(*(of_sides[side] for side in SIDES), strict=True)]
        result["gain"][name] = {"values": gains, "mean": mean(gains), "standard_error": standard_error(gains)}
    print(row(result, args.task), flush=True)
    return result


def write(args: argparse.Namespace) -> int:
    """Writes the table of a task in docs/detection.md. Returns the exit code."""
    path = args.json or RESULTS / f"transfer_{args.task}.json"
    if not path.is_file():
        raise UserError(f"--json {path} does not exist; run python -m benchmarks.transfer --task {args.task} first")
    begin, end = (f"<!-- transfer-{args.task}:{edge} -->" for edge in ("begin", "end"))
    write_page(PAGE, read_page(PAGE, begin, end), f"{begin}\n{table(json.loads(path.read_text()))}\n{end}")
    return 0


def table(record: dict[str, Any]) -> str:
    """A row for each number of images and figure, in percent; and what frozen maps tell."""
    lines = ["| labelled images | figure | from scratch | pretrained | gain |", "|---:|---|---:|---:|---:|"]
    lines += [row(result, record["settings"]["task"]) for result in record["finetuning"]]
    lines += ["", "| images | frozen maps | random | pretrained |", "|---:|---|---:|---:|"]
    of_frozen = {(each["images"], each["weights"]): each for each in record["frozen"]}
    for count in dict.fromkeys(images for images, _ in of_frozen):
        for name, title in (("object_auc", "objects or background, AUC"), ("class_accuracy", "class of an object's pixel")):
            cells = [f"{100 * of_frozen[count, weights][name]:.1f}" for weights in ("random", "pretrained")]
            lines.append(f"| {count} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def row(result: dict[str, Any], task: str) -> str:
    def of(value: dict[str, Any], sign: str = "") -> str:
        error = value["standard_error"]
        return f"{100 * value['mean']:{sign}.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")

    return "\n".join(
        f"| {result['images']} | {TITLES[name]} | {of(result['scratch'][name])} | {of(result['pretrained'][name])} | "
        f"{of(result['gain'][name], '+')} |"
        for name in FIGURES[task]
    )
