"""How a classifier's confidence falls when pixels go, the most or the least relevant first: the ROAD score of maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from e2kd.modes import dtype_of, evaluating, kept_buffers
from e2kd.outputs import logits_of
from e2kd.perturb.imputation import ranks_nothing, road

PERCENTAGES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


class RoadCurves(NamedTuple):
    """Probabilities of the explained class when pixels are kept and the others imputed.

    Attributes:
        percentages: of pixels kept, [P].
        most: with the most relevant pixels kept, [P, B].
        least: with the least relevant pixels kept, [P, B].
        score: half the mean gap between the two, [B] in [-1/2, 1/2]; above 0 the map ranks better than chance. NaN
            for a constant map. grad-cam's ROADCombined.
    """

    percentages: Tensor
    most: Tensor
    least: Tensor
    score: Tensor


def road_curves(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    classes: Tensor | None = None,
    *,
    percentages: Sequence[float] = PERCENTAGES,
    noise: float = 0.01,
    seed: int = 0,
) -> RoadCurves:
    """The ROAD curves of a model's maps (Rong et al. 2022): good maps keep the class up for longest.

    The model runs 2P times on the batch, in eval mode and without gradients; its modes are put back.

    Args:
        model: any image classifier.
        images: [B, C, H, W], as the model expects them.
        maps: [B, 1, h, w].
        classes: explained classes [B]; None is each image's top class.
        percentages: of pixels kept.
        noise, seed: as for `impute`.

    Raises:
        ValueError: when the shapes don't fit, or for integer images.

    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    >>> found = road_curves(model, torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4), percentages=[25, 75])
    >>> found.most.shape, found.score.shape
    (torch.Size([2, 2]), torch.Size([2]))
    """
    if not images.is_floating_point():
        raise ValueError(
            f"Expected floating-point images, whose pixels can be replaced, but got {images.dtype}. Make floats of "
            "them, and pass the part of the network that takes these."
        )
    with torch.no_grad(), evaluating(model), kept_buffers(model.modules()):
        images = images.to(dtype_of(model))
        chosen = logits_of(model(images)).argmax(1) if classes is None else classes.to(images.device)

        def confidence(keep: float, least: bool) -> Tensor:
            perturbed = road(images, maps, keep, least=least, noise=noise, seed=seed)
            return logits_of(model(perturbed.images)).softmax(1).gather(1, chosen[:, None])[:, 0]

        most, least = (torch.stack([confidence(p, side) for p in percentages]) for side in (False, True))
    score = torch.where(ranks_nothing(maps), torch.nan, (most - least).mean(0) / 2)
    return RoadCurves(torch.tensor(percentages, dtype=torch.float64), most, least, score)
