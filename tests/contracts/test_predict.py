"""`python -m sparkme.predict` as its users run it: predictions for a run's validation images have the run's figures.

Fine-tuned runs are also exported as ONNX files here, whose printed code predicts the same.
"""

import csv
import io
import json
import os
import signal
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import QUICKEST
from pictures import make_images, write_shard
from PIL import Image

from sparkme import export, pretrain
from sparkme.data.annotations import find_segmented
from sparkme.data.inputs import stems_of
from sparkme.data.labelled import find_labelled
from sparkme.finetune import finetune
from sparkme.networks.create import create_dense
from sparkme.predict import main, predict
from sparkme.training import predicting
from sparkme.weights.files import write_state_dict

mask_tools = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")

SCRATCH: dict[str, Any] = {"from_scratch": True, "model": "small_resnet:resnet", "workers": 0, "device": "cpu"}
HERE: dict[str, Any] = {"workers": 0, "device": "cpu"}
CATEGORIES = {3: "red", 90: "blue"}
COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 200)}


def make_scenes(folder: Path, part: str, count: int, seed: int) -> Path:
    """Squares in two colours on noise, as COCO's file and as masks, in two sizes; returns the file."""
    rng = np.random.default_rng(seed)
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for place in (folder / part / "deeper", folder / "pixels" / part / "images", folder / "pixels" / part / "masks"):
        place.mkdir(parents=True)
    for number in range(count):
        width, height = (80, 64) if number % 3 else (64, 72)
        pixels, labels = rng.integers(0, 40, (height, width, 3), dtype=np.uint8), np.zeros((height, width), np.uint8)
        image_id, name = 100 + 7 * number, f"deeper/{number}.png"
        for left in (0, width // 2):
            side, label = int(rng.integers(18, 30)), int(rng.integers(2))
            x, y = left + int(rng.integers(width // 2 - side + 1)), int(rng.integers(height - side))
            pixels[y : y + side, x : x + side] += np.array([*COLOURS.values()][label], dtype=np.uint8)
            labels[y : y + side, x : x + side] = label + 1
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            shape = {"bbox": [x, y, side, side], "area": side**2, "iscrowd": 0, "segmentation": [corners]}
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": [*CATEGORIES][label], **shape})
        picture = Image.fromarray(pixels)
        picture.save(folder / "pixels" / part / "images" / f"{number}.png")
        Image.fromarray(labels).save(folder / "pixels" / part / "masks" / f"{number}.png")
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 1 else 1  # which COCO's boxes do not look at
        picture.save(folder / part / name, exif=exif)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
    categories = [{"id": id_, "name": name} for id_, name in CATEGORIES.items()]
    path = folder / f"{part}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for part, count in (("train", 24), ("val", 8)):
        make_scenes(folder, part, count, seed=count)
    (folder / "pixels" / "classes.txt").write_text("background\nred\nblue\n")
    return folder


@pytest.fixture(scope="module")
def detector(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt something."""
    words = {"short_side": [64], "fpn_channels": 16, "regions": 16, "batch_size": 4, "epochs": 8, "eval_epochs": 8}
    parts = {"train": scenes / "train.json", "val": scenes / "val.json", "root": scenes}
    run = finetune(**SCRATCH, **words, **parts, task="detection", output=tmp_path_factory.mktemp("detector"))
    return run.folder


@pytest.fixture(scope="module")
def segmenter(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {"head_channels": 16, "input_size": [64], "batch_size": 4, "epochs": 8, "eval_epochs": 8}
    output = tmp_path_factory.mktemp("segmenter")
    return finetune(**SCRATCH, **words, task="segmentation", data=scenes / "pixels", output=output).folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six, in two folders."""
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of three classes that nobody trained."""
    return write_classifier(tmp_path_factory.mktemp("classifier"))


def write_classifier(folder: Path, *, several: bool = False, value: float | None = None) -> Path:
    torch.manual_seed(0)
    state = dict(create_dense("tiny_network:tiny", num_classes=3).state_dict())
    state["head.bias"] = torch.tensor([-4.0, 4.0, -9.0] if value is None else [value] * 3)
    notes = {
        "network": "tiny_network:tiny", "classes": '["a", "b", "c,d"]', "channels": "3", "mean": "[0.5, 0.5, 0.5]",
        "std": "[0.2, 0.2, 0.2]", "value_range": "{}", "upright": "true", "input_size": "[32, 32]",
        "several_labels": json.dumps(several),
    }  # fmt: skip
    write_state_dict(folder / "best.safetensors", state, notes)
    return folder


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must end with exit code 2 and one line."""
    assert main([*map(str, arguments), "--workers", "0", "--device", "cpu"]) == 2
    errors = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("skipped ")]
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


def figures(truth: Path, results: Path, kind: str) -> list[float]:
    """pycocotools' own."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        reference = COCO(str(truth))
        evaluation = COCOeval(reference, reference.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def test_objects_have_the_runs_figures(detector: Path, scenes: Path, tmp_path: Path) -> None:
    found = predict(detector, scenes / "val", annotations=scenes / "val.json", output=tmp_path / "all", batch_size=8, **HERE)
    results = json.loads((detector / "results.json").read_text())
    table = found.folder / "predictions.json"
    assert found.finished and found.about["num_predicted"] == 8
    assert results["box"]["ap"] > 0.05 and results["mask"]["ap"] > 0.05
    assert figures(scenes / "val.json", table, "bbox")[0] == pytest.approx(results["box"]["ap"], abs=1e-6)
    assert figures(scenes / "val.json", table, "segm")[:3] == pytest.approx([*results["mask"].values()][:3], abs=1e-6)
    assert {row["category_id"] for row in found.rows} <= {*CATEGORIES} and min(row["score"] for row in found.rows) >= 0.05
    assert {row["file_name"] for row in found.rows} <= {f"deeper/{i}.png" for i in range(8)}
    assert {row["image_id"] for row in found.rows} <= {100 + 7 * i for i in range(8)}
    with redirect_stdout(io.StringIO()):
        from pycocotools.coco import COCO

        own = COCO(str(found.folder / "images.json"))
        assert len(own.loadRes(str(table)).getAnnIds()) == len(found.rows)
    assert own.loadImgs(100) == [{"id": 100, "file_name": "deeper/0.png", "height": 72, "width": 64}]
    with Image.open(found.folder / "pictures" / "deeper" / "0.jpg") as picture:
        assert picture.size == (64, 72)

    alone = predict(
        detector, scenes / "val" / "deeper", annotations=scenes / "val.json", output=tmp_path / "1", batch_size=1, **HERE
    )
    boxes = [np.array([row["bbox"] for row in each.rows]) for each in (found, alone)]
    assert boxes[0].shape == boxes[1].shape and np.allclose(*boxes, atol=1e-3)


def test_without_annotations_images_are_numbered_and_held_as_exif_says(detector: Path, scenes: Path, tmp_path: Path) -> None:
    found = predict(detector, scenes / "val" / "deeper", output=tmp_path, score=0.3, pictures=0, **HERE)
    images = json.loads((tmp_path / "images.json").read_text())["images"]
    assert [image["id"] for image in images] == [*range(1, 9)] and images[1]["file_name"] == "1.png"
    assert (images[1]["height"], images[1]["width"]) == (80, 64)  # which is stored as 64 x 80
    assert found.rows and all(row["score"] > 0.3 for row in found.rows)
    for row in found.rows:
        height, width = (images[row["image_id"] - 1][side] for side in ("height", "width"))
        assert mask_tools.decode(row["segmentation"]).shape == (height, width)
    assert not (tmp_path / "pictures").exists()


def test_masks_have_the_runs_mean_iou_and_can_be_learnt_from(segmenter: Path, scenes: Path, tmp_path: Path) -> None:
    data = scenes / "pixels" / "val"
    found = predict(segmenter, data / "images", output=tmp_path / "out", pictures=2, **HERE)
    assert [row["mask"] for row in found.rows] == [f"masks/{i}.png" for i in range(8)]
    confusion = np.zeros((3, 3), np.int64)
    for row in found.rows:
        true, guess = (np.asarray(Image.open(path)) for path in (data / "masks" / row["image"], found.folder / row["mask"]))
        assert true.shape == guess.shape
        confusion += np.bincount(3 * true.ravel() + guess.ravel(), minlength=9).reshape(3, 3)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    expected = json.loads((segmenter / "results.json").read_text())
    assert confusion.tolist() == expected["confusion"] and expected["best"]["mean_iou"] > 0.4
    assert (confusion.diagonal()[union > 0] / union[union > 0]).mean() == pytest.approx(expected["best"]["mean_iou"], abs=1e-9)
    assert sorted(path.name for path in (found.folder / "pictures").iterdir()) == ["0.jpg", "1.jpg"]

    (found.folder / "images").symlink_to(data / "images", target_is_directory=True)
    read = find_segmented(str(found.folder))
    assert read.train.classes == ["background", "red", "blue"] and len(read.train) + len(read.val) == 8


def test_classes_have_the_runs_accuracy(labelled: Path, tmp_path: Path) -> None:
    words = {"epochs": 2, "eval_epochs": 1, "batch_size": 8, "input_size": [64], "head_init": "random"}
    run = finetune(**SCRATCH, **words, data=labelled, output=tmp_path / "run")
    found = predict(run.folder, find_labelled(labelled).val.paths, **HERE)
    assert found.folder == run.folder / "predictions" and found.about["task"] == "classification"
    assert [*found.rows[0]] == ["image", "class", "score", "class_2", "score_2", "class_3", "score_3"]
    right = [row["image"].split("/")[0] == row["class"] for row in found.rows]
    assert len(right) == 6 and sum(right) / 6 == pytest.approx(run.results["best"]["top1"])
    for row in found.rows:
        scores = [float(row[name]) for name in ("score", "score_2", "score_3")]
        assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-4)
    with Image.open(found.folder / "pictures.png") as sheet:
        assert sheet.width > 1000


def test_several_labels_are_those_with_the_least_score(images: Path, tmp_path: Path) -> None:
    run = write_classifier(tmp_path / "run", several=True)
    found = predict(run, images, output=tmp_path / "out", **HERE)
    assert [row["labels"] for row in found.rows] == ["b"] * 6  # whose bias is 4; the others' are -4 and -9
    every = predict(run, images, output=tmp_path / "every", score=0, **HERE).rows
    assert {row["labels"] for row in every} == {"b|a|c,d"} and all(len(row["scores"].split("|")) == 3 for row in every)
    assert {row["labels"] for row in predict(run, images, output=tmp_path / "none", score=1, **HERE).rows} == {""}


def test_images_come_from_files_lists_shards_and_arrays(classifier: Path, images: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "shard.tar", range(3))
    np.save(tmp_path / "stack.npy", np.zeros((2, 40, 40, 3), np.uint8))
    (tmp_path / "list.txt").write_text("sub1/1.png\nsub1/3.png\n")
    sources = [images / "sub0" / "0.png", tmp_path / "list.txt", tmp_path / "stack.npy", tmp_path / "shard.tar"]
    found = predict(classifier, sources, root=images, output=tmp_path / "out", **HERE)
    names = ["sub0/0.png", "sub1/1.png", "sub1/3.png", "stack.npy[0]", "stack.npy[1]"]
    assert [row["image"] for row in found.rows] == [*names, *(f"shard.tar, image {i}" for i in range(3))]


def test_no_two_images_have_one_file(segmenter: Path, tmp_path: Path) -> None:
    for name in ("x/a.png", "x/a.bmp", "x/b.png", "y/a.png", "y/B.bmp", "y/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    found = predict(segmenter, [tmp_path / "x", tmp_path / "y"], output=tmp_path / "out", **HERE)
    assert [row["mask"] for row in found.rows] == [
        *("masks/x/a.bmp.png", "masks/x/a.png.png", "masks/x/b.png", "masks/y/B.bmp.png", "masks/y/a.png", "masks/y/b.png.png")
    ]
    assert len([*(tmp_path / "out" / "masks").rglob("*.png")]) == len([*(tmp_path / "out" / "pictures").rglob("*.jpg")]) == 6


@pytest.mark.parametrize(
    ("names", "stems"),
    [
        (["a.jpg", "b.jpg"], ["a", "b"]),
        (["a.jpg", "a.jpg", "a.jpg"], ["a.jpg", "a.jpg-2", "a.jpg-3"]),
        (["s.tar, image 1", "s.npy[3]"], ["s.tar_image_1", "s.npy_3"]),
        (["a.b, c.jpg", "d/e f.jpg"], ["a.b, c", "d/e f"]),
        (["a.jpg", "a.png/b.jpg"], ["a-2", "a.png/b"]),
    ],
)
def test_names_of_files(names: list[str], stems: list[str]) -> None:
    assert stems_of(names) == stems


def test_unreadable_images_are_named_counted_and_left_out(
    classifier: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "no.jpg").write_bytes(b"no image")
    words = [str(classifier), str(images), str(tmp_path / "bad"), "--workers", "0", "--device", "cpu", "--output"]
    assert main([*words, str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("skipped unreadable image") == 1 and "predicted 6 of 7 images, 1 unreadable" in shown.out
    about = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert about["finished"] and len(about["unreadable"]) == 1 and "no.jpg" in about["unreadable"][0]
    assert "more than --max-unreadable 0" in fails(capsys, *words, tmp_path / "strict", "--max-unreadable", 0)
    assert [path.name for path in (tmp_path / "strict").iterdir()] == ["predict.json"]
    assert "none of the sampled images can be read" in fails(capsys, classifier, tmp_path / "bad", "--output", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_what_is_no_fine_tuned_run_is_refused(
    classifier: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main([*QUICKEST, "--epochs", "1", "--output", str(tmp_path / "pretrained")]) == 0
    capsys.readouterr()
    assert "has no best.safetensors" in fails(capsys, tmp_path / "pretrained", images)
    assert "cannot be read as weights" in fails(capsys, tmp_path / "pretrained" / "checkpoints" / "last.pt", images)
    whole = (classifier / "best.safetensors").read_bytes()
    (tmp_path / "best.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as weights" in fails(capsys, tmp_path, images)
    assert "not finite" in fails(capsys, write_classifier(tmp_path / "nan", value=float("nan")), images)
    assert "--score is for detection" in fails(capsys, classifier, images, "--score", 0.5)
    assert "--annotations is for detection" in fails(capsys, classifier, images, "--annotations", tmp_path / "val.json")
    assert "IMAGES nothing is not a folder and matches no file" in fails(capsys, classifier, "nothing")


def test_annotations_must_fit_the_images(
    detector: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((scenes / "val.json").read_text())
    images, path = content["images"], tmp_path / "some.json"

    def listed(entries: list[dict[str, Any]]) -> list[object]:
        path.write_text(json.dumps({"images": entries}))
        return [detector, scenes / "val", "--annotations", path, "--output", tmp_path / "out"]

    assert "names none of the 8 images" in fails(capsys, *listed([images[0] | {"file_name": "other.png"}]))
    assert "two images with one file_name or id" in fails(capsys, *listed([images[0], images[1] | {"id": 100}]))
    twice = listed([images[0] | {"file_name": "0.png"}])
    assert "are the same image 100" in fails(capsys, *twice[:2], scenes / "pixels" / "val", *twice[2:])
    resized = [images[0] | {"width": 65}, {"id": 5, "file_name": "2.png"}]  # another size, and none
    assert main([*map(str, listed(resized)), "--workers", "0", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "is 64 x 72, and its annotations are for 65 x 72" in shown.err
    assert "left out: images that some.json does not name: 6, such as deeper/1.png" in shown.out
    assert [image["id"] for image in json.loads((tmp_path / "out" / "images.json").read_text())["images"]] == [5]


def test_only_earlier_predictions_are_replaced(
    segmenter: Path, classifier: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    predict(segmenter, images, output=out, **HERE)
    (out / "mine.txt").write_text("mine")
    assert "pass --overwrite" in fails(capsys, classifier, images, "--output", out)
    predict(classifier, images, output=out, overwrite=True, pictures=0, **HERE)
    assert {path.name for path in out.iterdir()} == {"mine.txt", "predict.json", "predictions.csv"}
    other = make_images(tmp_path / "other")
    assert "holds other files" in fails(capsys, classifier, images, "--output", other, "--overwrite")
    assert len([*other.rglob("*.png")]) == 6


def test_after_ctrl_c_the_files_have_the_images_so_far(
    classifier: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write: Callable[..., list[str]] = predicting.Classes.entries

    def interrupted(task: Any, number: int, result: Any) -> list[str]:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return write(task, number, result)

    monkeypatch.setattr(predicting.Classes, "entries", interrupted)
    words = [str(classifier), str(images), "--output", str(tmp_path), "--batch-size", "1", "--workers", "0", "--device", "cpu"]
    assert main(words) == 130
    assert "stopped by SIGINT before the last image" in capsys.readouterr().err
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert len([*csv.DictReader(file)]) == 3
    about = json.loads((tmp_path / "predict.json").read_text())
    assert not about["finished"] and about["num_predicted"] == 3 and not [*tmp_path.glob("*.writing")]


def run_printed(
    run: Path, image: Image.Image, folder: Path, capsys: pytest.CaptureFixture[str], *more: object
) -> dict[str, Any]:
    """What the code that the export prints leaves behind for an image."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    image.save(folder / "photo.png")
    capsys.readouterr()
    assert export.main([str(run), "--to", "onnx", "--output", str(folder / "network.onnx"), *map(str, more)]) == 0
    names: dict[str, Any] = {}
    exec(capsys.readouterr().out.partition("run it:")[2].replace("photo.jpg", str(folder / "photo.png")), names)
    return names


def test_the_onnx_file_of_a_detector_finds_the_same(
    detector: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(scenes / "val" / "deeper" / "2.png") as opened:
        image = opened.crop((0, 0, 64, 64))
    found = run_printed(detector, image, tmp_path, capsys, "--images", scenes / "val")
    rows = predict(detector, tmp_path / "photo.png", output=tmp_path / "out", **HERE).rows
    x, y, width, height = np.array([row["bbox"] for row in rows]).T
    assert len(rows) > 3 and [*CATEGORIES] == json.loads(found["session"].get_modelmeta().custom_metadata_map["category_ids"])
    np.testing.assert_allclose(found["boxes"], np.stack([x, y, x + width, y + height], 1), atol=0.01)
    np.testing.assert_allclose(found["scores"], [row["score"] for row in rows], atol=1e-4)
    assert [[*CATEGORIES][label] for label in found["labels"]] == [row["category_id"] for row in rows]
    assert found["masks"].shape == (len(rows), 28, 28)


def test_the_onnx_file_of_a_segmenter_gives_the_same_mask(
    segmenter: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(scenes / "val" / "deeper" / "2.png") as opened:
        image = opened.crop((0, 0, 64, 64))
    found = run_printed(segmenter, image, tmp_path, capsys)
    (row,) = predict(segmenter, tmp_path / "photo.png", output=tmp_path / "out", **HERE).rows
    mask = np.asarray(Image.open(tmp_path / "out" / row["mask"]))
    assert (found["labels"] == mask).mean() > 0.999 and len(np.unique(mask)) > 1


def test_the_onnx_file_of_a_classifier_gives_the_same_scores(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    found = run_printed(classifier, Image.fromarray(noise).resize((600, 400)), tmp_path, capsys)
    assert capsys.readouterr().out.strip() == "b"
    row = predict(classifier, tmp_path / "photo.png", output=tmp_path / "out", **HERE).rows[0]
    assert row["class"] == "b"
    logits = torch.from_numpy(found["logits"][0])
    order = ["abc".index(row[name][0]) for name in ("class", "class_2", "class_3")]
    expected = torch.tensor([float(row[name]) for name in ("score", "score_2", "score_3")])
    torch.testing.assert_close(logits.softmax(0)[order], expected, rtol=0.02, atol=1e-5)


def test_what_cannot_be_an_onnx_file_is_refused(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> str:
        assert export.main([*map(str, words)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    (tmp_path / "last.pt").touch()
    assert "fine-tune a pretraining checkpoint first" in refused(tmp_path / "last.pt", "--to", "onnx")
    assert "fine-tune a pretraining checkpoint first" in refused(tmp_path, "--to", "onnx")
    assert "the suffix must be .onnx" in refused(classifier, "--to", "onnx", "--output", tmp_path / "a.pth")
    assert "--no-verify is not for --to onnx" in refused(classifier, "--to", "onnx", "--no-verify")
    assert "--images: " in refused(classifier, "--to", "onnx", "--images", write_broken(tmp_path / "broken.png"))
    assert not [*tmp_path.glob("*.onnx")]


def write_broken(path: Path) -> Path:
    path.write_bytes(b"no image")
    return path
