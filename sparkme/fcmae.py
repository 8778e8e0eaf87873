"""FCMAE: mask, encode sparsely, one dense block, compare (Woo et al., ConvNeXt V2, CVPR 2023, section 3)."""

from __future__ import annotations

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from sparkme.grid import Grid
from sparkme.masked import MaskedAutoencoder
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.forms import SparseConv2d, SparseDepthwiseConv2d, SparseLinear


class FCMAE(MaskedAutoencoder):
    """The network that is pretrained: like `SparK`, with the deepest map alone and one ConvNeXt V2 block as its decoder.

    The official sparse encoder takes the norm in its GRN over the visible pixels of the whole batch, the dense network that
    is fine-tuned over each image; ours is over the visible pixels of each image.

    Args:
        encoder: from `sparkme.sparsify`; the paper's are timm's `convnextv2_*`.
        input_size: side of the images, or (height, width), in pixels.
        mask_ratio: share of patches to hide.
        decoder_width: channels of the decoder's block.
        patch: side of a patch in pixels; the encoder's total stride if None.
        normalise_patches: as the paper has it ("the target is a patch-wise normalized image", section 3.1); its code leaves
            it off unless told.

    Raises:
        ValueError: sizes or ratio do not fit together.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        *,
        input_size: int | tuple[int, int] = 224,
        mask_ratio: float = 0.6,
        decoder_width: int = 512,
        patch: int | None = None,
        normalise_patches: bool = True,
    ) -> None:
        super().__init__(encoder, input_size, mask_ratio, patch, normalise_patches=normalise_patches)
        self.stride = encoder.strides[-1]
        self.projection = nn.Conv2d(encoder.channels[-1], decoder_width, kernel_size=1)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_width, 1, 1))
        self.decoder = ConvNeXtBlock(decoder_width, use_grn=True, ls_init_value=None)
        self.prediction = nn.Conv2d(decoder_width, self.stride**2 * encoder.in_channels, kernel_size=1)
        self._initialise()

    def num_visible(self, num_patches: int, mask_ratio: float) -> int:
        """`int(num_patches * (1 - mask_ratio))`, as in the official code (models/fcmae.py), where SparK rounds."""
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask ratio {mask_ratio} is outside [0, 1]")
        keep = int(num_patches * (1 - mask_ratio))
        if keep == 0:
            raise ValueError(f"mask ratio {mask_ratio} leaves none of {num_patches} patches visible; lower it")
        return keep

    def predict(self, images: Tensor, grid: Grid) -> Tensor:
        deepest = self.encoder.encode(images, grid)[-1]
        rows = nn.functional.linear(deepest.rows, self.projection.weight.flatten(1), self.projection.bias)
        dense = deepest.engine.densify(rows, grid, self.stride, self.mask_token.flatten())
        return self._pixels(self.prediction(self.decoder(dense)))

    def _pixels(self, blocks: Tensor) -> Tensor:
        """(B, stride^2 * C, h, w), where an output's values are ordered (y, x, channel), as an image (B, C, H, W)."""
        b, _, h, w = blocks.shape
        values = blocks.view(b, self.stride, self.stride, -1, h, w)
        return values.permute(0, 3, 4, 1, 5, 2).reshape(b, -1, h * self.stride, w * self.stride)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initial values of the official code (models/fcmae.py, `_init_weights`)."""
        for module in self.encoder.modules():
            if isinstance(module, SparseConv2d | SparseDepthwiseConv2d):
                nn.init.trunc_normal_(module.kernel, std=0.02)
            elif isinstance(module, SparseLinear):
                nn.init.trunc_normal_(module.linear.weight, std=0.02)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            else:
                continue
            bias = module.linear.bias if isinstance(module, SparseLinear) else module.bias
            if bias is not None:
                nn.init.zeros_(bias)
        for layer in (self.projection, self.prediction, *self.decoder.modules()):
            if isinstance(layer, nn.Conv2d):
                nn.init.trunc_normal_(layer.weight)  # of deviation 1
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mask_token, std=0.02)
