"""Annotations of COCO, YOLO and Pascal VOC: what is read, left out, counted and refused. Expected numbers are written by hand,
or come from pycocotools."""

import io
import json
import random
import zlib
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparkme.data.annotations import IGNORED, Annotated, find_annotated, find_segmented
from sparkme.data.annotations.base import MAX_FACTOR
from sparkme.data.annotations.coco import read_coco, unpacked
from sparkme.data.annotations.voc import read_voc
from sparkme.data.annotations.yolo import read_data_yaml, read_yolo
from sparkme.errors import UserError

mask_tools = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
WIDTH, HEIGHT = 20, 10


def picture(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), orientation: int | None = None) -> Path:
    """A file whose left upper quarter is red, so that a turn is seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (0, zlib.crc32(path.stem.encode()) % 250, 255))  # no two are copies
    image.paste("red", (0, 0, size[0] // 2, size[1] // 2))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)
    return path


def entry(id_: int, image: int, category: int, box: Iterable[Any], **more: Any) -> dict[str, Any]:
    return {"id": id_, "image_id": image, "category_id": category, "bbox": [*box], **more}


def coco_file(folder: Path, annotations: list[Any], count: int = 2, /, **changes: Any) -> Path:
    """COCO's JSON of some pictures of 20 x 10: image 10 is 0.jpg, image 11 is 1.jpg; categories 3 and 90."""
    for i in range(count):
        picture(folder / "train2017" / f"{i}.jpg")
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(count)],
        "annotations": annotations,
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
    } | changes
    path = folder / "annotations" / "instances_train2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def boxes_of(data: Annotated) -> list[list[list[float]]]:
    return [data.objects(i).boxes.tolist() for i in range(len(data))]


def test_coco_boxes_are_edges_and_labels_count_from_0(tmp_path: Path) -> None:
    good = entry(1, 11, 90, [1, 2, 3.5, 4], area=7.25, iscrowd=0)
    crowd = entry(2, 11, 3, [0, 0, 5, 5], iscrowd=1)
    data = read_coco(coco_file(tmp_path, [good, crowd]))
    assert data.classes == ["car", "toothbrush"] and data.category_ids == [3, 90]
    assert data.image_ids.tolist() == [10, 11] and data.sizes.tolist() == [[HEIGHT, WIDTH]] * 2
    assert boxes_of(data) == [[], [[1, 2, 4.5, 6], [0, 0, 5, 5]]]
    objects = data.objects(1)
    assert objects.labels.tolist() == [1, 0] and objects.crowd.tolist() == [False, True]
    assert objects.areas.tolist() == [7.25, 25]
    assert (objects.boxes.dtype, objects.labels.dtype, objects.areas.dtype) == (torch.float32, torch.int64, torch.float64)
    assert not data.has_masks and not data.notes and objects.masks(HEIGHT, WIDTH).sum() == 0
    assert len(data.objects(0)) == 0 and data.objects(0).boxes.shape == (0, 4)
    assert data.presence().tolist() == [[False, False], [False, True]] and data.class_counts().tolist() == [0, 1]


def test_what_coco_leaves_out_is_counted_once_and_named(tmp_path: Path) -> None:
    annotations = [
        entry(1, 10, 3, [-5, 8, 10, 10]),  # cut
        entry(2, 10, 3, [1, 1, 0, 5]),
        entry(3, 10, 3, [1, 1, 5, -2]),
        entry(4, 10, 3, [25, 1, 5, 5]),
        entry(5, 10, 3, [float("nan"), 1, 5, 5]),
        entry(6, 10, 3, [0, 1, float("inf"), 5]),
        entry(7, 99, 3, [1, 1, 5, 5]),
        entry(8, 10, 4, [1, 1, 5, 5]),
        entry(9, 12, 3, [1, 1, 5, 5]),  # whose image is missing
    ]
    images = [{"id": 10 + i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(3)]
    path = coco_file(tmp_path, annotations, images=images)
    data = read_coco(path)
    assert boxes_of(data) == [[[0, 8, 5, 10]], []]
    where = f"{path}: annotations"
    assert data.notes == [
        f"left out: images of {path.name} that are not in {tmp_path / 'train2017'}: 1, such as 2.jpg",
        f"left out: annotations of images that the file does not list: 1, such as {where}[6] (id 7)",
        f"left out: annotations of categories that the file does not list: 1, such as {where}[7] (id 8)",
        f"left out: boxes with numbers that are NaN or infinite: 2, such as {where}[4] (id 5)",
        f"left out: boxes without an area inside their image: 3, such as {where}[1] (id 2)",
        f"boxes cut at the edge of their image: 1, such as {where}[0] (id 1)",
    ]


def star(rng: random.Random, digits: int) -> list[float]:
    points = rng.randrange(3, 9)
    return [round(rng.uniform(-0.2, 1.2) * side, digits) for _ in range(points) for side in (57, 43)]


@pytest.mark.parametrize("digits", [0, 1, 2, 9])
def test_coco_masks_are_those_of_pycocotools(tmp_path: Path, digits: int) -> None:
    from pycocotools.coco import COCO

    rng = random.Random(digits)
    annotations = []
    for i in range(60):
        if i % 3:
            segmentation: Any = [star(rng, digits) for _ in range(rng.randrange(1, 4))]
        else:
            mask = np.asfortranarray(np.random.default_rng(i).random((43, 57)) < rng.random(), np.uint8)
            packed = mask_tools.encode(mask)
            packed["counts"] = packed["counts"].decode()
            flat = mask.ravel(order="F")
            edges = np.flatnonzero(np.diff(flat)) + 1
            runs = np.diff([0, *edges, flat.size]).tolist()
            plain = {"size": [43, 57], "counts": [0, *runs] if flat[0] else runs}
            segmentation = packed if i % 2 else plain
        annotations.append(entry(i + 1, 10, 3, [1, 1, 30, 30], area=5.0, iscrowd=int(i % 3 == 0), segmentation=segmentation))
    path = coco_file(tmp_path, annotations, 1, images=[{"id": 10, "file_name": "0.jpg", "height": 43, "width": 57}])
    data = read_coco(path)
    with redirect_stdout(io.StringIO()):
        reference = COCO(str(path))
    masks = data.objects(0).masks(43, 57)
    assert data.has_masks and masks.dtype == torch.uint8 and masks.shape == (60, 43, 57) and masks.any()
    for mask, annotation in zip(masks.numpy(), reference.loadAnns(range(1, 61))):
        assert np.array_equal(mask, reference.annToMask(annotation)), annotation["id"]
    outlines = data.table.outlines
    assert outlines is not None and outlines.polygons.values.dtype == (np.float64 if digits == 9 else np.int32)
    assert data.objects(0).has_mask.all()


def test_packed_runs_are_those_of_pycocotools() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        mask = np.asfortranarray(rng.random((rng.integers(1, 400), rng.integers(1, 30))) < rng.random(), np.uint8)
        runs = unpacked(mask_tools.encode(mask)["counts"].decode())
        assert runs is not None
        assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), mask.ravel(order="F"))
    assert all(unpacked(text) is None for text in ("", "P", "é", "\x00", "oooooooooo0", "abc~~"))


