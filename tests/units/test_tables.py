"""Lists and tables of images as people have them: what part columns, heads, encodings, names of files, labels."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from sparkme.data.labelled import Split, class_counts, find_labelled, split_digest
from sparkme.data.sources.table import read_list
from sparkme.errors import UserError
from sparkme.finetune import main as finetune
from sparkme.probe import main as probe

NAMES = [f"images/{name}/{name}{i}.png" for name in ("cat", "dog") for i in range(4)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of each of two classes, no two of the same content, and two with odd names."""
    folder = tmp_path_factory.mktemp("tables")
    for i, name in enumerate([*NAMES, "images/a, b.png", "images/Zoë.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(folder / name)
    return folder


def lines(form: str, head: str = "") -> str:
    """A line of each picture: `path` and its `stem`, its class as `label`, its `number`."""
    rows = [
        form.format(
            path=path,
            stem=Path(path).stem,
            name=Path(path).name,
            label=Path(path).parent.name,
            number=i,
            part=i % 4,
            windows=path.replace("/", "\\"),
            cat=int("cat" in path),
            dog=int("dog" in path),
            odd=i % 2,
            none=0,
        )
        for i, path in enumerate(NAMES)
    ]
    return "".join(f"{row}\n" for row in ([head] if head else []) + rows)


def labels_of(split: Split) -> dict[str, str | set[str]]:
    """What each picture has, by its name below the root."""
    found: dict[str, str | set[str]] = {}
    for part in (split.train, split.val):
        for path, label in zip(part.paths, part.labels.tolist(), strict=True):
            several = isinstance(label, list)
            found["/".join(path.parts[-3:])] = (
                {name for name, has in zip(part.classes, label, strict=True) if has} if several else part.classes[label]
            )
    return found


EXPECTED = {path: path.split("/")[1] for path in NAMES}
PLAIN = lines("{path},{label}", "path,label")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", PLAIN),
        ("no_head.csv", lines("{path},{label}")),
        ("mark.csv", b"\xef\xbb\xbf" + PLAIN.encode()),
        ("windows_lines.csv", PLAIN.replace("\n", "\r\n") + "\r\n\r\n,\r\n"),
        ("old_mac_lines.csv", PLAIN.replace("\n", "\r")),
        ("utf16.csv", PLAIN.encode("utf-16")),
        ("utf16_without_mark.csv", PLAIN.encode("utf-16-le")),
        ("utf16_be_without_mark.csv", PLAIN.encode("utf-16-be")),
        ("utf32.csv", PLAIN.encode("utf-32")),
        ("semicolon.csv", lines("{path};{label}", "path;label")),
        ("excel.csv", "sep=;\n" + lines("{path};{label}", "path;label")),
        ("tab.csv", lines("{path}\t{label}", "path\tlabel")),
        ("tab.tsv", lines("{path}\t{label}", "File Name\tClass")),
        ("bar.csv", lines("{path}|{label}")),
        ("spaces.csv", lines('"{path}",  "{label}"', "path, label")),
        ("filename.csv", lines("{path},{label}", "filename,label")),
        ("unknown_head.csv", lines("{path},{label}", "flower photo,species")),
        ("label_first.csv", lines("{label},{path}", "class,image")),
        ("label_first_no_head.csv", lines("{label},{path}")),
        ("index.csv", lines("{number},{path},{label}", ",path,label")),
        ("index_no_head.csv", lines("{number},{path},{label}")),
        ("pandas.csv", lines("{number},{path},{label}", "Unnamed: 0,image_path,category")),
        ("two_columns_of_classes.csv", lines("{path},{cat},{label}", "path,class_id,class_name")),
        ("ids.csv", lines("{stem},{label}", "image_id,label")),
        ("names_without_folders.csv", lines("{name},{label}", "image,label")),
        ("backslashes.csv", lines("{windows},{label}", "path,label").replace("\n", "\r\n")),
        ("windows.csv", lines(r"C:\data\{windows},{label}", "path,label")),
        ("network_share.csv", lines(r"\\nas\share\{windows},{label}", "path,label")),
        ("elsewhere.csv", lines("/home/me/data/{path},{label}", "path,label")),
        ("list.txt", lines("{path} {label}")),
        ("with_commas.txt", lines("{path},{label}")),
        ("mxnet.lst", lines("{number}\t{label}\t{path}")),
        ("one_hot.csv", lines("{path},{cat},0.0", "path,cat,dog").replace("0,0.0", "0,1.0")),
    ],
)
def test_tables_are_read_as_they_are_meant(name: str, content: str | bytes, root: Path, tmp_path: Path) -> None:
    table = tmp_path / name
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert labels_of(find_labelled(table, root=root)) == EXPECTED
    found = read_list(table, root)
    assert [found.names[i].split("/")[-1] for i in range(len(found))] == [path.split("/")[-1] for path in NAMES]
    assert all(found.path(i).is_file() for i in range(len(found)))


