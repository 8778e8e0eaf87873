"""A run's log: metrics.jsonl, notes.jsonl, TensorBoard events, loss.png and lines on the screen."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparkme.errors import UserError, first_line
from sparkme.files import replaced_when_whole
from sparkme.screen import show
from sparkme.text import duration, ended

POINTS = {"marker": "o", "markersize": 3, "linewidth": 1.2}
LEAST_POINTS = 10  # smallest span of the accuracy axis in percent, so that single images do not look like a drop
EARLIER_RUNS = 4  # runs in the same parent folder, shown in loss.png
MOST_BYTES = 256 * 2**20  # largest metrics file that is read

# Titles of measured values, which are shares, without the `val_` before their names and the `_average` behind. The first are
# drawn together, task by task; the details of detection and segmentation are not in loss.png.
MEASURES = (
    {"knn": "kNN accuracy"},
    {"top1": "top-1 accuracy", "top5": "top-5 accuracy"},
    {"map": "mean average precision"},
    {"box_ap": "box AP", "mask_ap": "mask AP", "box_ap50": "box AP50", "mask_ap50": "mask AP50"},
    {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy"},
)
COCO_FIGURES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP, small objects",
    "ap_medium": "AP, medium objects",
    "ap_large": "AP, large objects",
    "ar1": "AR, 1 detection per image",
    "ar10": "AR, 10 detections per image",
    "ar100": "AR, 100 detections per image",
    "ar_small": "AR, small objects",
    "ar_medium": "AR, medium objects",
    "ar_large": "AR, large objects",
}
DETAILS = {f"{kind}_{name}": f"{kind} {title}" for kind in ("box", "mask") for name, title in [*COCO_FIGURES.items()][2:]}
DETAILS["mean_accuracy"] = "mean accuracy of the classes"


class Lines:
    """A growing file of JSON lines. Lines that a full disk refuses are kept, and written with the next line."""

    MOST_KEPT = 100_000

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: list[str] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends a record without its non-finite numbers. Raises OSError; the file is then as before."""
        values = {k: v for k, v in record.items() if not isinstance(v, float) or math.isfinite(v)}
        self.kept = [*self.kept[-self.MOST_KEPT :], json.dumps(values) + "\n"]
        self.flush()

    def flush(self) -> None:
        """Writes the kept lines. Raises OSError; the file is then as before."""
        if not self.kept:
            return
        data = "".join(self.kept).encode()
        number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            end = os.fstat(number).st_size
            while data:  # a full disk may take a part
                data = data[os.write(number, data) :]
        except OSError:
            os.ftruncate(number, end)
            raise
        finally:
            os.close(number)
        self.kept.clear()


class Notes:
    """notes.jsonl: starts, stops, unreadable images and warnings of a run, from every process."""

    def __init__(self, folder: Path) -> None:
        self.lines = Lines(folder / "notes.jsonl")

    def add(self, kind: str, step: int, text: str) -> None:
        """Writes a note now, or with the next one if that fails."""
        with suppress(OSError):
            self.lines.add({"time": round(time.time(), 3), "step": step, "kind": kind, "text": text})


