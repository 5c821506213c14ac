"""Products with dynamic weights: weights that an explanation holds fixed although they depend on the input.

Each function takes part in three derivatives. Ordinary gradients see everything. The gradient that
`ExplanationMode.weights` takes does not enter the dynamic weights. The derivative of that gradient does, and is
written out where autograd would keep more tensors than the formula needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from e2kd.bcos.mode import ExplanationMode, current_mode


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """x * weight, the weight being dynamic.

    Args:
        x: any shape.
        weight: broadcasts to x; in at least float32 it may be, the result has the type of x.

    >>> import torch
    >>> from e2kd.bcos import explanation_mode
    >>> x = torch.tensor([2., 3.], requires_grad=True)
    >>> with explanation_mode() as mode:
    ...     y = scaled(x, x.abs())
    >>> mode.weights(y, x, retain_graph=True), torch.autograd.grad(y.sum(), x)[0]
    (tensor([2., 3.]), tensor([4., 6.]))
    """
    mode = _mode_for(x)
    if mode is not None and mode.detached:
        return (x * _constant(weight, mode)).to(x.dtype)
    return typed(_Scaled.apply(x, weight, mode))


def aligned(linear: Tensor, norm: Tensor) -> Tensor:
    """linear * |linear| / norm: the B-cos transform for b = 2, with the dynamic weight |linear| / norm = |cos|.

    Args:
        linear: products with unit weights, any shape.
        norm: of the inputs, > 0; broadcasts to `linear`.

    >>> import torch
    >>> aligned(torch.tensor([3., -4.]), torch.tensor(5.))
    tensor([ 1.8000, -3.2000])
    """
    mode = _mode_for(linear)
    if mode is not None and mode.detached:
        return (linear * _constant(linear.detach().abs() / norm.detach(), mode)).to(linear.dtype)
    return typed(_Aligned.apply(linear, norm, mode))


def attended(attention: Tensor, values: Tensor) -> Tensor:
    """attention @ values, the attention being dynamic.

    Args:
        attention: [..., N, M], rows sum to 1.
        values: [..., M, d].

    Returns:
        [..., N, d].

    >>> import torch
    >>> attended(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.], [3.]]))
    tensor([[2.]])
    """
    mode, attention = _mode_for(values), attention.to(values.dtype)
    if mode is not None and mode.detached:
        return _constant(attention, mode) @ values
    return typed(_Attended.apply(attention, values, mode))


def _mode_for(x: Tensor) -> ExplanationMode | None:
    mode = current_mode()
    if mode is not None:
        mode.low_precision |= x.dtype in (torch.float16, torch.bfloat16)
    return mode


def _constant(weight: Tensor, mode: ExplanationMode) -> Tensor:
    mode.met += 1
    return weight.detach()


def held(weights: Tensor) -> Tensor:
    """The weights themselves, dynamic for whatever they are multiplied with: an explanation does not enter them.

    Args:
        weights: any shape.

    >>> import torch
    >>> from e2kd.bcos import explanation_mode
    >>> x = torch.tensor([2., 3.], requires_grad=True)
    >>> with explanation_mode() as mode:
    ...     y = x * held(x.abs())
    >>> mode.weights(y, x)
    tensor([2., 3.])
    """
    return typed(_Held.apply(weights, current_mode()))


def typed(result: Any) -> Tensor:
    """What an autograd Function returned, which mypy does not know to be a tensor."""
    assert isinstance(result, Tensor)
    return result


def _cosine(linear: Tensor, norm: Tensor) -> Tensor:
    """|linear| / norm in one new tensor."""
    return (linear / norm).abs_()


def _is_fixed(mode: ExplanationMode | None) -> bool:
    return mode is not None and mode.fixes()


class _Scaled(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, mode: ExplanationMode | None) -> Tensor:
        return (x * weight).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, ExplanationMode | None], output: Tensor) -> None:
        x, weight, ctx.mode = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        by_x = (g * weight).to(x.dtype)
        if _is_fixed(ctx.mode) or not ctx.needs_input_grad[1]:
            return by_x, None, None
        return by_x, (g.to(weight.dtype) * x).sum_to_size(weight.shape), None


class _Aligned(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(linear: Tensor, norm: Tensor, mode: ExplanationMode | None) -> Tensor:
        return _cosine(linear, norm).mul_(linear).to(linear.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, ExplanationMode | None], output: Tensor) -> None:
        linear, norm, ctx.mode = inputs
        ctx.save_for_backward(linear, norm)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        linear, norm = ctx.saved_tensors
        by_linear = _Cosine.apply(g, linear, norm)
        if _is_fixed(ctx.mode):
            return by_linear, None, None
        by_norm = -(by_linear * linear).sum_to_size(norm.shape) / norm if ctx.needs_input_grad[1] else None
        return 2 * by_linear, by_norm, None


class _Cosine(Function):
    """g |linear| / norm, which keeps itself in the place of g: a convolution, which comes next, keeps it anyway."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, linear: Tensor, norm: Tensor) -> Tensor:
        return (_cosine(linear, norm) * g).to(linear.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        g, linear, norm = inputs
        ctx.type = g.dtype
        ctx.save_for_backward(output, linear, norm)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (v,) = gradients
        result, linear, norm = ctx.saved_tensors
        by_linear = result / torch.where(linear == 0, 1, linear) * v  # result is 0 where linear is
        by_norm = -(v * result).sum_to_size(norm.shape) / norm
        return (_cosine(linear, norm) * v).to(ctx.type), by_linear.to(linear.dtype), by_norm


class _Attended(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(attention: Tensor, values: Tensor, mode: ExplanationMode | None) -> Tensor:
        return attention @ values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, ExplanationMode | None], output: Tensor) -> None:
        attention, values, ctx.mode = inputs
        ctx.save_for_backward(attention, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        attention, values = ctx.saved_tensors
        g = gradients[0].to(values.dtype)
        by_values = attention.transpose(-1, -2) @ g
        return None if _is_fixed(ctx.mode) else g @ values.transpose(-1, -2), by_values, None


class _Held(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, mode: ExplanationMode | None) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ExplanationMode | None], output: Tensor) -> None:
        _, ctx.mode = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None if _is_fixed(ctx.mode) else gradients[0], None
