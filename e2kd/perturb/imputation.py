"""ROAD (Rong et al. 2022): keep the pixels a map ranks first or last, impute the others from their neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from e2kd.errors import shape
from e2kd.percentiles import percentile_of
from e2kd.perturb.multigrid import fill
from e2kd.similarity import at_least_float32, resize


class Perturbed(NamedTuple):
    """Images [B, C, H, W], the pixels that were kept (bool [B, 1, H, W]), and whose map ranks none (bool [B]).

    A map that is constant or not finite ranks no pixel before another: `blank` images should not count in any score.
    """

    images: Tensor
    kept: Tensor
    blank: Tensor

    @property
    def share(self) -> Tensor:
        """Share of the pixels kept, [B] in [0, 1]."""
        return self.kept.double().mean((1, 2, 3))


def keep_most(maps: Tensor, percent: float) -> Tensor:
    """The most relevant `percent` of the pixels of maps [B, 1, H, W]: bool, same shape.

    Pixels of equal relevance are never told apart, so fewer are kept where a tie crosses the threshold: of a map that
    is half zeros at most half, of a constant map none; 100 keeps all. grad-cam's RemoveLeastRelevantFirst.

    >>> keep_most(torch.tensor([[[[0., 1.], [2., 3.]]]]), 50)
    tensor([[[[False, False],
              [ True,  True]]]])
    """
    kept = maps > _quantile(maps, 100 - percent)
    return kept if percent < 100 else torch.ones_like(kept)


def keep_least(maps: Tensor, percent: float) -> Tensor:
    """The least relevant `percent` of the pixels of maps [B, 1, H, W]: bool, same shape.

    Where a tie crosses the threshold more are kept: of a map that is half zeros at least half; 0 keeps none. grad-cam's
    RemoveMostRelevantFirst removes the tie, and with it all of such a map.

    >>> keep_least(torch.tensor([[[[0., 0.], [0., 3.]]]]), 25)
    tensor([[[[ True,  True],
              [ True, False]]]])
    """
    kept = maps <= _quantile(maps, percent)
    return kept if percent > 0 else torch.zeros_like(kept)


def _quantile(maps: Tensor, percent: float) -> Tensor:
    """The percentile of every map, [B, 1, 1, 1]."""
    if not 0 <= percent <= 100:
        raise ValueError(f"Expected a percentage of pixels to keep, from 0 to 100, but got {percent}.")
    return percentile_of(at_least_float32(maps), percent)


def impute(images: Tensor, kept: Tensor, *, noise: float = 0.01, seed: int = 0, tolerance: float = 1e-5) -> Tensor:
    """Noisy linear imputation: every pixel that is not kept becomes the weighted mean of its neighbours, plus noise.

    Edges weigh 1/6, corners 1/12, neighbours outside the image nothing. All images are solved for at once on their
    device, without SciPy. An image that keeps no pixel becomes 0, the mean colour of normalised images.

    Args:
        images: [B, C, H, W], normalised as the model expects them.
        kept: bool [B, 1, H, W].
        noise: standard deviation of the noise on imputed pixels, which hides their smoothness from the model.
        seed: of the noise. The global random state stays as it is.
        tolerance: relative error of the solution, in the energy norm.

    Raises:
        ValueError: when the shapes don't fit.

    >>> image = torch.tensor([[[[0., 9., 6.]]]])
    >>> impute(image, image != 9, noise=0)
    tensor([[[[0., 3., 6.]]]])
    """
    if images.ndim != 4 or kept.dtype != torch.bool or kept.shape != (len(images), 1, *images.shape[2:]):
        raise ValueError(
            f"Expected images [B, C, H, W] and a bool mask [B, 1, H, W] of the pixels to keep, but got "
            f"{shape(images.shape)} and {shape(kept.shape)} of {kept.dtype}."
        )
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        filled = fill(at_least_float32(images), ~kept, tolerance)
        generator = torch.Generator().manual_seed(seed)
        grain = noise * torch.randn(images.shape, generator=generator).to(filled)
        return torch.where(kept, filled, filled + grain).to(images.dtype)


def road(
    images: Tensor,
    maps: Tensor,
    keep: float = 50.0,
    *,
    least: bool = False,
    noise: float = 0.01,
    seed: int = 0,
    tolerance: float = 1e-5,
) -> Perturbed:
    """Images with only the pixels that their maps rank first, the others imputed (UniCAM, Eq. 7: x̂ = f(I ∘ H)).

    Args:
        images: [B, C, H, W], normalised as the model expects them.
        maps: [B, 1, h, w] of any resolution; resized bilinearly.
        keep: percentage of the pixels kept. The papers' code uses 50 and 20.
        least: keep the least relevant ones instead.
        noise, seed, tolerance: as for `impute`.

    Raises:
        ValueError: when the shapes don't fit or `keep` is no percentage.

    >>> found = road(torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4), keep=25)
    >>> found.images.shape, found.share.tolist(), found.blank.tolist()
    (torch.Size([2, 3, 8, 8]), [0.25, 0.25], [False, False])
    """
    if images.ndim != 4 or maps.ndim != 4 or maps.shape[:2] != (len(images), 1):
        raise ValueError(
            f"Expected images [B, C, H, W] and maps [B, 1, h, w], but got {shape(images.shape)} and "
            f"{shape(maps.shape)}. Sum maps of several channels first: maps.sum(1, keepdim=True)."
        )
    resized = resize(at_least_float32(maps.detach()), (images.shape[2], images.shape[3]))
    kept = keep_least(resized, keep) if least else keep_most(resized, keep)
    return Perturbed(impute(images, kept, noise=noise, seed=seed, tolerance=tolerance), kept, ranks_nothing(maps))


def ranks_nothing(maps: Tensor) -> Tensor:
    """Whose map [B, 1, h, w] is constant or not finite, bool [B].

    >>> ranks_nothing(torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, torch.nan]])[:, None, None])
    tensor([ True, False,  True])
    """
    values = maps.flatten(1)
    return (values.amax(1) == values.amin(1)) | ~values.isfinite().all(1)