def test_a_polygon_without_three_points_is_left_out_and_its_box_stays(tmp_path: Path) -> None:
    annotations = [
        entry(1, 10, 3, [1, 1, 5, 5], segmentation=[[1, 1, 5, 5], [1, 1, 6, 1, 6, 6, 3]]),
        entry(2, 10, 3, [1, 1, 5, 5], segmentation=[[1, 1, 6, 1, 6, 6]]),
        entry(3, 10, 3, [1, 1, 5, 5], segmentation=[]),
    ]
    data = read_coco(coco_file(tmp_path, annotations))
    objects = data.objects(0)
    assert objects.has_mask.tolist() == [False, True, False] and len(objects) == 3
    assert objects.masks(HEIGHT, WIDTH).flatten(1).any(1).tolist() == [False, True, False]
    assert [note.partition(", such as")[0] for note in data.notes] == [
        "left out: polygons of fewer than three points, or half a point: 2",
        "objects without a mask: 2",
    ]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("recorded", ["raw", "upright"])
def test_an_image_is_held_as_the_file_has_recorded_it(tmp_path: Path, orientation: int, recorded: str) -> None:
    lies = orientation in (6, 8)
    width, height = (HEIGHT, WIDTH) if recorded == "upright" and lies else (WIDTH, HEIGHT)
    images = [{"id": 10, "file_name": "0.jpg", "height": height, "width": width}]
    path = coco_file(tmp_path, [entry(1, 10, 3, [0, 0, 5, 5])], 0, images=images)
    file = picture(tmp_path / "train2017" / "0.jpg", orientation=orientation)
    data = read_coco(path)
    image = data.load(0)
    assert isinstance(image, Image.Image) and image.size == (width, height)
    assert data.upright(0) == (recorded == "upright" and lies)
    red = (0, 0)  # the corner of the file as it is stored
    if recorded == "upright" and lies:
        red = {6: (width - 1, 0), 8: (0, height - 1)}[orientation]
    assert image.getpixel(red)[0] > 200 > image.getpixel((width - 1 - red[0], height - 1 - red[1]))[0]  # type: ignore[index]
    file.unlink()
    picture(file, (7, 5))
    with pytest.raises(OSError, match=rf"0.jpg is 7 x 5, and its annotations are for {width} x {height}"):
        data.load(0)


def test_a_size_that_is_not_recorded_is_that_of_the_file(tmp_path: Path) -> None:
    picture(tmp_path / "train2017" / "0.jpg", orientation=6)
    path = coco_file(tmp_path, [entry(1, 10, 3, [0, 0, 15, 5])], 0, images=[{"id": 10, "file_name": "0.jpg"}])
    data = read_coco(path)
    assert data.sizes.tolist() == [[HEIGHT, WIDTH]] and data.load(0).size == (WIDTH, HEIGHT)  # type: ignore[union-attr]


def test_masks_of_crowds_alone_are_none_to_learn_from(tmp_path: Path) -> None:
    crowd = entry(1, 10, 3, [1, 1, 5, 5], iscrowd=1, segmentation={"size": [10, 20], "counts": [50, 20, 130]})
    data = read_coco(coco_file(tmp_path, [crowd, entry(2, 10, 3, [1, 1, 5, 5])]))
    assert not data.has_masks and data.objects(0).segmentations is None and not data.notes


def test_subsets_and_shots_share_the_boxes(tmp_path: Path) -> None:
    annotations = [entry(i + 1, 10 + i % 8, (3, 90)[i % 3 == 0], [1, 1, 1 + i / 10, 5], iscrowd=int(i == 6)) for i in range(16)]
    data = read_coco(coco_file(tmp_path, annotations, 8))
    part = data.subset(torch.tensor([5, 0]))
    assert part.table is data.table and part.image_ids.tolist() == [15, 10]
    for place, number in enumerate((5, 0)):
        assert torch.equal(part.objects(place).boxes, data.objects(number).boxes)
        assert part.images.name(place) == data.images.name(number)
    again = part.subset(torch.tensor([1]))
    assert torch.equal(again.objects(0).boxes, data.objects(0).boxes)
    assert torch.equal(part.presence(), data.presence()[[5, 0]])
    for count in (1, 2, 3):
        few = data.shots(count, seed=4)
        assert bool((few.presence().sum(0) >= count).all()) and len(few) <= 2 * count
        assert data.draw(count, 4).tolist() == data.draw(count, 4).tolist()
    assert len({tuple(data.draw(1, seed).tolist()) for seed in range(9)}) > 2
    with pytest.raises(UserError, match=r"--shots 7: class 'toothbrush' is in 5 training images"):
        data.shots(7, seed=0)


