"""Norms: statistics come from visible pixels only, over the batch, the sample or the pixel, as in the dense norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import MinkowskiEngine as ME
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkme.sparse.batch_norm import BATCH_NORM
from sparkme.sparse.features import RowFeatures
from sparkme.sparse.forms.functions import Functions
from sparkme.sparse.forms.layer import SparseLayer, take_state
from sparkme.sparse.fusion import fused
from sparkme.sparse.working_map import is_map
from sparkme.state_dict import state_dict_of

if TYPE_CHECKING:
    from timm.layers.grn import GlobalResponseNorm
    from timm.layers.norm_act import BatchNormAct2d

    from sparkme.sparse.working_map import WorkingMap

FUNCTIONS = Functions()


class RowNorm(nn.BatchNorm2d):
    """A batch norm of (N, C) rows that is an nn.BatchNorm2d to code that freezes batch norms."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class SparseBatchNorm2d(SparseLayer, ME.MinkowskiBatchNorm):
    """Batch normalisation with statistics over the visible pixels of the batch."""

    inner = "bn"
    bn: BATCH_NORM

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        ME.MinkowskiBatchNorm.__init__(self, norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.bn = RowNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        take_state(self.bn, _without_children(norm))

    def forward(self, input: Any) -> Any:
        x = input
        if self.bn.training and not self.training:  # code froze this module and did not know of bn
            self.bn.eval()
        if not is_map(x):  # pooled vectors, (B, C, 1, 1)
            return self.bn(x.flatten(1)).view_as(x) if x.shape[2:] == (1, 1) else self._dense(x)
        if x.dims != "BCHW":
            raise NotImplementedError(f"batch norm of a map with axes {x.dims} has no sparse form, only of BCHW")
        if (waiting := fused(x, "batch_norm", self.bn)) is not None:
            return waiting
        return x.with_rows(self.bn(x.features.rows()))

    def _dense(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        rows: Tensor = self.bn(x.permute(0, 2, 3, 1).flatten(0, 2))
        return rows.view(b, h, w, -1).permute(0, 3, 1, 2)


class SparseBatchNormAct2d(SparseBatchNorm2d):
    """timm's batch norm with an activation (and, rarely, dropout) in one module."""

    def __init__(self, norm: BatchNormAct2d) -> None:
        super().__init__(norm)
        self.drop, self.act = norm.drop, norm.act

    def dense_views(self) -> dict[str, Tensor]:
        return super().dense_views() | {f"act.{name}": value for name, value in state_dict_of(self.act).items()}

    def load_dense_state(self, state: dict[str, Tensor]) -> None:
        super().load_dense_state({name: value for name, value in state.items() if not name.startswith("act.")})
        of_act = {name[4:]: value for name, value in state.items() if name.startswith("act.")}
        nn.Module.load_state_dict(self.act, of_act)

    def forward(self, input: Any) -> Any:
        return self.act(self.drop(super().forward(input)))


def _without_children(norm: nn.BatchNorm2d) -> nn.Module:
    """The norm's own parameters and buffers, as a module."""
    bare = nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    bare._parameters, bare._buffers, bare.training = norm._parameters, norm._buffers, norm.training
    return bare


class SparseGlobalResponseNorm(SparseLayer, nn.Module):
    """Global response norm (GRN), with each sample's norms over its visible pixels."""

    def __init__(self, norm: GlobalResponseNorm) -> None:
        nn.Module.__init__(self)
        self._dense: Callable[..., Tensor] = type(norm).forward
        self.eps, self.spatial_dim, self.channel_dim, self.wb_shape = (
            norm.eps,
            norm.spatial_dim,
            norm.channel_dim,
            norm.wb_shape,
        )
        self.weight, self.bias = (nn.Parameter(value.detach().clone()) for value in (norm.weight, norm.bias))
        take_state(self, norm)

    def forward(self, x: Any) -> Any:
        in_place = is_map(x) and x.dims == ("BHWC" if self.channel_dim == -1 else "BCHW")
        if not in_place or not isinstance(x.features, RowFeatures):
            return self._dense(self, x)
        return x.with_values(_GlobalResponse.apply(x.values, self.weight, self.bias, self.eps))


class _GlobalResponse(torch.autograd.Function):
    """y = x (1 + weight n) + bias of rows (B, L, C), n = |x| / (mean of |x| over the channels + epsilon), |x| over the rows.

    Written by hand, since each pass reads the rows once for sums and once for the result; autograd would keep and read three
    times as much. With a the sum of grad * x over the rows, and m the mean with epsilon:
    d|x| = weight a / m - sum(weight a |x|) / (C m^2), and dx = grad (1 + weight n) + x d|x| / |x|.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, 2, 1, keepdim=True, dtype=wide)
        mean = norm.mean(2, keepdim=True) + epsilon
        ctx.save_for_backward(x, weight, norm, mean)
        return torch.addcmul(bias.to(x.dtype), x, (1 + weight * (norm / mean)).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (x, weight, norm, mean) = grads[0], ctx.saved_tensors
        response = norm / mean
        product = (grad * x).sum(1, keepdim=True, dtype=norm.dtype)
        found = weight * product
        grad_norm = found / mean - (found * norm).mean(2, keepdim=True) / mean**2
        by_x = torch.where(norm > 0, grad_norm / norm, 0).to(x.dtype)
        grad_x = torch.addcmul(grad * (1 + weight * response).to(x.dtype), x, by_x)
        grad_weight = (product * response).sum((0, 1)).to(weight.dtype)
        return grad_x, grad_weight, grad.sum((0, 1), dtype=norm.dtype).to(weight.dtype), None


@FUNCTIONS.form_of("batch_norm")
def batch_norm(x: WorkingMap, *args: Any, **kwargs: Any) -> WorkingMap:
    """Over the visible pixels of the batch."""
    if x.dims != "BCHW":
        raise NotImplementedError(f"batch norm of a map with axes {x.dims} has no sparse form, only of BCHW")
    return x.with_rows(F.batch_norm(x.features.rows(), *args, **kwargs))


@FUNCTIONS.form_of("layer_norm")
def layer_norm(
    x: WorkingMap, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> WorkingMap:
    """Over the channels of each pixel, the last axis."""
    if len(normalized_shape) != 1 or not x.dims.endswith("C"):
        raise NotImplementedError(
            f"layer norm over {tuple(normalized_shape)} of a map {x.dims} has no sparse form, only over channels as the "
            "last axis"
        )
    return x.replace(x.engine.layer_norm(x.flat, weight, bias, eps))


@FUNCTIONS.form_of("rms_norm")
def rms_norm(x: WorkingMap, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> WorkingMap:
    """Over the channels of each pixel, the last axis."""
    if len(normalized_shape) != 1 or not x.dims.endswith("C"):
        raise NotImplementedError(
            f"RMS norm over {tuple(normalized_shape)} of a map {x.dims} has no sparse form, only over channels as the last axis"
        )
    return x.with_rows(F.rms_norm(x.row_axes, normalized_shape, weight, eps))


def _of_each_sample(name: str) -> None:
    """A norm over the visible pixels of each sample (group norm, instance norm), or over channels of each pixel alone."""
    dense, words = getattr(F, name), name.replace("_", " ")

    @FUNCTIONS.form_of(name)
    def norm(x: WorkingMap, *args: Any, **kwargs: Any) -> WorkingMap:
        if x.dims != "BCHW":
            raise NotImplementedError(f"{words} of a map with axes {x.dims} has no sparse form, only of BCHW")
        return x.with_rows(dense(x.row_axes.transpose(1, 2), *args, **kwargs).transpose(1, 2))


for _name in ("group_norm", "instance_norm", "local_response_norm"):
    _of_each_sample(_name)


@FUNCTIONS.form_of("normalize")
def normalize(x: WorkingMap, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> WorkingMap:
    """Channels of unit length."""
    return x.with_rows(F.normalize(x.row_axes, p, 2 + x.channel(dim), eps))
