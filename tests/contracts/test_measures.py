"""Measures of detectors and segmenters: equal to pycocotools on files, and to a count of pixels."""

import json
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparkme.errors import UserError
from sparkme.training.metrics import FIGURES, DetectionMeasure, Detections, GroundTruth, SegmentationMeasure, encode_masks

CLASSES = ["cat", "dog", "bird", "unseen"]


def needs_pycocotools() -> None:
    pytest.importorskip("pycocotools", reason="pip install 'sparkme[detection]'")


def box_mask(box: list[float], size: tuple[int, int], without: float = 0) -> Tensor:
    """A box with a corner cut off."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside = (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
    return torch.from_numpy(inside & ~((x - box[0] < without) & (y - box[1] < without)))


def random_box(rng: random.Random, size: tuple[int, int]) -> list[float]:
    width, height = rng.choice([8, 20, 60, 140]) * rng.uniform(0.7, 1.3), rng.choice([8, 20, 60, 140]) * rng.uniform(0.7, 1.3)
    x, y = rng.uniform(0, max(1, size[1] - width)), rng.uniform(0, max(1, size[0] - height))
    return [round(value, 2) for value in (x, y, min(x + width, size[1]), min(y + height, size[0]))]


def make_set(seed: int, num_images: int = 30) -> list[tuple[GroundTruth, Detections]]:
    """Objects of all sizes, crowds, images without objects, or without detections, and equal scores; nothing is "unseen"."""
    rng = random.Random(seed)
    made = []
    for number in range(num_images):
        size = (rng.randrange(150, 260), rng.randrange(150, 260))
        boxes = [] if number % 7 == 3 else [random_box(rng, size) for _ in range(rng.randrange(1, 7))]
        masks = [box_mask(box, size, without=5) for box in boxes]
        objects = GroundTruth(
            image_id=1000 - 3 * number,
            size=size,
            boxes=np.array(boxes).reshape(-1, 4),
            labels=np.array([rng.randrange(3) for _ in boxes], dtype=np.int64),
            areas=np.array([float(mask.sum()) for mask in masks]),
            crowd=np.array([rng.random() < 0.15 for _ in boxes], dtype=bool) if number % 2 else None,
            masks=encode_masks(torch.stack(masks)) if masks else [],
        )
        found = [[value + rng.gauss(0, 3) for value in box] for box in boxes for _ in range(rng.randrange(3))]
        found += [random_box(rng, size) for _ in range(rng.randrange(4))] if number % 5 else []
        found = [[x1, y1, max(x1 + 1, x2), max(y1 + 1, y2)] for x1, y1, x2, y2 in found]
        near = objects.labels.tolist() or [0]
        made.append(
            (
                objects,
                Detections(
                    torch.tensor(found).reshape(-1, 4),
                    torch.tensor([round(rng.random(), 1) for _ in found]),
                    torch.tensor([rng.choice([*near, 3]) for _ in found], dtype=torch.long),
                    encode_masks(torch.stack([box_mask(box, size, without=4) for box in found])) if found else [],
                ),
            )
        )
    return made


def measured(made: list[tuple[GroundTruth, Detections]], masks: bool = True) -> DetectionMeasure:
    measure = DetectionMeasure(CLASSES, masks)
    measure.add([found for _, found in made], [objects for objects, _ in made])
    return measure


def xywh(box: list[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def text_of(rle: dict) -> dict:
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def by_pycocotools(made: list[tuple[GroundTruth, Detections]], folder: Path, kind: str) -> tuple[np.ndarray, list[float]]:
    """The figures, and AP of each class, of files that pycocotools reads."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth: dict = {
        "images": [{"id": o.image_id, "height": o.size[0], "width": o.size[1], "file_name": ""} for o, _ in made],
        "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(CLASSES)],
        "annotations": [],
    }
    results = []
    for objects, found in made:
        for i, box in enumerate(objects.boxes.tolist()):
            entry = {"id": len(truth["annotations"]) + 1, "image_id": objects.image_id, "bbox": xywh(box)}
            entry |= {"category_id": 10 * (int(objects.labels[i]) + 1), "area": objects.areas[i]}
            entry |= {"iscrowd": 0 if objects.crowd is None else int(objects.crowd[i])}
            truth["annotations"].append({**entry, "segmentation": text_of(objects.masks[i])})
        for i, box in enumerate(found.boxes.tolist()):
            shape = {"bbox": xywh(box)} if kind == "bbox" else {"segmentation": text_of(found.masks[i])}
            entry = {"image_id": objects.image_id, "category_id": 10 * (int(found.labels[i]) + 1)}
            results.append({**entry, "score": float(found.scores[i]), **shape})
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    coco = COCO(folder / "truth.json")
    loaded = coco.loadRes(str(folder / "results.json"))

    def stats(categories: list[int]) -> np.ndarray:
        evaluation = COCOeval(coco, loaded, kind)
        evaluation.params.catIds = categories
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation.stats

    ids = [category["id"] for category in truth["categories"]]
    return stats(ids), [stats([category])[0] for category in ids]


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_boxes_and_masks_are_those_of_pycocotools_on_files(seed: int, tmp_path: Path) -> None:
    needs_pycocotools()
    made = make_set(seed)
    measure = measured(made)
    measure.check()
    written = measure.write(tmp_path)
    for kind, theirs in (("box", "bbox"), ("mask", "segm")):
        figures, of_each = by_pycocotools(made, tmp_path, theirs)
        assert 0.02 < figures[0] < 0.98 and len(set(figures)) > 8
        for name, value in zip(FIGURES, figures, strict=True):
            assert written[kind][name] == pytest.approx(value, abs=1e-6)
            assert measure.values()[f"{kind}_{name}"] == pytest.approx(value, abs=1e-6)
        assert of_each[3] == -1
        for name, value in zip(CLASSES, of_each, strict=True):
            assert written[f"{kind}_ap_of_each_class"][name] == (None if value == -1 else pytest.approx(value, abs=1e-6))
    assert written["of_each_class"] == written["mask_ap_of_each_class"] and measure.best == "mask_ap"


