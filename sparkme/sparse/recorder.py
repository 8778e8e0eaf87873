"""Collects the encoder's outputs while its network runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Recorder:
    """Collects the maps of the hierarchy during one run of the encoder.

    Args:
        calls: for each map the number of its module's call that returns it, from 1.
        compiled: whether parts of the network are compiled.
    """

    def __init__(self, calls: Sequence[int], *, compiled: bool = False) -> None:
        self.calls = calls
        self.compiled = compiled
        self.counts = [0] * len(calls)
        self.maps: dict[int, Any] = {}

    def reached(self, i: int, value: Any) -> bool:
        """Counts a call of the module of map i; returns True once all maps are there."""
        self.counts[i] += 1
        if self.counts[i] == self.calls[i]:
            with torch.enable_grad():  # a frozen module may read it, but the map needs gradients
                self.maps[i] = value.snapshot() if hasattr(value, "snapshot") else value.clone()  # tensors have no snapshot
        return len(self.maps) == len(self.calls)
