"""`python -m sparkme.report`: what its page shows of runs, whole, damaged or still going on, and what its script does."""

import base64
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import asked, asked_to_finetune
from PIL import Image

from sparkme.report import main
from sparkme.reporting import page as page_module
from sparkme.reporting import results as results_module
from sparkme.reporting.curves import COLOURS, DASHES
from sparkme.reporting.page import MARK
from sparkme.reporting.report import find_runs
from sparkme.reporting.runs import read_run
from sparkme.settings import finetune, pretrain
from sparkme.settings.declare import to_config
from sparkme.settings.shared import Machine
from sparkme.training.log import COCO_FIGURES

CPU = Machine()
NOW = 1_700_000_000.0
STEPS, EPOCHS = 40, 10  # in an epoch, and in a run

DRIVER = """<script>
window.addEventListener('load', function () {
  function send(target, event) { target.dispatchEvent(event); }
  var slider = document.querySelector('.viewer input'), log = document.querySelector('[data-log=loss]');
  document.body.dataset.slider = slider.value;
  slider.value = 1;
  send(slider, new Event('input'));
  log.click();
  var plot = document.querySelector('[data-name=loss] .log'), box = plot.querySelector('svg').getBoundingClientRect();
  send(plot, new PointerEvent('pointermove', { clientX: box.left + box.width / 2, clientY: box.top + 20 }));
  document.body.dataset.tip = document.querySelector('.tip').textContent;
  document.body.dataset.marks = document.querySelectorAll('.mark').length;
  send(plot, new KeyboardEvent('keydown', { key: 'ArrowRight' }));
  document.body.dataset.next = document.querySelector('.tip').textContent;
  var first = document.querySelector('.runs input');
  if (first) { first.click(); }
  document.body.dataset.drawn = document.querySelectorAll('[data-name=loss] .log polyline:not(.off)').length;
  document.body.dataset.wide = document.documentElement.scrollWidth - window.innerWidth;
  document.body.dataset.hash = location.hash;
});
</script>"""


def config_of_pretraining(*flags: str, num_images: int = 2000) -> dict[str, Any]:
    """What config.json has after this command line."""
    return to_config(pretrain.resolve(asked(*flags), num_images, CPU))


def config_of_finetuning(*flags: str) -> dict[str, Any]:
    given = asked_to_finetune(*flags)
    given = replace(
        given,
        model=given.model or "resnet50",
        num_train_images=400,
        num_val_images=100,
        num_classes=3,
        channels=3,
        mean=(0.4,) * 3,
        std=(0.2,) * 3,
        input_size=given.input_size or (224,),
        several_labels=bool(given.label_separator),
    )
    return to_config(finetune.resolve(given, given.choose_recipe("bn"), CPU))


def metrics(seed: int = 0, *, until: int = STEPS * EPOCHS) -> list[dict[str, Any]]:
    """Lines of a run like a real one."""
    draw = random.Random(seed)
    lines = []
    for step in (1, *range(5, until + 1, 5)):
        epoch = step / STEPS
        loss = 0.4 + 0.6 * math.exp(-epoch / (2 + seed)) + draw.gauss(0, 0.01)
        lines.append(
            {
                "step": step,
                "epoch": round(epoch, 4),
                "loss": loss,
                "learning_rate": 5e-4 * math.sin(math.pi * step / (STEPS * EPOCHS)) + 1e-6,
                "weight_decay": 0.04,
                "images_per_s": draw.gauss(120, 6),
                "step_ms": 250.0,
                "seconds_left": 0.25 * (STEPS * EPOCHS - step),
                "gradient_norm": math.exp(draw.gauss(0, 0.5)) + (40 if step == 200 else 0),
                "loader_wait": 0.05 + 0.05 * draw.random(),
                "memory_gib": 3.25,
            }
        )
        if step % (2 * STEPS) == 0:
            lines.append({"step": step, "epoch": epoch, "knn": 0.5 - 0.3 * math.exp(-epoch / 4)})
    return lines


def save(folder: Path, config: Any = None, lines: Any = None, notes: Any = None, *, age_s: float = 4000.0) -> Path:
    """A run's folder with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, records in (("metrics.jsonl", lines), ("notes.jsonl", notes)):
        if records is not None:
            (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
            os.utime(folder / name, (NOW - age_s, NOW - age_s))
    return folder


def paint(folder: Path, epochs: list[int], size: tuple[int, int] = (60, 40)) -> None:
    """Reconstructions, each of its own colour."""
    (folder / "reconstructions").mkdir(exist_ok=True)
    for epoch in epochs:
        Image.new("RGB", size, (epoch * 20 % 256, 90, 30)).save(folder / "reconstructions" / f"epoch_{epoch:04d}.png")


def example(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A whole run of pretraining."""
    flags = ["--data", "photos", "--epochs", str(EPOCHS), "--batch-size", "50", "--seed", str(seed), "--output", str(folder)]
    notes = [
        {"time": NOW - 9000, "step": 0, "kind": "started", "text": "python -m sparkme.pretrain --data photos --epochs 10"},
        {"time": NOW - 8000, "step": 40, "kind": "unreadable", "text": "photos/torn.jpg: image file is truncated"},
        {"time": NOW - 7000, "step": 80, "kind": "warning", "text": "the loader is slow"},
        {"time": NOW - 4000, "step": STEPS * EPOCHS, "kind": "done", "text": "done"},
    ]
    save(folder, config_of_pretraining(*flags), metrics(seed), notes)
    paint(folder, [1, 5, 10])
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step_00000400.pt").write_bytes(b"x" * 5000)
    if not (folder / "checkpoints" / "last.pt").is_symlink():
        (folder / "checkpoints" / "last.pt").symlink_to("step_00000400.pt")
    os.utime(folder / "checkpoints" / "step_00000400.pt", (NOW - 4000, NOW - 4000))
    return folder


@pytest.fixture(autouse=True)
def at_a_fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparkme.reporting.report.time.time", lambda: NOW)


