"""Training images, their boxes, masks and labels are what torchvision's transforms make of the same view of the same files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated import change_coco, draw_squares, make_coco, make_masks, picture_of, save_mask
from PIL import Image, JpegImagePlugin
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from sparkme.data.annotations import IGNORED, Annotated, Segmented, find_annotated, find_segmented
from sparkme.data.annotations.loading import (
    CROP_SCALES,
    CROP_SIDES,
    Decoding,
    ObjectBatch,
    ObjectDataset,
    PixelDataset,
    View,
    WholeDataset,
    collate_objects,
    collate_pixels,
    create_training_loader,
    create_whole_loader,
    resized,
)
from sparkme.data.dataset import Batch, Box, EpochSampler
from sparkme.data.planes import Pixels

HEIGHT, WIDTH = 90, 120
VIEWS = {
    "as it is": View(Box(0, 0, HEIGHT, WIDTH), (HEIGHT, WIDTH)),
    "smaller": View(Box(0, 0, HEIGHT, WIDTH), (45, 60)),
    "larger": View(Box(0, 0, HEIGHT, WIDTH), (206, 272)),
    "a part": View(Box(21, 34, 52, 61), (52, 61)),
    "a part, larger": View(Box(21, 34, 52, 61), (130, 152)),
    "mirrored": View(Box(0, 0, HEIGHT, WIDTH), (HEIGHT, WIDTH), mirrored=True),
    "a part, mirrored and stretched": View(Box(13, 0, 70, 91), (96, 55), mirrored=True),
}


def decoding(channels: int = 3, **about: Any) -> Decoding:
    return Decoding(channels, "white", Pixels(**about))


def objects_of(part: Annotated, **changed: Any) -> ObjectDataset:
    options = {"short_side": (64,), "long_side": 1000, "usual_side": 64, "random_crop": 0.0, "masks": True, "flip": True}
    channels = decoding(changed.pop("channels", 3), **changed.pop("pixels", {}))
    return ObjectDataset(part, channels, **{**options, "seed": 0, **changed})  # type: ignore[arg-type]


def pixels_of(part: Segmented, **changed: Any) -> PixelDataset:
    options = {"size": (64, 64), "short_side": 64, "scale_range": (1.0, 1.0), "colour": None, "flip": True, "seed": 0}
    return PixelDataset(part, decoding(changed.pop("channels", 3)), **{**options, **changed})  # type: ignore[arg-type]


def seen(dataset: Any, view: View, number: int = 0) -> Any:
    """A training image in this view."""
    dataset.draw_view = lambda number: view
    return dataset[0, number]


def shapes(folder: Path, kind: str) -> Path:
    """A folder as COCO has it, of one large image: slanted quadrilaterals, small boxes, a crowd and one of two polygons."""
    make_coco(folder, 1, 1, size=(HEIGHT, WIDTH))
    polygons = [
        [[10.0, 8, 70, 14, 64, 60, 20, 52]],
        [[80.0, 40, 118, 44, 110, 86, 84, 80]],
        [[30.5, 20.25, 60, 20, 60, 70.75]],
        [[2.0, 60, 20, 60, 20, 84, 2, 84], [30, 70, 44, 70, 44, 88, 30, 88]],
        [[33.0, 22, 35, 22, 35, 24, 33, 24]],
        [[0.0, 0, 60, 0, 60, 45, 0, 45]],
    ]

    def change(content: dict[str, Any]) -> None:
        content["annotations"] = []
        for i, parts in enumerate(polygons):
            xs, ys = [x for part in parts for x in part[::2]], [y for part in parts for y in part[1::2]]
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            outline: Any = parts
            if kind == "runs" or i == 5:
                outline = runs_of(parts)
            entry = {"id": i + 1, "image_id": 1, "category_id": 10 + 10 * (i % 2), "bbox": box, "area": box[2] * box[3]}
            content["annotations"].append({**entry, "iscrowd": int(i == 5), "segmentation": outline})

    change_coco(folder, "train", change)
    return folder


def runs_of(parts: list[list[float]]) -> dict[str, Any]:
    """Uncompressed runs, column by column."""
    from pycocotools import mask

    drawn = mask.decode(mask.merge(mask.frPyObjects(parts, HEIGHT, WIDTH))).T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], drawn, [1 - drawn[-1]]])))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(edges, prepend=0).tolist()}


def by_torchvision(part: Annotated, view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The image, boxes, masks and labels of image 0, by torchvision's transforms of tv_tensors."""
    objects, image = part.objects(0), v2.functional.pil_to_tensor(part.load(0))
    kept = ~objects.crowd
    sample = {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(objects.boxes[kept], format="XYXY", canvas_size=(HEIGHT, WIDTH)),
        "masks": tv_tensors.Mask(objects.masks(HEIGHT, WIDTH)[kept]),
        "labels": objects.labels[kept],
    }
    sample = {name: crop(value, view) for name, value in sample.items()}
    clean = v2.SanitizeBoundingBoxes(min_size=1, labels_getter=lambda s: (s["labels"], s["masks"]))(sample)
    return tuple(torch.as_tensor(clean[name]) for name in ("image", "boxes", "masks", "labels"))  # type: ignore[return-value]


