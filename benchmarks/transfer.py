"""Measures the benefit of pretraining: fine-tuning on few and all labels against training from scratch, each at its best rate.

    python -m benchmarks.transfer --json benchmarks/results/transfer.json            # emoji by npm, about 50 minutes on 2 cores
    python -m benchmarks.transfer --data labelled/ --model resnet50 --json mine.json # any labelled folder
    python -m benchmarks.transfer --task detection                                   # see benchmarks.dense_transfer
    python -m benchmarks.transfer --write                                            # the JSON's picture and docs/finetuning.md

The steps, with this project's own commands:

1. A share of every class becomes the test set, and a share of the rest the validation set; pretraining sees neither.
2. `sparkme.pretrain` trains the network on the rest, without labels.
3. `sparkme.finetune` trains it on N labels of each class, for each N, from pretrained and from random weights (the two sides),
   at every rate of a list. Each side keeps its best rate on the validation set.
4. With that rate, `--seeds` runs with other images and other random numbers measure the last epoch's accuracy on the test set.
   Both sides get the same images, steps and augmentation.
5. `sparkme.probe` measures kNN and a linear classifier on frozen features of both.

The JSON file has `settings`, `pretraining` (loss, minutes), `probe` (scores by weights and number of labels), and `finetuning`:
for each number of labels and side the accuracy of every rate, the chosen rate, the accuracy of each seed, mean and standard
error, and the difference of the sides over the seeds with its standard error.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
from torch import nn

from benchmarks.emoji import emoji
from benchmarks.flops import provenance
from benchmarks.plot import read_page
from benchmarks.plot import write as write_page
from sparkme.data.labelled import Labelled, find_labelled, split, split_digest
from sparkme.data.sources.files import find_images
from sparkme.errors import UserError, run_command
from sparkme.settings.classification import SMALL
from sparkme.settings.finetune import TASKS
from sparkme.settings.tasks import task_of
from sparkme.weights.checkpoint import load_checkpoint

RESULTS = Path(__file__).parent / "results" / "transfer.json"
PAGE = Path(__file__).parents[1] / "docs" / "finetuning.md"
BEGIN, END = "<!-- transfer:begin -->", "<!-- transfer:end -->"
CHOOSE_SHARE = 0.15  # validation images as a share of those outside the test set
SIDES = ("pretrained", "scratch")
# What all runs in a work folder share.
SETTINGS = ("model", "input_size", "pretrained", "pretrain_flags", "finetune_flags", "unlabelled", "base_lr")


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer", description="Compare fine-tuning after pretraining with training from scratch."
    )
    parser.add_argument(
        "--task", default="classification", choices=TASKS, help="what is compared; --task TASK --help (default: %(default)s)"
    )
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, metavar="LABELLED", help="one folder per class (default: emoji, by `npm pack`)")
    group.add_argument("--unlabelled", type=Path, metavar="DIR", help="more images to pretrain on (default: none)")
    group.add_argument(
        "--test-share", type=float, default=0.3, metavar="S", help="test share of each class (default: %(default)s)"
    )
    group = parser.add_argument_group("what is compared")
    group.add_argument("--model", default="benchmarks.transfer:half_resnet18", help="network (default: %(default)s)")
    group.add_argument("--input-size", type=int, default=96, metavar="PIXELS", help="side of the images (default: %(default)s)")
    group.add_argument("--pretrained", type=Path, metavar="FILE", help="use this checkpoint instead of pretraining")
    group.add_argument(
        "--pretrain-flags",
        default="--epochs 60 --decoder-width 128",
        metavar="'FLAGS'",
        help="flags of sparkme.pretrain (default: %(default)s)",
    )
    group.add_argument("--finetune-flags", default="", metavar="'FLAGS'", help="flags of sparkme.finetune, on both sides")
    group.add_argument(
        "--shots", type=int, nargs="+", default=[10, 50], metavar="N", help="labels per class; 0: all (default: 10 50)"
    )
    group.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds per comparison (default: %(default)s)")
    group.add_argument(
        "--base-lr", type=float, default=SMALL["base_lr"], help="learning rate of sparkme.finetune (default: %(default)s)"
    )
    group.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.5, 2.0],
        metavar="F",
        help="factors of --base-lr to try (default: %(default)s)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--work", type=Path, default=Path("runs/transfer"), metavar="DIR", help="folder of the runs (default: %(default)s)"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="results file (default: WORK/transfer.json)")
    group.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="fine-tuning runs at a time (default: cores)"
    )
    group.add_argument("--write", action="store_true", help="only write picture and table of docs/finetuning.md, from --json")
    return parser


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if task_of(given) not in (None, "classification"):
        from benchmarks import dense_transfer  # noqa: PLC0415  (it takes the steps from here)

        return run_command(lambda: dense_transfer.main(given))
    args = create_parser().parse_args(given)
    return run_command(lambda: write(args) if args.write else transfer(args))


def transfer(args: argparse.Namespace) -> int:
    """Runs all missing steps, and writes the numbers. Returns the exit code."""
    check(args)
    args.work.mkdir(parents=True, exist_ok=True)
    extra: dict[str, list[Path]] = {}
    data = args.data
    if data is None:
        data, extra = emoji(args.work / "emoji")
    settings = {name: getattr(args, name) for name in SETTINGS}
    root, tables, parts = make_tables(data, args, settings)
    checkpoint = args.pretrained or pretrain(link_images(parts["train"], extra, args), args)
    scores = probe(checkpoint, root, tables["final"], args)
    finetuning = [compare(shots, checkpoint, root, tables, args) for shots in args.shots]
    record = {
        **provenance(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "images": {name: len(part) for name, part in parts.items()},
        "classes": parts["test"].classes,
        "pretraining": pretraining_of(checkpoint),
        "probe": scores,
        "finetuning": finetuning,
    }
    path = args.json or args.work / "transfer.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(table(record))
    print(f"wrote {path}")
    return 0


def half_resnet18(in_channels: int = 3, num_classes: int = 1000) -> nn.Module:
    """timm's ResNet-18 with half the width and a third of the arithmetic, which two cores can train in minutes."""
    network: nn.Module = timm.create_model(
        "resnet18", in_chans=in_channels, num_classes=num_classes, channels=(32, 64, 128, 256)
    )
    return network