class RunLog:
    """Writes a run's metrics. A resumed run first drops the lines of steps that it repeats.

    Args:
        folder: the run folder.
        first_step: the step at which training starts or resumes.
        total_steps, steps_per_epoch: of the whole run.
        bar: draw progress bars instead of plain lines.
        loss_name: for the picture.
        tracker: also gets the metrics, such as a run of Weights & Biases.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        total_steps: int,
        steps_per_epoch: int,
        bar: bool,
        loss_name: str,
        tracker: Any = None,
    ) -> None:
        self.folder, self.loss_name, self.tracker = folder, loss_name, tracker
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.first_step, self.done = first_step, first_step
        self.lines = Lines(folder / "metrics.jsonl")
        drop_after(self.lines.path, first_step)
        self._events: Any = None
        self._purge: int | None = first_step + 1  # TensorBoard hides events of earlier writers from here on
        self.bars: list[Any] = []
        if bar:  # both follow the terminal's width
            epoch, in_epoch = divmod(first_step, steps_per_epoch)
            self.bars = [
                tqdm(total=steps_per_epoch, initial=in_epoch, desc=self._epoch(epoch), unit="step", dynamic_ncols=True),
                tqdm(total=total_steps, initial=first_step, desc="run", unit="step", dynamic_ncols=True, position=1),
            ]

    @property
    def events(self) -> Any:
        """TensorBoard's writer; a new one after a failure, since it never tries again."""
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (torch, and in the first process alone)

            self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._purge)
            self._purge = None
        return self._events

    def step(self) -> None:
        self.done += 1
        if not self.bars:
            return
        of_epoch, of_run = self.bars
        of_run.update()
        of_epoch.update()
        if self.done % self.steps_per_epoch == 0 and self.done < self.total_steps:
            of_epoch.initial = 0  # of a resumed run's first epoch
            of_epoch.reset()
            of_epoch.set_description(self._epoch(self.done // self.steps_per_epoch))

    def _epoch(self, done: int) -> str:
        return f"epoch {done + 1}/{self.total_steps // self.steps_per_epoch}"

    def metrics(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Logs metrics: `loss`, `learning_rate`, `images_per_s`, `seconds_left` and others. Raises OSError."""
        rate = f"{values['images_per_s']:.1f} images/s"
        shown = f"loss {values['loss']:.4f} | lr {values['learning_rate']:.2e}"
        left = duration(values["seconds_left"])
        if self.bars:
            self.bars[0].set_postfix_str(shown, refresh=False)
            self.bars[1].set_postfix_str(rate, refresh=False)
        else:
            share = 100 * step / self.total_steps
            show(f"step {step}/{self.total_steps} ({share:.0f} %) | {shown} | {rate} | {left} left", sys.stdout)
        self._write(step, epoch, values)

    def measured(self, step: int, epoch: float, values: dict[str, float], text: str) -> None:
        """Logs measured values, such as an accuracy from 0 to 1, and prints the text. On a full disk, the line is written
        later."""
        self.say(f"epoch {epoch:g}: {text}")
        with suppress(OSError):
            self._write(step, epoch, values)

    def _write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.tracker is not None:
            try:
                self.tracker.log({"epoch": epoch, **values}, step=step)
            except Exception as error:  # from its service or its files
                self.warn(f"--wandb: {first_line(error)}; it gets no more metrics")
                self.tracker = None
        self.lines.add({"step": step, "epoch": round(epoch, 4), **values})
        try:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        except OSError:
            self._drop_events()
            raise

    def _drop_events(self) -> None:
        events, self._events = self._events, None
        with suppress(Exception):  # it raises the same error again
            events.close()

    def say(self, text: str) -> None:
        """Prints a line above the progress bars."""
        show(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Prints a line above the progress bars, to stderr."""
        show(text, sys.stderr)

    def finish(self, text: str) -> None:
        """Closes the bars and prints the last line."""
        self._close_bars()
        show(text, sys.stdout)

    def _close_bars(self) -> None:
        for bar in self.bars:
            with suppress(OSError):
                bar.close()
        self.bars = []

    def picture(self, name: str, image: Any, step: int) -> None:
        """Adds a (3, H, W) image to the TensorBoard events."""
        try:
            self.events.add_image(name, image, step)
        except OSError:
            self._drop_events()
            raise

    def plot(self) -> None:
        """Draws loss.png: loss and learning rate over epochs and, below, measured values."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (likewise, and after an epoch)
        from matplotlib.figure import Figure  # noqa: PLC0415

        records = read_records(self.lines.path)
        trained = [record for record in records if "loss" in record]
        measured = [record for record in records if "loss" not in record]
        if not trained:
            return
        height = 6.5 if measured else 4
        figure = Figure(figsize=(7, height))
        FigureCanvasAgg(figure)
        # Fixed margins in inches: an automatic layout takes as long as the rest of the picture.
        figure.subplots_adjust(left=0.8 / 7, right=1 - 0.8 / 7, bottom=0.5 / height, top=1 - 0.35 / height, hspace=0.06)
        rows = figure.subplots(2 if measured else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if measured else [1])
        axes = rows[0, 0]
        earlier = earlier_runs(self.folder)
        for (name, points), colour in zip(earlier.items(), ("0.35", "0.5", "0.65", "0.8"), strict=False):
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, label=unformatted(ended(name, 30)))
        epochs = [record["epoch"] for record in trained]
        dots = "o" if len(trained) < 5 else ""  # a line through few points shows little
        axes.plot(
            epochs,
            [record["loss"] for record in trained],
            color="tab:blue",
            marker=dots,
            markersize=3,
            linewidth=1.2,
            label="this run",
        )
        if earlier:
            axes.legend(frameon=False, fontsize="small")
        axes.set_title(unformatted(ended(str(self.folder), 60)))
        axes.set_ylabel(self.loss_name, color="tab:blue")
        axes.ticklabel_format(useOffset=False)
        low, high = axes.get_ylim()
        if high - low < 0.05:  # else a flat curve looks noisy
            axes.set_ylim((low + high) / 2 - 0.025, (low + high) / 2 + 0.025)
        axes.grid(alpha=0.3)
        rate_axes = axes.twinx()
        rate_axes.plot(epochs, [r["learning_rate"] for r in trained], color="tab:orange", linewidth=0.8, alpha=0.7)
        rate_axes.set_ylabel("learning rate", color="tab:orange")
        if measured:
            plot_measured(rows[1, 0], measured)
        rows[-1, 0].set_xlabel("epoch")
        with replaced_when_whole(self.folder / "loss.png") as temporary:
            figure.savefig(temporary, dpi=120, format="png")

    def close(self) -> None:
        self._close_bars()
        if self._events is not None:
            self._drop_events()
        if self.tracker is not None:
            self.tracker.finish()


def plot_measured(axes: Any, records: list[dict[str, Any]]) -> None:
    """Draws measured values in percent over epochs; those of averaged weights are dashed."""
    names = dict.fromkeys(name for record in records for name in record if name not in ("step", "epoch"))
    drawn = [name for name in names if not is_detail(name)]
    colours = {base: f"C{i % 10}" for i, base in enumerate(dict.fromkeys(map(_base, drawn)))}
    for name in drawn:
        points = [(record["epoch"], 100 * record[name]) for record in records if name in record]
        line, label = ("--", None) if name.endswith("_average") else ("-", _label(name))
        axes.plot(*zip(*points, strict=True), line, color=colours[_base(name)], label=label, **POINTS)
    if any(name.endswith("_average") for name in drawn):
        axes.plot([], [], "--", color="0.4", label="averaged weights", **POINTS)
    low, high = axes.get_ylim()
    if high - low < LEAST_POINTS:
        axes.set_ylim((low + high - LEAST_POINTS) / 2, (low + high + LEAST_POINTS) / 2)
    axes.set_ylabel("%")
    axes.legend(frameon=False, fontsize="small", ncols=1 if len(colours) <= 2 else 3)
    axes.grid(alpha=0.3)


def check_tracker() -> None:
    """Raises UserError if the package of --wandb is not installed."""
    if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs the package wandb: pip install wandb, or leave --wandb out")


def drop_after(path: Path, step: int) -> None:
    """Truncates a metrics file before later steps and torn lines, which needs no disk space."""
    if not path.is_file():
        return
    end = 0
    with path.open("rb+") as file:
        for line in file:
            record = _record(line)
            if record is None or record["step"] > step or not line.endswith(b"\n"):
                break
            end += len(line)
        file.truncate(end if step else 0)


def earlier_runs(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Epochs and losses of the newest other runs of the same command and task in the parent folder, by name."""
    kind, found = _kind(folder), list[tuple[float, Path]]()
    with suppress(OSError):
        for entry in os.scandir(folder.absolute().parent):
            metrics = Path(entry.path, "metrics.jsonl")
            if entry.name != folder.absolute().name and metrics.is_file() and _kind(Path(entry.path)) == kind:
                found.append((metrics.stat().st_mtime, metrics))
    runs: dict[str, list[tuple[float, float]]] = {}
    for _, metrics in sorted(found, reverse=True):
        points = [(record["epoch"], record["loss"]) for record in read_records(metrics) if "loss" in record]
        if points:
            runs[metrics.parent.name] = points
        if len(runs) == EARLIER_RUNS:
            break
    return runs


def _kind(folder: Path) -> tuple[str, str]:
    """The command of a run, and its task; runs of before there were tasks have the default one."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return str(config.get("command", "pretrain")), str(config.get("task", "classification"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return "", ""


def unformatted(text: str) -> str:
    """Escapes dollar signs, which matplotlib would read as a formula."""
    return text.replace("$", r"\$")


def is_detail(name: str) -> bool:
    """Whether a measured value is one of many, such as the AP of small objects, which curves leave out."""
    return _base(name) in DETAILS


def _base(name: str) -> str:
    return name.removeprefix("val_").removesuffix("_average")


def _label(name: str) -> str:
    return next((titles[_base(name)] for titles in MEASURES if _base(name) in titles), _base(name).replace("_", " "))


class Throughput:
    """Images per second since the last report, the share of time that waits for images, and the time left.

    The loop adds waiting times to `waited_s`.
    """

    def __init__(self, images_per_step: int, total_steps: int) -> None:
        self.images_per_step = images_per_step
        self.total_steps = total_steps
        self.restart(0)

    def restart(self, step: int) -> None:
        """Restarts the count, after work other than training, such as pictures."""
        self.since, self.step, self.waited_s = time.perf_counter(), step, 0.0

    def report(self, step: int) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.since, 1e-9)
        per_step = seconds / max(1, step - self.step)
        waited = min(1.0, self.waited_s / seconds)
        self.restart(step)
        return {
            "images_per_s": self.images_per_step / per_step,
            "step_ms": 1e3 * per_step,
            "loader_wait": waited,
            "seconds_left": per_step * (self.total_steps - step),
        }


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, up to the first torn one."""
    records: list[dict[str, Any]] = []
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return records
    for line in path.read_bytes().splitlines():
        if (record := _record(line)) is None:
            break
        records.append(record)
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(line)
        needed = ("step", "epoch", "loss", "learning_rate") if "loss" in record else ("step", "epoch")
        if all(isinstance(record[name], int | float) and abs(record[name]) < 1e15 for name in needed):
            return record
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return None
