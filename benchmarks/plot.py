"""Makes tables and pictures of the results of benchmarks.throughput and benchmarks.flops.

    python -m benchmarks.plot                                      # all of benchmarks/results/, tables to stdout
    python -m benchmarks.plot --page docs/speed.md --summary README.md     # tables between the marks of both
    python -m benchmarks.plot h200.json --pictures /tmp            # one file

Each file of times gives NAME_times.png, bars of the contenders' times for encoder and step. With three mask ratios or more it
also gives NAME_sweep.png, the speed-up of cuda_ext over the tuned masked-dense against the mask ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sparkme.errors import UserError, first_line, run_command
from sparkme.settings.pretrain import RECIPES

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SUMMARY = "<!-- summary:begin -->", "<!-- summary:end -->"
# The rows of the summary: file, kind of work, precision.
ROWS = (
    ("cpu_encoder.json", "encoder", "float32"),
    ("h200_graph.json", "encoder", "bf16"),
    ("cpu_step.json", "step", "float32"),
    ("h200_graph.json", "step", "bf16"),
    ("cpu_step_fcmae.json", "step", "float32"),
)
WORK = {
    "encoder-forward": "Encoder, forward",
    "encoder": "Encoder, forward and backward",
    "step": "Whole training step",
}
TUNED = "tuned masked-dense"
COLOURS = {
    "cuda_ext": "#d1495b",
    "minkowski": "#edae49",
    "masked-dense": "#00798c",
    "masked-dense-nchw": "#66a5ad",
    "rows-dense": "#30638e",
    "official": "#8d96a3",
}
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
}
LINES = ("#d1495b", "#00798c", "#edae49", "#30638e", "#8d96a3", "#5d7052")


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description="Turn the JSON files of the benchmarks into tables and pictures."
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="results of benchmarks.throughput or flops (default: all)"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help=f"write the tables to this page, between {BEGIN} and {END}")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", help=f"write a short table to it, between {' and '.join(SUMMARY)}"
    )
    parser.add_argument("--pictures", type=Path, default=RESULTS, metavar="FOLDER", help="folder for pictures")
    parser.add_argument("--no-pictures", action="store_true", help="write tables only")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    return run_command(lambda: plot(args))


def plot(args: argparse.Namespace) -> int:
    if not args.no_pictures and not args.pictures.is_dir():
        raise UserError(f"--pictures {args.pictures} is not a folder")
    page = read_page(args.page, BEGIN, END) if args.page else None
    front = read_page(args.summary, *SUMMARY) if args.summary else None
    records = {path: read(path) for path in args.files or sorted(RESULTS.glob("*.json"))}
    if unknown := [str(path) for path in args.files if kind(records[path]) is None]:
        raise UserError(f"{unknown[0]} is a file of neither benchmarks.throughput nor benchmarks.flops")
    records = {path: record for path, record in records.items() if kind(record)}
    if not records:
        raise UserError(f"no numbers in {RESULTS}; `python -m benchmarks.throughput --json FILE` makes some")
    base = args.page.resolve().parent if args.page else Path.cwd()
    blocks = []
    for path, record in records.items():
        if kind(record) == "flops":
            blocks.append(flops_table(path.name, record))
            continue
        blocks += throughput_tables(path.name, record)
        for picture in [] if args.no_pictures else draw(path.stem, record, args.pictures):
            link = Path(os.path.relpath(picture.resolve(), base)).as_posix()
            blocks.append(f"![{describe_picture(picture)}]({link})")
            print(f"wrote {picture}", file=sys.stderr)
    text = "\n\n".join(blocks)
    if page is None:
        print(text)
    else:
        write(args.page, page, f"{BEGIN}\n{text}\n{END}")
    if front is not None:
        write(args.summary, front, "\n".join((SUMMARY[0], summary({path.name: r for path, r in records.items()}), SUMMARY[1])))
    return 0


def read_page(path: Path, begin: str, end: str) -> tuple[str, str]:
    """The text before and after the marks."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    before, found, rest = text.partition(begin)
    _, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise UserError(f"{path} lacks the lines {begin} and {end}, which enclose the tables")
    return before, after


def write(path: Path, around: tuple[str, str], block: str) -> None:
    path.write_text(around[0] + block + around[1])
    print(f"wrote {path}", file=sys.stderr)


def read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    return record if isinstance(record, dict) else {}