def crop(value: Any, view: View) -> Any:
    if not isinstance(value, tv_tensors.TVTensor):
        return value
    value = v2.functional.crop(value, *view.box)
    if isinstance(value, tv_tensors.Mask):  # whose resize takes the pixel above the nearest one
        value = tv_tensors.Mask(
            v2.functional.resize_image(torch.as_tensor(value), list(view.size), InterpolationMode.NEAREST_EXACT)
        )
    else:
        value = v2.functional.resize(value, list(view.size), InterpolationMode.BICUBIC, antialias=True)
    if isinstance(value, tv_tensors.BoundingBoxes):
        value = v2.functional.clamp_bounding_boxes(value, clamping_mode="hard")
    return v2.functional.horizontal_flip(value) if view.mirrored else value


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_that_of_torchvision(name: str, tmp_path: Path) -> None:
    part, view = find_annotated(shapes(tmp_path, "runs")).train, VIEWS[name]
    drawn = seen(objects_of(part), view)
    image, boxes, masks, labels = by_torchvision(part, view)
    assert drawn.image.dtype == torch.uint8 and drawn.image.shape == (3, *view.size)
    difference = (drawn.image.float() - image.float()).abs()
    assert float(difference.max()) <= 2 and float(difference.mean()) < 0.3  # Pillow's and torch's filters round apart
    torch.testing.assert_close(drawn.target.boxes, boxes, atol=1e-4, rtol=0)
    assert torch.equal(drawn.target.labels, labels) and drawn.target.labels.dtype == torch.int64
    assert torch.equal(drawn.target.masks, masks) and drawn.target.masks.dtype == torch.uint8
    assert len(boxes) >= 3


@pytest.mark.parametrize("name", VIEWS)
def test_polygons_are_drawn_where_their_boxes_are(name: str, tmp_path: Path) -> None:
    """They are drawn after scaling, so their outlines are finer than torchvision's, which draws before."""
    part, view = find_annotated(shapes(tmp_path, "polygons")).train, VIEWS[name]
    target = seen(objects_of(part), view).target
    _, boxes, masks, _ = by_torchvision(part, view)
    assert target.masks is not None and len(target.masks) == len(boxes) >= 3
    if view.size == (HEIGHT, WIDTH) and view.box.height == HEIGHT:
        assert torch.equal(target.masks, masks)
    for own, theirs, box in zip(target.masks, masks, boxes):
        if float((box[2:] - box[:2]).min()) < 8:
            continue
        overlap, union = (own & theirs).sum(), (own | theirs).sum()
        assert float(overlap / union) > 0.85
        places = [mask.nonzero().float().mean(0) for mask in (own, theirs)]
        assert float((places[0] - places[1]).abs().max()) < 0.6  # nothing is moved by a pixel
        if view.box.height < HEIGHT:
            continue  # a part of a slanted outline does not fill the part of its box
        rows, columns = own.any(1).nonzero().flatten(), own.any(0).nonzero().flatten()
        found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert float((found - box).abs().max()) <= 1 + 0.51 * max(view.size[0] / view.box.height, 1)


