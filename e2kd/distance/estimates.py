"""From the inner products of batches to a correlation, its standard error and its spread by chance."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from e2kd.distance.centring import FEWEST, NOTHING_LEFT, residual, u_center
from e2kd.distance.correlation import check_batches, correlation, ratio
from e2kd.distance.matrices import distance_matrix

Statistic = Callable[[Tensor], Tensor]


def unbiased_of(gram: Tensor) -> Tensor:
    """R* of the first two feature sets from inner products [..., m, m] -> [...].

    >>> unbiased_of(torch.tensor([[4., 1.], [1., 1.]]))
    tensor(0.5000)
    """
    return ratio(gram[..., 0, 1], gram[..., 0, 0], gram[..., 1, 1])


def semi_partial_of(gram: Tensor) -> Tensor:
    """R* of the first feature set without the third, and the second: [..., 3, 3] -> [...].

    >>> semi_partial_of(torch.eye(3) + 0.5)
    tensor(0.2357)
    """
    without = _without_third(gram)
    return ratio(without[..., 0, 1], without[..., 0, 0], gram[..., 1, 1])


def partial_of(gram: Tensor) -> Tensor:
    """R* of the first two feature sets, both without the third: [..., 3, 3] -> [...].

    >>> partial_of(torch.eye(3) + 0.5)
    tensor(0.2500)
    """
    return unbiased_of(_without_third(gram))


def _without_third(gram: Tensor) -> Tensor:
    """Inner products [..., 2, 2] of the residuals; exact zeros where nothing is left."""
    along, norm = gram[..., :2, 2], gram[..., 2:, 2:]
    kept = gram[..., :2, :2]
    left = kept - along[..., :, None] * along[..., None, :] / torch.where(norm == 0, 1.0, norm)
    variances, before = (g.diagonal(dim1=-2, dim2=-1) for g in (left, kept))
    alive = variances > NOTHING_LEFT**2 * before
    return torch.where(alive[..., :, None] & alive[..., None, :], left, 0.0)


def pooled(statistic: Statistic, rows: Tensor) -> tuple[float, float]:
    """The ratio of sums over all batches, and its standard error by deleting one image at a time.

    Deleting an image takes its row and its column out of every sum; what that does to the centring of the others is of
    a higher order.

    Args:
        rows: [N, m, m], sum_j P_ij Q_ij of every image.

    Returns:
        The error is NaN for the fewest images, whose U-centred matrices have two dimensions: it would be next to 0.
    """
    total, n = rows.sum(0), len(rows)
    deleted = statistic(total - 2 * rows)
    error = ((deleted - deleted.mean()).square().sum() * (n - 1) / n).sqrt()
    return statistic(total).item(), error.item() if n > FEWEST else math.nan


def averaged(statistic: Statistic, rows: Tensor, sizes: list[int]) -> tuple[float, float]:
    """The mean of the batches' values and its standard error; that over the images, if there is one batch."""
    values = statistic(torch.stack([batch.sum(0) for batch in rows.split(sizes)]))
    if len(sizes) == 1:
        return pooled(statistic, rows)
    return values.mean().item(), (values.std() / math.sqrt(len(sizes))).item()


def null_spread(*sizes: int, partial: bool = False, mean: bool = False) -> float:
    """Standard deviation by chance: of R* between independent features with many dimensions, √(2 / n(n - 3)).

    From the t-distribution of Székely and Rizzo (2013). For features of few dimensions, labels for instance, it is
    somewhat larger: `permutation_null` measures it.

    Args:
        sizes: images in every batch.
        partial: for `partial_dcor`, which has a dimension less.
        mean: for the mean of the batches' values in place of the ratio of sums.

    >>> round(null_spread(64), 4), round(null_spread(16, 16), 4), null_spread(3)
    (0.0226, 0.0693, nan)
    """
    dimensions = [n * (n - 3) / 2 - partial for n in sizes]
    if not sizes or min(dimensions) <= 0:
        return math.nan
    if mean:
        return math.sqrt(sum(1 / d for d in dimensions)) / len(sizes)
    return 1 / math.sqrt(sum(dimensions))


def permutation_null(
    x: Tensor, y: Tensor, given: Tensor | None = None, *, count: int = 200, generator: torch.Generator | None = None
) -> Tensor:
    """R* with the images of y in random order: what chance gives for these very features.

    Args:
        x, y, given: [n, d] with their own d; with `given`, the semi-partial R*.
        count: of random orders.
        generator: of the random orders, on the CPU.

    Returns:
        [count]. Its standard deviation is the spread by chance; a share (1 + sum(null >= value)) / (1 + count) is the
        p-value of a value.

    Raises:
        ValueError: when the features differ in n.

    >>> null = permutation_null(torch.rand(16, 9), torch.rand(16, 9), generator=torch.Generator().manual_seed(0))
    >>> null.shape, bool(null.mean().abs() < 0.05)
    (torch.Size([200]), True)
    """
    features = [t for t in (x, y, given) if t is not None]
    check_batches(*features)
    p, q, *rest = (u_center(distance_matrix(t)) for t in features)
    p = residual(p, rest[0]) if rest else p
    orders = (torch.randperm(len(x), generator=generator).to(q.device) for _ in range(count))
    return torch.stack([correlation(p, q[order][:, order]) for order in orders])
