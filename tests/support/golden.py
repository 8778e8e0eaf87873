"""The golden values of the official SparK code, and the weights, images and masks they belong to.

`data/spark_official.json` states in its `rules` how every tensor follows from its official state-dict key; this module
applies those rules, so nothing but numbers is stored.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PATH = Path(__file__).parents[1] / "data" / "spark_official.json"
PATCH = 32


@dataclass(frozen=True)
class GoldenCase:
    """One case of the file: the configuration as attributes, the numbers to reach in `values`."""

    model: str
    input_size: int
    batch: int
    decoder_width: int
    mask_ratio: float
    densify_norm: str
    seed: int
    dtype: torch.dtype
    visible_patches: list[list[int]]
    state_shapes: dict[str, list[int]]
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """Such as 'resnet50-128-float64'."""
        return f"{self.model}-{self.input_size}-{str(self.dtype).removeprefix('torch.')}"

    def state(self) -> dict[str, Tensor]:
        """Official state dict, on the CPU in the case's dtype; `num_batches_tracked` is int64 and zero."""
        return {key: _tensor_of(key, shape, self.dtype) for key, shape in self.state_shapes.items()}

    def images(self) -> Tensor:
        """(batch, 3, input_size, input_size), rounded to float32 and then in the case's dtype."""
        shape = (self.batch, 3, self.input_size, self.input_size)
        images = np.random.RandomState(self.seed).standard_normal(shape).astype(np.float32)
        return torch.from_numpy(images).to(self.dtype)

    def active(self) -> Tensor:
        """(batch, 1, f, f) bool, True = visible."""
        f = self.input_size // PATCH
        active = torch.zeros(self.batch, f * f, dtype=torch.bool)
        for sample, patches in zip(active, self.visible_patches, strict=True):
            sample[patches] = True
        return active.view(self.batch, 1, f, f)


@lru_cache(maxsize=1)
def golden_cases() -> tuple[GoldenCase, ...]:
    """All cases of the golden file, in its order."""
    configuration = set(GoldenCase.__dataclass_fields__) - {"dtype", "values"}
    cases = []
    for entry in json.loads(PATH.read_text())["cases"]:
        values = {key: value for key, value in entry.items() if key.startswith(("train_", "eval_", "grad_"))}
        fields = {key: entry[key] for key in configuration}
        cases.append(GoldenCase(**fields, dtype=getattr(torch, entry["dtype"]), values=values))
    return tuple(cases)


def golden_case(name: str) -> GoldenCase:
    """The case of that name, such as 'resnet18-96-float64'."""
    cases = {case.name: case for case in golden_cases()}
    if name not in cases:
        raise ValueError(f"no golden case {name!r}; there are {', '.join(cases)}")
    return cases[name]


def golden_tensor(key: str, shape: list[int] | tuple[int, ...]) -> np.ndarray:
    """The float32 array that the rules give a state-dict key: its name seeds the noise, its ending the scale."""
    x = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    if "mask_tokens" in key:
        x = 0.5 * x
    elif key.endswith(".gamma"):
        x = 0.5 + 0.1 * x
    elif key.endswith(".running_var"):
        x = 0.5 + np.abs(x)
    elif key.endswith((".running_mean", ".bias")):
        x = 0.1 * x
    elif key.endswith(".weight"):
        x = 1 + 0.1 * x if len(shape) == 1 else x * np.sqrt(1 / prod(shape[1:]))
    else:
        raise ValueError(f"the rules of {PATH.name} say nothing about the key {key!r}")
    return x.astype(np.float32)


def feature_statistics(rows: Tensor) -> dict[str, float]:
    """What the file records of visible rows (N, C), or of a whole reconstruction."""
    rows = rows.detach()
    return {"mean": rows.mean().item(), "abs_mean": rows.abs().mean().item(), "l2": rows.norm().item()}


def _tensor_of(key: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    return torch.from_numpy(golden_tensor(key, shape)).to(dtype)
