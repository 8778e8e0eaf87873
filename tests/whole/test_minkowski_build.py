"""The builder of MinkowskiEngine: what it refuses, and what its cache depends on. No network, no compilation."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "cuda_ext" / "minkowski"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minkowski_build", FOLDER / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(build: ModuleType, tmp_path: Path) -> Path:
    """A tree in which every edit fits."""
    for edit in build.EDITS:
        path = tmp_path / edit.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "first\n") + edit.old * edit.count + "last\n")
    return tmp_path


def test_edits_replace_their_text_and_nothing_else(build: ModuleType, sources: Path) -> None:
    build.apply_edits(sources, build.EDITS)
    for file in {edit.file for edit in build.EDITS}:
        parts = ["first\n"]
        for edit in build.EDITS:
            parts += [edit.new * edit.count, "last\n"] if edit.file == file else []
        assert (sources / file).read_text() == "".join(parts)


@pytest.mark.parametrize("copies", [0, 2])
def test_edit_that_fits_too_seldom_or_too_often_is_an_error_with_its_name(
    build: ModuleType, sources: Path, copies: int
) -> None:
    edit = build.EDITS[0]
    (sources / edit.file).write_text(edit.old * copies)
    with pytest.raises(build.BuildError, match=f"{edit.name}.*{copies} times instead of 1"):
        build.apply_edits(sources, build.EDITS)


def test_edit_of_a_missing_file_is_an_error_with_its_name(build: ModuleType, sources: Path) -> None:
    edit = build.EDITS[-1]
    (sources / edit.file).unlink()
    with pytest.raises(build.BuildError, match=edit.name):
        build.apply_edits(sources, build.EDITS)


def test_every_edit_has_its_own_name_and_a_reason(build: ModuleType) -> None:
    assert len({edit.name for edit in build.EDITS}) == len(build.EDITS)
    assert all(edit.reason for edit in build.EDITS)


def test_archive_with_another_hash_is_refused(build: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / build.SDIST_NAME
    archive.write_bytes(b"not the published one")
    with pytest.raises(build.BuildError, match=hashlib.sha256(archive.read_bytes()).hexdigest()):
        build.get_sdist(archive, tmp_path / "cache")


def test_missing_archive_is_named(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    status = build.main(["--cpu", "--sdist", str(tmp_path / "nowhere.tar.gz"), "--cache", str(tmp_path)])
    assert status == 2
    assert capsys.readouterr().err == f"error: --sdist {tmp_path / 'nowhere.tar.gz'} does not exist.\n"


def test_damaged_archive_in_the_cache_is_fetched_again(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / build.SDIST_NAME).write_bytes(b"half a download")
    monkeypatch.setattr(build, "download_sdist", lambda: b"whole")
    assert build.get_sdist(None, tmp_path) == b"whole"
    assert (tmp_path / build.SDIST_NAME).read_bytes() == b"whole"


def test_archive_is_found_in_both_forms_of_an_index_page(build: ModuleType) -> None:
    find = sys.modules["sdist"].find_in_index_page
    page, name = "https://index.example/simple/minkowskiengine/", build.SDIST_NAME
    files = [{"url": "../../files/MinkowskiEngine-0.5.3.tar.gz"}, {"url": f"../../files/{name}"}]
    in_json = json.dumps({"files": files}).encode()
    in_html = f"<html><a href='../../files/{name}#sha256=00'>{name}</a></html>".encode()
    assert find(in_json, "application/vnd.pypi.simple.v1+json", page) == f"https://index.example/files/{name}"
    assert find(in_html, "text/html; charset=utf-8", page) == f"https://index.example/files/{name}"
    assert find(b"<html></html>", "text/html", page) is None


def test_indexes_are_tried_in_pips_order_and_secrets_stay_out_of_messages(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdist = sys.modules["sdist"]
    asked = []

    def refuse(url: str, certificates: str | None, timeout_s: float) -> tuple[bytes, str]:
        asked.append(url)
        raise OSError("refused")

    settings = {
        "index-url": "https://user:secret@first.example/simple/",
        "extra-index-url": "https://second.example/simple",
    }
    monkeypatch.setattr(sdist, "pip_settings", lambda: settings)
    monkeypatch.setattr(sdist, "_get", refuse)
    with pytest.raises(build.BuildError, match="--sdist FILE") as raised:
        sdist.download_sdist()
    assert [url.rpartition("@")[2].removeprefix("https://") for url in asked] == [
        "first.example/simple/minkowskiengine/",
        "second.example/simple/minkowskiengine/",
    ]
    assert "secret" not in str(raised.value)


def test_cache_key_changes_with_every_ingredient(build: ModuleType) -> None:
    parts = build.ingredients(build.Target(cuda="13.0", architectures="9.0"))
    keys = {build.cache_key(parts)}
    for name in parts:
        keys.add(build.cache_key({**parts, name: f"{parts[name]}x"}))
    assert len(keys) == len(parts) + 1


def test_cache_key_depends_on_the_target(build: ModuleType) -> None:
    targets = [
        build.Target(),
        build.Target("13.0", "9.0"),
        build.Target("13.0", "8.0;9.0"),
        build.Target("12.8", "9.0"),
    ]
    assert len({build.cache_key(build.ingredients(target)) for target in targets}) == len(targets)


def test_recipe_depends_on_the_edits_and_files_of_its_target_only(build: ModuleType, tmp_path: Path) -> None:
    cpu, cuda = build.Target(), build.Target("13.0", "9.0")

    def hashes(edits: tuple = build.EDITS, compat: Path = build.COMPAT) -> tuple[str, str]:
        return build.recipe_hash(cpu, edits, compat), build.recipe_hash(cuda, edits, compat)

    def changed(index: int) -> tuple:
        edits = list(build.EDITS)
        edits[index] = dataclasses.replace(edits[index], new="something else")
        return tuple(edits)

    def compat_with_another(name: str) -> Path:
        folder = tmp_path / name.replace("/", "_")
        shutil.copytree(build.COMPAT, folder)
        with (folder / name).open("a") as stream:
            stream.write("// more\n")
        return folder

    def changes(after: tuple[str, str]) -> tuple[bool, bool]:
        return after[0] != before[0], after[1] != before[1]

    before = hashes()
    concerned = {None: (True, True), "cpu": (True, False), "cuda": (False, True)}
    for index, edit in enumerate(build.EDITS):
        assert changes(hashes(changed(index))) == concerned[edit.only], edit.name
    for file in {file for files in build.COMPAT_FILES.values() for file in files}:
        expected = tuple(file in build.COMPAT_FILES[kind] for kind in ("cpu", "cuda"))
        assert changes(hashes(compat=compat_with_another(file))) == expected, file


def test_a_build_takes_every_file_of_the_compatibility_folder(build: ModuleType) -> None:
    files = {str(path.relative_to(build.COMPAT)) for path in build.COMPAT.rglob("*") if path.is_file()}
    assert files == {file for taken in build.COMPAT_FILES.values() for file in taken}


def test_forced_cuda_without_a_device_asks_for_the_architectures(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    with pytest.raises(build.BuildError, match="TORCH_CUDA_ARCH_LIST"):
        build.choose_target()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    assert build.choose_target().architectures == "8.0;9.0"
    monkeypatch.delenv("FORCE_CUDA")
    assert build.choose_target().kind == "cpu"


def test_missing_nvcc_is_named_with_the_packages_that_bring_it(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda cuda: (None, ["/old/nvcc is version 11.8"]))
    with pytest.raises(build.BuildError, match=r"/old/nvcc is version 11\.8.*nvidia-cuda-nvcc==13\.0\.\*"):
        build.require_cuda_home("13.0")


def test_failed_command_shows_its_errors_and_names_its_log(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    log = tmp_path / "log"
    command = [sys.executable, "-c", "print('file.cu: error: no such thing'); raise SystemExit(3)"]
    with pytest.raises(build.BuildError, match=f"status 3.*{log}"):
        build.run_logged(command, log, "compiling")
    assert "file.cu: error: no such thing" in shown.getvalue()


def test_wheel_in_the_cache_is_returned_without_a_build(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_build", lambda *arguments: pytest.fail("it built"))
    folder = tmp_path / build.cache_key(build.ingredients(build.Target()))
    folder.mkdir()
    wheel = folder / "minkowskiengine-0.5.4-none-any.whl"
    wheel.touch()
    assert build.build_wheel(cache=tmp_path, wanted="cpu") == wheel
