"""B-cos linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2kd.bcos.direct import explained_directly
from e2kd.bcos.dynamic import aligned, scaled
from e2kd.bcos.unit import UnitLinear, full_precision, is_plain


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


def vector_norm(x: Tensor) -> Tensor:
    """Norms of vectors [..., C], [..., 1]; half precisions are computed in float32.

    >>> vector_norm(torch.tensor([3., 4.]))
    tensor([5.])
    """
    norm: Tensor = torch.linalg.vector_norm(full_precision(x), dim=-1, keepdim=True)
    return norm + 1e-12


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
        if self.b == 2 and self.max_out == 1 and is_plain(self.linear):
            direct = explained_directly(x, self.linear, vector_norm)
            if direct is not None:
                return direct
        linear = self.linear(x)
        if self.max_out > 1:
            linear = linear.unflatten(-1, (self.out_features, self.max_out)).max(-1).values
        return bcos(linear, vector_norm(x), self.b)

    def extra_repr(self) -> str:
        """b and max_out; the rest is in `linear`."""
        return f"b={self.b}, max_out={self.max_out}"
