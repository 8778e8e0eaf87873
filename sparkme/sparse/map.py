"""The value that flows through a sparse network and that its encoder returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sparkme.sparse.engines.minkowski import to_minkowski
from sparkme.sparse.features import RowFeatures
from sparkme.sparse.tensor_like import TensorLike

if TYPE_CHECKING:
    import MinkowskiEngine as ME


class SparseMap(TensorLike):
    """Features at the visible pixels of a batch, at one stride.

    Attributes:
        grid: the sites.
        stride: input pixels per pixel of this map.
        shape, dtype, device: of the dense map.
    """

    @property
    def rows(self) -> Tensor:
        """(N, C), one row per visible pixel, patch-major."""
        return self.features.rows()

    def dense(self) -> Tensor:
        """(B, C, H / stride, W / stride), zero at hidden pixels."""
        return self.features.dense()

    def minkowski(self) -> ME.SparseTensor:
        """The same features as a MinkowskiEngine sparse tensor, with coordinates (sample, y, x) in input pixels."""
        return to_minkowski(RowFeatures.of_rows(self.rows, self.grid, self.stride))
