"""benchmarks.scenes: masks are what is drawn, parts share nothing, a seed gives one set, and pycocotools reads it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import scenes

pytest.importorskip("pycocotools", reason="pip install 'sparkme[detection]'")
pytest.importorskip("skimage", reason="pip install 'sparkme[demo]'")
from pycocotools.coco import COCO

CLASSES = ("disc", "frame", "wedge")
FAMILIES = 5


def make_pictures(folder: Path) -> Path:
    """Three shapes in five colours, two files of each: a person is a woman as well."""
    y, x = np.mgrid[:48, :40]
    distance = np.hypot(x - 20, y - 24)
    alphas = {
        "disc": np.clip(20 - distance, 0, 1),
        "frame": (np.maximum(abs(x - 20), abs(y - 24)) < 18) & (distance > 9),
        "wedge": (y > 2 * abs(x - 20)) * np.linspace(0.3, 1, 48)[:, None],
    }
    for name, alpha in alphas.items():
        (folder / name).mkdir(parents=True)
        for number in range(FAMILIES):
            for person in ("1f468", "1f469"):
                colour = np.random.default_rng(number).integers(0, 255, 3)
                pixels = np.dstack([np.broadcast_to(colour, (48, 40, 3)), 255 * alpha]).astype(np.uint8)
                Image.fromarray(pixels, "RGBA").save(folder / name / f"{person}-200d-1f33{number}.png")
    return folder


def make(output: Path, pictures: Path, *words: str) -> Path:
    numbers = ["--train", "12", "--val", "4", "--test", "4", "--unlabelled", "3", "--size", "96"]
    assert scenes.main(["--output", str(output), "--pictures", str(pictures), *numbers, *words]) == 0
    return output


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return make(tmp_path_factory.mktemp("scenes") / "set", pictures)


def annotations(folder: Path, part: str) -> dict:
    return json.loads((folder / "annotations" / f"instances_{part}.json").read_text())


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, made: Path, pictures: Path) -> None:
    again, other = digests(make(tmp_path / "again", pictures)), digests(make(tmp_path / "other", pictures, "--seed", "1"))
    assert again == digests(made)
    same = {name for name in again if again[name] == other[name]}
    assert not {name for name in same if name.endswith((".jpg", ".json"))}


def test_fewer_scenes_are_the_first_of_more(tmp_path: Path, made: Path, pictures: Path) -> None:
    few = make(tmp_path / "few", pictures, "--train", "3")
    for name in ("train/000002.jpg", "masks/train/000002.png", "val/000003.jpg"):
        assert (few / name).read_bytes() == (made / name).read_bytes()
    all_annotations = annotations(made, "train")["annotations"]
    assert annotations(few, "train")["annotations"] == [each for each in all_annotations if each["image_id"] <= 3]


def test_parts_share_no_picture_and_no_photograph(made: Path, pictures: Path) -> None:
    _, sources = scenes.find_sources(scenes.create_parser().parse_args(["--output", "x", "--pictures", str(pictures)]))
    for name in CLASSES:
        codes = [{path.stem[-5:] for family in sources[part].families[name] for path in family} for part in scenes.PARTS]
        assert all(codes) and sum(map(len, codes)) == len(set.union(*codes)) == FAMILIES
        assert all(len(family) == 2 for part in scenes.PARTS for family in sources[part].families[name])
    used = []
    for part in scenes.PARTS:
        record = annotations(made, part)
        assert {each["picture"] for each in record["annotations"]} <= {
            path.name for families in sources[part].families.values() for family in families for path in family
        }
        used.append({each["photograph"] for each in record["images"]})
        assert used[-1] <= set(scenes.PHOTOGRAPHS[part])
    assert sum(map(len, used)) == len(set.union(*used))


def test_number_and_size_of_objects(tmp_path: Path, pictures: Path) -> None:
    few = annotations(make(tmp_path / "few", pictures, "--objects", "1", "--object-sides", "0.9", "0.9"), "train")
    assert 8 <= len(few["annotations"]) <= 24  # one or two in each of 12 scenes, if not left out
    many = annotations(make(tmp_path / "many", pictures, "--objects", "12", "--object-sides", "0.15", "0.15"), "train")
    assert len(many["annotations"]) > 60
    assert max(max(each["bbox"][2:]) for each in many["annotations"]) <= 30  # 14.4 pixels, stretched and turned
    assert np.median([max(each["bbox"][2:]) for each in few["annotations"]]) > 60


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f468-200d-1f373.png", "1f469-200d-1f373.png"),
        ("1f3c3-200d-2640-fe0f.png", "1f3c3-200d-2642-fe0f-200d-27a1-fe0f.png"),
        ("1f550.png", "1f55c.png"),
    ],
)
def test_variants_of_an_emoji_are_one_picture(one: str, other: str) -> None:
    assert scenes.family_of(one) == scenes.family_of(other)
    assert scenes.family_of(one) != scenes.family_of("1f34e.png")


def test_masks_boxes_and_areas_are_those_of_what_was_drawn(made: Path, pictures: Path) -> None:
    args = scenes.create_parser().parse_args(["--output", "x", "--pictures", str(pictures), "--size", "96"])
    classes, sources = scenes.find_sources(args)
    coco = COCO(made / "annotations" / "instances_train.json")
    checked = hidden = 0
    for number in range(12):
        scene = scenes.draw_scene(np.random.default_rng((0, 0, number)), classes, sources["train"], args)
        shown: dict[tuple[int, int], int] = {}  # by pixel, which layer; those above take it from those below
        drawn = 0
        for place, layer in enumerate(scene.layers):
            for y, x in zip(*(values.tolist() for values in np.nonzero(layer.alpha > 127)), strict=True):
                at = x + layer.corner[0], y + layer.corner[1]
                if 0 <= at[0] < 96 and 0 <= at[1] < 96:
                    shown[at] = place
                    drawn += 1
        hidden += drawn - len(shown)
        found = coco.loadAnns(coco.getAnnIds(number + 1))
        assert [each["category_id"] for each in found] == [layer.label + 1 for layer in scene.layers]
        index = np.asarray(Image.open(made / "masks" / "train" / f"{number:06d}.png"))
        expected = np.zeros((96, 96), dtype=np.uint8)
        for place, each in enumerate(found):
            pixels = {at for at, owner in shown.items() if owner == place}
            assert {(x, y) for y, x in np.argwhere(coco.annToMask(each)).tolist()} == pixels
            left, top = min(x for x, _ in pixels), min(y for _, y in pixels)
            right, bottom = max(x for x, _ in pixels) + 1, max(y for _, y in pixels) + 1
            assert each["bbox"] == [left, top, right - left, bottom - top]
            assert each["area"] == len(pixels) >= scenes.LEAST_AREA and each["iscrowd"] == 0
            for x, y in pixels:
                expected[y, x] = each["category_id"]
            checked += 1
        assert (index == expected).all()
    assert checked > 30 and hidden > 100
    assert (made / "classes.txt").read_text().split() == ["background", *CLASSES]


def test_an_object_is_where_pixels_change_and_not_where_it_could_not_be_seen() -> None:
    rng = np.random.default_rng(0)
    alpha = rng.integers(0, 256, (20, 24), dtype=np.uint8)
    white, black = np.full((20, 24, 3), 255, np.float32), np.zeros((20, 24, 3), np.float32)
    canvas, nothing = np.zeros((40, 40, 3), np.float32), np.full((40, 40), -1, dtype=np.int16)
    drawn = scenes.paste(canvas, nothing, [], white, alpha, (-3, 10))
    assert drawn
    assert np.array_equal(drawn[1] == 0, drawn[0][..., 0] > 127.5)
    assert not canvas.any() and (nothing == -1).all()  # as they were: a place may be refused
    assert scenes.paste(canvas, nothing, [], black, alpha, (-3, 10)) is None  # no contrast
    assert scenes.paste(canvas, nothing, [], white, alpha, (-18, 10)) is None  # mostly outside
    assert scenes.paste(canvas, nothing, [], white, alpha, (-40, 10)) is None
    area = int((drawn[1] == 0).sum())
    opaque = np.full_like(alpha, 255)
    assert scenes.paste(drawn[0], drawn[1], [area], white * 0.5, opaque, (-3, 10)) is None  # the one below is hidden
    assert scenes.paste(drawn[0], drawn[1], [area], white * 0.5, opaque[:, :10], (-3, 10))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", "0"], "--train 0 must be at least 1"),
        (["--size", "8"], "--size 8 is outside of 64 to 1024"),
        (["--pictures", "nowhere"], "--pictures nowhere is not a folder"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scenes.main(["--output", str(tmp_path / "set"), "--pictures", str(pictures), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_bad_pictures_and_a_full_folder_are_refused(
    tmp_path: Path, made: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "few" / "a"
    folder.mkdir(parents=True)
    words = ["--output", str(tmp_path / "set"), "--pictures", str(folder.parent)]
    for number, message in enumerate(["has 1 different pictures; each of train", "has 2", "is transparent everywhere"]):
        Image.new("RGBA", (20, 20)).save(folder / f"{number}.png")
        assert scenes.main(words) == 2 and message in capsys.readouterr().err
    (folder / "0.png").write_bytes(b"torn")
    assert scenes.main(words) == 2 and "0.png cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
    assert scenes.main(["--output", str(made), "--pictures", str(pictures)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