def test_crowds_and_the_areas_of_annotations_count(tmp_path: Path) -> None:
    """What is tested against pycocotools depends on them."""
    needs_pycocotools()
    made = make_set(0)
    plain = [(GroundTruth(o.image_id, o.size, o.boxes, o.labels, o.areas, None, o.masks), found) for o, found in made]
    large = [(GroundTruth(o.image_id, o.size, o.boxes, o.labels, 9 * o.areas, o.crowd, o.masks), found) for o, found in made]
    values = measured(made).values()
    assert measured(plain).values()["box_ap"] != values["box_ap"]
    assert measured(large).values()["box_ap_small"] != values["box_ap_small"]


def test_processes_that_share_the_images_measure_what_one_does(tmp_path: Path) -> None:
    needs_pycocotools()
    made = make_set(1)
    whole = measured(made)
    parts = [pickle.loads(pickle.dumps(measured(made[rank::3]))) for rank in range(3)]
    first, *others = reversed(parts)
    assert first.values() != whole.values()  # and what it says then is not kept
    for other in others:
        first.merge(other)
    first.merge(parts[0])  # known images, as where a sampler fills up the last batch
    assert first.num_images == whole.num_images == len(made)
    assert first.values() == whole.values() and first.write(tmp_path) == whole.write(tmp_path)


def test_boxes_alone_are_measured_without_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_pycocotools()
    made = make_set(2)
    bare = [
        (GroundTruth(o.image_id, o.size, o.boxes, o.labels, o.areas, o.crowd), Detections(f.boxes, f.scores, f.labels))
        for o, f in made
    ]
    measure, both = measured(bare, masks=False), measured(made)
    assert measure.best == "box_ap" and not any(name.startswith("mask") for name in measure.values())
    assert measure.values().items() <= both.values().items()
    assert not capsys.readouterr().out  # pycocotools prints tables
    values = {"box_ap": 0.25, "box_ap50": 0.5, "mask_ap": 0.125}
    assert both.describe(values) == "box AP 25.0 %, box AP50 50.0 %, mask AP 12.5 %"
    assert measure.describe({"box_ap": 0.25, "epoch": 3}) == "box AP 25.0 %"
    json.dumps([measure.write(tmp_path), both.values()])
    with pytest.raises(ValueError, match="boxes and 0 masks"):
        DetectionMeasure(CLASSES, masks=True).add([bare[0][1]], [bare[0][0]])


