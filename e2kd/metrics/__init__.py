"""Measures that gather over batches and ranks: torchmetrics.Metric, with reset, update and compute.

What torchmetrics has is not repeated here. F1 and calibration, of several classes per image or of one:

>>> import torch
>>> from torchmetrics import MetricCollection
>>> from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score, MultilabelF1Score
>>> scores = MetricCollection({"f1": MulticlassF1Score(3), "calibration": MulticlassCalibrationError(3)})
>>> found = scores(torch.eye(3).log_softmax(1).exp(), torch.arange(3))  # probabilities [B, K], labels [B]
>>> found["f1"], found["calibration"]
(tensor(1.), tensor(0.4239))
>>> MultilabelF1Score(3, average="macro")(torch.eye(3), torch.eye(3).long())  # multi-hot labels [B, K]
tensor(1.)
"""

from e2kd.metrics.answers import Agreement, WorstGroupAccuracy
from e2kd.metrics.equivariance import ShiftEquivariance
from e2kd.metrics.explanations import EnergyPointingGame, ExplanationIoU, ExplanationSimilarity
from e2kd.metrics.means import Mean
from e2kd.metrics.transfer import FeatureSimilarityScore, RelevanceScore
from e2kd.objects import Present, box_masks, by_class

__all__ = [
    "Agreement",
    "EnergyPointingGame",
    "ExplanationIoU",
    "ExplanationSimilarity",
    "FeatureSimilarityScore",
    "Mean",
    "Present",
    "RelevanceScore",
    "ShiftEquivariance",
    "WorstGroupAccuracy",
    "box_masks",
    "by_class",
]
