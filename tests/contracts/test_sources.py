"""Where images come from: every kind of source gives the same images, each once, in an order that repeats."""

import contextlib
import functools
import gzip
import http.server
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import PIL.features
import pytest
import torch
from commands import QUICKEST, fails, losses, weights
from pictures import add, encoded, write_shard
from PIL import Image
from torchvision.transforms import v2

import sparkme.finetune
import sparkme.probe
from sparkme.data.dataset import Box, CropDataset, EpochSampler, create_loader, cut
from sparkme.data.images import Stored, load_image, load_rgb, open_image
from sparkme.data.labelled import find_labelled
from sparkme.data.limits import MAX_PIXELS, limit_pixels, scaled
from sparkme.data.sources import Columns, ImageSource, files, find_source, left_out, shards
from sparkme.data.sources import parquet as parquet_files
from sparkme.data.sources.files import Files, Names, list_folder
from sparkme.data.sources.shards import Cache, Shards, expand_braces, read_index
from sparkme.data.sources.table import read_list
from sparkme.errors import UserError
from sparkme.pretrain import main
from sparkme.seeds import derived_seed

TINY = ["--model", "timm:test_resnet", "--drop-path", "0"]  # of a second less for each start
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """Three shards of 7, 5 and 8 images."""
    folder = tmp_path_factory.mktemp("shards")
    images = []
    for i, numbers in enumerate((range(7), range(7, 12), range(12, 20))):
        images += write_shard(folder / f"part-{i:03d}.tar", numbers)
    return folder, images


def stored(source: ImageSource) -> list[bytes]:
    return [c.read_bytes() if isinstance(c := source.read(i).content, Path) else c for i in range(len(source))]  # type: ignore


def test_names_are_those_of_the_folder_in_the_order_of_paths(tmp_path: Path) -> None:
    for name in (
        "a/1.png",
        "a-b/2.png",
        "a b/3.jpg",
        "a/x/4.PNG",
        "z.webp",
        "ä/ö.png",
        "a/not.txt",
        ".hidden/5.png",
        "a/._6.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)  # each directory counts once
    (tmp_path / "odd\udcff.png").write_bytes(b"")
    found = list_folder(tmp_path)
    every = (p for p in tmp_path.rglob("*") if p.suffix.lower() in files.EXTENSIONS)
    expected = sorted(p for p in every if ".hidden" not in p.parts and not p.name.startswith("._"))
    assert sorted(found.path(i).resolve() for i in range(len(found))) == sorted({p.resolve() for p in expected})
    paths = [found.path(i) for i in range(len(found))]
    assert paths == sorted(paths) and len(paths) == 7
    packed = Names.pack(["", "x", "yy", ""])
    assert list(packed) == ["", "x", "yy", ""] and packed[-2] == "yy" and packed[1:3] == ["x", "yy"]
    assert not Names.pack([])


def test_pictures_are_found_by_their_suffix_or_content_and_others_counted(tmp_path: Path) -> None:
    kinds = {
        "JPEG": ["x.jfif", "x.jpe", "x.JPEG", "jpeg"],
        "PNG": ["x.PNG", "png"],
        "TGA": ["x.tga"],
        "GIF": ["gif"],
        "WEBP": ["webp"],
        "TIFF": ["tiff"],
        "BMP": ["bmp"],
        "PPM": ["x.pnm"],
        "JPEG2000": ["x.j2k", "x.jp2"],
    }
    for kind, names in kinds.items():
        for name in names:
            Image.new("RGB", (8, 8)).save(tmp_path / name, kind)
    for name in ("BMword", "notes", "a.xml", "b.xml", "c.XML", "x.dcm", "x.nii.gz", ".hidden", "._x.jpg", "x.npz"):
        (tmp_path / name).write_bytes(b"BM is the begin of words, too")
    source = find_source(str(tmp_path))
    assert {source.path(i).name for i in range(len(source))} == {name for names in kinds.values() for name in names}  # type: ignore[attr-defined]
    assert all(load_rgb(path).size == (8, 8) for path in map(source.path, range(len(source))))  # type: ignore[attr-defined]
    (note,) = source.notes
    assert note.startswith("left out: 8 files of other kinds: .xml (3), without a suffix (2), ")
    assert all(f"; {suffix}: " in note for suffix in (".dcm", ".nii.gz", ".npz")) and "such as with pydicom" in note


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.dcm", "pydicom"),
        ("x.NII", "nibabel"),
        ("x.nii.gz", "nibabel"),
        ("x.npz", "each as its own .npy"),
        ("x.heic", "pillow-heif"),
        ("x.h5", "--data package.module:dataset"),
        ("x.mp4", "ffmpeg"),
        ("x.zip", "unpack"),
    ],
)
def test_files_of_other_kinds_name_what_to_do(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text(f"class/{name}\n")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, name, b"x")
    for where in ("class", f"class/{name}", "list.txt", "x.tar"):
        with pytest.raises(UserError, match=re.escape(words)):
            find_source(str(tmp_path / where), cache=tmp_path / "cache")
    for part in (tmp_path / "x.tar", tmp_path / "list.txt"):
        part.unlink()
    with pytest.raises(UserError, match=re.escape(words)):
        find_labelled(tmp_path)


def test_avif_is_read_or_says_how_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (".avif" in left_out.EXTENSIONS) == bool(PIL.features.check("avif"))
    monkeypatch.setattr(left_out, "EXTENSIONS", left_out.EXTENSIONS - {".avif"})
    assert left_out.advice(".avif") == ".avif: pip install --upgrade 'pillow>=11.3'"


