"""B-cos ViTs: simple ViTs (no class token, mean over tokens), with patches or with a convolutional stem (ViT-C)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from e2kd.bcos.attention import Attention
from e2kd.bcos.convolution import BcosConv2d
from e2kd.bcos.encoding import LogitLayer
from e2kd.bcos.linear import BcosLinear
from e2kd.bcos.norms import LayerNorm
from e2kd.bcos.tokens import Encoder, Patches, conv_stem, positions

EARLY = (64, 128, 128, 256, 256, 512)


class SimpleViT(nn.Module):
    """The part of a B-cos ViT before its logit layer; `bcos_vit` makes the whole.

    Args:
        dim: length of the tokens, divisible by 4 and by `heads`.
        depth: number of encoders.
        heads: of each attention.
        hidden: width of the feed-forward parts.
        num_classes: K.
        patch_size: side of a patch, in pixels; with a stem, in cells of the stem's output.
        stem: channels of the stem's 3x3 convolutions, which halve the size where the channels grow; none without.
        in_channels: 6 for images encoded by `AddInverse`.
        b, max_out: of every B-cos layer.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        num_classes: int = 1000,
        *,
        patch_size: int = 16,
        stem: Sequence[int] = (),
        in_channels: int = 6,
        b: float = 2,
        max_out: int = 1,
    ) -> None:
        super().__init__()
        linear, attention = partial(BcosLinear, b=b, max_out=max_out), partial(Attention, b=b, max_out=max_out)
        self.to_patch_embedding = nn.Sequential()
        if stem:
            layers = conv_stem(in_channels, stem, partial(BcosConv2d, b=b, max_out=max_out))
            self.to_patch_embedding.add_module("conv_stem", layers)
        self.to_patch_embedding.add_module("patches", Patches(patch_size))
        entering = patch_size**2 * (stem[-1] if stem else in_channels)
        self.to_patch_embedding.add_module("linear", linear(entering, dim))
        encoders = [Encoder(dim, heads, hidden, linear, attention) for _ in range(depth)]
        self.transformer = nn.Sequential(OrderedDict({f"encoder_{i}": e for i, e in enumerate(encoders)}))
        self.linear_head = nn.Sequential(OrderedDict(norm=LayerNorm(dim), linear=linear(dim, num_classes)))

    def forward(self, images: Tensor) -> Tensor:
        """[B, in, H, W] -> logits without bias [B, K]."""
        patches = self.to_patch_embedding(images)
        tokens = patches.flatten(1, 2) + positions(patches)
        return self.linear_head(self.transformer(tokens).mean(1))  # type: ignore[no-any-return]


def bcos_vit(
    dim: int, depth: int, heads: int, num_classes: int = 1000, *, logit_bias: float | None = None, **options: Any
) -> nn.Sequential:
    """B-cos ViT: encoded images in [0, 1] -> logits; a SimpleViT and a LogitLayer.

    Args:
        dim, depth, heads: as those of `SimpleViT`.
        num_classes: K.
        logit_bias: -log(K - 1) if None.
        options: those of `SimpleViT`; its `hidden` is `4 * dim` unless given.

    >>> import torch
    >>> bcos_vit(8, 1, 2, num_classes=5)(torch.rand(2, 6, 32, 32)).shape
    torch.Size([2, 5])
    """
    hidden = options.pop("hidden", 4 * dim)
    network = SimpleViT(dim, depth, heads, hidden, num_classes, **options)
    return nn.Sequential(network, LogitLayer.of(num_classes, logit_bias))


def vit_ti(num_classes: int = 1000, **options: Any) -> nn.Sequential:
    """B-cos ViT-Ti/16; the options are those of `bcos_vit`, for all functions of this kind."""
    return bcos_vit(192, 12, 3, num_classes, **options)


def vit_s(num_classes: int = 1000, **options: Any) -> nn.Sequential:
    """B-cos ViT-S/16."""
    return bcos_vit(384, 12, 6, num_classes, **options)


def vit_b(num_classes: int = 1000, **options: Any) -> nn.Sequential:
    """B-cos ViT-B/16."""
    return bcos_vit(768, 12, 12, num_classes, **options)


def vit_l(num_classes: int = 1000, **options: Any) -> nn.Sequential:
    """B-cos ViT-L/16."""
    return bcos_vit(1024, 14, 16, num_classes, **options)


def vitc_ti(num_classes: int = 1000, **options: Any) -> nn.Sequential:
    """B-cos ViT-C-Ti: a convolutional stem in place of one encoder."""
    return bcos_vit(192, 11, 3, num_classes, patch_size=1, stem=(24, 48, 96, 192), **options)


def vitc_s(num_classes: int = 1000, **options: Any) -> nn.Sequential:
    """B-cos ViT-C-S: a convolutional stem in place of one encoder."""
    return bcos_vit(384, 11, 6, num_classes, patch_size=1, stem=(48, 96, 192, 384), **options)


def vitc_b(num_classes: int = 1000, **options: Any) -> nn.Sequential:
    """B-cos ViT-C-B: a convolutional stem in place of one encoder."""
    return bcos_vit(768, 11, 12, num_classes, patch_size=1, stem=EARLY, **options)


def vitc_l(num_classes: int = 1000, **options: Any) -> nn.Sequential:
    """B-cos ViT-C-L: a convolutional stem in place of one encoder."""
    return bcos_vit(1024, 13, 16, num_classes, patch_size=1, stem=EARLY, **options)