class Page(HTMLParser):
    """Elements with their attributes, the words, and the tables as rows of words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.inside: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self.inside or "style" in self.inside:
            return
        self.words.append(data)
        if {"td", "th"} & {*self.inside}:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The cells behind the first one, of the first row that starts with it."""
        return next([cell.strip() for cell in row[1:]] for row in self.rows if row and row[0].strip() == first)


def page_of(*runs: Path, flags: tuple[str, ...] = ()) -> Page:
    output = runs[0].parent / "page.html"
    assert main([*map(str, runs), "--output", str(output), *flags]) == 0
    return Page(output)


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The single line of an error."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    return printed.err


def curves(page: Page, name: str, kind: str = "linear") -> list[list[tuple[float, float]]]:
    """Epochs and values of a chart's lines, from where they are drawn."""
    figure = next(f for f in page.source.split("<figure") if f'data-name="{name}"' in f.partition(">")[0])
    plot = next(p for p in figure.split('<div class="plot ') if p.startswith(kind))
    ranges = [tuple(map(float, re.search(rf'data-{axis}="(\S+) (\S+)"', plot).groups())) for axis in "xy"]  # type: ignore[union-attr]
    lines = []
    for points in re.findall(r'<polyline [^>]*points="([^"]+)"', plot):
        pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]
        lines.append(
            [
                tuple(low + (high - low) * share for (low, high), share in zip(ranges, (x / 1000, 1 - y / 1000)))
                for x, y in pairs
            ]
        )
    return lines  # type: ignore[return-value]


# What is shown.


def test_the_curves_are_those_of_the_metrics(tmp_path: Path) -> None:
    page, lines = page_of(example(tmp_path / "run")), metrics()
    for name, scale in (
        ("loss", 1),
        ("learning_rate", 1),
        ("images_per_s", 1),
        ("gradient_norm", 1),
        ("loader_wait", 100),
        ("memory_gib", 1),
        ("knn", 100),
        ("weight_decay", 1),
    ):
        expected = [(line["epoch"], scale * line[name]) for line in lines if name in line]
        (drawn,) = curves(page, name)
        span = max(y for _, y in expected) - min(y for _, y in expected) or max(abs(y) for _, y in expected)
        assert len(drawn) == len(expected), name
        for (x, y), (epoch, value) in zip(drawn, expected):
            assert x == pytest.approx(epoch, abs=0.01) and y == pytest.approx(value, abs=max(0.01 * span, 1e-3 * value)), name
    (drawn,) = curves(page, "gradient_norm", "log")
    for (_, y), line in zip(drawn, (line for line in lines if "gradient_norm" in line)):
        assert 10**y == pytest.approx(line["gradient_norm"], rel=0.01)


def test_ticks_stand_where_their_words_say(tmp_path: Path) -> None:
    page = page_of(example(tmp_path / "run"))
    figure = page.source.split('data-name="loss"', 1)[1].split("</figure>")[0]
    for kind in ("linear", "log"):
        plot = next(p for p in figure.split('<div class="plot ') if p.startswith(kind))
        low, high = map(float, re.search(r'data-y="(\S+) (\S+)"', plot).groups())  # type: ignore[union-attr]
        ticks = re.findall(r'<text x="-8" y="([\d.]+)%" dy="0.32em" text-anchor="end">([^<]+)</text>', plot)
        assert len(ticks) >= 3
        for y, word in ticks:
            place = low + (high - low) * (1 - float(y) / 100)
            assert (10**place if kind == "log" else place) == pytest.approx(float(word), abs=2e-3)


def test_a_long_run_is_thinned_and_keeps_its_peaks(tmp_path: Path) -> None:
    lines = [{"step": i, "epoch": i / 1000, "loss": 1 + i % 7 / 100, "learning_rate": 0.1} for i in range(20_000)]
    lines[12_345]["loss"], lines[7]["loss"] = 9.0, 0.25
    (drawn,) = curves(page_of(save(tmp_path / "run", {}, lines)), "loss")
    assert len(drawn) <= 1000
    highest, lowest = max(drawn, key=lambda p: p[1]), min(drawn, key=lambda p: p[1])
    assert highest == pytest.approx((12.345, 9.0), abs=0.03) and lowest == pytest.approx((0.007, 0.25), abs=0.03)
    assert drawn[0][0] == pytest.approx(0, abs=0.03) and drawn[-1][0] == pytest.approx(19.999, abs=0.03)


def test_the_head_says_how_far_it_is(tmp_path: Path) -> None:
    run = example(tmp_path / "run")
    page = page_of(run)
    assert "done · step 400 of 400, epoch 10 of 10 · 100.0 %" in page.text
    assert "python -m sparkme.pretrain --data photos --epochs 10" in page.text
    assert "photos/torn.jpg: image file is truncated" in page.text and "1 unreadable images" in page.text
    assert page.row("last.pt → step_00000400.pt")[0] == "5 KiB"
    half = [line for line in metrics() if line["step"] <= 200]
    started = [{"time": NOW - 50, "step": 0, "kind": "started", "text": "python -m sparkme.pretrain"}]
    half_way = "step 200 of 400, epoch 5 of 10 · 50.0 %"
    for age_s, expected in (
        (40.0, f"running · {half_way} · last change 40 s ago"),
        (7200.0, f"stopped without note · {half_way} · no new line for 2 h 00 min"),
    ):
        save(run, None, half, started, age_s=age_s)
        os.utime(run / "checkpoints" / "step_00000400.pt", (1, 1))
        assert expected in page_of(run).text
    save(run, None, half, started, age_s=40)
    assert "time left 10 s" in page_of(run).text  # 50 s when the line was written, of which 40 are over
    save(run, None, half, [*started, {"time": NOW, "step": 200, "kind": "stopped", "text": "SIGTERM: saved x.pt"}], age_s=40)
    assert f"stopped · {half_way} · SIGTERM: saved x.pt" in page_of(run).text
    skipped = [{"step": 200, "epoch": 5, "loss": 1, "not_finite": 3}]
    assert "steps not finite 3" in page_of(save(run, None, skipped, started)).text


