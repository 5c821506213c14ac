"""What B-cos ViTs are built of: patches, places, stems and encoders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from e2kd.bcos.blocks import Layer
from e2kd.bcos.norms import LayerNorm, LayerNorm2d
from e2kd.errors import shape


class Patches(nn.Module):
    """Cuts maps into patches: [B, C, H, W] -> [B, H/p, W/p, p * p * C], with channels last inside of a patch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H/p, W/p, p * p * C]."""
        p = self.size
        if x.ndim != 4 or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"Expected images [B, C, H, W] with sides divisible by {p}, but got {shape(x.shape)}.")
        cells: Tensor = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, H/p, p, W/p, p]
        return cells.permute(0, 2, 4, 3, 5, 1).flatten(3)


class Encoder(nn.Module):
    """Attention and a feed-forward part of two B-cos layers, each beside the identity."""

    def __init__(self, dim: int, heads: int, hidden: int, linear: Layer, attention: Layer) -> None:
        super().__init__()
        self.attn = attention(dim, heads)
        layers = OrderedDict(norm=LayerNorm(dim), linear1=linear(dim, hidden), linear2=linear(hidden, dim))
        self.ff = nn.Sequential(OrderedDict(net=nn.Sequential(layers)))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, dim]."""
        tokens = tokens + self.attn(tokens)
        return tokens + self.ff(tokens)  # type: ignore[no-any-return]


def positions(patches: Tensor, temperature: float = 10_000) -> Tensor:
    """Sines and cosines of the places of patches [B, h, w, dim]: [h * w, dim], in the type of the patches.

    >>> positions(torch.zeros(1, 2, 2, 8)).shape
    torch.Size([4, 8])
    """
    height, width, dim = patches.shape[-3:]
    if dim % 4 or dim < 8:
        raise ValueError(f"Expected tokens of a length divisible by 4 and at least 8, but got {dim}.")
    device = patches.device
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    rates = 1 / temperature ** (torch.arange(dim // 4, device=device) / (dim // 4 - 1))
    angles = [axis.flatten()[:, None] * rates for axis in (x, y)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).to(patches.dtype)


def conv_stem(entering: int, widths: Sequence[int], conv: Layer) -> nn.Sequential:
    """3x3 B-cos convolutions with norms, which halve the size where the channels grow ("early convolutions").

    >>> from e2kd.bcos import BcosConv2d
    >>> conv_stem(6, (8, 8), BcosConv2d)(torch.rand(1, 6, 16, 16)).shape
    torch.Size([1, 8, 8, 8])
    """
    layers: list[nn.Module] = []
    for width in widths:
        # The identity, an activation in standard networks, keeps the places, hence the keys, of the official ones.
        layers += [conv(entering, width, 3, 2 if width > entering else 1, 1), LayerNorm2d(width), nn.Identity()]
        entering = width
    return nn.Sequential(*layers)
