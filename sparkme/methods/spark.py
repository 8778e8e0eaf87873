"""SparK: a sparse encoder, densified maps, and a dense UNet decoder (Tian et al., ICLR 2023, figure 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sparkme.methods.base import MaskedAutoencoder
from sparkme.methods.decoder import Decoder
from sparkme.methods.masking import num_visible
from sparkme.settings.pretrain import PretrainSettings
from sparkme.sparse.batch_norm import use_operators
from sparkme.sparse.encoder import SparseEncoder
from sparkme.sparse.fusion import densified
from sparkme.sparse.grid import Grid
from sparkme.sparse.map import SparseMap
from sparkme.weights.spark import split_official_state


class SparK(MaskedAutoencoder):
    """The network of SparK.

    Args:
        encoder: from `sparkme.sparsify`.
        input_size: side of the images, or (height, width), in pixels.
        mask_ratio: share of hidden patches.
        decoder_width: channels of the decoder's input, halved by every block.
        densify_norm: norm of the encoder's maps before mask tokens are added: `bn` (ResNet), `ln` (ConvNeXt), `none`, or `auto`
            for the encoder's own kind.
        patch: side of a patch in pixels; the encoder's total stride if None.

    Raises:
        ValueError: sizes, ratio or width do not fit together.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        *,
        input_size: int | tuple[int, int] = 224,
        mask_ratio: float = 0.6,
        decoder_width: int = 768,
        densify_norm: str = "auto",
        patch: int | None = None,
    ) -> None:
        super().__init__(encoder, input_size, mask_ratio, patch)
        stride = encoder.strides[-1]
        self.decoder = Decoder(stride, decoder_width, encoder.in_channels)
        self.densify_norms, self.densify_projs = nn.ModuleList(), nn.ModuleList()
        self.mask_tokens = nn.ParameterList()
        norm = encoder.norm if densify_norm == "auto" else densify_norm
        if norm not in DENSIFY_NORMS:
            raise ValueError(f"unknown densify norm {densify_norm!r}; choose one of auto, {', '.join(DENSIFY_NORMS)}")
        # Deepest first, as in the decoder; a map of level i has 2^i times the resolution of the deepest one.
        self.levels = [round(math.log2(stride / s)) for s in reversed(encoder.strides)]
        for i, channels in zip(self.levels, reversed(encoder.channels), strict=True):
            token = torch.empty(1, channels, 1, 1)
            self.mask_tokens.append(nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02))
            self.densify_norms.append(DENSIFY_NORMS[norm](channels))
            self.densify_projs.append(_projection(channels, decoder_width >> i, deepest=i == 0))
        # Densified maps are channels_last, which is also fastest for convolutions.
        self.densify_projs.to(memory_format=torch.channels_last)
        self.decoder.to(memory_format=torch.channels_last)

    @classmethod
    def create(cls, encoder: SparseEncoder, settings: PretrainSettings) -> SparK:
        return cls(
            encoder,
            input_size=settings.size,
            mask_ratio=settings.mask_ratio,
            decoder_width=settings.decoder_width,
            densify_norm=settings.densify_norm,
            patch=settings.patch,
        )

    def num_visible(self, num_patches: int, mask_ratio: float) -> int:
        return num_visible(num_patches, mask_ratio)

    def predict(self, images: Tensor, grid: Grid) -> Tensor:
        return self.decode(self.encode(images, grid))

    def encode(self, images: Tensor, grid: Grid) -> list[SparseMap]:
        """The encoder's maps of the visible pixels, shallow to deep."""
        return self.encoder.encode(images, grid)

    def decode(self, maps: list[SparseMap]) -> Tensor:
        """The prediction (B, C, H, W) from the encoder's maps, shallow to deep."""
        dense = self.densify(maps)
        use_operators(self.decoder, maps[0].engine.fuses_norms(dense[0].dtype, dense[0].device))
        prediction: Tensor = self.decoder(dense)
        return prediction

    def densify(self, maps: list[SparseMap]) -> dict[int, Tensor]:
        """Normalises visible pixels, sets hidden ones to a mask token, and projects to the decoder's widths.

        Args:
            maps: the encoder's maps, shallow to deep.

        Returns:
            Dense maps (B, decoder_width / 2^i, H / s, W / s) by i, deepest first.
        """
        dense = {}
        for level, x, norm, token, projection in zip(
            self.levels, reversed(maps), self.densify_norms, self.mask_tokens, self.densify_projs, strict=True
        ):
            dense[level] = densified(x, norm(x.rows), token.flatten(), projection)
        return dense

    def load_official_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads weights with the official SparK names, of a whole network or an encoder alone.

        Raises:
            ValueError: names are missing, unknown, or have another shape.
        """
        encoder, rest = split_official_state(state)
        self.encoder.load_dense_state_dict(encoder)
        if rest:
            try:
                missing, unexpected = self.load_state_dict(rest, strict=False)
            except RuntimeError as error:
                raise ValueError(f"weights of another network: {error}") from None
            missing = [name for name in missing if not name.startswith("encoder.")]
            if missing or unexpected:
                raise ValueError(f"weights of another network: missing {missing[:5]}, unexpected {unexpected[:5]}")


# Norms of (N, C) rows; LayerNorm has ConvNeXt's epsilon.
DENSIFY_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm1d,
    "ln": partial(nn.LayerNorm, eps=1e-6),
    "none": nn.Identity,
}


def _projection(channels: int, width: int, *, deepest: bool) -> nn.Module:
    """1x1 at the deepest scale, or none if the widths are equal; 3x3 elsewhere (spark.py:63-70)."""
    if deepest and channels == width:
        return nn.Identity()
    kernel_size = 1 if deepest else 3
    return nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