def test_the_truth_for_the_evaluation_is_the_file_s(tmp_path: Path) -> None:
    """Perfect predictions have an AP of 1 in COCOeval, for boxes and masks."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        entry(i + 1, 10 + i % 3, (3, 90)[i % 2], [i, 1, 6, 8], area=40, segmentation=[[i, 1, i + 6, 1, i + 6, 9, i, 9]])
        for i in range(6)
    ]
    crowd = entry(7, 10, 3, [0, 0, 20, 10], iscrowd=1, segmentation={"size": [10, 20], "counts": [0, 200]})
    data = read_coco(coco_file(tmp_path, [*annotations, crowd], 3))
    truth = data.to_coco(masks=True)
    assert truth["categories"] == [{"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
    assert [image["id"] for image in truth["images"]] == [10, 11, 12] and truth["annotations"][0]["id"] == 1
    with redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        keys = ("image_id", "category_id", "bbox", "segmentation")
        results = [{key: a[key] for key in keys} | {"score": 0.9} for a in annotations]
        for kind in ("bbox", "segm"):
            given = [
                result | {"segmentation": mask_tools.merge(mask_tools.frPyObjects(result["segmentation"], 10, 20))}
                for result in results
            ]
            measured = COCOeval(reference, reference.loadRes(given), kind)
            measured.evaluate()
            measured.accumulate()
            measured.summarize()
            assert measured.stats[0] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": {}}, r"annotations is an object of 0, and must be a list"),
        ({"annotations": [5]}, r"annotations\[0\] is the number 5, and must be an object"),
        ({"images": []}, r"has no images"),
        ({"categories": []}, r"has no categories"),
        ({"categories": [{"id": 3, "name": "a"}] * 2}, r"categories\[1\] has the id 3 of another category"),
        ({"categories": [{"id": 3}]}, r"categories\[0\]: name is missing"),
        ({"images": [{"id": "10", "file_name": "0.jpg"}]}, r"images\[0\]: id is the text '10', and must be a whole number"),
        ({"images": [{"id": True, "file_name": "0.jpg"}]}, r"images\[0\]: id is true"),
        ({"images": [{"id": -1, "file_name": "0.jpg"}]}, r"images\[0\]: id is -1"),
        ({"images": [{"id": 1, "file_name": "../0.jpg"}]}, r"is outside the folder of images"),
        ({"images": [{"id": 1, "file_name": "0.jpg", "height": 2**31, "width": 2**31}]}, r"raise --max-pixels"),
        ({"images": [{"id": 1, "file_name": "nothing.jpg"}]}, r"names the image 'nothing.jpg', which is in none of"),
        ({"images": [{"id": 1, "file_name": "0.jpg"}] * 2}, r"images\[1\] has the id 1, as images\[0\]"),
        (
            {"annotations": [entry(5, 10, 3, [1, 2, 3])]},
            r"annotations\[0\] \(id 5\): bbox is a list of 3, and must be four numbers",
        ),
        ({"annotations": [entry(5, 10, 3, [1, 2, 3, True])]}, r"bbox\[3\] is true, and must be a number"),
        ({"annotations": [entry(5, 10, 3, [1, 2, 3, "4"])]}, r"bbox\[3\] is the text '4'"),
        ({"annotations": [entry(5, 10, 3, [1, 2, 3, 10**400])]}, r"that is too large"),
        ({"annotations": [{"id": 5, "image_id": 10, "category_id": 3}]}, r"\(id 5\): bbox is missing"),
        ({"annotations": [{"id": 5, "image_id": 10}]}, r"category_id is missing"),
        ({"annotations": [entry(5, 10, 3, [1, 2, 3, 4], iscrowd=2)]}, r"iscrowd is the number 2"),
        ({"annotations": [entry(5, 10, 3, [1, 2, 3, 4], area="x")]}, r"area is the text 'x'"),
        ({"annotations": [entry(5, 10, 3, [1, 2, 3, 4], segmentation=[1, 2, 3, 4, 5, 6])]}, r"write a list of polygons"),
        (
            {"annotations": [entry(5, 10, 3, [1, 2, 3, 4], segmentation=[[1, 2, 3, 4, 5, 20.5 * (MAX_FACTOR + 1)]])]},
            r"\(id 5\): its segmentation reaches 225.5 pixels, and the image has 20",
        ),
        (
            {"annotations": [entry(5, 10, 3, [1, 2, 3, 4], segmentation=[[0, 0, 20, 0] * 60_000])]},
            r"\(id 5\): its segmentation is millions of pixels long",
        ),
        (
            {"annotations": [entry(5, 10, 3, [1, 2, 3, 4], segmentation={"size": [10, 21], "counts": [210]})]},
            r"segmentation.size is \[10, 21\], and its image is \[10, 20\]",
        ),
        (
            {"annotations": [entry(5, 10, 3, [1, 2, 3, 4], segmentation={"size": [2**31 - 1] * 2, "counts": [2**40]})]},
            r"segmentation.counts are not runs of",
        ),
        (
            {"annotations": [entry(5, 10, 3, [1, 2, 3, 4], segmentation={"size": [10, 20], "counts": "zz"})]},
            r"segmentation.counts are not runs of 200 pixels",
        ),
    ],
)
def test_a_bad_entry_of_coco_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = coco_file(tmp_path, [], **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_coco(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read as JSON"),
        (b"[]", "is a list, as a file of results"),
        (b'{"images": [{"id": 1', r"cannot be read as JSON in images\[0\].*it may be cut off"),
        (b'{"annotations": ' + b"[" * 100_000, r"nested too deeply in annotations\[0\]"),
        (b'{"info": ' + b'{"a":' * 100_000, "nested too deeply in info"),
        (b'{"annotations": [' + b"9" * 5000 + b"]}", r"cannot be read as JSON in annotations\[0\]: Exceeds the limit"),
        (b'{"images": [], "images": []}', "has images twice"),
        (b'{"images": []} x', "Extra data"),
        (b"\xff\xfe{\x00\xff", "begins as UTF-16, but is damaged"),
    ],
)
def test_what_is_no_json_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_coco(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_texts_of_other_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    path = coco_file(tmp_path, [entry(1, 10, 7, [1, 1, 5, 5])], categories=[{"id": 7, "name": "Käfer"}])
    path.write_bytes(json.dumps(json.loads(path.read_text()), ensure_ascii=False).encode(encoding))
    data = read_coco(path)
    assert data.classes == ["Käfer"] and boxes_of(data) == [[[1, 1, 6, 6]], []]
    assert bool(data.notes) == (encoding == "cp1252")


def test_images_and_annotations_may_be_in_any_order(tmp_path: Path) -> None:
    ids = [7, 2**40, 0, 5]
    images = [{"id": id_, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i, id_ in enumerate(ids)]
    annotations = [entry(i, id_, 3, [ids.index(id_), 0, 1 + i, 5]) for i, id_ in enumerate([5, 7, 0, 2**40, 7, 5])]
    data = read_coco(coco_file(tmp_path, annotations, 4, images=images))
    assert data.image_ids.tolist() == ids
    assert boxes_of(data) == [[[0, 0, 2, 5], [0, 0, 5, 5]], [[1, 0, 5, 5]], [[2, 0, 5, 5]], [[3, 0, 4, 5], [3, 0, 9, 5]]]
    assert [Path(data.images.name(i)).name for i in range(4)] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


def test_names_that_windows_wrote_are_found(tmp_path: Path) -> None:
    images = [{"id": 10, "file_name": "train2017\\0.jpg", "height": HEIGHT, "width": WIDTH}]
    data = read_coco(coco_file(tmp_path, [entry(1, 10, 3, [1, 1, 5, 5])], images=images))
    assert len(data) == 1 and data.notes == ["names of images with \\ instead of /: 1, such as train2017\\0.jpg"]


def test_names_that_two_categories_have_are_told_apart(tmp_path: Path) -> None:
    categories = [{"id": 7, "name": "bat"}, {"id": 2, "name": "bat"}, {"id": 5, "name": "cat"}]
    data = read_coco(coco_file(tmp_path, [entry(1, 10, 7, [1, 1, 5, 5])], categories=categories))
    assert data.classes == ["bat (2)", "cat", "bat (7)"] and "several classes have" in data.notes[0]


def test_a_folder_as_roboflow_has_it_and_a_config_beside(tmp_path: Path) -> None:
    path = coco_file(tmp_path / "x", [entry(1, 10, 3, [1, 1, 5, 5])])
    (tmp_path / "config.yaml").write_text("a: 1\n")
    for part in ("train", "valid"):
        for i in range(2):
            picture(tmp_path / part / f"{i}.jpg")
        (tmp_path / part / "_annotations.coco.json").write_text(path.read_text())
    split = find_annotated(tmp_path)
    assert split.train.images.name(0) == str(tmp_path / "train" / "0.jpg")
    assert split.val.images.name(0) == str(tmp_path / "valid" / "0.jpg")


def test_a_folder_as_coco_has_it(tmp_path: Path) -> None:
    path = coco_file(tmp_path, [entry(1, 10, 3, [1, 1, 5, 5])])
    val = path.with_name("instances_val2017.json")
    content = json.loads(path.read_text())
    for i in range(2):
        picture(tmp_path / "val2017" / f"{i}.jpg")
    val.write_text(json.dumps(content | {"categories": [{"id": 3, "name": "car"}, {"id": 8, "name": "unused"}]}))
    split = find_annotated(tmp_path)
    assert split.train.images.name(0) == str(tmp_path / "train2017" / "0.jpg")
    assert split.val.images.name(0) == str(tmp_path / "val2017" / "0.jpg")
    assert split.val.classes == split.train.classes == ["car", "toothbrush"] and "instances_val2017.json" in split.note
    given = find_annotated(train=path, val=val, root=tmp_path / "val2017")
    assert given.train.images.name(0) == str(tmp_path / "val2017" / "0.jpg")
    val.write_text(json.dumps(content | {"categories": [{"id": 3, "name": "truck"}]}))
    with pytest.raises(UserError, match="has the category 3 'truck', which is 'car' in the training data"):
        find_annotated(tmp_path)
    val.write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(UserError, match="none of the 2 validation images has an object"):
        find_annotated(tmp_path)


def test_without_a_split_a_part_of_each_class_is_drawn_and_copies_stay_together(tmp_path: Path) -> None:
    annotations = [entry(i + 1, 10 + i, (3, 90)[i % 2], [1, 1, 5, 5]) for i in range(20)]
    path = coco_file(tmp_path, annotations, 22)
    for i in range(22):  # all are copies but for these
        Image.new("RGB", (WIDTH, HEIGHT), (10 * i, 0, 50)).save(tmp_path / "train2017" / f"{i}.jpg")
    (tmp_path / "train2017" / "1.jpg").write_bytes((tmp_path / "train2017" / "0.jpg").read_bytes())
    for seed in range(4):
        split = find_annotated(path, seed=seed)
        ids = {*split.train.image_ids.tolist()}, {*split.val.image_ids.tolist()}
        assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 22
        assert split.train.class_counts().tolist() == [8, 8] or 10 in ids[1]
        assert bool((split.val.class_counts() >= 2).all()) and (10 in ids[0]) == (11 in ids[0])
        assert f"seed {seed}" in split.note and "1 images are copies of others" in split.note
    assert split.val.table is split.train.table


# YOLO


def yolo_set(folder: Path, labels: dict[str, str | None], yaml: str = "train: images/train\nnames: [cat, dog]\n") -> Path:
    """data.yaml, pictures of 20 x 10, and labels; None is an image without a file of labels."""
    for name, text in labels.items():
        picture(folder / "images" / f"{name}.jpg")
        label = folder / "labels" / f"{name}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            label.write_text(text)
    path = folder / "data.yaml"
    path.write_text(yaml)
    return path


def read_train(path: Path) -> Annotated:
    data = read_data_yaml(path)
    return read_yolo(data, data.train)


def test_yolo_boxes_polygons_and_backgrounds(tmp_path: Path) -> None:
    labels = {
        "train/a": "1 0.5 0.5 0.5 0.4\n\n0 0.25 0.5 0.5 1.0\n",
        "train/b": None,
        "train/c": "",
        "train/d": "0 0.1 0.2 0.5 0.2 0.5 0.8\n1.0 0.5 0.5 0.2 0.2\n0 0.1 0.2 0.5 0.2 0.5 0.8\n",
    }
    data = read_train(yolo_set(tmp_path, labels))
    found = boxes_of(data)
    assert [len(boxes) for boxes in found] == [2, 0, 0, 2] and data.classes == ["cat", "dog"]
    assert np.allclose(found[0], [[5, 3, 15, 7], [0, 0, 10, 10]]) and np.allclose(found[3], [[2, 2, 10, 8], [8, 4, 12, 6]])
    assert data.objects(0).labels.tolist() == [1, 0] and data.objects(3).labels.tolist() == [0, 1]
    assert data.has_masks and data.objects(3).has_mask.tolist() == [True, False]
    expected = mask_tools.decode(mask_tools.frPyObjects([[2, 2, 10, 2, 10, 8]], 10, 20))[..., 0]
    assert np.array_equal(data.objects(3).masks(10, 20)[0], expected)
    notes = " | ".join(data.notes)
    assert "repeated lines of labels: 1" in notes and f"{tmp_path}/labels/train/d.txt: line 3" in notes
    assert "objects without a mask: 3" in notes
    assert data.category_ids == [0, 1] and data.image_ids.tolist() == [1, 2, 3, 4]


def test_yolo_images_are_turned(tmp_path: Path) -> None:
    path = yolo_set(tmp_path, {"train/a": "0 0.25 0.75 0.5 0.5\n"})
    picture(tmp_path / "images" / "train" / "a.jpg", orientation=6)
    data = read_train(path)
    assert data.sizes.tolist() == [[WIDTH, HEIGHT]] and boxes_of(data) == [[[0, 10, 5, 20]]] and data.upright(0)
    assert data.load(0).size == (HEIGHT, WIDTH)  # type: ignore[union-attr]


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_yolo_images_whose_size_stays_are_turned_too(tmp_path: Path, orientation: int) -> None:
    path = yolo_set(tmp_path, {"train/a": "0 0.25 0.75 0.5 0.5\n"})
    picture(tmp_path / "images" / "train" / "a.jpg", orientation=orientation)
    red = {1: (0, 0), 2: (WIDTH - 1, 0), 3: (WIDTH - 1, HEIGHT - 1), 4: (0, HEIGHT - 1)}[orientation]
    assert read_train(path).load(0).getpixel(red)[0] > 200  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    "yaml, classes",
    [
        ("train: images/train\nnames: [no, 'yes', 7]\n", ["no", "yes", "7"]),
        ("train: images/train\nnames:\n  1: b\n  0: a\n", ["a", "b"]),
        ("path: ../set\ntrain: [images/train]\nnc: 2\n", ["class_0", "class_1"]),
        ("path: nowhere\ntrain: ../images/train\nnames: [a, a]\n", ["a (0)", "a (1)"]),
        ("train: list.txt\nnames: [a]\n", ["a"]),
    ],
)
def test_ways_to_write_a_data_yaml(tmp_path: Path, yaml: str, classes: list[str]) -> None:
    path = yolo_set(tmp_path / "set", {"train/a": "0 0.5 0.5 0.5 0.4\n"}, yaml)
    (tmp_path / "set" / "list.txt").write_text("./images/train/a.jpg\n./images/train/missing.jpg\n\nfolder\n")
    data = read_train(path)
    assert data.classes == classes and len(data) == 1 and np.allclose(boxes_of(data), [[[5, 3, 15, 7]]])
    assert any("images of list.txt that do not exist: 1" in note for note in data.notes) == ("list" in yaml)
    assert any("lines of list.txt that do not name an image: 1" in note for note in data.notes) == ("list" in yaml)


def test_yolo_labels_are_beside_the_last_images_and_names_of_lists_below_the_root_or_the_list(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "set"
    path = yolo_set(folder, {"a": "0 0.5 0.5 0.5 0.4\n", "b": "1 0.5 0.5 0.5 0.4\n"}, "train: [x/list.txt]\nnames: [a, b]\n")
    picture(folder / "x" / "images" / "c.jpg")
    (folder / "x" / "list.txt").write_text(f"images/a.jpg\n{folder}/images/b.jpg\nimages/c.jpg\n")
    data = read_train(path)
    assert [len(data.objects(i)) for i in range(3)] == [1, 1, 0] and data.images.name(2).endswith("x/images/c.jpg")


def test_yolo_splits_are_those_of_the_yaml_or_drawn(tmp_path: Path) -> None:
    labels = {f"{part}/{i}": f"{i % 2} 0.5 0.5 0.{i + 1} 0.4\n" for part in ("train", "val") for i in range(6)}
    path = yolo_set(tmp_path, labels, "train: images/train\nval: images/val\nnames: [a, b]\n")
    split = find_annotated(tmp_path)
    assert len(split.train) == len(split.val) == 6 and "images/val" in split.val.images.name(0)
    path.write_text("train: images\nnames: [a, b]\n")
    for i in range(6):
        Image.new("RGB", (WIDTH, HEIGHT), (10 * i, 0, 50)).save(tmp_path / "images" / "train" / f"{i}.jpg")
    drawn = find_annotated(path, seed=1)
    assert len(drawn.train) + len(drawn.val) == 12 and bool((drawn.val.class_counts() >= 1).all())


@pytest.mark.parametrize(
    "line, message",
    [
        ("0 0.5 0.5 0.5", r"line 2 has 4 values"),
        ("0 0.5 0.5 0.5 0.5 0.9", r"line 2 has 6 values"),
        ("0 0.5 0.5 0.5 0.5 0.9 0.9 0.9", r"line 2 has 8 values"),
        ("cat 0.5 0.5 0.5 0.5", r"line 2 has 'cat', which is not a number"),
        ("-1 0.5 0.5 0.5 0.5", r"line 2 begins with -1, which is not the number of a class"),
        ("0.5 0.5 0.5 0.5 0.5", r"line 2 begins with 0.5, which"),
        ("nan 0.5 0.5 0.5 0.5", r"line 2 begins with nan, which"),
        ("0 10 5 5 5", r"line 2 has 10, and must have shares of the image, from 0 to 1"),
    ],
)
def test_a_bad_line_of_yolo_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = yolo_set(tmp_path, {"train/a": f"0 0.5 0.5 0.5 0.5\n{line}\n"})
    with pytest.raises(UserError, match=rf"{tmp_path}/labels/train/a.txt: {message}"):
        read_train(path)


def test_what_yolo_leaves_out_is_counted(tmp_path: Path) -> None:
    text = "0 0.5 0.5 nan 0.5\n7 0.5 0.5 0.5 0.5\n0 0.5 0.5 0 0.5\n0 0.5 0.5 1.01 1\n"
    path = yolo_set(tmp_path, {"train/a": text, "train/broken": "0 0.5 0.5 0.5 0.5\n"})
    (tmp_path / "images" / "train" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    data = read_train(path)
    assert boxes_of(data) == [[[0, 0, 20, 10]]]
    assert [note.partition(", such as")[0] for note in data.notes] == [
        "left out: objects of classes that data.yaml does not name: 1",
        "left out: images that cannot be read: 1",
        "left out: boxes with numbers that are NaN or infinite: 1",
        "left out: boxes without an area inside their image: 1",
        "boxes cut at the edge of their image: 1",
    ]


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("- a", "has no lines such as"),
        ("train: images/train\n", "has neither names nor nc"),
        ("train: images/train\nnames: [[a]]\n", "names must be a list of texts"),
        ("train: images/train\nnames: {0: a, 2: b}\n", "must be 0 to 1, each once"),
        ("train: images/train\nnames: [a]\nnc: 2\n", "nc is 2, and names has 1"),
        ("train: images/train\nnc: -2\n", "nc is -2, and must be the number of classes"),
        ("train: nowhere\nnames: [a]\n", "train is nowhere, but .* does not exist"),
        ("train: {}\nnames: [a]\nval: {a: b}\n", "train is"),
        ("names: &a [*a]\ntrain: images/train\n", "cannot be read as YAML"),
        ("train: [" + "[" * 3000, "cannot be read as YAML"),
        ("kpt_shape: [17, 3]\nnames: [a]\n", "has key points"),
        ("names: [a\n", "cannot be read as YAML"),
        ("names: [a]\n", "has no train"),
    ],
)
def test_a_bad_data_yaml_is_one_line(tmp_path: Path, yaml: str, message: str) -> None:
    path = yolo_set(tmp_path, {"train/a": "0 0.5 0.5 0.5 0.5\n"}, yaml)
    with pytest.raises(UserError, match=message) as caught:
        find_annotated(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


# Pascal VOC


def voc_xml(objects: str, size: tuple[int, int] | None = (WIDTH, HEIGHT)) -> str:
    said = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>whatever.jpg</filename>{said}{objects}</annotation>"


def voc_object(name: str, box: tuple[Any, ...], more: str = "") -> str:
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


def voc_set(folder: Path, files: dict[str, str], **sets: str) -> Path:
    for name, text in files.items():
        picture(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text(text)
    for name, text in sets.items():
        (folder / "ImageSets" / "Main").mkdir(exist_ok=True, parents=True)
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    return folder


def test_voc_boxes_count_from_1_and_difficult_ones_are_not_learnt(tmp_path: Path) -> None:
    objects = voc_object("dog", (1, 1, WIDTH, HEIGHT)) + voc_object("cat", (3, 4, 3, 4), "<difficult>1</difficult>")
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    files = {"b": voc_xml(objects), "a": voc_xml(voc_object("dog", ("2.5", 1, 9, 9), part)), "c": voc_xml("")}
    data = read_voc(voc_set(tmp_path, files))
    assert data.classes == ["cat", "dog"] and data.category_ids == [1, 2] and not data.notes
    assert boxes_of(data) == [[[1.5, 0, 9, 9]], [[0, 0, WIDTH, HEIGHT], [2, 3, 3, 4]], []]
    assert data.objects(1).labels.tolist() == [1, 0] and data.objects(1).crowd.tolist() == [False, True]
    assert data.objects(0).labels.tolist() == [1] and data.class_counts().tolist() == [0, 2] and not data.has_masks


def test_voc_sets_name_the_split(tmp_path: Path) -> None:
    files = {name: voc_xml(voc_object("dog", (1, 1, 9, 9))) for name in "abc"}
    folder = voc_set(tmp_path / "VOCdevkit" / "VOC2012", files, train="a\nc 1\n", val="b -1\n")
    split = find_annotated(tmp_path)
    assert [Path(split.train.images.name(i)).name for i in range(2)] == ["a.jpg", "c.jpg"] and len(split.val) == 1
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\nnowhere\n")
    with pytest.raises(UserError, match=r"Annotations has no nowhere.xml, which a list in ImageSets names"):
        find_annotated(tmp_path)


def test_voc_images_are_turned_only_where_the_recorded_size_says_so(tmp_path: Path) -> None:
    files = {
        name: voc_xml(voc_object("dog", (1, 1, 9, 9)), size) for name, size in (("a", (20, 10)), ("b", (10, 20)), ("c", None))
    }
    voc_set(tmp_path, files)
    for name in files:
        picture(tmp_path / "JPEGImages" / f"{name}.jpg", orientation=6)
    data = read_voc(tmp_path)
    assert [data.upright(i) for i in range(3)] == [False, True, False]
    assert [data.load(i).size for i in range(3)] == [(20, 10), (10, 20), (20, 10)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text, message",
    [
        (voc_xml(voc_object("dog", (1, 1, "x", 9))), "a.xml: object 0: xmax is 'x', and must be a number"),
        (voc_xml("<object><name>dog</name></object>"), "a.xml: object 0 has no bndbox"),
        (voc_xml(voc_object("", (1, 1, 9, 9))), "a.xml: object 0 has no name"),
        (voc_xml(voc_object("dog", (1, 1, 9, 9), "<difficult>2</difficult>")), "a.xml: object 0: difficult is 2"),
        (voc_xml("", (20, -4)), "a.xml: size is 20 x -4"),
        (voc_xml("", (10**6, 10**6)), "raise --max-pixels"),
        ("<annotation>", "a.xml cannot be read as XML: no element found"),
        ("<x></x>", "a.xml is <x>, and must be <annotation>"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "declares entities"),
    ],
)
def test_a_bad_file_of_voc_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    voc_set(tmp_path, {"a": text})
    with pytest.raises(UserError, match=message) as caught:
        find_annotated(tmp_path)
    assert "\n" not in str(caught.value)


def test_voc_in_other_encodings(tmp_path: Path) -> None:
    text = voc_xml(voc_object("Käfer", (1, 1, 9, 9)))
    for name, content in (
        ("a", text.encode("latin-1")),
        ("b", text.encode("utf-16")),
        ("c", ('<?xml version="1.0" encoding="ISO-8859-1"?>' + text).encode("latin-1")),
    ):
        voc_set(tmp_path, {name: ""})
        (tmp_path / "Annotations" / f"{name}.xml").write_bytes(content)
    data = read_voc(tmp_path)
    assert data.classes == ["Käfer"] and data.class_counts().tolist() == [3]
    assert ["read as Windows-1252: 1" in note for note in data.notes] == [True]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "pass either --data, or --train FILE.json"),
        ({"data": "nowhere"}, "is neither a folder, nor an existing .json or .yaml file"),
        ({"data": "."}, "has no annotations; it takes COCO's"),
        ({"data": ".", "train": "x.json"}, "pass either"),
        ({"data": ".", "val": "x.json"}, "--val x.json goes with --train"),
        ({"train": "x.yaml"}, "--train x.yaml must be a .json file"),
        ({"train": "x.json"}, "x.json is not a file"),
        ({"data": ".", "root": "nowhere"}, "--root nowhere is not a folder"),
        ({"data": ".", "val_share": 1.0}, "--val-share 1.0 is outside"),
    ],
)
def test_what_is_no_annotated_data_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        find_annotated(**arguments)


def test_without_pycocotools_boxes_and_runs_are_read_and_polygons_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = [
        entry(1, 10, 3, [1, 1, 5, 5], segmentation={"size": [10, 20], "counts": [50, 20, 130]}),
        entry(2, 11, 3, [1, 1, 5, 5], segmentation=[[1, 1, 6, 1, 6, 6]]),
    ]
    data = read_coco(coco_file(tmp_path, annotations))
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    assert data.objects(0).masks(10, 20).sum() == 20
    with pytest.raises(UserError, match=r"pip install 'sparkme\[detection\]'"):
        data.objects(1).masks(10, 20)


# Folders of masks


def mask(path: Path, values: Any, mode: str = "L", size: tuple[int, int] = (4, 2)) -> Path:
    """A file of numbers or colours, row by row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size)
    image.putdata(values)
    if mode == "P":
        image.putpalette([*range(255, -1, -1)] * 3)
    image.save(path)
    return path


