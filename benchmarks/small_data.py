"""Compares settings of pretraining for small data sets: short runs with one setting changed, ranked by their frozen features.

    python -m benchmarks.small_data --json benchmarks/results/small_data.json              # emoji by npm, TRIALS
    python -m benchmarks.small_data --data labelled/ --trial "--crop-scale 0.35" --json mine.json

The loss cannot rank recipes (a larger decoder or an easier mask lowers it). So `sparkme.probe` does, at the last map, on images
outside pretraining, with all labels and with ten per class. The split is that of benchmarks.transfer. Trials in the --json file
are not repeated; others are added to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks import transfer
from benchmarks.emoji import EMOJI, emoji
from benchmarks.flops import provenance
from sparkme.errors import run_command

BASE = "--epochs 20 --decoder-width 64"
TRIALS = (  # about equal computation
    "",
    "--crop-scale 0.35",
    "--mask-ratio 0.45",
    "--mask-ratio 0.75",
    "--input-size 128 --epochs 11",
    "--decoder-width 128 --epochs 16",
    "--decoder-width 256 --epochs 10",
)


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_data", description="Compare settings of pretraining by frozen features."
    )
    add_flags(parser, BASE, Path("runs/small_data"))
    parser.add_argument(
        "--trial", action="append", metavar="'FLAGS'", help="flags of one trial; may be repeated (default: TRIALS)"
    )
    return parser


def add_flags(parser: argparse.ArgumentParser, base: str, work: Path) -> None:
    """The flags of every comparison of pretraining by frozen features."""
    parser.add_argument("--data", type=Path, metavar="LABELLED", help="one folder per class (default: emoji, by `npm pack`)")
    parser.add_argument(
        "--test-share", type=float, default=0.3, metavar="S", help="test share of each class (default: %(default)s)"
    )
    parser.add_argument("--model", default="benchmarks.transfer:half_resnet18", help="network (default: %(default)s)")
    parser.add_argument(
        "--input-size", type=int, default=96, metavar="PIXELS", help="side of the images (default: %(default)s)"
    )
    parser.add_argument("--base", default=base, metavar="'FLAGS'", help="pretrain flags of all runs (default: %(default)s)")
    parser.add_argument(
        "--draws", type=int, default=10, metavar="N", help="draws of ten labels per class (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, default=work, metavar="DIR", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"results file (default: WORK/{work.name}.json)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at a time")


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: search(args))


def search(args: argparse.Namespace) -> int:
    """Runs trials that the file lacks. Returns the exit code."""
    transfer.check_parts(args)
    args.work.mkdir(parents=True, exist_ok=True)
    extra: dict[str, list[Path]] = {}
    data = args.data
    if data is None:
        data, extra = emoji(args.work / "emoji")
    settings = {"data": str(args.data or EMOJI), "model": args.model, "input_size": args.input_size, "base": args.base}
    root, tables, parts = transfer.make_tables(data, args, settings)
    images = transfer.link_images(parts["train"], extra, args)
    path = args.json or args.work / "small_data.json"
    record = json.loads(path.read_text()) if path.exists() else {"trials": []}
    record |= {
        **provenance(),
        "classes": parts["test"].classes,
        "images": {"pretrained on": len(list(images.iterdir())), "labelled": len(parts["train"]), "test": len(parts["test"])},
    }
    done = [trial["flags"] for trial in record["trials"] if {name: trial[name] for name in settings} == settings]

    def one(flags: str) -> None:
        scores = trial(flags, root, tables["final"], images, args)
        record["trials"].append(settings | {"flags": flags, **scores})
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(line(record["trials"][-1]), flush=True)

    transfer.in_parallel(one, [(flags,) for flags in args.trial or TRIALS if flags not in done], args.processes)
    print(f"wrote {path}")
    return 0


def trial(flags: str, data: Path, table: Path, images: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Pretrains with these flags. Returns minutes, loss, and the scores of the last map."""
    folder = args.work / "-".join(["run", *(flags.replace("--", "").split() or ["base"])])
    # Of a repeated flag the last one counts.
    own = ["--model", args.model, "--input-size", args.input_size, *args.base.split(), *flags.split()]
    transfer.run("sparkme.pretrain", "--data", images, "--output", folder, *own, quiet=True, threads=1)
    checkpoint = folder / "checkpoints" / "last.pt"
    (scores,) = probe_last(checkpoint, data, table, args.draws)
    shutil.rmtree(folder / "reconstructions", ignore_errors=True)
    return transfer.pretraining_of(checkpoint) | scores


def probe_last(
    weights: Path, data: Path, table: Path, draws: int, *words: object, folder: Path | None = None
) -> list[dict[str, dict[str, float]]]:
    """The scores of the last map from all labels and from ten a class: of weights, and of what `words` compare them with.

    The probe's files go to a folder, by default that of the checkpoint's run.
    """
    found = {}
    for name, few in (("all_labels", []), ("ten_labels_a_class", ["--shots", 10, "--draws", draws])):
        output = (folder or weights.parents[1]) / f"{name}.json"
        where = ["--data", data, "--labels", table, "--stage", "last", "--output", output, "--overwrite"]
        transfer.run("sparkme.probe", weights, *where, *few, *words, quiet=True, threads=1)
        found[name] = [
            {key: round(score[key], 4) for key in ("knn", "knn_error", "linear", "linear_error")}
            for score in json.loads(output.read_text())["scores"]
        ]
    return [dict(zip(found, scores, strict=True)) for scores in zip(*found.values(), strict=True)]


def line(record: dict[str, Any]) -> str:
    """A trial as a line of text."""
    few, every = record["ten_labels_a_class"], record["all_labels"]
    return (
        f"{record['minutes']:5.1f} min  loss {record['loss']:.3f}  ten a class: kNN {100 * few['knn']:.1f} linear "
        f"{100 * few['linear']:.1f}  all: kNN {100 * every['knn']:.1f} linear {100 * every['linear']:.1f}  "
        f"{record['flags'] or 'as --base'}"
    )


if __name__ == "__main__":
    sys.exit(main())
