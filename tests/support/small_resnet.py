"""A ResNet whose runs take a tenth of a ResNet-18's time: batch norm, drop path, maps at strides 4, 8, 16 and 32."""

from timm.models.resnet import BasicBlock, ResNet


def resnet(in_channels: int = 3, num_classes: int = 10, drop_path: float = 0.0) -> ResNet:
    """Images (B, C, H, W) to scores (B, classes)."""
    widths = (8, 12, 16, 24)
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes, in_channels, stem_width=8, channels=widths, drop_path_rate=drop_path)
