"""Layers that B-cos networks made from pretrained ones have, besides those of all B-cos networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.bcos.convolution import BcosConv2d, wrong_input
from e2kd.bcos.dynamic import held
from e2kd.bcos.norms import BatchNormUncentered2d


class NormaliseEncoded(nn.Module):
    """Encoded images (x, 1 - x) -> (z, -z) with z = (x - mean) / std, without an offset.

    z is computed as ((1 - mean) x - mean (1 - x)) / std, which is linear in the encoded image: contributions of its
    pixels explain all of the logit.

    Args:
        mean: of the C colours of images in [0, 1].
        std: of the same.
        dtype: of the network.

    >>> from e2kd.bcos import AddInverse
    >>> NormaliseEncoded([0.5], [0.25])(AddInverse()(torch.ones(1, 1, 1, 1))).flatten()
    tensor([ 2., -2.])
    """

    of_colours: Tensor
    of_inverse: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        centre, scale = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("of_colours", ((1 - centre) / scale).to(dtype), persistent=False)
        self.register_buffer("of_inverse", (centre / scale).to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 2C, H, W] -> [B, 2C, H, W]."""
        if x.ndim != 4 or x.shape[1] != 2 * len(self.mean):
            raise ValueError(wrong_input(x, 2 * len(self.mean)))
        colours, inverse = x.chunk(2, 1)
        z = colours * self.of_colours - inverse * self.of_inverse
        return torch.cat([z, -z], 1)

    def extra_repr(self) -> str:
        """Both settings; neither is in the state_dict."""
        return f"mean={self.mean}, std={self.std}"


class EncodedConv2d(BcosConv2d):
    """The first B-cos convolution of a network that was trained on normalised colours.

    Args:
        normalise: what encoded images go through first.
        args, options: those of `BcosConv2d`.

    >>> normalise = NormaliseEncoded((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    >>> EncodedConv2d(normalise, 6, 4, 3)(torch.rand(1, 6, 8, 8)).shape
    torch.Size([1, 4, 6, 6])
    """

    def __init__(self, normalise: NormaliseEncoded, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        """[B, 2C, H, W] -> [B, out, h, w]."""
        return super().forward(self.normalise(x))


class BatchNormActUncentered2d(BatchNormUncentered2d):
    """Uncentred batch norm and what follows it inside of one module, as in timm's DenseNets.

    Args:
        after: dropout and activation.
        args, options: those of `BatchNormUncentered2d`.

    >>> BatchNormActUncentered2d([nn.Identity(), nn.ReLU()], 3)(torch.randn(2, 3, 4, 4)).min() >= 0
    tensor(True)
    """

    def __init__(self, after: Sequence[nn.Module], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.drop, self.act = after

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.act(self.drop(super().forward(input)))  # type: ignore[no-any-return]


class HeldAttention(nn.Dropout):
    """Takes the place of the dropout after the softmax of an attention; an explanation holds its output fixed.

    >>> HeldAttention(0.1).eval()(torch.tensor([0.25, 0.75]))
    tensor([0.2500, 0.7500])
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., N, M] -> [..., N, M]."""
        return held(super().forward(input))
