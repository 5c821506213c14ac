"""Whether two networks answer alike, and what a network is worth for the group it serves worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from torch import Tensor

from e2kd.errors import shape
from e2kd.metrics.means import NOTHING, Mean, MeanMetric
from e2kd.outputs import equal, logits_of, top_classes


class Agreement(MeanMetric):
    """Share of images on which student and teacher put the same class first (e²KD, Eq. 4), in [0, 1].

    Raises:
        ValueError: when the two are of other images or other classes.
        TypeError: when there are no logits in what came.

    >>> import torch
    >>> agreement = Agreement()
    >>> agreement.update(torch.tensor([[2., 1.], [0., 1.]]), torch.tensor([[3., 0.], [1., 0.]]))
    >>> agreement.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    def update(self, student: Any, teacher: Any) -> None:
        """Of a batch: outputs with logits [B, K], or classes [B], of both networks."""
        mine, theirs = decided(student), decided(teacher)
        if mine.shape != theirs.shape:
            raise ValueError(f"Expected answers to the same images, but got {len(mine)} and {len(theirs)}.")
        told = [logits_of(outputs).shape[1] for outputs in (student, teacher) if not _is_classes(outputs)]
        if len(set(told)) > 1:
            raise ValueError(
                f"Expected logits of the same classes, but the student tells {told[0]} apart and the teacher "
                f"{told[1]}. Pick the classes that both know: logits[:, known]."
            )
        self._add(equal(mine, theirs))


class WorstGroupAccuracy(MeanMetric):
    """Lowest accuracy among groups of images, in [0, 1] (Sagawa et al. 2020): of each class on each background, say.

    Groups without images are left out; `groups()` has them all.

    Args:
        count: number of groups.
        settings: of `torchmetrics.Metric`.

    Raises:
        ValueError: when the shapes don't fit or groups are not in 0..count - 1.

    >>> import torch
    >>> worst = WorstGroupAccuracy(4)
    >>> labels, places = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    >>> worst.update(torch.tensor([0, 0, 1, 0]), labels, groups=2 * labels + places)
    >>> worst.compute(), [group.value for group in worst.groups()]
    (tensor(0., dtype=torch.float64), [1.0, 1.0, 1.0, 0.0])
    """

    def __init__(self, count: int, **settings: Any) -> None:
        super().__init__(count, **settings)
        self.count = count

    def update(self, outputs: Any, labels: Tensor, groups: Tensor) -> None:
        """Of a batch: outputs with logits [B, K], or classes [B]; labels [B]; the groups of the images, [B]."""
        found = decided(outputs)
        if not found.shape == labels.shape == groups.shape or groups.is_floating_point():
            raise ValueError(
                "Expected answers, labels and groups as indices [B] of the same images, but got "
                f"{shape(found.shape)}, {shape(labels.shape)} and {shape(groups.shape)} of {groups.dtype}."
            )
        if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < self.count:
            raise ValueError(
                f"Expected groups from 0 to {self.count - 1}, but some are {int(groups.min())} or "
                f"{int(groups.max())}. Make indices of two attributes by a * count_of_b + b."
            )
        self._add(equal(found, labels.double()), rows=groups.long())

    def groups(self) -> list[Mean]:
        """The accuracy of every group. Synced across ranks: call it on all of them."""
        self.compute()
        return self.means

    def _summary(self, means: Sequence[Mean]) -> Mean:
        given = [mean for mean in means if mean.reason != NOTHING]
        broken = next((mean for mean in given if mean.reason), None)
        return broken or min(given, key=lambda mean: mean.value, default=means[0])


def decided(outputs: Any) -> Tensor:
    """The top classes [B] in outputs with logits [B, K], or classes [B] as they are; float64, NaN for logits with NaN.

    >>> import torch
    >>> decided(torch.tensor([[0., 1.], [torch.nan, 0.]])), decided(torch.tensor([1, 0]))
    (tensor([1., nan], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))
    """
    if _is_classes(outputs):
        return outputs.double()
    logits = logits_of(outputs)
    if logits.shape[1] < 2:
        raise ValueError(
            f"Expected logits of at least 2 classes, but got {shape(logits.shape)}, of which the first is always the "
            "top class. Pass classes: (logits[:, 0] > 0).long()."
        )
    return top_classes(logits)


def _is_classes(outputs: Any) -> TypeGuard[Tensor]:
    return isinstance(outputs, Tensor) and outputs.ndim == 1 and not outputs.is_floating_point()
