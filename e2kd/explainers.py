"""Explanation methods: from features and the gradient of a class logit to maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol, TypeGuard, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.similarity import pooled


@runtime_checkable
class Explainer(Protocol):
    """What an explainer is: a place to read and a formula. Write your own in a few lines.

    `layer` names the module whose output is explained; None lets e2kd find it. An explainer with
    `reads_images = True` is given the images in place of features; with `fixes_weights = True` as well, the encoded
    images of a B-cos network and its dynamic weights W(x) in place of the gradient. The result must be
    differentiable; e2kd takes care of the second derivative.

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


class Weighing(ABC):
    """An explainer that weighs channels by their mean gradient.

    Of a head that pools and applies one linear layer it gives the maps of many classes at once.
    """

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        """[B, C, h, w] twice -> [B, 1, h, w]."""
        return self.formed(torch.einsum("bchw,bc->bhw", features, gradient.mean((2, 3)))).unsqueeze(1)

    def weighed(self, features: Tensor, weights: Tensor) -> Tensor:
        """Features [B, C, h, w] and the channels' weights of each class [k, C], or of each sample's [B, k, C] -> a map
        of each, [B, k, h, w]."""
        equation = "bchw,kc->bkhw" if weights.ndim == 2 else "bchw,bkc->bkhw"
        return self.formed(torch.einsum(equation, features, weights))

    @abstractmethod
    def formed(self, maps: Tensor) -> Tensor:
        """The maps from the weighted sums over channels."""


def weighs(explainer: Explainer) -> TypeGuard[Weighing]:
    """Whether an explainer is no more than its weighing: a class of one's own may have another `__call__`.

    >>> weighs(GradCAM()), weighs(LayerCAM())
    (True, False)
    """
    call: object = type(explainer).__call__
    return isinstance(explainer, Weighing) and call is Weighing.__call__


@dataclass(frozen=True)
class GradCAM(Weighing):
    """GradCAM (Selvaraju et al. 2017), the explanation of e²KD for standard networks.

    ReLU(sum_k a_k A_k) with a_k the mean over space of dz_y/dA_k; values >= 0, not normalised.

    >>> GradCAM()(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2))
    tensor([[[[2., 2.],
              [2., 2.]]]])
    """

    layer: str | None = None

    def formed(self, maps: Tensor) -> Tensor:
        """What speaks for the class."""
        return F.relu(maps)


@dataclass(frozen=True)
class CAM(Weighing):
    """Class activation map (Zhou et al. 2016): GradCAM without its ReLU, signed.

    sum_k a_k A_k with a_k the mean over space of dz_y/dA_k, which is the class's weight over h*w where the head pools
    and applies one linear layer. Values are negative where the class is absent, so maps of absent classes carry
    information too, which `classes="all"` compares.

    >>> CAM()(torch.ones(1, 2, 1, 1), torch.tensor([[[[1.]], [[-3.]]]]))
    tensor([[[[-2.]]]])
    """

    layer: str | None = None

    def formed(self, maps: Tensor) -> Tensor:
        """What speaks for the class and what against it."""
        return maps


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
    layer: None = None  # a field, since `repr` is part of what a cache is known by

    def __post_init__(self) -> None:
        check_no_layer(type(self).__name__, self.layer)

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        """Images and gradient [B, C, H, W] -> the gradient."""
        return gradient


@dataclass(frozen=True)
class DynamicWeights:
    """What the explainers of B-cos networks share: they are given W(x), at image size.

    Args:
        resolution: side or (h, w) to which maps are averaged; None leaves them at image size.
        passes: "shared" reads W from the student's own forward, "separate" from a second one. Loss and gradients are
            the same. With `fraction` < 1 a second pass runs only the drawn samples and, for layers with b = 2, reuses
            what the layers returned in the first. None takes the cheaper one. Under autocast or torch.compile the
            student's own forward can't be differentiated twice in float32, and there is always a second pass.
    """

    resolution: int | tuple[int, int] | None = None
    passes: str | None = None
    reads_images = fixes_weights = True
    layer = None

    def __post_init__(self) -> None:
        check_resolution(type(self).__name__, self.resolution)
        check_passes(self.passes)


@dataclass(frozen=True)
class BcosWeights(DynamicWeights):
    """The dynamic weights W(x) of a B-cos network, its explanation in e²KD: signed, all channels.

    The gradient of the class logit with respect to the encoded images (x, 1 - x), with the factors that depend on the
    images (|cos|, 1 / std, attention) treated as constants (Böhle et al. 2022): W(x) x is a CNN's logit without its
    bias. Computed in float32, also under autocast.

    Args:
        resolution: side or (h, w) to which W is averaged; None leaves it at image size, as in the paper.
        passes: "shared" reads W from the student's own forward, "separate" from a second one; None takes the cheaper
            one. See `DynamicWeights`.

    >>> BcosWeights()(torch.ones(1, 6, 2, 2), torch.zeros(1, 6, 2, 2)).shape
    torch.Size([1, 6, 2, 2])
    """

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        """Encoded images and W(x), [B, C, H, W] -> W(x), [B, C, h, w]."""
        return averaged(gradient, self.resolution)


