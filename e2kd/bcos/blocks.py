"""What B-cos ResNets are built of."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Layer = Callable[..., nn.Module]


def init_convolutions(model: nn.Module, init: Callable[[Tensor], object]) -> None:
    """Fill the weight of every convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            init(module.weight)


class DropPath(nn.Module):
    """Leaves out the whole branch for a random share of the samples while training, scaled to keep the mean.

    >>> import torch
    >>> DropPath(0.5).eval()(torch.ones(2, 3))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"Expected a share of dropped samples in [0, 1), but got {share}.")
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...]."""
        if not self.training or self.share == 0:
            return x
        kept = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.share)
        return x * (kept / (1 - self.share))

    def extra_repr(self) -> str:
        """The share."""
        return f"{self.share}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    expansion = 1

    def __init__(
        self, entering: int, planes: int, stride: int, conv: Layer, norm: Layer, drop: float, groups: int, width: int
    ) -> None:
        super().__init__()
        if groups != 1 or width != 64:
            raise ValueError("Expected groups=1 and group_width=64 for basic blocks; bottlenecks take others.")
        self.conv1 = conv(entering, planes, 3, stride, 1)
        self.bn1 = norm(planes)
        self.conv2 = conv(planes, planes, 3, 1, 1)
        self.bn2 = norm(planes)
        self.downsample = _shortcut(entering, planes, stride, conv, norm)
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, entering, H, W] -> [B, planes, h, w]."""
        out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.drop_path(out) + (x if self.downsample is None else self.downsample(x))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, perhaps in groups) and 1x1 convolutions beside the identity."""

    expansion = 4

    def __init__(
        self, entering: int, planes: int, stride: int, conv: Layer, norm: Layer, drop: float, groups: int, width: int
    ) -> None:
        super().__init__()
        inner, leaving = planes * width // 64 * groups, planes * self.expansion
        self.conv1 = conv(entering, inner, 1)
        self.bn1 = norm(inner)
        self.conv2 = conv(inner, inner, 3, stride, 1, groups=groups)
        self.bn2 = norm(inner)
        self.conv3 = conv(inner, leaving, 1)
        self.bn3 = norm(leaving)
        self.downsample = _shortcut(entering, leaving, stride, conv, norm)
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, entering, H, W] -> [B, 4 planes, h, w]."""
        out = self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x))))))
        return self.drop_path(out) + (x if self.downsample is None else self.downsample(x))  # type: ignore[no-any-return]


def _shortcut(entering: int, leaving: int, stride: int, conv: Layer, norm: Layer) -> nn.Sequential | None:
    if stride == 1 and entering == leaving:
        return None
    return nn.Sequential(conv(entering, leaving, 1, stride), norm(leaving))


def rising(last: float, count: int) -> list[float]:
    """Numbers from 0 to `last`, evenly spaced: the shares of dropped samples of a network's blocks.

    >>> rising(0.2, 3)
    [0.0, 0.1, 0.2]
    """
    return [last * i / max(count - 1, 1) for i in range(count)]
