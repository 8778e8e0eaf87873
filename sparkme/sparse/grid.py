"""The sites of a batch: which pixels are visible, in which order, and where their neighbours are.

A `Grid` is made once per batch from the mask and travels with the features, so no layer needs global state. Coordinates, dense
masks, MinkowskiEngine's coordinate maps and all else that follows from the mask are built on first use and cached on the grid.

Rows are patch-major at every stride: sorted by (sample, visible patch in row-major order, y, x). A map at stride s has
p = patch / s pixels along a patch, and `rows.view(B, keep, p, p, C)` is always valid.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def in_inference_mode() -> bool:
    """False in compiled code: torch.compile cannot trace the question."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


class Grid:
    """The visible sites of one batch.

    Args:
        active: (B, 1, f_h, f_w) bool, True = visible; the same number of visible patches in every image.
        patch: side of a patch in input pixels.
        keep: visible patches per image, if known. Otherwise the mask is read back from the device once, to count and check.

    Raises:
        ValueError: the mask has a wrong shape or type, or images differ in the number of visible patches.
    """

    def __init__(self, active: Tensor, patch: int, keep: int | None = None) -> None:
        if active.ndim != 4 or active.shape[1] != 1 or active.dtype != torch.bool:
            raise ValueError(f"active must be (B, 1, f_h, f_w) bool, got {tuple(active.shape)} {active.dtype}")
        if keep is None or active.device.type == "cpu":
            counts = active.flatten(1).sum(1).unique().tolist()
            if len(counts) != 1 or counts[0] == 0:
                raise ValueError(f"every image needs the same number of visible patches, at least one; got {counts}")
            if keep not in (None, counts[0]):
                raise ValueError(f"keep is {keep}, but {counts[0]} patches are visible")
            keep = int(counts[0])
        self.active = active
        self.patch = patch
        self.keep = keep
        self.batch, _, self.f_h, self.f_w = active.shape
        self._cache: dict[Any, Any] = {}

    @property
    def device(self) -> torch.device:
        return self.active.device

    def size(self, stride: int) -> tuple[int, int]:
        """Height and width of a dense map at `stride`."""
        p = self.pixels(stride)
        return self.f_h * p, self.f_w * p

    def pixels(self, stride: int) -> int:
        """Pixels along one side of a patch at `stride`."""
        if self.patch % stride:
            raise ValueError(f"stride {stride} does not divide the patch of {self.patch} pixels")
        return self.patch // stride

    def num_rows(self, stride: int) -> int:
        return self.batch * self.keep * self.pixels(stride) ** 2

    @property
    def order(self) -> Tensor:
        """(B, f_h * f_w) int64: the patches of each image, visible ones first, each part in row-major order."""
        return self.cached("order", lambda: self.active.flatten(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True))

    @property
    def visible(self) -> Tensor:
        """(B, keep) int64: row-major numbers of the visible patches, ascending."""
        return self.order[:, : self.keep]

    @property
    def hidden(self) -> Tensor:
        """(B, f_h * f_w - keep) int64: row-major numbers of the hidden patches, ascending."""
        return self.order[:, self.keep :]

    @property
    def slots(self) -> Tensor:
        """(B, f_h, f_w) int32: the number of each patch among the visible ones of the batch; -1 if hidden."""

        def build() -> Tensor:
            slots = torch.full((self.batch * self.f_h * self.f_w,), -1, dtype=torch.int32, device=self.device)
            numbers = torch.arange(len(self.patches), dtype=torch.int32, device=self.device)
            return slots.scatter(0, self.patches.long(), numbers).view(self.batch, self.f_h, self.f_w)

        return self.cached("slots", build)

    @property
    def patches(self) -> Tensor:
        """(B * keep,) int32: the index of each visible patch of the batch in the flattened `slots`."""

        def build() -> Tensor:
            first = torch.arange(self.batch, device=self.device).view(-1, 1) * (self.f_h * self.f_w)
            return (first + self.visible).flatten().int()

        return self.cached("patches", build)

    def cached(self, key: Any, build: Callable[[], T]) -> T:
        """The result of `build`, computed once per batch. It is no inference tensor, since later readers may need gradients."""
        if key not in self._cache:
            with torch.inference_mode(False) if in_inference_mode() else nullcontext():
                self._cache[key] = build()
        found: T = self._cache[key]
        return found

    def mask(self, stride: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, H / stride, W / stride): 1 at visible pixels, 0 at hidden ones."""

        def build() -> Tensor:
            p = self.pixels(stride)
            return self.active.repeat_interleave(p, 2).repeat_interleave(p, 3).to(dtype)

        return self.cached(("mask", stride, dtype), build)

    def coordinates(self, stride: int) -> Tensor:
        """(N, 3) int32 contiguous: (sample, y, x) of every row, in input pixels (multiples of `stride`)."""
        p = self.pixels(stride)
        sample = torch.arange(self.batch, device=self.device).view(-1, 1, 1, 1)
        corner = self.visible.view(self.batch, self.keep, 1, 1)
        step = torch.arange(p, device=self.device) * stride
        y = corner // self.f_w * self.patch + step.view(p, 1)
        x = corner % self.f_w * self.patch + step.view(1, p)
        return torch.stack(torch.broadcast_tensors(sample, y, x), dim=-1).view(-1, 3).int()

    def runs(self, stride: int) -> Tensor:
        """(B * keep * p,) int64: indices of the visible runs of a (B, H, W, C) map, in the order of rows.

        A run is the p pixels of one line of a patch, adjacent in memory: the map is (B * H * f_w, p * C) runs, and visible
        pixels are copied run by run.
        """

        def build() -> Tensor:
            p = self.pixels(stride)
            sample = torch.arange(self.batch, device=self.device).view(-1, 1, 1)
            y = (self.visible // self.f_w * p).unsqueeze(2) + torch.arange(p, device=self.device)
            column = (self.visible % self.f_w).unsqueeze(2)
            return ((sample * self.f_h * p + y) * self.f_w + column).flatten()

        return self.cached(("runs", stride), build)

    def row_numbers(self, stride: int) -> Tensor:
        """(B, H / stride, W / stride) int64: the row of every pixel; -1 if hidden."""

        def build() -> Tensor:
            numbers = torch.arange(1, self.num_rows(stride) + 1, device=self.device).view(-1, 1)
            return self.to_dense(numbers, stride).squeeze(1) - 1

        return self.cached(("numbers", stride), build)

    def to_rows(self, dense: Tensor, stride: int) -> Tensor:
        """Copies the visible patches of a (B, C, H / stride, W / stride) map to (N, C) rows; fast in channels_last memory."""
        runs = dense.permute(0, 2, 3, 1).reshape(-1, self.pixels(stride) * dense.shape[1])
        taken: Tensor = TakeRuns.apply(runs, self.runs(stride))
        return taken.view(-1, dense.shape[1])

    def to_dense(self, rows: Tensor, stride: int, fill: Tensor | None = None) -> Tensor:
        """Copies (N, C) rows to a channels_last (B, C, H / stride, W / stride) map; hidden pixels get `fill` (C,) or zero."""
        p, channels, (h, w) = self.pixels(stride), rows.shape[1], self.size(stride)
        shape = self.batch * h * self.f_w, p * channels
        runs = rows.new_zeros(shape) if fill is None else fill.to(rows.dtype).repeat(p).expand(shape).clone()
        runs.index_copy_(0, self.runs(stride), rows.reshape(-1, p * channels))
        return runs.view(self.batch, h, w, channels).permute(0, 3, 1, 2)


class TakeRuns(torch.autograd.Function):
    """`runs[index]` for an index without duplicates, so that its gradient is a copy instead of a sum."""

    @staticmethod
    def forward(ctx, runs: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        ctx.num_runs = len(runs)
        return runs.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_runs, grad.shape[1]).index_copy_(0, index, grad), None
