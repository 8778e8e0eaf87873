"""What is each part of SparK worth? SparK, its ablations and random weights, compared by frozen features.

    python -m benchmarks.ablations --json benchmarks/results/ablations.json             # emoji by npm, 12 short runs
    python -m benchmarks.ablations --data labelled/ --model resnet50 --base "" --json mine.json   # any labelled folder
    python -m benchmarks.ablations --write                                              # the JSON's table, in docs/training.md

The images are parted as benchmarks.transfer does it. For each seed, SparK and each ablation pretrain on the same images, from
the same weights, with the same crops and masks. `sparkme.probe` measures on images that were not pretrained on: the last map's
frozen features, by kNN and by a linear classifier, from ten labels a class and from all labels. (The paper fine-tunes on
ImageNet.)

The JSON file has `runs`: of each row and seed the loss, the minutes and the scores. A run that is there is not done again. And
it has `rows`: of each row and score the mean over the seeds, and the mean of the differences from SparK with the same seed,
both with standard errors. They are of pretraining alone: another choice of test images would move all rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks import plot, small_data, transfer
from benchmarks.emoji import EMOJI, emoji
from benchmarks.flops import provenance
from sparkme.errors import UserError, run_command
from sparkme.files import replaced_when_whole
from sparkme.settings.pretrain import ABLATIONS

RESULTS = Path(__file__).parent / "results" / "ablations.json"
PAGE = Path(__file__).parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- ablations:begin -->", "<!-- ablations:end -->"
BASE = "--epochs 4 --decoder-width 64 --panel-epochs 0 --workers 0"
SPARK, RANDOM = "small", "random"
PRETRAINED = (SPARK, *ABLATIONS)
TITLES = {SPARK: "SparK", **{name: recipe.name for name, recipe in ABLATIONS.items()}, RANDOM: "random weights"}
SCORES = [(labels, kind) for labels in ("ten_labels_a_class", "all_labels") for kind in ("knn", "linear")]


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations", description="Compare SparK with its ablations by frozen features."
    )
    small_data.add_flags(parser, BASE, Path("runs/ablations"))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each (%(default)s)")
    parser.add_argument(
        "--write", action="store_true", help=f"only the table of docs/{PAGE.name}, from --json (results/{RESULTS.name})"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: write(args) if args.write else compare(args))


def compare(args: argparse.Namespace) -> int:
    """Does the runs that are not in the file yet, and prints the table. Returns the exit code."""
    transfer.check_parts(args)
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds} must be at least 1")
    args.work.mkdir(parents=True, exist_ok=True)
    extra: dict[str, list[Path]] = {}
    data = args.data
    if data is None:
        data, extra = emoji(args.work / "emoji")
    names = ("model", "input_size", "base", "draws", "test_share")
    settings = {"data": str(args.data or EMOJI)} | {name: getattr(args, name) for name in names}
    root, tables, parts = transfer.make_tables(data, args, settings)
    path = args.json or args.work / "ablations.json"
    record: dict[str, Any] = plot.read(path) if path.exists() else {"settings": settings, "runs": []}
    if record.get("settings") != settings:
        raise UserError(f"--json {path} has runs with other settings, {record.get('settings')}; choose another file")
    images = transfer.link_images(parts["train"], extra, args)
    record |= {
        **provenance(),
        "classes": parts["test"].classes,
        "images": {"pretrained on": len(list(images.iterdir())), "labelled": len(parts["train"]), "test": len(parts["test"])},
    }
    done = {(run["row"], run["seed"]) for run in record["runs"]}
    jobs = [(row, seed) for seed in range(args.seeds) for row in PRETRAINED if (row, seed) not in done]
    writing, start = Lock(), time.monotonic()

    def one(row: str, seed: int) -> None:
        runs = pretrain_and_probe(row, seed, root, tables["final"], images, args)
        with writing:
            done.add((row, seed))
            record["runs"] += runs
            record["rows"] = summarise(record["runs"])
            with replaced_when_whole(path) as temporary:
                temporary.write_text(json.dumps(record, indent=2) + "\n")
            left = sum(job not in done for job in jobs)
            minutes = (time.monotonic() - start) / 60 * left / (len(jobs) - left)
            print(f"{small_data.line(runs[0] | {'flags': f'{row}, seed {seed}'})}, {minutes:.0f} min left", flush=True)

    transfer.in_parallel(one, jobs, args.processes)
    print(table(record))
    print(f"wrote {path}" if jobs else f"{path} had all runs")
    return 0


def pretrain_and_probe(
    row: str, seed: int, data: Path, table: Path, images: Path, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A run of `record["runs"]`; after SparK's also that of random weights, for the same draws of labels."""
    folder = args.work / f"{row}-seed{seed}"
    words = ["--recipe", row, "--seed", seed, "--model", args.model, "--input-size", args.input_size, *args.base.split()]
    transfer.run("sparkme.pretrain", "--data", images, "--output", folder, *words, quiet=True, threads=1)
    checkpoint = folder / "checkpoints" / "last.pt"
    others = ["--compare", RANDOM] if row == SPARK else []
    scores = small_data.probe_last(checkpoint, data, table, args.draws, "--seed", seed, *others)
    runs = [{"row": row, "seed": seed} | transfer.pretraining_of(checkpoint) | scores[0]]
    return runs + [{"row": RANDOM, "seed": seed} | found for found in scores[1:]]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each row and score the mean over its seeds, and the difference from SparK's over the seeds that both have."""
    rows = []
    for row in TITLES:
        summary: dict[str, Any] = {"row": row, "seeds": sorted(run["seed"] for run in runs if run["row"] == row)}
        for labels, kind in SCORES:
            values, of_spark = ({r["seed"]: r[labels][kind] for r in runs if r["row"] == name} for name in (row, SPARK))
            differences = [values[seed] - of_spark[seed] for seed in values.keys() & of_spark.keys()]
            summary[f"{labels}_{kind}"] = {"accuracy": spread(list(values.values())), "difference": spread(differences)}
        if summary["seeds"]:
            rows.append(summary)
    return rows


def spread(values: list[float]) -> dict[str, Any] | None:
    """Mean and standard error; None of nothing."""
    if not values:
        return None
    return {"mean": transfer.mean(values), "standard_error": transfer.standard_error(values)}


def table(record: dict[str, Any]) -> str:
    """A line for each row, in percent, with the difference from SparK in brackets."""
    lines = [
        "| | ten labels a class: kNN | linear | all labels: kNN | linear |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        cells = [TITLES[row["row"]]]
        for labels, kind in SCORES:
            score = row[f"{labels}_{kind}"]
            cells.append(transfer.plus_minus(score["accuracy"]))
            if row["row"] != SPARK and score["difference"]:
                cells[-1] += f" ({transfer.plus_minus(score['difference'], sign='+')})"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(args: argparse.Namespace) -> int:
    """Writes the table from the numbers. Returns the exit code."""
    path = args.json or RESULTS
    if not path.is_file():
        raise UserError(f"--json {path} does not exist; run python -m benchmarks.ablations first")
    plot.write(PAGE, plot.read_page(PAGE, BEGIN, END), f"{BEGIN}\n{table(plot.read(path))}\n{END}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
