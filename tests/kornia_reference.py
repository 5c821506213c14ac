"""The slow way to augment a map, through Kornia itself: blown up to the image, warped as a mask, averaged per cell."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.augment import JointAugmentation
from e2kd.taught import Taught

GRIDS = [(1, 7), (1, 14), (6, 56)]  # channels and cells per side: GradCAM of a CNN, of a ViT, B-cos


def smooth_maps(batch: int, channels: int, cells: int, seed: int = 0) -> Tensor:
    """Non-negative blobs, as GradCAM has them."""
    coarse = torch.rand(batch, channels, 3, 3, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (cells, cells), mode="bicubic", align_corners=False).clamp(min=0)


def rough_maps(batch: int, channels: int, cells: int, seed: int = 0) -> Tensor:
    """No cell knows of its neighbours."""
    return torch.rand(batch, channels, cells, cells, generator=torch.Generator().manual_seed(seed))


def taught(maps: Tensor, valid: Tensor | None = None) -> Taught:
    """Maps as a FrozenDataset's batch brings them."""
    batch = len(maps)
    valid = torch.ones_like(maps[:, :1]) if valid is None else valid
    return Taught(torch.arange(batch), torch.zeros(batch, 10), maps, valid, torch.zeros(batch, dtype=torch.int64))


def augmented(
    augmentation: JointAugmentation, maps: Tensor, size: tuple[int, int], seed: int = 1
) -> tuple[Tensor, Taught, list[Any]]:
    """Images, maps and the parameters of one seeded draw."""
    images = torch.rand(len(maps), 3, *size, generator=torch.Generator().manual_seed(seed))
    targets = taught(maps)
    torch.manual_seed(seed)
    params = augmentation.operations.forward_parameters(images.shape)
    torch.manual_seed(seed)
    return *augmentation(images, targets), params


def reference(augmentation: JointAugmentation, params: list[Any], maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The same draw done to a map as large as the image."""
    large = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    moved = augmentation.operations(large, params=params, data_keys=["mask"])
    return F.interpolate(moved, maps.shape[-2:], mode="area")


def mean_error(augmentation: JointAugmentation, maps: Tensor, size: tuple[int, int], seed: int = 1) -> float:
    """Mean of 1 - cosine over the maps of one draw; a map that was erased altogether has to be zero in both."""
    _, got, params = augmented(augmentation, maps, size, seed)
    expected = reference(augmentation, params, maps, size)
    alive = expected.flatten(1).any(1)
    assert not got.maps[~alive].any()
    return (1 - F.cosine_similarity(got.maps.flatten(1), expected.flatten(1))).where(alive, 0).mean().item()
