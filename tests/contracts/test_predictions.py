"""Pictures of predictions: what is drawn where, in which colour, and the figure of each image."""

import io
import json
import random
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from sparkme.reporting import predictions
from sparkme.reporting.fonts import font, shortened
from sparkme.reporting.predictions import (
    BLACK,
    IGNORED,
    WHITE,
    WRONG,
    box_f1,
    choose,
    class_colours,
    class_name,
    contact_sheet,
    draw_differences,
    draw_labels,
    draw_objects,
    image_score,
    index_png,
    legend_of,
    mean_iou,
    pictures_of_detection,
    pictures_of_segmentation,
)
from sparkme.training.log import COCO_FIGURES, earlier_runs, plot_measured
from sparkme.training.metrics import Detections, GroundTruth, decode_masks, encode_masks

CLASSES = ["cat", "dog", "bird"]
GREY = 120


def plain(width: int = 400, height: int = 300) -> Image.Image:
    return Image.new("RGB", (width, height), (GREY,) * 3)


def pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture))


def is_colour(picture: Image.Image, colour: tuple[int, int, int]) -> Tensor:
    return (pixels(picture) == torch.tensor(colour)).all(-1)


# Colours.


def seen(colours: list[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """Colours in OKLab, as eyes with all receptors, and without those for red or green, see them."""
    values = np.array(colours) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    eyes = {
        "all": np.eye(3),
        "protanopia": np.array(
            [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
        ),
        "deuteranopia": np.array(
            [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
        ),
    }
    receptors = np.array(
        [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
    )
    lab = np.array([[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]])
    return {name: np.cbrt(np.clip(linear @ eye.T, 0, 1) @ receptors.T) @ lab.T for name, eye in eyes.items()}


@pytest.mark.parametrize(
    ("eye", "few", "neighbours"), [("all", 0.12, 0.07), ("protanopia", 0.07, 0.035), ("deuteranopia", 0.07, 0.035)]
)
def test_colours_of_few_classes_and_of_neighbours_are_told_apart(eye: str, few: float, neighbours: float) -> None:
    places = seen(class_colours([str(i) for i in range(255)]))[eye]
    assert min(np.linalg.norm(a - b) for a, b in combinations(places[:8], 2)) > few
    assert min(np.linalg.norm(a - b) for a, b in pairwise(places)) > neighbours


def test_255_classes_have_255_colours_and_more_repeat_them() -> None:
    colours = class_colours([str(i) for i in range(300)])
    assert len({*colours[:255]}) == 255 and colours[255:] == colours[:45] and not {BLACK, WHITE} & {*colours}
    named = class_colours(["Background", *CLASSES])
    assert named == [BLACK, *colours[1:4]]
    # Masks that were written keep their meaning for people.
    known = ["e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7", "6000ff"]
    assert [bytes(colour).hex() for colour in colours[:8]] == known


# Objects.


@pytest.mark.parametrize("size", [(160, 120), (400, 300), (4000, 3000)])
def test_the_edge_of_a_box_has_its_colour_and_nothing_else_is_changed(size: tuple[int, int]) -> None:
    width, height = size
    box = torch.tensor([[width * 0.25, height * 0.5, width * 0.75, height * 0.9]])
    picture = draw_objects(plain(*size), box, torch.tensor([1]), CLASSES, torch.tensor([0.876]))
    assert picture.size == size
    blue, line = is_colour(picture, class_colours(CLASSES)[1]), max(1, round(height / 180))
    left, top, right, bottom = (round(value) for value in box[0].tolist())
    edge = torch.zeros(height, width, dtype=torch.bool)
    edge[top:bottom, left:right] = True
    edge[top + line : bottom - line, left + line : right - line] = False
    assert blue[edge].all()
    changed = (pixels(picture) != GREY).any(-1)
    rows, columns = (changed & ~edge).nonzero().unbind(1)
    assert rows.max() < top and rows.min() > 0 and columns.min() >= left and columns.max() < width  # the label, above the box
    label = pixels(picture)[int(rows.min()) : int(rows.max()) + 1]
    assert int(rows.max() - rows.min()) >= 11 and (label == 0).all(-1).any()  # black on light blue


@pytest.mark.parametrize("corner", [(0, 0), (390, 0), (0, 290), (390, 290)])
def test_labels_stay_in_the_picture(corner: tuple[int, int]) -> None:
    """What is drawn at a corner is what is drawn of the same label in the middle."""
    x, y = corner

    def drawn(x: float, y: float) -> int:
        box = torch.tensor([[x, y, x + 10.0, y + 10.0]])
        picture = draw_objects(plain(), box, torch.tensor([0]), CLASSES, torch.tensor([0.5]))
        return int((pixels(picture) == 0).all(-1).sum())  # pixels of the text

    assert drawn(x, y) == drawn(200, 150) > 5


@pytest.mark.parametrize(
    "name",
    ["x" * 5000, "word " * 100, "Слон в лесу", "犬", "\n", "", "a\nb\tc", "🐘 elephant", "שלום", "\ud800"],
    ids=range(10),
)
@pytest.mark.parametrize("size", [(1, 1), (30, 2000), (160, 160), (900, 40)])
def test_names_of_any_length_and_script_are_drawn(name: str, size: tuple[int, int]) -> None:
    boxes = torch.tensor([[0.0, 0, size[0], size[1]], [size[0] / 2, size[1] / 2, size[0], size[1]]])
    picture = draw_objects(plain(*size), boxes, torch.tensor([0, 0]), [name], torch.tensor([1.0, 0.25]))
    assert picture.size == size and is_colour(picture, class_colours([name])[0]).any()


def test_a_name_that_the_font_lacks_becomes_its_number() -> None:
    assert class_name(["Слон"], 0) == "Слон" and class_name(["cat", "犬"], 1) == "class 1" and class_name([" "], 0) == "class 0"
    assert class_name(CLASSES, 7) == "class 7"


def test_a_text_is_shortened_to_its_width() -> None:
    long = "".join(map(str, range(200)))
    for keep, kept in (("end", slice(-5, None)), ("start", slice(0, 5))):
        text = shortened(long, 100, keep=keep)
        assert 80 < font().getlength(text) <= 100 and text.strip("…") in long and long[kept] in text and "…" in text
    assert shortened("short", 100) == "short" and shortened(long, 3) == ""


def test_labels_of_neighbouring_boxes_do_not_hide_each_other() -> None:
    boxes = torch.tensor([[100.0, 100, 180, 200], [110, 104, 190, 204], [120, 108, 200, 208]])
    picture = draw_objects(plain(), boxes, torch.arange(3), ["animal"] * 3)
    alone = [draw_objects(plain(), boxes[i : i + 1], torch.tensor([i]), ["animal"] * 3) for i in range(3)]

    def letters(picture: Image.Image) -> int:
        return int((pixels(picture) == 0).all(-1).sum())

    assert letters(picture) == sum(map(letters, alone))


@pytest.mark.parametrize("scale", [1, 2])
def test_a_mask_covers_its_pixels(scale: int) -> None:
    mask = torch.zeros(1, 120, 160, dtype=torch.bool)
    mask[0, 40:100, 30:90] = True
    mask[0, 40:60, 30:50] = False
    fit = None if scale == 1 else (320, 240)
    boxes = torch.tensor([[20.0, 30, 100, 110]])
    with_mask = pixels(draw_objects(plain(160, 120), boxes, torch.tensor([1]), CLASSES, masks=mask, fit=fit))
    without = pixels(draw_objects(plain(160, 120), boxes, torch.tensor([1]), CLASSES, fit=fit))
    large = mask[0].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    changed = (with_mask != without).any(-1)
    covered = (without == GREY).all(-1)  # by neither the box nor the label
    assert torch.equal(changed[covered], large[covered])
    colour = torch.tensor(class_colours(CLASSES)[1])
    line = max(1, round(120 * scale / 180))
    inside = with_mask[80 * scale, 60 * scale]
    assert torch.allclose(inside.float(), GREY + predictions.FILL * (colour - GREY), atol=1.5)
    for row, column in ((70 * scale, 30 * scale), (70 * scale, 90 * scale - line), (100 * scale - line, 60 * scale)):
        assert (with_mask[row : row + line, column : column + line] == colour).all()
    scaled = is_colour(draw_objects(plain(160, 120), boxes, torch.tensor([1]), CLASSES, fit=fit), tuple(colour.tolist()))
    assert scaled[30 * scale, 20 * scale : 100 * scale].all() and scaled[110 * scale - 1, 20 * scale : 100 * scale].all()
    assert not scaled[110 * scale].any()
    assert (with_mask[60 * scale : 60 * scale + line, 40 * scale] == colour).all()  # along the corner that was cut out


def test_a_crowd_is_dashed() -> None:
    boxes = torch.tensor([[100.0, 100, 300, 250]])
    whole, dashed = (
        draw_objects(plain(), boxes, torch.tensor([0]), CLASSES, crowd=torch.tensor([crowd])) for crowd in (False, True)
    )
    colour = class_colours(CLASSES)[0]
    bottom = [is_colour(picture, colour)[249, 100:300].float().mean() for picture in (whole, dashed)]
    assert bottom[0] == 1 and 0.4 < bottom[1] < 0.6


def test_nothing_to_draw_and_boxes_outside_leave_the_image() -> None:
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    masks = torch.zeros(0, 300, 400, dtype=torch.bool)
    for image in (
        plain(),
        torch.full((3, 300, 400), GREY, dtype=torch.uint8),
        torch.full((1, 300, 400), GREY, dtype=torch.uint8),
    ):
        for classes in (CLASSES, ["x"]):
            picture = draw_objects(image, *nothing, classes, torch.zeros(0), masks, torch.zeros(0, dtype=torch.bool))
            assert (pixels(picture) == GREY).all() and picture.size == (400, 300)
    outside = torch.tensor([[-50.0, -50, -1, -1], [400, 0, 500, 100], [0, 300, 10, 310], [float("nan"), 0, 10, 10]])
    assert (pixels(draw_objects(plain(), outside, torch.zeros(4, dtype=torch.long), CLASSES)) == GREY).all()
    partly = draw_objects(plain(), torch.tensor([[-50.0, -50, 1000, 1000]]), torch.tensor([2]), CLASSES)
    assert is_colour(partly, class_colours(CLASSES)[2])[-1].all()
    five = torch.randint(0, 256, (5, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = pixels(draw_objects(five, *nothing, CLASSES))
    assert torch.equal(drawn, five.float().mean(0).round().byte()[..., None].expand(-1, -1, 3))


def test_what_does_not_fit_is_refused() -> None:
    boxes, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="2 boxes and 1 scores"):
        draw_objects(plain(), boxes, labels, CLASSES, torch.zeros(1))
    with pytest.raises(ValueError, match=r"masks of \(3, 4\) pixels for an image of \(300, 400\)"):
        draw_objects(plain(), boxes, labels, CLASSES, masks=torch.zeros(2, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be uint8"):
        draw_objects(torch.zeros(3, 8, 8), boxes, labels, CLASSES)
    with pytest.raises(ValueError, match=r"labels of \(2, 2\) pixels for an image of \(300, 400\)"):
        draw_labels(plain(), torch.zeros(2, 2, dtype=torch.uint8), CLASSES)
    with pytest.raises(ValueError, match="must be uint8"):
        index_png(torch.zeros(2, 2), CLASSES)


# Labels of pixels.


def quarters() -> tuple[Tensor, Tensor]:
    """True and predicted labels, 20 x 20: background, class 1 and 2, and ignored pixels; the upper half is predicted right."""
    true = torch.zeros(20, 20, dtype=torch.uint8)
    true[:, 10:] = 1
    true[10:, :10] = 2
    true[15:, 15:] = IGNORED
    predicted = true.clone()
    predicted[10:] = 0
    return true, predicted


def test_each_class_has_its_colour_and_what_is_ignored_is_light() -> None:
    classes = ["background", "cat", "dog"]
    true, predicted = quarters()
    picture = pixels(draw_labels(plain(20, 20), true, classes)).float()
    colours = torch.tensor([*class_colours(classes), WHITE]).float()
    expected = GREY + predictions.GREY * (colours[torch.where(true == IGNORED, 3, true).long()] - GREY)
    assert torch.allclose(picture, expected, atol=0.6)
    assert torch.equal(pixels(draw_labels(plain(20, 20), true, classes, fit=(40, 40)))[1::2, 1::2], picture.byte())

    wrong = pixels(draw_differences(plain(20, 20), predicted, true))
    differs = (true != predicted) & (true != IGNORED)
    assert (wrong[differs] == wrong[12, 2]).all() and (wrong[true == IGNORED] == wrong[19, 19]).all()
    assert (wrong[~differs & (true != IGNORED)] == GREY).all()
    assert torch.allclose(wrong[12, 2].float(), GREY + 0.85 * (torch.tensor(WRONG) - GREY), atol=0.6)
    assert wrong[19, 19].min() > 230


def test_numbers_of_a_mask_are_read_as_they_were_written() -> None:
    labels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    for count in (1, 3, 255):
        classes = ["background", *map(str, range(1, count))]
        buffer = io.BytesIO()
        index_png(labels, classes).save(buffer, format="PNG")
        with Image.open(buffer) as opened:
            assert opened.mode == "P" and torch.equal(torch.from_numpy(np.array(opened)), labels)
            colours = opened.convert("RGB")
            assert colours.getpixel((15, 15)) == WHITE
            assert [colours.getpixel((i % 16, i // 16)) for i in range(count)] == class_colours(classes)
    for few in (labels[:1, :1], labels[:5, :1]):  # of few numbers, of which PNG files may have fewer bits
        buffer = io.BytesIO()
        index_png(few, CLASSES).save(buffer, format="PNG", optimize=True)
        with Image.open(buffer) as opened:
            assert torch.equal(torch.from_numpy(np.array(opened)), few)


# Sheets.


def test_a_sheet_has_its_pictures_at_their_places_and_a_legend() -> None:
    colours = [(10 * row, 20, 30 * column) for row in range(3) for column in range(2)]
    rows = [[Image.new("RGB", (480, 360), colours[2 * row + column]) for column in range(2)] for row in range(3)]
    legend = [("cat", (1, 2, 3)), ("ignored", WHITE)]
    sheet = contact_sheet(rows, ("truth", "prediction"), ["a.jpg", "b.jpg", "c.jpg"], legend)
    assert sheet.width <= 1200
    for number, colour in enumerate(colours):
        where = is_colour(sheet, colour).nonzero()
        assert len(where) == 480 * 360
        assert (where.max(0).values - where.min(0).values).tolist() == [359, 479]
        assert (where[0, 1] > 480) == number % 2
    assert is_colour(sheet, (1, 2, 3)).sum() > 100
    last = is_colour(sheet, colours[-1]).nonzero()[-1, 0]
    assert is_colour(sheet, (1, 2, 3)).nonzero()[0, 0] > last


@pytest.mark.parametrize("columns", [2, 4])
def test_a_sheet_is_limited(columns: int) -> None:
    tall = [[Image.new("RGB", (300, 3000))] * columns] * 40
    sheet = contact_sheet(tall, ["t"] * columns, ["c" * 1000] * 40, [(f"class {i}", (0, i, 0)) for i in range(200)])
    assert sheet.width <= 1200 and sheet.width * sheet.height <= 20e6 and sheet.height < 24 * 700
    tiny = contact_sheet([[Image.new("RGB", (1, 1), (9, 9, 9))] * columns], ["t"] * columns, ["犬"])
    assert is_colour(tiny, (9, 9, 9)).sum() >= columns * 200**2
    with pytest.raises(ValueError, match="0 rows"):
        contact_sheet([], ["t"], [])
    with pytest.raises(ValueError, match="1 rows of"):
        contact_sheet([[plain()]], ["a", "b"], ["c"])


def test_rows_of_detection_and_segmentation() -> None:
    pytest.importorskip("pycocotools", reason="pip install 'sparkme[detection]'")
    masks = torch.zeros(2, 120, 160, dtype=torch.bool)
    masks[0, 20:60, 20:60], masks[1, 70:110, 100:150] = True, True
    assert torch.equal(decode_masks(encode_masks(masks), (120, 160)), masks) and decode_masks([], (3, 4)).shape == (0, 3, 4)
    boxes = np.array([[20.0, 20, 60, 60], [100, 70, 150, 110]])
    truth = GroundTruth(
        1, (120, 160), boxes, np.array([0, 2]), np.array([1600.0, 2000]), np.array([False, False]), encode_masks(masks)
    )
    found = Detections(boxes.tolist(), [0.9, 0.3], [0, 1], encode_masks(masks))
    true, predicted = pictures_of_detection(plain(160, 120), found, truth, CLASSES)
    assert true.size == predicted.size == (480, 360)
    colours = class_colours(CLASSES)
    assert [bool(is_colour(true, colour).any()) for colour in colours] == [True, False, True]
    assert [bool(is_colour(predicted, colour).any()) for colour in colours] == [True, False, False]  # one has a low score
    assert image_score(found, truth) == pytest.approx(2 / 3)
    bare = pictures_of_detection(plain(160, 120), Detections([], [], []), GroundTruth(1, (120, 160)), CLASSES)
    assert (
        all((pixels(picture) == GREY).all() for picture in bare)
        and image_score(Detections([], [], []), GroundTruth(1, (9, 9))) == 1
    )
    maps = quarters()
    row = pictures_of_segmentation(plain(20, 20), maps[1], maps[0], ["background", "cat", "dog"])
    assert len(row) == 4 and {picture.size for picture in row} == {(480, 480)}
    legend = legend_of(["background", "cat", "dog", "unseen"], maps)
    assert [name for name, _ in legend] == ["background", "cat", "dog", "ignored"] and legend[1][1] == colours[1]


# Which images, and their figures.


def test_the_sample_is_the_same_whatever_the_scores() -> None:
    rng = random.Random(0)
    first, second = ({number: rng.random() for number in range(100)} for _ in range(2))
    chosen = choose(first, 6)
    assert chosen["sample"] == choose(dict(reversed(second.items())), 6)["sample"] != choose(first, 6, seed=1)["sample"]
    ordered = sorted(first, key=first.__getitem__)
    assert chosen["worst"] == ordered[:6] and chosen["best"] == ordered[::-1][:6] and len({*chosen["sample"]}) == 6
    less = {number: value for number, value in first.items() if number != chosen["sample"][2]}  # one could not be read
    assert len({*choose(less, 6)["sample"]} & {*chosen["sample"]}) == 5


def test_few_images_and_those_without_a_figure() -> None:
    assert choose({}, 4) == {"best": [], "worst": [], "sample": []}
    assert choose({3: 0.5}, 4) == {"best": [3], "worst": [], "sample": [3]}
    few = choose({1: 0.1, 2: None, 3: 0.9, 4: float("nan"), 5: 0.5}, 4)
    assert few == {"best": [3, 5], "worst": [1], "sample": few["sample"]} and len(few["sample"]) == 4
    assert choose(dict.fromkeys(range(10), 0.5), 2)["best"] == [0, 1]  # equal ones by their numbers


def brute_f1(found: list[tuple], true: list[tuple]) -> float:
    """F1 by going through all pairs, pixel by pixel of boxes with integer corners."""

    def cells(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    left = [entry for entry in true if not entry[2]]
    crowds = [entry for entry in true if entry[2]]
    hits = wrong = 0
    for box, label, _ in sorted((entry for entry in found if entry[2] >= 0.5), key=lambda entry: -entry[2]):
        best, best_share = None, 0.0
        for entry in left:
            share = len(cells(box) & cells(entry[0])) / len(cells(box) | cells(entry[0]))
            if entry[1] == label and share >= 0.5 and share > best_share:
                best, best_share = entry, share
        if best is not None:
            left.remove(best)
            hits += 1
        elif not any(c[1] == label and len(cells(box) & cells(c[0])) >= 0.5 * len(cells(box)) for c in crowds):
            wrong += 1
    count = 2 * hits + wrong + len(left)
    return 2 * hits / count if count else 1.0


def test_the_figure_of_detections_is_that_of_a_count() -> None:
    rng, seen_values = random.Random(0), set()
    for _ in range(150):

        def box() -> tuple[int, int, int, int]:
            x, y = rng.randrange(12), rng.randrange(12)
            return (x, y, x + rng.randrange(3, 9), y + rng.randrange(3, 9))

        true = [(box(), rng.randrange(2), rng.random() < 0.25) for _ in range(rng.randrange(5))]
        found = []
        for i in range(rng.randrange(7)):
            near = rng.choice(true)[0] if true and rng.random() < 0.7 else box()
            moved = tuple(value + rng.choice([0, 0, 0, 1]) for value in near)
            found.append((moved if moved[2] > moved[0] and moved[3] > moved[1] else near, rng.randrange(2), 0.35 + 0.09 * i))
        rng.shuffle(found)
        got = box_f1(
            torch.tensor([entry[0] for entry in found]).reshape(-1, 4),
            torch.tensor([entry[1] for entry in found]),
            torch.tensor([entry[2] for entry in found]),
            torch.tensor([entry[0] for entry in true]).reshape(-1, 4),
            torch.tensor([entry[1] for entry in true]),
            torch.tensor([entry[2] for entry in true]) if true else None,
        )
        assert got == pytest.approx(brute_f1(found, true))
        seen_values.add(round(got, 3))
    assert len(seen_values) > 8


def test_the_mean_iou_of_an_image_is_that_of_sets_of_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    true, predicted = (torch.randint(0, 4, (9, 11), generator=generator, dtype=torch.uint8) for _ in range(2))
    true[true == 3] = IGNORED
    shares = []
    for number in range(4):
        counted = true != IGNORED
        are, taken = (true == number) & counted, (predicted == number) & counted
        shares.append(float((are & taken).sum() / (are | taken).sum()))
    assert shares[3] == 0 and mean_iou(predicted, true) == image_score(predicted, true) == pytest.approx(np.mean(shares))
    assert mean_iou(true, torch.full_like(true, IGNORED)) is None
    right = torch.where(true == IGNORED, 0, true)
    assert mean_iou(right, true) == 1
    assert mean_iou(torch.tensor([[0, 5]]), torch.tensor([[0, 5]])) == 1  # classes 1 to 4 do not count


# loss.png.


def test_curves_of_a_detector_are_ap_and_ap50() -> None:
    kinds = [f"val_{kind}_{name}{end}" for kind in ("box", "mask") for name in COCO_FIGURES for end in ("", "_average")]
    for names, expected in (
        (kinds, ["box AP", "box AP50", "mask AP", "mask AP50", "averaged weights"]),
        (["val_mean_iou", "val_pixel_accuracy", "val_mean_accuracy"], ["mean IoU", "pixel accuracy"]),
        (["knn", "val_top1", "val_share"], ["kNN accuracy", "top-1 accuracy", "share"]),
    ):
        axes = Figure().add_subplot()
        plot_measured(axes, [{"step": i, "epoch": i} | dict.fromkeys(names, 0.1 * i) for i in (1, 2)])
        labels = [line.get_label() for line in axes.lines]
        assert [label for label in labels if not label.startswith("_")] == expected
        drawn = [line for line in axes.lines if len(line.get_xdata())]
        assert len(drawn) == (8 if names is kinds else len(expected))
        assert {line.get_linestyle() for line in drawn} == ({"-", "--"} if names is kinds else {"-"})
        assert list(drawn[0].get_ydata()) == pytest.approx([10, 20])


def test_losses_of_another_task_are_not_compared(tmp_path: Path) -> None:
    line = json.dumps({"step": 1, "epoch": 1, "loss": 0.5, "learning_rate": 0.1})
    for name, config in {
        "this": {"command": "finetune", "task": "detection"},
        "same": {"command": "finetune", "task": "detection"},
        "other": {"command": "finetune", "task": "segmentation"},
        "old": {"command": "finetune"},
        "classes": {"command": "finetune", "task": "classification"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "metrics.jsonl").write_text(f"{line}\n")
    assert {*earlier_runs(tmp_path / "this")} == {"same"} and {*earlier_runs(tmp_path / "classes")} == {"old"}
