"""Explanation methods: from features and the gradient of a class logit to maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor


@runtime_checkable
class Explainer(Protocol):
    """What an explainer is: a place to read and a formula. Write your own in a few lines.

    `layer` names the module whose output is explained; None lets e2kd find it. An explainer with
    `reads_images = True` is given the images in place of features. The result must be differentiable;
    e2kd takes care of the second derivative.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class GradientTimesFeatures:
    ...     layer: str | None = None
    ...     def __call__(self, features, gradient):
    ...         return (features * gradient).sum(1, keepdim=True)
    >>> isinstance(GradientTimesFeatures(), Explainer)
    True
    """

    @property
    def layer(self) -> str | None:
        """Dotted name of the module to read, None to have it found."""

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        """Features [B, C, h, w] and gradient of the explained logit [B, C, h, w] -> maps [B, C', h, w]."""


@dataclass(frozen=True)
class GradCAM:
    """GradCAM (Selvaraju et al. 2017), the explanation of e²KD for standard networks.

    ReLU(sum_k a_k A_k) with a_k the mean over space of dz_y/dA_k; values >= 0, not normalised.

    >>> GradCAM()(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2))
    tensor([[[[2., 2.],
              [2., 2.]]]])
    """

    layer: str | None = None

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        """[B, C, h, w] twice -> [B, 1, h, w]."""
        weights = gradient.mean((2, 3))
        return F.relu(torch.einsum("bchw,bc->bhw", features, weights)).unsqueeze(1)


@dataclass(frozen=True)
class HiResCAM:
    """HiResCAM (Draelos and Carin 2020): ReLU(sum_k dz_y/dA_k * A_k), without averaging the gradient.

    Equal to GradCAM for heads that pool and apply one linear layer.

    >>> HiResCAM()(torch.ones(1, 2, 1, 1), torch.tensor([[[[1.]], [[2.]]]]))
    tensor([[[[3.]]]])
    """

    layer: str | None = None

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        """[B, C, h, w] twice -> [B, 1, h, w]."""
        return F.relu((features * gradient).sum(1, keepdim=True))


@dataclass(frozen=True)
class LayerCAM:
    """LayerCAM (Jiang et al. 2021): ReLU(sum_k ReLU(dz_y/dA_k) * A_k), for early layers with fine grids.

    >>> LayerCAM()(torch.ones(1, 2, 1, 1), torch.tensor([[[[-1.]], [[2.]]]]))
    tensor([[[[2.]]]])
    """

    layer: str | None = None

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        """[B, C, h, w] twice -> [B, 1, h, w]."""
        return F.relu((features * F.relu(gradient)).sum(1, keepdim=True))


@dataclass(frozen=True)
class InputGradient:
    """The gradient of the class logit with respect to the images (Simonyan et al. 2014), signed, all channels.

    Needs a second pass of the student in full precision: about twice the price of plain KD.

    >>> InputGradient()(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)).shape
    torch.Size([1, 3, 2, 2])
    """

    reads_images = True
    layer: None = None

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        """Images and gradient [B, C, H, W] -> the gradient."""
        return gradient


def reads_images(explainer: Explainer) -> bool:
    """Whether an explainer is given the images in place of features.

    >>> reads_images(InputGradient()), reads_images(GradCAM())
    (True, False)
    """
    return bool(getattr(explainer, "reads_images", False))
