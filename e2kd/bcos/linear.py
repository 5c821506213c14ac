"""B-cos linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2kd.bcos.dynamic import aligned, scaled
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


def check_transform(b: float, max_out: int) -> None:
    """Raise unless b >= 1 and max_out >= 1."""
    if b < 1:
        raise ValueError(f"Expected b >= 1, but got {b}. 1 is a linear layer, 2 what the papers use.")
    if max_out < 1:
        raise ValueError(f"Expected max_out >= 1 units of which the largest counts, but got {max_out}.")


def bcos(linear: Tensor, norm: Tensor, b: float) -> Tensor:
    """The B-cos transform |cos|^(b-1) * linear, with cos = linear / norm (Böhle et al. 2022, Eq. 3).

    The papers' code adds 1e-6 to |cos| unless b = 2; so does this.

    Args:
        linear: products of unit weights and inputs.
        norm: of the inputs; broadcasts to `linear`.
        b: >= 1; the higher, the more must input and weight point the same way.
    """
    if b == 1:
        return scaled(linear, linear.new_ones(()))  # so that an explanation meets the layer
    if b == 2:
        return aligned(linear, norm)
    return scaled(linear, ((linear / norm).abs() + 1e-6) ** (b - 1))


class UnitLinear(nn.Linear):
    """A linear layer that uses its weight with rows of norm 1."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if is_constant(self.weight) and self.bias is None:
            result = F.linear(input, self.weight)
            return result * inverse_norm(self.weight).to(result.dtype)
        return F.linear(input, unit(self.weight), self.bias)


class BcosLinear(nn.Module):
    """B-cos layer on vectors: y_o = |cos(x, w_o)|^(b-1) * w_o.x / ||w_o||.

    Args:
        in_features: length of the inputs.
        out_features: number of outputs.
        b: >= 1.
        max_out: the largest of so many units makes one output.
        unit_weights: False uses the weights as they are, as networks made from pretrained ones do.
        bias: a bias is added to w_o.x; B-cos networks have none.

    >>> BcosLinear(192, 10)(torch.rand(2, 196, 192)).shape
    torch.Size([2, 196, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        b: float = 2,
        max_out: int = 1,
        unit_weights: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_transform(b, max_out)
        self.in_features, self.out_features, self.b, self.max_out = in_features, out_features, b, max_out
        layer = UnitLinear if unit_weights else nn.Linear
        self.linear = layer(in_features, out_features * max_out, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        linear = self.linear(x)
        if self.max_out > 1:
            linear = linear.unflatten(-1, (self.out_features, self.max_out)).max(-1).values
        norm = torch.linalg.vector_norm(full_precision(x), dim=-1, keepdim=True) + 1e-12
        return bcos(linear, norm, self.b)

    def extra_repr(self) -> str:
        """b and max_out; the rest is in `linear`."""
        return f"b={self.b}, max_out={self.max_out}"
