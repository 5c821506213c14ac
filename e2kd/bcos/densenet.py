"""B-cos DenseNets: no ReLU, average pooling in the stem, the classifier before the global pooling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.bcos.blocks import Layer, init_convolutions
from e2kd.bcos.convolution import BcosConv2d
from e2kd.bcos.encoding import LogitLayer
from e2kd.bcos.norms import BatchNormUncentered2d


class DenseLayer(nn.Module):
    """Norm, 1x1 convolution, norm, 3x3 convolution: adds `growth` channels to what came before."""

    def __init__(self, entering: int, growth: int, bottleneck: int, conv: Layer, norm: Layer) -> None:
        super().__init__()
        self.norm1 = norm(entering)
        self.conv1 = conv(entering, bottleneck * growth)
        self.norm2 = norm(bottleneck * growth)
        self.conv2 = conv(bottleneck * growth, growth, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, entering, h, w] -> [B, growth, h, w]."""
        return self.conv2(self.norm2(self.conv1(self.norm1(x))))  # type: ignore[no-any-return]


class DenseBlock(nn.Module):
    """Layers that each see all channels before them."""

    def __init__(self, depth: int, entering: int, growth: int, bottleneck: int, conv: Layer, norm: Layer) -> None:
        super().__init__()
        for i in range(depth):
            layer = DenseLayer(entering + i * growth, growth, bottleneck, conv, norm)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """[B, entering, h, w] -> [B, entering + depth * growth, h, w]."""
        features = [x]
        for layer in self.children():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """Norm, 1x1 convolution to half of the channels, average pooling to half of the size."""

    def __init__(self, entering: int, conv: Layer, norm: Layer) -> None:
        super().__init__()
        self.norm = norm(entering)
        self.conv = conv(entering, entering // 2)
        self.pool = nn.AvgPool2d(2)


class BcosDenseNet(nn.Module):
    """B-cos DenseNet: encoded images in [0, 1] -> logits.

    Args:
        depths: layers of each block.
        num_classes: K.
        in_channels: 6 for images encoded by `AddInverse`.
        growth: channels that each layer adds.
        width: channels of the stem.
        bottleneck: the inner convolutions of a layer are `bottleneck * growth` wide.
        small_images: a 3x3 stem without norm and pooling, for images like CIFAR's.
        b, max_out: of every B-cos convolution.
        norm: made with the number of channels.
        logit_bias: -log(K - 1) if None.

    >>> BcosDenseNet((2, 2), num_classes=5, growth=4, width=8)(torch.rand(2, 6, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 1000,
        *,
        in_channels: int = 6,
        growth: int = 32,
        width: int = 64,
        bottleneck: int = 4,
        small_images: bool = False,
        b: float = 2,
        max_out: int = 1,
        norm: Layer = BatchNormUncentered2d,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        conv = partial(BcosConv2d, b=b, max_out=max_out)
        self.features = _stem(in_channels, width, small_images, conv, norm)
        channels = width
        for i, depth in enumerate(depths):
            if i > 0:
                self.features.add_module(f"transition{i}", Transition(channels, conv, norm))
                channels //= 2
            block = DenseBlock(depth, channels, growth, bottleneck, conv, norm)
            self.features.add_module(f"denseblock{i + 1}", block)
            channels += depth * growth
        self.features.add_module("norm5", norm(channels))
        self.classifier = conv(channels, num_classes)
        self.logit_layer = LogitLayer.of(num_classes, logit_bias)
        init_convolutions(self, nn.init.kaiming_normal_)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> logits [B, K]."""
        return self.logit_layer(self.classifier(self.features(x)).mean((2, 3)))  # type: ignore[no-any-return]


def _stem(entering: int, width: int, small_images: bool, conv: Layer, norm: Layer) -> nn.Sequential:
    stem = nn.Sequential()
    if small_images:
        stem.add_module("conv0", conv(entering, width, 3, 1, 1))
        return stem
    stem.add_module("conv0", conv(entering, width, 7, 2, 3))
    stem.add_module("norm0", norm(width))
    stem.add_module("pool0", nn.AvgPool2d(3, 2, 1))
    return stem


def densenet121(num_classes: int = 1000, **options: Any) -> BcosDenseNet:
    """B-cos DenseNet-121; the options are those of `BcosDenseNet`, for all functions of this kind."""
    return BcosDenseNet((6, 12, 24, 16), num_classes, **options)


def densenet161(num_classes: int = 1000, **options: Any) -> BcosDenseNet:
    """B-cos DenseNet-161."""
    return BcosDenseNet((6, 12, 36, 24), num_classes, growth=48, width=96, **options)


def densenet169(num_classes: int = 1000, **options: Any) -> BcosDenseNet:
    """B-cos DenseNet-169."""
    return BcosDenseNet((6, 12, 32, 32), num_classes, **options)


def densenet201(num_classes: int = 1000, **options: Any) -> BcosDenseNet:
    """B-cos DenseNet-201."""
    return BcosDenseNet((6, 12, 48, 32), num_classes, **options)