def test_crowds_and_what_is_hardly_visible_are_left_out(tmp_path: Path) -> None:
    part = find_annotated(shapes(tmp_path, "polygons")).train
    assert len(part.objects(0)) == 6
    everything = seen(objects_of(part), VIEWS["as it is"]).target
    assert len(everything.boxes) == 5 and everything.labels.tolist() == [0, 1, 0, 1, 0]
    right = seen(objects_of(part), View(Box(0, 69, HEIGHT, 51), (HEIGHT, 51))).target  # a pixel of the first is visible
    assert right.boxes[0].tolist() == [0, 8, 1, 60] and right.labels.tolist() == [0, 1]
    less = seen(objects_of(part), View(Box(0, 70, HEIGHT, 50), (HEIGHT, 50))).target
    assert less.labels.tolist() == [1] and less.masks is not None and len(less.masks) == 1
    small = seen(objects_of(part), View(Box(0, 0, HEIGHT, WIDTH), (30, 40))).target  # two pixels become less than one
    assert small.labels.tolist() == [0, 1, 0, 1]
    without = seen(objects_of(part, masks=False), VIEWS["as it is"]).target
    assert without.masks is None and torch.equal(without.boxes, everything.boxes)


def test_an_image_without_objects_has_an_empty_target(tmp_path: Path) -> None:
    make_coco(tmp_path, 2, 1)
    change_coco(tmp_path, "train", lambda c: c.update(annotations=[a for a in c["annotations"] if a["image_id"] == 1]))
    drawn = objects_of(find_annotated(tmp_path).train)[0, 1]
    assert drawn.target.boxes.shape == (0, 4) and drawn.target.labels.shape == (0,)
    assert drawn.target.masks.shape == (0, *drawn.image.shape[1:])


def views_of(dataset: Any, count: int = 300) -> list[View]:
    torch.manual_seed(0)
    return [dataset.draw_view(0) for _ in range(count)]


def test_sides_crops_and_mirroring_are_drawn_as_asked(tmp_path: Path) -> None:
    part = find_annotated(make_coco(tmp_path, 1, 1, size=(200, 320))).train
    sides = (100, 140, 180)
    views = views_of(objects_of(part, short_side=sides, usual_side=140))
    assert {view.box for view in views} == {Box(0, 0, 200, 320)}
    counts = [sum(view.size == (side, round(1.6 * side)) for view in views) for side in sides]
    assert sum(counts) == 300 and min(counts) > 70
    assert 110 < sum(view.mirrored for view in views) < 190
    assert not any(view.mirrored for view in views_of(objects_of(part, flip=False)))
    assert {view.size for view in views_of(objects_of(part, short_side=sides, long_side=200))} == {(100, 160), (125, 200)}
    whole = sum(view.box == Box(0, 0, 200, 320) for view in views_of(objects_of(part, random_crop=0.25)))
    assert 195 < whole < 255


def test_crops_are_those_of_the_official_code(tmp_path: Path) -> None:
    """Short side 400, 500 or 600 where it is usually 800, then a crop whose sides are from 384 to 600, in that scale."""
    part = find_annotated(make_coco(tmp_path, 1, 1, size=(800, 1200))).train
    views = views_of(objects_of(part, short_side=(800,), long_side=1333, usual_side=800, random_crop=1.0), 600)
    boxes = torch.tensor([view.box for view in views])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 0] + boxes[:, 2] <= 800).all() and (boxes[:, 1] + boxes[:, 3] <= 1200).all()
    assert boxes[:, :2].float().mean() > 100  # not in a corner
    lowest, highest = (side / scale for side, scale in ((384, 600 / 800), (600, 400 / 800)))
    assert boxes[:, 2:].min() >= lowest - 1 and boxes[:, 3].max() <= highest + 1 and boxes[:, 2].max() == 800
    assert boxes[:, 3].min() < lowest + 20 and boxes[:, 3].max() > highest - 60
    assert all(view.size == resized(tuple(view.box[2:]), 800, 1333) for view in views)  # type: ignore[arg-type]
    assert CROP_SCALES == (400 / 800, 500 / 800, 600 / 800) and CROP_SIDES == (384 / 800, 600 / 800)


