"""ONNX files compute what the trained networks compute, for other images than they were exported with."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_resnet import resnet
from torch import Tensor, nn

import sparkme
from sparkme.errors import UserError
from sparkme.networks.create import create_dense
from sparkme.networks.detectors import HEADS as DETECTORS
from sparkme.networks.detectors import create_detector, detect, loss_of
from sparkme.networks.segmenters import HEADS as SEGMENTERS
from sparkme.networks.segmenters import create_segmenter
from sparkme.weights.onnx import (
    OneImage,
    export_onnx,
    onnx_of_detector,
    onnx_of_scores,
    relative_difference,
    share_of_unmatched,
)

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def run(path: Path, images: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, {"images": images.numpy()})
    return outputs


def images(batch: int, height: int = 64, width: int = 96, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(7))


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def trained(network: nn.Module) -> nn.Module:
    """With statistics of batches, in eval mode."""
    with torch.no_grad():
        network.train()(images(4))
    return network.eval()


@pytest.mark.parametrize(("name", "drop_path"), [("resnet18", 0.1), ("timm:convnext_atto", 0.1)])
def test_a_classifier_takes_pixels_and_any_number_of_images(name: str, drop_path: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = trained(create_dense(name, drop_path=drop_path, num_classes=7))
    path = tmp_path / "classifier.onnx"
    difference = onnx_of_scores(network, MEAN, STD, (64, 96), path, metadata={"classes": "a, b"})
    assert 0 < difference < 1e-4
    for batch in (1, 5):
        with torch.no_grad():
            expected = network(normalised(images(batch)))
        (logits,) = run(path, images(batch))
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["logits"]
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 96]
    assert session.get_modelmeta().custom_metadata_map == {"classes": "a, b"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["classifier.onnx"]  # the weights are in it


@pytest.mark.parametrize("head", SEGMENTERS)
def test_a_segmenter_takes_images_of_odd_sides(head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    segmenter = trained(create_segmenter(sparkme.pyramid(resnet()), head, 4, channels=256 if head == "deeplabv3" else 32))
    path = tmp_path / "segmenter.onnx"
    onnx_of_scores(segmenter, MEAN, STD, (50, 75), path)
    for batch in (1, 3):
        x = images(batch, 50, 75)
        with torch.no_grad():
            expected = segmenter(normalised(x))
        (logits,) = run(path, x)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def squares(seed: int, number: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Dark images with one or two bright squares, red ones of class 1 and blue ones of class 2."""
    generator = torch.Generator().manual_seed(seed)
    pictures, targets = [], []
    for _ in range(number):
        picture, boxes, labels, masks = torch.rand(3, 64, 96, generator=generator) / 10, [], [], []
        for left in (4, 52)[: int(torch.randint(1, 3, (), generator=generator))]:
            x, y, side = (int(torch.randint(n, (), generator=generator)) for n in (8, 24, 12))
            x, side, label = left + x, 18 + side, int(torch.randint(1, 3, (), generator=generator))
            picture[2 * (label - 1), y : y + side, x : x + side] += 0.9
            mask = torch.zeros(64, 96, dtype=torch.uint8)
            mask[y : y + side, x : x + side] = 1
            boxes.append([x, y, x + side, y + side]), labels.append(label), masks.append(mask)
        pictures.append(picture.clamp(0, 1))
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels), "masks": torch.stack(masks)})
    return pictures, targets


THRESHOLDS = {"retinanet": 0.2, "fcos": 0.4, "faster-rcnn": 0.3, "mask-rcnn": 0.3}  # above what they see in darkness


