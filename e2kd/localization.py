"""How much of an explanation lies on the object: energy pointing game and intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor

from e2kd.errors import shape
from e2kd.similarity import at_least_float32, resize


def energy_on_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Energy pointing game (Wang et al. 2020): share of a map's positive energy inside the mask, in [0, 1].

    Args:
        maps: [B, 1, h, w]; brought to the masks' size bilinearly, as maps are shown. Only positive values count.
        masks: of the object, [B, H, W], bool or in [0, 1]; a pixel of 1/2 counts half.

    Returns:
        [B]; NaN for a map without positive values or an empty mask.

    Raises:
        ValueError: when the shapes don't fit, or masks have values outside of [0, 1].

    >>> energy_on_mask(torch.ones(1, 1, 2, 2), torch.tensor([[[True, False], [False, False]]]))
    tensor([0.2500])
    """
    energy = on_grid(maps, masks)
    shares = (energy * masks.to(energy)).sum((1, 2)) / energy.sum((1, 2))
    return torch.where(masks.flatten(1).any(1).to(shares.device), shares, torch.nan)


def intersection_over_union(maps: Tensor, masks: Tensor, threshold: float | None = None) -> Tensor:
    """Intersection over union of the object with a map's highest pixels, in [0, 1].

    Pixels of equal height at the cut are not told apart, and those at zero never belong to the map.

    Args:
        maps: [B, 1, h, w]; brought to the masks' size bilinearly.
        masks: of the object, [B, H, W], bool or in [0, 1], cut at 1/2.
        threshold: share of the map's maximum from which on a pixel belongs to it. None cuts the map where it leaves as
            many pixels as the object has, so that nothing has to be chosen.

    Returns:
        [B]; NaN for a map without positive values or an empty mask.

    Raises:
        ValueError: when the shapes don't fit, or masks have values outside of [0, 1].

    >>> intersection_over_union(torch.tensor([[[[3., 2.], [1., 0.]]]]), torch.tensor([[[1, 0], [1, 0]]]))
    tensor([0.3333])
    """
    energy = on_grid(maps, masks).flatten(1)
    inside = masks.flatten(1).to(energy.device) >= 0.5
    count = inside.sum(1, keepdim=True)
    peak = energy.amax(1, keepdim=True)
    if threshold is None:
        cut = energy.sort(1, descending=True).values.gather(1, (count - 1).clamp_min(0))
    else:
        cut = threshold * peak
    chosen = (energy >= cut) & (energy > 0)
    shared, either = ((chosen & inside).sum(1), (chosen | inside).sum(1))
    defined = (peak[:, 0] > 0) & (count[:, 0] > 0)
    return torch.where(defined, shared / either, torch.nan)


def on_grid(maps: Tensor, masks: Tensor) -> Tensor:
    """The maps' positive part on the masks' grid, [B, H, W]."""
    if maps.ndim != 4 or maps.shape[1] != 1 or masks.ndim != 3 or len(maps) != len(masks):
        raise ValueError(
            f"Expected maps [B, 1, h, w] and masks [B, H, W] of the same images, but got {shape(maps.shape)} and "
            f"{shape(masks.shape)}. W(x) of a B-cos network is no map of places: explain it by BcosContributions()."
        )
    if masks.dtype != torch.bool and masks.numel() and not 0 <= float(masks.amin()) <= float(masks.amax()) <= 1:
        raise ValueError(
            f"Expected masks of the object, bool or in [0, 1], but their values are from {float(masks.amin()):g} to "
            f"{float(masks.amax()):g}. Of a trimap or a label map make masks first: trimap == 1."
        )
    return resize(at_least_float32(maps).relu(), (masks.shape[1], masks.shape[2]))[:, 0]
