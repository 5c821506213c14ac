"""B-cos ResNets: no ReLU, average pooling in the stem, the classifier before the global pooling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from e2kd.bcos.blocks import BasicBlock, Bottleneck, Layer, init_convolutions, rising
from e2kd.bcos.convolution import BcosConv2d
from e2kd.bcos.encoding import LogitLayer
from e2kd.bcos.norms import BatchNormUncentered2d


class BcosResNet(nn.Module):
    """B-cos ResNet or ResNeXt: encoded images in [0, 1] -> logits.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of each stage; the width doubles from stage to stage.
        num_classes: K.
        in_channels: 6 for images encoded by `AddInverse`.
        width: channels of the stem.
        groups, group_width: of the bottlenecks' 3x3 convolutions (ResNeXt).
        small_images: a 3x3 stem without pooling, for images like CIFAR's.
        b, max_out: of every B-cos convolution.
        norm: made with the number of channels.
        drop_path: share of samples that leave out the last block; earlier blocks less, linearly.
        logit_bias: -log(K - 1) if None.

    >>> import torch
    >>> BcosResNet(BasicBlock, (1, 1), num_classes=5, width=8)(torch.rand(2, 6, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        *,
        in_channels: int = 6,
        width: int = 64,
        groups: int = 1,
        group_width: int = 64,
        small_images: bool = False,
        b: float = 2,
        max_out: int = 1,
        norm: Layer = BatchNormUncentered2d,
        drop_path: float = 0.0,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        conv = partial(BcosConv2d, b=b, max_out=max_out)
        self.conv1 = conv(in_channels, width, 3, 1, 1) if small_images else conv(in_channels, width, 7, 2, 3)
        self.bn1 = norm(width)
        self.pool = nn.Identity() if small_images else nn.AvgPool2d(3, 2, 1)
        drops, entering, self.stages = iter(rising(drop_path, sum(depths))), width, len(depths)
        for i, depth in enumerate(depths):
            planes, blocks = width * 2**i, []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(entering, planes, stride, conv, norm, next(drops), groups, group_width))
                entering = planes * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = conv(entering, num_classes)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.logit_layer = LogitLayer.of(num_classes, logit_bias)
        init_convolutions(self, partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"))

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> features before the classifier [B, C, h, w]."""
        x = self.pool(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> logits [B, K]."""
        return self.logit_layer(self.avgpool(self.fc(self.forward_features(x))).flatten(1))  # type: ignore[no-any-return]


def resnet18(num_classes: int = 1000, **options: Any) -> BcosResNet:
    """B-cos ResNet-18; the options are those of `BcosResNet`, for all functions of this kind."""
    return BcosResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int = 1000, **options: Any) -> BcosResNet:
    """B-cos ResNet-34."""
    return BcosResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int = 1000, **options: Any) -> BcosResNet:
    """B-cos ResNet-50."""
    return BcosResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


def resnet101(num_classes: int = 1000, **options: Any) -> BcosResNet:
    """B-cos ResNet-101."""
    return BcosResNet(Bottleneck, (3, 4, 23, 3), num_classes, **options)


def resnet152(num_classes: int = 1000, **options: Any) -> BcosResNet:
    """B-cos ResNet-152."""
    return BcosResNet(Bottleneck, (3, 8, 36, 3), num_classes, **options)


def resnext50(num_classes: int = 1000, **options: Any) -> BcosResNet:
    """B-cos ResNeXt-50 32x4d."""
    return BcosResNet(Bottleneck, (3, 4, 6, 3), num_classes, groups=32, group_width=4, **options)


def resnet20(num_classes: int = 10, **options: Any) -> BcosResNet:
    """B-cos ResNet-20 for images of 32 pixels."""
    return BcosResNet(BasicBlock, (3, 3, 3), num_classes, width=16, small_images=True, **options)


def resnet32(num_classes: int = 10, **options: Any) -> BcosResNet:
    """B-cos ResNet-32 for images of 32 pixels."""
    return BcosResNet(BasicBlock, (5, 5, 5), num_classes, width=16, small_images=True, **options)


def resnet56(num_classes: int = 10, **options: Any) -> BcosResNet:
    """B-cos ResNet-56 for images of 32 pixels."""
    return BcosResNet(BasicBlock, (9, 9, 9), num_classes, width=16, small_images=True, **options)
