"""The table of a module's forms of torch functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_OWNERS = (torch.Tensor, torch, F, torch._C._nn, torch.linalg, torch.special)


class Functions(dict[Callable[..., Any], Callable[..., Any]]):
    """Forms by function object, since torch.compile cannot ask a function for its name."""

    def form_of(self, *names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Registers the form of all torch functions with these names, for calls with a map.

        `mean` stands for torch.mean, Tensor.mean and any other `mean` in torch's namespaces.
        """

        def register(form: Callable[..., Any]) -> Callable[..., Any]:
            for name in names:
                found = [function for owner in _OWNERS if (function := getattr(owner, name, None)) is not None]
                if not found:
                    raise ValueError(f"torch has no function {name!r}")
                self.update(dict.fromkeys(found, form))
            return form

        return register
