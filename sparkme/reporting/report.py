"""The work of `sparkme.report`: which runs, and where to their page goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sparkme.errors import UserError
from sparkme.files import replaced_when_whole
from sparkme.reporting.page import MARK, Pictures, report_page
from sparkme.reporting.runs import is_run, open_regular, read_run
from sparkme.settings.commands import ReportSettings
from sparkme.text import printable

MOST_RUNS = 64


def report(args: ReportSettings) -> int:
    """Writes the page, once or again and again. Returns the exit code."""
    if args.watch is not None and not 1 <= args.watch <= 86400:
        raise UserError(f"--watch {args.watch:g} must be from 1 to 86400 seconds")
    folders = find_runs(args.runs)
    output = chosen_output(args.output, folders)
    pictures = Pictures()
    try:
        size = write(output, folders, args.title, pictures, reload_s=args.watch)
        print(f"wrote {output} ({size / 1e6:.2f} MB)", flush=True)
        if args.watch is None:
            return 0
        print(f"writing it anew every {args.watch:g} s; Ctrl-C ends this", flush=True)
        while True:
            time.sleep(args.watch)
            with suppress(UserError):  # of runs that were moved away; the page then says so
                folders = find_runs(args.runs)
            write(output, folders, args.title, pictures, reload_s=args.watch)
    except KeyboardInterrupt:
        if args.watch is None:
            raise
        size = write(output, folders, args.title, pictures)  # without the reload, of which nothing would come
        print(f"stopped; {output} ({size / 1e6:.2f} MB) is of {time.strftime('%H:%M:%S')}", flush=True)
        return 0


def write(output: Path, folders: list[Path], title: str | None, pictures: Pictures, *, reload_s: float | None = None) -> int:
    """Reads the runs and writes the page. Returns its size in bytes.

    Raises:
        UserError: something else is in the way, or it cannot be written.
    """
    check_replaceable(output)
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    page = report_page(runs, title, pictures, now=time.time(), reload_s=reload_s)
    data = page.encode(errors="replace")
    with replaced_when_whole(output) as temporary:
        temporary.write_bytes(data)
    return len(data)


# Which runs, and where to.


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The folders of runs that the command line names, each once.

    Raises:
        UserError: a path is no run and holds none, or there are too many.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"{printable(path)} is no folder" if os.path.lexists(path) else f"no folder {printable(path)}")
        inside = [path] if is_run(path) else _runs_below(path)
        if not inside:
            raise UserError(f"{printable(path)} is no run and holds none; a run's folder has a config.json or metrics.jsonl")
        for run in inside:
            found.setdefault(os.path.realpath(run), run)
    if len(found) > MOST_RUNS:
        raise UserError(f"{len(found)} runs are more than {MOST_RUNS}, which one page can show; name fewer")
    return list(found.values())


def _runs_below(folder: Path) -> list[Path]:
    """The runs in a folder or, if there are none, in the folders in it."""
    folders = _folders_in(folder)
    runs = [path for path in folders if is_run(path)]
    return runs or [path for parent in folders for path in _folders_in(parent) if is_run(path)]


def _folders_in(folder: Path) -> list[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries if entry.is_dir())
    return []


def _shared_folder(folders: list[Path]) -> str:
    return os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])


def names_of(folders: list[Path]) -> list[str]:
    """What the page calls the runs: their paths below the folder they share."""
    shared = _shared_folder(folders)
    return [printable(Path(os.path.relpath(os.path.abspath(folder), shared))) for folder in folders]


def chosen_output(asked: Path | None, folders: list[Path]) -> Path:
    """Where the page goes.

    Raises:
        UserError: that is no place for it.
    """
    default = folders[0] if len(folders) == 1 else Path(os.path.relpath(_shared_folder(folders)))
    output = asked or default / "report.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {printable(output)}: the suffix must be .html")
    check_replaceable(output)
    return output


def check_replaceable(output: Path) -> None:
    """Raises UserError where something else than a report is in the way."""
    if not os.path.lexists(output):
        return
    if os.path.isdir(output):
        raise UserError(f"{printable(output)} is a folder; choose another --output")
    try:
        with open_regular(output) as file:
            is_report = MARK.encode() in file.read(1024)
    except OSError:
        is_report = False
    if not is_report:
        raise UserError(f"{printable(output)} is not a report of this command and is left as it is; choose another --output")
