"""What a model says of many images, and where it looks: asked in batches, for the monitor and the report."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2kd.choosing import default_explainer
from e2kd.explainers import BcosContributions, Explainer, fixes_weights
from e2kd.inspection import Explanation, explain


def answers_of(
    model: nn.Module,
    images: Tensor,
    classes: Tensor | None = None,
    explainer: Explainer | None = None,
    batch_size: int | None = None,
) -> Explanation:
    """A model's answers to images [n, C, H, W], explained for given classes [n] or its own top ones."""
    parts = images.split(batch_size or len(images))
    asked = [None] * len(parts) if classes is None else list(classes.split(batch_size or len(images)))
    found = [explain(model, part, some, explainer) for part, some in zip(parts, asked, strict=True)]
    return Explanation(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))


def places_of(
    model: nn.Module, images: Tensor, found: Explanation, explainer: Explainer | None, batch_size: int | None = None
) -> Tensor:
    """Maps of places [n, 1, h, w] for answers that `explainer` gave: W(x) has colours, its contributions have places.

    Args:
        images, found, explainer, batch_size: as of `answers_of`.
    """
    if fixes_weights(explainer or default_explainer(model)) and found.maps.shape[1] > 1:
        return answers_of(model, images, found.classes, BcosContributions(resolution=None), batch_size).maps
    return found.maps.sum(1, keepdim=True)
