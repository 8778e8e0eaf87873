"""FCMAE: a sparse encoder, and a decoder of one dense block (Woo et al., ConvNeXt V2, CVPR 2023, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparkme.methods.base import MaskedAutoencoder
from sparkme.methods.decoder import MAX_WIDTH
from sparkme.settings.pretrain import PretrainSettings
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.forms import SparseConv2d, SparseDepthwiseConv2d
from sparkme.sparse.grid import Grid


class FCMAE(MaskedAutoencoder):
    """The network of FCMAE. Its decoder, one ConvNeXt V2 block, takes the deepest map alone.

    GRN takes its norm over the visible pixels of each image. The official sparse encoder takes it over those of the whole
    batch, and the official dense network of fine-tuning over each image.

    Args:
        encoder: from `sparkme.sparsify`; the paper's are timm's `convnextv2_*`. Its weights do not change; `create` initialises
            them with `initialise_encoder`.
        input_size: side of the images, or (height, width), in pixels.
        mask_ratio: share of hidden patches.
        decoder_width: channels of the decoder's block.
        patch: side of a patch in pixels; the encoder's total stride if None.
        normalise_patches: whether the target is each patch less its own mean, over its own deviation, as in the paper
            (section 3, "reconstruction target"). It is off in the official class, and on in main_pretrain.py, which trains it.

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
        from timm.models.convnext import ConvNeXtBlock  # noqa: PLC0415  (half a second, for FCMAE alone)

        super().__init__(encoder, input_size, mask_ratio, patch, normalise_patches=normalise_patches)
        if not 1 <= decoder_width <= MAX_WIDTH:
            raise ValueError(f"decoder width {decoder_width} is outside 1 to {MAX_WIDTH}")
        self.stride = encoder.strides[-1]
        self.projection = nn.Conv2d(encoder.channels[-1], decoder_width, kernel_size=1)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_width, 1, 1))
        self.decoder = ConvNeXtBlock(decoder_width, use_grn=True, ls_init_value=None)
        self.prediction = nn.Conv2d(decoder_width, self.stride**2 * encoder.in_channels, kernel_size=1)
        self._initialise()

    @classmethod
    def create(cls, encoder: SparseEncoder, settings: PretrainSettings) -> FCMAE:
        initialise_encoder(encoder)
        return cls(
            encoder,
            input_size=settings.size,
            mask_ratio=settings.mask_ratio,
            decoder_width=settings.decoder_width,
            patch=settings.patch,
            normalise_patches=settings.norm_pix_loss,
        )

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
        """(B, stride^2 * C, h, w), with channels in the order (y, x, channel), to images (B, C, H, W)."""
        b, _, h, w = blocks.shape
        values = blocks.view(b, self.stride, self.stride, -1, h, w)
        return values.permute(0, 3, 4, 1, 5, 2).reshape(b, -1, h * self.stride, w * self.stride)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initial values of the official decoder (models/fcmae.py, `_init_weights`): the default `trunc_normal_`, whose
        deviation is 1, for convolutions, and torch's own values for linear layers and norms."""
        for layer in (self.projection, self.prediction, *self.decoder.modules()):
            if isinstance(layer, nn.Conv2d):
                nn.init.trunc_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mask_token, std=0.02)


@torch.no_grad()
def initialise_encoder(encoder: SparseEncoder) -> None:
    """Initialises an encoder like the official one (models/convnextv2_sparse.py, `_init_weights`).

    Weights of convolutions and linear layers are truncated normal with deviation .02, their biases zero. Norms and GRN keep
    their layers' values, one and zero. The official code then applies the autoencoder's initialisation to its encoder, too, so
    that stem, depthwise and linear layers end with deviation 1, like the decoder. This function does not: the published weights
    come from other code (TRAINING.md), and layer norms hide most of the difference.
    """
    weight: Tensor
    bias: Tensor | None
    for module in encoder.modules():
        if isinstance(module, SparseConv2d | SparseDepthwiseConv2d):
            weight, bias = module.kernel, module.bias
        elif isinstance(module, nn.Conv2d | nn.Linear):  # also inside a SparseLinear
            weight, bias = module.weight, module.bias
        else:
            continue
        nn.init.trunc_normal_(weight, std=0.02)
        if bias is not None:
            nn.init.zeros_(bias)