def test_a_run_whose_lines_are_far_apart_is_not_taken_for_stopped(tmp_path: Path) -> None:
    lines = [{"step": 10, "epoch": 0.1, "loss": 1.0, "step_ms": 60_000.0}]
    run = save(tmp_path / "run", config_of_pretraining("--epochs", "9"), lines, age_s=1000)
    assert "running" in page_of(run).text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], []),
        (["--data", "photos"], ["data"]),
        (["--data", "photos", "--epochs", "50", "--no-resume"], ["data", "epochs"]),
        (
            [
                "--data",
                "a b",
                "--recipe",
                "fcmae",
                "--no-norm-pix-loss",
                "--model",
                "timm:convnextv2_nano",
                "--input-size",
                "64",
                "--mask-ratio",
                "0.5",
                "--compile",
                "--seed",
                "3",
                "--accumulate",
                "2",
                "--probe-data",
                "l",
                "--probe-epochs",
                "7",
            ],
            [
                "data",
                "recipe",
                "norm_pix_loss",
                "model",
                "input_size",
                "mask_ratio",
                "compile",
                "seed",
                "accumulate",
                "probe_data",
                "probe_epochs",
            ],
        ),
        (
            ["--recipe", "spark", "--model", "convnext_small", "--input-size", "96", "128", "--channels", "1"],
            ["recipe", "model", "input_size", "channels"],
        ),
    ],
    ids=["none", "data", "epochs", "fcmae", "spark"],
)
def test_what_differs_from_the_defaults_and_the_command_that_continues(
    flags: list[str], expected: list[str], tmp_path: Path
) -> None:
    """What follows from a setting is no difference; and the command line that is built means the same run."""
    config = config_of_pretraining(*flags, "--output", str(tmp_path / "run"))
    run = read_run(save(tmp_path / "run", config), "run")
    assert sorted(difference.name for difference in run.differences) == sorted(expected)
    words = shlex.split(run.continuing)
    assert words[1:3] == ["-m", "sparkme.pretrain"]
    assert config_of_pretraining(*words[3:]) == config
    for name in expected:
        assert page_of(tmp_path / "run").row(name)


@pytest.mark.parametrize(
    "flags",
    [
        ["w.pt", "--data", "d", "--shots", "5", "--no-flip"],
        ["w.pt", "--data", "d", "--recipe", "paper", "--batch-size", "64", "--epochs", "30", "--mixup", "0"],
        ["--from-scratch", "--model", "resnet18", "--data", "d", "--labels", "l.csv", "--layer-decay", "0.9"],
        ["w.pt", "--data", "t.csv", "--label-separator", "|", "--labels", "one column,other"],
        ["w.pt", "--data", "t.csv", "--label-separator", ""],
    ],
    ids=["small", "paper", "scratch", "labels", "one label"],
)
def test_the_command_that_continues_a_finetuning(flags: list[str], tmp_path: Path) -> None:
    config = config_of_finetuning(*flags, "--output", str(tmp_path / "run"))
    run = read_run(save(tmp_path / "run", config), "run")
    words = shlex.split(run.continuing)
    assert words[1:3] == ["-m", "sparkme.finetune"]
    assert config_of_finetuning(*words[3:]) | {"model": ""} == config | {"model": ""}
    given = {flag[2:].removeprefix("no-").replace("-", "_") for flag in flags if flag.startswith("--")}
    assert {d.name for d in run.differences} == given | ({"weights"} if "w.pt" in flags else set())


def test_a_setting_is_shown_beside_its_default(tmp_path: Path) -> None:
    config = config_of_pretraining("--data", "photos", "--mask-ratio", "0.75", "--clip-grad", "1")
    page = page_of(save(tmp_path / "run", config))
    assert page.row("mask_ratio") == ["0.75", "0.6"] and page.row("clip_grad") == ["1.0", "5.0"]
    assert page.row("decoder_width") == ["128"]  # in the list of all settings only


def test_several_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [example(tmp_path / "runs" / name, seed) for seed, name in enumerate("abc")]
    save(tmp_path / "runs" / "b", config_of_pretraining("--data", "photos", "--epochs", "12", "--mask-ratio", "0.75"))
    assert main([str(tmp_path / "runs")]) == 0
    assert f"wrote {os.path.relpath(tmp_path / 'runs' / 'report.html')} (" in capsys.readouterr().out
    page = Page(tmp_path / "runs" / "report.html")
    assert page.row("mask_ratio") == ["0.6", "0.75", "0.6"] and page.row("epochs") == ["10", "12", "10"]
    assert not [row for row in page.rows if row and row[0] == "output" and len(row) == 4]
    for seed, drawn in enumerate(curves(page, "loss")):
        expected = [line["loss"] for line in metrics(seed) if "loss" in line]
        assert [y for _, y in drawn] == pytest.approx(expected, abs=0.01)
    assert len(curves(page, "knn")) == 3
    best = max(line["knn"] for line in metrics(1) if "knn" in line)
    assert f"{100 * best:.1f} %" in page.row("b")
    options = [attributes for tag, attributes in page.elements if tag == "option"]
    assert [option["value"] for option in options] == ["0", "1", "2"]
    # In an order of one's own, twice the same run, and named by what tells them apart.
    (tmp_path / "other").mkdir()
    example(tmp_path / "other" / "a", 5)
    page = page_of(runs[1], tmp_path / "other" / "a", runs[1], runs[0])
    assert [row[0].strip() for row in page.rows[1:4]] == ["runs/b", "other/a", "runs/a"]


def test_results_of_finetuning(tmp_path: Path) -> None:
    config = config_of_finetuning("w.pt", "--data", "d")
    lines = [
        {"step": 12, "epoch": 1.0, "loss": 1.5, "learning_rate": 0.1},
        {"step": 12, "epoch": 1.0, "val_top1": 0.5, "val_top5": 0.9, "val_top1_average": 0.55},
    ]
    run = save(tmp_path / "run", config, lines)
    results = {
        "epoch": 1,
        "last": {"val_top1": 0.5},
        "best": {"top1": 0.5, "epoch": 1},
        "num_val": 100,
        "of_each_class": {"cat": 0.25, "<dog>": 0.75},
        "confusion": [[10, 30], [15, 45]],
    }
    (run / "results.json").write_text(json.dumps(results))
    Image.new("RGBA", (300, 200), (0, 0, 0, 0)).save(run / "confusion.png")
    page = page_of(run)
    assert "top-1 accuracy 50.0 %, after epoch 1, on 100 images" in page.text
    assert page.row("cat") == ["", "25.0 %"] and ["cat", "<dog>", "30", "75.0 %"] in page.rows
    assert len(curves(page, "measured")) == 3 and "val_share" in page.text
    (picture,) = pictures(page)
    assert picture[1].size == (300, 200) and picture[1].getpixel((5, 5)) == (255, 255, 255)


