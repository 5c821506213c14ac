"""What two models see of images, layer by layer, of whole images or of the pixels that their maps keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e2kd.distance import DistanceSums, distance_matrix
from e2kd.perturb import Perturbed, road
from e2kd.perturb.imputation import ranks_nothing
from e2kd.transfer.contrasting import label_rows, read_both
from e2kd.transfer.localizing import Models, Regions
from e2kd.transfer.readings import LayerReading, read


@dataclass(frozen=True)
class LayerFeatures:
    """Features of the same images in both models at one layer, ready for the metrics.

    Attributes:
        layer, base_layer: the names of the student's and the base's layer.
        student, base: [m, d] and [m, e]. Flattened maps, or their means over space if `pooled` was asked for.
        targets: what stands for the labels of these images, [m, d], if there were any.
        rows: which of the n images they are of, bool [n]. Those whose map is constant or not finite in either
            model are left out.
        sums: of "student", "base" and, if there were any, "labels", for `scores_of`.
    """

    layer: str
    base_layer: str
    student: Tensor
    base: Tensor
    targets: Tensor | None
    rows: Tensor
    sums: DistanceSums


def layer_features(
    student: nn.Module,
    base: nn.Module,
    images: Tensor,
    targets: Tensor | None = None,
    layers: Sequence[str | tuple[str, str]] | None = None,
    *,
    regions: Regions | None = None,
    keep: float = 50.0,
    noise: float = 0.01,
    seed: int = 0,
    embeddings: Tensor | None = None,
    base_images: Tensor | None = None,
    pooled: bool = False,
    batch_size: int | None = None,
) -> dict[str, LayerFeatures]:
    """The features that FSS and RS are measured on, by the student's layer name.

    Without regions those of the images as they are, from one forward per model. With regions each model is shown the
    pixels that its map ranks first, the others imputed by ROAD: x_s = f_s(I ∘ H_s) (UniCAM, Eq. 7), which takes an
    imputation and a forward more for every model and layer. The two models then see different pixels of a picture;
    `SameRegions` shows both the student's.

    Args:
        student, base, images, targets, layers, embeddings, base_images, pooled, batch_size: as for `unicam`.
        regions: `UniCAMRegions()`, `GradCAMRegions()`, or a function of your own; None is the whole image.
        keep: percentage of the pixels kept.
        noise, seed: of ROAD's imputation, as for `e2kd.perturb.road`.

    Raises:
        UnsupportedModel: when a layer does not exist or holds no map, or has no gradient for GradCAM.
        ValueError: when targets don't fit, or a model can't take the images.

    >>> make = lambda: nn.Sequential(
    ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> found = layer_features(make(), make(), torch.rand(16, 3, 8, 8), torch.arange(16) % 3, ["1"])
    >>> found["1"].student.shape, found["1"].targets.shape, found["1"].sums.names
    (torch.Size([16, 144]), torch.Size([16, 3]), ('student', 'base', 'labels'))
    """
    features = label_rows(targets, embeddings, len(images))
    given = images if base_images is None else base_images
    readings = read_both(student, base, (images, given), layers, pooled=pooled, batch_size=batch_size)
    models = Models(student, base, (images, given), readings, features)
    return features_of(models, regions, keep=keep, noise=noise, seed=seed, batch_size=batch_size)


def features_of(
    models: Models,
    regions: Regions | None,
    *,
    keep: float = 50.0,
    noise: float = 0.01,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, LayerFeatures]:
    """`layer_features` of models whose whole images were read before."""
    if regions is None:
        whole = torch.ones(len(models.images[0]), dtype=torch.bool)
        return {x.layer: _features((x, y), models.targets, whole) for x, y in _pairs(models)}
    found = {}
    for pair, maps in zip(_pairs(models), regions(models), strict=True):
        blank = ranks_nothing(maps[0]) | ranks_nothing(maps[1]).to(maps[0].device)
        rows = ~blank.cpu()
        shown = [_shown(side, m, rows, keep, noise, seed) for side, m in zip(models.images, maps, strict=True)]
        again = [
            _again(model, side.images, reading, batch_size)
            for model, side, reading in zip((models.student, models.base), shown, pair, strict=True)
        ]
        found[pair[0].layer] = _features((again[0], again[1]), models.targets, rows)
    return found


def _pairs(models: Models) -> list[tuple[LayerReading, LayerReading]]:
    return list(zip(models.readings[0].layers, models.readings[1].layers, strict=True))


def _shown(images: Tensor, maps: Tensor, rows: Tensor, keep: float, noise: float, seed: int) -> Perturbed:
    """The images in question with the pixels that their maps keep."""
    return road(images[rows.to(images.device)], maps[rows.to(maps.device)], keep, noise=noise, seed=seed)


def _again(model: nn.Module, images: Tensor, before: LayerReading, batch_size: int | None) -> LayerReading:
    """The layer's reading of other images; of none at all where no map ranks any pixel."""
    if not len(images):
        return before.of(torch.zeros(0, dtype=torch.long))
    return read(model, images, [before.layer], pooled=before.pooled, batch_size=batch_size).layers[0]


def _features(pair: tuple[LayerReading, LayerReading], targets: Tensor | None, rows: Tensor) -> LayerFeatures:
    student, base = pair
    kept = None if targets is None else targets[rows.to(targets.device)]
    labels = {} if kept is None else {"labels": distance_matrix(kept).to(student.distances.device)}
    sums = DistanceSums.of_distances(student=student.distances, base=base.distances, **labels)
    return LayerFeatures(student.layer, base.layer, student.features, base.features, kept, rows, sums)
