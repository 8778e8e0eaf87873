"""The smallest ConvNeXt and ConvNeXt V2, by names that `sparkme.networks.create.create_dense` takes."""

from itertools import pairwise

import torchvision
from timm.models.convnext import ConvNeXt
from torchvision.models.convnext import CNBlockConfig

V1, V2 = "official_networks:convnext", "official_networks:convnextv2"


def convnext(drop_path: float = 0.0) -> torchvision.models.ConvNeXt:
    widths = (8, 12, 16, 24, None)
    blocks = [CNBlockConfig(a, b, 1 + (a == 16)) for a, b in pairwise(widths)]
    return torchvision.models.ConvNeXt(blocks, stochastic_depth_prob=drop_path, layer_scale=0.5)


def convnextv2(drop_path: float = 0.0) -> ConvNeXt:
    dims = (8, 12, 16, 24)
    return ConvNeXt(depths=(1, 1, 2, 1), dims=dims, use_grn=True, ls_init_value=None, drop_path_rate=drop_path, num_classes=0)
