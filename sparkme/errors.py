"""A user's mistake ends a command with one line and exit code 2, never with a traceback."""

from __future__ import annotations

import argparse
import difflib
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from sparkme.machine import end_loaders, hear_sigterm, problem_of, share_cores
from sparkme.watchdog import IDLE_S, Watchdog

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Reports a mistake on the command line in one line, and leaves the list of flags out of the usage."""

    def format_help(self) -> str:
        named = [action for action in self._actions if not action.option_strings]
        words = [f"[{a.metavar or a.dest}]" if a.nargs in ("?", "*") else str(a.metavar or a.dest) for a in named]
        self.usage = " ".join(["%(prog)s", *words, "[--flag VALUE ...]"])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        flag = re.search(r"^unrecognized arguments:.*?(--[\w-]+)", message)
        near = difflib.get_close_matches(flag[1], self._option_string_actions, 1) if flag else []
        meant = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {' '.join(message.split())[:500]}{meant} (--help lists all flags)\n")


class UserError(ValueError):
    """A mistake that the user can correct; the message says what was given and what to change."""


class CannotWrite(UserError):
    """An output file cannot be written, mostly because the disk is full; an earlier file is unchanged."""


class UnsupportedLayerError(ValueError):
    """A layer of a dense network, or a function it calls, has no sparse form.

    Attributes:
        layer: its path if known, else empty.
        mixes_pixels: whether it mixes or moves pixels, as attention does, so that no sparse form is possible.
    """

    def __init__(self, message: str, layer: str = "", *, mixes_pixels: bool = False) -> None:
        super().__init__(message)
        self.layer, self.mixes_pixels = layer, mixes_pixels


class MixedPixelsError(NotImplementedError):
    """A function would mix visible and hidden pixels, or move them, as attention does."""


def first_line(error: BaseException) -> str:
    """The message of an exception in one line."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):  # only a headline
        lines = [f"{lines[0]} {lines[1]}"]
    remedy = "; raise --max-pixels" if type(error).__name__ == "DecompressionBombError" else ""  # Pillow's
    return lines[0][:300] + remedy if lines else type(error).__name__


def unreadable_reason(error: Exception) -> str:
    """Why torch could not load a file, in one line. Torch itself advises to let the file run code."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a TorchScript archive, which contains a program"
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in text.lower():
        if named := re.search(r"GLOBAL (\S+)", text):
            return f"it contains more than tensors and plain values ({named[1]}), which could run code when it is read"
        if "Unsupported operand" in text:
            return "it is not in one of torch's formats"
        return "it contains more than tensors and plain values, which could run code when it is read"
    if isinstance(error, EOFError | LookupError):
        return "it is empty, truncated, or not in one of torch's formats"
    return first_line(error)


def python_command() -> str:
    """The path of the running interpreter as a user would type it, for printed commands."""
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else relative


def _out_of_memory(error: Exception) -> str:
    """The message and remedy if memory ran out, else ""."""
    text = str(error).lower()
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not (named or "not enough memory" in text or "can't allocate memory" in text):
        return ""
    return f"out of memory ({first_line(error)}); take a smaller batch, smaller images, or a smaller network or decoder"


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a ValueError during a command's setup into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def run_command(command: Callable[[], int], *, watch: bool = False) -> int:
    """Runs a command's body and returns its exit code; a `UserError` becomes one line and the code 2.

    With `watch`, the process ends if it does nothing for `IDLE_S`. Training has its own watchdog.
    """
    hear_sigterm()
    share_cores()
    try:
        with Watchdog(IDLE_S if watch else 0).watch():
            return _run_command(command)
    finally:
        end_loaders()


def _run_command(command: Callable[[], int]) -> int:
    try:
        with _explained():
            return command()
    except KeyboardInterrupt:
        print("stopped at once; unsaved work is lost", file=sys.stderr, flush=True)
        return 130
    except UserError as error:
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr, flush=True)
        return 2


def call_command(command: Callable[[], T]) -> T:
    """Runs a command's body for a caller in Python, such as a notebook.

    Raises:
        UserError: a mistake that the user can correct, or a lack of memory, disk or packages.
    """
    share_cores()
    try:
        with _explained():
            return command()
    finally:
        end_loaders()


@contextmanager
def _explained() -> Iterator[None]:
    """Turns known problems of the machine into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("sparkme", "torch.")):
            raise
        raise UserError(f"the package {error.name} is not installed; `python -m sparkme.doctor` says how to get it") from error
    except (MemoryError, RuntimeError, OSError) as error:
        if not (message := problem_of(error) or _out_of_memory(error)):
            raise
        raise UserError(message) from error