def check(args: argparse.Namespace) -> None:
    """Raises UserError for invalid arguments, before anything runs."""
    check_parts(args)
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds} must be at least 1")
    if min(args.shots) < 0:
        raise UserError(f"--shots {min(args.shots)} must be at least 0; 0 stands for all")
    if not all(rate > 0 for rate in (*args.rates, args.base_lr)):
        raise UserError("--rates and --base-lr must be above 0")
    if "--base-lr" in args.finetune_flags:
        raise UserError("--finetune-flags must not contain --base-lr; pass --base-lr itself, which --rates multiplies")


def check_parts(args: argparse.Namespace) -> None:
    """Raises UserError for an invalid share of test images or number of processes."""
    if args.processes < 1:
        raise UserError(f"--processes {args.processes} must be at least 1")
    if not 0 < args.test_share < 1:
        raise UserError(f"--test-share {args.test_share} is outside (0, 1)")


def make_tables(
    data: Path, args: argparse.Namespace, settings: dict[str, Any]
) -> tuple[Path, dict[str, Path], dict[str, Labelled]]:
    """Tables of path, label, part for sparkme.finetune, with the same training images and different validation images.

    Returns:
        The folder of the paths, the tables, and the images of each part.

    Raises:
        UserError: the work folder has runs on other images, or with other settings.
    """
    labelled = find_labelled(data, val_share=args.test_share, seed=0)
    rest = split(labelled.train, CHOOSE_SHARE, 0)
    data = data.parent if data.is_file() else data
    keep_settings(
        args.work, {**settings, "images": split_digest(rest.train, rest.val) + split_digest(rest.train, labelled.val)}
    )
    parts = {"train": rest.train, "choose": rest.val, "test": labelled.val}
    tables = {"choose": args.work / "choose.csv", "final": args.work / "final.csv"}
    for name, measured in (("choose", "choose"), ("final", "test")):
        write_table(tables[name], data, parts["train"], parts[measured])
    return data, tables, parts


def write_table(path: Path, data: Path, train: Labelled, val: Labelled) -> None:
    """Writes path, label and part of images, with paths from a folder."""
    with path.open("w", newline="") as file:
        for part, role in ((train, "train"), (val, "val")):
            for image, label in zip(part.paths, part.labels.tolist(), strict=True):
                csv.writer(file).writerow([os.path.relpath(image, data), part.classes[label], role])


def keep_settings(work: Path, settings: dict[str, Any]) -> None:
    """Records the settings of the runs in a folder, and refuses to mix results of others.

    Raises:
        UserError: a setting differs; the message names the first one.
    """
    path = work / "settings.json"
    now = {name: str(value) for name, value in settings.items()}
    before = json.loads(path.read_text()) if path.is_file() else now
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"{work} has runs with {name.replace('_', ' ')} {before.get(name)!r} instead of {value!r}; choose another "
                "--work, or remove it"
            )
    path.write_text(json.dumps(now, indent=2) + "\n")


