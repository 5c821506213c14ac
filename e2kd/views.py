"""A view of one forward pass: its logits, the maps it was made from, and the gradient between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e2kd.explainers import Explainer
from e2kd.plans import Plan
from e2kd.similarity import at_least_float32


@dataclass(frozen=True)
class View:
    """What an explainer needs of one forward pass.

    Attributes:
        logits: [B, K].
        features: maps [B, C, h, w], at least float32.
        gradient: classes [B] -> gradient of those logits with respect to `features`, [B, C, h, w].
    """

    logits: Tensor
    features: Tensor
    gradient: Callable[[Tensor], Tensor]

    def explain(self, explainer: Explainer, classes: Tensor, rows: Tensor | None = None) -> Tensor:
        """Maps [B, C', h, w] for one class per sample, classes [B]; of the samples `rows` alone, if given."""
        features, gradient = self.features, self.gradient(classes)
        return explainer(features, gradient) if rows is None else explainer(features[rows], gradient[rows])


def closed_view(captured: Tensor, logits: Tensor, plan: Plan, linear: nn.Module, image_size: tuple[int, int]) -> View:
    """Average pooling and a linear layer: the gradient is the classifier's row over h*w, at every cell."""
    maps = at_least_float32(plan.maps(captured, image_size))
    cells = maps.shape[2] * maps.shape[3]
    weight = linear.weight
    assert isinstance(weight, Tensor)

    def gradient(classes: Tensor) -> Tensor:
        rows = weight[classes].to(maps.dtype) / cells
        return rows[:, :, None, None].expand_as(maps)

    return View(logits, maps, gradient)


def autograd_view(
    captured: Tensor, logits: Tensor, plan: Plan, image_size: tuple[int, int], *, create_graph: bool
) -> View:
    """Any head: the gradient by autograd, differentiable once more with `create_graph`."""

    def gradient(classes: Tensor) -> Tensor:
        scores = logits.gather(1, classes[:, None]).sum()
        (found,) = torch.autograd.grad(scores, captured, create_graph=create_graph, retain_graph=True)
        return at_least_float32(plan.maps(found, image_size))

    return View(logits, at_least_float32(plan.maps(captured, image_size)), gradient)