def mask_set(folder: Path, masks: dict[str, Any], mode: str = "L", images: str = "images", below: str = "masks") -> Path:
    for name, values in masks.items():
        picture(folder / images / f"{name}.jpg", (4, 2))
        mask(folder / below / f"{name}.png", values, mode)
    return folder


NUMBERS = {f"{i}": [0, 1, 1, 255, 2, 2, 2, i % 2] for i in range(6)}


def test_masks_of_numbers_without_a_file_of_classes(tmp_path: Path) -> None:
    split = find_segmented(mask_set(tmp_path, NUMBERS), seed=3)
    assert split.train.classes == ["0", "1", "2"] and len(split.train) + len(split.val) == 6 and len(split.val) >= 1
    for part in (split.train, split.val):
        for i in range(len(part)):
            name = Path(part.images.name(i)).stem
            labels = part.labels(i)
            assert labels.dtype == torch.uint8 and labels.tolist() == [[0, 1, 1, IGNORED], [2, 2, 2, int(name) % 2]]
            assert part.load(i).size == (4, 2) and Path(part.masks.name(i)).stem == name  # type: ignore[union-attr]
    assert (split.train.pixel_counts + split.val.pixel_counts).tolist() == [9, 15, 18]
    assert "each of 3 numbers in masks is a class" in split.remarks[0]
    assert bool((split.train.shots(2, 0).presence().sum(0) >= 2).all())


