"""What a run outlives: damaged checkpoints, full disks, processes that are killed or hang, steps that are not finite."""

import json
import multiprocessing
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from fcntl import ioctl
from io import StringIO
from pathlib import Path
from termios import TIOCSCTTY, TIOCSWINSZ
from typing import Any, BinaryIO

import pytest
import torch
import torch.distributed as dist
from commands import SMALL, fails, losses
from processes import FRESH, free_port, run_two

from sparkme.data.dataset import Batch
from sparkme.errors import CannotWrite, UserError
from sparkme.finetune import main as finetune
from sparkme.pretrain import main
from sparkme.training import loop
from sparkme.training.checkpoint import Checkpoints
from sparkme.training.classification import Classification
from sparkme.training.log import Lines, drop_after
from sparkme.training.pretraining import Pretraining
from sparkme.watchdog import Watchdog
from sparkme.weights.checkpoint import load_checkpoint

# Six steps, a checkpoint of 5 MB after every second one.
TINY = [*SMALL, "--model", "timm:test_resnet", "--drop-path", "0", "--base-lr", "2", "--checkpoint-minutes", "0"]
LIMIT_S = 60  # within which a run that cannot go on has to end


def train(folder: Path, *words: object) -> int:
    return main([*TINY, "--output", str(folder), *map(str, words)])


def state(folder: Path, name: str = "last.pt") -> dict[str, Any]:
    return load_checkpoint(folder / "checkpoints" / name)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else bool(a == b)


def equal(folder: Path, other: Path) -> bool:
    """Whether two runs have the same losses, weights and optimiser, bit for bit."""
    parts = [[state(run)[name] for name in ("step", "model", "optimizer", "not_finite")] for run in (folder, other)]
    return losses(folder) == losses(other) and same(*parts)


def at_step(monkeypatch: pytest.MonkeyPatch, what: dict[int, Callable[[Pretraining], object]]) -> None:
    """Does something before the steps of these numbers, from 1."""
    right = Pretraining.train_step

    def step(self: Pretraining, batch: Batch) -> torch.Tensor | None:
        what.get(self.step + 1, lambda _: None)(self)
        return right(self, batch)

    monkeypatch.setattr(Pretraining, "train_step", step)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    assert train(folder) == 0
    return folder


