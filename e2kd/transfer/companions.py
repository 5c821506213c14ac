"""How much of a UniCAM map is the image's own, and how much its companions' in the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from e2kd.transfer.contrasting import UniCAM, contrast
from e2kd.transfer.readings import Reading
from e2kd.transfer.targets import label_features
from e2kd.transfer.unique import Objective


class Stability(NamedTuple):
    """Mean correlation of every image's maps among different companions, [n] in [-1, 1]; NaN where they are blank."""

    distilled: Tensor
    residual: Tensor


def stability(
    student: Reading,
    base: Reading,
    targets: Tensor | None = None,
    *,
    embeddings: Tensor | None = None,
    objective: Objective | None = None,
    draws: int = 4,
    seed: int = 0,
) -> dict[str, Stability]:
    """How alike an image's maps are among different companions, by layer: 1 if they are the image's own.

    The batch is halved at random, `draws` times, and every half explained on its own; the maps an image got among
    different halves are correlated (Pearson). It tells of batches of half the size: those of the whole are steadier.
    Costs no forward.

    Args:
        student, base: from `e2kd.transfer.read`, of the same n images; 8 or more, for halves of 4.
        targets, embeddings, objective: as for `unicam`.
        draws: of halves, 2 or more.
        seed: of the draws. The global random state stays as it is.

    >>> from torch import nn
    >>> from e2kd.transfer.readings import read
    >>> make = lambda: nn.Sequential(
    ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> images = torch.rand(16, 3, 8, 8)
    >>> found = stability(read(make(), images, ["1"]), read(make(), images, ["1"]), torch.arange(16) % 3)
    >>> found["1"].distilled.shape
    torch.Size([16])
    """
    if draws < 2:
        raise ValueError(f"Expected 2 draws or more to compare, but got {draws}.")
    features = None if targets is None else label_features(targets, embeddings)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[tuple[Tensor, Tensor]]] = []  # of every draw, the maps of every layer in both directions
    for _ in range(draws):
        order = torch.randperm(student.count, generator=generator)
        halves = order.tensor_split(2)
        found = [_half(student, base, features, half, objective) for half in halves]
        drawn.append([_joined(layer, order) for layer in zip(*found, strict=True)])
    layers = zip(*drawn, strict=True)
    return {x.layer: _agreement(maps) for x, maps in zip(student.layers, layers, strict=True)}


def _half(
    student: Reading, base: Reading, features: Tensor | None, rows: Tensor, objective: Objective | None
) -> list[tuple[UniCAM, UniCAM]]:
    """Both directions of every layer for some of the images."""
    some = None if features is None else features[rows.to(features.device)]
    found = contrast(student.of(rows), base.of(rows), some, objective)
    return [(layer.distilled, layer.residual) for layer in found.layers.values()]


def _joined(halves: tuple[tuple[UniCAM, UniCAM], ...], order: Tensor) -> tuple[Tensor, Tensor]:
    """The halves' maps, flattened to [n, hw], back in the order of the images."""
    back = order.argsort()
    distilled, residual = (torch.cat([half[k].maps.flatten(1) for half in halves]) for k in range(2))
    return distilled[back.to(distilled.device)], residual[back.to(residual.device)]


def _agreement(draws: tuple[tuple[Tensor, Tensor], ...]) -> Stability:
    return Stability(*(_mean_correlation(torch.stack([draw[k] for draw in draws])) for k in range(2)))


def _mean_correlation(maps: Tensor) -> Tensor:
    """Mean Pearson correlation between the draws of maps [draws, n, hw] -> [n]."""
    centred = maps.double() - maps.double().mean(-1, keepdim=True)
    norms = centred.norm(dim=-1, keepdim=True)
    unit = torch.where(norms > 0, centred / torch.where(norms > 0, norms, 1.0), torch.nan)
    first, second = torch.triu_indices(len(maps), len(maps), 1).to(maps.device)
    return (unit[first] * unit[second]).sum(-1).nanmean(0)