def save_detection(run: Path) -> dict[str, Any]:
    """A run of a detector with masks, as DetectionMeasure writes it. Returns its results.json."""
    figures = {name: 0.01 * i for i, name in enumerate(COCO_FIGURES)}
    lines: list[dict[str, Any]] = [{"step": 12, "epoch": 1.0, "loss": 1.5, "learning_rate": 0.1}]
    for epoch in (1, 2):
        values = {
            f"val_{kind}_{name}{end}": value
            for kind in ("box", "mask")
            for name, value in figures.items()
            for end in ("", "_average")
        }
        lines.append({"step": 12 * epoch, "epoch": float(epoch), **values, "val_mask_ap": 0.2 * epoch})
    save(run, config_of_finetuning("w.pt", "--data", "d"), lines)
    results = {
        "epoch": 2,
        "last": {},
        "best": {"mask_ap": 0.4, "epoch": 2},
        "num_val": 1234,
        "box": figures | {"ap75": -1, "ap_large": None},  # -1 is no share
        "mask": figures | {"ap": 0.4, "ap_large": None},
        "box_ap_of_each_class": {"cat": 0.5, "<dog>": 0.25, "unseen": None},
        "mask_ap_of_each_class": {"cat": 0.3, "<dog>": 0.75, "unseen": None},
        "of_each_class": {"cat": 0.3, "<dog>": 0.75, "unseen": None},
    }
    (run / "results.json").write_text(json.dumps(results))
    for i, name in enumerate(("sample", "worst", "best")):
        Image.new("RGB", (300, 200 + i), (50 * i, 90, 30)).save(run / f"predictions-{name}.png")
    return results


def save_segmentation(run: Path) -> None:
    """A run as SegmentationMeasure writes it."""
    values = {"val_mean_iou": 0.5, "val_pixel_accuracy": 0.75, "val_mean_accuracy": 0.6}
    lines = [{"step": 12, "epoch": 1.0, "loss": 1.5, "learning_rate": 0.1}, {"step": 12, "epoch": 1.0, **values}]
    save(run, config_of_finetuning("w.pt", "--data", "d"), lines)
    results = {
        "epoch": 1,
        "best": {"mean_iou": 0.5, "epoch": 1},
        "num_val": 9,
        "of_each_class": {"background": 0.8, "cat": 0.25, "unseen": None},
        "accuracy_of_each_class": {"background": 0.9, "cat": 0.125, "unseen": None},
        "confusion": [[1_000_000, 250_000, 0], [30, 90, 0], [0, 0, 0]],
    }
    (run / "results.json").write_text(json.dumps(results))
    Image.new("RGB", (300, 200)).save(run / "confusion.png")
    Image.new("RGB", (300, 220)).save(run / "predictions-worst.png")


def test_results_of_detection(tmp_path: Path) -> None:
    save_detection(tmp_path / "run")
    page = page_of(tmp_path / "run")
    assert "Best: mask AP 40.0 %, after epoch 2, on 1,234 images." in page.text
    assert page.row("after epoch 2") == ["boxes", "masks"] and page.row("AP") == ["0.0 %", "40.0 %"]
    assert page.row("AP75") == ["—", "2.0 %"]
    assert page.row("AP, small objects") == ["3.0 %", "3.0 %"] and page.row("AR, large objects") == ["11.0 %", "11.0 %"]
    assert not [row for row in page.rows if row and row[0] == "AP, large objects"]
    assert page.row("class") == ["", "mask AP", "box AP"] and page.row("cat") == ["", "30.0 %", "50.0 %"]
    assert page.row("<dog>") == ["", "75.0 %", "25.0 %"] and "most frequent mistakes" not in page.text
    shown = [(alt, picture.size) for alt, picture in pictures(page)]
    assert [size for _, size in shown] == [(300, 200), (300, 201), (300, 202)] and "fixed sample" in shown[0][0]
    # Of 48 metrics, the chart has AP and AP50 of boxes and masks, and of averaged weights.
    titles = ["box AP", "mask AP", "box AP50", "mask AP50"]
    drawn = re.findall(r"<figure.*?</figure>", page.source, re.DOTALL)
    (chart,) = (figure for figure in drawn if 'data-name="measured"' in figure)
    assert re.findall(r"</svg> ([^<]+)</li>", chart) == titles + [f"{title}, averaged weights" for title in titles]
    assert "average precision, %" in chart and len(curves(page, "val_box_ap_small")) == 1
    assert curves(page, "val_box_ap_small")[0][0][1] == pytest.approx(3, abs=0.1)  # percent


def test_results_of_segmentation(tmp_path: Path) -> None:
    save_segmentation(tmp_path / "run")
    page = page_of(tmp_path / "run")
    assert "Best: mean IoU 50.0 %, after epoch 1, on 9 images." in page.text
    assert page.row("class") == ["", "IoU", "correct pixels"] and page.row("cat") == ["", "25.0 %", "12.5 %"]
    assert page.row("true class")[1] == "pixels" and ["background", "cat", "250,000", "20.0 %"] in page.rows
    assert "COCO" not in page.text and len(curves(page, "measured")) == 2 and "IoU and accuracy, %" in page.text
    assert [picture.size for _, picture in pictures(page)] == [(300, 220), (300, 200)]


