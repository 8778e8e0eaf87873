"""Labelled images: folders of classes, tables, splits; and how whole images are cut."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pictures import make_images, make_labelled
from PIL import Image

from sparkme.data.dataset import CropDataset, EpochSampler
from sparkme.data.labelled import Labelled, WholeImages, find_labelled, split_digest, whole_batches
from sparkme.data.sources import find_source
from sparkme.errors import UserError


def test_a_folder_is_a_class_and_the_split_takes_a_share_of_each(tmp_path: Path) -> None:
    data = make_labelled(tmp_path, {"red": 20, "blue": 10, "green": 2})
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "empty").mkdir()
    split = find_labelled(data, val_share=0.2, seed=1)
    assert split.train.classes == split.val.classes == ["blue", "green", "red"]
    assert torch.bincount(split.val.labels).tolist() == [2, 1, 4] and torch.bincount(split.train.labels).tolist() == [8, 1, 16]
    assert not set(split.train.paths) & set(split.val.paths) and len({*split.train.paths, *split.val.paths}) == 32
    for part in (split.train, split.val):
        assert all(part.classes[label] == path.relative_to(data).parts[0] for path, label in zip(part.paths, part.labels))
    assert "data has no split" in split.note and "seed 1" in split.note
    assert find_labelled(data, seed=1).val.paths == split.val.paths != find_labelled(data, seed=2).val.paths


def test_a_split_that_is_there_is_kept(tmp_path: Path) -> None:
    make_labelled(tmp_path / "train", {"red": 3, "blue": 2})
    make_labelled(tmp_path / "val", {"red": 1})
    split = find_labelled(tmp_path)
    assert (len(split.train), len(split.val)) == (5, 1) and split.val.labels.tolist() == [1]
    make_labelled(tmp_path / "val", {"green": 1})
    with pytest.raises(UserError, match="a class 'green' that the training images lack"):
        find_labelled(tmp_path)


def test_folders_of_systems_are_neither_classes_nor_images_and_are_said(tmp_path: Path) -> None:
    make_labelled(tmp_path, {"red": 4, "blue": 4})
    systems = "@eaDir #recycle $RECYCLE.BIN", "System Volume Information", ".Trash-1000", "lost+found", "__MACOSX"
    names = [*systems[0].split(), *systems[1:]]
    for name in names:
        make_labelled(tmp_path / name, {"red": 2})
        make_labelled(tmp_path / "red" / "deeper", {name: 2})
    (tmp_path / "loose.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    split = find_labelled(tmp_path)
    assert split.train.classes == ["blue", "red"] and len(split.train) + len(split.val) == 8
    said, *others = split.remarks
    assert said.startswith("left out: 14 hidden or system folders: ") and all(f"{name} (2)" in said for name in names)
    assert others == ["left out: 1 image outside the class folders", "left out: the folder empty, which has no images"]
    source = find_source(str(tmp_path))
    assert len(source) == 9 and source.notes == [said]
    assert len(find_source(str(tmp_path / "@eaDir"))) == 2  # who names it means it


def test_a_list_and_a_shard_leave_out_what_is_of_systems(tmp_path: Path) -> None:
    make_labelled(tmp_path, {"red": 2, "@eaDir": 2})
    names = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*.png"))]
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            archive.add(tmp_path / name, f"./{name}")
    for kind in ("list.txt", "x.tar"):
        source = find_source(str(tmp_path / kind), cache=tmp_path / "cache")
        assert len(source) == 2 and source.notes == ["left out: 2 files in hidden or system folders: @eaDir (2)"]


@pytest.mark.parametrize("kind", ["folder", "table", "shard", "dataset"])
def test_copies_of_an_image_are_on_one_side_of_a_split(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_labelled(tmp_path / "data", {"red": 10, "blue": 10})
    for i in range(10):  # in another folder, in the name of another, and one in another class
        shutil.copy(data / "red" / ("deeper" if i % 2 else "") / f"{i:03d}.png", data / "red" / f"copy{i}.png")
    shutil.copy(data / "red" / "000.png", data / "blue" / "red.png")
    (data / "red" / "void0.png").touch()  # nothing is no copy of nothing
    (data / "red" / "void1.png").touch()
    where = {"folder": str(data), "table": str(tmp_path / "t.csv"), "shard": str(tmp_path / "x.tar"), "dataset": "copied:Own"}
    paths = [path.relative_to(data) for path in sorted(data.rglob("*.png"))]
    (tmp_path / "t.csv").write_text("".join(f"{path},{path.parts[0]}\n" for path in paths))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for i, path in enumerate(paths):
            archive.add(data / path, f"{i:03d}.png")
            (tmp_path / "cls").write_text(path.parts[0])
            archive.add(tmp_path / "cls", f"{i:03d}.cls")
    (tmp_path / "copied.py").write_text(
        f"from torchvision.datasets import ImageFolder\nclass Own(ImageFolder):\n    def __init__(self):\n"
        f"        super().__init__({str(data)!r}, is_valid_file=lambda name: name.endswith('png') and 'void' not in name)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    split = find_labelled(where[kind], val_share=0.4, root=data, cache=tmp_path / "cache")
    assert "; 11 images are copies of others, 2 of them with another class, such as " in split.note and "(blue)" in split.note
    assert split.note.endswith("; copies stay on one side")
    contents = [{part.images.digest(i) for i in range(len(part)) if is_whole(part, i)} for part in (split.train, split.val)]
    assert not contents[0] & contents[1] and len(contents[0] | contents[1]) == 20 and 6 <= len(contents[1]) <= 8
    again = find_labelled(where[kind], val_share=0.4, root=data, cache=tmp_path / "cache")
    assert split_digest(again.train, again.val) == split_digest(split.train, split.val)


def is_whole(part: Labelled, number: int) -> bool:
    try:
        return bool(part.images.digest(number))
    except OSError:
        return False


def test_a_class_of_copies_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    data = make_labelled(tmp_path, {"red": 3, "blue": 1})
    shutil.copy(data / "blue" / "000.png", data / "blue" / "001.png")
    with pytest.raises(UserError, match=r"class 'blue' has 1 image without its copies; it needs one to train"):
        find_labelled(data)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_that_links_put_into_two_classes_is_refused(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    data = make_labelled(tmp_path, {"red": 4, "blue": 4})
    link(data / "red" / "002.png", data / "red" / "again.png")
    assert "1 images are copies" in find_labelled(data).note
    link(data / "red" / "002.png", data / "blue" / "wrong.png")
    reason = r"blue/wrong\.png \(blue\) and .*red/002\.png \(red\) are one file with two labels \(2 such pairs\)"
    with pytest.raises(UserError, match=reason):
        find_labelled(data)
    (data / "blue" / "wrong.png").unlink()
    os.symlink(data / "red", data / "crimson")
    with pytest.raises(UserError, match=r"red.*red.* are one file with two labels \(5 such pairs\)"):
        find_labelled(data)


def test_folders_beside_a_split_are_said_and_two_of_one_name_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        make_labelled(tmp_path / part, {"red": 2, "blue": 2})
    assert find_labelled(tmp_path).note.endswith("in val; not used: test")
    make_labelled(tmp_path / "Train", {"red": 2})
    with pytest.raises(UserError, match=r"has both (Train and train|train and Train); leave one out"):
        find_labelled(tmp_path)


def test_a_table_names_paths_labels_and_parts(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    table = tmp_path / "labels.csv"
    table.write_text("path,label,part\nsub0/0.png,cat,train\nsub1/1.png,dog,train\nsub0/2.png,cat,val\n")
    split = find_labelled(tmp_path / "images", table)
    assert [p.name for p in split.train.paths] == ["0.png", "1.png"] and split.val.labels.tolist() == [0]
    assert split.train.classes == ["cat", "dog"]
    beside = tmp_path / "images" / "beside.csv"
    beside.write_text("sub0/0.png,cat\nsub1/1.png,dog\nsub0/2.png,cat\nsub1/3.png,dog\n")
    assert len(find_labelled(beside).val) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("../secret.png,a\nsub0/0.png,b\n", "line 1 names '../secret.png', which lies outside"),
        ("/etc/passwd,a\nsub0/0.png,b\n", "line 1 names '/etc/passwd', which lies outside"),
        ("sub0/0.png,a\nsub0/9.png,b\n", "line 2 names 'sub0/9.png', but there is no such file"),
        ("sub0/0.png,a\nsub0/2.png\n", "line 2 is not path,label"),
        ("sub0/0.png,a\nsub0/2.png,a\n", "1 different labels"),
        ("filename,class\nsub0/0.png,b\n", "1 different labels"),
        ("where,what\nsub0/9.png,b\n", "line 1 names 'where'.*a header must name the image column, such as path"),
        ("sub0/0.png,a\nsub0/2.png,b\n./sub0/0.png,b\n", "line 3 names './sub0/0.png' again, after line 1"),
        ("sub0/0.png,a,train\nsub0/2.png,a,train\nsub1/1.png,b,val\n", "class 'b' has no training image"),
        ("sub0/0.png,a,train\nsub0/2.png,b,holdout\n", "'holdout'; it must be train or val"),
        ("sub0/0.png,a,train\nsub0/2.png,b,train\n", "2 lines for train and 0 for val"),
        ("sub0/0.png,a\nsub1/1.png,b\nsub0/2.png,b\n", "class 'a' has 1 image"),
    ],
)
def test_mistakes_in_a_table_are_named(tmp_path: Path, lines: str, message: str) -> None:
    make_images(tmp_path / "images")
    (tmp_path / "secret.png").write_bytes(b"")
    table = tmp_path / "labels.csv"
    table.write_text(lines)
    with pytest.raises(UserError, match=message):
        find_labelled(tmp_path / "images", table)


def test_mistakes_in_folders_are_named(tmp_path: Path) -> None:
    make_labelled(tmp_path / "one", {"red": 3})
    with pytest.raises(UserError, match="has 1 folders with images"):
        find_labelled(tmp_path / "one")
    with pytest.raises(UserError, match="is not a folder and matches no file"):
        find_labelled(tmp_path / "none")
    make_labelled(tmp_path / "two", {"red": 3, "blue": 4})
    with pytest.raises(UserError, match=r"--val-share 1.0 is outside \(0, 1\)"):
        find_labelled(tmp_path / "two", val_share=1.0)
    train = find_labelled(tmp_path / "two", val_share=0.4).train
    with pytest.raises(UserError, match="--shots 3: class 'blue' has 2 training images"):
        train.shots(3, seed=0)
    with pytest.raises(UserError, match="--shots 0 must be at least 1"):
        train.shots(0, seed=0)
    make_labelled(tmp_path / "half" / "Train", {"red": 3, "blue": 4})
    with pytest.raises(UserError, match="has a folder Train but no folder val"):
        find_labelled(tmp_path / "half")
    (tmp_path / "half" / "Train").rename(tmp_path / "half" / "bus")
    make_labelled(tmp_path / "half", {"train": 5})  # a class that is called so
    assert find_labelled(tmp_path / "half").train.classes == ["bus", "train"]


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Training", "Testing"), ("train", "dev"), ("Train", "Eval")])
def test_a_split_that_is_there_is_kept_whatever_its_folders_are_called(train: str, val: str, tmp_path: Path) -> None:
    make_labelled(tmp_path / train, {"red": 3, "blue": 4})
    make_labelled(tmp_path / val, {"blue": 2})
    make_labelled(tmp_path / train / "red", {".thumbnails": 3})
    split = find_labelled(tmp_path)
    assert (len(split.train), len(split.val), split.val.classes) == (7, 2, ["blue", "red"])


def test_shots_are_drawn_by_the_seed_and_as_many_of_each_class(tmp_path: Path) -> None:
    train = find_labelled(make_labelled(tmp_path, {"red": 20, "blue": 15})).train
    draws = [train.shots(4, seed) for seed in range(3)]
    assert all(torch.bincount(draw.labels).tolist() == [4, 4] for draw in draws)
    assert draws[0].paths == train.shots(4, 0).paths and len({tuple(draw.paths) for draw in draws}) == 3


def test_whole_images_are_the_middle_of_what_covers_the_size(tmp_path: Path) -> None:
    """200 x 100 becomes 134 x 67, of which the middle 96 x 64 are taken: a box from 50 to 150 then lies at 14.5 to 81.5."""
    picture = Image.new("RGB", (200, 100), (0, 0, 0))
    picture.paste((200, 100, 50), (50, 0, 150, 100))
    picture.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    Image.new("RGB", (30, 60), (9, 9, 9)).save(tmp_path / "c.png")
    (batch,) = whole_batches(
        WholeImages([tmp_path / n for n in ("a.png", "b.png", "c.png")], (64, 96)), batch_size=4, workers=0
    )
    assert batch.images is not None and batch.images.shape == (2, 3, 64, 96) and batch.numbers.tolist() == [0, 2]
    assert len(batch.unreadable) == 1 and "b.png" in batch.unreadable[0]
    row = batch.images[0, 0, 32]
    assert (row[19:77] == 200).all() and (row[:10] == 0).all() and (row[86:] == 0).all()
    assert (batch.images[1] == 9).all()


def test_labels_go_with_their_images_also_where_another_replaces_one(tmp_path: Path) -> None:
    data = make_labelled(tmp_path, {"red": 6, "blue": 6})
    train = find_labelled(data, val_share=0.1).train
    train.paths[3].write_bytes(b"no image")
    dataset = CropDataset(train.paths, (32, 32), min_scale=0.5, seed=0, labels=train.labels)
    for draw in range(len(train)):
        sample = dataset[0, draw]
        assert sample.image is not None
        red, _, blue = sample.image.float().mean((1, 2))
        assert train.classes[sample.label] == ("red" if red > blue else "blue")
    crops = [[dataset[epoch, 3 + copy * len(train)].label for copy in range(2)] for epoch in range(12)]
    assert all(first == second for first, second in crops)  # crops of an image stay crops of one image
    assert len({first for first, _ in crops}) == 2


def test_repeated_augmentation_crops_an_image_several_times_in_a_row() -> None:
    sampler = EpochSampler(8, 8, 6, seed=0, steps=range(2), repeats=3)
    for batch in sampler:
        images = [draw % 8 for _, draw in batch]
        assert images[0] == images[1] == images[2] != images[3] == images[4] == images[5]
        assert len({draw for _, draw in batch}) == 6
    of_ranks = [next(iter(EpochSampler(8, 8, 8, 0, range(1), rank, world=2, repeats=2))) for rank in range(2)]
    assert all(batch[i][1] % 8 == batch[i + 1][1] % 8 for batch in of_ranks for i in (0, 2))  # in the same process
    (whole,) = EpochSampler(8, 8, 8, 0, range(1), repeats=2)
    assert sorted(pair for batch in of_ranks for pair in batch) == sorted(whole)
    plain = EpochSampler(8, 8, 6, seed=0, steps=range(2))
    assert all(sorted({draw for _, draw in batch}) == sorted(draw for _, draw in batch) for batch in plain)


def test_a_table_elsewhere_names_images_below_a_root(tmp_path: Path) -> None:
    data = make_labelled(tmp_path / "data", {"red": 3, "blue": 3})
    names = sorted(str(path.relative_to(data)) for path in data.rglob("*.png"))
    table = tmp_path / "lists" / "table.csv"
    table.parent.mkdir()
    table.write_text("".join(f"{name},{Path(name).parts[0]}\n" for name in names))
    found = find_labelled(table, root=data)
    assert len(found.train) + len(found.val) == 6 and found.train.classes == ["blue", "red"]
    with pytest.raises(UserError, match="there is no such file"):
        find_labelled(table)