def test_sides_after_resizing() -> None:
    assert resized((480, 640), 800, 1333) == (800, 1067) and resized((480, 640), 800) == (800, 1067)
    assert resized((400, 1000), 800, 1333) == (533, 1333) and resized((1000, 400), 800, 1333) == (1333, 533)
    assert resized((1, 4000), 64, 128) == (1, 128)


def bright(image: Tensor) -> Tensor:
    """(H, W) bool: where the squares are."""
    values = image if image.dtype == torch.uint8 else image * 255
    return values.float().amax(0) > 128


def check_squares(image: Tensor, boxes: Tensor, margin: float = 1.5) -> None:
    """The bright regions of an image are its boxes."""
    found, (height, width) = bright(image), image.shape[1:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")

    def inside(by: float) -> Tensor:
        regions = [(x > b[0] + by) & (x < b[2] - by) & (y > b[1] + by) & (y < b[3] - by) for b in boxes]
        return torch.stack(regions).any(0) if regions else torch.zeros(height, width, dtype=torch.bool)

    assert found[inside(margin)].all() and not found[~inside(-margin)].any() and len(boxes)


def check_centres(image: Tensor, boxes: Tensor, tolerance: float) -> None:
    """The centres of mass of the bright regions that the edge does not cut are those of their boxes, to a part of a pixel."""
    values, (height, width), num_checked = (image.float().amax(0) - 80).clamp_min(0), image.shape[1:], 0
    for left, top, right, bottom in boxes.tolist():
        if min(left, top, width - right, height - bottom) >= 3:
            rows, columns = slice(int(top) - 3, int(bottom) + 4), slice(int(left) - 3, int(right) + 4)
            part = values[rows, columns] / values[rows, columns].sum()
            y = (part.sum(1) * (torch.arange(len(part)) + 0.5)).sum() + rows.start
            x = (part.sum(0) * (torch.arange(part.shape[1]) + 0.5)).sum() + columns.start
            assert abs(float(x) - (left + right) / 2) < tolerance and abs(float(y) - (top + bottom) / 2) < tolerance
            num_checked += 1
    assert num_checked


@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("recorded", ["stored", "turned"])
def test_boxes_fit_images_that_their_exif_turns(orientation: int, recorded: str, tmp_path: Path) -> None:
    """pycocotools leaves images as they are stored; an image is turned only where the recorded size says so."""
    if recorded == "turned" and orientation < 5:
        pytest.skip("its size does not say whether it is turned")
    size = (96, 160)
    make_coco(tmp_path, 1, 1, size=size)
    squares = draw_squares(0, size)
    shown = Image.fromarray(picture_of(0, size, squares))  # as its annotations see it
    back = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = shown.transpose(back[orientation]) if recorded == "turned" else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "train" / "0000.jpg", quality=95, exif=exif)
    change_coco(tmp_path, "train", lambda c: c["images"][0].update(file_name="0000.jpg"))
    part = find_annotated(tmp_path).train
    for epoch in range(4):
        drawn = objects_of(part, short_side=(48, 96), random_crop=0.5)[epoch, 0]
        assert not drawn.unreadable
        if len(drawn.target.boxes):
            check_squares(drawn.image, drawn.target.boxes, 2)
            for mask, box in zip(drawn.target.masks, drawn.target.boxes):
                assert bright(drawn.image)[mask.bool()].float().mean() > 0.8
                assert float(mask.sum()) == pytest.approx(float((box[2:] - box[:2]).prod()), rel=0.15)


