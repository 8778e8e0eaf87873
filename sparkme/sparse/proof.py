"""Keeps the result of a network's trial as plain values, so that the same network need not be tried again.

A proof holds the hierarchy and a description of everything that the trial depended on: the network's modules with their
attributes, their code, the sparse forms, the engines, and the versions of the libraries. It counts only if the network at hand
has the same description. A network that cannot be described, such as one whose code reads files, is tried every time.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import importlib.metadata
import json
import logging
import platform
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparkme.errors import first_line
from sparkme.sparse.engines import ENGINES, why_not
from sparkme.sparse.forms import SPARSE_FORMS
from sparkme.sparse.hierarchy import Hierarchy, Tap

# Names that reach outside the code: their results may change.
_OUTSIDE = {"open", "exec", "eval", "environ", "getenv", "__import__", "import_module"}
_MOST = 100_000
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_PACKAGE = Path(__file__).resolve().parents[1]
_UNIMPORTANT = {
    "__dict__",
    "__doc__",
    "__weakref__",
    "__annotations__",
    "__module__",
    "__firstlineno__",
    "_abc_impl",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
    "__static_attributes__",
}


class NotProved(Exception):
    """The reason why a network has to be tried."""


def describe(model: nn.Module, request: Mapping[str, Any]) -> dict[str, Any]:
    """All that a trial of the dense network depends on, as plain values.

    `request` holds the arguments of `sparsify`. Raises NotProved for a network that cannot be described.
    """
    reader = _Reader()
    try:
        reader.add(model)
        reader.add({k: form for k, form in SPARSE_FORMS.items() if not _is_ours(getattr(form, "__module__", None) or "")})
    except NotProved:
        raise
    except Exception as error:  # reading a network's attributes may raise anything
        raise NotProved(f"its attributes cannot be read: {first_line(error)}") from error
    device = next(model.parameters()).device
    return {
        "network": reader.digest.hexdigest(),
        "request": dict(request),
        "sparse forms": _digest_of_files((_PACKAGE / "sparse").rglob("*.py")),
        "engines": sorted(name for name in ENGINES if not why_not(name, device)),
        "device": device.type,
        "libraries": {"python": platform.python_version(), **_versions({"torch", "MinkowskiEngine", *reader.packages})},
    }


def make_proof(hierarchy: Hierarchy, description: dict[str, Any]) -> dict[str, Any]:
    """The proof that a network with this description passed its trial with this hierarchy, as values for JSON."""
    found = {key: sorted(value) if isinstance(value, frozenset) else value for key, value in asdict(hierarchy).items()}
    proof: dict[str, Any] = json.loads(json.dumps({"hierarchy": found, **description}))
    return {**proof, "seal": seal(proof)}


def proved_hierarchy(proof: Any, description: dict[str, Any], model: nn.Module) -> Hierarchy:
    """The hierarchy of a proof of the same network. Raises NotProved, which says what differs, for any other proof."""
    if proof is None:
        raise NotProved("no proof of its trial was kept")
    try:
        kept = {key: value for key, value in proof.items() if key != "seal"}
        if proof["seal"] != seal(kept):
            raise NotProved("the kept proof has been changed")
        for key, now in json.loads(json.dumps(description)).items():
            if kept[key] != now:
                raise NotProved(_difference(key, kept[key], now))
        found = dict(kept["hierarchy"])
        sets = {field.name: frozenset(found[field.name]) for field in fields(Hierarchy) if "frozenset" in str(field.type)}
        taps = tuple(Tap(**{**tap, "path": tuple(tap["path"])}) for tap in found["taps"])
        hierarchy = Hierarchy(**{**found, **sets, "taps": taps})
        for tap in taps:
            model.get_submodule(tap.module)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NotProved("the kept proof is damaged") from error
    return hierarchy


def _difference(key: str, before: Any, now: Any) -> str:
    if key == "libraries":
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        return f"{changed[0]} was {before.get(changed[0], 'not there')} and is {now.get(changed[0], 'not there')}"
    if key in ("device", "engines"):
        return f"it was tried on {', '.join(before) if key == 'engines' else before}"
    what = {"network": "the network's code or structure", "request": "the call of sparsify", "sparse forms": "sparkme"}[key]
    return f"{what} changed since the trial"


def seal(proof: Mapping[str, Any]) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(proof, sort_keys=True).encode()).hexdigest()


class _Reader:
    """Computes the digest of a network and of the code that it can reach.

    Libraries and Python count by their versions, and files of the network's own classes also by their content. All other code
    is followed from name to name.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.packages: set[str] = set()
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id comes twice
        self._followed: set[tuple[str, str]] = set()

    def add(self, value: Any) -> None:
        """Adds any value: a module, a function, a class, or an attribute of one."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
            self._put(type(value).__name__, repr(value))
        elif id(value) in self._seen:
            self._put("again", self._seen[id(value)])
        elif len(self._seen) > _MOST:
            raise NotProved(f"it refers to more than {_MOST} objects")
        else:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            next((method for kinds, method in self._METHODS if isinstance(value, kinds)), _Reader._put_object)(self, value)

    def _put_object(self, value: Any) -> None:
        attributes = {**getattr(value, "__dict__", {}), **_slots(value)}
        if not attributes and not hasattr(value, "__dict__"):
            raise NotProved(f"it keeps a {type(value).__name__}, which cannot be compared")
        self.add(type(value))
        self._put_dict(attributes)

    def _put(self, *parts: Any) -> None:
        self.digest.update(repr(parts).encode())

    def _put_all(self, values: Iterable[Any]) -> None:
        values = list(values)
        self._put("values", len(values))
        for value in values:
            self.add(value)

    def _put_sequence(self, values: list[Any] | tuple[Any, ...]) -> None:
        self._put(type(values).__qualname__)
        self._put_all(values)

    def _put_dict(self, values: Mapping[Any, Any]) -> None:
        self._put(type(values).__qualname__, len(values))
        for key, value in values.items():
            self.add(key)
            self.add(value)

    def _put_set(self, values: Any) -> None:
        if not all(isinstance(value, str | int | float | bool | None) for value in values):
            raise NotProved("it keeps a set of objects, which has no order")
        self._put("set", sorted(map(repr, values)))

    def _put_tensor(self, tensor: Tensor) -> None:
        self._put("tensor", tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
        if not isinstance(tensor, nn.Parameter):
            self._put_array(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

    def _put_array(self, array: Any) -> None:
        if array.dtype.hasobject:
            raise NotProved("it keeps an array of objects")
        self._put("array", array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest())

    def _put_network(self, module: nn.Module) -> None:
        self.add(type(module))
        for key, value in vars(module).items():
            self._put(key)
            if key == "_buffers":  # their values belong to the weights
                self._put([(name, b is not None and (tuple(b.shape), str(b.dtype))) for name, b in value.items()])
            elif "_hooks" in key and isinstance(value, dict):  # the keys count all hooks that ever existed
                self._put_all(value.values())
            else:
                self.add(dict(value) if key in ("_parameters", "_modules") else value)

    def _put_class(self, kind: type) -> None:
        self._put("class", kind.__module__, kind.__qualname__)
        self._put_file(kind.__module__)
        if _is_ours(kind.__module__) or kind.__module__ in ("builtins", "torch.nn.modules.module"):
            return
        for name, value in sorted(vars(kind).items(), key=lambda item: item[0]):
            if name not in _UNIMPORTANT and not isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType):
                self._put(name)
                self.add(value)
        self._put_all(kind.__mro__[1:-1])

    def _put_function(self, function: types.FunctionType) -> None:
        self._put("function", function.__module__, function.__qualname__)
        self._put_code(function.__code__)
        self._put_all((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # the cell is still empty
                self._put("empty")
        if _is_ours(function.__module__ or "") or self._put_file(function.__module__ or ""):
            return
        names = _names(function.__code__)
        if outside := sorted(names & _OUTSIDE):
            raise NotProved(f"{function.__module__}.{function.__qualname__} calls {outside[0]}, whose result may change")
        for name in sorted(names & function.__globals__.keys()):
            self._put(name)
            self._put_name(function.__globals__[name], names)
        for module in _imports(function):
            self._put_name(module, names)

    def _put_name(self, value: Any, names: set[str]) -> None:
        """A global of a function; of a module, only the names that the function uses."""
        if not isinstance(value, types.ModuleType):
            self.add(value)
        elif not self._put_file(value.__name__):
            for name in sorted(names & vars(value).keys()):
                if (value.__name__, name) not in self._followed:
                    self._followed.add((value.__name__, name))
                    self._put(name)
                    self._put_name(vars(value)[name], names)

    def _put_code(self, code: types.CodeType) -> None:
        self._put(code.co_code, code.co_names, code.co_varnames)
        for value in code.co_consts:
            if isinstance(value, types.CodeType):
                self._put_code(value)
            else:
                self._put(sorted(map(repr, value)) if isinstance(value, frozenset) else value)

    def _put_file(self, name: str) -> bool:
        """Adds the file of a module. Returns whether it belongs to a library, whose code is not followed."""
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if file is None:
            if name == "__main__":
                raise NotProved("it is written in a notebook or at a prompt")
            self._put("builtin", name)
            return True
        self._put("file", name, _digest_of_files([Path(file)]))
        is_library = _is_ours(name) or file.startswith(_LIBRARIES)
        if is_library:
            self.packages.add(name.partition(".")[0])
        return is_library

    def _put_wrapped(self, value: Any) -> None:
        self._put(type(value).__name__)
        for name in ("__func__", "__self__", "fget", "fset", "func", "args", "keywords", "__wrapped__"):
            if (part := getattr(value, name, None)) is not None:
                self.add(part)

    def _put_plain(self, value: Any) -> None:
        self._put(type(value).__name__, str(value))

    def _put_builtin(self, value: Any) -> None:
        owner = getattr(value, "__self__", None)
        self._put("builtin", getattr(value, "__qualname__", None) or str(value))
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.add(owner)

    _METHODS: tuple[tuple[Any, Callable[[Any, Any], None]], ...] = (
        (nn.Module, _put_network),
        (Tensor, _put_tensor),
        ((np.ndarray, np.generic), lambda self, value: self._put_array(np.asarray(value))),
        ((list, tuple), _put_sequence),
        ((set, frozenset), _put_set),
        ((dict, types.MappingProxyType), _put_dict),
        (enum.Enum, _put_plain),
        (logging.Logger, lambda self, value: self._put("logger", value.name)),
        ((torch.layout, torch.memory_format, slice, range, type(...), type(NotImplemented)), _put_plain),
        (types.FunctionType, _put_function),
        (type, _put_class),
        ((staticmethod, classmethod, types.MethodType, property, functools.partial, functools.cached_property), _put_wrapped),
        ((types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType), _put_builtin),
        (types.ModuleType, lambda self, value: self._put_name(value, set())),
    )


def _slots(value: Any) -> dict[str, Any]:
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _names(code: types.CodeType) -> set[str]:
    """All names that code may look up, including those of its inner functions."""
    inner = [_names(value) for value in code.co_consts if isinstance(value, types.CodeType)]
    return {*code.co_names, *(name for names in inner for name in names)}


def _imports(function: types.FunctionType) -> list[types.ModuleType]:
    """The modules that a function, or one within it, imports when it runs, relative names included."""
    found, codes = [], [function.__code__]
    for code in codes:
        codes += [value for value in code.co_consts if isinstance(value, types.CodeType)]
        steps = list(dis.get_instructions(code))
        for level, names, step in zip(steps, steps[1:], steps[2:], strict=False):
            if step.opname == "IMPORT_NAME":
                try:
                    found.append(__import__(step.argval, function.__globals__, None, names.argval or (), level.argval))
                except (ImportError, ValueError, TypeError) as error:
                    raise NotProved(f"{function.__module__}.{function.__qualname__} imports {step.argval!r}") from error
    return found


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


@functools.cache
def _digest_of_file(path: Path, size: int, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_of_files(paths: Iterable[Path]) -> str:
    try:
        digests = [_digest_of_file(p, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths)]
    except OSError as error:
        raise NotProved(f"its code cannot be read ({error.strerror})") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of installed packages; Python's own modules have none."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
