"""The work of `sparkme.report`: finds the runs, and writes their page."""

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
    """Writes the page, once or repeatedly. Returns the exit code."""
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
        print(f"rewriting it every {args.watch:g} s; Ctrl-C ends this", flush=True)
        while True:
            time.sleep(args.watch)
            with suppress(UserError):  # runs were moved away; the page says so
                folders = find_runs(args.runs)
            write(output, folders, args.title, pictures, reload_s=args.watch)
    except KeyboardInterrupt:
        if args.watch is None:
            raise
        size = write(output, folders, args.title, pictures)  # without the reload, since it will not change
        print(f"stopped; {output} ({size / 1e6:.2f} MB) was last written at {time.strftime('%H:%M:%S')}", flush=True)
        return 0


def write(output: Path, folders: list[Path], title: str | None, pictures: Pictures, *, reload_s: float | None = None) -> int:
    """Reads the runs and writes the page. Returns its size in bytes.

    Raises:
        UserError: the page cannot be written, or would replace another file.
    """
    check_replaceable(output)
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    page = report_page(runs, title, pictures, now=time.time(), reload_s=reload_s)
    data = page.encode(errors="replace")
    with replaced_when_whole(output) as temporary:
        temporary.write_bytes(data)
    return len(data)


# Runs and output.


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The folders of the runs in `paths`, without repetition.

    Raises:
        UserError: a path is not a run and contains none, or there are too many runs.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"{printable(path)} {'is not a folder' if os.path.lexists(path) else 'does not exist'}")
        inside = [path] if is_run(path) else _runs_below(path)
        if not inside:
            raise UserError(f"no run in {printable(path)}; the folder of a run has a config.json or metrics.jsonl")
        for run in inside:
            found.setdefault(os.path.realpath(run), run)
    if len(found) > MOST_RUNS:
        raise UserError(f"a page can show at most {MOST_RUNS} runs, not {len(found)}; name fewer")
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
    """Names of the runs on the page: their paths below the folder that they share."""
    shared = _shared_folder(folders)
    return [printable(Path(os.path.relpath(os.path.abspath(folder), shared))) for folder in folders]


def chosen_output(asked: Path | None, folders: list[Path]) -> Path:
    """The file of the page, by default report.html in the folder of the run or runs. Raises UserError if it cannot be that."""
    default = folders[0] if len(folders) == 1 else Path(os.path.relpath(_shared_folder(folders)))
    output = asked or default / "report.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {printable(output)}: the suffix must be .html")
    check_replaceable(output)
    return output


def check_replaceable(output: Path) -> None:
    """Raises UserError if `output` exists and is not a report."""
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
        raise UserError(f"{printable(output)} exists and is not a report of this command; choose another --output")
