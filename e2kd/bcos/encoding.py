"""The ends of B-cos networks: six-channel images, gates, and logits with a bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from e2kd.bcos.dynamic import scaled
from e2kd.bcos.unit import full_precision
from e2kd.errors import check_temperature


class AddInverse(nn.Module):
    """Images x in [0, 1] -> (x, 1 - x), so that dark pixels can contribute as well as bright ones.

    >>> AddInverse()(torch.full((1, 3, 2, 2), 0.25))[0, :, 0, 0]
    tensor([0.2500, 0.2500, 0.2500, 0.7500, 0.7500, 0.7500])
    """

    def forward(self, images: Tensor) -> Tensor:
        """[..., C, H, W] in [0, 1] -> [..., 2C, H, W]."""
        return torch.cat([images, 1 - images], -3)


class GELU(nn.Module):
    """GELU with its gate as a dynamic weight: x * P(N(0, 1) <= x), for networks made from standard ones.

    >>> GELU()(torch.tensor([-1., 0., 2.]))
    tensor([-0.1587,  0.0000,  1.9545])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return scaled(x, 0.5 * (1 + (full_precision(x) * 0.5**0.5).erf()))


class LogitLayer(nn.Module):
    """logits = x / temperature + bias; the bias makes the sigmoid of an undecided network 1 / classes.

    Raises:
        ValueError: for a temperature that is not > 0.

    >>> LogitLayer(bias=uniform_bias(10))(torch.zeros(1))
    tensor([-2.1972])
    """

    def __init__(self, bias: float, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.bias, self.temperature = bias, temperature

    @classmethod
    def of(cls, classes: int, bias: float | None) -> LogitLayer:
        """The layer of a network with so many classes; `uniform_bias` if there is no bias.

        >>> LogitLayer.of(10, None), LogitLayer.of(10, 1.0)
        (LogitLayer(bias=-2.1972, temperature=1.0), LogitLayer(bias=1.0000, temperature=1.0))
        """
        return cls(uniform_bias(classes) if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return (x if self.temperature == 1 else x / self.temperature) + self.bias

    def extra_repr(self) -> str:
        """Both settings; neither is in the state_dict."""
        return f"bias={self.bias:.4f}, temperature={self.temperature}"


def uniform_bias(classes: int) -> float:
    """-log(classes - 1), the logit of the probability 1 / classes: the bias of all released networks.

    >>> round(uniform_bias(1000), 4)
    -6.9068
    """
    if classes < 2:
        raise ValueError(f"Expected at least 2 classes, but got {classes}; one logit alone needs a `logit_bias`.")
    return -math.log(classes - 1)