@dataclass(frozen=True)
class BcosContributions(DynamicWeights):
    """What each cell of the image adds to the class logit of a B-cos network: ReLU(mean over the cell of W(x) x).

    One channel, >= 0, on a coarse grid: comparable with the GradCAM of a network that is no B-cos network.

    Args:
        resolution: side or (h, w) of the grid; None is the image's.
        passes: as for `BcosWeights`.

    >>> BcosContributions()(torch.ones(1, 6, 28, 28), torch.ones(1, 6, 28, 28)).shape
    torch.Size([1, 1, 14, 14])
    """

    resolution: int | tuple[int, int] | None = 14

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        """Encoded images and W(x), [B, C, H, W] -> [B, 1, h, w]."""
        return F.relu(averaged((features * gradient).sum(1, keepdim=True), self.resolution))


KINDS = (GradCAM, CAM, HiResCAM, LayerCAM, InputGradient, BcosWeights, BcosContributions)


def check_no_layer(name: str, layer: object) -> None:
    """Raise a TypeError for a layer that would be read by nobody."""
    if layer is not None:
        raise TypeError(
            f"{name} explains the images and reads no layer, but got layer={layer!r}. Leave it out, or use one that "
            f"reads a layer: GradCAM({layer!r})."
        )


def check_resolution(name: str, resolution: object) -> None:
    """Raise for what is no size of maps: a TypeError for another type, such as a layer's name, else a ValueError."""
    if resolution is None:
        return
    sides = resolution if isinstance(resolution, (tuple, list)) else (resolution,)
    if not all(isinstance(side, Integral) for side in sides):
        raise TypeError(
            f"Expected resolution to be a side or (h, w) in cells, or None, but got {resolution!r}. {name} reads the "
            "images, so it has no layer to name."
        )
    if len(sides) != (1 if sides is not resolution else 2) or not all(side >= 1 for side in sides):
        raise ValueError(f"Expected resolution to be a side or (h, w) of 1 or more, or None, but got {resolution!r}.")


def check_passes(passes: str | None) -> None:
    """Raise a ValueError for passes that don't exist."""
    if passes not in (None, "shared", "separate"):
        raise ValueError(f'Expected passes to be "shared", "separate" or None, but got {passes!r}.')


def averaged(maps: Tensor, resolution: int | tuple[int, int] | None) -> Tensor:
    """Maps averaged to a side or (h, w), where they are finer.

    >>> averaged(torch.ones(1, 1, 4, 4), 2).shape
    torch.Size([1, 1, 2, 2])
    """
    if resolution is None:
        return maps
    return pooled(maps, (resolution, resolution) if isinstance(resolution, int) else resolution)


def is_signed(explainer: Explainer) -> bool | None:
    """Whether maps may be below 0; None for an explainer that is not one of e2kd's.

    >>> is_signed(CAM()), is_signed(GradCAM())
    (True, False)
    """
    if type(explainer) not in KINDS:
        return None
    return isinstance(explainer, (CAM, InputGradient, BcosWeights))


def reads_images(explainer: Explainer) -> bool:
    """Whether an explainer is given the images in place of features.

    >>> reads_images(InputGradient()), reads_images(GradCAM())
    (True, False)
    """
    return bool(getattr(explainer, "reads_images", False))


def fixes_weights(explainer: Explainer) -> bool:
    """Whether an explainer is given the dynamic weights of a B-cos network in place of the gradient.

    >>> fixes_weights(BcosWeights()), fixes_weights(InputGradient())
    (True, False)
    """
    return bool(getattr(explainer, "fixes_weights", False))


def shares_pass(explainer: Explainer, fraction: float) -> bool:
    """Whether dynamic weights are to be read from the student's own forward, if that is possible.

    In units of a forward, explaining a shared pass costs 3 more than a step without; of a share of the batch, 3 times
    that share where a second pass takes what layers returned in the first, and 6 times where it can't.

    >>> shares_pass(BcosWeights(), 1), shares_pass(BcosWeights(), 1 / 4)
    (True, False)
    """
    passes = getattr(explainer, "passes", None)
    return fixes_weights(explainer) and (fraction >= 0.75 if passes is None else passes == "shared")