def kind(record: dict[str, Any]) -> str | None:
    if "hardware" in record and any("what" in case for case in record.get("cases", [])):
        return "throughput"
    return "flops" if any("gflop" in result for result in record.get("results", [])) else None


# --------------------------------------------------------------------------------------------------------------- tables


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    names = list(header)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grouped(cases: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return groups


def is_sweep(cases: list[dict[str, Any]]) -> bool:
    return len({case["mask_ratio"] for case in cases}) >= 3


def throughput_tables(name: str, record: dict[str, Any]) -> list[str]:
    """A table for each kind of work, method, precision, size and batch of a file."""
    blocks = []
    same = ("what", "precision", "compile", "input_size", "batch_size")
    for cases in grouped(record["cases"], lambda case: (method(case), *(case[key] for key in same))).values():
        if is_sweep(cases):
            blocks += [title(name, record, cases[0], with_ratio=False), sweep_table(cases)]
        else:
            for of_ratio in grouped(cases, lambda case: case["mask_ratio"]).values():
                blocks += [title(name, record, of_ratio[0], with_ratio=True), times_table(of_ratio)]
        if notes := left_out(cases):
            blocks.append(notes)
    return blocks


def title(name: str, record: dict[str, Any], case: dict[str, Any], *, with_ratio: bool) -> str:
    words = [hardware(record), precision(case), f"batch {case['batch_size']}", f"{case['input_size']} pixels"]
    words += [method(case)] if method(case) else []
    if with_ratio:
        words.append(f"mask ratio {case['mask_ratio']:g}")
    return f"**{WORK[case['what']]}**: {', '.join(words)} (`{name}`, commit {record.get('commit')})"


def hardware(record: dict[str, Any]) -> str:
    found = record["hardware"]
    return found["gpu"] or f"{found['cpu']}, {count(found['threads'], 'thread')}"


def method(case: dict[str, Any]) -> str:
    """The method and its decoder's width; empty for a case of an older file without them."""
    return f"{RECIPES[case['recipe']].name}, decoder width {case['decoder_width']}" if "recipe" in case else ""


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def precision(case: dict[str, Any]) -> str:
    return case["precision"] + (", compiled" if case["compile"] else "") + (", from CUDA graphs" if case.get("graph") else "")


def times_table(cases: list[dict[str, Any]]) -> str:
    """A row for each model and contender."""
    with_gpu = any("gpu" in result for case in cases for result in case.get("contenders", {}).values())
    header = ["model, contender", "median ms", "quartiles ms", "images/s", "activations GiB", "time over `cuda_ext`"]
    rows = []
    for case in cases:
        if "error" in case:
            rows.append([f"{case['model']}: failed", *["-"] * (5 + with_gpu)])
        for name, result in case.get("contenders", {}).items():
            low, high = (milliseconds(value) for value in result["quartiles_s"])
            own = f", {result['precision']}" if result["precision"] != case["precision"] else ""
            ratio = case["ratios"].get(name)
            row = [
                f"{case['model']}, `{name}`{own}",
                milliseconds(result["median_s"]),
                f"{low} to {high}",
                f"{result['images_per_s']:.{0 if result['images_per_s'] >= 100 else 1}f}",
                f"{result['activation_bytes'] / 2**30:.2f}",
                f"{ratio:.2f}x" if ratio else "1x" if name == "cuda_ext" else "",
            ]
            rows.append([*row, f"{result['gpu']['idle_share']:.1%}" if "gpu" in result else "-"] if with_gpu else row)
    return markdown([*header, "GPU idle"] if with_gpu else header, rows)


def summary(records: dict[str, dict[str, Any]]) -> str:
    """A row for each model of `ROWS`: speed relative to the tuned masked-dense, and to the official algorithm."""
    rows = []
    for name, what, kind_of_number in ROWS:
        for case in records.get(name, {}).get("cases", []):
            if (case["what"], case["precision"]) != (what, kind_of_number) or "ratios" not in case:
                continue
            memory = [case["contenders"][who]["activation_bytes"] for who in ("cuda_ext", "masked-dense")]
            ratios = [f"{case['ratios'][who]:.2f}" if who in case["ratios"] else "-" for who in (TUNED, "official")]
            work = "encoder" if what == "encoder" else f"whole step of {RECIPES[case['recipe']].name}"
            words = f"{work}, {case['model']}: {hardware(records[name])}, {precision(case)}"
            rows.append([words, *ratios, f"{memory[0] / memory[1]:.2f}"])
    return markdown(["", "speed-up over masked dense", "over official", "activation memory / masked dense"], rows)


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.{0 if value >= 1000 else 1 if value >= 10 else 2}f}"


