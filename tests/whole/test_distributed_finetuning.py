"""Two processes that fine-tune a detector or a segmenter together do what one does.

RetinaNet and the segmenters draw nothing at random in a step. So losses, weights and figures are equal up to rounding: with
frozen batch norms, and with trained ones, whose statistics the processes share. For segmenters each process must have equally
many known pixels, since the loss is the mean over those of a process, as in torchvision's references.

The R-CNNs draw anchors and regions with torch's generator. Each process seeds it for itself, and one process draws for the
second half of the batch after the first half. So the draws differ, and with them the losses. Here all anchors and regions are
taken, so that nothing is drawn. Even then torchvision's losses are means over the anchors and regions of all images of a
process, and images differ in how many they have: the mean of two means is near the mean of all, but not equal. The weights
of both processes must be the same bit for bit.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from annotated import create, make_coco, make_masks, save_weights
from processes import free_port, join, run_two
from torch import Tensor

from sparkme.training.finetuning import Finetuning
from sparkme.training.loop import Loop

COMMON = ["--device", "cpu", "--workers", "0", "--batch-size", "4", "--short-side", "64", "--epochs", "2", "--clip-grad", "1"]
COMMON += ["--base-lr", "0.1", "--layer-decay", "0.8"]
DETECTION = ["--task", "detection", "--fpn-channels", "16", *COMMON]
SEGMENTATION = ["--task", "segmentation", "--head-channels", "16", "--scale-range", "1", "1.4", *COMMON]
WORDS = {
    "retinanet": [*DETECTION, "--head", "retinanet", "--batch-norm", "frozen"],
    "retinanet, trained norms": [*DETECTION, "--head", "retinanet", "--batch-norm", "trained", "--ema-decay", "0.5"],
    "segmentation": [*SEGMENTATION, "--loss", "ce", "--batch-norm", "frozen"],
    "segmentation, trained norms": [*SEGMENTATION, "--loss", "ce", "--batch-norm", "trained", "--ema-decay", "0.5"],
    "all regions": [*DETECTION, "--head", "faster-rcnn", "--batch-norm", "frozen"],
}
STEPS = 3


def trained(words: list[str], prepare: Any = None) -> dict[str, Any]:
    """A few steps and a validation: the mean losses, the weights and the figures."""
    training: Finetuning = create(*words)
    if prepare is not None:
        prepare(training)
    training.start_training()
    losses = [float(training.process.mean(training.train_step(batch))) for batch in training.batches(range(STEPS))]
    measure = training._measure(training.network)
    found = {"losses": losses, "weights": training.network.state_dict(), "count": measure.num_images}
    if training.average is not None:
        found["average"] = training.average.module.state_dict()
    return {**found, "values": measure.values() if training.process.is_main else {}}


def train(rank: int, name: str, data: str, folder: str, port: int) -> None:
    join(rank, port)
    words = [f"{folder}/w.safetensors", "--data", data, *WORDS[name], "--output", f"{folder}/two"]
    torch.save(trained(words, all_regions if name == "all regions" else None), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def all_regions(training: Any) -> None:
    """Takes every anchor and every region, so that nothing is drawn."""
    for sampler in (training.network.rpn.fg_bg_sampler, training.network.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = 10**6, 0.5


def one_and_two(name: str, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    is_segmentation = name.startswith("segmentation")
    data = make_masks(tmp_path / "data", 8, 5, ignored=False) if is_segmentation else make_coco(tmp_path / "data", 8, 5)
    save_weights(tmp_path / "w.safetensors")
    words = [str(tmp_path / "w.safetensors"), "--data", str(data), *WORDS[name], "--output", str(tmp_path / "one")]
    one = trained(words, all_regions if name == "all regions" else None)
    run_two(train, name, str(data), str(tmp_path), free_port())
    return one, *(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((value.double() - b[name].double()).abs().max()) for name, value in a.items())


@pytest.mark.parametrize("name", [name for name in WORDS if name != "all regions"])
def test_two_processes_equal_one(name: str, tmp_path: Path) -> None:
    one, first, second = one_and_two(name, tmp_path)
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert difference(one["weights"], first["weights"]) < 2e-4
    if "average" in one:
        assert difference(one["average"], first["average"]) < 2e-4
    assert one["count"] == 5 == first["count"] and second["count"] == 2  # of 0, 2, 4 and 1, 3
    assert first["values"] == pytest.approx(one["values"], abs=1e-3)


def test_two_processes_equal_one_where_no_region_is_drawn(tmp_path: Path) -> None:
    one, first, second = one_and_two("all regions", tmp_path)
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(one["losses"], rel=0.02)


def run_whole(rank: int, words: list[str], port: int) -> None:
    join(rank, port)
    assert Loop(create(*words)).run() == 0
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["retinanet", "segmentation"])
def test_two_processes_run_to_the_end_and_the_first_writes(name: str, tmp_path: Path) -> None:
    make = make_masks if name == "segmentation" else make_coco
    words = [str(save_weights(tmp_path / "w.safetensors")), "--data", str(make(tmp_path / "data", 4, 3)), *WORDS[name]]
    run_two(run_whole, [*words, "--epochs", "1", "--output", str(tmp_path / "run")], free_port())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["num_val"] == 3 and (tmp_path / "run" / "predictions-sample.png").is_file()