@pytest.mark.parametrize(
    ("content", "remark"),
    [
        (PLAIN.encode("utf-16"), "t.csv is read as UTF-16"),
        (lines("{windows},{label}"), "names in t.csv that have \\ for /: 8"),
        (lines(r"D:\x\{windows},{label}"), "that are below D:/x/, read as below {root}: 8"),
        (lines("{stem},{label}", "id,label"), "that lack their suffix or folder, found in {root}: 8"),
        (lines("{path},{label}", "flower,species"), "line 1 of t.csv is used as its header: flower, species"),
        (lines("{path},{label},{number}", "path,label,width"), "unused columns of t.csv: 'width'"),
        (lines("{path},{label},{part}", "path,label,fold"), "column 'fold' of t.csv holds numbers, not train or val"),
        (PLAIN + '"images/a, b.png",\nimages/Zoë.png,NaN\n', "left out: 2 lines of t.csv without a label"),
        (lines("{path},black {label}"), "cells such as 'black cat' are one class each; for several labels pass --label-sep"),
        (lines("{path},{cat},{odd}", "path,cat,odd").replace(",1,1", ",1,0").replace(",0,0", ",0,1"), "one 1, which marks its"),
    ],
)
def test_what_is_read_otherwise_or_left_out_is_said(content: str | bytes, remark: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    split = find_labelled(tmp_path / "t.csv", root=root)
    assert len([line for line in split.remarks if remark.replace("{root}", str(root)) in line]) == 1, split.remarks
    assert len(split.train) + len(split.val) == 8


def test_bytes_that_are_no_utf8_are_windows_1252_and_counted(root: Path, tmp_path: Path) -> None:
    text = lines("{path},{label}").replace(",dog", ",dög") + "images/Zoë.png,dög\n"
    (tmp_path / "t.csv").write_bytes(text.encode("cp1252"))
    split = find_labelled(tmp_path / "t.csv", root=root)
    assert split.train.classes == ["cat", "dög"] and len(split.train) + len(split.val) == 9
    assert any(line.startswith("names in t.csv that are not UTF-8") and line.endswith(": 6") for line in split.remarks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            PLAIN + "images/a, b.png,cat\n",
            "line 10 is not 2 columns as in the header: .*; put names that contain ',' in quotes",
        ),
        ("path,label\n", "has a header, but no lines with a label below it"),
        ("", "names no images"),
        ("\n\n", "names no images"),
        (lines("{path},"), "none of its 8 lines has a label"),
        (lines("{path}", "path"), "has no label column: line 1 is 'path'; expected path,label"),
        (lines("{path},0.{number}"), "column 2 look like numbers for regression, such as '0.1'"),
        (lines("{path};{number},5", "path;age"), "column 'age' look like numbers for regression, such as '0,5'"),
        (lines("{path},{label}|animal"), r"several labels, such as 'cat\|animal'; pass --label-separator '\|' to finetune"),
        (lines("{path},{label};animal"), "several labels, such as 'cat;animal'; pass --label-separator ';' to finetune"),
        (lines("{path},\"['{label}', 'animal']\""), "are lists, such as \"\\['cat', 'animal'\\]\"; write them as a|b"),
        (
            lines("{path},{cat},{odd}", "path,cat,odd"),
            "hold 0 and 1, but not exactly one 1 per line.*--root .*tables0 --labels cat,odd to",
        ),
        (
            lines("{path},{label},x", "path,first,second"),
            "has columns first, second, but none is called label.*--labels COLUMN",
        ),
        (lines("{path},{label},x,y"), "line 1 has 4 columns; add a header line above"),
        (PLAIN + "./images/cat/cat0.png,dog\n", "cat0.png' again, after line 2, first as 'cat', now as 'dog'; remove one"),
        (PLAIN + "images/cat/cat0.png,cat\n", "cat0.png' again, after line 2; remove one"),
        (lines("https://a.org/{path},{label}"), "no such file in .*; copy the images there"),
        (lines(r"C:\elsewhere\{number}.png,{label}"), "no such file in .*; copy the images there"),
        (lines("{path},{label},holdout", "path,label,split"), "column 'split' has 'holdout'; it must be train or val"),
        (lines("{path},{label},{label}", "path,cat,cat"), "column 'cat' occurs or is named twice"),
        (PLAIN + "images/none.png,cat\n", "line 10 names 'images/none.png', but there is no such file"),
        ("images/none.png,cat\n" + lines("{path},{label}"), "line 1 names 'images/none.png', but there is no such file"),
        (bytes(range(256)) * 20, "cannot be read|no label column|line"),
    ],
)
def test_tables_that_are_not_understood_are_refused_by_what_was_found(
    content: str | bytes, message: str, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        find_labelled(tmp_path / "t.csv", root=root)


def test_a_name_without_a_suffix_that_several_files_have_is_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    (tmp_path / "t.csv").write_text("image_id,label\n0,x\n0,y\n")
    for read in (find_labelled, read_list):
        with pytest.raises(UserError, match=r"line 2 names '0', which may be a/0\.png or b/0\.png"):
            read(tmp_path / "t.csv")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("head", "form", "in_val"),
    [
        ("image,split,label", "{path},{part},{label}", lambda i: i % 4 == 0),
        ("fname,labels,is_valid", "{path},{label},{flag}", lambda i: i % 4 == 0),
        ("", "{path},{label},{part}", lambda i: i % 4 == 0),
    ],
)
def test_a_column_says_what_is_measured_on(
    head: str, form: str, in_val: Callable[[int], bool], root: Path, tmp_path: Path
) -> None:
    rows = [
        form.format(path=path, label=EXPECTED[path], part="Valid" if in_val(i) else "train", flag=in_val(i))
        for i, path in enumerate(NAMES)
    ]
    (tmp_path / "t.csv").write_text("\n".join([*([head] if head else []), *rows]))
    split = find_labelled(tmp_path / "t.csv", root=root)
    assert [p.name for p in split.val.paths] == [Path(path).name for i, path in enumerate(NAMES) if in_val(i)]
    assert labels_of(split) == EXPECTED


