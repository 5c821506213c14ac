"""Grids of a multigrid method: 9-point stencils, their coarser versions, and the way between them.

Every grid has an odd number of points along both sides; the points of the coarser grid are its even ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIVE = 1e-6  # share of the largest diagonal entry below which a coarse point carries no unknown
RIDGE = 1e-4  # of the diagonal: several coarse points may carry one lone pixel, and are then not independent


def neighbours(x: Tensor) -> Tensor:
    """ROAD's weighted sum over the eight neighbours, 2 (edge) and 1 (corner), nothing outside: [..., h, w] -> same.

    >>> neighbours(torch.ones(1, 3, 3))
    tensor([[[ 5.,  8.,  5.],
             [ 8., 12.,  8.],
             [ 5.,  8.,  5.]]])
    """
    padded = F.pad(x, (1, 1, 1, 1))
    along = (padded[..., :-2] + padded[..., 2:]).add_(padded[..., 1:-1], alpha=2)
    return (along[..., :-2, :] + along[..., 2:, :]).add_(along[..., 1:-1, :], alpha=2).sub_(x, alpha=4)


class Pixels:
    """The finest grid: every missing pixel is the weighted mean of its neighbours inside the image.

    Like every grid here it stands for a symmetric matrix, a diagonal less the weights of the neighbours.

    Args:
        missing: 1 where a pixel is unknown, [B, 1, h, w].
        inside: 1 inside the image, 0 in the border that makes its sides odd, [1, 1, h, w].

    Attributes:
        inverse: 1 over the diagonal, 0 where nothing is unknown, [B, 1, h, w].
    """

    def __init__(self, missing: Tensor, inside: Tensor) -> None:
        self.missing = missing
        self.diagonal = neighbours(inside)
        self.inverse = missing / self.diagonal.clamp_min(1)

    def spread(self, x: Tensor) -> Tensor:
        """The weights of the neighbours times x [B, C, h, w], which is 0 where nothing is unknown, as is the result."""
        return neighbours(x).mul_(self.missing)

    def stencil(self) -> Tensor:
        """The matrix as what every point takes from its neighbours, [B, 3, 3, h, w]."""
        h, w = self.missing.shape[-2:]
        around = F.pad(self.missing, (1, 1, 1, 1))
        found = self.missing.new_empty(len(self.missing), 3, 3, h, w)
        for i, j in _offsets():
            weight = -(2 - abs(i - 1)) * (2 - abs(j - 1))
            found[:, i, j] = (self.missing * around[..., i : i + h, j : j + w])[:, 0] * weight
        found[:, 1, 1] = (self.missing * self.diagonal)[:, 0]
        return found


class Coarse:
    """A coarser grid, from the finer one's stencil [B, 3, 3, h, w] by Galerkin's condition, P^T A P."""

    def __init__(self, finer: Tensor) -> None:
        self.entries = _contract(_contract(finer, 1, -2), 2, -1)
        diagonal = self.entries[:, 1, 1][:, None]
        alive = diagonal > ALIVE * diagonal.amax((-2, -1), keepdim=True)
        self.inverse = torch.where(alive, 1 / torch.where(alive, diagonal, 1.0), 0.0)
        self.weights = [(i, j, -self.entries[:, i, j][:, None]) for i, j in _offsets() if (i, j) != (1, 1)]

    def spread(self, x: Tensor) -> Tensor:
        """The weights of the neighbours times x [B, C, h, w]."""
        h, w = x.shape[-2:]
        padded = F.pad(x, (1, 1, 1, 1))
        total = torch.zeros_like(x)
        for i, j, weight in self.weights:
            total.addcmul_(weight, padded[..., i : i + h, j : j + w])
        return total

    def inverted(self) -> Tensor:
        """Nearly the inverse matrix, [B, hw, hw], 0 where nothing is unknown; for small grids."""
        h, w = self.inverse.shape[-2:]
        count, alive = h * w, (self.inverse != 0).flatten(1)
        both = alive[:, :, None] & alive[:, None, :]
        unit = torch.eye(count, dtype=self.inverse.dtype, device=self.inverse.device).view(1, count, h, w)
        off = self.spread(unit.expand(len(alive), -1, -1, -1)).flatten(2)
        diagonal = torch.where(alive, self.entries[:, 1, 1].flatten(1) * (1 + RIDGE), 1.0)
        inverse = torch.linalg.inv(torch.diag_embed(diagonal) - torch.where(both, off, 0.0))
        return torch.where(both, inverse, 0.0)


def _offsets() -> list[tuple[int, int]]:
    return [(i, j) for i in range(3) for j in range(3)]


def _split(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The even points and the odd ones between them."""
    even, odd = ([slice(None)] * x.ndim for _ in range(2))
    even[dim], odd[dim] = slice(0, None, 2), slice(1, None, 2)
    return x[tuple(even)], x[tuple(odd)]


def _sides(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of n even points: those left of an odd one, and those right of one."""
    n = x.shape[dim]
    return x.narrow(dim, 0, n - 1), x.narrow(dim, 1, n - 1)


def restrict(x: Tensor, dims: tuple[int, ...] = (-2, -1)) -> Tensor:
    """From a grid to the coarser one, the transpose of `prolong`: [..., 2n - 1] -> [..., n] along both sides.

    >>> restrict(torch.ones(1, 5), (-1,))
    tensor([[1.5000, 2.0000, 1.5000]])
    """
    for dim in dims:
        even, odd = _split(x, dim)
        x = even.clone(memory_format=torch.contiguous_format)
        for side in _sides(x, dim):
            side.add_(odd, alpha=0.5)
    return x


def prolong(x: Tensor, dims: tuple[int, ...] = (-1, -2)) -> Tensor:
    """From a grid to the finer one, linear in between: [..., n] -> [..., 2n - 1] along both sides.

    >>> prolong(torch.tensor([[0., 2., 4.]]), (-1,))
    tensor([[0., 1., 2., 3., 4.]])
    """
    for dim in dims:
        size = list(x.shape)
        size[dim] = 2 * size[dim] - 1
        fine = x.new_empty(size)
        even, odd = _split(fine, dim)
        left, right = _sides(x, dim)
        even.copy_(x)
        odd.copy_((left + right).mul_(0.5))
        x = fine
    return x


def _contract(stencil: Tensor, axis: int, dim: int) -> Tensor:
    """P^T A P along one side: `axis` holds what a point takes from its left, itself and its right, `dim` the points.

    With weights 1/2 to either side, an even point keeps its own entry, half of its couplings to the odd points
    between, and a quarter of those points' own entries.
    """
    (left, left_odd), (own, own_odd), (right, right_odd) = (_split(t, dim) for t in stencil.unbind(axis))
    quarter = own_odd * 0.25
    to_left, to_right = left * 0.5, right * 0.5
    itself = own + to_left + to_right
    before, after = _sides(itself, dim)
    before.add_(quarter).add_(left_odd, alpha=0.5)
    after.add_(quarter).add_(right_odd, alpha=0.5)
    _sides(to_right, dim)[0].add_(quarter).add_(right_odd, alpha=0.5)
    _sides(to_left, dim)[1].add_(quarter).add_(left_odd, alpha=0.5)
    return torch.stack((to_left, itself, to_right), axis)
