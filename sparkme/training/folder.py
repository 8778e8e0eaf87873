"""The folder of a run, and the checkpoint to resume from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sparkme.errors import CannotWrite, UserError, first_line
from sparkme.files import replaced_when_whole
from sparkme.settings.declare import as_text, differences, flag_of, from_config, settings_of, to_config
from sparkme.settings.shared import TrainingSettings
from sparkme.training.checkpoint import Checkpoints
from sparkme.training.distributed import Process
from sparkme.training.log import check_tracker
from sparkme.weights.checkpoint import DamagedCheckpoint, load_checkpoint

S = TypeVar("S", bound=TrainingSettings)


class RunFolder:
    """The folder of a run, and the checkpoint to resume from.

    Args:
        path: the folder.
        asked: the user's settings. A run of another command is refused.
        process: this process; all processes use the checkpoint that the first one finds.

    Raises:
        UserError: no checkpoint can be read, or they are another command's; the folder is not writable; --wandb is missing.
    """

    def __init__(self, path: Path, asked: TrainingSettings, process: Process) -> None:
        self.path, self.resume, self.process = path, asked.resume, process
        self.damaged: list[Path] = []
        check_writable(path)
        if asked.wandb:
            check_tracker()
        self.checkpoints = Checkpoints(path / "checkpoints", asked.keep_checkpoints)
        self.newest, self.saved = self.read_newest() if asked.resume else (None, None)
        if self.saved is not None and (other := self.saved["config"].get("command", "pretrain")) != asked.command:
            raise UserError(f"{self.newest} is a checkpoint of sparkme.{other}; use another --output")

    def read_newest(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The newest intact checkpoint, the same in every process. Damaged ones are reported and renamed.

        Raises:
            UserError: none is intact.
        """
        path: Path | None = None
        saved: dict[str, Any] | None = None
        problem: str | None = None
        if self.process.is_main:
            try:
                path, saved = self._first_whole()
            except UserError as error:
                problem = str(error)
        path, problem = self.process.share((path, problem))
        if path is not None and saved is None:
            try:
                saved = load_checkpoint(path, verify=False)
            except UserError as error:
                problem = str(error)
        if any(self.process.agree(problem is not None)):  # nobody replaces it before all have read it
            raise UserError(problem or f"{path} cannot be read by another process, see its output")
        return path, saved

    def _first_whole(self) -> tuple[Path | None, dict[str, Any] | None]:
        problems = []
        for path in self.checkpoints.candidates():
            try:
                saved = load_checkpoint(path.resolve())
            except DamagedCheckpoint as error:
                problems.append((path, str(error).partition("; earlier ones")[0]))
                continue
            for damaged, problem in problems:
                aside = self.checkpoints.set_aside(damaged)
                self.damaged.append(aside)
                print(f"{problem}; it is now {aside.name}, and the run continues from {path.resolve().name}", file=sys.stderr)
            return path, saved
        if problems:
            raise UserError(f"{problems[0][1]}; no other checkpoint can be read; use another --output, or --no-resume")
        return None, None

    @property
    def saved_config(self) -> dict[str, Any] | None:
        return self.saved["config"] if self.saved else None

    def saved_as(self, cls: type[S]) -> S | None:
        """The settings of the run to continue. Raises UserError for a value of the wrong type."""
        try:
            return None if self.saved_config is None else from_config(cls, self.saved_config)
        except TypeError as error:
            raise UserError(f"{self.newest}: {error}; use another --output, or --no-resume to start again") from error

    def restore(self, load: Callable[[dict[str, Any]], None]) -> int:
        """Calls `load` with the checkpoint, if any. Returns the number of finished steps."""
        if self.saved is None:
            return 0
        try:
            load(self.saved)
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.newest}: {first_line(error)}; use another --output, or --no-resume to start again"
            ) from error
        step: int = self.saved["step"]
        return step

    def prepare(self, settings: TrainingSettings, *, pictures: tuple[str, ...]) -> None:
        """Makes the folder and config.json; without --resume, first deletes the files of an earlier run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                written = (
                    "checkpoints/*.pt",
                    "checkpoints/*.damaged",
                    "metrics.jsonl",
                    "notes.jsonl",
                    "tensorboard/events.*",
                    "wandb-run-id",
                    *pictures,
                )
                for old in (path for pattern in written for path in self.path.glob(pattern)):
                    old.unlink()
            self.checkpoints.clean()
            with replaced_when_whole(self.path / "config.json") as temporary:
                temporary.write_text(json.dumps(to_config(settings), indent=2) + "\n")
        except (OSError, CannotWrite) as error:
            raise UserError(f"cannot write to --output {self.path}: {error}") from error

    def print_changes(self, settings: TrainingSettings) -> None:
        """Prints the settings that differ from the checkpoint's."""
        for name, now, before in differences(settings, self.saved_config) if self.saved_config else ():
            print(f"{'changed':9s} {name.replace('_', ' ')} from {as_text(before)} to {as_text(now)}")
        if self.newest and self.newest != self.checkpoints.last and not self.damaged:
            print(f"{'note':9s} {self.checkpoints.last} was missing; continuing from {self.newest.name} beside it")


def check_writable(folder: Path) -> None:
    """Raises UserError if a folder, which need not exist, is not writable; changes nothing."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write to --output {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to --output {folder}: {existing} is read-only, or another user's")


def check_same_run(saved: dict[str, Any], settings: TrainingSettings, path: Path | None) -> None:
    """Raises UserError for the first setting that must stay in a resumed run but differs from the checkpoint at `path`."""
    known = settings_of(type(settings))
    for name, now, before in differences(settings, saved):
        if name in known and (about := known[name]).fixed:
            said = f"{before} {about.help}" if about.is_found else f"{flag_of(name)} {as_text(before)}"
            said = f"{before} as initial weights" if about.positional else said
            raise UserError(
                f"{path} was trained with {said}, now it is {as_text(now)}; use the same, another --output, or --no-resume to "
                "start again"
            )