def sweep_table(cases: list[dict[str, Any]]) -> str:
    """A row for each mask ratio: the speed-up of cuda_ext over the tuned masked-dense."""
    models = list(grouped(cases, lambda case: case["model"]))
    rows = []
    for ratio, of_ratio in grouped(cases, lambda case: case["mask_ratio"]).items():
        found = {case["model"]: case for case in of_ratio}
        cells = [f"{ratio:g}"]
        for model in models:
            cells += sweep_cells(found.get(model, {}))
        rows.append(cells)
    header = [text for model in models for text in (f"{model}: `cuda_ext` ms", "tuned masked-dense ms", "speed-up")]
    return markdown(["mask ratio", *header], rows)


def sweep_cells(case: dict[str, Any]) -> list[str]:
    ours, ratio = case.get("contenders", {}).get("cuda_ext"), case.get("ratios", {}).get(TUNED)
    if not ours or not ratio:
        return ["-"] * 3
    return [milliseconds(ours["median_s"]), milliseconds(ours["median_s"] * ratio), f"{ratio:.2f}x"]


def left_out(cases: list[dict[str, Any]]) -> str:
    reasons = [f"{case['model']}: {case['error']}" for case in cases if "error" in case]
    reasons += [f"`{name}` ({case['model']}): {reason}" for case in cases for name, reason in case["left_out"].items()]
    return f"Left out: {'; '.join(dict.fromkeys(reasons))}." if reasons else ""


def flops_table(name: str, record: dict[str, Any]) -> str:
    first = record["results"][0]
    size = "x".join(map(str, dict.fromkeys(first["input_size"])))
    about = f"{size} pixels, {first['visible_patches']} of {first['num_patches']} patches visible"
    rows = [
        [
            result["model"],
            f"{result['gflop']['encoder']['dense']:.2f}",
            f"{result['gflop']['encoder']['submanifold']:.2f}",
            f"{result['ratio_to_dense']['encoder']['submanifold']:.3f}",
            f"{result['gflop']['densify']['dense']:.2f}",
            f"{result['gflop']['decoder']['dense']:.2f}",
        ]
        for result in record["results"]
    ]
    header = ["model", "encoder, dense", "encoder, visible pairs", "ratio", "densify", "decoder"]
    return f"**GFLOP (2 x MAC) per image, forward**: {about} (`{name}`)\n\n{markdown(header, rows)}"


# ------------------------------------------------------------------------------------------------------------- pictures


