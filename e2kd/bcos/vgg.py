"""B-cos VGGs: no ReLU, average pooling, a convolutional classifier before the global pooling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from e2kd.bcos.blocks import Layer, init_convolutions
from e2kd.bcos.convolution import BcosConv2d
from e2kd.bcos.encoding import LogitLayer
from e2kd.bcos.norms import BatchNormUncentered2d

WIDTHS = (64, 128, 256, 512, 512)


class BcosVGG(nn.Module):
    """B-cos VGG: encoded images in [0, 1] -> logits.

    Args:
        depths: convolutions of each of the stages, which end with pooling.
        num_classes: K.
        in_channels: 6 for images encoded by `AddInverse`.
        widths: channels of each stage.
        hidden: channels of the classifier.
        b, max_out: of every B-cos convolution.
        norm: made with the number of channels; `BatchNormUncentered2d` makes the released `_bnu` networks, None
            those without norms, which load released weights but can't be trained from random ones: filters have norm
            1, so no initialisation changes that with b = 2 a layer multiplies its input by about sqrt(3 / fan-in), a
            thirteenth for 64 channels, and what is left after a few layers drowns in the 1e-6 of the patch norm.
        logit_bias: -log(K - 1) if None.

    >>> import torch
    >>> BcosVGG((1, 1), num_classes=5, widths=(4, 8), hidden=16)(torch.rand(2, 6, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 1000,
        *,
        in_channels: int = 6,
        widths: Sequence[int] = WIDTHS,
        hidden: int = 4096,
        b: float = 2,
        max_out: int = 1,
        norm: Layer | None = BatchNormUncentered2d,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        conv = partial(BcosConv2d, b=b, max_out=max_out)
        layers: list[nn.Module] = []
        entering = in_channels
        for depth, width in zip(depths, widths, strict=True):
            for _ in range(depth):
                # Without norms an identity keeps the places, hence the keys, of the official networks.
                layers += [conv(entering, width, 3, 1, 1), nn.Identity() if norm is None else norm(width)]
                entering = width
            layers.append(nn.AvgPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            conv(entering, hidden, 7, 1, 3), conv(hidden, hidden), conv(hidden, num_classes)
        )
        self.logit_layer = LogitLayer.of(num_classes, logit_bias)
        init_convolutions(self, partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> logits [B, K]."""
        return self.logit_layer(self.classifier(self.features(x)).mean((2, 3)))  # type: ignore[no-any-return]


def vgg11(num_classes: int = 1000, **options: Any) -> BcosVGG:
    """B-cos VGG-11; the options are those of `BcosVGG`, for all functions of this kind."""
    return BcosVGG((1, 1, 2, 2, 2), num_classes, **options)


def vgg13(num_classes: int = 1000, **options: Any) -> BcosVGG:
    """B-cos VGG-13."""
    return BcosVGG((2, 2, 2, 2, 2), num_classes, **options)


def vgg16(num_classes: int = 1000, **options: Any) -> BcosVGG:
    """B-cos VGG-16."""
    return BcosVGG((2, 2, 3, 3, 3), num_classes, **options)


def vgg19(num_classes: int = 1000, **options: Any) -> BcosVGG:
    """B-cos VGG-19."""
    return BcosVGG((2, 2, 4, 4, 4), num_classes, **options)