@pytest.mark.parametrize("mode", ["P", "I;16", "LA"])
def test_masks_of_other_modes_are_numbers(tmp_path: Path, mode: str) -> None:
    values = [0, 1, 1, 0, 2, 2, 2, 1]
    given: Any = [(v, 255) for v in values] if mode == "LA" else values
    split = find_segmented(mask_set(tmp_path, dict.fromkeys("abc", given), mode), val_share=0.4)
    assert split.train.labels(0).flatten().tolist() == values


def test_numbers_of_more_than_8_bits_are_told_apart(tmp_path: Path) -> None:
    values = [0, 256, 256, 0, 300, 300, 300, 44]
    (tmp_path / "classes.txt").write_text("sky,0\ncow,256\nroad,300\nignore,44\n")
    split = find_segmented(mask_set(tmp_path, dict.fromkeys("abc", values), "I;16"), val_share=0.4)
    assert split.train.labels(0).flatten().tolist() == [0, 1, 1, 0, 2, 2, 2, IGNORED]
    assert split.train.classes == ["sky", "cow", "road"]


def test_masks_of_0_and_255_are_of_two_classes(tmp_path: Path) -> None:
    split = find_segmented(mask_set(tmp_path, dict.fromkeys("abc", [0, 255] * 4)), val_share=0.4)
    assert split.train.labels(0)[0].tolist() == [0, 1, 0, 1] and split.train.classes == ["0", "255"]
    assert "255 is a class" in split.remarks[0]
    with pytest.raises(UserError, match="is in 2 training images"):
        split.train.shots(3, 0)
    ignored = find_segmented(tmp_path, val_share=0.4, ignore_index=0)
    assert ignored.train.classes == ["255"] and ignored.train.labels(0)[0].tolist() == [IGNORED, 0, IGNORED, 0]