def test_runs_of_several_tasks_stand_side_by_side(tmp_path: Path) -> None:
    save_detection(tmp_path / "runs" / "boxes")
    save_segmentation(tmp_path / "runs" / "pixels")
    example(tmp_path / "runs" / "pretraining")
    lines = [{"step": 12, "epoch": 1.0, "val_top1": 0.625, "val_top5": 0.875, "val_top1_average": 0.5}]
    save(tmp_path / "runs" / "classes", config_of_finetuning("w.pt", "--data", "d"), lines)
    page = page_of(*sorted((tmp_path / "runs").iterdir()))
    head = page.rows[0]
    columns = [cell.removeprefix("best ") for cell in head if cell.startswith("best ")]
    assert columns == ["kNN accuracy", "top-1 accuracy", "top-5 accuracy", "box AP", "mask AP", "mean IoU"]

    def best(run: str) -> list[str]:
        first = head.index("best kNN accuracy") - 1
        return page.row(run)[first : first + 6]

    assert best("classes") == ["", "62.5 %", "87.5 %", "", "", ""] and best("pixels") == [""] * 5 + ["50.0 %"]
    assert best("boxes") == ["", "", "", "0.0 %", "40.0 %", ""]
    assert len(curves(page, "val_mask_ap")) == len(curves(page, "val_mean_iou")) == len(curves(page, "val_top1")) == 1
    assert len(pictures(page)) == 3 + 2 + 3


def test_pictures_of_predictions_of_many_runs_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert results_module.ALL_BYTES <= 7_000_000
    monkeypatch.setattr(results_module, "ALL_BYTES", 2_000_000)  # as many more runs would have
    data = random.Random(0).randbytes(900 * 600 * 3)
    for i in range(4):
        run = tmp_path / "runs" / f"run{i}"
        save_detection(run)
        for name in ("sample", "worst", "best"):
            Image.frombytes("RGB", (900, 600), data).save(run / f"predictions-{name}.png", compress_level=1)
    page = page_of(*sorted((tmp_path / "runs").iterdir()))
    assert len(page.source) < 1.2e6 and len(pictures(page)) == 12


def pictures(page: Page) -> list[tuple[str, Image.Image]]:
    found = []
    for tag, attributes in page.elements:
        if tag == "img":
            head, data = str(attributes["src"]).split(",")
            assert re.fullmatch(r"data:image/(png|jpeg);base64", head)
            found.append((str(attributes["alt"]), Image.open(io.BytesIO(base64.b64decode(data)))))
    return found


def test_reconstructions_are_spread_evenly_and_made_smaller(tmp_path: Path) -> None:
    run = save(tmp_path / "run", {"epochs": 100}, metrics())
    paint(run, [*range(1, 101)], (40, 30))
    noise = Image.frombytes("RGB", (2400, 300), random.Random(0).randbytes(2400 * 300 * 3))
    noise.save(run / "reconstructions" / "epoch_0100.png")
    (run / "reconstructions" / "epoch_0001.png").write_bytes(b"\x89PNG broken")
    (run / "reconstructions" / "epoch_x.png").write_bytes(b"")
    page = page_of(run)
    found = pictures(page)
    epochs = [int(alt.rpartition(" ")[2]) for alt, _ in found]
    assert len(found) == 23 and epochs[-1] == 100 and max(b - a for a, b in pairwise(epochs)) <= 5
    assert found[-1][1].width <= 1200 and "epoch_0001.png: " in page.text and "of 100 pictures are shown" in page.text
    assert found[0][1].getpixel((3, 3)) == (epochs[0] * 20 % 256, 90, 30)
    edges = [a["data-epoch"] for tag, a in page.elements if tag == "figure" and "edge" in str(a.get("class"))]
    assert edges == [str(epochs[0]), "100"]


def test_a_page_stays_small(tmp_path: Path) -> None:
    """Pictures of many runs, each as large as pixels of chance make it."""
    data = random.Random(0).randbytes(900 * 600 * 3)
    for i in range(12):
        run = save(tmp_path / "runs" / f"run{i}", {}, metrics(i))
        (run / "reconstructions").mkdir()
        Image.frombytes("RGB", (900, 600), data).save(run / "reconstructions" / "epoch_0001.png", compress_level=1)
    output = tmp_path / "page.html"
    assert main([str(tmp_path / "runs"), "--output", str(output)]) == 0
    assert output.stat().st_size < 12e6 and len(pictures(Page(output))) == 12


# What it must bear.


def test_names_and_words_of_a_run_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'</title>"
    config = config_of_pretraining("--data", "d") | {"model": evil, evil: evil, "recipe": evil, "output": evil}
    lines = [*metrics(), {"step": 500, "epoch": 12.5, evil: 1.0, "loss": 0.5}]
    notes = [{"time": 1, "step": 1, "kind": kind, "text": evil} for kind in (evil, "unreadable", "started", "stopped")]
    run = save(tmp_path / "<script>alert(2)<", config, lines, notes)
    paint(run, [1, 2])
    (run / "results.json").write_text(json.dumps({"best": {"top1": 1}, "of_each_class": {evil: 1}, "confusion": [[1]]}))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "<script>.pt").write_bytes(b"")
    for runs in ([run], [run, example(tmp_path / "other")]):
        page = page_of(*runs, flags=("--title", evil))
        scripts = [attributes for tag, attributes in page.elements if tag == "script"]
        assert [s for s in scripts if s.get("type") != "application/json"] == [{}]
        assert "alert(" not in re.sub(r"(?s)<script.*?</script>", "", page.source.replace("&lt;script&gt;alert(", "")), runs
        assert evil[:25] in page.text and (len(runs) == 1 or "<script>alert(2)<" in page.text)
        for data in re.findall(r'(?s)<script type="application/json">(.*?)</script>', page.source):
            json.loads(data)


def test_nothing_is_loaded_and_only_its_own_script_may_run(tmp_path: Path) -> None:
    page = page_of(example(tmp_path / "a"), example(tmp_path / "b", 1))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base", "form") and not {"srcset", "action", "onclick"} & {*attributes}
        assert str(attributes.get("src", "data:")).startswith("data:") and str(attributes.get("href", "#")).startswith("#")
    assert not re.search(r"url\(|@import|https?:", page.source)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    for tag, attributes in page.elements:
        assert tag != "img" or attributes["alt"]
        assert tag != "svg" or {"aria-label", "aria-hidden", "viewbox"} & {*attributes}  # the last in one with a label


