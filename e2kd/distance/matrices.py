"""Euclidean distances within a batch of features, exact to float64 and without an n x n x d tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from e2kd.errors import shape

CHUNK = 1 << 17  # numbers converted to float64 at a time: 1 MiB, which stays in a core's cache
CLOSE = 1e-3  # squared distance over squared norms below which a Gram matrix has lost too many digits


def distance_matrix(features: Tensor, *, eps: float = 0.0) -> Tensor:
    """Distances between all pairs of a batch, D_ij = ||x_i - x_j|| (UniCAM, Eq. 1), in float64.

    Accurate to about 1e-12 at any offset and scale, near-duplicates included: features are centred, multiplied in
    float64 chunk by chunk, and pairs much closer than their norms are measured once more, directly. Memory is that
    of one chunk. Differentiable, twice; two equal rows give each other no gradient.

    Args:
        features: [..., n, d], any floating-point type; maps are passed as `maps.flatten(1)`.
        eps: added under the root, on the diagonal too, as the papers' code does (1e-18).

    Returns:
        Distances [..., n, n]. Features that are not finite give NaN.

    Raises:
        ValueError: when there is no n or no d.

    >>> distance_matrix(torch.tensor([[0., 0.], [3., 4.]]))
    tensor([[0., 5.],
            [5., 0.]], dtype=torch.float64)
    """
    if features.ndim < 2 or not features.shape[-1]:
        raise ValueError(
            f"Expected features [..., n, d] with d > 0, but got {shape(features.shape)}. Flatten maps: x.flatten(1)."
        )
    flat = features if features.is_floating_point() else features.double()
    flat = flat.cpu() if flat.device.type == "mps" else flat  # which has no float64
    flat = flat.reshape(math.prod(flat.shape[:-2]), *flat.shape[-2:])
    distances: Tensor = _Distances.apply(flat, eps)
    return distances.reshape(*features.shape[:-1], features.shape[-2])


class _Distances(torch.autograd.Function):
    """Distances of [b, n, d]; the gradient is a graph Laplacian times the features."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        distances = _root(_squared(x), eps)
        ctx.save_for_backward(x, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        x, distances = ctx.saved_tensors
        laplacian = pull_back(gradients[0], distances)
        pieces = [laplacian @ _centred(piece) for piece in _chunks(x)]
        return torch.cat(pieces, -1).to(x.dtype), None


def pull_back(gradient: Tensor, distances: Tensor) -> Tensor:
    """The graph Laplacian L [..., n, n] with dy/dx = L x, from dy/dD and D [..., n, n].

    >>> pull_back(torch.ones(2, 2), torch.tensor([[0., 2.], [2., 0.]]))
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """
    apart = (distances > 0) & ~torch.eye(distances.shape[-1], dtype=torch.bool, device=distances.device)
    weights = (gradient + gradient.mT) / torch.where(apart, distances, 1.0)
    weights = torch.where(apart, weights, 0.0)
    return torch.diag_embed(weights.sum(-1)) - weights


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Pieces [b, n, c] of [b, n, d] along its last axis."""
    pieces: tuple[Tensor, ...] = x.split(max(1, CHUNK // max(1, x.shape[0] * x.shape[1])), -1)
    return pieces


def _centred(piece: Tensor) -> Tensor:
    piece = piece.double()
    return piece - piece.mean(-2, keepdim=True)


def _squared(x: Tensor) -> Tensor:
    """Squared distances of [b, n, d] -> [b, n, n]."""
    gram = torch.zeros(*x.shape[:-1], x.shape[-2], dtype=torch.float64, device=x.device)
    for piece in _chunks(x):
        centred = _centred(piece)
        gram += centred @ centred.mT
    norms = gram.diagonal(dim1=-2, dim2=-1)
    sums = norms[..., :, None] + norms[..., None, :]
    squared = sums - 2 * gram
    squared = (squared + squared.mT) / 2
    squared.diagonal(dim1=-2, dim2=-1).mul_(0)  # exactly zero, and still NaN where features are not finite
    return _remeasured(squared, squared < CLOSE * sums, x)


def _remeasured(squared: Tensor, close: Tensor, x: Tensor) -> Tensor:
    """The squared distances with those of the pairs marked in `close` [b, n, n] taken from the differences."""
    batch, i, j = close.triu(1).nonzero(as_tuple=True)
    step = max(1, CHUNK // x.shape[-1])
    for some in range(0, len(batch), step):
        b, row, column = (index[some : some + step] for index in (batch, i, j))
        exact = torch.zeros(len(b), dtype=torch.float64, device=x.device)
        for piece in x.split(CHUNK, -1):
            exact += (piece[b, row].double() - piece[b, column].double()).square().sum(-1)
        squared[b, row, column] = squared[b, column, row] = exact
    return squared


def _root(squared: Tensor, eps: float) -> Tensor:
    return (squared + eps).sqrt()