def test_an_index_is_used_until_a_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "INDEX_FROM", 1)
    right = time.time_ns
    monkeypatch.setattr(files.time, "time_ns", lambda: right() + 10**10)  # what is made here is old
    data, index = tmp_path / "data", tmp_path / "images.npz"
    for i in range(6):
        (data / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (data / str(i % 2) / f"{i}.png").write_bytes(b"")
    first = list_folder(data, index=index)
    first.write_index(index)
    with monkeypatch.context() as closed:
        closed.setattr(os, "scandir", lambda path: pytest.fail("the folder is listed again"))
        again = list_folder(data, index=index)
    assert list(again.names) == list(first.names)
    (data / "1" / "7.png").write_bytes(b"")
    assert len(list_folder(data, index=index)) == 7
    (data / "1" / "7.png").unlink()
    list_folder(data).write_index(index)
    (data / "0" / "0.png").rename(data / "0" / "9.png")
    assert "0/9.png" in list(list_folder(data, index=index).names)
    list_folder(data).write_index(index)
    status = os.stat(data / "1")
    (data / "1" / "new.png").write_bytes(b"")
    os.utime(data / "1", ns=(status.st_atime_ns, status.st_mtime_ns))  # as tar and rsync do
    assert len(list_folder(data, index=index)) == 7
    (data / "1" / "new.png").unlink()
    list_folder(data).write_index(index)
    shutil.copytree(data, tmp_path / "other")
    assert str(list_folder(tmp_path / "other", index=index).path(0)).startswith(str(tmp_path / "other"))
    content = index.read_bytes()
    for position in range(0, len(content), 101):
        index.write_bytes(content[:position])
        assert len(list_folder(data, index=index)) == 6
    monkeypatch.setattr(files.time, "time_ns", right)  # and now it is not: a file may come with the same time
    list_folder(data).write_index(index)
    with monkeypatch.context() as closed, pytest.raises(StopIteration):
        closed.setattr(os, "scandir", lambda path: next(iter([])))
        list_folder(data, index=index)
    monkeypatch.setattr(files, "INDEX_FROM", 100)
    first.write_index(tmp_path / "small.npz")
    assert not (tmp_path / "small.npz").exists()


def test_odd_links_and_folders_hide_no_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/0.png", "b/1.png", "closed/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "loop.png").symlink_to("loop.png")  # named when it is read, as any image that is not there
    for name in "zyx":
        (tmp_path / "a" / name).symlink_to(tmp_path / "b")
    right = os.scandir

    def scandir(path: str) -> object:
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied")
        return right(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = list_folder(tmp_path)
    assert list(found.names) == ["a/0.png", "a/x/1.png", "loop.png"]  # the first of the links, on every machine
    assert len(found.problems) == 1 and "closed: [Errno 13] Permission denied" in found.problems[0]
    with pytest.raises(UserError, match=r"holds no images .*; left out: images in .*closed/: \[Errno 13\]"):
        find_source(str(tmp_path / "closed"))


def test_processes_that_load_images_share_the_names() -> None:
    """A million references to strings would be counted in each process, and each count copies a page."""
    code = """
import os, re
from pathlib import Path
from sparkme.data.sources.files import Files, Names
as_list = [f"some/folder/of/images/{i:08d}.jpeg" for i in range(200_000)]
as_names = Names.pack(as_list)
def private():
    return int(re.search(r"Private_Dirty: +([0-9]+)", Path("/proc/self/smaps_rollup").read_text())[1])
for names in (as_names, as_list):
    reader, writer = os.pipe()
    if os.fork() == 0:
        before = private()
        kept = None
        for i in range(len(names)):
            kept = names[i]
        os.write(writer, str(private() - before).encode())
        os._exit(0)
    print(os.read(reader, 99).decode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packed, listed = map(int, done.stdout.split())
    assert packed < 1500 < 8000 < listed, done.stdout  # KiB


@pytest.mark.parametrize("bad", ["../x.png", "/etc/passwd", "a/../../x.png", "a\0b.png", ".", ""])
def test_a_list_names_files_below_its_root_only(bad: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    for name in ("a/0.png", "1.png"):
        (root / name).write_bytes(encoded(0, (9, 9, 9)))
    (root / "list.txt").write_text(f"a/0.png\n{root}/1.png\na/../1.png\n\n")
    found = read_list(root / "list.txt")
    assert [found.path(i).resolve() for i in range(3)] == [root / "a/0.png", root / "1.png", root / "1.png"] and len(found) == 3
    (tmp_path / "table.csv").write_text('path,label\n"a/0.png",x\n1.png,y\n')
    assert len(read_list(tmp_path / "table.csv", root)) == 2
    if bad:
        (root / "list.txt").write_text(f"1.png\n{bad}\n")
        with pytest.raises(UserError, match=r"line 2 names .* which lies outside"):
            read_list(root / "list.txt")
    (root / "list.txt").write_text("none.png\n")
    with pytest.raises(UserError, match=r"there is no such file in .*; see --root"):
        read_list(root / "list.txt")


def test_a_list_that_is_no_list_or_goes_through_a_link_leads_nowhere(tmp_path: Path) -> None:
    for name in ("root/0.png", "else/secret.png", "else/inner/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "else" / "inner")
    path = tmp_path / "root" / "list.txt"
    path.write_text("0.png\nlink/1.png\nlink/../secret.png\n")
    assert [read_list(path).path(i).exists() for i in range(3)] == [True, True, False]
    path.write_text("0.png\n" + "x" * 1_000_000)
    with pytest.raises(UserError, match="a line has more than 65,536 characters"):
        read_list(path)
    path.write_text("x" * 5000)
    with pytest.raises(UserError, match=r"there is no such file in .*; see --root"):
        read_list(path)
    with pytest.raises(UserError, match="matches no file"):
        find_source("x" * 5000)
    write_shard(tmp_path / "a[1].tar", range(2))
    assert len(find_source(str(tmp_path / "a[1].tar"), cache=tmp_path / "cache")) == 2


@pytest.mark.parametrize(
    "text", ["a{000..012}.tar", "{a,b}-{1..3}", "x{7..5}y", "{8..11}", "plain", "{08..11}", "p{}q", "a{b}c", "{,x}y"]
)
def test_braces_are_those_of_bash(text: str) -> None:
    expected = subprocess.run(["bash", "-c", f"echo {text}"], capture_output=True, text=True, check=True).stdout.split()
    assert expand_braces(text) == expected
    with pytest.raises(ValueError, match="more than 1,000,000 shards"):
        expand_braces("{0..999999999}")
    with pytest.raises(ValueError, match="more than 1,000,000 shards"):
        expand_braces("{0..9999}{0..9999}")


def test_shards_hold_what_was_put_into_them(sharded: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    folder, images = sharded
    cache = Cache(tmp_path / "cache", 2**30)
    for text in (str(folder / "part-{000..002}.tar"), str(folder / "*.tar"), str(folder)):
        source = find_source(text, cache=cache.folder)
        assert stored(source) == images
    assert source.blocks is not None and source.blocks.tolist() == [0, 7, 12, 20]
    labels, classes = source.labels()
    assert classes == ["blue", "red"] and labels.tolist() == [1 - i % 2 for i in range(20)]
    assert source.name(8) == f"{folder / 'part-001.tar'}, image 1"
    part = source.subset([3, 8])
    assert stored(part) == [images[3], images[8]] and part.name(1) == source.name(8)


def test_shards_are_looked_through_once_and_again_when_they_change(
    sharded: tuple[Path, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tar"
    shutil.copy(sharded[0] / "part-000.tar", path)
    cache = Cache(tmp_path / "cache", 2**30)
    assert len(Shards([str(path)], cache, "x")) == 7
    with monkeypatch.context() as closed:
        closed.setattr(shards, "read_index", lambda file: pytest.fail("it is looked through again"))
        assert len(Shards([str(path)], cache, "x")) == 7
    shutil.copy(sharded[0] / "part-001.tar", path)
    os.utime(path, (1, 1))
    assert len(Shards([str(path)], cache, "x")) == 5
    for known in cache.folder.glob("*.npz"):
        known.write_bytes(b"damaged")
    assert len(Shards([str(path)], cache, "x")) == 5


def test_compressed_shards_are_copied_and_leave_when_room_is_wanted(tmp_path: Path) -> None:
    images, paths = [], [tmp_path / f"{i}.tar.gz" for i in range(4)]
    for i, path in enumerate(paths):
        images += write_shard(path, range(10 * i, 10 * i + 3), ".json")
    cache = Cache(tmp_path / "cache", 30_000)  # two of them
    source = Shards([*map(str, paths)], cache, "gz")
    assert stored(source) == images and source.labels()[1] == ["blue", "red"]
    copies = [p.stat().st_size for p in cache.folder.glob("*.copy")]
    assert 1 <= len(copies) < 4 and stored(source) == images  # those that left come back
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    with pytest.raises(UserError, match=r"the shard .*0.tar.gz cannot be read"):
        Shards([str(paths[0])], Cache(tmp_path / "new", 2**30), "gz")


def test_a_copy_is_of_this_very_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of one that had its name before, or has it in another folder."""
    cache = tmp_path / "cache"
    for folder, numbers in {"a": range(3), "b": range(5)}.items():
        (tmp_path / folder).mkdir()
        images = write_shard(tmp_path / folder / "x.tar.gz", numbers)
        monkeypatch.chdir(tmp_path / folder)
        source = find_source("x.tar.gz", cache=cache)
        assert stored(source) == images
    for copy in cache.glob("*.copy"):
        copy.unlink()
    source = find_source("x.tar.gz", cache=cache)
    images = write_shard(tmp_path / "b" / "x.tar.gz", range(20, 22))
    assert len(source) == 5
    for copy in cache.glob("*.copy"):
        copy.unlink()
    with pytest.raises(OSError, match=r"image 0: .*the shard has changed since the run began"):
        source.read(0)
    assert stored(find_source("x.tar.gz", cache=cache)) == images


def test_the_cache_evicts_nothing_but_its_copies(tmp_path: Path) -> None:
    """Its folder may be that of the data, whose shards are not its own; and a copy is no further shard."""
    write_shard(tmp_path / "a.tar", range(3))
    size = (tmp_path / "a.tar").stat().st_size
    for i in range(3):
        write_shard(tmp_path / f"{i}.tar.gz", range(3))
    for _ in range(2):
        source = find_source(str(tmp_path), cache=tmp_path, cache_gib=1.5 * size / 2**30)
        assert len(stored(source)) == 12 and (tmp_path / "a.tar").exists()


def test_a_copy_that_another_process_evicts_at_once_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_shard(tmp_path / "a.tar.gz", range(3))
    source = find_source(str(tmp_path / "a.tar.gz"), cache=tmp_path / "cache")
    right = os.utime

    def utime(path: Path) -> None:
        right(path)
        path.unlink()

    monkeypatch.setattr(os, "utime", utime)
    assert stored(source) == images


def test_a_small_file_that_decompresses_to_a_large_one_is_refused(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(bytes(50_000_000))
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="cannot be read: its copy alone is larger than --shard-cache-gib"):
        find_source(str(tmp_path / "a.tar.gz"), cache=cache, cache_gib=0.01)
    assert sum(file.stat().st_size for file in cache.iterdir()) == 0
    content = bytearray(gzip.compress(b"abcdefgh" * 3000))
    content[20:40] = b"\xff" * 20
    (tmp_path / "b.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"b.tar.gz cannot be read: Error -3 while decompressing"):
        find_source(str(tmp_path / "b.tar.gz"), cache=cache)
    write_shard(tmp_path / "c.tar", range(2))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file cannot be written .*; see --shard-cache"):
        find_source(str(tmp_path / "c.tar"), cache=tmp_path / "file")


@pytest.mark.parametrize("answer", ["short", "chunked", "garbage"])
def test_a_download_that_ends_early_is_not_kept(
    answer: str, sharded: tuple[Path, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (sharded[0] / "part-000.tar").read_bytes()
    first = {
        "short": f"HTTP/1.0 200 OK\r\nContent-Length: {len(whole)}\r\n\r\n".encode() + whole[: len(whole) // 2],
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n" + whole[:100],
        "garbage": b"\0garbage\r\n\r\n",
    }[answer]
    answers = [first] * shards.TRIES + [f"HTTP/1.0 200 OK\r\nContent-Length: {len(whole)}\r\n\r\n".encode() + whole]

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(answers.pop(0))

    if answer == "garbage":
        del answers[1 : shards.TRIES]  # what is no HTTP is not asked for again
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x.tar"
        with pytest.raises(UserError, match=r"x.tar cannot be read"):
            find_source(url, cache=tmp_path)
        assert stored(find_source(url, cache=tmp_path)) == sharded[1][:7]
        server.shutdown()
    for bad in ("http://[x/a.tar", "http://a:b/a.tar", "http://localhost/a b.tar", "none://a/b.tar"):
        with pytest.raises(UserError, match="cannot be read"):
            find_source(bad, cache=tmp_path)


@pytest.fixture
def served(sharded: tuple[Path, list[bytes]]) -> Iterator[tuple[str, list[str]]]:
    """The shards from a URL, and what was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(sharded[0]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_shards_come_from_a_url_once(
    served: tuple[str, list[str]], sharded: tuple[Path, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    url, asked = served
    source = find_source(url + "/part-{000..002}.tar", cache=tmp_path)
    dataset = CropDataset(source, (16, 16), min_scale=0.5, seed=0)
    sampler = EpochSampler(20, 20, 5, 0, range(4), blocks=source.blocks, window=source.window)
    assert len(list(create_loader(dataset, sampler, workers=2, pin_memory=False))) == 4
    assert stored(source) == sharded[1] and len(asked) == 3
    with pytest.raises(UserError, match=r"part-009.tar cannot be read: .*404"):
        find_source(url + "/part-009.tar", cache=tmp_path)


def test_another_cache_folder_is_said_and_nobody_elses_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shards.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert shards.default_cache() == tmp_path / "cache" / "sparkme" / "shards" and not capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = shards.default_cache()
    assert found.parent == tmp_path and f"shards are cached in {found}" in capsys.readouterr().err
    found.rmdir()
    found.symlink_to(tmp_path / "cache")
    with pytest.raises(UserError, match="belongs to another user"):
        shards.default_cache()


def test_what_a_shard_names_outside_of_itself_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(0, (1, 2, 3)))
    path = tmp_path / "in" / "evil.tar"
    path.parent.mkdir()
    good = encoded(1, (200, 0, 0))
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"{kind!r}.png")
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
        add(archive, "../../outside.png", good)
        add(archive, f"{tmp_path}/absolute.png", good)
        add(archive, "x.txt", b"no image")
    before = set(tmp_path.rglob("*"))
    source = find_source(str(path), cache=tmp_path / "cache")
    assert stored(source) == [good, good]  # bytes of the shard itself; nothing is unpacked to a path
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} - before == set()


def test_damaged_shards_give_what_is_whole(sharded: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    content = (sharded[0] / "part-002.tar").read_bytes()
    for end in range(0, len(content), 1999):
        path = tmp_path / f"{end}.tar"
        path.write_bytes(content[:end])
        with path.open("rb") as file:
            index = read_index(file)
        assert all(
            content[o : o + s] == image for o, s, image in zip(index.offsets, index.sizes, sharded[1][12:], strict=False)
        )
    with tarfile.open(sharded[0] / "part-002.tar") as archive:
        third = next(m.offset for m in archive if archive.extractfile(m).read() == sharded[1][14])  # type: ignore[union-attr]
    path.write_bytes(content[: third + 5] + b"\xff" + content[third + 6 :])
    damaged = Shards([str(path)], Cache(tmp_path / "damaged", 1), "x")
    assert stored(damaged) == sharded[1][12:14] and "a damaged header (bad checksum)" in str(damaged.problems)
    path.write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)))
    with pytest.raises(UserError, match="no images in 1 shards"):
        Shards([str(path)], Cache(tmp_path / "cache", 1), "x")
    path.write_bytes(content[: len(content) // 2 + 100])
    cut_off = Shards([str(path)], Cache(tmp_path / "cut", 1), "x")
    assert 0 < len(cut_off) < 8 and stored(cut_off) == sharded[1][12 : 12 + len(cut_off)]
    huge = tarfile.TarInfo("a.png")
    huge.size = 2**40
    path.write_bytes(huge.tobuf() + b"x" * 512)
    with pytest.raises(UserError, match="no images in 1 shards"):
        Shards([str(path)], Cache(tmp_path / "cache2", 1), "x")


def head(size: int, kind: bytes = b"0", content: bytes = b"") -> bytes:
    """The head of a member that claims to have `size` bytes, and what follows it."""
    block = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size % 2**96).to_bytes(12, "big") if size < 0 else b"%011o\0" % size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content.ljust(-len(content) % 512 + len(content), b"\0")


@pytest.mark.parametrize(
    ("content", "problem"),
    {
        "backwards": (head(0) + head(-512), "a header of|a member has -512 bytes|bad|a damaged header .invalid offset"),
        "negative": (head(-1024), "a member has -1024 bytes|a damaged header .invalid offset"),
        "by pax": (
            head(17, b"x", b"17 size=-1000000\n") + head(0),
            "a member has -1000000 bytes|a damaged header .invalid offset",
        ),
        "large head": (head(2**31, b"x"), "a header of 2147483648 bytes"),
        "long name": (head(2**31, b"L"), "a header of 2147483648 bytes"),
        "chain": (head(5, b"L", b"a.png") * 3000 + head(0), "recursion"),
    }.values(),
)
@pytest.mark.parametrize("refuses", [False, True], ids=["", "as Python 3.13.5 reads them"])
def test_hostile_archives_take_neither_memory_nor_time(
    content: bytes, problem: str, refuses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refuses:
        blocks = tarfile.TarInfo._block  # type: ignore[attr-defined]

        def checked(self: tarfile.TarInfo, count: int) -> int:
            if count < 0:
                raise tarfile.InvalidHeaderError("invalid offset")  # type: ignore[attr-defined]
            return int(blocks(self, count))

        monkeypatch.setattr(tarfile.TarInfo, "_block", checked)
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(content + bytes(1024))
        file.truncate(2**31 + 2**20)  # a hole
    signal.signal(signal.SIGALRM, lambda *args: pytest.fail("it takes for ever"))
    signal.alarm(20)
    tracemalloc.start()
    with (tmp_path / "x.tar").open("rb") as opened:
        index = read_index(opened)
    signal.alarm(0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**25 and len(index.sizes) <= 1 and re.search(problem, index.problem), index


def test_a_long_text_is_no_label(tmp_path: Path) -> None:
    """In an array each label takes as much room as the longest."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for i in range(300):
            add(archive, f"{i}.png", b"x")
            add(archive, f"{i}.json", json.dumps({"label": "word" * 100_000 if i == 7 else "a"}).encode())
    with (tmp_path / "x.tar").open("rb") as file:
        assert read_index(file).labels.nbytes < 2**20
    with pytest.raises(ValueError, match=r"image 7 has no label"):
        find_source(str(tmp_path / "x.tar"), cache=tmp_path / "cache").labels()


def labelled_shard(path: Path, members: dict[str, str]) -> ImageSource:
    """A shard whose images are no pictures, which is found out when they are read."""
    with tarfile.open(path / "x.tar", "w") as archive:
        for name, content in members.items():
            add(archive, name.rstrip("+"), content.encode())  # a dictionary has no name twice
    return find_source(str(path / "x.tar"), cache=path / "cache")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"p0.s3.png": "", "p0.s3.cls": "0", "p0.s4.png": "", "p0.s4.cls": "1"}, "01"),
        ({"v1.5/p0.s3.png": "", "v1.5/p0.s4.png": "", "v1.5/p0.s4.cls": "1", "v1.5/p0.s3.cls": "0"}, "01"),
        ({"a.png": "", "a.cls": "0", "a.v2.png": "", "a.v2.cls": "1"}, "01"),
        ({"a.s0.png": "", "a.s0.json": '{"label": 0.0}', "a.s1.png": "", "a.s1.json": '{"label": 1}'}, "01"),
        ({"v1.5/a.left.png": "", "v1.5/a.right.png": "", "v1.5/a.cls": "1", "v1.5/b.x.png": "", "v1.5/b.cls": "0"}, "110"),
        ({"a.image.png": "", "a.meta.json": '{"label": "1"}', "b.image.png": "", "b.meta.json": '{"label": "0"}'}, "10"),
        ({"a.png": "", "a.cls": "1", "a.json": '{"label": 7}', "b.png": "", "b.cls": "0"}, "10"),
        ({"a.png": "", "a.cls": "1", "a.json": '{"label": 1}', "b.png": "", "b.json": '{"label": 0}'}, "10"),
        ({"a.png": "", "a.cls": "1", "a.cls+": "1", "b.png": "", "b.cls": "0"}, "10"),
        ({"./a.png": "", "a.cls": "1", "b.png": "", "./b.cls": "0"}, "10"),
    ],
)
def test_labels_are_of_the_images_that_are_named_like_them(members: dict[str, str], expected: str, tmp_path: Path) -> None:
    source = labelled_shard(tmp_path, members)
    labels, classes = source.labels()
    assert "".join(classes[label] for label in labels) == expected
    said = [] if expected != "01" else ["in 1 of 1 shards, sample names end at their last dot"]
    assert [note.partition(";")[0] for note in source.notes] == said


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.png": "", "a.cls": "0", "a.cls+": "1"}, r"a\.cls occurs twice, as '0' and as '1'; remove one"),
        ({"a.png": "", "a.x.cls": "0", "a.y.cls": "1"}, r"a has two labels, '0' in a\.x\.cls and '1' in a\.y\.cls"),
        ({"a.s0.png": "", "a.s0.cls": "0", "a.s1.png": ""}, r"image 1 has no label; .* would join a\.s0 and a\.s1"),
    ],
)
def test_two_labels_of_one_sample_are_named(members: dict[str, str], reason: str, tmp_path: Path) -> None:
    for _ in range(2):  # also as the cache keeps it
        with pytest.raises(ValueError, match=reason):
            labelled_shard(tmp_path, members).labels()