def link_images(train: Labelled, extra: dict[str, list[Path]], args: argparse.Namespace) -> Path:
    """Makes a folder of links to the images to pretrain on, and returns it."""
    images: Path = args.work / "unlabelled"
    sources = [path for image in train.paths for path in (image, *extra.get(image.name, []))]
    if getattr(args, "unlabelled", None):
        sources += find_images(args.unlabelled, flag="--unlabelled")
    link(sources, images)
    return images


def link(sources: Sequence[Path], folder: Path) -> None:
    """Fills a folder with links to these files alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():  # of an earlier run with another split
        old.unlink()
    for number, source in enumerate(sources):
        (folder / f"{number:06d}{source.suffix}").symlink_to(source.resolve())


def pretrain(images: Path, args: argparse.Namespace) -> Path:
    """Trains on images without labels. Returns the checkpoint."""
    run(
        "sparkme.pretrain",
        "--data",
        images,
        "--model",
        args.model,
        "--input-size",
        args.input_size,
        "--output",
        args.work / "pretrained",
        *args.pretrain_flags.split(),
    )
    return args.work / "pretrained" / "checkpoints" / "last.pt"


def probe(checkpoint: Path, data: Path, table: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """kNN and linear accuracy of frozen features, pretrained and random, on few labels and on all."""
    scores = []
    for shots in args.shots:
        path = args.work / f"probe-{shots}.json"
        if not path.exists():
            few = ["--shots", shots] if shots else []
            run(
                "sparkme.probe",
                checkpoint,
                "--data",
                data,
                "--labels",
                table,
                "--compare",
                "random",
                "--input-size",
                args.input_size,
                "--output",
                path,
                *few,
            )
        scores += [{"shots": shots, **score} for score in json.loads(path.read_text())["scores"]]
    return scores


def compare(shots: int, checkpoint: Path, data: Path, tables: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes both sides with so many labels: finds the best rate of each, then runs every seed."""
    own = args.base_lr

    def accuracy(side: str, factor: float, seed: int, table: str) -> float:
        folder = args.work / f"{side}-{shots}shots-rate{factor:g}-seed{seed}-{table}"
        words = ["--data", data, "--labels", tables[table], "--input-size", args.input_size, *args.finetune_flags.split()]
        words += ["--shots", shots] if shots else []
        return fine_tune(checkpoint, side, own * factor, seed, folder, words)["val_top1"]

    jobs = [(side, rate, 0, "choose") for side in SIDES for rate in args.rates]
    scores = dict(zip(jobs, in_parallel(accuracy, jobs, args.processes), strict=True))
    result: dict[str, Any] = {"shots": shots}
    chosen = {}
    for side in SIDES:
        of_rates = {rate: scores[side, rate, 0, "choose"] for rate in args.rates}
        chosen[side] = max(of_rates, key=lambda rate: of_rates[rate])
        result[side] = {"accuracy_of_rates": {f"{own * r:g}": s for r, s in of_rates.items()}, "rate": own * chosen[side]}
    jobs = [(side, chosen[side], seed, "final") for seed in range(args.seeds) for side in SIDES]
    found = dict(zip(jobs, in_parallel(accuracy, jobs, args.processes), strict=True))
    for side in SIDES:
        values = [found[side, chosen[side], seed, "final"] for seed in range(args.seeds)]
        result[side] |= {"accuracies": values, "mean": mean(values), "standard_error": standard_error(values)}
    gains = [a - b for a, b in zip(*(result[side]["accuracies"] for side in SIDES), strict=True)]
    result["gain"] = {"mean": mean(gains), "standard_error": standard_error(gains)}
    print(
        f"{shots or 'all'} labels per class: " + ", ".join(f"{side} {100 * result[side]['mean']:.1f} %" for side in SIDES),
        flush=True,
    )
    return result


def fine_tune(
    checkpoint: Path, side: str, base_lr: float, seed: int, folder: Path, words: Sequence[object]
) -> dict[str, float]:
    """Fine-tunes one side on one core, unless that was done before. Returns what the last epoch's weights were measured to."""
    if not (folder / "done").exists():
        start = time.perf_counter()
        rate = ["--base-lr", base_lr, "--seed", seed, *(["--from-scratch"] if side == "scratch" else [])]
        rare = ["--eval-epochs", 10**6, "--checkpoint-minutes", 10**6]
        output = ["--output", folder, "--workers", 0]
        run("sparkme.finetune", checkpoint, *words, *rate, *rare, *output, quiet=True, threads=1)
        shutil.rmtree(folder / "checkpoints")  # to save space: each is as large as the network
        (folder / "best.safetensors").unlink()
        (folder / "done").write_text(f"{time.perf_counter() - start:.0f} s\n")
    last: dict[str, float] = json.loads((folder / "results.json").read_text())["last"]
    return last


