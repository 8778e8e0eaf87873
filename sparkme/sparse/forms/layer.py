"""The base class of sparse layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparkme.state_dict import state_dict_of


class SparseLayer(nn.Module):
    """A layer in place of a dense one: it gives its weights in the dense layout, and can be copied.

    The defaults serve layers that hold a dense layer (`inner`) or are one. A layer takes tensors as well as maps, since a
    network may use it for both.
    """

    inner: str | None = None  # name of the wrapped dense layer, as in MinkowskiEngine's wrappers

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # code may ask for the dense layer's weight or running statistics
            inner = self.__dict__.get("_modules", {}).get(type(self).inner)
            if inner is None:
                raise
            return getattr(inner, name)

    def __getstate__(self) -> dict[str, Any]:
        # MinkowskiEngine keeps attributes in slots, which torch's modules do not copy.
        names = self._slots() - self._parameters.keys() - self._modules.keys()
        return {**self.__dict__, **{name: getattr(self, name) for name in names if hasattr(self, name)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        slots = self._slots()
        super().__setstate__({name: value for name, value in state.items() if name not in slots})
        for name in slots & state.keys():
            object.__setattr__(self, name, state[name])

    @classmethod
    def _slots(cls) -> set[str]:
        return {name for kind in cls.__mro__ for name in getattr(kind, "__slots__", ())}

    def holder(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a parameter of the dense layer, and its name there."""
        return (self.get_submodule(self.inner) if self.inner else self), name

    def dense_views(self) -> dict[str, Tensor]:
        """Parameters and buffers under the names and in the shapes of the dense layer, sharing memory with its own."""
        return dict(state_dict_of(self.get_submodule(self.inner) if self.inner else self))

    def dense_state(self) -> dict[str, Tensor]:
        """The same, each contiguous in memory: copies where the layout differs."""
        return {name: value.contiguous() for name, value in self.dense_views().items()}

    @torch.no_grad()
    def load_dense_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `dense_state`. Raises RuntimeError if names or shapes differ."""
        nn.Module.load_state_dict(self.get_submodule(self.inner) if self.inner else self, state)


def take_state(layer: nn.Module, dense: nn.Module) -> None:
    """Copies weights, dtype, device, mode and requires_grad of the dense layer to `layer`."""
    tensors = [*dense.parameters(), *dense.buffers()]
    if tensors:
        layer.to(tensors[0].device, tensors[0].dtype)
    nn.Module.load_state_dict(layer, dict(state_dict_of(dense)))  # a plain dict: it has no versions
    layer.train(dense.training)
    for ours, theirs in zip(layer.parameters(), dense.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
