"""State dicts on disk: `.safetensors`, and torch's own `.pth` / `.pt`."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparkme.errors import CannotWrite, UserError, first_line, unreadable_reason

TORCH_SUFFIXES = (".pth", ".pt")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads a state dict, also one kept under `model`, `state_dict` or `module`, without running code from the file.

    Raises:
        UserError: no such file, or no state dict in it.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    if problem := archive_damage(path):
        raise UserError(f"{path} is damaged: {problem}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused here
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a torn file can fail anywhere in the unpickler
        raise UserError(f"{path} cannot be read as weights: {unreadable_reason(error)}") from error
    if isinstance(state, dict) and "format" in state and "config" in state:
        raise UserError(
            f"{path} is a checkpoint of sparkme.pretrain; turn it into weights first: python -m sparkme.export {path}"
        )
    for key in ("model", "state_dict", "module"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):  # fmt: skip
        raise UserError(f"{path} holds no state dict, which has a tensor for each name")
    for prefix in ("module.", "_orig_mod."):  # of DataParallel and torch.compile
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def archive_damage(path: Path) -> str | None:
    """What is wrong with a file of torch's, where that can be told: it is a zip archive, which keeps a CRC-32 of every tensor.

    torch writes those sums and does not look at them. Its older format, and safetensors, have none.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return None
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # of a damaged head zipfile has many
        return f"the archive cannot be read ({first_line(error)})"
    return None if part is None else f"the checksum of {part} differs"


def read_any_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Reads a state dict or, from a checkpoint of sparkme.pretrain, the network's, with the configuration of its run.

    A folder is taken for one that timm writes (`model.safetensors` in it).

    Raises:
        UserError: no such file, or nothing of that kind in it.
    """
    from sparkme.training.checkpoint import load_checkpoint

    path = path / "model.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors" and path.is_file():
        try:
            checkpoint = load_checkpoint(path)
        except UserError:
            pass  # then it holds a state dict, or says why it does not
        else:
            return checkpoint["model"], checkpoint["config"]
    return read_state_dict(path), None


def check_suffix(path: Path) -> None:
    """Raises UserError for a suffix that stands for no format."""
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise UserError(f"--output {path}: the suffix must be .safetensors or .pth")


def write_state_dict(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a state dict beside and renames it, in the format of the file's suffix.

    A `.safetensors` file keeps the metadata in its header; a `.pth` file is the bare state dict, which is what
    `load_state_dict` takes, and the caller keeps the metadata elsewhere.

    Raises:
        UserError: the suffix is unknown, or the file cannot be written.
    """
    check_suffix(path)
    state = {name: value.contiguous().clone() for name, value in state.items()}
    with replaced_when_whole(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary, metadata)
        else:
            torch.save(state, temporary)


@contextmanager
def replaced_when_whole(path: Path) -> Iterator[Path]:
    """A file to write beside another, which it replaces once it is written.

    Raises:
        CannotWrite: what was there is as before.
    """
    temporary = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise CannotWrite(f"cannot write {path}: {first_line(error)}") from error
