"""The percentile of each sample's values, of any number of them: torch.quantile takes no more than 16 million."""

from __future__ import annotations

import torch
from torch import Tensor


def percentile_of(values: Tensor, percent: float) -> Tensor:
    """The value that `percent` of a sample's values are below, linear between neighbours.

    Args:
        values: [B, ...], float.
        percent: from 0 to 100.

    Returns:
        [B, 1, ...], to be compared with the values.

    >>> percentile_of(torch.tensor([[3., 1., 2.], [0., 0., 8.]]), 75)
    tensor([[2.5000],
            [4.0000]])
    """
    ranked = values.flatten(1).sort(1).values
    place = (ranked.shape[1] - 1) * percent / 100
    low, high = ranked[:, int(place)], ranked[:, min(int(place) + 1, ranked.shape[1] - 1)]
    return torch.lerp(low, high, place % 1).view(-1, *[1] * (values.ndim - 1))
