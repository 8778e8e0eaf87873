"""How batches come from the processes that load them, and what happens where the machine lacks something for that."""

import _multiprocessing
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler
from multiprocessing.resource_sharer import DupFd
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SMALL, losses
from torch.utils.data import Dataset

from sparkme import doctor, machine
from sparkme.data import handover
from sparkme.data.dataset import CropDataset
from sparkme.data.handover import Loader, hand_over
from sparkme.errors import run_command
from sparkme.machine import LOADER, problem_of
from sparkme.pretrain import main
from sparkme.training import tasks
from sparkme.watchdog import BUSY_S, Watchdog

TINY = [*SMALL, "--model", "timm:test_resnet", "--drop-path", "0", "--panel-epochs", "0"]
LIMIT_S = 60  # within which a run that cannot go on has to end


def train(folder: Path, *words: object) -> int:
    return main([*TINY, "--output", str(folder), *map(str, words)])


class Numbers(Dataset[torch.Tensor]):
    """Pictures of one value, 12 kB each."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.full((3, 64, 64), number, dtype=torch.uint8)


def load(workers: int) -> list[torch.Tensor]:
    return list(Loader(Numbers(), workers=workers, batch_size=8, collate_fn=torch.stack))


def same(batches: list[torch.Tensor]) -> bool:
    return len(batches) == 5 and all(map(torch.equal, batches, load(0)))


def loaders() -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.name == LOADER]


def forget_what_was_said() -> None:
    handover._say_once.cache_clear()


# How a batch is handed over


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(200_000).to(torch.uint8).view(2, 100, 1000),
        torch.randn(50, 40, 30),
        torch.randn(30, 40, 50).permute(2, 0, 1),
        torch.randn(3),
        torch.tensor(7),
        torch.empty(0, 3, 64, 64),
    ],
    ids=["bytes", "floats", "permuted", "small", "scalar", "empty"],
)
def test_a_tensor_arrives_as_it_was(tensor: torch.Tensor) -> None:
    build, parts = hand_over(tensor)
    arrived = build(*parts)
    assert torch.equal(arrived, tensor) and arrived.dtype == tensor.dtype
    arrived.add_(1)  # it is the reader's own


def test_a_large_tensor_is_a_file_in_memory_and_leaves_none_open() -> None:
    large = torch.zeros(2**20)
    build, parts = hand_over(large)
    assert isinstance(parts[0], DupFd)
    before = len(os.listdir("/proc/self/fd"))
    build(*parts)
    assert len(os.listdir("/proc/self/fd")) < before  # the one that was given away is closed as well


@pytest.mark.parametrize("lacking", ["files", "room", "sockets", "memfd_create"])
def test_what_no_file_can_be_had_for_goes_through_the_pipe(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if lacking == "files":
        monkeypatch.setattr(handover.resource, "getrlimit", lambda _: (20, 20))
    elif lacking == "memfd_create":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(*((os, "memfd_create") if lacking == "room" else (handover, "DupFd")), refuse)
    large = torch.randn(100, 1000)
    build, parts = hand_over(large)
    assert build is torch.from_numpy and torch.equal(build(*parts), large)


def test_batches_do_not_take_torchs_way_through_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, refuse)  # type: ignore[attr-defined]
    assert same(load(2))


# Where processes cannot start, or die


def test_without_locks_this_process_loads_the_images_and_says_it_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    forget_what_was_said()
    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    monkeypatch.setattr(machine, "SHARED_MEMORY", "/nowhere")
    assert same(load(2)) and same(load(2))
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(r"No space left.*shared memory \(/nowhere: No such file.*--shm-size=1g.*--workers 0", line), line


def test_of_processes_that_cannot_all_start_none_is_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    right, count = os.fork, iter(range(9))

    def fork() -> int:
        if next(count) == 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return right()

    forget_what_was_said()
    monkeypatch.setattr(os, "fork", fork)
    assert same(load(2)) and not multiprocessing.active_children()
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(r"note: this process loads .*Resource temporarily.*raise ulimit -u .* or lower --workers", line), line


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_process_that_cannot_hand_over_ends_the_run(
    command: str, tmp_path: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of finetune it is the one that loads whole images, before the first step."""
    from sparkme.finetune import main as finetune

    def refuse(_: torch.Tensor) -> None:
        raise MemoryError("no memory for this")

    monkeypatch.setattr(handover, "hand_over", refuse)
    began = time.monotonic()
    if command == "pretrain":
        code = train(tmp_path, "--workers", 1)
    else:
        code = finetune(
            [
                "--from-scratch",
                "--model",
                "timm:test_resnet",
                "--data",
                str(labelled),
                "--head-init",
                "linear",
                "--workers",
                "1",
                "--device",
                "cpu",
                "--input-size",
                "64",
                "--batch-size",
                "4",
                "--output",
                str(tmp_path),
            ]
        )
    said = capfd.readouterr().err
    assert code == 2 and time.monotonic() - began < LIMIT_S and not loaders()
    assert "error: a loader process cannot pass on a batch: no memory for this; lower --workers" in said
    assert re.search(r"error: loading images failed: DataLoader worker \(pid.*lower --workers", said), said
    assert "Traceback" not in said


