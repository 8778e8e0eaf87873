"""What a run says of itself: each warning once, where it is due, and none where all is well."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparkme.data.dataset import Batch
from sparkme.settings.pretrain import PretrainSettings
from sparkme.training import health
from sparkme.training.health import Health, more_workers

WELL = {"loss": 0.7, "loader_wait": 0.01, "images_per_s": 100.0}


def training(device: str = "cpu", **config: Any) -> Any:
    settings = replace(PretrainSettings(warmup_epochs=2, workers=2, batch_size=16, input_size=(64, 64)), **config)
    return SimpleNamespace(
        settings=settings, poor_loss=1.0, steps_per_epoch=50, process=SimpleNamespace(device=torch.device(device))
    )


def said(numbers: dict[int, dict[str, float]], *, steps: int = 1000, every: int = 10, **words: Any) -> list[tuple[int, str]]:
    """What is said, and at which steps; `numbers` hold from a step on."""
    looked, now, found = Health(training(**words)), dict(WELL), []
    for step in range(every, steps + 1, every):
        now |= {
            name: value for start, values in numbers.items() if start <= step < start + every for name, value in values.items()
        }
        found += [(step, text) for text in looked.of_numbers(step, now)]
    return found


def test_a_run_that_is_well_is_not_disturbed() -> None:
    assert said({}) == []
    assert said({500: {"loss": 1.4}, 520: {"loss": 0.7}, 600: {"loader_wait": 0.9}, 610: {"loader_wait": 0.1}}) == []
    assert said({1: {"loss": 1.3}, 140: {"loss": 0.9}}) == []  # in the warm-up


def test_a_loss_above_what_learns_nothing_is_told_once_after_the_warm_up() -> None:
    ((step, text),) = said({1: {"loss": 1.2}})
    assert step == 180 and "the loss is 1.200 after the warm-up, above 1," in text and "--base-lr" in text
    looked = Health(training())
    looked.training.poor_loss = None  # of fine-tuning, say
    assert not [text for step in range(10, 1000, 10) for text in looked.of_numbers(step, WELL | {"loss": 9.0})]


def test_images_that_come_slower_than_they_did_are_told_once() -> None:
    ((step, text),) = said({400: {"images_per_s": 50.0}})
    assert step == 420 and text.startswith("50 images/s instead of the usual 100")
    assert said({step: {"images_per_s": 100 - step / 20} for step in range(10, 1000, 10)}) == []  # by and by
    assert said({400: {"images_per_s": 50.0}, 403: {"images_per_s": 100.0}}, every=1) == []  # three lines, and three steps


def test_waiting_for_images_names_a_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.os, "sched_getaffinity", lambda _: range(8))
    ((step, text),) = said({300: {"loader_wait": 0.5}})
    assert step == 320 and text == "steps wait for images 50 % of the time: try --workers 4 instead of 2"
    assert more_workers(6, 0.5) == "try --workers 8 instead of 6 (12 would keep up)"
    assert more_workers(0, 0.3) == "try --workers 2 instead of 0"
    assert "--workers is 8, and there are no more cores" in more_workers(8, 0.5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert more_workers(1, 0.5) == "try --workers 2 instead of 1"


def test_a_gpu_that_mostly_waits_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "utilization", lambda _: 30)
    ((_, text),) = said({}, device="cuda")
    busy = "the GPU is busy 30 % of the time, though images are ready"
    assert text == f"{busy}: raise --batch-size, or use --cuda-graph or --compile"
    assert [text for _, text in said({1: {"loader_wait": 0.6}}, device="cuda") if "GPU" in text] == []  # it waits for images
    monkeypatch.setattr(torch.cuda, "utilization", lambda _: 97)
    assert said({}, device="cuda") == []

    def missing(_: object) -> int:
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert said({}, device="cuda") == []


def batches(images: torch.Tensor, *, enlarged: int = 0, count: int = 20, **words: Any) -> list[str]:
    looked = Health(training(**words))
    return [text for _ in range(count) for text in looked.of_batch(Batch(images, (), enlarged=enlarged))]


def photographs(dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images if dtype == torch.uint8 else images / 255


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_first_images_that_are_all_the_same_or_plain_are_told_once(dtype: torch.dtype) -> None:
    whole = photographs(dtype)
    assert batches(whole) == [] and batches(whole, enlarged=8) == []
    assert batches(whole[:1].expand(16, -1, -1, -1)) == ["the first 32 images are all the same: check --data"]
    plain = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 3, 8, 8) * 9
    (text,) = batches(plain if dtype == torch.uint8 else plain / 255)
    assert text == "100 % of the crops have a single colour: check --data and --background"
    looked = Health(training(batch_size=2))  # two plain crops may come together
    pairs = [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), *photographs().chunk(8)] * 4
    assert not [text for pair in pairs for text in looked.of_batch(Batch(pair, ()))]
    assert list(looked.of_batch(Batch(None, ("broken",)))) == []


def test_a_detectors_batches_are_of_different_sizes_and_have_no_input_size() -> None:
    looked = Health(training())
    looked.training.settings = SimpleNamespace(batch_size=4)
    for side in (8, 12, 8, 10):
        assert not [*looked.of_batch(Batch(torch.rand(8, 3, side, 8), ()))]


def test_images_smaller_than_the_crops_are_told_once_with_the_flag() -> None:
    (text,) = batches(photographs(), enlarged=12)
    assert text.startswith("75 % of the crops are enlarged") and "--input-size 64 64; a smaller size is faster" in text
    assert batches(photographs(), enlarged=12, count=1, batch_size=64) == []  # too few were seen


def test_a_warning_of_the_run_is_shown_and_kept(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from commands import QUICKEST
    from PIL import Image

    from sparkme.pretrain import main

    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (90, 90), (50, 90, 10)).save(tmp_path / "images" / f"{i}.png")
    words = [
        *QUICKEST,
        "--model",
        "timm:test_resnet",
        "--drop-path",
        "0",
        "--data",
        str(tmp_path / "images"),
        "--epochs",
        "5",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(words) == 0
    assert capsys.readouterr().err.count("images are all the same") == 1
    notes = [json.loads(line) for line in (tmp_path / "run" / "notes.jsonl").read_text().splitlines()]
    assert [n["kind"] for n in notes if "all the same" in n["text"]] == ["warning"]