KHOT = lines("{path},{cat},1,{odd}", "path,cat,animal,odd")


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        (KHOT, {"labels": "cat, animal,odd"}),
        (KHOT.replace(",1", ",1.0").replace(",0", ",False"), {"labels": "cat,animal,odd"}),
        (
            lines("{path},{cat}#animal#{odd}")
            .replace("1#animal", "cat#animal")
            .replace("0#animal", "animal")
            .replace("#1", "#odd")
            .replace("#0", ""),
            {"label_separator": "#"},
        ),
        (
            lines("{path},{cat} animal,{odd}", "path,first,second")
            .replace(",1 a", ",cat a")
            .replace(",0 a", ",a")
            .replace(",1\n", ",odd\n")
            .replace(",0\n", ",\n"),
            {"labels": "first,second", "label_separator": " "},
        ),
    ],
)
def test_an_image_has_several_labels(content: str, flags: dict[str, str], root: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(content)
    split = find_labelled(tmp_path / "t.csv", root=root, **flags)  # type: ignore[arg-type]
    expected = {
        path: {"animal"} | ({"cat"} if "cat" in path else set()) | ({"odd"} if i % 2 else set()) for i, path in enumerate(NAMES)
    }
    assert labels_of(split) == expected and sorted(split.train.classes) == ["animal", "cat", "odd"]
    assert split.train.has_several and split.train.labels.dtype == torch.bool
    assert "3 labels of" in class_counts(split.train)
    assert bool(split.val.counts.all()) and bool(split.train.counts.all())


def test_columns_of_labels_that_cannot_be_meant_are_refused(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    for content, labels, message in (
        (KHOT, "cat,cow", "--labels 'cow' is not a column of .*; its columns are path, cat, animal, odd"),
        (KHOT, "cat,cat", "column 'cat' occurs or is named twice"),
        (lines("{path},{number}.5,1", "path,x,y"), "x,y", "column x look like numbers for regression"),
        (lines("{path},-1.0,{odd}", "path,x,y"), "x,y", "columns x, y contain '-1.0'"),
        (lines("{path},{label},{odd}", "path,x,y"), "x,y", "columns x, y contain '0'"),
        (lines("{path},{label}"), "label", "has no header"),
        (lines("{path},0,{none}", "path,x,y"), "x,y", "none of the . training images has a label"),
        (
            lines("{path},0,1,train", "path,x,y,split") + "images/Zoë.png,0,0,val",
            "x,y",
            "of the 1 validation images has a label",
        ),
    ):
        table.write_text(content)
        with pytest.raises(UserError, match=message):
            find_labelled(table, labels, root=root)
    table.write_text(lines("{path},{label}|animal"))
    with pytest.raises(UserError, match="no label in column 2 contains --label-separator ';'"):
        find_labelled(table, root=root, label_separator=";")
    for flags in ({"labels": "cat,dog"}, {"label_separator": "|"}):
        with pytest.raises(UserError, match="is for a table, such as --data FILE"):
            find_labelled(root / "images", **flags)  # type: ignore[arg-type]


def test_a_line_without_one_of_its_labels_is_left_out(root: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(KHOT + '"images/a, b.png",1,1,\n')
    split = find_labelled(tmp_path / "t.csv", "cat,animal,odd", root=root)
    assert len(split.train) + len(split.val) == 8
    assert "left out: 1 line of t.csv without a label" in split.remarks


def test_labels_in_bars_can_be_one_class(root: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(lines("{path},animal|{label}"))
    split = find_labelled(tmp_path / "t.csv", root=root, label_separator="")
    assert split.train.classes == ["animal|cat", "animal|dog"] and not split.train.has_several


def test_the_digest_of_several_labels_knows_their_order(root: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(lines("{path},{cat},{dog}", "path,cat,dog"))  # one of each: none says which is the first
    splits = [find_labelled(tmp_path / "t.csv", columns, root=root) for columns in ("cat,dog", "dog,cat", "cat,dog")]
    digests = [split_digest(split.train, split.val) for split in splits]
    assert digests[0] == digests[2] != digests[1]


def test_a_rare_label_is_learnt_and_where_it_can_be_measured(tmp_path: Path) -> None:
    table = ["path,labels"]
    for i in range(40):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
        table.append(f"{i}.png,common{'|twice' if i < 2 else ''}{'|once' if i == 7 else ''}")
    (tmp_path / "t.csv").write_text("\n".join(table))
    for seed in range(5):
        split = find_labelled(tmp_path / "t.csv", label_separator="|", seed=seed)
        rows = dict(zip(split.train.classes, zip(split.train.counts.tolist(), split.val.counts.tolist()), strict=True))
        assert rows == {"common": (32, 8), "once": (1, 0), "twice": (1, 1)}
        assert any("no validation image has these labels" in line and line.endswith(": once") for line in split.remarks)


def test_commands_say_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text(KHOT)
    words = ["--data", str(tmp_path / "t.csv"), "--root", str(root), "--labels", "cat,animal,odd"]
    assert probe([str(tmp_path / "none.pt"), *words]) == 2
    assert "sparkme.probe needs one class per image, these have several labels" in capsys.readouterr().err
    network = ["--from-scratch", "--model", "resnet18", "--output", str(tmp_path / "run"), "--device", "cpu"]
    for flags in (["--mixup", "0.2"], ["--cutmix", "1"], ["--smoothing", "0.1"], ["--loss", "ce"], ["--shots", "2"]):
        assert finetune([*network, *words, *flags]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and flags[0] in error[0] and "leave it out" in error[0]