def test_jpeg_files_that_are_decoded_smaller_keep_their_geometry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (1203, 1601)  # no multiples of 8
    make_coco(tmp_path, 1, 1, size=(64, 64))
    squares = [(100, 90, 420, 410, 0), (1200, 800, 1601, 1203, 1), (700, 500, 901, 702, 0)]
    Image.fromarray(picture_of(0, size, squares)).save(tmp_path / "train" / "0000.jpg", quality=95)

    def change(content: dict[str, Any]) -> None:
        content["images"][0].update(file_name="0000.jpg", height=size[0], width=size[1])
        for i, (a, b, c, d, label) in enumerate(squares):
            outline = [[a, b, c, b, c, d, a, d]]
            entry = {"id": i + 1, "image_id": 1, "category_id": 10 * label + 10, "bbox": [a, b, c - a, d - b], "area": 1.0}
            content["annotations"][i:] = [{**entry, "iscrowd": 0, "segmentation": outline}]

    change_coco(tmp_path, "train", change)
    part = find_annotated(tmp_path).train
    drafts: list[tuple[int, int]] = []

    def noted(self: Any, mode: str, wanted: tuple[int, int]) -> Any:
        drafts.append(wanted)
        return draft_of(self, mode, wanted)

    draft_of: Callable[..., Any] = JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", noted)
    for view in (
        View(Box(0, 0, *size), (150, 200)),
        View(Box(50, 61, 900, 1101), (110, 135), mirrored=True),
        View(Box(3, 5, 1200, 1596), (300, 399)),
    ):
        drawn = seen(objects_of(part), view)
        assert drawn.image.shape[1:] == view.size
        check_squares(drawn.image, drawn.target.boxes, 0.75)
        check_centres(drawn.image, drawn.target.boxes, 0.2)
        image = crop(tv_tensors.Image(v2.functional.pil_to_tensor(part.load(0))), view)
        assert float((drawn.image.float() - image.float()).abs().mean()) < 3
    assert len(drafts) == 3


@pytest.mark.parametrize("kind", ["grey", "four", "deep", "float"])
def test_images_of_other_channels_and_more_bits(kind: str, tmp_path: Path) -> None:
    channels = {"grey": 1, "four": 4, "deep": 1, "float": 3}[kind]
    make_coco(tmp_path, 3, 1, channels=4 if kind == "four" else 1 if channels == 1 else 3)
    for path in sorted((tmp_path / "train").iterdir()):
        if kind == "deep":
            Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path)
        if kind == "float":
            values = np.asarray(Image.open(path)).astype(np.float32).transpose(2, 0, 1) / 255
            np.save(path.with_suffix(".npy"), values)
            path.unlink()
    if kind == "float":
        change_coco(tmp_path, "train", lambda c: [i.update(file_name=i["file_name"][:-3] + "npy") for i in c["images"]])
    part = find_annotated(tmp_path).train
    ranges = {"deep": {"integers": [0, 65535]}, "float": {"floats": [0, 1]}}.get(kind)
    dataset = objects_of(part, channels=channels, pixels={"ranges": ranges} if ranges else {}, short_side=(48, 96))
    batch = collate_objects([dataset[0, number] for number in range(3)])
    assert batch.images is not None and batch.images.shape[1] == channels and not batch.unreadable
    assert batch.images.dtype == torch.float32 and float(batch.images.min()) >= 0 and float(batch.images.max()) <= 1
    for image, size, target in zip(batch.images, batch.sizes, batch.targets):
        values = image[:, : size[0], : size[1]].amax(0) > 0.25
        for left, top, right, bottom in target.boxes.round().long().tolist():
            assert values[top + 2 : bottom - 2, left + 2 : right - 2].all()
        assert float(values.float().mean()) < 0.6