def test_nothing_predicted_is_zero_and_nothing_to_find_is_refused(tmp_path: Path) -> None:
    needs_pycocotools()
    nothing = Detections([], [], [], [])
    made = [(objects, nothing) for objects, _ in make_set(0)]
    measure = measured(made)
    measure.check()
    assert {value for name, value in measure.values().items()} == {0.0}
    assert measure.write(tmp_path)["of_each_class"] == {"cat": 0.0, "dog": 0.0, "bird": 0.0, "unseen": None}

    with pytest.raises(UserError, match="none of the validation images can be read"):
        DetectionMeasure(CLASSES).check()
    mask = encode_masks(torch.ones(1, 50, 50, dtype=torch.bool))
    one = np.array([[0.0, 0, 50, 50]]), np.array([1]), np.array([2500.0])
    crowd = GroundTruth(1, (50, 50), *one, crowd=np.array([True]), masks=mask)
    found = Detections(one[0], [0.9], [1], mask)
    for objects in (GroundTruth(1, (50, 50), masks=[]), crowd):
        measure = measured([(objects, found)])
        with pytest.raises(UserError, match="none of the readable validation images has an object"):
            measure.check()
        assert measure.values() == {"box_ap": 0.0, "mask_ap": 0.0}  # of a process whose images have none
        assert set(measure.write(tmp_path)["mask"].values()) == {None}
    perfect = measured([(GroundTruth(1, (50, 50), *one, masks=mask), found)])
    figures = perfect.write(tmp_path)["mask"]
    assert {name for name, value in figures.items() if value is None} == {"ap_small", "ap_large", "ar_small", "ar_large"}
    assert all(value is None or value == pytest.approx(1, abs=1e-12) for value in figures.values())
    assert "box_ap_large" not in perfect.values() and perfect.values()["box_ap"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [4]}, r"detections of image 7: labels from 4 to 4; there are 4 classes"),
        ({"scores": [float("nan")]}, r"a box, score or area is not finite"),
        ({"scores": [0.5, 0.5]}, r"\(1, 4\) boxes, \(1,\) labels and \(2,\) scores"),
        ({"masks": []}, r"1 boxes and 0 masks"),
        ({"masks": [{"size": [9, 10], "counts": b"0:"}]}, r"a mask is not of the image's size \(10, 10\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    needs_pycocotools()
    mask = encode_masks(torch.ones(1, 10, 10, dtype=torch.bool))
    objects = GroundTruth(7, (10, 10), np.array([[0.0, 0, 9, 9]]), np.array([1]), np.array([81.0]), masks=mask)
    good = {"boxes": [[0.0, 0, 9, 9]], "scores": [0.5], "labels": [1], "masks": mask}
    DetectionMeasure(CLASSES, masks=True).add([Detections(**good)], [objects])
    with pytest.raises(ValueError, match=message):
        DetectionMeasure(CLASSES, masks=True).add([Detections(**(good | change))], [objects])


def test_without_pycocotools_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    SegmentationMeasure(["cat"])
    with pytest.raises(UserError, match=r"is not installed; pip install 'sparkme\[detection\]'$"):
        DetectionMeasure(["cat"])


def test_masks_are_encoded_as_they_are() -> None:
    needs_pycocotools()
    from pycocotools import mask as coco_mask

    masks = torch.rand(3, 7, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    rles = encode_masks(masks)
    assert [coco_mask.area(rle) for rle in rles] == masks.sum((1, 2)).tolist()
    assert np.array_equal(np.moveaxis(coco_mask.decode(rles), 2, 0), masks.numpy())
    assert encode_masks(masks[:0]) == []


def make_maps(seed: int, count: int, ignored: int) -> tuple[list[Tensor], list[Tensor]]:
    """Predicted and true classes of images of several sizes: 3 is only predicted, 4 is only true, and 5 is neither."""
    generator = torch.Generator().manual_seed(seed)
    predicted, true = [], []
    for i in range(count):
        shape = (5 + i, 9 - i)
        labels = torch.randint(0, 4, shape, generator=generator)
        labels[labels == 3] = 4
        guess = torch.where(
            torch.rand(shape, generator=generator) < 0.5, labels.clamp(max=3), torch.randint(0, 4, shape, generator=generator)
        )
        labels[torch.rand(shape, generator=generator) < 0.2] = ignored
        predicted.append(guess)
        true.append(labels.to(torch.uint8) if ignored >= 0 else labels)
    return predicted, true


@pytest.mark.parametrize("ignored", [255, -1, 0])
def test_intersection_over_union_is_that_of_sets_of_pixels(ignored: int, tmp_path: Path) -> None:
    classes = [*"abcdef"]
    predicted, true = make_maps(0, 4, ignored)
    measure = SegmentationMeasure(classes, ignored)
    measure.add(predicted, true)

    pixels = [
        ((image, y, x), int(guess[y, x]), int(labels[y, x]))
        for image, (guess, labels) in enumerate(zip(predicted, true, strict=True))
        for y in range(labels.shape[0])
        for x in range(labels.shape[1])
        if labels[y, x] != ignored
    ]
    ious, accuracies = [], []
    for i in range(len(classes)):
        taken, are = {at for at, guess, _ in pixels if guess == i}, {at for at, _, label in pixels if label == i}
        ious.append(len(taken & are) / len(taken | are) if taken | are else None)
        accuracies.append(len(taken & are) / len(are) if are else None)
    assert measure.ious() == ious and measure.accuracies() == accuracies
    assert ious[3:] == [0, 0, None] and accuracies[3:] == [None, 0, None]
    known = [[value for value in each if value is not None] for each in (ious, accuracies)]
    right = sum(guess == label for _, guess, label in pixels) / len(pixels)
    values = measure.values()
    expected = {"mean_iou": np.mean(known[0]), "pixel_accuracy": right, "mean_accuracy": np.mean(known[1])}
    assert values == pytest.approx(expected, abs=1e-15) and values["pixel_accuracy"] == right
    for row in range(len(classes)):
        for column in range(len(classes)):
            assert measure.confusion[row, column] == sum((g, t) == (column, row) for _, g, t in pixels)

    written = measure.write(tmp_path)
    assert written["of_each_class"] == dict(zip(classes, ious, strict=True))
    assert np.sum(written["confusion"]) == len(pixels) and (tmp_path / "confusion.png").stat().st_size > 1000
    json.dumps([written, values])
    assert measure.describe({"mean_iou": 0.5, "epoch": 2}) == "mean IoU 50.0 %" and measure.best == "mean_iou"


def test_segmentation_of_processes_adds_up() -> None:
    predicted, true = make_maps(1, 4, 255)
    whole, first, second = (SegmentationMeasure([*"abcdef"]) for _ in range(3))
    whole.add(predicted, true)
    first.add(predicted[:1], true[:1])
    second.add(predicted[1:], true[1:])
    first.merge(pickle.loads(pickle.dumps(second)))
    assert torch.equal(first.confusion, whole.confusion) and first.num_images == whole.num_images == 4
    batch = SegmentationMeasure([*"abcdef"])
    batch.add(torch.stack([predicted[0]] * 3), torch.stack([true[0]] * 3))
    one = SegmentationMeasure([*"abcdef"])
    one.add(predicted[:1], true[:1])
    assert batch.num_images == 3 and torch.equal(batch.confusion, 3 * one.confusion)


def test_many_classes_in_bytes_are_counted_right() -> None:
    """Index 200 of a class times 201 classes is more than a byte holds."""
    measure = SegmentationMeasure([str(i) for i in range(201)])
    measure.add(torch.full((1, 2, 3), 200, dtype=torch.uint8), torch.full((1, 2, 3), 199, dtype=torch.uint8))
    assert measure.confusion[199, 200] == measure.confusion.sum() == 6


def test_segmentation_without_labels_or_with_wrong_ones_is_refused() -> None:
    measure = SegmentationMeasure(["a", "b"])
    with pytest.raises(UserError, match="none of the validation images can be read"):
        measure.check()
    ones = torch.ones(1, 2, 2, dtype=torch.long)
    measure.add(ones, 255 * ones)
    with pytest.raises(UserError, match="every pixel of the validation images is labelled 255"):
        measure.check()
    assert measure.values() == {"mean_iou": 0.0, "pixel_accuracy": 0.0, "mean_accuracy": 0.0}
    for predicted, true, message in (
        (ones, 2 * ones, "labelled pixels are from 2 to 2; there are 2 classes"),
        (-ones, ones, "predicted pixels are from -1 to -1"),
        (ones, ones[:, :1], r"\(2, 2\) pixels are predicted, and \(1, 2\) are labelled"),
    ):
        with pytest.raises(ValueError, match=message):
            measure.add(predicted, true)
    measure.add(ones, ones)
    measure.check()