ALL = ("metrics.jsonl", "notes.jsonl", "config.json", "results.json")
DAMAGED: dict[str, tuple[str, dict[str, bytes]]] = {
    "torn": ("", {"metrics.jsonl": b'{"step": 1, "epoch": 0.1, "loss": 1.5}\n{"step": 2, "epo'}),
    "empty": ("config.json is damaged", dict.fromkeys(ALL, b"")),
    "binary": ("lines of notes.jsonl are damaged", dict.fromkeys(ALL, bytes(range(256)) * 900)),
    "zeros": ("config.json is damaged", dict.fromkeys(ALL, bytes(200_000))),
    "nested": ("results.json is damaged", dict.fromkeys(ALL, b"[" * 50_000)),
    "nested-objects": ("1 lines of metrics.jsonl are damaged", dict.fromkeys(ALL, b'{"a":' * 10_000 + b"\n")),
    "nested-setting": ("", {"config.json": b'{"model": ' + b"[" * 500 + b"]" * 500 + b', "epochs": [[[1]]]}'}),
    "lists": ("config.json contains a list", dict.fromkeys(ALL, b"[1, 2]\n")),
    "words": ("3 lines of notes.jsonl are damaged", dict.fromkeys(ALL, b'"word"\nnull\n3\n')),
    "not-finite": (
        "2 values are left out: they are not finite",
        {
            "config.json": b'{"epochs": NaN, "batch_size": Infinity, "samples_per_epoch": -Infinity}',
            "metrics.jsonl": b'{"step": 1, "epoch": 1, "loss": NaN}\n{"step": 2, "epoch": 2, "loss": Infinity}\n'
            b'{"step": NaN, "epoch": 1}\n{"step": 2, "epoch": 2, "loss": 1}\n',
        },
    ),
    "huge": (
        "2 lines of metrics.jsonl are damaged",
        {
            "config.json": b'{"epochs": 1%s, "batch_size": 1e308, "samples_per_epoch": 1e308, "log_steps": 1e300}'
            % (b"0" * 400),
            "metrics.jsonl": b'{"step": 1%s, "epoch": 1}\n{"step": 1e29, "epoch": 1e29, "loss": 1e308, "knn": -1e29, '
            b'"step_ms": 1e29, "seconds_left": 1e29}\n{"step": 1, "epoch": 0, "loss": %s}\n' % (b"0" * 400, b"9" * 5000),
            "notes.jsonl": b'{"time": 1e300, "step": 1e29, "kind": "warning", "text": "x"}\n',
        },
    ),
    "tiny": (
        "",
        {
            "metrics.jsonl": b'{"step": 0, "epoch": 0, "loss": 5e-324, "gradient_norm": -1}\n'
            b'{"step": 1, "epoch": 1e-300, "loss": 1e-320, "gradient_norm": 0}\n'
        },
    ),
    "types": (
        "3 values of metrics.jsonl were left out: they are not numbers",
        {
            "config.json": b'{"epochs": "ten", "batch_size": [], "samples_per_epoch": {}, "model": 3, "recipe": ["spark"], '
            b'"command": {}, "data": true, "channels": "x", "output": 5, "input_size": {"a": 1}, "seed": "s"}',
            "metrics.jsonl": b'{"step": "1", "epoch": 1}\n{"step": 1, "epoch": 1, "loss": "x", "knn": [1], "b": true}\n',
            "notes.jsonl": b'{"time": "x", "step": [], "kind": "warning", "text": "w"}\n{"kind": 1, "text": 2}\n{}\n',
            "results.json": b'{"best": [], "of_each_class": {"a": "b"}, "confusion": [[1]]}',
        },
    ),
    "finetune-types": (
        "",
        {
            "config.json": b'{"command": "finetune", "num_train": "x", "recipe": 3, "epochs": 0, "model": null}',
            "results.json": b'{"best": {"top1": "x"}, "of_each_class": {"a": 1, "b": 0}, "confusion": [[1, 2], 3]}',
        },
    ),
    "detection-types": (
        "predictions-best.png cannot be read",
        {
            "config.json": b"{}",
            "results.json": b'{"best": {"box_ap": "x", "mask_ap": 1e400}, "epoch": "z", "num_val": [], "box": [1], "mask": '
            b'{"ap": "x", "ap50": NaN, "ap75": -1, "ar1": {}, "ar10": 1}, "box_ap_of_each_class": {"a": 1}, '
            b'"mask_ap_of_each_class": {"a": 0.5, "b": [1], "c": 2}, "confusion": {}}',
            "predictions-best.png": b"\x89PNG torn",
        },
    ),
    "segmentation-types": (
        "predictions-sample.png cannot be read",
        {
            "config.json": b"{}",
            "results.json": b'{"best": {"mean_iou": []}, "of_each_class": {"a": 0.5, "b": 0.5}, "accuracy_of_each_class": [], '
            b'"confusion": [["x", null], [1e400, -5]]}',
            "predictions-sample.png": bytes(1000),
        },
    ),
    "pixels": (
        "",
        {
            "config.json": b"{}",
            "results.json": b'{"of_each_class": {"a": 0.5, "b": 0.5}, "accuracy_of_each_class": {"z": {}}, '
            b'"confusion": [["x", null], [1e400, -5]], "box": {}, "mask": null}',
        },
    ),
    "long-line": (
        "1 lines of metrics.jsonl are damaged",
        {"metrics.jsonl": b'{"step": 1, "epoch": 1, "x": "%s"}\n{"step": 2, "epoch": 2, "loss": 2}\n' % (b"y" * 300_000)},
    ),
    "names": ("", {"metrics.jsonl": b"".join(b'{"step": 1, "epoch": 1, "n%d": 1}\n' % i for i in range(5000))}),
    "surrogates": (
        "",
        {
            "config.json": rb'{"model": "\ud800", "data": "\u0000\u202e"}',
            "notes.jsonl": rb'{"time": 1, "step": 1, "kind": "started", "text": "\udfff"}' + b"\n",
        },
    ),
    "backwards": ("", {"metrics.jsonl": b"".join(b'{"step": %d, "epoch": %d, "loss": 1}\n' % (i, i) for i in (5, 3, 9, 1))}),
    "negative": (
        "1 lines of metrics.jsonl are damaged",
        {"metrics.jsonl": b'{"step": -1, "epoch": 1, "loss": 1}\n', "config.json": b'{"epochs": -3, "log_steps": -5}'},
    ),
}


