"""Measures that gather over batches and ranks: torchmetrics.Metric, with reset, update and compute."""

from e2kd.metrics.transfer import FeatureSimilarityScore, RelevanceScore

__all__ = ["FeatureSimilarityScore", "RelevanceScore"]
