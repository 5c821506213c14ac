"""UniCAM's arithmetic: the score of what one network's distances have beyond another's, its gradient, and the map."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.distance import Guards, correlation, inner, residual, u_center
from e2kd.distance.centring import NONE
from e2kd.distance.matrices import pull_back
from e2kd.transfer.readings import LayerReading

Objective = Callable[[Tensor, "Tensor | None", Guards], Tensor]


def relevance(unique: Tensor, labels: Tensor | None, guards: Guards = NONE) -> Tensor:
    """How what is unique correlates with the labels: the semi-partial R*, in [-1, 1]. UniCAM's y^c with embeddings.

    Args:
        unique, labels: residual and U-centred matrix [n, n].

    >>> relevance(u_center(1 - torch.eye(5).roll(1, 0)), None)
    Traceback (most recent call last):
    ...
    ValueError: Relevance is measured against labels, but there are none. Pass targets, or another objective.
    """
    if labels is None:
        raise ValueError(
            "Relevance is measured against labels, but there are none. Pass targets, or another objective."
        )
    return correlation(unique, labels, guards=guards)


def unlikeness(unique: Tensor, labels: Tensor | None = None, guards: Guards = NONE) -> Tensor:
    """Every image's largest unique distance to another, summed: the papers' y^c without labels.

    >>> unlikeness(torch.tensor([[0., 2.], [3., 0.]]))
    tensor(5.)
    """
    return unique.amax(-1).sum()


def energy(unique: Tensor, labels: Tensor | None = None, guards: Guards = NONE) -> Tensor:
    """The unique distance variance <U, U>: without labels too, but smooth, and of all pairs of images.

    >>> energy(torch.ones(4, 4))
    tensor(4.)
    """
    return inner(unique, unique)


LABEL_FREE: tuple[Objective, ...] = (unlikeness, energy)  # their maps are the same whatever the labels


def channel_weights(
    reading: LayerReading, given: Tensor, labels: Tensor | None, objective: Objective, guards: Guards = NONE
) -> tuple[Tensor, Tensor]:
    """The score y of what a layer has beyond `given`, and β = mean over space of dy/dA (UniCAM, Eq. 5), in closed form.

    y depends on the features through their distances D alone, so that dy/dA = L A with the graph Laplacian of
    (dy/dD + its transpose) / D, and β = L mean(A). The gradient of n x n matrices is all that is differentiated.

    Args:
        reading: the layer, n images and C channels.
        given: distances of the other network's layer, [n, n].
        labels: distances of the labels, [n, n].
        objective: (residual, U-centred labels, guards) -> y [].

    Returns:
        y [] and β [n, C], float64; y is NaN and β 0 where the statistics are undefined.
    """
    with torch.inference_mode(False), torch.enable_grad():
        distances = reading.distances.clone().requires_grad_()
        unique = residual(u_center(distances), u_center(given.clone()), guards=guards)
        score = objective(unique, None if labels is None else u_center(labels.clone()), guards)
        (gradient,) = torch.autograd.grad(score, distances)
    weights = pull_back(gradient, reading.distances) @ reading.means
    if reading.pooled:
        weights = weights / (reading.maps.shape[2] * reading.maps.shape[3])
    return score.detach(), weights


def weighted(maps: Tensor, weights: Tensor) -> Tensor:
    """ReLU(sum_k β_k A_k) (UniCAM, Eq. 6): maps [n, C, h, w] and weights [n, C] -> [n, 1, h, w].

    >>> weighted(torch.tensor([[[[1., 2.]], [[3., 1.]]]]), torch.tensor([[1., -1.]]))
    tensor([[[[0., 1.]]]])
    """
    peak = weights.abs().amax(1, keepdim=True)
    unit = weights / torch.where(peak > 0, peak, 1.0)  # the map's scale is free, float32's range is not
    return F.relu(torch.einsum("nc,nchw->nhw", unit.to(maps.dtype), maps))[:, None]


def scaled(maps: Tensor) -> Tensor:
    """Every map [n, 1, h, w] brought to [0, 1] by its smallest and largest value; constant ones become 0.

    >>> scaled(torch.tensor([[[[1., 2., 3.]]], [[[5., 5., 5.]]]])).squeeze()
    tensor([[0.0000, 0.5000, 1.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1.0)


def papers_scaled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The papers' picture of raw maps [n, 1, h, w]: scaled with 1e-7, resized to [n, 1, H, W], and scaled again."""

    def scale(x: Tensor) -> Tensor:
        above = x - x.amin((2, 3), keepdim=True)
        return above / (1e-7 + above.amax((2, 3), keepdim=True))

    return scale(F.interpolate(scale(maps), size, mode="bilinear", align_corners=False))
