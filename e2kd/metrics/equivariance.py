"""Whether explanations move with the image: shifted crops of larger images, compared where they overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.choosing import explainers_of
from e2kd.comparing import Similarity, compare
from e2kd.errors import shape
from e2kd.explainers import Explainer
from e2kd.inspection import explain
from e2kd.metrics.means import BLANK, NAN, SOUND, Mean, MeanMetric
from e2kd.similarity import cosine, resize


class ShiftEquivariance(MeanMetric):
    """Whether explanations move with the image: their similarity over shifts (after e²KD, Fig. 5), in [-1, 1].

    Crops of larger images are explained, all of an image for one class. The map of a shifted crop is compared with that
    of the crop at rest on the area that both show, where maps are brought to the size of the crops, as they are shown.
    1 is a map that moves with its pixels. The paper's code has nothing of this figure, so its details are ours.

    Args:
        model: whose crops are shifted.
        shifts: in pixels, of every point of the curve: (down, right), or an integer for one to the right.
        crop: side or (h, w) of the crops, what the models take.
        reference: whose explanations of the crops at rest they are compared with; None is the model itself. With the
            student as model and the teacher as reference the curve starts at the similarity of their explanations.
        explainer: None is chosen for the models, as in `E2KDLoss`.
        reference_explainer: None is the same, or chosen where that is None.
        similarity: (maps, reference maps) -> [B].
        settings: of `torchmetrics.Metric`.

    Raises:
        ValueError: when images are too small for the crops, or crops are shifted so far that they don't overlap.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    >>> equivariance = ShiftEquivariance(model, shifts=(0, 4, (-8, 8)), crop=16)
    >>> equivariance.update(torch.rand(2, 3, 24, 24))
    >>> equivariance.curve()  # every pixel is seen alone
    tensor([1.0000, 1.0000, 1.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        shifts: Iterable[int | tuple[int, int]],
        crop: int | tuple[int, int],
        *,
        reference: nn.Module | None = None,
        explainer: Explainer | None = None,
        reference_explainer: Explainer | None = None,
        similarity: Similarity = cosine,
        **settings: Any,
    ) -> None:
        shifted = [shift if isinstance(shift, tuple) else (0, int(shift)) for shift in shifts]
        super().__init__(len(shifted), **settings)
        self.shifts = shifted
        self.crop = (crop, crop) if isinstance(crop, int) else crop
        self.models = _Borrowed((model, model if reference is None else reference))
        self.explainers = explainers_of(*self.models, explainer, reference_explainer)
        self.similarity = similarity
        if not shifted or any(abs(down) >= self.crop[0] or abs(right) >= self.crop[1] for down, right in shifted):
            raise ValueError(f"Expected shifts smaller than the crops, {shape(self.crop)}, but got {shifted}.")

    def update(self, images: Tensor, classes: Tensor | None = None, *, reference_images: Tensor | None = None) -> None:
        """Compare the explanations of a batch at every shift.

        Args:
            images: [B, C, H, W], larger than the crops by the span of the shifts; as the model expects its pixels.
            classes: [B], what is explained; None is the reference's top class of the crop at rest.
            reference_images: the same pictures for the reference, where it expects other colours.
        """
        model, reference = self.models
        place = self._place(images)
        theirs = images if reference_images is None else reference_images
        found = explain(reference, self._cropped(theirs, place, (0, 0)), classes, self.explainers[1])
        for row, shift in enumerate(self.shifts):
            maps = explain(model, self._cropped(images, place, shift), found.classes, self.explainers[0]).maps
            self._add(*self._compared(maps, found.maps, shift), rows=row)

    def curve(self) -> Tensor:
        """Mean similarity at every shift, [S] float64, NaN where all maps are blank. Call it on all ranks."""
        self.compute()
        return torch.tensor([mean.value for mean in self.means], dtype=torch.float64, device=self.device)

    def scores(self) -> list[Mean]:
        """The points of the curve with errors, n, and what was left out. Call it on all ranks."""
        self.compute()
        return self.means

    def _summary(self, means: Sequence[Mean]) -> Mean:
        """The mean of the curve."""
        for shift, mean in zip(self.shifts, means, strict=True):
            if mean.reason:
                return Mean(NAN, NAN, mean.n, mean.left_out, f"at the shift {shift}: {mean.reason}")
        return Mean(sum(mean.value for mean in means) / len(means), NAN, min(mean.n for mean in means))

    def _place(self, images: Tensor) -> tuple[int, int]:
        """Top left corner of the crop at rest; all crops together lie in the middle of the image."""
        return (self._along(0, images), self._along(1, images))

    def _along(self, axis: int, images: Tensor) -> int:
        moves = [0, *(shift[axis] for shift in self.shifts)]
        room = images.shape[axis + 2] - self.crop[axis] - (max(moves) - min(moves))
        if room < 0:
            raise ValueError(
                f"Expected images larger than the crops {shape(self.crop)} by the span of the shifts, "
                f"{max(moves) - min(moves)} pixels, but got {shape(images.shape)}. Shift less, or resize them larger."
            )
        return room // 2 - min(moves)

    def _cropped(self, images: Tensor, place: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        top, left = (start + move for start, move in zip(place, shift, strict=True))
        return images[:, :, top : top + self.crop[0], left : left + self.crop[1]].contiguous()

    def _compared(self, maps: Tensor, reference: Tensor, shift: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Similarity [B] on the shared area, and which samples are blank there."""
        down, right = shift
        moved = _shared(resize(maps, self.crop), -down, -right)
        kept = _shared(resize(reference.to(maps.device), self.crop), down, right)
        values, blank = compare(self.similarity, moved, kept)
        return values, torch.where(blank, BLANK, SOUND)


def _shared(maps: Tensor, down: int, right: int) -> Tensor:
    """The part of maps [B, C, H, W] that lies in a crop as well which is shifted by so much.

    >>> _shared(torch.arange(3.).view(1, 1, 1, 3), 0, 1), _shared(torch.arange(3.).view(1, 1, 1, 3), 0, -1)
    (tensor([[[[1., 2.]]]]), tensor([[[[0., 1.]]]]))
    """
    height, width = maps.shape[-2:]
    return maps[..., max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]


class _Borrowed(tuple[nn.Module, nn.Module]):
    """Models that are no part of the metric, and that its copies share."""

    __slots__ = ()

    def __deepcopy__(self, memo: Any) -> _Borrowed:
        return self
