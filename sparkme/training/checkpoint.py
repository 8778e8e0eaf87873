"""Checkpoints: written to a temporary file and renamed, so that a crash or a full disk never costs the last good one.

A checkpoint has torch's format, a zip archive with a CRC-32 of every part, which `sparkme.weights.checkpoint` verifies.
"""

from __future__ import annotations

import copy
import os
import shutil
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkme.errors import CannotWrite, first_line
from sparkme.weights.checkpoint import FORMAT


class SpoiledWeights(ValueError):
    """The weights are not finite; they are never written."""


class Checkpoints:
    """The checkpoints of a run: the newest `step_<n>.pt`, and `last.pt`, a link to the newest.

    Args:
        folder: their folder.
        keep: number of newest checkpoints to keep.
        keep_every: also keep those whose step is a multiple of this; 0: none.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self._writer = futures.ThreadPoolExecutor(1, "checkpoint")
        self._written: futures.Future[Path] | None = None  # the latest save, until `wait` returns it
        self._copy: Any = None  # of the state, in host memory

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    def newest(self) -> Path | None:
        """The target of `last.pt` or, if copying lost the link, the checkpoint with the highest step."""
        return next(iter(self.candidates()), None)

    def candidates(self) -> list[Path]:
        """The checkpoints in the order in which a resuming run tries them."""
        steps = self._steps()[::-1]
        if not self.last.exists():
            return steps
        target = self.last.resolve()
        return [self.last, *(path for path in steps if path.resolve() != target)]

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"))

    def set_aside(self, damaged: Path) -> Path:
        """Renames a damaged checkpoint, so that it is neither read nor counted again."""
        path = damaged.resolve()
        aside = path.with_name(path.name + ".damaged")
        os.replace(path, aside)
        if damaged == self.last:
            self.last.unlink(missing_ok=True)
        return aside

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Writes a checkpoint to the disk, points `last.pt` at it and removes the oldest.

        Raises:
            CannotWrite: earlier checkpoints are untouched.
            SpoiledWeights: a weight is not finite; nothing is written.
        """
        with suppress(CannotWrite):  # this checkpoint replaces the failed one
            self.wait()
        return self._write(state, step)

    def make_room(self, state: dict[str, Any]) -> None:
        """Allocates the memory to which `start_saving` copies a state, which is slow the first time."""
        self._copy = _copied(state, None)

    def start_saving(self, state: dict[str, Any], step: int) -> None:
        """As `save`, but returns once the state is copied; another thread writes it. Raises errors of the previous save, which
        it waits for."""
        self.wait()  # the previous save reads the memory that this one is copied to
        self._copy = _copied(state, self._copy)
        event = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if event is not None:
            event.record()
        self._written = self._writer.submit(self._write, self._copy, step, event)

    @property
    def pending(self) -> bool:
        """Whether there is a started save that nobody has waited for."""
        return self._written is not None

    @property
    def busy(self) -> bool:
        """Whether a started save is still being written."""
        return self._written is not None and not self._written.done()

    def wait(self) -> Path | None:
        """Waits for a started save. Returns its path, or raises its CannotWrite or SpoiledWeights."""
        if self._written is None:
            return None
        futures.wait([self._written])  # Ctrl-C may interrupt this wait
        written, self._written = self._written, None
        return written.result()

    def _write(self, state: dict[str, Any], step: int, copied: torch.cuda.Event | None = None) -> Path:
        if copied is not None:
            copied.synchronize()
        _check_finite(state, step)
        path = self.folder / f"step_{step:08d}.pt"
        try:
            self._put({"format": FORMAT, "step": step, **state}, path)
        except (OSError, RuntimeError) as error:
            resume = f"{self.last} is intact" if self.last.exists() else "there is no earlier one"
            free, needed = free_gib(path), _gib(state)
            cause: BaseException = error
            while cause.__context__ is not None:  # torch fails again while closing the file
                cause = cause.__context__
            reason = f"it takes {needed:.2f} GiB, but {free:.2f} are free" if free < needed else first_line(cause)
            raise CannotWrite(f"cannot write the checkpoint {path} ({reason}); {resume}") from error
        earlier = [old for old in self._steps() if old.name < path.name and not self._is_kept(old)]
        recent = self.keep - (not self._is_kept(path))
        for old in earlier[: max(0, len(earlier) - recent)]:
            old.unlink(missing_ok=True)
        return path

    def _put(self, content: dict[str, Any], path: Path) -> None:
        temporary = path.with_suffix(".pt.writing")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:  # Python's errors name the system's reason, torch's do not
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self._point_at(path)
            _names_to_disk(self.folder)
        finally:
            for torn in (temporary, self.last.with_suffix(".pt.writing")):
                with suppress(OSError):
                    torn.unlink()

    def _is_kept(self, path: Path) -> bool:
        number = path.stem.removeprefix("step_")
        return self.keep_every > 0 and number.isdecimal() and int(number) % self.keep_every == 0

    def _point_at(self, path: Path) -> None:
        link = self.folder / "last.pt.writing"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, link)
        os.replace(link, self.last)

    def clean(self) -> None:
        """Removes half-written files of a killed process. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for torn in self.folder.glob("*.writing"):
            torn.unlink()


def _copied(value: Any, into: Any) -> Any:
    """A copy of nested dicts, lists and tensors in host memory, which reuses the memory of an earlier copy `into` if it fits.

    Copies from a GPU are only started.
    """
    if isinstance(value, Tensor):
        value = value.detach()
        # With equal strides: else sums over optimiser state would be rounded differently after a resume.
        fits = isinstance(into, Tensor) and (into.shape, into.dtype, into.stride()) == (
            value.shape,
            value.dtype,
            value.stride(),
        )
        host = into if fits else torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return host.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # a state dict has attributes
        copied.update({k: _copied(v, into.get(k) if isinstance(into, dict) else None) for k, v in value.items()})
        return copied
    if isinstance(value, list | tuple):
        earlier = into if isinstance(into, list | tuple) and len(into) == len(value) else [None] * len(value)
        return type(value)(_copied(v, e) for v, e in zip(value, earlier, strict=True))
    return copy.deepcopy(value)


def _check_finite(state: dict[str, Any], step: int) -> None:
    """Raises SpoiledWeights. A finite loss does not show that the following update was finite."""
    for name, value in state.get("model", {}).items():  # extra state may be of any type
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise SpoiledWeights(f"the weights are not finite after step {step} ({name})")


def _gib(value: Any) -> float:
    """Memory of the tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.nbytes / 2**30
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_gib, parts))


def _names_to_disk(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def free_gib(path: Path) -> float:
    """Free space on the disk of a path, which need not exist."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free / 2**30