def test_errors_that_the_machine_explains_name_the_remedy() -> None:
    nccl = "NCCL error\nLast error:\nError while creating shared memory segment /dev/shm/nccl-a (size 9637888)"
    assert re.search(r"GPUs .* \(/dev/shm: \d+ MB, .*--shm-size=1g", problem_of(RuntimeError(nccl)))
    assert "ulimit -n" in problem_of(OSError(24, "Too many open files"))
    killed = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"
    assert "killed by signal: Bus error (mostly" in problem_of(RuntimeError(killed))
    assert not problem_of(RuntimeError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback"))


def may_mount() -> bool:
    tried = shutil.which("unshare") and subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True, check=False
    )
    return bool(tried) and tried.returncode == 0


@pytest.mark.skipif(not may_mount(), reason="this user may not mount a small /dev/shm")
def test_pretraining_goes_on_with_one_mb_of_shared_memory(tmp_path: Path) -> None:
    """A batch has 1.5 MB."""
    words = [*TINY, "--batch-size", "32", "--samples-per-epoch", "64", "--epochs", "2", "--input-size", "128", "--workers", "2"]
    command = [sys.executable, "-m", "sparkme.pretrain", *words, "--output", str(tmp_path)]
    mount = 'mount -t tmpfs -o size=1M tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", *command], capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    assert done.returncode == 0 and "this process loads" not in done.stderr, done.stderr
    assert len(losses(tmp_path)) == 4


# Signals, threads, and what hangs


def blocked(monkeypatch: pytest.MonkeyPatch, first_epoch: int) -> None:
    """From this epoch on images never come; soon after SIGTERM does."""
    right = CropDataset.__getitem__

    def item(self: CropDataset, index: tuple[int, int]) -> Any:
        if index[0] >= first_epoch:
            time.sleep(1000)
        return right(self, index)

    monkeypatch.setattr(CropDataset, "__getitem__", item)
    monkeypatch.setattr("sparkme.training.loop.PATIENCE_S", 0.5)


