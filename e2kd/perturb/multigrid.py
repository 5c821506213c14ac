"""Conjugate gradients with a multigrid preconditioner, for all images of a batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.perturb.grids import Coarse, Pixels, neighbours, prolong, restrict

BOTTOM = 9  # points along the longer side of the coarsest grid, which is solved directly
MOST_STEPS = 200
CHUNK = 1 << 18  # numbers solved for together on a CPU: more don't stay in its cache


def fill(images: Tensor, missing: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Images whose missing pixels are the weighted mean of their neighbours, edges counting twice as much as corners.

    A missing region that touches no known pixel is a whole image; it becomes 0. Pixels that are known are returned
    as they are. Holes that hold NaN are filled like others; known NaN spoil their image.

    Args:
        images: [B, C, H, W] float32 or float64.
        missing: bool [B, 1, H, W].
        tolerance: error in the energy norm over that of the solution, at which to stop. 1e-5 is about 1e-5 of the
            images' range.
    """
    known = (~missing).sum((2, 3), keepdim=True)
    if not missing.any():
        return images
    middle = torch.where(missing, 0.0, images).sum((2, 3), keepdim=True) / known.clamp_min(1)
    kept = torch.where(missing, 0.0, images - middle)  # what is left to solve for is small where little is known
    step = len(images) if images.device.type != "cpu" else max(1, CHUNK // images[0].numel())
    pieces = zip(kept.split(step), (missing & (known > 0)).to(kept.dtype).split(step), strict=True)
    filled = torch.cat([_solve(k, m, tolerance) for k, m in pieces])
    return torch.where(missing, filled + middle, images)


def _solve(kept: Tensor, missing: Tensor, tolerance: float) -> Tensor:
    """Values [B, C, H, W] at the missing pixels, 0 elsewhere."""
    h, w = kept.shape[-2:]
    levels = next(n for n in range(1, 32) if (max(h, w) - 2) >> n < BOTTOM - 1)
    pad = tuple(side for size in (w, h) for side in (0, -(size - 1) % 2**levels))
    right = F.pad(neighbours(kept).mul_(missing), pad)
    pixels = Pixels(F.pad(missing, pad), F.pad(torch.ones_like(missing[:1]), pad))
    coarse = [Coarse(pixels.stencil())]
    for _ in range(levels - 1):
        coarse.append(Coarse(coarse[-1].entries))
    return _conjugate_gradients(Multigrid(pixels, coarse), right, tolerance)[..., :h, :w]


class Multigrid:
    """One V-cycle with a Jacobi step before and after: a symmetric preconditioner for the matrix of `pixels`.

    An undamped step is right: this stencil's high frequencies have eigenvalues in [2/3, 4/3] of the diagonal.
    """

    def __init__(self, pixels: Pixels, coarse: list[Coarse]) -> None:
        self.pixels = pixels
        self.grids: list[Pixels | Coarse] = [pixels, *coarse]
        self.bottom = coarse[-1].inverted()

    def __call__(self, right: Tensor) -> Tensor:
        """An approximate solution [B, C, h, w]."""
        return self._cycle(right, 0)

    def _cycle(self, right: Tensor, level: int) -> Tensor:
        if level == len(self.grids) - 1:
            return (right.flatten(2) @ self.bottom).reshape(right.shape)
        grid = self.grids[level]
        x = grid.inverse * right
        left = grid.spread(x)  # what the step leaves of the right side
        x += prolong(self._cycle(restrict(left), level + 1))
        if level == 0:
            x *= self.pixels.missing
        return grid.spread(x).add_(right).mul_(grid.inverse)


def _conjugate_gradients(cycle: Multigrid, right: Tensor, tolerance: float) -> Tensor:
    """The solution [B, C, h, w]; every channel of every image is a system of its own."""
    x, residual = torch.zeros_like(right), right.clone()
    step = guess = cycle(residual)
    start = size = _dot(residual, guess)
    for _ in range(MOST_STEPS):
        image = cycle.pixels.diagonal * step - cycle.pixels.spread(step)
        length = _over(size, _dot(step, image))
        x.addcmul_(length, step)
        residual.addcmul_(length, image, value=-1)
        guess = cycle(residual)
        before, size = size, _dot(residual, guess)
        if not (size > tolerance**2 * start).any():  # NaN is as done as it will be
            return x.add_(guess)
        step = torch.addcmul(guess, _over(size, before), step)
    raise RuntimeError(
        f"Imputation did not converge to a tolerance of {tolerance} in {MOST_STEPS} steps. Ask for a larger one, or "
        "pass images.double()."
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1.0), 0.0)