@pytest.mark.parametrize(("said", "files"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_said_and_borne(
    said: str, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(tmp_path / "run")
    for name, data in files.items():
        (run / name).write_bytes(data)
    for runs in ([run], [run, example(tmp_path / "whole")]):
        page = page_of(*runs)
        assert page.source.endswith("</html>\n") and not re.search(r'points="[^"]*(nan|inf)', page.source)
        assert said in page.text if said else "Problems with files" not in page.text
    assert capsys.readouterr().err == ""


def test_what_is_damaged_is_counted(tmp_path: Path) -> None:
    lines = ['{"step": 1, "epoch": 1, "loss": 2.5}', "{torn", "[]", '{"step": 2, "epoch": 2, "loss": NaN}', "", '{"loss": 1}']
    run = save(tmp_path / "run", {"command": "dream"})
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "ep')
    (run / "notes.jsonl").mkdir()
    page = page_of(run)
    assert "3 lines of metrics.jsonl are damaged" in page.text and "1 values are left out: they are not" in page.text
    assert "notes.jsonl cannot be read: notes.jsonl is not a regular file" in page.text
    assert [len(line) for line in curves(page, "loss")] == [1]


@pytest.mark.timeout(60)
def test_pipes_and_links_are_not_waited_for(tmp_path: Path) -> None:
    run = save(tmp_path / "run", {}, metrics())
    os.mkfifo(run / "notes.jsonl")
    (run / "results.json").symlink_to("/dev/zero")
    (run / "checkpoints").write_text("no folder")
    (run / "reconstructions").mkdir()
    os.mkfifo(run / "reconstructions" / "epoch_0001.png")
    (run / "reconstructions" / "epoch_0002.png").symlink_to("nowhere")
    (run / "confusion.png").symlink_to(run / "metrics.jsonl")
    page = page_of(run)
    for expected in (
        "notes.jsonl cannot be read",
        "results.json cannot be opened",
        "checkpoints cannot be listed",
        "No picture can be read",
        "confusion.png cannot be read",
    ):
        assert expected in page.text, expected


def test_a_bomb_of_a_picture_is_not_unpacked(tmp_path: Path) -> None:
    run = save(tmp_path / "run", {}, metrics())
    paint(run, [1])
    Image.new("1", (12_000, 12_000)).save(run / "reconstructions" / "epoch_0002.png")
    page = page_of(run)
    assert "epoch_0002.png: it has too many pixels, 12000 x 12000" in page.text and len(pictures(page)) == 1


def test_a_million_lines_take_seconds_and_little_memory(tmp_path: Path) -> None:
    run = save(tmp_path / "run", {"epochs": 1000})
    rest = '"learning_rate": 0.0005, "images_per_s": 120.5, "step_ms": 250.1}\n'
    with (run / "metrics.jsonl").open("w") as file:
        for i in range(1_000_000):
            file.write(f'{{"step": {i}, "epoch": {i / 1000}, "loss": {0.4 + 0.6 / (1 + i / 1e5):.6f}, {rest}')
            if i % 50_000 == 0:
                file.write(f'{{"step": {i}, "epoch": {i / 1000}, "knn": {i / 2e6}}}\n')
    start = time.process_time()  # the machine may be busy
    page = page_of(run)
    assert time.process_time() - start < 20
    assert "step 999,999" in page.text and "only one in 4 lines of training was read" in page.text
    assert len(curves(page, "knn")[0]) == 20 and 800 < len(curves(page, "loss")[0]) <= 1000
    assert curves(page, "loss")[0][-1][1] == pytest.approx(0.4 + 0.6 / 11, abs=0.01)


# The command.


def test_mistakes_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = example(tmp_path / "run")
    (tmp_path / "none" / "a" / "b").mkdir(parents=True)
    assert "does not exist" in fails(capsys, tmp_path / "missing")
    assert "is not a folder" in fails(capsys, run / "config.json")
    assert "no run in " in fails(capsys, tmp_path / "none")
    assert "the suffix must be .html" in fails(capsys, run, "--output", tmp_path / "page.pdf")
    assert "is a folder" in fails(capsys, run, "--output", save(tmp_path / "folder.html"))
    assert "cannot write" in fails(capsys, run, "--output", run / "config.json" / "page.html")
    assert "must be from 1 to 86400" in fails(capsys, run, "--watch", "0")
    assert "must be from 1 to 86400" in fails(capsys, run, "--watch", "nan")
    for i in range(65):
        save(tmp_path / "many" / str(i), {})
    assert "at most 64 runs, not 65" in fails(capsys, tmp_path / "many")
    assert not (run / "report.html").exists()


def test_only_reports_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = example(tmp_path / "run")
    assert main([str(run)]) == 0 and main([str(run)]) == 0
    assert MARK in (run / "report.html").read_text()[:1024]
    for foreign in (b"<html>mine</html>", b"", b"x" * 2000 + MARK.encode()):
        (run / "report.html").write_bytes(foreign)
        assert "is not a report of this command" in fails(capsys, run)
        assert (run / "report.html").read_bytes() == foreign
    (run / "report.html").unlink()
    (run / "report.html").symlink_to("nowhere")
    assert "is not a report of this command" in fails(capsys, run)


def test_runs_are_found_in_folders_of_runs(tmp_path: Path) -> None:
    for name in ("x/a", "x/b", "y/c"):
        save(tmp_path / "all" / name, {})
    names = [path.name for path in find_runs([tmp_path / "all"])]
    assert names == ["a", "b", "c"]
    save(tmp_path / "all" / "x", None, metrics())  # now a run itself, and those in it are its own affair
    assert [path.name for path in find_runs([tmp_path / "all"])] == ["x"]


def test_watching_writes_again_and_ends_in_peace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save(tmp_path / "run", config_of_pretraining("--epochs", "10"), metrics(until=100), age_s=10)
    seen: list[str] = []

    def sleep(seconds: float) -> None:
        assert seconds == 5
        page = (run / "report.html").read_text()
        seen.append(page)
        if len(seen) == 1:
            save(run, None, metrics(until=200), age_s=10)
        elif len(seen) == 2:
            shutil.move(run / "metrics.jsonl", tmp_path / "away.jsonl")
            (run / "config.json").unlink()
        else:
            shutil.move(tmp_path / "away.jsonl", run / "metrics.jsonl")
            raise KeyboardInterrupt

    monkeypatch.setattr("sparkme.reporting.report.time.sleep", sleep)
    assert main([str(run), "--watch", "5"]) == 0
    assert "step 100" in seen[0] and "step 200" in seen[1] and "no longer has a config.json or metrics.jsonl" in seen[2]
    for page in seen:
        assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in page and 'id="reload" value="5"' in page
    last = (run / "report.html").read_text()
    assert 'http-equiv="refresh"' not in last and 'id="reload"' not in last and "step 200" in last
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.splitlines()[-1].startswith("stopped; ")


# Style and script.


def test_the_style_sheet_has_a_stroke_for_every_run() -> None:
    style = Path(page_module.__file__).with_name("page.css").read_text()
    strokes = set(re.findall(r"^\.([cd]\d) { stroke", style, re.MULTILINE))
    assert strokes == {*(f"c{i}" for i in range(COLOURS)), *(f"d{i}" for i in range(1, DASHES))}
    for number in range(COLOURS):  # in light and in dark
        assert len(re.findall(rf"--c{number}: #[0-9a-f]{{6}};", style)) == 2


def test_the_script_parses() -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("no node on PATH to parse the page's script with")
    script = Path(page_module.__file__).with_name("page.js")
    done = subprocess.run([node, "--check", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# In a browser.


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH to run the page's script in")
    return found


def browse(chromium: str, address: str, folder: Path, *flags: str) -> str:
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=2000",
            f"--user-data-dir={folder / 'profile'}",
            *flags,
            address,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout


def driven(source: str) -> str:
    """A page with a script that moves what can be moved, which the page itself would not let run."""
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    return free.replace("</body>", f"{DRIVER}</body>")


def test_the_script_moves_the_pictures_and_shows_values(tmp_path: Path, chromium: str) -> None:
    """The page is opened as it is, with what to show in its address; and once more by a script that moves what can be moved."""
    runs = [example(tmp_path / name, seed) for seed, name in enumerate("ab")]
    page_of(*runs)
    address = (tmp_path / "page.html").as_uri()

    def shown_epochs(dom: str) -> list[str]:
        assert 'data-ready="yes"' in dom and "data-error" not in dom
        return re.findall(r'class="frame[^"]* shown" data-epoch="(\d+)"', dom)

    dom = browse(chromium, address, tmp_path, "--dump-dom")
    assert shown_epochs(dom) == ["10"] and "epoch 10 of 10" in dom
    dom = browse(chromium, f"{address}#run=1&epoch=5&log=loss&hide=0", tmp_path, "--dump-dom")
    assert shown_epochs(dom) == ["5"] and re.search(r'class="frames shown" data-run="1"', dom)
    assert re.search(r'data-log="loss" aria-pressed="true"', dom) and len(re.findall(r'polyline class="[^"]* off"', dom)) > 3

    source = (tmp_path / "page.html").read_text()
    (tmp_path / "driven.html").write_text(driven(source))
    dom = browse(chromium, (tmp_path / "driven.html").as_uri(), tmp_path, "--dump-dom")
    assert shown_epochs(dom) == ["5"]
    said = dict(re.findall(r'data-(slider|tip|marks|next|drawn|hash)="([^"]*)"', dom.partition("<body")[2].partition(">")[0]))
    losses = [next(line["loss"] for line in metrics(seed) if line["step"] == 200) for seed in (0, 1)]
    assert said["tip"] == f"epoch 5, step 200b: {losses[1]:.4g}a: {losses[0]:.4g}"
    assert (
        said["slider"] == "2"
        and said["marks"] == "2"
        and said["next"].startswith("epoch 5.125, step 205")
        and said["drawn"] == "1"
    )
    assert said["hash"] == "#epoch=5&amp;log=loss&amp;hide=0"


@pytest.mark.parametrize("count", [1, 3])
def test_it_fits_wide_and_narrow_screens(count: int, tmp_path: Path, chromium: str) -> None:
    runs = [example(tmp_path / f"a_run_with_a_rather_long_name_{seed}", seed) for seed in range(count)]
    for run in runs:
        paint(run, [1, 5, 10], (900, 300))
    page_of(*runs)
    source = (tmp_path / "page.html").read_text()
    (tmp_path / "driven.html").write_text(driven(source))
    widths, ends = (1280, 390, 360), (0, 1280, 1670, 2030)
    frames = "".join(  # in frames, since a window has a least width; each says by how much its page is too wide
        f'<iframe src="driven.html" style="border:0;width:{width}px;height:1500px" onload="document.title += '
        "' ' + this.contentDocument.body.dataset.wide + ' of ' + this.contentWindow.innerWidth\"></iframe>"
        for width in widths
    )
    (tmp_path / "frames.html").write_text(f'<title>wide:</title><body style="margin:0;display:flex">{frames}')
    address, allowed = (tmp_path / "frames.html").as_uri(), "--allow-file-access-from-files"
    picture = tmp_path / "frames.png"
    browse(chromium, address, tmp_path, allowed, f"--screenshot={picture}", f"--window-size={ends[-1]},1500")
    with Image.open(picture) as opened:
        for start, end in pairwise(ends):
            colours = opened.convert("RGB").crop((start, 0, end, 1500)).getcolors(1 << 24)
            assert colours is not None and len(colours) > 100, (start, end)
    title = re.search("<title>(.*?)</title>", browse(chromium, address, tmp_path, allowed, "--dump-dom"))
    assert title and sorted(re.findall(r"(-?\d+) of (\d+)", title[1])) == [("0", "1280"), ("0", "360"), ("0", "390")]
