"""B-cos ConvNeXts: depthwise B-cos convolutions, no GELU, the classifier before the global pooling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.bcos.blocks import DropPath, Layer, init_convolutions, rising
from e2kd.bcos.convolution import BcosConv2d
from e2kd.bcos.encoding import LogitLayer
from e2kd.bcos.norms import PositionNorm2d


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm, 1x1 to four times the width and back, scaled per channel, beside the identity."""

    def __init__(self, width: int, layer_scale: float, conv: Layer, norm: Layer, drop: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv(width, width, 7, 1, 3, groups=width), norm(width), conv(width, 4 * width), conv(4 * width, width)
        )
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), layer_scale))
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        return x + self.drop_path(self.layer_scale * self.block(x))  # type: ignore[no-any-return]


class BcosConvNeXt(nn.Module):
    """B-cos ConvNeXt: encoded images in [0, 1] -> logits.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
        num_classes: K.
        in_channels: 6 for images encoded by `AddInverse`.
        b, max_out: of every B-cos convolution.
        norm: made with the number of channels; None is the position norm with eps 1e-6 of the released `_pn`
            networks, `BatchNormUncentered2d` makes the `_bnu` networks.
        layer_scale: initial weight of each block.
        drop_path: share of samples that leave out the last block; earlier blocks less, linearly.
        logit_bias: -log(K - 1) if None.

    >>> BcosConvNeXt((1, 1), (4, 8), num_classes=5)(torch.rand(2, 6, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 1000,
        *,
        in_channels: int = 6,
        b: float = 2,
        max_out: int = 1,
        norm: Layer | None = None,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        conv = partial(BcosConv2d, b=b, max_out=max_out)
        norm = partial(PositionNorm2d, eps=1e-6) if norm is None else norm
        layers: list[nn.Module] = [conv(in_channels, widths[0], 4, 4), norm(widths[0])]
        drops, entering = iter(rising(drop_path, sum(depths))), widths[0]
        for depth, width in zip(depths, widths, strict=True):
            if len(layers) > 2:
                layers.append(nn.Sequential(norm(entering), conv(entering, width, 2, 2)))
            blocks = [ConvNeXtBlock(width, layer_scale, conv, norm, next(drops)) for _ in range(depth)]
            layers.append(nn.Sequential(*blocks))
            entering = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(norm(entering), conv(entering, num_classes))
        self.logit_layer = LogitLayer.of(num_classes, logit_bias)
        init_convolutions(self, partial(nn.init.trunc_normal_, std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> logits [B, K]."""
        return self.logit_layer(self.classifier(self.features(x)).mean((2, 3)))  # type: ignore[no-any-return]


def convnext_tiny(num_classes: int = 1000, **options: Any) -> BcosConvNeXt:
    """B-cos ConvNeXt-T; the options are those of `BcosConvNeXt`, for all functions of this kind."""
    return BcosConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), num_classes, **options)


def convnext_small(num_classes: int = 1000, **options: Any) -> BcosConvNeXt:
    """B-cos ConvNeXt-S."""
    return BcosConvNeXt((3, 3, 27, 3), (96, 192, 384, 768), num_classes, **options)


def convnext_base(num_classes: int = 1000, **options: Any) -> BcosConvNeXt:
    """B-cos ConvNeXt-B."""
    return BcosConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024), num_classes, **options)


def convnext_large(num_classes: int = 1000, **options: Any) -> BcosConvNeXt:
    """B-cos ConvNeXt-L."""
    return BcosConvNeXt((3, 3, 27, 3), (192, 384, 768, 1536), num_classes, **options)
