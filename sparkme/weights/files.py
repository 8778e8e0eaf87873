"""State dicts on disk: `.safetensors`, and torch's own `.pth` / `.pt`."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparkme.errors import UserError, first_line, unreadable_reason
from sparkme.files import replaced_when_whole


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a file or of a timm folder, without running code from it.

    Args:
        path: `.safetensors`, or a torch file, which may also hold an optimizer, settings and other plain values.

    Returns:
        The tensors by full name, such as `state_dict.module.conv1.weight`; NumPy arrays become tensors.

    Raises:
        UserError: the file is missing or damaged, holds no tensors, or objects that need code to be built.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no file {path}")
    if problem := archive_damage(path):
        raise UserError(f"{path} is damaged: {problem}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(PLAIN)):
            warnings.simplefilter("ignore")  # about formats that are refused here
            content = load_file(path) if _is_safetensors(path) else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a torn file may raise anything in the unpickler
        raise UserError(f"{path} cannot be read as weights: {unreadable_reason(error)}{_remedy(error)}") from error
    if isinstance(content, dict) and "format" in content and "config" in content:
        raise UserError(f"{path} is a checkpoint of another version of sparkme; use the version that wrote it to export it")
    tensors = tensors_in(content)
    if not tensors:
        raise UserError(f"{path} holds no tensors; save a network's weights by torch.save(network.state_dict(), PATH)")
    return tensors


def tensors_in(content: Any) -> dict[str, Tensor]:
    """All tensors in nested dicts and lists, by their keys joined with dots; shared containers count once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def collect(value: Any, name: str) -> None:
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, Tensor):
            found[name] = value.detach()
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                collect(part, f"{name}.{key}" if name else str(key))

    collect(content, "")
    return found


def _remedy(error: Exception) -> str:
    if "TorchScript" in str(error):
        return "; save its weights: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "; save its weights only, in the code that made it: torch.save(network.state_dict(), NEW_FILE)"
    return ""


def _is_safetensors(path: Path) -> bool:
    """From the suffix or the content: eight bytes, then a JSON header."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


class _Left:
    """An empty stand-in for a value that weights do not need."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _LeftList(list[Any]):
    """As `_Left`, for values that are filled like a list."""

    def __init__(self, *args: Any) -> None: ...


def _empty_dict(*args: Any) -> dict[Any, Any]:
    return {}


# How torch's unpickler builds other data in files of weights: as containers, NumPy numbers, or empty stand-ins. No other
# library is imported, and none of its code runs.
_DICTS = {
    "easydict": "EasyDict",
    "addict.addict": "Dict",
    "yacs.config": "CfgNode",
    "fvcore.common.config": "CfgNode",
    "detectron2.config.config": "CfgNode",
    "mmengine.config.config": "ConfigDict",
    "mmcv.utils.config": "ConfigDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "lightning.fabric.utilities.data": "AttributeDict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "lightning.pytorch.utilities.parsing": "AttributeDict",
}
_PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"
_VALUES = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "typing": "Any",
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "builtins": "int float bool str bytes list dict tuple frozenset bytearray complex slice range",
    "torch.torch_version": "TorchVersion",
    "mmengine.logging.history_buffer": "HistoryBuffer",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.nodes": "AnyNode IntegerNode FloatNode StringNode BooleanNode BytesNode PathNode",
}
_NUMBERS = {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
_MAKERS = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
PLAIN: tuple[Any, ...] = (
    *((OrderedDict, f"{module}.{name}") for module, name in _DICTS.items()),
    *((_Left, f"{module}.{name}") for module, names in _VALUES.items() for name in names.split()),
    (_LeftList, "collections.deque"),
    (_empty_dict, "collections.defaultdict"),
    np.ndarray,
    np.dtype,
    *_NUMBERS,
    *((make, f"numpy.{core}.multiarray.{name}") for name, make in _MAKERS.items() for core in ("core", "_core")),
)


def archive_damage(path: Path) -> str | None:
    """The damage of a torch file, or None: it is a zip archive with a CRC-32 of every tensor, which torch does not verify.

    torch's older format and safetensors have no checksums.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return None
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # zipfile raises many kinds for a damaged header
        return f"the archive cannot be read ({first_line(error)})"
    return None if part is None else f"the checksum of {part} differs"


def write_state_dict(path: Path, state: dict[str, Any], metadata: dict[str, str]) -> None:
    """Writes a state dict in the format of the file's suffix. Raises UserError.

    Args:
        path: a `.safetensors` file has the metadata in its header; other files hold `state` only.
        state: tensors by name; for a library's own files anything that can be pickled.
        metadata: origin of the weights.
    """
    with replaced_when_whole(path) as temporary:
        if path.suffix == ".pkl":
            temporary.write_bytes(pickle.dumps(state))
            return
        tensors = {n: value.contiguous().clone() if isinstance(value, Tensor) else value for n, value in state.items()}
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, metadata)
        else:
            torch.save(tensors, temporary)
