"""Weights of a module by name, as torch defines them: classes may have a `state_dict` and a `load_state_dict` of their own.

Such a method may leave names out, rename them, give copies, return nothing, or not take the usual arguments. To load, this
project calls `nn.Module.load_state_dict(module, state)`, which asks no such method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


def state_dict_of(module: nn.Module) -> dict[str, Any]:
    """What torch's own `state_dict` gives: all parameters, persistent buffers and extra states, sharing their memory."""
    with torchs_state_dict(module):
        return module.state_dict()


@contextmanager
def torchs_state_dict(*modules: nn.Module) -> Iterator[None]:
    """Within it `state_dict` of the modules, and of all in them, is torch's; for code that calls it and is not ours."""
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
