"""UniCAM: where a student sees what its base does not, and what it left behind, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e2kd.distance import PAPERS, DistanceSums, distance_matrix
from e2kd.distance.centring import FEWEST, NONE
from e2kd.errors import check_batch_size, check_names, shape, taking_images, warn_user
from e2kd.transfer.readings import LayerReading, Reading, read
from e2kd.transfer.targets import label_features
from e2kd.transfer.unique import (
    LABEL_FREE,
    Objective,
    channel_weights,
    papers_scaled,
    relevance,
    scaled,
    unlikeness,
    weighted,
)

FEW = 16  # images below which a map says more about its companions than about its image

OTHER_IMAGES = "Pass the same pictures as it expects them: images= for the student, base_images= for the base."


@dataclass(frozen=True)
class UniCAM:
    """The maps of one direction at one layer.

    Attributes:
        maps: [n, 1, h, w] in [0, 1] on the layer's grid, every map scaled to its own range; blank ones are 0.
        weights: of the channels, [n, C] float64; the sum of a channel's over the images is 0.
        score: what the maps are the gradient of. With labels the semi-partial R* of the features and the labels.
        blank: whose map is all zero, bool [n]. Leave these images out of what follows.
        reason: why there is no score and all maps are blank, in words; empty if there is one.
    """

    maps: Tensor
    weights: Tensor
    score: float
    blank: Tensor
    reason: str = ""


@dataclass(frozen=True)
class Transfer:
    """What was transferred at one layer.

    Attributes:
        layer, base_layer: the names of the student's and the base's layer.
        distilled: what the student sees beyond the base, on the student's features.
        residual: what the base sees beyond the student, on the base's features.
        sums: of "student", "base" and, if there were any, "labels": FSS is `sums.score("student", "base")`, RS
            `sums.score("student", "labels")`, on the features as they are.
    """

    layer: str
    base_layer: str
    distilled: UniCAM
    residual: UniCAM
    sums: DistanceSums


@dataclass(frozen=True)
class UniCAMResult:
    """All layers of a comparison of n images, by the student's layer name.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> found = unicam(net, net, torch.rand(16, 3, 8, 8), torch.arange(16) % 3, layers=["1"])
    >>> found.distilled["1"].reason
    'student differs from base by nothing but scale'
    """

    layers: dict[str, Transfer]
    n: int

    @property
    def distilled(self) -> dict[str, UniCAM]:
        """What the student sees beyond the base, by layer."""
        return {name: layer.distilled for name, layer in self.layers.items()}

    @property
    def residual(self) -> dict[str, UniCAM]:
        """What the base sees beyond the student, by layer."""
        return {name: layer.residual for name, layer in self.layers.items()}


def unicam(
    student: nn.Module,
    base: nn.Module,
    images: Tensor,
    targets: Tensor | None = None,
    layers: Sequence[str | tuple[str, str]] | None = None,
    *,
    embeddings: Tensor | None = None,
    base_images: Tensor | None = None,
    objective: Objective | None = None,
    pooled: bool = False,
    batch_size: int | None = None,
    papers: bool = False,
) -> UniCAMResult:
    """UniCAM: where a distilled student sees what its base does not, and the other way round, at any layers.

    One forward per model without gradients gives all layers and both directions. A map is a statement about a batch:
    with other companions the map of an image is another one (see `e2kd.transfer.stability`), so use one fixed batch of
    64 images or more. Results carry no graph; the models stay as they were.

    Args:
        student: the model that was distilled.
        base: what it is compared with: the paper's is the same architecture trained without distillation, its code's is
            the teacher. Any architecture.
        images: [n, C, H, W], as the student expects them.
        targets: labels [n] (integers), or what stands for them, one row per image [n, d]; None needs no labels.
        layers: names in both models, or pairs (student's, base's); None is the layer an explanation reads in each.
        embeddings: of the classes, [K, d], for labels; None is one-hot.
        base_images: the same pictures as the base expects them, if that is another size or normalisation.
        objective: what the maps are the gradient of; None is `relevance` with targets and `unlikeness` without.
        pooled: compare the layers' means over space, as the papers' code does by default, in place of whole maps.
        batch_size: images per forward; None is all.
        papers: reproduce the papers' code to its last constant: its guards, and its maps, scaled twice, at the size of
            the images.

    Raises:
        UnsupportedModel: when a layer does not exist or holds no map.
        TypeError: for the name of one layer in the place of a list.
        ValueError: when targets don't fit, or a model can't take the images.

    >>> make = lambda: nn.Sequential(
    ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> found = unicam(make(), make(), torch.rand(16, 3, 8, 8), torch.arange(16) % 3, layers=["1", ("0", "1")])
    >>> found.distilled["1"].maps.shape, sorted(found.layers)
    (torch.Size([16, 1, 6, 6]), ['0', '1'])
    """
    features = label_rows(targets, embeddings, len(images))  # before the forwards: it may raise
    pictures = (images, images if base_images is None else base_images)
    eps = PAPERS.distance if papers else 0.0
    readings = read_both(student, base, pictures, layers, pooled=pooled, batch_size=batch_size, eps=eps)
    _warn_few(len(images))
    return contrast(*readings, features, objective, papers)


def compare(
    student: Reading,
    base: Reading,
    targets: Tensor | None = None,
    *,
    embeddings: Tensor | None = None,
    objective: Objective | None = None,
    papers: bool = False,
) -> UniCAMResult:
    """UniCAM of what was read before, layer by layer in their order: a fixed base needs to be read only once.

    Args:
        student, base: from `e2kd.transfer.read`, of the same pictures in the same order and as many layers.
        targets, embeddings, objective, papers: as for `unicam`.

    Raises:
        ValueError: when the readings or targets don't fit.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> first, second = (read(net, torch.rand(16, 3, 8, 8), ["1"]) for _ in range(2))
    >>> compare(first, second).layers["1"].sums.names
    ('student', 'base')
    """
    _warn_few(student.count)
    return contrast(student, base, label_rows(targets, embeddings, student.count), objective, papers)


def contrast(
    student: Reading, base: Reading, features: Tensor | None, objective: Objective | None, papers: bool = False
) -> UniCAMResult:
    """`compare` with what stands for the labels, [n, d], and no warning for few images."""
    _check(student, base)
    eps = PAPERS.distance if papers else 0.0
    labels = None if features is None else distance_matrix(features, eps=eps).to(student.layers[0].distances.device)
    chosen = objective or (unlikeness if labels is None else relevance)
    pairs = zip(student.layers, base.layers, strict=True)
    sizes = (student.image_size, base.image_size) if papers else (None, None)
    with torch.autocast(student.logits.device.type, enabled=False):
        layers = {mine.layer: _transfer(mine, other, labels, chosen, sizes) for mine, other in pairs}
    return UniCAMResult(layers, student.count)


def _transfer(
    mine: LayerReading,
    other: LayerReading,
    labels: Tensor | None,
    objective: Objective,
    sizes: tuple[tuple[int, int] | None, tuple[int, int] | None],
) -> Transfer:
    """Both directions at one layer."""
    known = {} if labels is None else {"labels": labels}
    sums = DistanceSums.of_distances(student=mine.distances, base=other.distances, **known)

    def direction(x: LayerReading, given: LayerReading, names: tuple[str, str], size: tuple[int, int] | None) -> UniCAM:
        score = sums.score(names[0], "labels" if known and objective not in LABEL_FREE else names[0], names[1])
        if score.reason and (size is None or len(x.maps) < FEWEST):
            return _blank(x, score.reason, size)
        return _unicam(x, given, labels, objective, size)

    distilled = direction(mine, other, ("student", "base"), sizes[0])
    return Transfer(mine.layer, other.layer, distilled, direction(other, mine, ("base", "student"), sizes[1]), sums)


def _unicam(
    x: LayerReading,
    given: LayerReading,
    labels: Tensor | None,
    objective: Objective,
    size: tuple[int, int] | None,
) -> UniCAM:
    """The maps of x; with a size as the papers' code makes them."""
    guards = NONE if size is None else PAPERS
    score, weights = channel_weights(x, given.distances, labels, objective, guards)
    raw = weighted(x.maps, weights)
    maps = scaled(raw) if size is None else papers_scaled(raw, size)
    return UniCAM(maps, weights, score.item(), ~maps.flatten(1).any(1))


def _blank(x: LayerReading, reason: str, size: tuple[int, int] | None) -> UniCAM:
    count, channels, *grid = x.maps.shape
    maps, weights = x.maps.new_zeros(count, 1, *(size or grid)), x.distances.new_zeros(count, channels)
    return UniCAM(maps, weights, float("nan"), torch.ones_like(weights[:, 0], dtype=torch.bool), reason)


def _warn_few(n: int) -> None:
    if n < FEW:
        warn_user(
            f"UniCAM of {n} images: their maps say more about the other images of the batch than about their own. "
            "Use 64 or more.",
            UserWarning,
        )


def label_rows(targets: Tensor | None, embeddings: Tensor | None, n: int) -> Tensor | None:
    """What stands for the labels of n images, [n, d]; None without targets."""
    if targets is None:
        return None
    if len(targets) != n:
        raise ValueError(f"Expected targets of {n} images, but got {shape(targets.shape)}.")
    return label_features(targets, embeddings)


def names_of(layers: Sequence[str | tuple[str, str]] | None) -> tuple[list[str] | None, list[str] | None]:
    """The student's and the base's names of layers as `unicam` takes them; None where an explanation reads."""
    if layers is None:
        return None, None
    check_names(layers=layers)
    pairs = [(layer, layer) if isinstance(layer, str) else layer for layer in layers]
    mine = [pair[0] for pair in pairs]
    if len(set(mine)) < len(mine) or not mine:
        raise ValueError(f"Expected every layer of the student once, but got {', '.join(mine) or 'none'}.")
    return mine, [pair[1] for pair in pairs]


def read_both(
    student: nn.Module,
    base: nn.Module,
    images: tuple[Tensor, Tensor],
    layers: Sequence[str | tuple[str, str]] | None,
    *,
    pooled: bool = False,
    batch_size: int | None = None,
    eps: float = 0.0,
) -> tuple[Reading, Reading]:
    """The readings of two models, each of the pictures as it expects them, at layers as `unicam` takes them."""
    if len(images[0]) != len(images[1]):
        raise ValueError(f"Expected the same pictures for both models, but got {len(images[0])} and {len(images[1])}.")
    mine, others = names_of(layers)
    first = read_one("student", student, images[0], mine, pooled=pooled, batch_size=batch_size, eps=eps)
    return first, read_one("base", base, images[1], others, pooled=pooled, batch_size=batch_size, eps=eps)


def read_one(
    who: str,
    model: nn.Module,
    images: Tensor,
    names: list[str] | None,
    *,
    pooled: bool = False,
    batch_size: int | None = None,
    eps: float = 0.0,
) -> Reading:
    """The reading of one of two models, and an error that says which of them can't take the images."""
    check_batch_size(batch_size)  # here, too: no error of the images
    with taking_images(who, model, images.shape, OTHER_IMAGES):
        return read(model, images, names, pooled=pooled, batch_size=batch_size, eps=eps)


def _check(student: Reading, base: Reading) -> None:
    counts = [(r.count, len(r.layers)) for r in (student, base)]
    if counts[0] != counts[1]:
        raise ValueError(
            "Expected readings of the same images at as many layers, but the student's is of "
            f"{counts[0][0]} images at {counts[0][1]} layers and the base's of {counts[1][0]} at {counts[1][1]}."
        )
