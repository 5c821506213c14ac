"""Layers whose filters have norm 1, and what they are as linear functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from e2kd.bcos.mode import current_mode


def full_precision(x: Tensor) -> Tensor:
    """Half precisions become float32, in which norms neither overflow nor underflow; others stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(weight: Tensor) -> Tensor:
    """Rows of norm 1: weight [O, ...] over its norm per row; rows of zeros stay zero, with a finite gradient.

    >>> unit(torch.tensor([[3., 4.], [0., 0.]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    rows = full_precision(weight)
    return (rows / _norm(rows).view(-1, *(1,) * (weight.ndim - 1))).to(weight.dtype)


def inverse_norm(weight: Tensor) -> Tensor:
    """1 over the norm of each row of a weight [O, ...]; 1 for rows of zeros.

    >>> inverse_norm(torch.tensor([[3., 4.], [0., 0.]]))
    tensor([0.2000, 1.0000])
    """
    return 1 / _norm(full_precision(weight))


def _norm(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.ndim)))
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def is_constant(weight: Tensor) -> bool:
    """Whether a pass for explanations alone runs, of a weight that is not trained."""
    mode = current_mode()
    return mode is not None and mode.detached and not weight.requires_grad


class UnitConv2d(nn.Conv2d):
    """A convolution that uses its weight with filters of norm 1."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, h, w]."""
        result: Tensor
        if is_constant(self.weight) and self.bias is None:  # no second copy of the filters is kept
            result = self._conv_forward(input, self.weight, None)
            return result * inverse_norm(self.weight)[:, None, None].to(result.dtype)
        result = self._conv_forward(input, unit(self.weight), self.bias)
        return result


class UnitLinear(nn.Linear):
    """A linear layer that uses its weight with rows of norm 1."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if is_constant(self.weight) and self.bias is None:
            result = F.linear(input, self.weight)
            return result * inverse_norm(self.weight).to(result.dtype)
        return F.linear(input, unit(self.weight), self.bias)


def filters(layer: nn.Module) -> Tensor:
    """The weight that a layer multiplies with, of norm 1 where the layer sees to that."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return unit(weight) if is_unit(layer) else weight


def is_unit(layer: nn.Module) -> bool:
    """Whether a layer uses its filters with norm 1."""
    return isinstance(layer, (UnitConv2d, UnitLinear))


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is just its weight: without a bias, hooks, code of its own, or padding by something but zeros.

    >>> is_plain(UnitLinear(2, 2, bias=False)), is_plain(UnitLinear(2, 2))
    (True, False)
    """
    if type(layer) not in (UnitConv2d, UnitLinear, nn.Conv2d, nn.Linear) or layer.bias is not None:
        return False
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False
    own = vars(layer)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(own.get(name) for name in (*hooks, "forward", "_compiled_call_impl"))


@dataclass(frozen=True)
class Product:
    """A convolution or linear layer as a function of its input and of any weight.

    Args:
        layer: tells which.
    """

    layer: nn.Module

    def forwards(self, x: Tensor, weight: Tensor) -> Tensor:
        """The output for an input x."""
        return F.conv2d(x, weight, None, *self._settings) if self._settings else F.linear(x, weight)

    def backwards(self, g: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """The gradient with respect to an input of this size, for a gradient g of the output."""
        found: Tensor = conv2d_input(list(size), weight, g, *self._settings) if self._settings else g @ weight
        return found

    def to_weight(self, g: Tensor, x: Tensor, size: torch.Size) -> Tensor:
        """The gradient with respect to a weight of this size."""
        if self._settings:
            found: Tensor = conv2d_weight(x, list(size), g, *self._settings)
            return found
        return g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    def of_rows(self, vector: Tensor) -> Tensor:
        """One number for each row of the weight, such that it broadcasts to outputs."""
        return vector[:, None, None] if self._settings else vector

    @property
    def _settings(self) -> tuple[Any, ...]:
        conv = self.layer
        return (conv.stride, conv.padding, conv.dilation, conv.groups) if isinstance(conv, nn.Conv2d) else ()
