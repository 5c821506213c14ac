"""Two background textures that differ in one thing only: the orientation of their waves.

A texture is a sum of a few plane waves. In *stripes* all waves of an image run in one direction, in *blobs* each
wave has its own. Wavelengths and phases come from one distribution, every image's heights are replaced by their
ranks (so all images share one histogram exactly), and the two colours between which the heights blend are drawn
alike. A network can tell the classes by the texture, but not by colour, contrast or scale.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

STRIPES = 0
BLOBS = 1
WAVES = 5
WAVELENGTHS = (4.0, 8.0)  # pixels


def uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    """Draws from the uniform distribution on [low, high), as a tensor of the shape."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def angles(textures: Tensor, generator: Generator) -> Tensor:
    """Directions of the waves in radians [N, WAVES]: one for a whole image of stripes, one per wave in blobs."""
    each = uniform((len(textures), WAVES), 0.0, 2 * math.pi, generator)
    return torch.where((textures == STRIPES)[:, None], each[:, :1], each)


def ranked(heights: Tensor) -> Tensor:
    """Each image's values [N, P] by their ranks, evenly spaced in [0, 1].

    >>> ranked(torch.tensor([[0.3, -2.0, 9.0]]))
    tensor([[0.5000, 0.0000, 1.0000]])
    """
    levels = torch.linspace(0, 1, heights.shape[1]).expand_as(heights)
    return torch.empty_like(heights).scatter_(1, heights.argsort(1), levels)


def texture_heights(textures: Tensor, size: int, generator: Generator) -> Tensor:
    """Heights in [0, 1] of the textures [N] (STRIPES or BLOBS): [N, size, size], every image with one histogram."""
    count = len(textures)
    direction = angles(textures, generator)
    frequency = 2 * math.pi / uniform((count, WAVES), *WAVELENGTHS, generator)
    phase = uniform((count, WAVES), 0.0, 2 * math.pi, generator)
    across, down = frequency * direction.cos(), frequency * direction.sin()
    axis = torch.arange(size, dtype=torch.float32)
    # cos(a + b) = cos a cos b - sin a sin b: cosines per row and per column, not per pixel
    columns = across[..., None] * axis
    rows = down[..., None] * axis + phase[..., None]
    waves = rows.cos().transpose(1, 2) @ columns.cos() - rows.sin().transpose(1, 2) @ columns.sin()
    return ranked(waves.flatten(1)).view(count, size, size)


def blend(heights: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Colours the heights [N, h, w] from colour `low` [N, 3] at 0 to `high` [N, 3] at 1: [N, 3, h, w]."""
    return torch.lerp(low[..., None, None], high[..., None, None], heights[:, None])
