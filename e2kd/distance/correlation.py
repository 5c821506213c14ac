"""Distance correlation: bias-corrected, biased, partial and semi-partial. All are of the squared correlation, R²."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.distance.centring import NONE, Guards, double_center, inner, residual, u_center
from e2kd.distance.matrices import distance_matrix
from e2kd.errors import shape


def correlation(p: Tensor, q: Tensor, *, guards: Guards = NONE) -> Tensor:
    """Correlation of U-centred matrices, <P, Q> / sqrt(<P, P> <Q, Q>), in [-1, 1]; NaN where one is zero or n < 4.

    Args:
        p, q: [..., n, n], from `u_center` or `residual`.

    >>> p = u_center(distance_matrix(torch.rand(6, 3)))
    >>> round(correlation(p, 5 * p).item(), 6)
    1.0
    """
    return ratio(inner(p, q), inner(p, p), inner(q, q), root=guards.root)


def ratio(pq: Tensor, pp: Tensor, qq: Tensor, *, root: float = 0.0) -> Tensor:
    """pq / sqrt(pp qq + root); without root at any scale, and NaN (without a gradient) where pp or qq is 0.

    >>> ratio(torch.tensor([1., 0.]), torch.tensor([4., 0.]), torch.tensor([1., 1.]))
    tensor([0.5000,    nan])
    """
    if root:
        return pq / (pp * qq + root).sqrt()
    alive = (pp != 0) & (qq != 0)
    roots = torch.where(alive, pp, 1.0).sqrt() * torch.where(alive, qq, 1.0).sqrt()
    return torch.where(alive, pq / roots, torch.nan)


def dcor(x: Tensor, y: Tensor, *, normalize: bool = False, guards: Guards = NONE) -> Tensor:
    """Squared distance correlation R² of two feature sets, biased, in [0, 1] (Székely et al. 2007).

    Of little use here: with more dimensions than images it is near 1 for independent features (1.000 at n = 8,
    d = 50,000). Kept to compare with published numbers; use `dcor_unbiased`. UniCAM's code scales every row to unit
    length first: `normalize=True, guards=PAPERS_BIASED` gives its numbers exactly.

    Args:
        x, y: [..., n, d] and [..., n, e].
        normalize: scale rows to unit length first.

    Returns:
        [...]; NaN where features are constant.

    Raises:
        ValueError: when x and y differ in n.

    >>> x = torch.rand(8, 3)
    >>> round(dcor(x, 2 * x + 1).item(), 6)
    1.0
    """
    if normalize:
        x, y = (F.normalize(t.double(), dim=-1, eps=torch.finfo(torch.float64).tiny) for t in (x, y))
    p, q = _centred(double_center, guards, x, y)
    pq, pp, qq = ((a * b).mean((-2, -1)) for a, b in ((p, q), (p, p), (q, q)))
    return ratio(pq, pp, qq, root=guards.root)


def dcor_unbiased(x: Tensor, y: Tensor, *, guards: Guards = NONE) -> Tensor:
    """Bias-corrected squared distance correlation R* (Székely and Rizzo 2014), in [-1, 1]; 0 on average if independent.

    Neither clipped nor rooted: values below 0 are chance, and `null_spread` says how large chance is.

    Args:
        x, y: [..., n, d] and [..., n, e].
        guards: `PAPERS` gives the numbers of the papers' New_DC.

    Returns:
        [...]; NaN where `Score.reason` of `DistanceSums` says why.

    Raises:
        ValueError: when x and y differ in n.

    >>> x = torch.rand(8, 3)
    >>> round(dcor_unbiased(x, 2 * x + 1).item(), 6)
    1.0
    """
    return correlation(*_centred(u_center, guards, x, y), guards=guards)


def partial_dcor(x: Tensor, y: Tensor, given: Tensor, *, guards: Guards = NONE) -> Tensor:
    """Partial distance correlation of x and y given a third feature set (Székely and Rizzo 2014), in [-1, 1].

    Args:
        x, y, given: [..., n, d] with their own d.

    Returns:
        [...]; NaN where `Score.reason` of `DistanceSums` says why.

    Raises:
        ValueError: when they differ in n.

    >>> x, z = torch.rand(8, 3), torch.rand(8, 3)
    >>> round(partial_dcor(x, 3 * x, z).item(), 6)
    1.0
    """
    p, q, r = _centred(u_center, guards, x, y, given)
    return correlation(residual(p, r, guards=guards), residual(q, r, guards=guards), guards=guards)


def semi_partial_dcor(x: Tensor, y: Tensor, given: Tensor, *, guards: Guards = NONE) -> Tensor:
    """Correlation of y with what x has beyond a third feature set: only x is residualised. UniCAM's P_DC and y^c.

    Equal to partial_dcor(x, y, given) * sqrt(1 - dcor_unbiased(y, given)²).

    Args:
        x, y, given: [..., n, d] with their own d.
        guards: `PAPERS` gives the numbers of the papers' P_DC.

    Returns:
        [...], in [-1, 1]; NaN where `Score.reason` of `DistanceSums` says why.

    Raises:
        ValueError: when they differ in n.

    >>> x, y = torch.rand(8, 3), torch.rand(8, 3)
    >>> semi_partial_dcor(x, y, x)
    tensor(nan, dtype=torch.float64)
    """
    p, q, r = _centred(u_center, guards, x, y, given)
    return correlation(residual(p, r, guards=guards), q, guards=guards)


def _centred(centre: Callable[[Tensor], Tensor], guards: Guards, *features: Tensor) -> list[Tensor]:
    check_batches(*features)
    return [centre(distance_matrix(x, eps=guards.distance)) for x in features]


def check_batches(*features: Tensor) -> None:
    """Raise unless all features [..., n, d] are of the same n images."""
    if len({x.shape[:-1] for x in features}) > 1:
        raise ValueError(
            f"Expected features [..., n, d] of the same images, but got {', '.join(shape(x.shape) for x in features)}. "
            "Label embeddings need one row per image: embeddings[labels]."
        )
