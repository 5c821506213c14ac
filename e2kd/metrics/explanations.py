"""How alike explanations are, and how well they lie on the object."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from e2kd.comparing import Similarity, compare
from e2kd.localization import energy_on_mask, intersection_over_union
from e2kd.metrics.means import BLANK, EMPTY, NOT_FINITE, SOUND, MeanMetric
from e2kd.objects import Boxes, box_masks
from e2kd.similarity import cosine, is_zero


class ExplanationSimilarity(MeanMetric):
    """Mean similarity of student's and teacher's maps (e²KD, Eq. 3), in [-1, 1] for the cosine.

    Samples with a map that is zero everywhere are left out and counted. Images of several classes have several maps:
    pass a row for each.

    Args:
        similarity: (student maps, teacher maps) -> [B].
        size: grid (h, w) on which maps are compared; the student's if None, the images' for the papers' resize.
        settings: of `torchmetrics.Metric`.

    Raises:
        ValueError: when the maps differ in batch or channels.

    >>> similarity = ExplanationSimilarity()
    >>> student, teacher = torch.ones(2, 1, 2, 2), torch.tensor([[[[1., 0.], [0., 1.]]], [[[0., 0.], [0., 0.]]]])
    >>> similarity.update(student, teacher)
    >>> print(similarity.score())
    0.707 ± nan (n = 1, left out: 1 blank maps)
    """

    def __init__(self, similarity: Similarity = cosine, size: tuple[int, int] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.similarity, self.size = similarity, size

    def update(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> None:
        """Maps of a batch, [B, C, H, W] and [B, C, h, w]; share of each cell that is known, [B, 1, h, w]."""
        values, blank = compare(self.similarity, student, teacher.to(student.device), self.size, valid)
        self._add(values, torch.where(blank, BLANK, SOUND))


class _OnObject(MeanMetric):
    """Mean of a measure of maps and the masks of their objects."""

    def update(self, maps: Tensor, regions: Tensor | Boxes, size: tuple[int, int] | None = None) -> None:
        """Maps of a batch and where their objects are.

        Args:
            maps: [B, 1, h, w], each of one class of one image. Images of several classes have a row for each:
                `by_class` makes rows of boxes, `masks.flatten(2).any(2).nonzero(as_tuple=True)` of masks [B, K, H, W].
            regions: masks [B, H, W], bool or in [0, 1], or a list with the boxes [n, 4] of every row, as left, top,
                right, bottom in pixels.
            size: (H, W) of the images, with boxes.
        """
        masks = regions if isinstance(regions, Tensor) else _masks(regions, size)
        values = self._measured(maps, masks.to(maps.device))
        flaws = torch.where(values.isnan(), torch.where(is_zero(maps.relu()), BLANK, EMPTY), SOUND)
        self._add(values, torch.where(maps.flatten(1).isfinite().all(1), flaws, NOT_FINITE))

    def _measured(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Values [B] of maps [B, 1, h, w] and masks [B, H, W]; NaN where there is none."""
        raise NotImplementedError


def _masks(boxes: Boxes, size: tuple[int, int] | None) -> Tensor:
    if size is None:
        raise ValueError("Expected the size of the images of boxes as well: update(maps, boxes, images.shape[-2:]).")
    return box_masks(boxes, (size[0], size[1]))


class EnergyPointingGame(_OnObject):
    """Mean share of maps' positive energy on the object (Wang et al. 2020), in [0, 1].

    Blank maps and images without an object are left out and counted. Compare it with the objects' share of the image,
    which a map that is the same everywhere has.

    Args:
        settings: of `torchmetrics.Metric`.

    Raises:
        ValueError: when the shapes don't fit, masks have values outside of [0, 1], or boxes are not left, top, right,
            bottom.

    >>> epg = EnergyPointingGame()
    >>> epg.update(torch.ones(2, 1, 7, 7), [[[0, 0, 8, 16]], []], size=(16, 16))
    >>> print(epg.score())
    0.500 ± nan (n = 1, left out: 1 empty regions)
    """

    def _measured(self, maps: Tensor, masks: Tensor) -> Tensor:
        return energy_on_mask(maps, masks)


class ExplanationIoU(_OnObject):
    """Mean intersection over union of the object with a map's highest pixels, in [0, 1].

    Blank maps and images without an object are left out and counted.

    Args:
        threshold: share of a map's maximum from which on a pixel belongs to it, in (0, 1]; None takes as many pixels as
            the object has.
        settings: of `torchmetrics.Metric`.

    Raises:
        ValueError: as `EnergyPointingGame`.

    >>> iou = ExplanationIoU()
    >>> iou.update(torch.tensor([[[[3., 2.], [1., 0.]]]]), torch.tensor([[[True, False], [True, False]]]))
    >>> round(iou.compute().item(), 3)
    0.333
    """

    def __init__(self, threshold: float | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"Expected a share of each map's maximum in (0, 1], or None, but got {threshold}.")
        self.threshold = threshold

    def _measured(self, maps: Tensor, masks: Tensor) -> Tensor:
        return intersection_over_union(maps, masks, self.threshold)