@pytest.fixture
def copied(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run", symlinks=True))


def truncate(folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"step_{step:08d}.pt"
    os.truncate(path, path.stat().st_size // 2)


# Damaged checkpoints


def test_a_truncated_newest_checkpoint_is_named_and_the_one_before_is_taken(
    straight: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(copied, 6)
    assert train(copied) == 0
    said = capsys.readouterr()
    assert re.search(
        r"step_00000006.pt is damaged: .*; it is now step_00000006.pt.damaged, and the run continues from step_0000"
        "0004.pt",
        said.err,
    )
    assert "resumed after step 4" in said.out and "was missing" not in said.out
    assert equal(copied, straight)
    assert train(copied, "--no-resume", "--epochs", "1") == 0
    assert sorted(p.name for p in (copied / "checkpoints").iterdir()) == ["last.pt", "step_00000002.pt"]


def test_only_damaged_checkpoints_end_with_one_line(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 4, 6):
        truncate(copied, step)
    message = fails(capsys, *TINY, "--output", copied)
    assert "step_00000006.pt is damaged" in message and "no other checkpoint can be read" in message
    assert len(list((copied / "checkpoints").glob("step_*.pt"))) == 3


def test_a_flipped_byte_is_detected_or_harmless(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.randn(5, 7) for i in range(6)}
    content = {"config": {"model": "resnet18"}, "model": tensors, "optimizer": {"step": 3}}
    path = Checkpoints(tmp_path, keep=1).save(content, 5)
    right, whole, chance = load_checkpoint(path), path.read_bytes(), random.Random(0)
    detected = 0
    for position in [*range(0, len(whole), len(whole) // 60), *chance.choices(range(len(whole)), k=60)]:
        spoiled = bytearray(whole)
        spoiled[position] ^= chance.randrange(1, 256)
        path.write_bytes(spoiled)
        try:
            assert same(load_checkpoint(path), right), position
        except UserError:
            detected += 1
    assert detected > 20


def test_commands_refuse_a_checkpoint_with_a_flipped_byte(
    straight: Path,
    copied: Path,
    labelled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sparkme.export
    import sparkme.probe
    import sparkme.visualize

    path = copied / "checkpoints" / "step_00000006.pt"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    spoiled = bytearray(path.read_bytes())
    spoiled[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(spoiled)
    elsewhere = tmp_path / "weights.pt"
    elsewhere.write_bytes(spoiled)
    monkeypatch.chdir(tmp_path)
    commands: dict[str, tuple[Callable[[list[str]], int], list[object]]] = {
        "export": (sparkme.export.main, [path, "--output", "out.pth"]),
        "probe": (sparkme.probe.main, [path, "--data", labelled]),
        "finetune": (finetune, [path, "--data", labelled, "--output", "tuned"]),
        "visualize": (sparkme.visualize.main, [path, "--output", "picture.png"]),
        "init": (main, [*TINY, "--init", path, "--output", "started"]),
        "finetune a copy": (finetune, [elsewhere, "--data", labelled, "--output", "tuned"]),
        "init from a copy": (main, [*TINY, "--init", elsewhere, "--output", "started"]),
    }
    for name, (command, words) in commands.items():
        assert command([*map(str, words)]) == 2, name
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert re.search(r"is damaged: the checksum of \S+ differs", line), line
    assert {p.name for p in tmp_path.iterdir()} <= {"run", "weights.pt"}
    assert train(copied) == 0 and "the checksum of" in capsys.readouterr().err and equal(copied, straight)


# Writing in the background


def test_a_save_stops_the_loop_for_a_copy_in_memory(tmp_path: Path) -> None:
    """In processor time of the loop's thread, since other processes may be busy; a tenth of a second here."""
    tensors = {str(i): torch.full((3_000_000,), float(i)) for i in range(25)}  # 300 MB
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.make_room({"model": tensors})
    stops, copies = [], []
    for step in range(3):
        for i, value in enumerate(tensors.values()):
            value.fill_(100.0 * step + i)
        since = time.thread_time()
        checkpoints.start_saving({"model": tensors, "config": {}}, step)
        stops.append(time.thread_time() - since)
        since = time.thread_time()
        for value in tensors.values():
            value.clone()
        copies.append(time.thread_time() - since)
        for value in tensors.values():  # training goes on
            value.add_(1000)
        assert checkpoints.pending
        path = checkpoints.wait()
        saved = load_checkpoint(path)["model"] if path else {}
        assert all(bool((saved[str(i)] == 100.0 * step + i).all()) for i in range(25))
    assert statistics.median(stops) < 2 * statistics.median(copies), (stops, copies)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "step_00000001.pt", "step_00000002.pt"]


def test_the_newest_checkpoints_remain_and_every_kth_for_good(tmp_path: Path) -> None:
    assert train(tmp_path, "--epochs", 7, "--keep-checkpoints", 2, "--keep-every", 3) == 0
    steps = sorted(int(p.stem[5:]) for p in (tmp_path / "checkpoints").glob("step_*"))
    assert steps == [6, 10, 12, 14]  # epochs 3 and 6 for good, 5 and 7 as the newest
    assert not list(tmp_path.rglob("*.writing"))


def test_ctrl_c_while_waiting_for_a_save_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being written comes from the memory that the next save is copied to."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    right = torch.save

    def slowly(content: object, file: BinaryIO) -> None:
        time.sleep(0.3)
        right(content, file)

    monkeypatch.setattr(torch, "save", slowly)
    weight = torch.zeros(3)
    checkpoints.start_saving({"model": {"w": weight}, "config": {}}, 1)
    timer = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.start_saving({"model": {"w": weight + 1}, "config": {}}, 2)
    signal.signal(signal.SIGALRM, timer)
    path = checkpoints.wait()
    assert path is not None and bool((load_checkpoint(path)["model"]["w"] == 0).all())


def test_a_save_that_fails_in_the_background_is_told_once_and_tried_again(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, tries = torch.save, list[object]()

    def save(content: object, file: BinaryIO) -> None:
        tries.append(file)
        if len(tries) <= 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        right(content, file)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(loop, "RETRY_S", 0.0)
    assert train(tmp_path, "--panel-epochs", 0) == 0
    said = capsys.readouterr().err
    assert said.count("cannot write the checkpoint") == 1 and "; there is no earlier one; continuing without" in said
    assert said.count("the checkpoint could be written again") == 1
    assert losses(tmp_path) == losses(straight) and same(state(tmp_path)["model"], state(straight)["model"])
    notes = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert [n["kind"] for n in notes if n["kind"] == "warning"] == ["warning"] * 2


# Full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, with room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a disk here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            if file.write(bytes(4096)) < 4096:
                break


def test_a_run_outlives_a_full_disk(
    straight: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    monkeypatch.setattr(loop, "LAST_TRIES_S", 0.1)

    def look_and_empty(_: Pretraining) -> None:
        assert state(run)["step"] == 2, "the disk is full"
        (small_disk / "filler").unlink()

    at_step(monkeypatch, {3: lambda self: (self.folder.checkpoints._written.result(), fill(small_disk)), 6: look_and_empty})
    assert train(run, "--panel-epochs", 1, "--keep-checkpoints", 9) == 0
    said = capsys.readouterr().err
    assert said.count("continuing without it, and trying again later") <= 2 and said.count("No space left") >= 1, said
    assert said.count("could be written again") == 1 and "Traceback" not in said, said
    assert losses(run) == losses(straight) and state(run)["step"] == 6
    assert (run / "loss.png").is_file() and (run / "reconstructions" / "epoch_0003.png").is_file()
    assert not list(run.rglob("*.writing"))


def test_a_full_disk_ends_the_run_where_it_is_to(
    straight: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    monkeypatch.setattr(loop, "LAST_TRIES", 1)
    at_step(monkeypatch, {3: lambda self: (self.folder.checkpoints._written.result(), fill(small_disk))})
    message = fails(capsys, *TINY, "--output", run, "--on-full-disk", "stop", "--panel-epochs", 0)
    # The checkpoint is written in the background: on a busy machine the picture may fail first.
    what = r"checkpoint .*step_00000004.pt \(it takes 0.01 GiB, 0.00 are free\);|cannot write .*loss.png: .*No space left.*;"
    assert re.search(rf"({what}) .*intact; make room or", message)
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    assert state(run)["step"] == 2 and train(run) == 0 and equal(run, straight)


def test_a_picture_that_finds_no_room_ends_the_run_where_it_is_to_but_what_was_done_is_saved(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Pretraining, "_draw_panel", full)
    message = fails(capsys, *TINY, "--output", tmp_path, "--on-full-disk", "stop", "--panel-epochs", 2)
    assert re.search(r"cannot write pictures: .*No space left.*saved .*step_00000004.pt after step 4;.*make room", message)
    monkeypatch.undo()
    assert train(tmp_path, "--panel-epochs", 2) == 0 and equal(tmp_path, straight)


def test_a_limit_on_the_size_of_files_is_a_full_disk_too(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))  # noqa: E731
    at_step(monkeypatch, {2: lambda _: limit(500), 5: lambda _: limit(hard)})
    try:
        assert train(tmp_path, "--panel-epochs", 0) == 0
    finally:
        limit(hard)
    said = capsys.readouterr().err
    assert said.count("continuing without") == 2 and said.count("File too large") == 2, said
    assert said.count("the checkpoint could be written again") == 1, said
    assert losses(tmp_path) == losses(straight)


def test_the_last_checkpoint_waits_for_room(
    straight: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, slept = small_disk / "run", list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            (small_disk / "filler").unlink()

    monkeypatch.setattr(
        loop,
        "time",
        types.SimpleNamespace(sleep=sleep, **{name: getattr(time, name) for name in ("monotonic", "perf_counter")}),
    )
    at_step(monkeypatch, {5: lambda self: (self.folder.checkpoints.wait(), fill(small_disk))})
    assert train(run, "--panel-epochs", 0) == 0
    assert slept == [loop.LAST_TRIES_S] * 2 and equal(run, straight)
    monkeypatch.setattr(loop, "LAST_TRIES", 2)
    at_step(monkeypatch, {8: lambda self: (self.folder.checkpoints.wait(), fill(small_disk))})
    capsys.readouterr()
    assert train(run, "--panel-epochs", 0, "--epochs", 4) == 2
    assert "later steps are lost; make room, then start again" in capsys.readouterr().err


def test_a_read_only_output_is_refused_before_the_network_is_built(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setattr("sparkme.training.pretraining.build_network", lambda *_: pytest.fail("the network is built"))
    assert "cannot write to --output" in fails(capsys, *TINY, "--output", small_disk / "run")


def test_lines_of_a_file_that_is_full_are_written_later_and_cut_off_where_a_run_goes_back(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.add({"step": 1, "epoch": 0.5, "value": float("nan")})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (lines.path.stat().st_size + 5, hard))  # a part of the next line fits
    before = lines.path.read_bytes()
    try:
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                lines.add({"step": step, "epoch": 1})
        assert lines.path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    lines.flush()
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1, 2, 3]
    with lines.path.open("a") as file:
        file.write('{"step": 4, "ep')
    drop_after(lines.path, 9)
    assert len(lines.path.read_text().splitlines()) == 3
    drop_after(lines.path, 2)
    assert len(lines.path.read_text().splitlines()) == 2
    drop_after(lines.path, 0)
    assert lines.path.read_bytes() == b""


# Processes that are killed or hang


def child(words: list[str], said: Path, fault: tuple[str, int] | None, rank: int = 0, world: int = 1, port: int = 0) -> None:
    """Runs the command in a process of its own, to which something happens before a step."""
    torch.set_num_threads(1)
    number = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    patch = pytest.MonkeyPatch()
    if fault and fault[0] == "fifo":
        from sparkme.data.dataset import CropDataset

        right = CropDataset.__getitem__

        def item(self: CropDataset, index: tuple[int, int]) -> Any:
            if index[0] * 2 + 1 >= fault[1]:  # two steps an epoch
                (said.parent / "fifo").read_bytes()
            return right(self, index)

        patch.setattr(CropDataset, "__getitem__", item)
        multiprocessing.set_start_method("fork", force=True)  # so that it is also the loading process's
    elif fault:
        at_step(patch, {fault[1]: lambda _: os.kill(os.getpid(), getattr(signal, fault[0]))})
    sys.exit(main(words))


def start(*arguments: object) -> Any:
    process = FRESH.Process(target=child, args=arguments)
    process.start()
    return process


def wait_for(path: Path, text: str, limit_s: float = LIMIT_S) -> None:
    ends = time.monotonic() + limit_s
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < ends, path.read_text() if path.exists() else f"no {path}"
        time.sleep(0.02)


def test_a_killed_loader_costs_no_step(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill(_: Pretraining) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    at_step(monkeypatch, {2: kill})
    # More images than are fetched ahead, so that the next one is waited for.
    words = ["--samples-per-epoch", "64", "--epochs", "1", "--workers", "1", "--checkpoint-minutes", "10"]
    began = time.monotonic()
    message = fails(capsys, *TINY, "--output", tmp_path / "run", *words)
    assert time.monotonic() - began < LIMIT_S
    # It dies between two batches or in the midst of handing one over.
    reason = r"DataLoader worker .* exited unexpectedly.*lower --workers|loading images failed: .*see --workers"
    found = re.search(rf"(?:{reason}).*saved .* after step (\d+)", message)
    assert found and state(tmp_path / "run")["step"] == int(found[1]) == len(losses(tmp_path / "run")) < 16
    monkeypatch.undo()
    assert train(tmp_path / "run", *words) == 0 and train(tmp_path / "other", *words, "--workers", 0) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "other")
    assert same(state(tmp_path / "run")["model"], state(tmp_path / "other")["model"])


def test_waiting_for_ever_ends_a_run_and_being_stopped_does_not(tmp_path: Path) -> None:
    """Ctrl-Z for longer than the limit, and then images that never come."""
    said = tmp_path / "said"
    os.mkfifo(tmp_path / "fifo")
    words = [
        *TINY,
        "--output",
        str(tmp_path / "run"),
        "--workers",
        "1",
        "--hang-seconds",
        "3",
        "--epochs",
        "6",
        "--panel-epochs",
        "0",
    ]
    process = start(words, said, ("fifo", 9))
    wait_for(said, "step 1/")
    loaders = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert loaders
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4.5)
    os.kill(process.pid, signal.SIGCONT)
    began = time.monotonic()
    process.join(LIMIT_S)
    text = said.read_text()
    assert process.exitcode == 1 and time.monotonic() - began < 40
    expected = (
        r"error: no progress for \d s while waiting for the images of step 9 \(.*; the same command continues from step_0*8.pt"
    )
    assert re.search(expected, text), text
    assert len(losses(tmp_path / "run")) == 8
    ends = time.monotonic() + LIMIT_S
    while any(Path(f"/proc/{number}").exists() for number in loaders):  # one that was killed takes a moment to be gone
        assert time.monotonic() < ends, "a process that loads images was left behind"
        time.sleep(0.02)


def test_a_process_that_stops_is_named_and_ended_by_the_other(tmp_path: Path) -> None:
    said, port = [tmp_path / f"said{rank}" for rank in range(2)], free_port()
    words = [*TINY, "--output", str(tmp_path / "run"), "--hang-seconds", "5", "--checkpoint-minutes", "10"]
    processes = [start(words, said[rank], ("SIGSTOP", 4) if rank else None, rank, 2, port) for rank in range(2)]
    wait_for(said[0], "step 3/")
    began = time.monotonic()
    for process in processes:
        process.join(LIMIT_S)
    took_s = time.monotonic() - began
    codes = [process.exitcode for process in processes]
    for process in processes:  # pytest would wait for one that is left
        process.kill()
    assert took_s < 30
    assert codes == [1, -signal.SIGKILL]
    text = said[0].read_text()
    assert re.search(r"error: no progress for \d s while .* step 4 \(", text), text
    assert f"; process 1 (pid {processes[1].pid}) is stopped, and is killed; there is no checkpoint yet" in text, text


def together(rank: int, folder: str, ports: list[int]) -> None:
    """What two processes do together, one run after the other; leaves exit codes and errors in a file."""
    torch.set_num_threads(1)
    path, found = Path(folder), {}
    for name, port in zip(("straight", "truncated", "damaged", "skipped"), ports, strict=True):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if rank == 0 and name in ("truncated", "damaged"):
            shutil.copytree(path / "straight", path / name, symlinks=True)
            for step in (6,) if name == "truncated" else (2, 4, 6):
                truncate(path / name, step)
        patch, kept = pytest.MonkeyPatch(), list[Any]()
        if name == "skipped":
            spoil(patch, Pretraining, {3} if rank else set(), kept)
        errors = StringIO()
        with redirect_stderr(errors):
            code = train(path / name, *(["--on-nan", "skip"] if name == "skipped" else []))
        patch.undo()
        signal.alarm(0)  # that is to end a process which does not leave after an error
        if dist.is_initialized():
            dist.destroy_process_group()
        found[name] = [code, errors.getvalue(), kept]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def spoil(
    patch: pytest.MonkeyPatch,
    kind: type[Pretraining] | type[Classification],
    steps: set[int],
    kept: list[Any],
    *,
    gradient: bool = False,
) -> None:
    """Makes the loss of steps, from 1, NaN, or only its gradient; `kept` takes whether each left all as it was before."""
    right_loss, right_step = kind.loss, kind.train_step

    def loss(self: Any, *tensors: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        value = right_loss(self, *tensors, generator=generator)
        if self.step + 1 not in steps:
            return value
        if not gradient:
            return value * float("nan")
        value.register_hook(lambda slope: slope * float("inf"))
        return value

    def step(self: Any, batch: Batch) -> torch.Tensor | None:
        look = lambda: {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}  # noqa: E731
        before = json.dumps(to_lists(look()))
        value = right_step(self, batch)
        kept.append(json.dumps(to_lists(look())) == before)
        return value

    patch.setattr(kind, "loss", loss)
    patch.setattr(kind, "train_step", step)


def to_lists(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.double().sum().item(), value.double().abs().sum().item()]
    return {str(k): to_lists(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_two(together, str(folder), [free_port() for _ in range(4)])
    return folder


def test_two_processes_outlive_damaged_checkpoints_and_steps_that_are_not_finite(two: Path) -> None:
    first, second = (json.loads((two / f"{rank}.json").read_text()) for rank in range(2))
    assert [found[0] for found in first.values()] == [found[0] for found in second.values()] == [0, 0, 2, 0]
    assert "step_00000006.pt is damaged" in first["truncated"][1] and not second["truncated"][1]
    assert equal(two / "truncated", two / "straight")
    for found in (first, second):
        (line,) = found["damaged"][1].strip().splitlines()
        assert "no other checkpoint can be read" in line
        assert found["skipped"][2] == [False, False, True, False, False, False]
    assert state(two / "skipped")["not_finite"] == {"count": 1, "steps": [3]}
    assert "the step is skipped" in first["skipped"][1] and not second["skipped"][1]
    records = [json.loads(line) for line in (two / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert statistics.median([r["save_ms"] for r in records if "save_ms" in r]) < 100


def test_torchrun_starts_a_killed_run_again_and_it_comes_to_the_same(two: Path, tmp_path: Path) -> None:
    """The second process is killed in its third step, the first time."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys\n"
        "from sparkme.pretrain import main\n"
        "from sparkme.training.pretraining import Pretraining\n"
        "right = Pretraining.train_step\n"
        "def step(self, batch):\n"
        "    if (os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT'], self.step) == ('1', '0', 3):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return right(self, batch)\n"
        "Pretraining.train_step = step\n"
        "sys.exit(main())\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    words = [str(script), *TINY, "--panel-epochs", "0", "--output", str(tmp_path / "run")]
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "another process of this run ended or does not answer" in done.stderr, done.stderr
    assert "resumed after step 2" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert equal(tmp_path / "run", two / "straight")


def test_the_watchdog_looks_at_how_long_one_thing_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are counted from what was said last; a limit that is longer than the one for all counts."""
    said: list[tuple[str, int]] = []
    dog = Watchdog(3, lambda: "")
    monkeypatch.setattr(dog, "_end", lambda doing, seconds: (said.append((doing, seconds)), dog._ended.set()))
    doings = iter([("a", 0), None, None, ("b", 5), None, None, None, None, ("c", 1), None, None, None, None])

    def second() -> bool:
        if not dog._ended.is_set() and (doing := next(doings)):
            dog.expect(*doing)
        return dog._ended.is_set()

    monkeypatch.setattr(dog, "_second", second)
    dog._count()
    assert said == [("c", 4)]


def test_steps_that_always_take_longer_than_the_limit_are_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, doing, seconds: (ended.append(doing), self._ended.set()))
    at_step(monkeypatch, dict.fromkeys((2, 3, 4), lambda _: time.sleep(1.2)))
    assert train(tmp_path, "--hang-seconds", 0.5, "--epochs", 2, "--panel-epochs", 0, "--checkpoint-minutes", 10) == 0
    assert ended == []


def test_the_watchdog_leaves_though_the_disk_hangs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    monkeypatch.setattr("sparkme.watchdog.os._exit", left.append)
    monkeypatch.setattr("sparkme.watchdog.ANSWER_S", 0.2)
    monkeypatch.setattr("sparkme.watchdog.end_loaders", lambda: None)
    Watchdog(3, lambda: time.sleep(1) or "advice")._end("saving", 4)  # type: ignore[func-returns-value]
    assert left == [1] and "no progress for 4 s while saving" in capfd.readouterr().err
    time.sleep(1)


# Steps that are not finite


@pytest.mark.parametrize("gradient", [False, True])
def test_a_skipped_step_leaves_all_as_it_was_and_resumes_the_same(gradient: bool, tmp_path: Path) -> None:
    folders, kept = [tmp_path / "straight", tmp_path / "stopped"], list[bool]()
    for folder in folders:
        patch = pytest.MonkeyPatch()
        spoil(patch, Pretraining, {3}, kept, gradient=gradient)
        if folder.name == "stopped":
            at_step(patch, {4: lambda _: os.kill(os.getpid(), signal.SIGTERM)})
            assert train(folder, "--on-nan", "skip") == 128 + signal.SIGTERM
            assert state(folder)["step"] == 4 and state(folder)["not_finite"] == {"count": 1, "steps": [3]}
            patch.undo()
            spoil(patch, Pretraining, {3}, kept, gradient=gradient)
        assert train(folder, "--on-nan", "skip") == 0
        patch.undo()
    assert kept == [False, False, True, False, False, False] * 2
    assert equal(*folders)
    records = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"]: r.get("not_finite", 0) for r in records} == {1: 0, 2: 0, 4: 1, 5: 1, 6: 1}


def test_a_rolled_back_run_takes_the_checkpoints_weights_and_resumes_the_same(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--on-nan", "rollback", "--epochs", 4]
    spoil(monkeypatch, Pretraining, {4}, [])
    taken: list[bool] = []

    def look(self: Pretraining) -> None:
        taken.append(same(self.network.state_dict(), state(tmp_path / "a", "step_00000002.pt")["model"]))

    at_step(
        monkeypatch,
        {5: lambda self: taken.append(same(self.network.state_dict(), state(tmp_path / "a", "step_00000002.pt")["model"]))},
    )
    assert train(tmp_path / "a", *words) == 0 and taken == [True]
    assert "not finite, the step is skipped; the weights are those of step 2 again" in capsys.readouterr().err
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    for step in (6, 8):
        truncate(tmp_path / "b", step)
    monkeypatch.undo()
    assert train(tmp_path / "b", *words) == 0 and equal(tmp_path / "a", tmp_path / "b")
    assert state(tmp_path / "b")["not_finite"] == {"count": 1, "steps": [4]}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("stop", r"the loss of step 3 is nan; the last good checkpoint is \S+step_00000002.pt; .*or --on-nan skip"),
        (
            "skip",
            r"step 13 or its gradient is not finite.*; 11 of the last 100 steps were not finite; the last good checkpoint is",
        ),
    ],
)
def test_steps_that_are_not_finite_stop_the_run(
    choice: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, Pretraining, set(range(3, 99)), [])
    assert train(tmp_path, "--on-nan", choice, "--epochs", 8, "--panel-epochs", 0) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, last), last
    for path in (tmp_path / "checkpoints").glob("step_*"):
        assert all(bool(v.isfinite().all()) for v in load_checkpoint(path)["model"].values() if v.is_floating_point())


def test_fine_tuning_leaves_out_what_is_not_finite(
    straight: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    spoil(monkeypatch, Classification, {2}, kept)
    words = [
        straight / "checkpoints" / "last.pt",
        "--data",
        labelled,
        "--epochs",
        2,
        "--batch-size",
        8,
        "--workers",
        0,
        "--log-steps",
        1,
        "--output",
        tmp_path,
        "--head-init",
        "random",
        "--on-nan",
        "skip",
    ]
    assert finetune([*map(str, words)]) == 0
    assert kept[:3] == [False, True, False] and state(tmp_path)["not_finite"]["steps"] == [2]


# What is shown, and where


def test_a_terminal_shows_two_bars_follows_its_width_and_may_be_closed(tmp_path: Path) -> None:
    """Of two runs, each on a terminal that closes, one is to end and the other, under nohup, to go on."""
    runs = []
    for name, ignored in (("closed", False), ("nohup", True)):
        master, slave = pty.openpty()
        ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))

        def take(slave: int = slave, ignored: bool = ignored) -> None:
            os.setsid()
            ioctl(slave, TIOCSCTTY, 0)
            signal.signal(
                signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL
            )  # whoever runs the tests may be under nohup

        epochs = "12" if ignored else "5000"  # minutes, however fast the machine is
        command = [
            sys.executable,
            "-m",
            "sparkme.pretrain",
            *TINY,
            "--epochs",
            epochs,
            "--panel-epochs",
            "0",
            "--checkpoint-minutes",
            "10",
            "--output",
            str(tmp_path / name),
        ]
        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take)
        os.close(slave)
        runs.append((process, master))
    shown = []
    for process, master in runs:
        shown.append(read_until(master, rb"epoch \d+/\d+: [^\r\n]*<[^\r\n]*loss \d\.\d.*run: [^\r\n]*<[^\r\n]*images/s"))
        text = shown[-1].decode(errors="replace")
        assert re.search(r"epoch \d+/\d+: .*<.*loss \d\.\d+", text) and re.search(r"run: .*<.*images/s", text), text[-2000:]
        ioctl(master, TIOCSWINSZ, struct.pack("HHHH", 40, 70, 0, 0))
        process.send_signal(signal.SIGWINCH)
        # However much was drawn before it heard of the width, at some time there is a bar that is no wider, in bytes.
        read_until(master, rb"[\r\n](\x1b\[[A-Z])*run: [^\r\n\x1b]{30,100}(\x1b\[[A-Z])*[\r\n]")
        os.close(master)
    (closed, _), (going_on, _) = runs
    assert closed.wait(LIMIT_S) == 128 + signal.SIGHUP
    step = state(tmp_path / "closed")["step"]
    assert 0 < step < 10_000 and len(losses(tmp_path / "closed")) == step
    assert going_on.wait(LIMIT_S) == 0 and state(tmp_path / "nohup")["step"] == 24


def read_until(terminal: int, pattern: bytes) -> bytes:
    text, ends = b"", time.monotonic() + LIMIT_S
    while not re.search(pattern, text, re.DOTALL):
        assert time.monotonic() < ends, text
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096)
    return text


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "--epochs", 1) == 0
    said = capfd.readouterr()
    assert "step 1/2 (50 %) | loss" in said.out and not re.search(r"[\x1b\r]", said.out + said.err)


def test_wandb_gets_the_metrics_and_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    inits: list[dict[str, Any]] = []

    class Run:
        id = "abc"

        def log(self, values: dict[str, float], step: int) -> None:
            if step > 2:
                raise RuntimeError("the service is gone")
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    module = types.SimpleNamespace(init=lambda **words: inits.append(words) or Run())
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert train(tmp_path, "--wandb", "--epochs", 1) == 0
    assert [step for step, _ in logged] == [1, 2, -1] and logged[0][1]["loss"] == losses(tmp_path)[0]
    assert train(tmp_path, "--wandb", "--epochs", 2) == 0 and len(losses(tmp_path)) == 4
    assert capsys.readouterr().err.count("--wandb: the service is gone; it gets no more metrics") == 1
    assert train(tmp_path, "--wandb", "--epochs", 1, "--no-resume") == 0
    assert [words["id"] for words in inits] == [None, "abc", None]


def test_wandb_that_is_not_installed_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("sparkme.training.pretraining.build_network", lambda *_: pytest.fail("the network is built"))
    assert "--wandb needs the package wandb: pip install wandb" in fails(capsys, *TINY, "--output", tmp_path / "r", "--wandb")
    assert not (tmp_path / "r").exists()


def test_a_run_that_is_killed_twice_comes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once after a step, once while a checkpoint is written."""
    from benchmarks import survive

    monkeypatch.setattr(survive, "FLAGS", [*survive.FLAGS, "--model", "timm:test_resnet"])
    words = ["--kills", "2", "--steps", "50", "--no-saving", "--output", tmp_path, "--json", tmp_path / "found.json"]
    assert survive.main([*map(str, words)]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    # On a busy machine one may come before a start's first step.
    assert found["kills"]["all"] == 2 and found["kills"]["after_first_step"] >= 1 and found["unreadable"] == []
    assert found["losses_equal"] and found["checkpoint_equal"]


def test_a_checkpoint_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", keep=1)
    (tmp_path / "file").write_text("in the way")
    checkpoints.start_saving({"model": {}, "config": {}}, 3)
    with pytest.raises(CannotWrite, match=r"cannot write the checkpoint .*step_00000003.pt"):
        checkpoints.wait()
    assert not checkpoints.pending