def test_a_batch_of_many_sizes_is_padded_at_right_and_bottom(tmp_path: Path) -> None:
    make_coco(tmp_path, 4, 1)
    sizes = [(64, 64), (50, 80), (100, 40), (33, 47)]

    def change(content: dict[str, Any]) -> None:
        for image, (height, width) in zip(content["images"], sizes):
            values = np.full((height, width, 3), 200, np.uint8)
            Image.fromarray(values).save(tmp_path / "train" / image["file_name"])
            image.update(height=height, width=width)
        box = {"bbox": [4, 4, 20, 20], "area": 400.0, "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]}
        content["annotations"] = [{"id": i + 1, "image_id": i + 1, "category_id": 10, "iscrowd": 0, **box} for i in range(4)]

    change_coco(tmp_path, "train", change)
    dataset = objects_of(find_annotated(tmp_path).train, short_side=(40,), flip=False)
    samples = [dataset[0, i] for i in range(4)]
    batch = collate_objects(samples)
    assert batch.images is not None and batch.sizes == ((40, 40), (40, 64), (100, 40), (40, 57))
    assert batch.images.shape == (4, 3, 100, 64)
    for image, (height, width), sample in zip(batch.images, batch.sizes, samples):
        assert (image[:, :height, :width] == 200).all() and not image[:, height:].any() and not image[:, :, width:].any()
        assert sample.target.masks is not None and sample.target.masks.shape == (1, height, width)
    scales = [target.boxes[0, 2].item() / 24 for target in batch.targets]
    assert scales == pytest.approx([40 / 64, 64 / 80, 1, 57 / 47])


def spoil(folder: Path, *numbers: int, below: str = "train") -> None:
    for number in numbers:
        next((folder / below).glob(f"{number:04d}.*")).write_bytes(b"no image")


@pytest.mark.parametrize("kind", ["objects", "pixels"])
def test_unreadable_images_are_replaced_and_reported(kind: str, tmp_path: Path) -> None:
    make, find, make_dataset, collate = {
        "objects": (make_coco, find_annotated, objects_of, collate_objects),
        "pixels": (make_masks, find_segmented, pixels_of, collate_pixels),
    }[kind]
    make(tmp_path, 4, 1)  # type: ignore[operator]
    part: Any = find(tmp_path).train  # type: ignore[operator]
    below = "train" if kind == "objects" else "train/images"
    spoil(tmp_path, 1, below=below)
    path = next((tmp_path / below).glob("0002.*"))
    Image.open(path).resize((32, 32)).save(path)  # of another size than its boxes
    dataset: Any = make_dataset(part)  # type: ignore[operator]
    samples = [dataset[0, number] for number in range(4)]
    assert not samples[0].unreadable and not samples[3].unreadable
    assert "0001.png" in samples[1].unreadable[0] and "0002.png is 32 x 32" in samples[2].unreadable[0]
    batch: Any = collate(samples)  # type: ignore[operator]
    assert batch.images.shape == (4, 3, 64, 64) and len(batch.unreadable) >= 2
    replaced = samples[1]
    whole = [samples[0], samples[3]]
    assert any(torch.equal(one, sample.image) for sample in whole for one in (replaced.image, replaced.image.flip(-1)))
    spoil(tmp_path, 0, 2, 3, below=below)
    none = dataset[0, 0]
    assert none.image is None and len(none.unreadable) == 4
    assert collate([samples[0], none]).images is None  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["objects", "pixels"])
