"""torchvision's models with weights that hide nothing, short ones of its families, and images for them."""

import copy
from functools import lru_cache
from itertools import pairwise
from pkgutil import resolve_name

import oracle
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import sparkme

# torchvision's own classes with all kinds of blocks that its larger networks have, and a tenth of the weights. The names are
# such as `sparkme.networks.create.create_dense` takes.
BASIC, BOTTLENECK, GROUPED = "random_models:basic", "random_models:bottleneck", "random_models:grouped"
CONVNEXT = "random_models:convnext"


def basic() -> ResNet:
    return ResNet(BasicBlock, [2, 1, 1, 1])


def bottleneck() -> ResNet:
    return ResNet(Bottleneck, [1, 2, 1, 1], width_per_group=16)


def grouped() -> ResNet:
    return ResNet(Bottleneck, [1, 2, 1, 1], groups=8, width_per_group=4)


def convnext() -> ConvNeXt:
    widths = (24, 48, 96, 192, None)
    return ConvNeXt([CNBlockConfig(a, b, 1 + (a == 96)) for a, b in pairwise(widths)])


def random_model(name: str, seed: int = 0) -> nn.Module:
    """A model of torchvision or of a function here, in float64, whose norms and layer scales are not the identity.

    Its values fit into float32.
    """
    torch.manual_seed(seed)
    drop = {"stochastic_depth_prob": 0.0} if name.startswith("convnext") else {}
    model = resolve_name(name)() if ":" in name else torchvision.models.get_model(name, weights=None, **drop)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif key.endswith(("running_mean", "bias")):
                value.normal_(std=0.1)
            elif "layer_scale" in key or value.ndim == 1:
                value.uniform_(0.5, 1.5)
    return model.double()


@lru_cache(maxsize=8)
def _made(name: str, seed: int) -> sparkme.SparseEncoder:
    return sparkme.sparsify(random_model(name, seed).float()).double()  # the trial takes half the time in float32


def random_encoder(name: str, seed: int = 0) -> sparkme.SparseEncoder:
    """The sparse encoder of `random_model(name, seed)`: a copy of one that is made once."""
    return copy.deepcopy(_made(name, seed))


def images_and_mask(batch: int = 2, size: tuple[int, int] = (64, 96), visible: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return images, oracle.random_active(batch, (size[0] // 32, size[1] // 32), visible, seed=seed)


def features_and_gradients(encoder: sparkme.SparseEncoder, images: Tensor, active: Tensor) -> list[Tensor]:
    """The rows of all maps and the gradients of the norms' and the deepest layers' parameters, of a fixed sum."""
    encoder.zero_grad()
    rows = [x.rows for x in encoder(images, active)]
    signs = [torch.arange(r.numel(), device=r.device).view_as(r) % 7 - 3 for r in rows]
    sum((r.double() * s).sum() for r, s in zip(rows, signs, strict=True)).backward()
    return [r.detach() for r in rows] + [p.grad for p in encoder.parameters() if p.grad is not None and p.grad.norm() > 0]