def test_an_epoch_has_every_image_of_shards_once_over_processes_and_repeats_wherever_it_starts() -> None:
    blocks = torch.tensor([0, *torch.tensor([13, 7, 20, 1, 9, 10, 4]).cumsum(0).tolist()])
    whole = [list(EpochSampler(64, 128, 16, 5, range(16), rank, 4, blocks=blocks, window=6)) for rank in range(4)]
    for epoch in range(2):
        for copy in range(2):
            draws = [
                draw - 64 * copy
                for of_rank in whole
                for batch in of_rank
                for e, draw in batch
                if e == epoch and draw // 64 == copy
            ]
            assert sorted(draws) == list(range(64))
    for start in (1, 7, 9, 15):
        again = list(EpochSampler(64, 128, 16, 5, range(start, 16), 2, 4, blocks=blocks, window=6))
        assert again == whole[2][start:]
    assert whole[0][0] != whole[0][8] and all(len(batch) == 4 for of_rank in whole for batch in of_rank)
    # A window is of few blocks: 6 images of a part of 16 cannot touch more than the blocks they fill.
    for first in range(0, 12, 6):
        numbers = [draw for batch in whole[1][:4] for _, draw in batch][first : first + 6]
        touched = {int(torch.searchsorted(blocks, n, right=True)) for n in numbers}
        assert len(touched) <= 4
    uneven = [list(EpochSampler(66, 66, 4, 5, range(16), rank, 4, blocks=blocks, window=6)) for rank in range(4)]
    seen = [draw for of_rank in uneven for batch in of_rank for _, draw in batch]
    assert len(seen) == len(set(seen)) == 64
    few = [list(EpochSampler(2, 8, 4, 0, range(2), rank, 4, blocks=torch.tensor([0, 1, 2]))) for rank in range(4)]
    assert sorted(draw % 2 for of_rank in few for batch in of_rank for _, draw in batch) == [0] * 4 + [1] * 4


