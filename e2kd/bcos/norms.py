"""Norms whose 1/std is a dynamic weight; centring stays in the linear part."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from e2kd.bcos.direct import scaled_directly
from e2kd.bcos.dynamic import scaled
from e2kd.bcos.statistics import of_batch
from e2kd.bcos.unit import full_precision
from e2kd.errors import UnsupportedModel, shape
from e2kd.held import statistic

CONVERSIONS = ("convert_sync", "convert_splitbn", "freeze_batch_norm")  # torch's, timm's and apex's functions
CONVERTED = (
    "BatchNormUncentered2d can't be converted to another batch norm (SyncBatchNorm, timm's split or frozen ones): they "
    "subtract the mean, and explanations don't hold their statistics fixed, so the network would be another one. Leave "
    "the conversion out (Lightning: sync_batchnorm=False); every process then normalises by its own part of the batch, "
    "as the papers' networks were trained. To freeze statistics put these layers into eval mode."
)


def normalised(x: Tensor, dims: tuple[int, ...], eps: float, *, centred: bool) -> Tensor:
    """x / std(x) or (x - mean(x)) / std(x), with the centred biased variance over `dims` in both cases.

    >>> normalised(torch.tensor([[1., 3.]]), (1,), 0.0, centred=True)
    tensor([[-1.,  1.]])
    >>> normalised(torch.tensor([[1., 3.]]), (1,), 0.0, centred=False)
    tensor([[1., 3.]])
    """
    wide = full_precision(x)
    variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
    return scaled(wide - mean if centred else wide, (variance + eps).rsqrt()).to(x.dtype)


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [B, C, ...] * weight [C] + bias [C], each where there is one."""
    trailing = (-1,) + (1,) * (x.ndim - 2)
    if weight is not None:
        x = x * weight.view(trailing).to(x.dtype)
    return x if bias is None else x + bias.view(trailing).to(x.dtype)


class BatchNormUncentered2d(nn.BatchNorm2d):
    """x * weight / sqrt(var + eps): batch norm that does not subtract the mean, as B-cos CNNs have.

    var is the centred variance of the batch while training, of the running statistics in eval mode. It is biased in
    both (torch's BatchNorm2d keeps the unbiased one); `running_mean` is there for checkpoints and never changes.

    Never synchronised between processes: `torch.nn.SyncBatchNorm.convert_sync_batchnorm` and its like are refused.

    Args:
        num_features: C of inputs [B, C, H, W].
        eps, momentum, affine, track_running_stats: as those of `torch.nn.BatchNorm2d`.
        bias: B-cos networks have none.

    >>> norm = BatchNormUncentered2d(3)
    >>> norm(torch.rand(2, 3, 4, 4)).shape, sorted(norm.state_dict())
    (torch.Size([2, 3, 4, 4]), ['num_batches_tracked', 'running_mean', 'running_var', 'weight'])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        if not bias:
            self.register_parameter("bias", None)

    @property
    def affine(self) -> bool:
        """Whether there is a weight. What converts to other batch norms asks for it, and is refused."""
        if sys._getframe(1).f_code.co_name.startswith(CONVERSIONS):
            raise UnsupportedModel(CONVERTED)
        return bool(self.__dict__["affine"])

    @affine.setter
    def affine(self, value: bool) -> None:
        self.__dict__["affine"] = value

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        self._check_input_dim(input)
        if self.training or self.running_var is None:
            variance = of_batch(lambda: statistic(full_precision(input).var((0, 2, 3), correction=0)))
            self._remember(variance.detach())
        else:
            variance = self.running_var
        scale = (full_precision(variance) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        result = scaled_directly(input, scale)
        return affine(scaled(input, scale[:, None, None]) if result is None else result, None, self.bias)

    def _remember(self, variance: Tensor) -> None:
        if not (self.training and self.track_running_stats):
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing runs it again inside of backward
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class GroupNorm2d(nn.GroupNorm):
    """Group norm of feature maps [B, C, H, W]; `centred=False` does not subtract the mean.

    >>> GroupNorm2d(2, 4)(torch.rand(1, 4, 3, 3)).shape
    torch.Size([1, 4, 3, 3])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = False,
        centred: bool = True,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine)
        self.centred = centred
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        check_maps(input, self.num_channels)
        groups = input.unflatten(1, (self.num_groups, -1))
        return affine(
            normalised(groups, (2, 3, 4), self.eps, centred=self.centred).flatten(1, 2), self.weight, self.bias
        )


class LayerNorm2d(GroupNorm2d):
    """Group norm with one group: over channels and places of each sample.

    >>> LayerNorm2d(4)(torch.rand(1, 4, 3, 3)).shape
    torch.Size([1, 4, 3, 3])
    """

    def __init__(
        self, num_channels: int, eps: float = 1e-5, affine: bool = True, *, bias: bool = False, centred: bool = True
    ) -> None:
        super().__init__(1, num_channels, eps, affine, bias=bias, centred=centred)


class LayerNorm(nn.LayerNorm):
    """Layer norm of tokens [..., C], as B-cos ViTs have.

    >>> LayerNorm(8)(torch.rand(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, features: int, eps: float = 1e-5, affine: bool = True, *, bias: bool = False) -> None:
        super().__init__(features, eps, affine, bias)

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        x = normalised(input, (-1,), self.eps, centred=True)
        if self.weight is not None:
            x = x * self.weight.to(x.dtype)
        return x if self.bias is None else x + self.bias.to(x.dtype)


class PositionNorm2d(nn.LayerNorm):
    """Norm over the channels at each place of feature maps [B, C, H, W]; `centred=False` keeps the mean.

    >>> PositionNorm2d(4)(torch.rand(1, 4, 3, 3)).shape
    torch.Size([1, 4, 3, 3])
    """

    def __init__(
        self, features: int, eps: float = 1e-5, affine: bool = True, *, bias: bool = False, centred: bool = True
    ) -> None:
        super().__init__(features, eps, affine, bias)
        self.features, self.centred = features, centred

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        check_maps(input, self.features)
        return affine(normalised(input, (1,), self.eps, centred=self.centred), self.weight, self.bias)


def check_maps(x: Tensor, channels: int) -> None:
    """Raise unless x is [B, channels, H, W]."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"Expected feature maps [B, {channels}, H, W], but got {shape(x.shape)}.")