def test_a_training_image_follows_from_seed_epoch_and_number_alone(kind: str, tmp_path: Path) -> None:
    def dataset(seed: int = 0) -> Any:
        if kind == "objects":
            part = find_annotated(tmp_path).train
            return objects_of(part, short_side=(48, 64, 80), random_crop=0.5, seed=seed)
        colour = v2.ColorJitter(0.4, 0.4, 0.4)
        return pixels_of(find_segmented(tmp_path).train, scale_range=(0.5, 2.0), colour=colour, seed=seed)

    (make_coco if kind == "objects" else make_masks)(tmp_path, 8, 1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = dataset()[3, 5]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(99)
    dataset_again = dataset()
    _ = dataset_again[0, 1], dataset_again[9, 9]
    assert same(one, dataset_again[3, 5])
    assert any(not same(one, dataset()[epoch, 5]) for epoch in range(4, 8))
    assert any(not same(dataset()[epoch, 5], dataset(1)[epoch, 5]) for epoch in range(4))
    batches = {}
    for workers in (0, 2):
        sampler = EpochSampler(8, 8, 4, 0, range(1, 5))
        loader = create_training_loader(dataset(), sampler, workers=workers, pin_memory=False)
        batches[workers] = [*loader]
    assert len(batches[0]) == 4 and all(same(a, b) for a, b in zip(batches[0], batches[2], strict=True))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", VIEWS)
def test_labels_of_pixels_are_the_nearest_ones(name: str, tmp_path: Path) -> None:
    make_masks(tmp_path, 1, 1, size=(HEIGHT, WIDTH))
    part, view = find_segmented(tmp_path).train, VIEWS[name]
    drawn = seen(pixels_of(part, size=view.size), view)
    expected = crop(tv_tensors.Mask(part.labels(0)[None]), view)[0]
    assert torch.equal(drawn.target, torch.as_tensor(expected)) and drawn.target.dtype == torch.uint8
    image = crop(tv_tensors.Image(v2.functional.pil_to_tensor(part.load(0))), view)
    assert float((drawn.image.float() - image.float()).abs().mean()) < 0.3
    assert set(drawn.target.unique().tolist()) == {0, 1, 2, 255} if "part" not in name else True


def test_crops_of_pixels_are_scaled_padded_and_lie_everywhere(tmp_path: Path) -> None:
    make_masks(tmp_path, 1, 1, size=(100, 150), ignored=False)
    part = find_segmented(tmp_path).train
    dataset = pixels_of(part, size=(96, 64), short_side=80, scale_range=(0.5, 2.0))
    views = views_of(dataset)
    scales = [view.size[0] / view.box.height for view in views]
    assert min(scales) == pytest.approx(0.4, abs=0.03) and max(scales) == pytest.approx(1.6, abs=0.05)
    for view in views:
        across = view.size[1] / view.box.width
        assert across == pytest.approx(view.size[0] / view.box.height, rel=0.05)  # not stretched
        assert view.size[1] == min(64, round(150 * across)) or view.size[1] == 64
        assert view.box.top + view.box.height <= 100 and view.box.left + view.box.width <= 150
    assert {view.box.top for view in views} >= {0, 3, 9} and max(view.box.left for view in views) > 80
    small = seen(pixels_of(part, size=(96, 64)), View(Box(0, 0, 100, 150), (40, 60)))
    expected = torch.zeros(96, 64, dtype=torch.bool)
    expected[40:], expected[:, 60:] = True, True
    assert torch.equal(small.target == IGNORED, expected) and not small.image[:, expected].any()
    for epoch in range(12):
        drawn = dataset[epoch, 0]
        assert drawn.image.shape == (3, 96, 64) and drawn.target.shape == (96, 64)
        padding = drawn.target == IGNORED
        assert not drawn.image[:, padding].any()
        height = int((~padding).any(1).sum())
        assert not padding[:height].any() and padding[height:].all()
        inside = bright(drawn.image)
        assert float(((drawn.target == 1) | (drawn.target == 2))[~padding].eq(inside[~padding]).float().mean()) > 0.9


def test_colours_change_and_labels_do_not(tmp_path: Path) -> None:
    make_masks(tmp_path, 1, 1)
    part = find_segmented(tmp_path).train
    plain, changed = pixels_of(part)[2, 0], pixels_of(part, colour=v2.ColorJitter(0.4, 0.4, 0.4))[2, 0]
    assert torch.equal(plain.target, changed.target) and not torch.equal(plain.image, changed.image)
    assert float((bright(plain.image) == bright(changed.image)).float().mean()) > 0.8


@pytest.mark.parametrize("channels", [1, 4])
def test_pixels_of_images_of_other_channels(channels: int, tmp_path: Path) -> None:
    make_masks(tmp_path, 3, 1, channels=channels)
    dataset = pixels_of(find_segmented(tmp_path).train, channels=channels, scale_range=(0.5, 1.5))
    batch = collate_pixels([dataset[0, i] for i in range(3)])
    assert batch.images is not None and batch.images.shape == (3, channels, 64, 64) and batch.images.dtype == torch.float32
    assert batch.labels is not None and batch.labels.shape == (3, 64, 64)


def test_bytes_and_deep_images_in_one_batch_become_floats(tmp_path: Path) -> None:
    make_coco(tmp_path, 2, 1)
    values = np.asarray(Image.open(tmp_path / "train" / "0001.png")).astype(np.float32).transpose(2, 0, 1) / 255
    np.save(tmp_path / "train" / "0001.npy", values)
    change_coco(tmp_path, "train", lambda c: c["images"][1].update(file_name="0001.npy"))
    part = find_annotated(tmp_path).train
    dataset = objects_of(part, flip=False, pixels={"ranges": {"floats": [0, 1]}})
    samples = [dataset[0, i] for i in range(2)]
    assert [sample.image.dtype for sample in samples] == [torch.uint8, torch.float32]
    batch = collate_objects(samples)
    assert batch.images is not None
    torch.testing.assert_close(batch.images[0], samples[0].image.float() / 255)
    torch.testing.assert_close(batch.images[1], torch.from_numpy(values), atol=1e-6, rtol=0)


def test_whole_images_come_in_order_with_what_cannot_be_read(tmp_path: Path) -> None:
    make_coco(tmp_path, 1, 6, size=(60, 90))
    part = find_annotated(tmp_path).val
    spoil(tmp_path, 1002, below="val")
    dataset = WholeDataset(part, decoding(), 30, 40)
    batches = [*create_whole_loader(dataset, batch_size=2, workers=0, share=range(0, 6, 2))]
    assert [batch.numbers for batch in batches] == [[0], [4]] and "1002.png" in batches[0].unreadable[0]
    assert batches[0].images is not None and batches[0].images[0].shape == (3, 27, 40)
    spoil(tmp_path, 1000, 1004, below="val")
    only = [*create_whole_loader(dataset, batch_size=2, workers=0, share=range(0, 6, 2))]
    assert [batch.images for batch in only] == [None, None] and sum(len(batch.unreadable) for batch in only) == 3
    whole = dataset[1].image
    assert whole is not None
    torch.testing.assert_close(
        whole.float(),
        v2.functional.resize(v2.functional.pil_to_tensor(part.load(1)), [27, 40], InterpolationMode.BICUBIC).float(),
        atol=2,
        rtol=0,
    )


def test_the_kinds_of_batches(tmp_path: Path) -> None:
    coco, masks = find_annotated(make_coco(tmp_path / "a", 4, 1)).train, find_segmented(make_masks(tmp_path / "b", 4, 1)).train
    sampler = EpochSampler(4, 4, 2, 0, range(2))
    for dataset, kind in ((objects_of(coco), ObjectBatch), (pixels_of(masks), Batch)):
        loader = create_training_loader(dataset, sampler, workers=0, pin_memory=False)
        assert all(isinstance(batch, kind) and batch.enlarged == 0 and batch.outside == 0 for batch in loader)


def test_a_mask_that_went_bad_is_replaced_like_an_image(tmp_path: Path) -> None:
    make_masks(tmp_path, 3, 1)
    part = find_segmented(tmp_path).train
    (tmp_path / "train" / "masks" / "0001.png").write_bytes(b"")
    drawn = pixels_of(part)[0, 1]
    assert drawn.image is not None and "0001.png" in drawn.unreadable[0]
    save_mask(tmp_path / "train" / "masks" / "0001.png", np.zeros((64, 64), np.uint8))
    assert not pixels_of(part)[0, 1].unreadable
