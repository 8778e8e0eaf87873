"""Reads run folders for `sparkme.report`."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import stat
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sparkme.errors import first_line, python_command
from sparkme.reporting.curves import number
from sparkme.settings.declare import Difference, command_words
from sparkme.settings.saved import class_of, not_default
from sparkme.text import LONGEST_TEXT, duration, shown

MOST_LOG, MOST_PARSED = 512 * 2**20, 32 * 2**20  # bytes of a metrics file that are read, and that are parsed
MOST_JSON = {"config.json": 2**20, "results.json": 32 * 2**20}  # bytes
LONGEST_LINE = 2**16  # bytes
MOST_NUMBERS = 80  # metrics of a run; a detector with masks has 24, and as many of averaged weights
# Pictures of fine-tuning in a run's folder, in the order of the page, and what they show.
PICTURES = {
    "predictions-sample.png": "predictions for a fixed sample of the validation images",
    "predictions-worst.png": "predictions for the images with the lowest figures",
    "predictions-best.png": "predictions for the images with the highest figures",
    "confusion.png": "confusion matrix",
}
MOST_SHOWN = 200  # notes, and unreadable images
QUIET_S = 120.0  # a run without a new line for so long counts as stopped; longer if its lines are further apart


@dataclass
class Series:
    """A metric with its steps and epochs; `left_out` counts values that are not finite or too large."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    epochs: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))
    left_out: int = 0

    def sorted(self) -> Series:
        """Sorted by step, since two runs may have written to one file."""
        steps = self.steps
        if all(a <= b for a, b in pairwise(steps)):
            return self
        order = sorted(range(len(steps)), key=steps.__getitem__)
        columns = [array("d", (column[i] for i in order)) for column in (steps, self.epochs, self.values)]
        return Series(columns[0], columns[1], columns[2], self.left_out)


class Note(NamedTuple):
    """A line of notes.jsonl; `time`, in Unix seconds, and `step` are None if they are missing."""

    kind: str
    text: str
    time: float | None
    step: float | None


class Checkpoint(NamedTuple):
    """A checkpoint: its name, the target if it is a link, size in bytes, and Unix seconds of its last change."""

    name: str
    target: str
    size: int
    time: float


class State(NamedTuple):
    """`kind` is done, running, stopped, silent or empty; `text` explains it."""

    kind: str
    text: str


@dataclass
class Run:
    """The readable content of a run's folder.

    Attributes:
        path: the folder.
        name: the run's name on the page.
        config: settings; empty if they cannot be read.
        series: metrics by name.
        last: the newest value of each metric.
        step, epoch: of the newest line; None without one.
        changed: Unix seconds of the last change.
        notes: the newest notes, without unreadable images.
        num_notes: number of notes by kind.
        unreadable: the first unreadable images; `num_unreadable` counts all.
        started, ended: the newest notes of that kind; `ended` is None after a restart.
        results: results.json of fine-tuning.
        reconstructions: epochs and files.
        pictures: fine-tuning's pictures that are in the folder, by the names in `PICTURES`.
        problems: files and lines that could not be read, and why.
    """

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    step: float | None = None
    epoch: float | None = None
    changed: float | None = None
    notes: deque[Note] = field(default_factory=lambda: deque(maxlen=MOST_SHOWN))
    num_notes: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, Note] = field(default_factory=dict)
    num_unreadable: int = 0
    started: Note | None = None
    ended: Note | None = None
    results: dict[str, Any] = field(default_factory=dict)
    reconstructions: list[tuple[int, Path]] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """pretrain, also for old runs without this setting, or finetune."""
        return "finetune" if self.config.get("command") == "finetune" else "pretrain"

    @property
    def epochs(self) -> float | None:
        """Epochs of the whole run."""
        epochs = number(self.config.get("epochs"))
        return epochs if epochs and epochs > 0 else None

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, from its settings or else from its last line."""
        names = ("samples_per_epoch",) if self.command == "pretrain" else ("num_train_images", "num_train")
        images = next((n for name in names if (n := number(self.config.get(name)))), None)
        batch = number(self.config.get("batch_size"))
        if self.epochs and images and batch and images >= batch > 0:
            return int(self.epochs) * int(images // batch)
        left, ms = self.last.get("seconds_left"), self.last.get("step_ms")
        if self.step is not None and left is not None and ms and ms > 0 and 0 <= left / ms < 1e12:
            return round(self.step + 1e3 * left / ms)
        return None

    @property
    def share(self) -> float | None:
        """The finished part of the run, from 0 to 1."""
        if self.step is None or not self.total_steps:
            return None
        return min(1.0, max(0.0, self.step / self.total_steps))

    @property
    def num_not_finite(self) -> int:
        """Number of steps whose loss was not finite."""
        counted = self.series.get("not_finite")
        most = int(max(counted.values, default=0)) if counted else 0
        return max(most, 0) or self.num_notes["not_finite"]

    def quiet_after_s(self) -> float:
        """Seconds without a new line after which the run counts as stopped."""
        between = (number(self.config.get("log_steps")) or 10.0) * self.last.get("step_ms", 0.0) / 1e3
        return min(max(QUIET_S, 3 * between), 86400.0)

    def state(self, now: float) -> State:
        """The run's state at a time in Unix seconds."""
        since = None if self.changed is None else max(0.0, now - self.changed)
        ago = "" if since is None else f"{duration(since)} ago"
        if (self.ended and self.ended.kind == "done") or (self.share == 1.0 and not self.ended):
            return State("done", f"last change {ago}" if ago else "")
        if self.ended:
            return State("stopped", self.ended.text)
        if since is None:
            return State("empty", "no metrics yet")
        if since < self.quiet_after_s():
            return State("running", f"last change {ago}")
        return State("silent", f"no new line for {duration(since)}, and no note of its end: it was killed, or its machine was")

    def seconds_left(self, now: float) -> float | None:
        """Seconds to the end of a running run, or of a stopped one after it resumes; None if unknown or done."""
        left, kind = self.last.get("seconds_left"), self.state(now).kind
        if left is None or left < 0 or kind == "done":
            return None
        return max(0.0, left - (now - self.changed)) if kind == "running" and self.changed else left

    @cached_property
    def differences(self) -> list[Difference]:
        """Settings that differ from their defaults."""
        return not_default(self.config)

    @cached_property
    def continuing(self) -> str:
        """The command line that continues the run; empty if unknown."""
        return continuing_command(self)

    def say(self, problem: str) -> None:
        if len(self.problems) < 50:
            self.problems.append(shown(problem))


