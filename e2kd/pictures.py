"""Maps in colour over images, and images side by side, as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COLORMAP = "inferno"  # dark is zero; keeps its order in grey
SHARE = 0.7  # of colour in an overlay, the rest is the image in grey
GAP = 2  # white pixels between pictures


def displayable(images: Tensor, normalization: tuple[Sequence[float], Sequence[float]] | None = None) -> Tensor:
    """Images as a model expects them [n, C, H, W] -> pictures [n, 3, H, W] in [0, 1] on the CPU.

    Args:
        images: of 1 or 3 channels; of more the first three are shown, of two (grey beside its inverse) the first.
        normalization: (mean, std) they were normalised with; None stretches their range to [0, 1].

    >>> displayable(torch.tensor([-1.0, 3.0]).view(2, 1, 1, 1)).flatten(1)[:, 0]
    tensor([0., 1.])
    """
    found = images.detach().cpu().float()[:, : 1 if images.shape[1] < 3 else 3]
    if normalization is not None:
        mean, std = (torch.tensor(values)[: found.shape[1], None, None] for values in normalization)
        found = found * std + mean
    elif found.numel():
        low, high = found.min(), found.max()
        found = (found - low) / (high - low).clamp_min(torch.finfo(found.dtype).tiny)
    return found.clamp(0, 1).expand(-1, 3, -1, -1) if found.shape[1] == 1 else found.clamp(0, 1)


def enlarge(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures or maps [n, C, h, w] brought to [n, C, H, W] bilinearly, as maps are shown."""
    return F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)


def overlay(pictures: Tensor, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [n, 1, h, w], each by its own maximum, in colour over grey pictures [n, 3, H, W]: [n, 3, *size] in [0, 1].

    Needs matplotlib, for its colours.

    >>> overlay(torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4), (16, 16)).shape
    torch.Size([2, 3, 16, 16])
    """
    from matplotlib import colormaps

    heat = enlarge(maps.detach().cpu().float(), size)[:, 0]
    heat = heat / heat.amax((1, 2), keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    colours = torch.from_numpy(colormaps[COLORMAP](heat.numpy())[..., :3]).float().permute(0, 3, 1, 2)
    grey = enlarge(pictures, size).mean(1, keepdim=True)
    return ((1 - SHARE) * grey + SHARE * colours).clamp(0, 1)


def panel(rows: Sequence[Tensor]) -> Tensor:
    """Rows of as many pictures, each [k, 3, h, w] in [0, 1], as one picture [3, H, W] uint8 with white gaps.

    >>> panel([torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)]).shape
    torch.Size([3, 18, 38])
    """
    lines = [torch.cat(_spaced(list(row), 2), 2) for row in rows]
    return (torch.cat(_spaced(lines, 1), 1) * 255).round().to(torch.uint8)


def _spaced(parts: list[Tensor], dim: int) -> list[Tensor]:
    """Parts [3, h, w] with white between them."""
    white = parts[0].new_ones(*(GAP if axis == dim else side for axis, side in enumerate(parts[0].shape)))
    return [piece for part in parts for piece in (white, part)][1:]
