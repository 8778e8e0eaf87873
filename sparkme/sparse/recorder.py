"""What collects the encoder's outputs while its network runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Recorder:
    """Collects the maps of the hierarchy during one run of the encoder.

    Args:
        calls: for each map the number of the call of its module at which it is taken, from 1.
        compiled: whether parts of the network are compiled.
    """

    def __init__(self, calls: Sequence[int], *, compiled: bool = False) -> None:
        self.calls = calls
        self.compiled = compiled
        self.counts = [0] * len(calls)
        self.maps: dict[int, Any] = {}

    def reached(self, i: int, value: Any) -> bool:
        """Notes a call of the module of map i; true once all maps are there."""
        self.counts[i] += 1
        if self.counts[i] == self.calls[i]:
            with torch.enable_grad():  # what reads it may be frozen; the map is not
                self.maps[i] = value.snapshot() if hasattr(value, "snapshot") else value.clone()  # a tensor has none
        return len(self.maps) == len(self.calls)