def is_run(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in ("config.json", "metrics.jsonl"))


def read_run(folder: Path, name: str) -> Run:
    """Reads a run's folder. Any file may be missing or damaged."""
    run = Run(folder, name)
    if not is_run(folder):
        run.say("the folder no longer has a config.json or metrics.jsonl")
    run.config = _read_json(run, "config.json")
    run.results = _read_json(run, "results.json")
    _read_metrics(run)
    _read_notes(run)
    run.checkpoints = _list_checkpoints(run)
    run.reconstructions = _list_reconstructions(run)
    run.pictures = {name: path for name in PICTURES if os.path.isfile(path := folder / name)}
    times = [_changed(folder / name) for name in ("metrics.jsonl", "notes.jsonl")]
    times += [checkpoint.time for checkpoint in run.checkpoints] if any(times) else []
    run.changed = max((t for t in times if t is not None), default=None)
    return run


def _changed(path: Path) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def open_regular(path: Path) -> Any:
    """Opens a regular file for reading. Raises OSError for others: reading a pipe or a device might block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def _read_json(run: Run, name: str) -> dict[str, Any]:
    """The object in a JSON file; empty, with a note, if there is none."""
    most = MOST_JSON[name]
    try:
        with open_regular(run.path / name) as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        run.say(f"{name} cannot be opened: {first_line(error)}")
        return {}
    if len(data) > most:
        run.say(f"{name} was not read: it is larger than {most // 2**20} MiB")
        return {}
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        run.say(f"{name} is damaged: {first_line(error)}")
        return {}
    if not isinstance(value, dict):
        run.say(f"{name} contains a {type(value).__name__} instead of an object")
        return {}
    return value


def _lines(run: Run, name: str) -> Iterator[bytes]:
    """Lines of a file with their ends: only the start of a line that is too long, and only the last lines of a huge file."""
    try:
        with open_regular(run.path / name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_LOG:
                run.say(f"only the last {MOST_LOG // 2**20} of {size // 2**20} MiB of {name} were read")
                file.seek(size - MOST_LOG)
                file.readline(LONGEST_LINE)
            left, goes_on = MOST_LOG, False  # a file may grow faster than it is read
            while left > 0 and (line := file.readline(LONGEST_LINE)):
                left -= len(line)
                if not goes_on:
                    yield line if len(line) < LONGEST_LINE else line + b"\n"
                goes_on = not line.endswith(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        run.say(f"{name} cannot be read: {first_line(error)}")


def _record(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        value = json.loads(line.decode(errors="replace"))
        return value if isinstance(value, dict) else None
    return None


def _read_metrics(run: Run) -> None:
    path = run.path / "metrics.jsonl"
    every = math.ceil(min(os.path.getsize(path), MOST_LOG) / MOST_PARSED) if os.path.isfile(path) else 1
    damaged = strange = trained = measured = 0
    waiting = b""  # a skipped line, which is parsed if it is the last one
    for line in _lines(run, "metrics.jsonl"):
        if every > 1:
            if b'"loss"' in line or measured > 20_000:
                trained += 1
                if trained % every:
                    waiting = line
                    continue
            else:
                measured += 1
        waiting = b""
        good, odd = _add_record(run, line)
        strange += odd
        damaged += not good and line.endswith(b"\n") and bool(line.strip())
    if waiting:
        _add_record(run, waiting)
    if every > 1:
        run.say(f"metrics.jsonl is long: only one in {every} lines of training was read, so the curves may miss a peak")
    if damaged:
        run.say(f"{damaged} lines of metrics.jsonl are damaged or not metrics, and were left out")
    if strange:
        run.say(f"{strange} values of metrics.jsonl were left out: they are not numbers")
    run.series = {name: series.sorted() for name, series in run.series.items()}


def _add_record(run: Run, line: bytes) -> tuple[bool, int]:
    """Adds a line of metrics. Returns whether it is valid, and how many of its values are not numbers."""
    record = _record(line)
    if record is None:
        return False, 0
    step, epoch = number(record.pop("step", None)), number(record.pop("epoch", None))
    if step is None or epoch is None or step < 0 or epoch < 0:
        return False, 0
    strange = 0
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            strange += 1
            continue
        name = name[:60]
        series = run.series.get(name)
        if series is None:
            if len(run.series) >= MOST_NUMBERS:
                continue
            series = run.series[name] = Series()
        if (finite := number(value)) is None:
            series.left_out += 1
            continue
        series.steps.append(step)
        series.epochs.append(epoch)
        series.values.append(finite)
        run.last[name] = finite
    if run.step is None or step >= run.step:
        run.step, run.epoch = step, epoch
    return True, strange


def _read_notes(run: Run) -> None:
    damaged, seen = 0, set[int]()
    for line in _lines(run, "notes.jsonl"):
        record = _record(line)
        if record is None or not isinstance(record.get("kind"), str) or not isinstance(record.get("text"), str):
            damaged += line.endswith(b"\n") and bool(line.strip())
            continue
        kind = shown(record["kind"], 40)
        text = shown(record["text"], 4000 if kind == "started" else LONGEST_TEXT)
        note = Note(kind, text, number(record.get("time")), number(record.get("step")))
        run.num_notes[kind if kind in run.num_notes or len(run.num_notes) < 100 else "others"] += 1
        if kind == "unreadable":  # a resumed run repeats these notes
            if (key := hash(record["text"])) in seen:
                continue
            if len(seen) < 200_000:
                seen.add(key)
            run.num_unreadable += 1
            if len(run.unreadable) < MOST_SHOWN:
                run.unreadable[record["text"][:2000]] = note
            continue
        run.notes.append(note)
        if kind == "started":
            run.started, run.ended = note, None
        elif kind in ("stopped", "done"):
            run.ended = note
    if damaged:
        run.say(f"{damaged} lines of notes.jsonl are damaged or not notes, and were left out")


def _list_checkpoints(run: Run) -> list[Checkpoint]:
    found: list[Checkpoint] = []
    with suppress(FileNotFoundError):
        try:
            with os.scandir(run.path / "checkpoints") as entries:
                for entry in entries:
                    if entry.name.endswith(".pt") and len(found) < 10_000:
                        with suppress(OSError):
                            target = os.readlink(entry.path) if entry.is_symlink() else ""
                            status = entry.stat(follow_symlinks=not target or os.path.exists(entry.path))
                            found.append(Checkpoint(entry.name, target, status.st_size, status.st_mtime))
        except (NotADirectoryError, PermissionError) as error:
            run.say(f"checkpoints cannot be listed: {first_line(error)}")
    return sorted(found, reverse=True)


def _list_reconstructions(run: Run) -> list[tuple[int, Path]]:
    found: list[tuple[int, Path]] = []
    with suppress(OSError), os.scandir(run.path / "reconstructions") as entries:
        for entry in entries:
            if (match := re.fullmatch(r"epoch_([0-9]{1,9})\.png", entry.name)) and len(found) < 100_000:
                found.append((int(match[1]), Path(entry.path)))
    return sorted(found)


def continuing_command(run: Run) -> str:
    """The command line of the run's last start, or else one built from its settings; empty if there are none."""
    if run.started:
        return run.started.text
    if not run.config:
        return ""
    changed = {difference.name: difference.value for difference in not_default(run.config, exactly=True)}
    if run.command == "finetune" and (size := run.config.get("input_size")):
        changed["input_size"] = size
    output = run.config.get("output")
    moved = not isinstance(output, str) or Path(output).name != Path(os.path.abspath(run.path)).name
    changed["output"] = str(run.path) if moved else output
    words = [shown(word, 4000) for word in command_words(class_of(run.config), changed)]
    return shlex.join([python_command(), "-m", f"sparkme.{run.command}", *words])
