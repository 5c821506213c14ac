"""FSS and RS: how similar two networks' features are, and how relevant either's are to the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from e2kd.distance import PAPERS_BIASED, DistanceSums, Score, dcor
from e2kd.metrics.sums import DistanceMetric, _joined
from e2kd.transfer.targets import label_features


class FeatureSimilarityScore(DistanceMetric):
    """FSS (UniCAM, Eq. 8): distance correlation of a student's and a base's features, in [-1, 1]; 1 is the same up to
    scale and rotation.

    Bias-corrected (R*), so that independent features have 0 on average and values below 0 are chance. Which features
    is up to you: of the images as they are, of those that UniCAM or GradCAM maps keep
    (`e2kd.transfer.layer_features`), or any others. Compare it with the FSS of an untrained network
    (`e2kd.transfer.untrained`): early layers are alike to begin with.

    Args:
        mean: average the batches' scores (Eq. 8) in place of the ratio of sums, whose bias is that of all images.
        biased: the papers' current code: biased, rows scaled to unit length, averaged over the updates. Near 1 for
            independent features, kept to compare with published numbers.
        settings: of `torchmetrics.Metric`.

    Raises:
        ValueError: when features are not [n, d] of the same images.

    >>> fss = FeatureSimilarityScore()
    >>> x = torch.rand(16, 5)
    >>> fss.update(x, 3 * x + 1)
    >>> round(fss.compute().item(), 6), fss.score().n
    (1.0, 16)
    """

    values: list[Tensor]

    def __init__(self, *, mean: bool = False, biased: bool = False, **settings: Any) -> None:
        super().__init__(mean=mean, **settings)
        self.biased = biased
        if biased:
            self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, student: Tensor, base: Tensor) -> None:
        """Features of a batch, [n, d] and [n, e]; maps are passed as `maps.flatten(1)`."""
        sums = DistanceSums.of(student=student, base=base)
        self._add(sums)
        if self.biased and not sums.flaws.any():
            with torch.no_grad():
                self.values.append(dcor(student, base, normalize=True, guards=PAPERS_BIASED)[None])

    def _names(self, count: int) -> tuple[str, ...]:
        return ("student", "base")

    def _score(self) -> Score:
        """The bias-corrected score, or the biased one of as many images; what is by chance is unknown of that."""
        found = super()._score()
        if not self.biased or found.reason:
            return found
        values, nan = _joined(self.values), float("nan")
        error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else nan
        return Score(values.mean().item(), error, nan, found.n, found.batches, found.skipped)


class RelevanceScore(DistanceMetric):
    """RS (UniCAM, Eq. 9): distance correlation of features with the labels, in [-1, 1].

    With `given=` in every update, of what the features have beyond another network's: distilled RS is that of the
    student given the base, residual RS that of the base given the student (semi-partial, the papers' P_DC).
    The papers' tables are on a scale of their own (their script divides one batch by the number of batches).

    Args:
        embeddings: of the classes, [K, d], from `e2kd.label_embeddings` for instance; None is one-hot.
        mean: average the batches' scores (Eq. 9) in place of the ratio of sums.
        settings: of `torchmetrics.Metric`.

    Raises:
        ValueError: when features are not [n, d] of the same images, or labels don't fit the embeddings.

    >>> labels = torch.arange(16) % 4
    >>> rs = RelevanceScore()
    >>> rs.update(torch.nn.functional.one_hot(labels) + 0.01 * torch.rand(16, 4), labels)
    >>> rs.compute() > 0.99
    tensor(True)
    """

    def __init__(self, embeddings: Tensor | None = None, *, mean: bool = False, **settings: Any) -> None:
        super().__init__(mean=mean, **settings)
        self.embeddings = None if embeddings is None else embeddings.detach()

    def update(self, features: Tensor, targets: Tensor, given: Tensor | None = None) -> None:
        """A batch: features [n, d], labels [n] or what stands for them [n, k], and features to go beyond [n, e]."""
        labels = label_features(targets, self.embeddings).to(features.device)
        beyond = {} if given is None else {"given": given}
        self._add(DistanceSums.of(features=features, labels=labels, **beyond))

    def _names(self, count: int) -> tuple[str, ...]:
        return ("features", "labels", "given")[:count]
