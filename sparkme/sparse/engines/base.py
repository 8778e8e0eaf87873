"""What an engine does: the kernels behind the sparse layers. All engines give the same numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkme.grid import Grid
from sparkme.sparse.map import SparseMap

if TYPE_CHECKING:
    from sparkme.sparse.layers import (
        SparseAvgPool2d,
        SparseLayerNorm,
        SparseLinear,
        SparseMaxPool2d,
        _SparseConvolution,
    )


class Engine(ABC):
    """The kernels behind the layers, and the form in which they keep features.

    `dense` says which: (B, C, H, W), or (B, L, C) patch-major rows. `bf16` says whether it follows autocast; the encoder
    of an engine that cannot stays in the precision of its weights.
    """

    name: str
    dense: bool
    bf16: bool

    def precision(self, device_type: str) -> AbstractContextManager[None]:
        """The context in which the encoder runs."""
        return nullcontext() if self.bf16 else torch.autocast(device_type, enabled=False)

    @abstractmethod
    def convolution(self, layer: _SparseConvolution, x: SparseMap) -> SparseMap: ...

    @abstractmethod
    def max_pool(self, layer: SparseMaxPool2d, x: SparseMap) -> SparseMap: ...

    @abstractmethod
    def avg_pool(self, layer: SparseAvgPool2d, x: SparseMap) -> SparseMap: ...

    @abstractmethod
    def linear(self, layer: SparseLinear, x: SparseMap) -> SparseMap: ...

    def voxelise(self, images: Tensor, grid: Grid) -> Tensor:
        """The visible pixels of (B, C, H, W) images, in the form that the engine computes on."""
        return self.from_rows(grid.to_rows(images, 1), grid, 1)

    def densify(self, rows: Tensor, grid: Grid, stride: int, fill: Tensor) -> Tensor:
        """(N, C) rows as a (B, C, H / stride, W / stride) map, with `fill`, (C,), at hidden pixels."""
        return grid.to_dense(rows, stride, fill)

    @abstractmethod
    def layer_norm(self, layer: SparseLayerNorm, x: SparseMap) -> SparseMap: ...

    @abstractmethod
    def to_dense(self, x: SparseMap) -> Tensor:
        """(B, C, H, W), zero at hidden pixels."""

    @abstractmethod
    def to_rows(self, x: SparseMap) -> Tensor:
        """(N, C) patch-major rows of the map."""

    @abstractmethod
    def from_rows(self, rows: Tensor, grid: Grid, stride: int) -> Tensor:
        """(N, C) rows in the form that the engine computes on."""


class RowEngine(Engine):
    """An engine that computes on rows: linear layers and norms need nothing else."""

    dense = False

    def linear(self, layer: SparseLinear, x: SparseMap) -> SparseMap:
        return x.replace(layer.linear(x.data))

    def layer_norm(self, layer: SparseLayerNorm, x: SparseMap) -> SparseMap:
        return x.replace(F.layer_norm(x.data, layer.normalized_shape, layer.weight, layer.bias, layer.eps))

    def to_dense(self, x: SparseMap) -> Tensor:
        return x.grid.to_dense(x.rows, x.stride)

    def to_rows(self, x: SparseMap) -> Tensor:
        return x.data.flatten(0, 1)

    def from_rows(self, rows: Tensor, grid: Grid, stride: int) -> Tensor:
        return rows.view(grid.batch, -1, rows.shape[-1])
