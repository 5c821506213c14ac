"""Heads of B-cos networks made from pretrained ones: the classifier at every place, pooling after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from e2kd.bcos.convolution import BcosConv2d
from e2kd.bcos.dynamic import scaled
from e2kd.bcos.encoding import LogitLayer
from e2kd.bcos.linear import BcosLinear
from e2kd.bcos.unit import full_precision


class ConvClassifier(BcosConv2d):
    """A 1x1 B-cos convolution at every place, the mean over places, the bias of the logits.

    Args:
        in_channels: of the features.
        classes: K.
        logit_bias: -log(K - 1) if None.
        options: those of `BcosConv2d`.

    >>> import torch
    >>> ConvClassifier(8, 5)(torch.rand(2, 8, 7, 7)).shape
    torch.Size([2, 5])
    """

    def __init__(self, in_channels: int, classes: int, logit_bias: float | None = None, **options: Any) -> None:
        super().__init__(in_channels, classes, **options)
        self.logit_layer = LogitLayer.of(classes, logit_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> logits [B, K]."""
        return self.logit_layer(super().forward(x).mean((2, 3)))  # type: ignore[no-any-return]


class LinearClassifier(BcosLinear):
    """A B-cos layer at every token, the mean over the tokens of the image, the bias of the logits.

    Args:
        in_features: length of the tokens.
        classes: K.
        logit_bias: -log(K - 1) if None.
        first: tokens in front (class token, registers) that don't count.
        options: those of `BcosLinear`.

    >>> import torch
    >>> layer = LinearClassifier(8, 5, first=1)
    >>> layer(torch.rand(2, 10, 8)).shape, layer(torch.rand(2, 8)).shape  # tokens; one token chosen before
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    def __init__(
        self, in_features: int, classes: int, logit_bias: float | None = None, *, first: int = 0, **options: Any
    ) -> None:
        super().__init__(in_features, classes, **options)
        self.first = first
        self.logit_layer = LogitLayer.of(classes, logit_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, in] or [B, in] -> logits [B, K]."""
        logits = super().forward(x)
        return self.logit_layer(logits[:, self.first :].mean(1) if x.ndim == 3 else logits)  # type: ignore[no-any-return]


class PooledNorm(nn.LayerNorm):
    """Layer norm of pooled features, taken before the pooling: every place is scaled by 1/std of the pooled features.

    Pooling what it returns gives the layer norm of the pooled input, so that norm and classifier may come before the
    pooling without changing the function.

    Args:
        features: length C.
        eps, affine: as those of `torch.nn.LayerNorm`.
        bias: B-cos networks have none.
        first: tokens in front (class token, registers) that don't count.

    >>> import torch
    >>> norm, x = PooledNorm(8), torch.rand(2, 8, 3, 3)
    >>> torch.allclose(norm(x).mean((2, 3)), torch.nn.LayerNorm(8)(x.mean((2, 3))), atol=1e-5)
    True
    """

    def __init__(
        self, features: int, eps: float = 1e-5, affine: bool = True, *, bias: bool = False, first: int = 0
    ) -> None:
        super().__init__(features, eps, affine, bias)
        self.first = first

    def forward(self, input: Tensor) -> Tensor:
        """Maps [B, C, h, w] or tokens [B, N, C], and the same back."""
        places = full_precision(input.movedim(1, -1).flatten(1, 2) if input.ndim == 4 else input)
        centred = places - places.mean(-1, keepdim=True)
        variance = centred[:, self.first :].mean(1, keepdim=True).square().mean(-1, keepdim=True)
        x = scaled(centred, (variance + self.eps).rsqrt())
        if self.weight is not None:
            x = x * self.weight
        if self.bias is not None:
            x = x + self.bias
        return (x.transpose(1, 2).unflatten(2, input.shape[2:]) if input.ndim == 4 else x).to(input.dtype)
