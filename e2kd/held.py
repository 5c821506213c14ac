"""BatchNorm in a pass that is explained: its statistics are held fixed, so that each map is of its own sample alone."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

SIGNATURE = inspect.signature(F.batch_norm)


class _Stopped(torch.autograd.Function):
    """The same tensor, through which no gradient goes while it is held fixed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, holding: Holding) -> Tensor:
        ctx.holding = holding
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return None if ctx.holding.now else gradients[0], None


def statistic(value: Tensor) -> Tensor:
    """A statistic of a batch [C] that a norm of its own computes; inside `Holding` it can be held fixed."""
    if has_torch_function_unary(value):
        found: Tensor = handle_torch_function(statistic, (value,), value)
        return found
    return value


class Holding(TorchFunctionMode):
    """Inside, `batch_norm` and `statistic`, of a batch, are written so that `gradient` can hold statistics fixed.

    Differentiated plainly, a sample's logit depends on all samples of the batch; and the sum over the batch of one
    class's logits after BatchNorm and a linear layer is a constant, whose gradient is nothing but rounding. All other
    derivatives, that of the gradient itself too, are the ordinary ones.

    >>> x = torch.tensor([[1.], [4.]], requires_grad=True)
    >>> with Holding() as holding:
    ...     y = F.batch_norm(x, None, None, training=True, eps=0.0)
    >>> holding.gradient(y.sum(), x)
    tensor([[0.6667],
            [0.6667]])
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = False  # whether a gradient is taken that must leave the statistics out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation as it is, but `batch_norm` and `statistic`."""
        kwargs = kwargs or {}
        if func is statistic:
            return _Stopped.apply(*args, self)
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        call = SIGNATURE.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if not given["training"] or _values(given["input"]) < 2:  # of one value torch says that it has no variance
            return func(*args, **kwargs)
        return self._normalised(given)

    def _normalised(self, given: dict[str, Any]) -> Tensor:
        x: Tensor = given["input"]
        wide, shape = x.to(torch.promote_types(x.dtype, torch.float32)), [1, -1] + [1] * (x.ndim - 2)
        variance, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0, keepdim=True)
        if given["running_mean"] is not None:
            _count(given, mean.detach().flatten(), variance.detach().flatten())
        found: Tensor = (wide - _Stopped.apply(mean, self)) * _Stopped.apply((variance + given["eps"]).rsqrt(), self)
        if given["weight"] is not None:
            found = found * given["weight"].reshape(shape)
        if given["bias"] is not None:
            found = found + given["bias"].reshape(shape)
        return found.to(x.dtype)

    def gradient(self, scores: Tensor, inputs: Tensor, **options: Any) -> Tensor:
        """As `torch.autograd.grad`, the statistics held fixed."""
        self.now = True
        try:
            (found,) = torch.autograd.grad(scores, inputs, **options)
        finally:
            self.now = False
        return found


def _values(x: Tensor) -> int:
    """How many values each channel of [B, C, ...] has."""
    return x.numel() // max(x.shape[1], 1)


def _count(given: dict[str, Any], mean: Tensor, variance: Tensor) -> None:
    """Running statistics go on as those of `batch_norm`, whose running variance is the unbiased one."""
    count = _values(given["input"])
    for running, new in ((given["running_mean"], mean), (given["running_var"], variance * (count / (count - 1)))):
        running.lerp_(new.to(running.dtype), given["momentum"])


_HOLDINGS: weakref.WeakKeyDictionary[nn.Module, Holding] = weakref.WeakKeyDictionary()  # by model


def holding_of(model: nn.Module) -> Holding:
    """The one of a model: where several criteria explain it, the gradient of one is held in what ran for another."""
    return _HOLDINGS.setdefault(model, Holding())


_CURRENT: ContextVar[Holding | None] = ContextVar("batch statistics that can be held", default=None)


@contextmanager
def holding_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, passes can be explained by `current_holding` with the statistics of every BatchNorm held fixed.

    SyncBatchNorm, whose statistics are those of all processes, stays as it is.
    """
    if not any(map(uses_batch, model.modules())):
        yield
        return
    with holding_of(model) as holding:
        token = _CURRENT.set(holding)
        try:
            yield
        finally:
            _CURRENT.reset(token)


def current_holding() -> Holding:
    """That of the passes that run now; one of its own where none need it."""
    return _CURRENT.get() or Holding()


def uses_batch(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that normalises by the statistics of its batch in its present mode.

    >>> uses_batch(nn.BatchNorm2d(3)), uses_batch(nn.BatchNorm2d(3).eval()), uses_batch(nn.LayerNorm(3))
    (True, False, False)
    """
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