@pytest.mark.parametrize("done", [0, 2])
def test_sigterm_ends_a_wait_for_images_and_saves(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked(monkeypatch, first_epoch=done // 2)  # of two steps
    began: list[float] = []

    def terminate() -> None:
        while not loaders() or len(losses(tmp_path) if (tmp_path / "metrics.jsonl").exists() else []) < done:
            time.sleep(0.05)
        began.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    assert train(tmp_path, "--workers", 2, "--hang-seconds", 0) == 128 + signal.SIGTERM
    assert time.monotonic() - began[0] < 10 and not loaders()
    expected = "saved .* after step 2" if done else "there is no checkpoint yet"
    assert re.search(f"SIGTERM: {expected}", capsys.readouterr().out)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_outside_of_the_main_thread_goes_without_handlers_and_says_so(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(train(tmp_path, "--workers", workers)))
    thread.start()
    thread.join()
    assert codes == [0] and len(losses(tmp_path)) == 6
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "main thread" in line]
    assert "Ctrl-C and SIGTERM do not save" in note


def test_the_first_process_of_a_container_hears_sigterm() -> None:
    code = "import time; from sparkme.errors import run_command; run_command(lambda: print('on', flush=True) or time.sleep(60))"
    alone = ["unshare", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not start the first process of a namespace")
    outer = subprocess.Popen([*alone, sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert outer.stdout and outer.stdout.readline() == b"on\n"
    first = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
    os.kill(first, signal.SIGTERM)
    assert outer.wait(10) == 128 + signal.SIGTERM


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What watchdogs would end this process for: doing the same for more than three of their seconds, which are short here."""
    found: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, doing, seconds: (found.append(doing), self._ended.set()))
    monkeypatch.setattr(Watchdog, "_second", lambda self: self._ended.wait(0.01))
    for place in ("sparkme.errors", "sparkme.watchdog"):
        monkeypatch.setattr(f"{place}.IDLE_S", 3.0)
    return found


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def do_nothing() -> None:
    """Until no watchdog is left that would end it."""
    for thread in watchdogs():
        thread.join(LIMIT_S)


@pytest.mark.parametrize("name", ["probe", "export", "visualize", "report", "doctor"])
def test_every_command_is_watched(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: list[str]) -> None:
    """One that does nothing for longer than it may is ended."""
    import importlib

    module = importlib.import_module(f"sparkme.{name}")
    monkeypatch.setattr(module, "examine" if name == "doctor" else "run", lambda *_: do_nothing() or 0)  # type: ignore[func-returns-value]
    words = {"probe": ["weights.pt", "--data", str(tmp_path)], "doctor": [], "report": [str(tmp_path)]}
    assert module.main(words.get(name, ["weights.pt"])) == 0
    assert ended == ["starting"]


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_the_start_of_a_training_is_watched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: list[str]
) -> None:
    import importlib

    module = importlib.import_module(f"sparkme.{name}")
    watching: list[int] = []

    def hang(*_: object) -> None:
        watching.append(len(watchdogs()))
        do_nothing()
        raise ValueError("the end")

    monkeypatch.setattr("sparkme.training.pretraining.Pretraining", hang)
    monkeypatch.setitem(tasks.TASKS, "classification", hang)
    words = ["--device", "cpu", *([] if name == "pretrain" else ["--from-scratch", "--data", str(tmp_path)])]
    assert module.main([*words, "--hang-seconds", "0.1"]) == 2 and ended == ["starting"]
    assert module.main([*words, "--hang-seconds", "0"]) == 2 and ended == ["starting"]
    assert watching == [1, 0]


def test_a_start_that_computes_is_no_hang(monkeypatch: pytest.MonkeyPatch, ended: list[str]) -> None:
    """However little of the processor it gets: a second of the watchdog's takes until it has computed for some milliseconds."""
    seconds = 0

    def second(self: Watchdog) -> bool:
        nonlocal seconds
        began = time.process_time()
        while time.process_time() - began < 2 * BUSY_S and not self._ended.wait(0.001):
            pass
        seconds += 1
        return self._ended.is_set()

    def compute() -> int:
        while seconds < 10 and not ended:
            pass
        return 0

    monkeypatch.setattr(Watchdog, "_second", second)
    assert run_command(compute, watch=True) == 0 and not ended


# doctor


def test_doctor_shows_the_size_of_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "shared_memory_bytes", lambda: 64 * 2**20)
    finding = doctor.check_shared_memory()
    assert re.match(r"/dev/shm: \d+ MB, \d+ free; enough for image loading", finding.text) and not finding.mend
    monkeypatch.setattr(doctor, "num_gpus", lambda: 2)
    assert "--shm-size=1g" in doctor.check_shared_memory().mend
    monkeypatch.setattr(machine, "shared_memory_bytes", lambda: 2**30)
    assert doctor.check_shared_memory().text.endswith("enough") and not doctor.check_shared_memory().mend

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    finding = doctor.check_shared_memory()
    assert "Read-only file system), so one process loads all images" in finding.text and "--shm-size=1g" in finding.mend


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_give_their_cores_away_unless_the_user_says_otherwise(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run_command(lambda: 0) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    os.environ.pop("GOMP_SPINCOUNT", None)
