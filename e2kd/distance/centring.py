"""Centred distance matrices, their inner product and their residuals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 4  # images: U-centred matrices of n span n(n-3)/2 dimensions
FLAT = 1e-12  # norm of a centred matrix over that of the distances, below which it is rounding
NOTHING_LEFT = 1e-6  # norm of a residual over that of its matrix: less than float32 features can tell


@dataclass(frozen=True)
class Guards:
    """The absolute terms with which the papers' code avoids divisions by zero. e2kd's own guards are relative.

    With a guard, degenerate input gives the number the papers' code gives, in place of NaN.

    Attributes:
        distance: added under the root of a distance.
        projection: added to <Q, Q> in a residual.
        root: added under the root of the normalisation.

    >>> Guards(distance=1e-18).root
    0.0
    """

    distance: float = 0.0
    projection: float = 0.0
    root: float = 0.0


NONE = Guards()
PAPERS = Guards(distance=1e-18, projection=1e-12, root=1e-18)  # UniCAM's New_DC and P_DC
PAPERS_BIASED = Guards(distance=1e-12, root=1e-9)  # UniCAM's Distance_Correlation


def u_center(distances: Tensor) -> Tensor:
    """U-centred distances (UniCAM, Eq. 2; Székely and Rizzo 2014): every row sums to 0, the diagonal is 0.

    A matrix with equal distances between all images gives exact zeros, not rounding noise. Fewer than three images
    give NaN.

    Args:
        distances: [..., n, n].

    >>> u_center(torch.tensor([[0., 1., 4., 4.], [1., 0., 4., 4.], [4., 4., 0., 1.], [4., 4., 1., 0.]]))
    tensor([[ 0., -2.,  1.,  1.],
            [-2.,  0.,  1.,  1.],
            [ 1.,  1.,  0., -2.],
            [ 1.,  1., -2.,  0.]])
    """
    n = distances.shape[-1]
    if n < 3:
        return torch.full_like(distances, torch.nan)
    total = distances.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    rows, columns = distances.sum(-1, keepdim=True) / (n - 2), distances.sum(-2, keepdim=True) / (n - 2)
    diagonal = torch.eye(n, dtype=torch.bool, device=distances.device)
    centred = (distances - rows - columns + total).masked_fill(diagonal, 0.0)
    return _without_rounding(centred, distances, FLAT)


def double_center(distances: Tensor) -> Tensor:
    """Doubly centred distances [..., n, n] of the biased statistics (Székely et al. 2007).

    >>> double_center(torch.tensor([[0., 2.], [2., 0.]]))
    tensor([[-1.,  1.],
            [ 1., -1.]])
    """
    rows, columns = distances.mean(-1, keepdim=True), distances.mean(-2, keepdim=True)
    return _without_rounding(distances - rows - columns + rows.mean(-2, keepdim=True), distances, FLAT)


def _without_rounding(matrix: Tensor, whole: Tensor, share: float) -> Tensor:
    """The matrix [..., n, n], or zeros where it is no more than a share of what it was computed from."""
    norm, limit = (torch.linalg.matrix_norm(m.detach())[..., None, None] for m in (matrix, whole))
    return torch.where(norm <= share * limit, torch.zeros_like(matrix), matrix)


def inner(p: Tensor, q: Tensor) -> Tensor:
    """Inner product of U-centred matrices, <P, Q> = sum_{i != j} P_ij Q_ij / (n (n - 3)): unbiased distance covariance.

    Args:
        p, q: [..., n, n].

    Returns:
        [...]; NaN with fewer than 4 images.

    >>> inner(torch.ones(4, 4), torch.ones(4, 4))
    tensor(4.)
    """
    n = p.shape[-1]
    products = (p * q).sum((-2, -1))
    return products / (n * (n - 3)) if n >= FEWEST else torch.full_like(products, torch.nan)


def residual(p: Tensor, q: Tensor, *, guards: Guards = NONE) -> Tensor:
    """What is left of P without Q: P - <P, Q> / <Q, Q> Q (UniCAM, Eq. 3-4), orthogonal to Q.

    Without guards: where Q is zero (constant features) there is nothing to take away and P stays as it is; where P is
    Q but for its scale the residual is exact zeros, not rounding noise.

    Args:
        p, q: U-centred [..., n, n].

    >>> p = u_center(torch.cdist(torch.eye(5), torch.ones(5, 5).triu()))
    >>> residual(p, 2 * p).abs().max()
    tensor(0.)
    """
    against, norm = inner(p, q)[..., None, None], inner(q, q)[..., None, None]
    if guards.projection:
        return p - against / (norm + guards.projection) * q
    left = p - against / torch.where(norm == 0, 1.0, norm) * q
    return _without_rounding(left, p, NOTHING_LEFT)
