"""Which pixels each model is shown: those of its own UniCAM or GradCAM map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from e2kd.explainers import Explainer, GradCAM
from e2kd.inspection import explain
from e2kd.transfer.contrasting import contrast
from e2kd.transfer.readings import Reading
from e2kd.transfer.unique import Objective


@dataclass(frozen=True)
class Models:
    """Two models, the same pictures as each expects them, and what their layers hold for these.

    Attributes:
        student, base: in the order of `images` and `readings`.
        images: two times [n, C, H, W].
        readings: of the layers asked for.
        targets: what stands for the labels, [n, d].
    """

    student: nn.Module
    base: nn.Module
    images: tuple[Tensor, Tensor]
    readings: tuple[Reading, Reading]
    targets: Tensor | None = None


Maps = list[tuple[Tensor, Tensor]]  # of every layer, the student's and the base's, [n, 1, h, w]


class Regions(Protocol):
    """Says where each model looks, layer by layer. Write your own in a few lines.

    >>> import torch
    >>> def centre(models):
    ...     maps = torch.zeros(len(models.images[0]), 1, 3, 3)
    ...     maps[:, :, 1, 1] = 1
    ...     return [(maps, maps) for _ in models.readings[0].layers]
    """

    def __call__(self, models: Models) -> Maps:
        """Maps of every layer; a constant one, or one that is not finite, marks an image that is to be left out."""


@dataclass(frozen=True)
class UniCAMRegions:
    """Where the student sees what the base does not, and the base what the student does not (UniCAM, Eq. 7).

    Attributes:
        objective: as for `unicam`.
    """

    objective: Objective | None = None

    def __call__(self, models: Models) -> Maps:
        """The maps of both directions."""
        found = contrast(*models.readings, models.targets, self.objective)
        return [(layer.distilled.maps, layer.residual.maps) for layer in found.layers.values()]


@dataclass(frozen=True)
class GradCAMRegions:
    """Where each model sees its own top class at the layer in question: the papers' layer-specific features.

    Attributes:
        at: the explainer for a layer, such as `HiResCAM`, which the papers' code uses.

    Raises:
        UnsupportedModel: at a layer where the class has no gradient, as the last block of a class-token transformer.
    """

    at: Callable[[str], Explainer] = GradCAM

    def __call__(self, models: Models) -> Maps:
        """GradCAM maps of both."""
        both = zip((models.student, models.base), models.images, models.readings, strict=True)
        student, base = (
            [_explained(model, images, self.at(layer.layer)) for layer in reading.layers]
            for model, images, reading in both
        )
        return list(zip(student, base, strict=True))


@dataclass(frozen=True)
class SameRegions:
    """Both models are shown where the student looks, so that their features are of the same images.

    Attributes:
        regions: where that is.
    """

    regions: Regions

    def __call__(self, models: Models) -> Maps:
        """The student's maps twice."""
        return [(maps, maps) for maps, _ in self.regions(models)]


def _explained(model: nn.Module, images: Tensor, explainer: Explainer) -> Tensor:
    maps = explain(model, images, explainer=explainer).maps
    return maps if maps.shape[1] == 1 else maps.sum(1, keepdim=True)