def minutes_of_runs(work: Path, processes: int) -> float:
    """Minutes that the fine-tuning runs of a folder took, so many at a time."""
    seconds = [float(file.read_text().split()[0]) for file in work.glob("*/done") if file.stat().st_size]
    return round(sum(seconds) / processes / 60, 1)


def in_parallel(function: Callable[..., Any], arguments: list[Any], processes: int) -> list[Any]:
    """Calls a function that starts a process with each of the arguments, in threads, so many at a time."""
    if processes == 1:
        return [function(*each) for each in arguments]
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(lambda each: function(*each), arguments))


def run(module: str, *words: object, quiet: bool = False, threads: int | None = None) -> None:
    """Runs a command of the project. Raises UserError with its last line if it fails."""
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, env=env, text=True, capture_output=quiet)
    if done.returncode:
        raise UserError(f"{module} failed: {done.stderr.strip().splitlines()[-1] if quiet and done.stderr else 'see above'}")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1) / len(values))


def pretraining_of(checkpoint: Path) -> dict[str, Any]:
    """Loss, steps and minutes of a run, from the metrics beside its checkpoint, if there are any."""
    folder = checkpoint.resolve().parents[1]
    if not (folder / "metrics.jsonl").exists():
        return {}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return {}
    steps = [0, *(line["step"] for line in trained)]
    minutes = sum((b - a) * line["step_ms"] for a, b, line in zip(steps, steps[1:], trained)) / 6e4
    last = trained[-1]
    return {
        "num_images": load_checkpoint(checkpoint)["config"]["num_images"],
        "epochs": last["epoch"],
        "steps": last["step"],
        "loss": last["loss"],
        "minutes": round(minutes, 1),
    }


def table(record: dict[str, Any]) -> str:
    """A row for each number of labels, in percent."""
    lines = [
        "| labels per class | fine-tuned from scratch | fine-tuned, pretrained | gain | frozen, random: kNN, linear "
        "| frozen, pretrained: kNN, linear |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for result in record["finetuning"]:
        cells = [str(result["shots"] or "all")]
        cells += [f"{plus_minus(result[side])}" for side in reversed(SIDES)] + [plus_minus(result["gain"], sign="+")]
        scores = [score for score in record["probe"] if score["shots"] == result["shots"]]
        deepest = max(score["stride"] for score in scores)
        for is_random in (True, False):
            found = next(s for s in scores if s["stride"] == deepest and (s["weights"] == "random weights") == is_random)
            cells.append(f"{100 * found['knn']:.1f}, {100 * found['linear']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plus_minus(value: dict[str, Any], sign: str = "") -> str:
    error = value["standard_error"]
    return f"{100 * value['mean']:{sign}.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def write(args: argparse.Namespace) -> int:
    """Writes the picture and the table from the numbers. Returns the exit code."""
    path = args.json or RESULTS
    if not path.is_file():
        raise UserError(f"--json {path} does not exist; run python -m benchmarks.transfer first")
    record = json.loads(path.read_text())
    picture = path.with_suffix(".png")
    draw(record, picture)
    around = read_page(PAGE, BEGIN, END)
    link = os.path.relpath(picture.resolve(), PAGE.parent)
    block = f"{table(record)}\n\n![Accuracy over the number of labels, pretrained and from scratch]({link})"
    write_page(PAGE, around, f"{BEGIN}\n{block}\n{END}")
    return 0


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws accuracy over the number of labels: both sides with standard errors, and linear classifiers on frozen features."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (once something is drawn)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    results = record["finetuning"]
    places = range(len(results))
    for side, colour, label in (("pretrained", "#d1495b", "pretrained, fine-tuned"), ("scratch", "#00798c", "from scratch")):
        means = [100 * result[side]["mean"] for result in results]
        errors = [100 * (result[side]["standard_error"] or 0) for result in results]
        axes.errorbar(places, means, errors, color=colour, marker="o", capsize=4, linewidth=1.8, label=label)
    for is_random, colour, label in ((False, "#d1495b", "pretrained, frozen"), (True, "#8d96a3", "random, frozen")):
        values = []
        for result in results:
            scores = [s for s in record["probe"] if s["shots"] == result["shots"]]
            deepest = max(s["stride"] for s in scores)
            values += [
                100 * s["linear"] for s in scores if s["stride"] == deepest and (s["weights"] == "random weights") == is_random
            ]
        axes.plot(places, values, color=colour, linestyle="--", marker=".", linewidth=1.2, label=f"{label}: linear classifier")
    axes.set_xticks(places, [f"{result['shots']} a class" if result["shots"] else "all" for result in results])
    settings = record["settings"]
    axes.set(xlabel="labels", ylabel="% of the test images right")
    axes.set_title(f"{settings['model']}, {settings['input_size']} px, {len(record['classes'])} classes", loc="left")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