@pytest.mark.parametrize(
    "lines, classes, expected",
    [
        ("sky\ncow\nroad\n", ["sky", "cow", "road"], [0, 1, 1, 255, 2]),
        ("road,2\nignore,0\ncow,1\n", ["road", "cow"], [255, 1, 1, 255, 0]),
        ("name,number\nroad;2\nsky\t0\ncow,1\nrest,255\n", ["road", "sky", "cow", "rest"], [1, 2, 2, 3, 0]),
    ],
)
def test_a_file_of_classes_names_numbers(tmp_path: Path, lines: str, classes: list[str], expected: list[int]) -> None:
    file = tmp_path / "list.csv"
    file.write_text(lines)
    split = find_segmented(mask_set(tmp_path, NUMBERS), classes=file)
    assert split.train.classes == classes and split.train.labels(0).flatten().tolist()[:5] == expected


RED, GREEN, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 0)


@pytest.mark.parametrize(
    "lines", [None, "red,#ff0000\ngreen,0,128,0\nignore,0,0,0\n", "name,r,g,b\ngreen,#008000\nred,255,0,0\nx,#000000\n"]
)
def test_masks_of_colours(tmp_path: Path, lines: str | None) -> None:
    if lines:
        (tmp_path / "class_dict.csv").write_text(lines)
    colours = [RED, GREEN, GREEN, BLACK, RED, RED, RED, GREEN]
    split = find_segmented(mask_set(tmp_path, dict.fromkeys("abc", colours), "RGB"), val_share=0.4)
    names = split.train.classes
    found = [names[i] if i < IGNORED else "ignored" for i in split.train.labels(0)[0].tolist()]
    if lines is None:
        assert names == ["#000000", "#008000", "#ff0000"] and found == ["#ff0000", "#008000", "#008000", "#000000"]
    else:
        assert found == ["red", "green", "green", "x" if "x," in lines else "ignored"]