def write_parquet(path: Path, images: list[bytes], kind: str = "struct", rows: int = 4) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    labels = [i % 2 for i in range(len(images))]
    column = [{"bytes": image, "path": None} for image in images] if kind == "struct" else images
    table = pyarrow.table({"label": labels, "image": column})
    if kind == "struct":
        info = {"info": {"features": {"label": {"names": ["red", "blue"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    parquet.write_table(table, path, row_group_size=rows)


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_parquet_holds_what_was_put_into_it(kind: str, sharded: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    images = sharded[1]
    write_parquet(tmp_path / "a.parquet", images[:11], kind)
    write_parquet(tmp_path / "b.parquet", images[11:], kind)
    source = find_source(str(tmp_path))
    assert stored(source) == images and source.blocks is not None and source.blocks.tolist() == [0, 4, 8, 11, 15, 19, 20]
    labels, classes = source.labels()
    assert labels.tolist() == [i % 2 for i in (*range(11), *range(9))]
    assert classes == (["red", "blue"] if kind == "struct" else ["0", "1"])
    dataset = CropDataset(source, (16, 16), min_scale=0.5, seed=0)
    sampler = EpochSampler(20, 20, 5, 0, range(4), blocks=source.blocks, window=source.window)
    straight, by_workers = (
        torch.cat([b.images for b in create_loader(dataset, sampler, workers=n, pin_memory=False)]) for n in (0, 2)
    )
    assert torch.equal(straight, by_workers)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        find_source(str(tmp_path / "*.parquet"))
    damaged = bytearray(content)
    damaged[40 : len(content) // 2] = bytes(len(content) // 2 - 40)
    (tmp_path / "a.parquet").write_bytes(damaged)
    source = find_source(str(tmp_path / "a.parquet"))
    with contextlib.suppress(OSError):  # named, whatever pyarrow says of it
        [load_image(source.read(i)) for i in range(len(source))]


@pytest.mark.parametrize("share", [0.4, 0.9, 1.4, 2.5])
def test_row_groups_are_read_once_in_an_epoch_however_large(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [np.random.default_rng(i).bytes(2000) for i in range(200)]
    write_parquet(tmp_path / "a.parquet", images, rows=20)
    monkeypatch.setattr(parquet_files, "CACHED_BYTES", int(20 * 2000 / share))
    source = find_source(str(tmp_path / "a.parquet"))
    groups = []
    right = parquet_files._read
    monkeypatch.setattr(parquet_files, "_read", lambda opened, group, name: groups.append(group) or right(opened, group, name))
    for part in (source, source.subset(range(0, 200, 3))):
        groups.clear()
        count = len(part)
        for batch in EpochSampler(count, count, 1, 0, range(count), blocks=part.blocks, window=part.window):
            for _, number in batch:
                part.read(number)
        assert 10 <= len(groups) <= 14  # some are read for two windows


def test_a_dictionary_that_is_named_again_and_again_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10_000), pyarrow.array([bytes(10_000)]))
    parquet.write_table(pyarrow.table({"image": column}), tmp_path / "x.parquet", store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 20_000
    monkeypatch.setattr(parquet_files, "MOST_GROUP_BYTES", 2**24)
    source = find_source(str(tmp_path / "x.parquet"))
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(OSError, match=r"row 5 of group 0: a row group of more than 0.0 GiB; write smaller ones"):
        source.read(5)
    assert pyarrow.total_allocated_bytes() - before < 2**20


def test_parquet_labels_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": [b"x"]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"image": [b"x"], "label": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"a.parquet has no readable labels in its column label"):
        find_labelled(tmp_path / "*.parquet")


def parquet_of(path: Path, images: Any, labels: Any = None, names: list[str] | None = None, rows: int | None = 3) -> str:
    """A file of two columns; `names` are of the classes, as Hugging Face's datasets keep them."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    table = pyarrow.table({"image": images} | ({} if labels is None else {"label": labels}))
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})})
    parquet.write_table(table, path / "x.parquet", row_group_size=rows)
    return str(path / "x.parquet")


@pytest.mark.parametrize(
    "kind",
    [
        lambda a: a.binary(),
        lambda a: a.large_binary(),
        lambda a: a.binary_view(),
        lambda a: a.binary(2),
        lambda a: a.dictionary(a.int32(), a.binary()),
        lambda a: a.list_(a.binary()),
        lambda a: a.list_(a.binary(), 1),
        lambda a: a.large_list(a.struct({"bytes": a.binary(), "path": a.string(), "words": a.list_(a.string())})),
        lambda a: a.struct({"bytes": a.binary_view(), "path": a.string_view()}),
        lambda a: a.struct({"path": a.string(), "bytes": a.dictionary(a.int8(), a.binary())}),
    ],
)
def test_parquet_has_bytes_in_columns_of_many_types(kind: Callable[[Any], Any], tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    images: list[Any] = [b"%02d" % i for i in range(40)]
    of_type, given = kind(pyarrow), images
    if "bytes" in str(of_type):
        given = [{"bytes": image, "path": None, "words": ["a", "b"]} for image in given]
    if "list<" in str(of_type).partition("bytes")[0] or str(of_type).startswith("fixed_size_list"):
        given = [[value] for value in given]
    source = find_source(parquet_of(tmp_path, pyarrow.array(given, of_type), rows=None if "view" in str(of_type) else 3))
    assert stored(source) == images and not source.notes


def test_of_lists_in_parquet_the_first_image_is_taken_and_the_others_are_counted(tmp_path: Path) -> None:
    source = find_source(parquet_of(tmp_path, [[b"a"], [b"b", b"c", b"d"], [b"e"], [b"f", b"g"], []]))
    assert [source.read(i).content for i in range(4)] == [b"a", b"b", b"e", b"f"]
    assert source.notes == ["left out: 3 images of lists, whose first image is used"]
    with pytest.raises(OSError, match="row 1 of group 1: it has no bytes"):
        source.read(4)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0.0, 1.0, float("nan"), None], "01--"),
        ([[1], [0], [], None], "10--"),
        ([b"1", b"0", b"", None], "10--"),
        (["1", "0", "", "1"], "10-1"),
        ([Decimal("1.00"), Decimal("0.00"), None, Decimal("1.00")], "10-1"),
        ([-1, 1, -1, 1], "-1 1 -1 1"),  # two classes
    ],
)
def test_labels_in_parquet_may_be_of_many_types_and_missing_ones_are_counted(
    labels: list[Any], expected: str, tmp_path: Path
) -> None:
    source = find_source(parquet_of(tmp_path, [b"x"] * 4, labels))
    numbers, classes = source.labels()
    found = [classes[number] if number >= 0 else "-" for number in numbers]
    missing = found.count("-")
    assert found == (expected.split() if " " in expected else [*expected])
    assert source.notes == ([f"left out: {missing} of 4 images without a label in label"] if missing else [])


def test_images_without_a_label_are_left_out_of_both_sides(tmp_path: Path) -> None:
    images = [encoded(i, COLOURS["red"]) for i in range(9)]
    where = parquet_of(tmp_path, images, [0, 1, -1] * 3, ["red", "blue"])  # -1: not told, as of a test set
    split = find_labelled(where)
    assert (len(split.train), len(split.val)) == (4, 2) and split.train.classes == ["red", "blue"]
    assert {image for part in (split.train, split.val) for image in stored(part.images)} == {
        image for i, image in enumerate(images) if i % 3 < 2
    }
    assert split.remarks == ["left out: 3 of 9 images without a label in label"]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([[0, 2], [1]], r"the column label has several labels per image, such as \[0, 2\]; each image must have one class"),
        (
            [0.5, 1.0],
            r"the column label has numbers that are not integers, such as 0\.5; sparkme learns classes only",
        ),
        ([float("inf"), 1.0], r"numbers that are not integers, such as inf"),
        ([{"a": 1}, {"a": 2}], r"values that are neither numbers nor words, such as \{'a': 1\}"),
        ([None, None], r"has 0 class; two or more are needed"),
        (None, r"no column named label, labels, cls, class; its columns: image binary; see --label-column"),
    ],
)
def test_labels_that_are_no_classes_are_named(labels: list[Any] | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        find_labelled(parquet_of(tmp_path, [b"x"] * 2, labels))


def test_labels_that_stand_for_other_classes_in_another_file_are_named(tmp_path: Path) -> None:
    for i, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        Path(parquet_of(tmp_path, [b"x"] * 2, [0, 1], names)).rename(tmp_path / f"{i}.parquet")
    with pytest.raises(UserError, match=r"label stand for cat, dog in .*0\.parquet, but for dog, cat in .*1\.parquet"):
        find_labelled(tmp_path)
    for i, labels in enumerate(([0, 1], ["0", "1"])):
        Path(parquet_of(tmp_path, [b"x"] * 2, labels)).rename(tmp_path / f"{i}.parquet")
    with pytest.raises(UserError, match=r"the column label has the same labels as numbers and as words"):
        find_labelled(tmp_path)


def test_columns_of_parquet_may_be_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    columns = {
        "image": [b"i", b"j"],
        "image.jpg": [b"k", b"l"],
        "mask": [b"m", b"n"],
        "deep": [{"er": b"o"}, {"er": b"p"}],
        "fine": [0, 1],
        "coarse": ["a", "b"],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    where = str(tmp_path / "x.parquet")
    source = find_source(where)
    assert stored(source) == columns["image"]
    assert source.notes == ["images come from the column image, not from image.jpg, mask; see --image-column"]
    for name, expected in (("image.jpg", "kl"), ("mask", "mn"), ("deep.er", "op")):
        assert stored(find_source(where, columns=Columns(name))) == [letter.encode() for letter in expected]
    assert find_source(where, columns=Columns(label="coarse")).labels()[1] == ["a", "b"]
    for name in ("none", "fine", "deep.none", "deep"):
        with pytest.raises(
            UserError, match=rf"has no column {name} that holds bytes; its columns: image binary, .* fine int64"
        ):
            find_source(where, columns=Columns(name))
    with pytest.raises(ValueError, match=r"no column none; its columns: image binary"):
        find_source(where, columns=Columns(label="none")).labels()
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"--image-column is for Parquet files, but --data .* is not one"):
        find_source(str(tmp_path), columns=Columns("image"))


def test_classes_without_images_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_labels.py").write_text(
        "class Own(list): pass\n"
        "def made(targets, classes=None):\n"
        "    own = Own([b''] * 4); own.targets = targets; own.classes = classes; return lambda: own\n"
        "named = made([3, 1, 3, 1], list('abcde'))\nfrom_one = made([1, 2, 2, 1])\n"
        "large = made([10**15, 7, 7, 10**15])\nwords = made(list('abba'))\nparts = made([0.5, 1, 1, 0.5])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, classes in {"named": ["b", "d"], "from_one": ["1", "2"], "large": ["7", str(10**15)]}.items():
        assert find_labelled(f"own_labels:{name}").train.classes == classes
    for name, reason in {"words": "its labels must be numbers", "parts": "not integers from 0"}.items():
        with pytest.raises(UserError, match=reason):
            find_labelled(f"own_labels:{name}")


def test_parquet_without_images_or_without_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"], "n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has no column with the bytes of images; its columns: text string, n int64"):
        find_source(str(tmp_path / "x.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'sparkme\[parquet\]'"):
        find_source(str(tmp_path / "x.parquet"))


OWN = """
import io, numpy as np, torch
from PIL import Image
RED = Image.new("RGB", (40, 30), (255, 0, 0))
def png():
    file = io.BytesIO(); RED.save(file, "PNG"); return file.getvalue()
class Own:
    def __init__(self, kinds="ptbad"): self.kinds, self.targets, self.classes = kinds, [0, 1] * 2 + [1], ["a", "b"]
    def __len__(self): return len(self.kinds)
    def __getitem__(self, i):
        tensor = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 30, 40)
        return {"p": (RED, 1), "t": tensor,
                "b": png(), "a": np.asarray(RED), "d": {"image": {"bytes": png()}, "label": 0}}[self.kinds[i]]
made = Own()
nothing = 5
class Broken(Own):
    def __getitem__(self, i): raise KeyError("gone")
"""


def test_a_dataset_of_ones_own_gives_images_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_dataset.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    for where in ("own_dataset:made", "own_dataset:Own"):
        source = find_source(where)
        for i in range(5):
            image = load_image(source.read(i))
            values = np.asarray(image) / 255 if isinstance(image, Image.Image) else image.permute(1, 2, 0).numpy()
            assert values.shape == (30, 40, 3) and np.allclose(values, (1, 0, 0)), i
        assert source.labels()[0].tolist() == [0, 1, 0, 1, 1] and source.labels()[1] == ["a", "b"]
    for where, reason in {
        "own_dataset:nothing": "not callable",
        "own_dataset:none": "AttributeError",
        "no_such:x": "imported",
    }.items():
        with pytest.raises(UserError, match=reason):
            find_source(where)
    with pytest.raises(OSError, match="own_dataset:Broken, item 2: KeyError"):
        find_source("own_dataset:Broken").read(2)


def test_crops_are_torchvisions(tmp_path: Path) -> None:
    """Of a file that is no JPEG, and of one that is decoded as a whole: the same pixels as torchvision's transforms give."""
    for i, (name, size) in enumerate({"a.png": (90, 70), "b.jpg": (500, 333)}.items()):
        (tmp_path / name).write_bytes(encoded(i, (99, 9, 200), "JPEG" if "jpg" in name else "PNG", size))
    dataset = CropDataset(sorted(tmp_path.iterdir()), (48, 64), min_scale=0.3, seed=4, reduced_jpeg=False)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop((48, 64), scale=(0.3, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    for draw in range(24):
        torch.manual_seed(derived_seed(4, "crop", 3, draw))
        expected = theirs(load_rgb(sorted(tmp_path.iterdir())[draw % 2]))
        assert torch.equal(dataset[3, draw].image, expected)  # type: ignore[arg-type]


def photograph(path: Path, orientation: int = 1) -> None:
    """A large picture whose colours say where in it a pixel is, with some texture."""
    y, x = np.mgrid[0:1000, 0:1400].astype(np.float32)
    texture = 12 * np.sin(x / 3) * np.sin(y / 4)
    array = np.stack([255 * x / 1400, 255 * y / 1000, 128 + texture], -1).clip(0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(path, quality=92, exif=exif)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_reduced_decoding_cuts_the_same_part(orientation: int, tmp_path: Path) -> None:
    photograph(tmp_path / "photo.jpg", orientation)
    crops = {}
    for reduced in (False, True):
        dataset = CropDataset([tmp_path / "photo.jpg"], (112, 112), min_scale=0.3, seed=0, reduced_jpeg=reduced)
        crops[reduced] = torch.stack([dataset[0, draw].image for draw in range(16)]).float()  # type: ignore[misc]
    difference = (crops[True] - crops[False]).abs()
    assert 0 < difference.mean() < 1.5 and difference[:, :2].mean() < 0.7  # of 255; a pixel's shift would be two


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_decoding_of_sides_that_are_no_multiple_is_in_place(orientation: int) -> None:
    """The last column of a reduced image is of one pixel, not of 8; to stretch it would move what is beside it."""
    y, x = np.mgrid[0:905, 0:1001]
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.stack([x / 4, y / 4, 0 * x], -1).astype(np.uint8)).save(file, "JPEG", quality=95, exif=exif)
    means = []
    for reduced in (False, True):
        with open_image(Stored("x", file.getvalue())) as image:
            height, width = image.size
            boxes = [(0, 0), (height - 300, width - 300)]
            crops = [np.asarray(cut(image, Box(*at, 300, 300), (32, 32), reduced=reduced), dtype=float) for at in boxes]
        means.append(np.array([crop.mean((0, 1)) for crop in crops]))
    assert np.abs(means[0] - means[1])[..., :2].max() < 0.6  # of four pixels for each level


def test_reduced_decoding_reads_fewer_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photograph(tmp_path / "photo.jpg")
    seen = []
    right = Image.Image.resize

    def resize(self: Image.Image, *args: object, **kwargs: object) -> Image.Image:
        seen.append(self.size)
        return right(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", resize)
    for size in (700, 300, 150, 100):
        CropDataset([tmp_path / "photo.jpg"], (size, size), min_scale=0.999, seed=0)[0, 0]
    assert [max(size) for size in seen[1:]] == [700, 350, 175] and max(seen[0]) >= 1000


def test_images_smaller_than_the_crop_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0, (9, 9, 9), size=(20, 20)))
    dataset = CropDataset([tmp_path / "a.png"], (32, 32), min_scale=0.9, seed=0)
    (batch,) = create_loader(dataset, EpochSampler(1, 4, 4, 0, range(1)), workers=0, pin_memory=False)
    assert batch.enlarged == 4


def test_heads_that_promise_more_than_there_is_take_no_memory(tmp_path: Path) -> None:
    code = """
import io, resource, struct, sys, zlib
from pathlib import Path
import numpy as np
from sparkme.data.images import Stored, load_image
head = io.BytesIO()
np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 3)})
def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
png = b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"x")
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))
for name, content in {"a.npy": head.getvalue() + bytes(64), "b.png": png}.items():
    (folder / name).write_bytes(content)
    for stored in (folder / name, Stored("bytes", content)):
        try:
            load_image(stored)
        except OSError as error:
            print(name, error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 4 and done.stdout.count("decompression bomb") == 2, done.stdout


def test_several_sources_are_one(sharded: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    folder, images = sharded
    (tmp_path / "a").mkdir()
    for i in range(5):
        (tmp_path / "a" / f"{i}.png").write_bytes(encoded(i, (9, 9, 9)))
    (tmp_path / "a" / "x.xml").write_text("x")
    write_parquet(tmp_path / "x.parquet", images[:6])
    shards_, parquet = [str(folder / f"part-{i:03d}.tar") for i in range(3)], str(tmp_path / "x.parquet")
    source = find_source([str(tmp_path / "a"), parquet, *shards_], cache=tmp_path / "cache")
    assert source.blocks is not None and source.blocks.tolist() == [*range(6), 9, 11, 18, 23, 31]
    contents = [c.read_bytes() if isinstance(c, Path) else c for c in (source.read(i).content for i in range(len(source)))]
    assert contents == [*(encoded(i, (9, 9, 9)) for i in range(5)), *images[:6], *images]
    assert len({source.name(i) for i in range(len(source))}) == 31 and source.notes == [
        "left out: 1 file of other kinds: .xml (1)"
    ]
    sampler = EpochSampler(31, 31, 31, 0, range(1), blocks=source.blocks, window=source.window)
    assert sorted(number for batch in sampler for _, number in batch) == list(range(31))
    with pytest.raises(UserError, match=r"--data .*x\.parquet is given twice; leave one out"):
        find_source([parquet, shards_[0], parquet])
    with pytest.raises(UserError, match=r"--data .*none is not a folder and matches no file"):
        find_source([parquet, str(tmp_path / "none")])


def test_a_run_on_several_sources_goes_on_and_labelled_ones_are_given_once(
    sharded: tuple[Path, list[bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [str(sharded[0] / f"part-{i:03d}.tar") for i in range(3)]
    words = [
        *QUICKEST,
        *TINY,
        "--data",
        *where[:2],
        "--data",
        where[2],
        "--shard-cache",
        str(tmp_path / "cache"),
        "--panel-epochs",
        "0",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main([*words, "--epochs", "1"]) == 0 and main([*words, "--epochs", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"20 images in {' '.join(where)}, " in shown and "resumed after step 2" in shown
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == where
    for command in (sparkme.probe.main, sparkme.finetune.main):
        with pytest.raises(SystemExit) as stopped:
            command(["x.pt", "--data", where[0], "--data", where[1]])
        assert stopped.value.code == 2 and "--data is given twice; link the class folders" in capsys.readouterr().err


def test_larger_pictures_than_the_limit_are_unreadable_and_name_the_flag(tmp_path: Path) -> None:
    Image.new("L", (41, 100)).save(tmp_path / "x.png")
    try:
        limit_pixels(4096)
        with pytest.raises(
            OSError, match=r"x\.png: Image size \(4100 pixels\) exceeds limit of 4096 pixels.*; raise --max-pix"
        ):
            load_rgb(tmp_path / "x.png")
        for most in (4100, 10**12):
            limit_pixels(most)
            assert load_rgb(tmp_path / "x.png").size == (41, 100)
        limit_pixels(2 * MAX_PIXELS)
        assert scaled(10) == 20  # a file may have more bytes, too
    finally:
        limit_pixels(None)
    assert scaled(10) == 10
    for bad in (0, -1, 2**70):
        with pytest.raises(UserError, match=f"--max-pixels {bad} must be at least 1"):
            limit_pixels(bad)


@pytest.fixture(scope="module")
def every_source(sharded: tuple[Path, list[bytes]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, images = sharded
    root = tmp_path_factory.mktemp("sources")
    (root / "files").mkdir()
    for i, image in enumerate(images):
        (root / "files" / f"{i:03d}.png").write_bytes(image)
    (root / "list.txt").write_text("".join(f"files/{i:03d}.png\n" for i in range(20)))
    write_parquet(root / "data.parquet", images)
    np.save(root / "stack.npy", [np.asarray(Image.open(io.BytesIO(image))) for image in images])
    (root / "own_images.py").write_text(
        "from pathlib import Path\nfrom PIL import Image\n"
        "class Own(list):\n    def __getitem__(self, i): return Image.open(super().__getitem__(i))\n"
        f"images = Own(sorted(Path({str(root / 'files')!r}).iterdir()))\nimages.targets = [i % 2 for i in range(20)]\n"
    )
    sys.path.insert(0, str(root))
    return {
        "folder": str(root / "files"),
        "list": str(root / "list.txt"),
        "shards": str(folder / "part-{000..002}.tar"),
        "parquet": str(root / "data.parquet"),
        "dataset": "own_images:images",
        "array": str(root / "stack.npy"),
    }


@pytest.mark.parametrize("kind", ["list", "shards", "parquet", "dataset", "array"])
def test_every_source_pretrains_and_resumes_bit_for_bit(kind: str, every_source: dict[str, str], tmp_path: Path) -> None:
    data = ["--data", every_source[kind]]
    words = [
        *QUICKEST,
        *TINY,
        "--samples-per-epoch",
        "20",
        "--panel-epochs",
        "0",
        "--epochs",
        "2",
        "--shard-cache",
        str(tmp_path / "cache"),
        "--checkpoint-minutes",
        "0",
        "--keep-checkpoints",
        "9",
    ]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert main([*words, *data, "--output", str(straight)]) == 0
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(straight / "checkpoints" / "step_00000005.pt", resumed / "checkpoints")
    shutil.copy(straight / "metrics.jsonl", resumed)
    assert main([*words, *data, "--output", str(resumed), "--workers", "2"]) == 0
    assert losses(straight) == losses(resumed) and len(losses(straight)) == 10
    expected = weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    if kind in ("list", "dataset"):  # the order is that of the folder of the same files
        folder = tmp_path / "folder"
        assert main([*words, "--data", every_source["folder"], "--output", str(folder)]) == 0
        assert losses(folder) == losses(straight)


@pytest.mark.parametrize("kind", ["shards", "parquet", "dataset"])
def test_every_labelled_source_is_probed_and_fine_tuned(
    kind: str, every_source: dict[str, str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(trained), "--data", every_source[kind], "--shard-cache", str(tmp_path / "cache"), "--workers", "0"]
    small = ["--epochs", "1", "--batch-size", "8", "--device", "cpu"]
    assert sparkme.probe.main([*words, "--output", str(tmp_path / "scores.json"), "--no-linear"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["num_train"], scores["num_val"]) == (16, 4) and scores["scores"][0]["knn"] == 1.0
    output = tmp_path / "run"
    assert sparkme.finetune.main([*words, "--output", str(output), *small]) == 0
    assert set(json.loads((output / "results.json").read_text())["of_each_class"]) == set(scores["classes"])
    capsys.readouterr()


def test_sources_that_are_none_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], every_source: dict[str, str], trained: Path
) -> None:
    (tmp_path / "picture.png").write_bytes(encoded(0, (1, 1, 1)))
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.parquet")
    for data, reason in {
        str(tmp_path / "picture.png"): "is neither a folder of images, nor a list",
        str(tmp_path / "none-{0..3}.tar"): "is not a folder and matches no file",
        str(tmp_path / "empty"): "holds no images",
        "{0..99999999}.tar": "stands for more than",
        str(tmp_path / "pipe.*"): "pipe.parquet is not a file",
        "http://localhost/{0..3}.parquet": "not both; and Parquet files must be local",
        "x\0y": "has a character that no name has",
    }.items():
        if "\0" in data:
            with pytest.raises(SystemExit):
                main([*QUICKEST, "--data", data])
            assert reason in capsys.readouterr().err
        else:
            assert reason in fails(capsys, *QUICKEST, "--data", data, "--output", tmp_path / "run")
    assert sparkme.probe.main([str(trained), "--data", every_source["folder"]]) == 2
    assert "has no labels; make one folder per class" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "bool"])
def test_a_stack_of_images_is_read_as_its_images_are_one_by_one(dtype: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 2, (3, 8, 6, 5)).astype(dtype)
    np.save(tmp_path / "stack.npy", images)
    source = pickle.loads(pickle.dumps(find_source(str(tmp_path / "stack.npy"))))
    assert len(pickle.dumps(source)) < 1000 and len(source) == 3 and source.name(2).endswith("stack.npy[2]")
    for i, image in enumerate(images):
        np.save(tmp_path / "one.npy", image)
        expected = load_image(tmp_path / "one.npy", 5, "white")
        assert torch.equal(load_image(source.read(i), 5, "white"), expected)  # type: ignore[arg-type]
    for bad in (images[0, 0], images[:0]):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(UserError, match=r"bad\.npy is an array .*, not a stack of images \(N, H, W\)"):
            find_source(str(tmp_path / "bad.npy"))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"--data .*bad\.npy cannot be read: "):
        find_source(str(tmp_path / "bad.npy"))


def test_files_of_a_list_are_a_source_too(tmp_path: Path) -> None:
    paths = [tmp_path / "b.png", tmp_path / "a.png"]
    for i, path in enumerate(paths):
        path.write_bytes(encoded(i, (1, 1, 1)))
    source = Files.of(paths)
    assert [source.path(i) for i in range(2)] == paths and stored(source.subset([1])) == [paths[1].read_bytes()]
