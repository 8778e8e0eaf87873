"""Checkpoints: written beside and renamed, so that a crash or a full disk never costs the last good one."""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sparkme.errors import UserError, first_line, unreadable_reason

FORMAT = 1


class Checkpoints:
    """The checkpoints of a run: `step_<n>.pt`, the newest few, and `last.pt`, a link to the newest.

    Args:
        folder: where they are.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    def newest(self) -> Path | None:
        """What `last.pt` points at or, where it is lost, as copying can lose links, the checkpoint of the highest step."""
        if self.last.exists():
            return self.last
        steps = self._steps()
        return steps[-1] if steps else None

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"))

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Writes a checkpoint, points `last.pt` at it and removes the oldest.

        Raises:
            UserError: it could not be written; earlier checkpoints are untouched.
        """
        path = self.folder / f"step_{step:08d}.pt"
        temporary = path.with_suffix(".pt.writing")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save({"format": FORMAT, "step": step, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self._point_at(path)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                temporary.unlink()
            resume = f"{self.last} is intact" if self.last.exists() else "there is no earlier one"
            raise UserError(
                f"cannot write the checkpoint {path} ({first_line(error)}; {free_gib(path):.1f} GiB free); make room or change "
                f"--output, then start again; {resume}"
            ) from error
        earlier = [old for old in self._steps() if old.name < path.name]
        for old in earlier[: max(0, len(earlier) - (self.keep - 1))]:
            old.unlink(missing_ok=True)
        return path

    def _point_at(self, path: Path) -> None:
        link = self.folder / "last.pt.writing"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, link)
        os.replace(link, self.last)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that `Checkpoints.save` wrote, on the CPU, with `weights_only=True`.

    Raises:
        UserError: no such file, or not a checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused here
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file can fail anywhere in the unpickler
        others = sorted(p.name for p in path.parent.glob("step_*.pt") if p.resolve() != path.resolve())
        hint = f"; earlier ones beside it: {', '.join(others)}" if others else ""
        raise UserError(f"{path} cannot be read as a checkpoint ({unreadable_reason(error)}){hint}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "config" not in state:
        raise UserError(f"{path} is not a checkpoint of sparkme.pretrain (format {FORMAT})")
    if not isinstance(state["config"], dict) or not isinstance(state.get("step"), int) or state["step"] < 0:
        raise UserError(f"{path} is a damaged checkpoint: its step or its configuration is of another kind")
    return state


def free_gib(path: Path) -> float:
    """Free space on the disk that a path is or would be on."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free / 2**30