@pytest.mark.parametrize("layout", ["{part}/images {part}/masks", "images/{part} masks/{part}", "img/{part} labels/{part}"])
def test_folders_of_train_and_val(tmp_path: Path, layout: str) -> None:
    for part, count in (("train", 4), ("val", 2)):
        images, masks = layout.format(part=part).split()
        mask_set(tmp_path, {f"sub/{i}": NUMBERS["0"] for i in range(count)}, "L", images, masks)
    split = find_segmented(tmp_path)
    assert (len(split.train), len(split.val)) == (4, 2) and split.train.classes == ["0", "1", "2"]


def test_cityscapes_learns_its_19_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for city in ("aachen", "bonn"):
            stem = f"{part}/{city}/{city}_000001_000019"
            picture(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", (4, 2))
            mask(tmp_path / "gtFine" / f"{stem}_gtFine_labelIds.png", [7, 8, 9, 11, 26, 33, 0, 24])
            mask(tmp_path / "gtFine" / f"{stem}_gtFine_color.png", [RED] * 8, "RGB")
    split = find_segmented(tmp_path)
    assert len(split.train.classes) == 19 and split.train.classes[:3] == ["road", "sidewalk", "building"]
    assert split.train.labels(0).flatten().tolist() == [0, 1, 255, 2, 13, 18, 255, 11] and len(split.val) == 2
    for path in [*(tmp_path / "gtFine").rglob("*_labelIds.png")]:  # made by the data set's own scripts
        mask(path.with_name(path.name.replace("labelIds", "labelTrainIds")), [3, 18, 255, 0, 0, 0, 0, 0])
    split = find_segmented(tmp_path)
    assert split.train.labels(0).flatten().tolist() == [3, 18, 255, 0, 0, 0, 0, 0] and split.train.classes[18] == "bicycle"


def test_voc_s_masks_are_its_palette_s_numbers(tmp_path: Path) -> None:
    mask_set(tmp_path, {name: [0, 15, 15, 255, 20, 20, 0, 0] for name in "abc"}, "P", "JPEGImages", "SegmentationClass")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\nmissing\n")
    (lists / "val.txt").write_text("b\n")
    split = find_segmented(tmp_path)
    assert len(split.train) == 2 and split.val.labels(0).flatten().tolist() == [0, 15, 15, 255, 20, 20, 0, 0]
    assert split.train.classes[15] == "person" and len(split.train.classes) == 21
    assert Path(split.train.images.name(1)).name == "c.jpg"
    assert split.remarks[0].endswith("JPEGImages: 1, such as missing")


def test_an_image_is_turned_where_its_mask_is(tmp_path: Path) -> None:
    for name, orientation in (("a", 6), ("b", 1), ("c", 6)):
        width, height = (2, 4) if name == "a" else (4, 2)
        picture(tmp_path / "images" / f"{name}.jpg", (4, 2), orientation)
        mask(tmp_path / "masks" / f"{name}.png", [0, 1] * 4, size=(width, height))
    split = find_segmented(tmp_path, val_share=0.4)
    for part in (split.train, split.val):
        for i in range(len(part)):
            is_a = part.images.name(i).endswith("a.jpg")
            assert part.load(i).size == ((2, 4) if is_a else (4, 2)) and bool(part.turned[i]) == is_a  # type: ignore[union-attr]


def test_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = mask_set(tmp_path, NUMBERS)
    picture(folder / "images" / "alone.jpg", (4, 2))
    (folder / "masks" / "5.png").write_bytes(b"\x89PNG\r\n")
    split = find_segmented(folder)
    notes = [note.partition(": 1, such as ") for note in split.remarks]
    assert ("left out: images without a mask in " + str(folder / "masks"), "alone.jpg") in [(n[0], n[2]) for n in notes]
    assert any(n[0] == "left out: images or masks that cannot be read" and "5.png" in n[2] for n in notes)
    file = tmp_path / "list.txt"
    file.write_text("a\nb\n")
    with pytest.raises(UserError, match=r"0.png has the number 2 on 3 pixels, which has no class; add a line to .*list.txt"):
        find_segmented(folder, classes=file)
    mask(folder / "masks" / "0.png", [0, 1], size=(2, 1))
    with pytest.raises(UserError, match=r"images/0.jpg is 4 x 2, and its mask .*masks/0.png 2 x 1; give them one size"):
        find_segmented(folder)
    mask(folder / "masks" / "0.png", [RED] * 8, "RGB")
    with pytest.raises(UserError, match=r"has colours, and .* has numbers"):
        find_segmented(folder)


@pytest.mark.parametrize(
    "lines, message",
    [
        ("", "has 0 classes"),
        ("a,b\nc\n", r"line 1 is 'a,b', and must be name"),
        ("a\na\n", r"line 2 has the name 'a' of another line"),
        ("a,0\nb,0\n", r"line 2 has the number or colour of another line"),
        ("a,#ff0000\n", r"line 1 has a colour, and the masks have numbers"),
        ("a,1,2,999\n", r"line 1 is 'a,1,2,999'"),
        (",1\n", r"line 1 has no name"),
        ("\n".join(map(str, range(300))), "has 300 classes, and must have 1 to 255"),
    ],
)
def test_a_bad_file_of_classes_is_one_line(tmp_path: Path, lines: str, message: str) -> None:
    file = tmp_path / "list.txt"
    file.write_text(lines)
    with pytest.raises(UserError, match=message):
        find_segmented(mask_set(tmp_path, NUMBERS), classes=file)


def test_jpeg_masks_and_too_many_colours_are_refused(tmp_path: Path) -> None:
    folder = mask_set(tmp_path, NUMBERS)
    for path in (folder / "masks").iterdir():
        picture(path.with_suffix(".jpg"), (4, 2))
        path.unlink()
    with pytest.raises(UserError, match=r"no image with a mask of the same name; .*a JPEG, whose pixels are not exact"):
        find_segmented(folder)
    for path in (folder / "masks").iterdir():
        path.unlink()
    picture(folder / "images" / "0.jpg", (20, 20))
    mask(folder / "masks" / "0.png", [(i % 256, i // 256, 7) for i in range(400)], "RGB", (20, 20))
    with pytest.raises(UserError, match="masks have 400 colours, and each would be a class, at most 255; pass --classes FILE"):
        find_segmented(folder)
    with pytest.raises(UserError, match="has no folders of images and masks"):
        find_segmented(folder / "images")
