"""Weights of a module by name, as torch defines them, even if its class overrides `state_dict` or `load_state_dict`.

An override may omit or rename names, return copies or nothing, or take other arguments. To load weights, this project calls
`nn.Module.load_state_dict(module, state)`, which ignores it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


def state_dict_of(module: nn.Module) -> dict[str, Any]:
    """Torch's own `state_dict`: all parameters, persistent buffers and extra states, sharing their memory."""
    with torchs_state_dict(module):
        return module.state_dict()


@contextmanager
def torchs_state_dict(*modules: nn.Module) -> Iterator[None]:
    """Replaces `state_dict` of the modules and their submodules by torch's, for libraries that call it."""
    parts = [part for module in modules for part in module.modules() if "state_dict" in part.__dict__ or _is_own(part)]
    before = [part.__dict__.get("state_dict") for part in parts]
    for part in parts:
        part.__dict__["state_dict"] = partial(nn.Module.state_dict, part)
    try:
        yield
    finally:
        for part, method in zip(parts, before, strict=True):
            part.__dict__["state_dict"] = method
            if method is None:
                del part.__dict__["state_dict"]


def _is_own(module: nn.Module) -> bool:
    return type(module).state_dict is not nn.Module.state_dict