@cache
def finds_squares(head: str) -> Any:
    """A detector after some steps; Mask R-CNN is Faster R-CNN with masks of new weights."""
    torch.manual_seed(0)
    detector: Any = create_detector(sparkme.pyramid(resnet()), head, 2, channels=64, score_threshold=THRESHOLDS[head])
    if "rcnn" in head:
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = 16
        detector.rpn._pre_nms_top_n = detector.rpn._post_nms_top_n = {"training": 100, "testing": 100}
    if head == "mask-rcnn":
        detector.load_state_dict(finds_squares("faster-rcnn").state_dict(), strict=False)
        return detector.eval()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for step in range(40 if head == "retinanet" else 25):
        optimizer.zero_grad()
        loss_of(detector(*squares(step, 4))).backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
    return detector.eval()


@pytest.mark.parametrize("head", DETECTORS)
def test_a_detector_finds_the_same_objects(head: str, tmp_path: Path) -> None:
    detector, path = finds_squares(head), tmp_path / "detector.onnx"
    pictures, dark = squares(1000, 6)[0], torch.zeros(3, 64, 96)
    onnx_of_detector(detector, (64, 96), path, images=pictures[:3])
    expected = detect(detector, pictures, [(64, 96)] * 6)
    assert sum(len(found.labels) for found in expected) > 3
    for picture, found in zip(pictures, expected, strict=True):
        outputs = tuple(map(torch.from_numpy, run(path, picture[None])))
        masks = () if found.probabilities is None else (found.probabilities,)
        assert share_of_unmatched([outputs], [(found.boxes, found.scores, found.labels, *masks)]) == 0
    nothing = run(path, dark[None])
    assert nothing[0].shape == (0, 4) and len(nothing) == (4 if head == "mask-rcnn" else 3)
    names = ("boxes", "scores", "labels", "masks")[: len(nothing)]
    # The exporter sees no object, and the file finds them.
    found = export_onnx(OneImage(detector), [dark, dark, *pictures], path, names=names, compare=share_of_unmatched)
    assert found == 0


def test_objects_are_compared_in_any_order() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 90, 90], [30, 5, 60, 90]])
    scores, labels, masks = torch.tensor([0.9, 0.5, 0.5]), torch.tensor([1, 0, 1]), torch.rand(3, 28, 28)
    this = (boxes, scores, labels, masks)
    assert share_of_unmatched([this], [tuple(value[[0, 2, 1]] for value in this)]) == 0
    assert share_of_unmatched([this], [tuple(value[:2] for value in this)]) == 1 / 5
    assert share_of_unmatched([this, this], [this, (boxes, scores, labels + 1, masks)]) == 0.5
    assert share_of_unmatched([this], [(boxes + 0.1, scores, labels, masks)]) == 1
    assert share_of_unmatched([this], [(boxes, scores + 1e-3, labels, masks)]) == 1
    assert share_of_unmatched([this], [(boxes, scores, labels, 1 - masks)]) == 1
    assert share_of_unmatched([this], [tuple(value[:0] for value in this)]) == 1
    assert relative_difference([(scores,)], [(scores[:2],)]) == float("inf")


class OtherwiseInAFile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * (1.01 if torch.compiler.is_exporting() else 1)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.sum((2, 3))


def test_a_file_that_computes_something_else_does_not_replace_the_one_that_stands(tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    path.write_bytes(b"before")
    with pytest.raises(UserError, match=r"network.onnx is not written: .* than the network, by 0.01"):
        onnx_of_scores(OtherwiseInAFile().eval(), MEAN, STD, (32, 32), path)
    with pytest.raises(UserError, match=r"torch cannot export this network \(Branches\) to ONNX: "):
        onnx_of_scores(Branches().eval(), MEAN, STD, (32, 32), path)
    with pytest.raises(ValueError, match="training mode"):
        export_onnx(nn.Flatten().train(), [*images(3)], path, names=("out",))
    assert path.read_bytes() == b"before" and len([*tmp_path.iterdir()]) == 1


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"need the package onnxscript: pip install 'sparkme\[onnx\]'"):
        onnx_of_scores(nn.Flatten().eval(), MEAN, STD, (32, 32), tmp_path / "network.onnx")