def draw(stem: str, record: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the pictures of a file of times, and returns their paths."""
    import matplotlib  # noqa: PLC0415  (once something is drawn)

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        return list(draw_all(stem, record, folder))


def draw_all(stem: str, record: dict[str, Any], folder: Path) -> Iterator[Path]:
    timed = [case for case in record["cases"] if "contenders" in case]
    sweeps: list[list[dict[str, Any]]] = []
    bars: list[list[dict[str, Any]]] = []
    same = ("what", "model", "input_size", "batch_size", "precision", "compile")
    for cases in grouped(timed, lambda case: (method(case), *(case[key] for key in same))).values():
        (sweeps if is_sweep(cases) else bars).append(cases)
    shown = [case for cases in bars for case in cases if case["what"] != "encoder-forward"]
    if shown:
        path = folder / f"{stem}_times.png"
        draw_bars(shown, record, path)
        yield path
    if any(TUNED in case["ratios"] for cases in sweeps for case in cases):
        path = folder / f"{stem}_sweep.png"
        draw_sweep(sweeps, record, path)
        yield path


def describe_picture(path: Path) -> str:
    if path.stem.endswith("_sweep"):
        return "Speed-up of cuda_ext over the tuned masked-dense against the mask ratio"
    return "Time of each contender, shorter is better"


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.5), squeeze=False, layout="constrained")


def draw_bars(cases: list[dict[str, Any]], record: dict[str, Any], path: Path) -> None:
    """A panel for each kind of work and network, a bar for each contender, its quartiles as a line."""
    works = list(grouped(cases, lambda case: case["what"]))
    settings = list(grouped(cases, setting_of))
    most = max(len(case["contenders"]) for case in cases)
    fig, axes = figure(len(works), len(settings), 4.6, 0.3 * most + 1)
    for axis in axes.flat:
        axis.set_visible(False)
    for case in cases:
        axis = axes[works.index(case["what"])][settings.index(setting_of(case))]
        axis.set_visible(True)
        results = case["contenders"]
        medians = [1e3 * result["median_s"] for result in results.values()]
        spread = [
            [max(0.0, median - 1e3 * result["quartiles_s"][0]) for median, result in zip(medians, results.values())],
            [max(0.0, 1e3 * result["quartiles_s"][1] - median) for median, result in zip(medians, results.values())],
        ]
        colours = [COLOURS.get(name, "#555555") for name in results]
        axis.barh(
            range(len(results)), medians, xerr=spread, color=colours, height=0.72, error_kw={"ecolor": "#333333", "lw": 1}
        )
        for i, name in enumerate(results):
            ratio = f"  {case['ratios'][name]:.2f}x" if name in case["ratios"] else ""
            reach = medians[i] + spread[1][i]
            axis.text(reach + 0.015 * max(medians), i, f"{milliseconds(medians[i] / 1e3)}{ratio}", va="center", fontsize=8)
        labels = [
            name + ("" if result["precision"] == case["precision"] else f" ({result['precision']})")
            for name, result in results.items()
        ]
        axis.set_yticks(range(len(results)), labels)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.32 * max(median + above for median, above in zip(medians, spread[1])))
        axis.set_xlabel("ms, shorter is better; x: over cuda_ext")
        axis.set_title(f"{WORK[case['what']]}\n{setting_title(case)}", loc="left")
    save(fig, hardware(record), path)


def setting_of(case: dict[str, Any]) -> tuple[Any, ...]:
    same = ("model", "input_size", "batch_size", "mask_ratio", "precision", "compile")
    return method(case), *(case[key] for key in same)


def setting_title(case: dict[str, Any]) -> str:
    size = f"{case['model']}, {case['input_size']} px, batch {case['batch_size']}"
    about = f"mask ratio {case['mask_ratio']:g}, {precision(case)}"
    return ",\n".join([size, about, method(case)] if method(case) else [size, about])


def draw_sweep(groups: list[list[dict[str, Any]]], record: dict[str, Any], path: Path) -> None:
    """Speed-up of cuda_ext over the tuned masked-dense against the mask ratio."""
    fig, axes = figure(1, 1, 6.4, 3.6)
    axis = axes[0][0]
    highest = 1.0
    about: list[Callable[[dict[str, Any]], str]] = [
        precision,
        method,
        lambda c: f"{c['input_size']} pixels",
        lambda c: f"batch {c['batch_size']}",
    ]
    differ = [text for text in about if len({text(c) for of in groups for c in of}) > 1]
    for i, cases in enumerate(groups):
        points = sorted((case["mask_ratio"], case["ratios"][TUNED]) for case in cases if TUNED in case["ratios"])
        if not points:
            continue
        x, y = zip(*points)
        highest = max(highest, *y)
        case, colour = cases[0], LINES[i % len(LINES)]
        label = ", ".join([case["model"], WORK[case["what"]].lower(), *(text(case) for text in differ)])
        axis.plot(x, y, "o-", color=colour, label=label, markersize=4.5, linewidth=1.8)
    axis.axhline(1, color="#555555", linestyle="--", linewidth=1)
    axis.annotate(
        "1x: equally fast", (1, 1), (0, 3), ("axes fraction", "data"), "offset points", ha="right", fontsize=8, color="#555555"
    )
    axis.set_ylim(0, 1.1 * highest)
    axis.set_xlabel("mask ratio, share of patches that are hidden")
    axis.set_ylabel("times faster than tuned masked-dense")
    axis.grid(axis="y", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, loc="upper left")
    shared = [text(groups[0][0]) for text in about if text not in differ]
    save(fig, ", ".join(filter(None, [f"cuda_ext on {hardware(record)}", *shared])), path)


def save(fig: Any, text: str, path: Path) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415

    fig.suptitle(text, fontsize=9, x=0.01, ha="left", color="#555555")
    try:
        fig.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from None
    finally:
        plt.close(fig)


if __name__ == "__main__":
    sys.exit(main())
