"""What a run leaves behind while it trains: metrics.jsonl, TensorBoard events, loss.png, and lines on the screen."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

LEAST_POINTS = 10  # of percent that the axis of what was measured spans, so that an image more or less is no fall


class RunLog:
    """Writes a run's metrics; on a resumed run, drops the lines of steps that will be done again.

    Args:
        folder: the run folder.
        first_step: the step training (re)starts at.
        total_steps: of the whole run.
        bar: whether to draw a progress bar; plain lines otherwise.
        loss_name: for the picture.
    """

    def __init__(self, folder: Path, *, first_step: int, total_steps: int, bar: bool, loss_name: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.loss_name = folder, loss_name
        self.total_steps = total_steps
        self.path = folder / "metrics.jsonl"
        kept = [line for line in _records(self.path) if line["step"] <= first_step] if first_step else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", buffering=1)
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True) if bar else None

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def metrics(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Records metrics after `step` steps; needs `loss`, `learning_rate`, `images_per_s` and `seconds_left`."""
        self._write(step, epoch, values)
        left = duration(values["seconds_left"])
        shown = f"loss {values['loss']:.4f} | lr {values['learning_rate']:.2e} | {values['images_per_s']:.1f} images/s"
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
        else:
            share = 100 * step / self.total_steps
            print(f"step {step}/{self.total_steps} ({share:.0f} %) | {shown} | {left} left", flush=True)

    def measured(self, step: int, epoch: float, values: dict[str, float], text: str) -> None:
        """Records what was measured after `step` steps, such as an accuracy from 0 to 1, and says it."""
        self._write(step, epoch, values)
        self.say(f"epoch {epoch:g}: {text}")

    def _write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, "epoch": round(epoch, 4), **values}) + "\n")
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """A line that does not tear the bar."""
        if self.bar is not None:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """The same on the error stream."""
        tqdm.write(text, file=sys.stderr)

    def finish(self, text: str) -> None:
        """Last words: below the bar, where nothing is drawn any more."""
        if self.bar is not None:
            self.bar.close()
        print(text, flush=True)

    def picture(self, name: str, image: Any, step: int) -> None:
        """Adds a (3, H, W) image to the TensorBoard events."""
        self.events.add_image(name, image, step)

    def plot(self) -> None:
        """Draws loss.png: the loss and the learning rate over epochs and, below, what was measured."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        records = _records(self.path)
        trained = [record for record in records if "loss" in record]
        measured = [record for record in records if "loss" not in record]
        if not trained:
            return
        figure = Figure(figsize=(7, 6.5 if measured else 4), layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subplots(2 if measured else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if measured else [1])
        axes = rows[0, 0]
        epochs = [record["epoch"] for record in trained]
        dots = "o" if len(trained) < 5 else ""  # of which a line shows little
        axes.plot(epochs, [record["loss"] for record in trained], color="tab:blue", marker=dots, markersize=3, linewidth=1.2)
        axes.set_title(unformatted(ended(str(self.folder), 60)))
        axes.set_ylabel(self.loss_name, color="tab:blue")
        axes.ticklabel_format(useOffset=False)
        low, high = axes.get_ylim()
        if high - low < 0.05:  # otherwise a flat curve looks like a wild one
            axes.set_ylim((low + high) / 2 - 0.025, (low + high) / 2 + 0.025)
        axes.grid(alpha=0.3)
        rate_axes = axes.twinx()
        rate_axes.plot(epochs, [r["learning_rate"] for r in trained], color="tab:orange", linewidth=0.8, alpha=0.7)
        rate_axes.set_ylabel("learning rate", color="tab:orange")
        if measured:
            below = rows[1, 0]
            for name in dict.fromkeys(name for record in measured for name in record if name not in ("step", "epoch")):
                points = [(record["epoch"], 100 * record[name]) for record in measured if name in record]
                below.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=_label(name))
            low, high = below.get_ylim()
            if high - low < LEAST_POINTS:
                below.set_ylim((low + high - LEAST_POINTS) / 2, (low + high + LEAST_POINTS) / 2)
            below.set_ylabel("% right")
            below.legend(frameon=False)
            below.grid(alpha=0.3)
        rows[-1, 0].set_xlabel("epoch")
        figure.savefig(self.folder / "loss.png", dpi=120)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.events.close()
        self.file.close()


def unformatted(text: str) -> str:
    """For matplotlib, which takes what stands between two dollars for a formula."""
    return text.replace("$", r"\$")


def ended(text: str, length: int) -> str:
    """At most so many characters: what is longer loses its start."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _label(name: str) -> str:
    return "kNN" if name == "knn" else name.replace("_", " ")


class Throughput:
    """Images per second since the last report, and the time left at that rate."""

    def __init__(self, images_per_step: int, total_steps: int) -> None:
        self.images_per_step = images_per_step
        self.total_steps = total_steps
        self.restart(0)

    def restart(self, step: int) -> None:
        """Counts from here; called after what is not training, such as pictures and checkpoints."""
        self.since, self.step = time.perf_counter(), step

    def report(self, step: int) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.since, 1e-9)
        per_step = seconds / max(1, step - self.step)
        self.restart(step)
        return {
            "images_per_s": self.images_per_step / per_step,
            "step_ms": 1e3 * per_step,
            "seconds_left": per_step * (self.total_steps - step),
        }


def duration(seconds: float) -> str:
    """2 d 3 h, 4 h 05 min, 6 min 07 s or 8 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if h:
        return f"{h} h {m:02d} min"
    return f"{m} min {s:02d} s" if m else f"{s} s"


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; from one that a crash has torn they are left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            needed = ("step", "epoch", "loss", "learning_rate") if "loss" in record else ("step", "epoch")
            if not all(isinstance(record[name], int | float) for name in needed):
                break
        except (ValueError, TypeError, KeyError):
            break
        records.append(record)
    return records
