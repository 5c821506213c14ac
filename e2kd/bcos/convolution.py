"""B-cos convolutions."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from e2kd.bcos.direct import explained_directly
from e2kd.bcos.linear import bcos, check_transform
from e2kd.bcos.unit import UnitConv2d, full_precision, is_plain
from e2kd.errors import shape

Size = int | tuple[int, int]
Padding = Literal["zeros", "reflect", "replicate", "circular"]


class BcosConv2d(nn.Module):
    """B-cos convolution: at each place |cos(patch, w_o)|^(b-1) * w_o.patch / ||w_o||.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size, stride, padding, dilation, groups, padding_mode: as those of `torch.nn.Conv2d`. The norm is
            that of the padded patch under every padding mode (the papers' code always pads it with zeros).
        b: >= 1.
        max_out: the largest of so many consecutive filters makes one output channel.
        unit_weights: False uses the filters as they are, as networks made from pretrained ones do.
        bias: a bias is added to w_o.patch; B-cos networks have none.

    >>> import torch
    >>> BcosConv2d(6, 64, 7, stride=2, padding=3)(torch.rand(1, 6, 224, 224)).shape
    torch.Size([1, 64, 112, 112])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 1,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        padding_mode: Padding = "zeros",
        *,
        b: float = 2,
        max_out: int = 1,
        unit_weights: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_transform(b, max_out)
        if out_channels % groups:
            raise ValueError(f"Expected out_channels divisible by groups, but got {out_channels} and {groups}.")
        self.in_channels, self.out_channels, self.b, self.max_out = in_channels, out_channels, b, max_out
        layer = UnitConv2d if unit_weights else nn.Conv2d
        self.linear = layer(
            in_channels, out_channels * max_out, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, h, w]."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(wrong_input(x, self.in_channels))
        if self.b == 2 and self.max_out == 1 and self._one_norm and is_plain(self.linear):
            direct = explained_directly(x, self.linear, partial(patch_norm, conv=self.linear))
            if direct is not None:
                return direct
        linear = self.linear(x)
        if self.max_out > 1:
            linear = linear.unflatten(1, (self.out_channels, self.max_out)).max(2).values
        norm = patch_norm(x, self.linear)
        if norm.shape[1] in (1, self.out_channels):
            return bcos(linear, norm, self.b)
        groups = linear.unflatten(1, (norm.shape[1], -1))
        return bcos(groups, norm.unsqueeze(2), self.b).flatten(1, 2)

    @property
    def _one_norm(self) -> bool:
        """Whether a norm belongs to all filters, or every filter has its own."""
        return self.linear.groups in (1, self.out_channels)

    def extra_repr(self) -> str:
        """b and max_out; the rest is in `linear`."""
        return f"b={self.b}, max_out={self.max_out}"


def patch_norm(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The norm of what each group of filters sees at each place, sqrt(sum of squares + 1e-6).

    Args:
        x: [B, C, H, W]; half precisions are computed in float32.
        conv: tells the patches apart.

    Returns:
        [B, groups, h, w].

    >>> import torch
    >>> patch_norm(torch.ones(1, 4, 2, 2), torch.nn.Conv2d(4, 1, 2))
    tensor([[[[4.]]]])
    """
    squares = full_precision(x).square().unflatten(1, (conv.groups, -1)).sum(2)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if any(conv._reversed_padding_repeated_twice):
        squares = F.pad(squares, conv._reversed_padding_repeated_twice, mode=mode)
    return (_windows(squares, conv) + 1e-6).sqrt()


def _windows(squares: Tensor, conv: nn.Conv2d) -> Tensor:
    """Sums over the windows of a convolution without padding: [B, G, H, W] -> [B, G, h, w].

    Not by a convolution with ones, which a GPU may run in TF32.
    """
    height, width = conv.kernel_size
    if conv.dilation == (1, 1):
        return F.avg_pool2d(squares, conv.kernel_size, conv.stride) * (height * width)
    size = [
        (full - dilation * (kernel - 1) - 1) // stride + 1
        for full, kernel, dilation, stride in zip(
            squares.shape[-2:], conv.kernel_size, conv.dilation, conv.stride, strict=True
        )
    ]
    columns = F.unfold(squares.flatten(0, 1).unsqueeze(1), conv.kernel_size, conv.dilation, 0, conv.stride)
    sums: Tensor = columns.sum(1).unflatten(-1, size).unflatten(0, squares.shape[:2])
    return sums


def wrong_input(x: Tensor, channels: int) -> str:
    """The sentence for an input that is not [B, channels, H, W]."""
    advice = " B-cos networks see images in [0, 1] and their inverse: encode them with AddInverse()."
    return (
        f"Expected an input [B, {channels}, H, W], but got {shape(x.shape)}."
        f"{advice if channels == 6 and x.ndim == 4 and x.shape[1] == 3 else ''}"
    )
