"""Which pretraining is worth its time on a small set of images? Ways to pretrain, compared at equal cost on labelled sets.

    python -m benchmarks.worth cifar10 clipart textures --minutes 60 --json benchmarks/results/worth.json
    python -m benchmarks.worth birds=labelled/ --ways random spark       # your own set, as NAME=FOLDER
    python -m benchmarks.worth --write                                   # table and curves of docs/training.md, from the JSON

Names of sets are those of `benchmarks.sets`, which makes them. Each way pretrains the same network on the training images of a
set, without their labels, on one core, for the given minutes: a short run measures its speed, and gives the number of crops. It
does so also for 1/8, 1/4 and 1/2 of the minutes, for the curves.

What a way is worth is measured on the validation images of the set:

- Frozen features of the last map, by `sparkme.probe`: kNN and a linear classifier, from all labels and from ten a class.
- Fine-tuning from a few labels a class, by `sparkme.finetune`, after the whole minutes. Random weights are training from
  scratch. Each way has the better of the learning rates, chosen on a seventh of the training images with one seed. Then the
  seeds, each with other labels, train without that seventh.

The ways `simclr` and `densecl` are lightly's, see `benchmarks.contrastive`. `--lightly` is the Python of an environment that
has lightly on top of this project's own; without it they are left out, which is said.

The JSON file has `runs` (one for each set, way, minutes and seed: crops, minutes, frozen scores) and `finetuned` (one for each
set, way and number of labels: rates, accuracies of the seeds). What is there is not done again. With all defaults
pretraining alone takes 28 hours of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from benchmarks import plot, sets, small_data, transfer
from benchmarks.flops import provenance
from sparkme.data.labelled import find_labelled, split
from sparkme.errors import UserError, run_command
from sparkme.files import replaced_when_whole
from sparkme.networks.create import create_dense
from sparkme.settings.classification import SMALL

RESULTS = Path(__file__).parent / "results" / "worth.json"
PAGE = Path(__file__).parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- worth:begin -->", "<!-- worth:end -->"
SHARES = (0.125, 0.25, 0.5, 1.0)  # of the minutes
CHOOSE_SHARE = 1 / 7  # of the training images, to choose learning rates on
EPOCHS = 10  # of pretraining: parts of a run, whatever the number of images
LEAST_CROPS = 128  # of such a part: a batch
TRIED_CROPS = 640  # to measure a way's speed
RANDOM = "random"


@dataclass(frozen=True)
class Way:
    """A way to pretrain: of this project by flags of `sparkme.pretrain`, or of lightly by name."""

    title: str
    flags: tuple[str, ...] = ()
    lightly: str = ""


WAYS = {
    RANDOM: Way("random weights"),
    "spark": Way("SparK", ("--recipe", "small")),
    "contrastive": Way("SparK with a contrastive term", ("--recipe", "contrastive")),
    "fcmae": Way("FCMAE", ("--recipe", "fcmae")),
    "simclr": Way("SimCLR", lightly="simclr"),
    "densecl": Way("DenseCL", lightly="densecl"),
}


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worth", description="Compare ways to pretrain at equal cost, on small labelled sets."
    )
    parser.add_argument(
        "sets",
        nargs="*",
        default=["cifar10", "clipart", "textures"],
        metavar="SET",
        help="names of benchmarks.sets, or NAME=DIR",
    )
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--model", default="resnet18", help="network (default: %(default)s)")
    parser.add_argument(
        "--input-size", type=int, default=96, metavar="PIXELS", help="side of the images (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=60, help="of pretraining on one core (default: %(default)s)")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[*SHARES], metavar="S", help="of --minutes (default: %(default)s)"
    )
    parser.add_argument("--shots", type=int, nargs="+", default=[10, 50], metavar="N", help="labels a class for fine-tuning")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 1.0], metavar="F", help="of finetune's learning rate")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds of fine-tuning (default: %(default)s)")
    parser.add_argument("--finetune-flags", default="", metavar="'FLAGS'", help="flags of sparkme.finetune, for all ways")
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="draws of ten labels a class for frozen features")
    parser.add_argument("--lightly", type=Path, metavar="PYTHON", help="a Python that has lightly, for simclr and densecl")
    parser.add_argument("--no-finetuning", dest="finetuning", action="store_false", help="frozen features alone")
    parser.add_argument("--data", type=Path, default=Path("runs/sets"), metavar="DIR", help="folder of the sets")
    parser.add_argument("--work", type=Path, default=Path("runs/worth"), metavar="DIR", help="folder of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results file (default: WORK/worth.json)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at a time (default: cores)"
    )
    parser.add_argument("--write", action="store_true", help="only table and curves, from --json")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: write(args) if args.write else compare(args))


class LabelledSet:
    """A set: where it is, and tables of its images, by what they are measured on.

    Attributes:
        data: folder that the tables' paths start from.
        tables: `choose` and `final`: training images, and those to choose rates on, or the validation images.
        unlabelled: folder of links to the training images.
    """

    def __init__(self, word: str, args: argparse.Namespace) -> None:
        self.name, _, folder = word.partition("=")
        self.data = Path(folder) if folder else sets.make_set(self.name, args.data)
        self.is_own = bool(folder)
        found = find_labelled(self.data)
        rest = split(found.train, CHOOSE_SHARE, 0)
        self.parts = {"train": rest.train, "choose": rest.val, "test": found.val}
        self.work = args.work / self.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.tables = {"choose": self.work / "choose.csv", "final": self.work / "final.csv"}
        for name, measured in (("choose", "choose"), ("final", "test")):
            transfer.write_table(self.tables[name], self.data, self.parts["train"], self.parts[measured])
        self.unlabelled = self.work / "unlabelled"
        transfer.link([*self.parts["train"].paths, *self.parts["choose"].paths], self.unlabelled)

    def record(self) -> dict[str, Any]:
        chosen_on = None if self.is_own else sets.SETS[self.name].chosen_on
        images = {name: len(part) for name, part in self.parts.items()}
        return {"classes": len(self.parts["test"].classes), "images": images, "recipes_were_chosen_on_it": chosen_on}


def compare(args: argparse.Namespace) -> int:
    """Does the runs that the file lacks. Returns the exit code."""
    check(args)
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.json or args.work / "worth.json"
    names = ("model", "input_size", "finetune_flags", "draws", "rates", "seeds")
    settings = {name: getattr(args, name) for name in names}
    record: dict[str, Any] = (
        plot.read(path) if path.exists() else {"settings": settings, "sets": {}, "runs": [], "finetuned": []}
    )
    if record.get("settings") != settings:
        raise UserError(f"--json {path} has runs with other settings, {record.get('settings')}; choose another file")
    transfer.keep_settings(args.work, settings)
    of_sets = {found.name: found for found in (LabelledSet(word, args) for word in args.sets)}
    record |= {**provenance(), "sets": record["sets"] | {name: found.record() for name, found in of_sets.items()}}
    writing = Lock()

    def keep(part: str, entry: dict[str, Any]) -> None:
        with writing:
            record[part].append(entry)
            with replaced_when_whole(path) as temporary:
                temporary.write_text(json.dumps(record, indent=2) + "\n")
            print(line(part, entry), flush=True)

    def is_missing(part: str, **values: Any) -> bool:
        return not any(all(entry[name] == value for name, value in values.items()) for entry in record[part])

    def pretrain(name: str, way: str, minutes: float) -> None:
        keep("runs", {"set": name, "way": way, "budget": minutes} | pretrain_and_probe(of_sets[name], way, minutes, args))

    def tune(name: str, way: str, shots: int) -> None:
        weights = weights_of(of_sets[name], way, args.minutes)
        keep(
            "finetuned",
            {"set": name, "way": way, "budget": args.minutes, "shots": shots}
            | fine_tune(of_sets[name], weights, way, shots, args),
        )

    jobs = [(name, way, minutes) for name in of_sets for way in args.ways for minutes in budgets(way, args)]
    jobs = [job for job in jobs if is_missing("runs", set=job[0], way=job[1], budget=job[2])]
    transfer.in_parallel(pretrain, jobs, args.processes)
    if args.finetuning:
        tunes = [(name, way, shots) for name in of_sets for shots in args.shots for way in args.ways]
        tunes = [t for t in tunes if is_missing("finetuned", set=t[0], way=t[1], shots=t[2], budget=args.minutes)]
        transfer.in_parallel(tune, tunes, args.processes)
    print(table(record))
    print(f"wrote {path}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Leaves out lightly's ways without --lightly. Raises UserError for invalid arguments, before anything runs."""
    for name in ("seeds", "processes", "draws"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.minutes <= 0 or not all(0 < share <= 1 for share in args.shares):
        raise UserError("--minutes must be above 0, and --shares above 0 and at most 1")
    if min(args.shots) < 1 or not all(rate > 0 for rate in args.rates):
        raise UserError("--shots must be at least 1, and --rates above 0")
    left_out = [way for way in args.ways if WAYS[way].lightly and args.lightly is None]
    if left_out:
        print(f"left out: {', '.join(left_out)}; they need --lightly PYTHON", file=sys.stderr)
        args.ways = [way for way in args.ways if way not in left_out]


def budgets(way: str, args: argparse.Namespace) -> list[float]:
    return [0.0] if way == RANDOM else sorted({args.minutes * share for share in args.shares})


def weights_of(of: LabelledSet, way: str, minutes: float) -> Path:
    """The file of a way's weights."""
    if way == RANDOM:
        return of.work / RANDOM / "weights.pth"
    folder = of.work / f"{way}-{minutes:g}min"
    return folder / "weights.pth" if WAYS[way].lightly else folder / "checkpoints" / "last.pt"


def pretrain_and_probe(of: LabelledSet, way: str, minutes: float, args: argparse.Namespace) -> dict[str, Any]:
    """Cost and frozen scores of one run."""
    weights = weights_of(of, way, minutes)
    found: dict[str, Any] = {}
    if way == RANDOM:
        weights.parent.mkdir(exist_ok=True)
        torch.manual_seed(0)
        torch.save(create_dense(args.model).state_dict(), weights)
    elif WAYS[way].lightly:
        found = pretrain_with_lightly(of, WAYS[way].lightly, minutes, weights, args)
    else:
        found = pretrain_here(of, WAYS[way].flags, minutes, weights.parents[1], args)
    words = [] if weights.suffix == ".pt" else ["--model", args.model, "--input-size", args.input_size]
    folder = weights.parents[weights.suffix == ".pt"]
    (scores,) = small_data.probe_last(weights, of.data, of.tables["final"], args.draws, *words, folder=folder)
    return found | scores


def pretrain_here(
    of: LabelledSet, flags: Iterable[str], minutes: float, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    words = [
        "--data",
        of.unlabelled,
        "--model",
        args.model,
        "--input-size",
        args.input_size,
        "--workers",
        0,
        "--panel-epochs",
        0,
        "--no-resume",  # an interrupted run would have another length than the speed of now gives
        *flags,
    ]

    def run(output: Path, epochs: int, crops: int) -> None:
        size = ["--epochs", epochs, "--samples-per-epoch", crops, "--output", output]
        transfer.run("sparkme.pretrain", *words, *size, quiet=True, threads=1)

    tried = folder.with_name(f"{folder.name}-speed")
    run(tried, 1, TRIED_CROPS)
    lines = [json.loads(text) for text in (tried / "metrics.jsonl").read_text().splitlines()]
    rate = statistics.median(line["images_per_s"] for line in lines if "images_per_s" in line)
    crops = max(LEAST_CROPS, round(rate * minutes * 60 / EPOCHS))
    run(folder, EPOCHS, crops)
    found = transfer.pretraining_of(folder / "checkpoints" / "last.pt")
    return {"crops": EPOCHS * crops, "minutes": found["minutes"], "loss": found["loss"]}


def pretrain_with_lightly(
    of: LabelledSet, method: str, minutes: float, weights: Path, args: argparse.Namespace
) -> dict[str, Any]:
    command = [args.lightly, "-m", "benchmarks.contrastive", "--method", method, "--data", of.unlabelled, "--model", args.model]
    command += ["--input-size", args.input_size, "--minutes", minutes, "--output", weights]
    done = subprocess.run([*map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"benchmarks.contrastive failed: {(done.stderr.strip() or 'see above').splitlines()[-1]}")
    found = json.loads(weights.with_suffix(".json").read_text())
    return {"crops": found["crops"], "minutes": round(found["seconds"] / 60, 1), "loss": found["loss"]}


def fine_tune(of: LabelledSet, weights: Path, way: str, shots: int, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy from so many labels a class: of every rate on the images to choose on, then of every seed on the test images."""
    side = "scratch" if way == RANDOM else "pretrained"

    def accuracy(factor: float, seed: int, table: str) -> float:
        folder = of.work / f"{way}-{args.minutes:g}min-{shots}shots-rate{factor:g}-seed{seed}-{table}"
        words = ["--data", of.data, "--labels", of.tables[table], "--shots", shots, "--input-size", args.input_size]
        words += [] if weights.suffix == ".pt" else ["--model", args.model]
        words += args.finetune_flags.split()
        return transfer.fine_tune(weights, side, SMALL["base_lr"] * factor, seed, folder, words)["val_top1"]

    of_rates = {rate: accuracy(rate, 0, "choose") for rate in args.rates}
    best = max(of_rates, key=lambda rate: of_rates[rate])
    values = [accuracy(best, seed, "final") for seed in range(args.seeds)]
    rates = {f"{SMALL['base_lr'] * rate:g}": value for rate, value in of_rates.items()}
    return {"accuracy_of_rates": rates, "rate": SMALL["base_lr"] * best, "accuracies": values}


def line(part: str, entry: dict[str, Any]) -> str:
    """An entry of the JSON file as a line of text."""
    start = f"{entry['set']}, {WAYS[entry['way']].title}, {entry['budget']:g} min"
    start += f", {entry['crops']} crops" if "crops" in entry else ""
    if part == "finetuned":
        return f"{start}, {entry['shots']} labels a class: fine-tuned {100 * transfer.mean(entry['accuracies']):.1f} %"
    few, every = entry["ten_labels_a_class"], entry["all_labels"]
    return (
        f"{start}: kNN {100 * every['knn']:.1f}, linear "
        f"{100 * every['linear']:.1f} %; ten labels a class: {100 * few['knn']:.1f}, {100 * few['linear']:.1f} %"
    )


def table(record: dict[str, Any]) -> str:
    """A row for each set and way, after the largest budget, in percent. In brackets is the gain over training from scratch."""
    shots = sorted({entry["shots"] for entry in record["finetuned"]})
    head = ["set", "pretrained by", "crops", "kNN", "linear", "linear, ten labels a class"]
    head += [f"fine-tuned, {number} labels a class" for number in shots]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    there = {(run["set"], run["way"]) for run in record["runs"]}
    for name, way in [(name, way) for name in record["sets"] for way in WAYS if (name, way) in there]:
        run = max((r for r in record["runs"] if (r["set"], r["way"]) == (name, way)), key=lambda r: r["budget"])
        scores = [run["all_labels"]["knn"], run["all_labels"]["linear"], run["ten_labels_a_class"]["linear"]]
        cells = [name, WAYS[way].title, f"{run.get('crops', 0):,}", *(f"{100 * score:.1f}" for score in scores)]
        cells += [fine_tuned_cell(record, name, way, number) for number in shots]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fine_tuned_cell(record: dict[str, Any], name: str, way: str, shots: int) -> str:
    found = {e["way"]: e["accuracies"] for e in record["finetuned"] if (e["set"], e["shots"]) == (name, shots)}
    if way not in found:
        return ""
    gains = [a - b for a, b in zip(found[way], found.get(RANDOM, []), strict=False)]
    text = transfer.plus_minus(with_error(found[way]))
    return text + (f" ({transfer.plus_minus(with_error(gains), sign='+')})" if gains and way != RANDOM else "")


def with_error(values: list[float]) -> dict[str, Any]:
    return {"mean": transfer.mean(values), "standard_error": transfer.standard_error(values)}


def write(args: argparse.Namespace) -> int:
    """Writes the table from the numbers, and curves if there are several budgets. Returns the exit code."""
    path = args.json or RESULTS
    if not path.is_file():
        raise UserError(f"--json {path} does not exist; run python -m benchmarks.worth first")
    record, picture = plot.read(path), path.with_suffix(".png")
    block = table(record)
    if len({run["budget"] for run in record["runs"] if run["way"] != RANDOM}) > 1:
        draw(record, picture)
        link = os.path.relpath(picture.resolve(), PAGE.parent)
        block += f"\n\n![Accuracy of frozen features over minutes of pretraining]({link})"
    plot.write(PAGE, plot.read_page(PAGE, BEGIN, END), f"{BEGIN}\n{block}\n{END}")
    return 0


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws the linear accuracy over the minutes of pretraining, a picture for each set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (once something is drawn)
    from matplotlib.figure import Figure  # noqa: PLC0415

    names = list(record["sets"])
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    ways = [way for way in WAYS if any(run["way"] == way for run in record["runs"]) and way != RANDOM]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for way, colour in zip(ways, plot.LINES, strict=False):
            runs = sorted(
                (r["budget"], r["all_labels"]["linear"]) for r in record["runs"] if (r["set"], r["way"]) == (name, way)
            )
            axes.plot([x for x, _ in runs], [100 * y for _, y in runs], marker="o", color=colour, label=WAYS[way].title)
        for run in record["runs"]:
            if (run["set"], run["way"]) == (name, RANDOM):
                axes.axhline(100 * run["all_labels"]["linear"], color="#8d96a3", linestyle="--", label="random weights")
        axes.set(title=name, xlabel="minutes of one core", ylabel="linear classifier, % right")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
