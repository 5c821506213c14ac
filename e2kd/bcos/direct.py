"""Explanations that go from the output of a B-cos layer straight to its input.

A pass that will be explained at its images alone (`explanation_mode(compact=True)`) keeps less, and its second
derivative takes less time: each layer with b = 2, and the batch norm after it, is one step of the explanation, of which
the gradient that came to it is all that is kept. The rest is made from the layer's output y = linear |linear| / norm,
since |cos| = |linear| / norm = sqrt(|y| / norm).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from e2kd.bcos.dynamic import typed
from e2kd.bcos.mode import ExplanationMode, current_mode
from e2kd.bcos.statistics import is_checkpointed, of_layer
from e2kd.bcos.unit import Product, filters, inverse_norm, is_unit

PLAIN = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Ran:
    """One run of a B-cos layer, for the norm that comes next.

    Attributes:
        result: what the layer returned.
        output: y, of which `result` is a view.
        norm: of the inputs.
        x: the input.
        weight: of the linear function, its filters of norm 1.
        product: the linear function.
    """

    result: weakref.ref[Tensor]
    output: Tensor
    norm: Tensor
    x: Tensor
    weight: Tensor
    product: Product


def explained_directly(x: Tensor, layer: nn.Module, norm: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The output of a B-cos layer with b = 2, in a compact or detached pass; None where there is no such pass.

    There is none in half precision, nor where activations are offloaded or computed anew in backward.

    Args:
        x: the input.
        layer: the linear one inside.
        norm: of what its filters see, as a function of x.
    """
    mode = current_mode()
    if mode is None or not (mode.compact or mode.detached):
        return None
    plain = x.dtype in PLAIN and not torch.is_autocast_enabled(x.device.type) and not is_checkpointed()
    if mode.detached:
        return _detached_output(mode, x, layer, norm) if plain and not layer.weight.requires_grad else None

    def run() -> tuple[Tensor, ...]:
        weight, norms = filters(layer), norm(x)
        return typed(_AlignedOutput.apply(Product(layer).forwards(x, weight), norms)), norms, weight

    ran = of_layer(run if plain else None)
    if ran is None or not x.requires_grad:
        return None if ran is None else ran[0]
    output, norms, weight = ran
    product = Product(layer)
    result = typed(_Step.apply(output, norms, None, x, weight, product, mode))
    mode.last = Ran(weakref.ref(result), output, norms, x, weight, product) if isinstance(layer, nn.Conv2d) else None
    return result


def _detached_output(mode: ExplanationMode, x: Tensor, layer: nn.Module, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """The output of a layer whose |cos| becomes a constant of the pass, the only one that is kept."""
    mode.met += 1
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        product = Product(layer)
        output = product.forwards(x, weight)
        length = product.of_rows(inverse_norm(weight)) if is_unit(layer) else None
        if length is not None:  # no second copy of the filters is kept
            output.mul_(length)
        factor = (output / norm(x)).abs_()
        output.mul_(factor)
        if length is not None:
            factor.mul_(length)
    return typed(_Detached.apply(x, output, factor, weight, product))


def scaled_directly(result: Tensor, scale: Tensor) -> Tensor | None:
    """result [B, C, h, w] * scale [C], in one step with the layer that has just returned it; None if none has."""
    mode = current_mode()
    ran = None if mode is None else mode.last
    if mode is None or ran is None or ran.result() is not result or scale.dtype != result.dtype:
        return None
    mode.last = None
    return typed(_Step.apply(ran.output, ran.norm, scale, ran.x, ran.weight, ran.product, mode))


def _cosine_of_output(output: Tensor, norm: Tensor) -> Tensor:
    """|cos| in one new tensor."""
    return (output / norm).abs_().sqrt_()


class _Detached(Function):
    """output, an explanation of which is the transposed product of g * factor."""

    @staticmethod
    def forward(x: Tensor, output: Tensor, factor: Tensor, weight: Tensor, product: Product) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, _, factor, weight, ctx.product = inputs
        ctx.size = x.shape
        ctx.save_for_backward(factor, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor, weight = ctx.saved_tensors
        return ctx.product.backwards(factor * gradients[0], weight, ctx.size), None, None, None, None


class _AlignedOutput(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(linear: Tensor, norm: Tensor) -> Tensor:
        return (linear / norm).abs_().mul_(linear)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # an explanation goes past it
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        if g is None:
            return None, None
        output, norm = ctx.saved_tensors
        by_linear = _cosine_of_output(output, norm / 4).mul_(g)  # twice |cos|
        return by_linear, -(g * output).sum_to_size(norm.shape) / norm


class _Step(Function):
    """output * scale; an explanation of it is one of x, and enters neither output, norm nor scale."""

    @staticmethod
    def forward(
        output: Tensor,
        norm: Tensor,
        scale: Tensor | None,
        x: Tensor,
        weight: Tensor,
        product: Product,
        mode: ExplanationMode,
    ) -> Tensor:
        return output.view_as(output) if scale is None else output * product.of_rows(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        y, norm, scale, x, weight, ctx.product, ctx.mode = inputs
        ctx.size = x.shape
        ctx.save_for_backward(y, norm, scale, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        if g is None:
            return (None,) * 7
        output, norm, scale, weight = ctx.saved_tensors
        if ctx.mode.fixes():
            found = _Explained.apply(g, output, norm, scale, weight, ctx.product, ctx.size)
            return None, None, None, found, None, None, None
        if scale is None:
            return g, None, None, None, None, None, None
        by_scale = (g * output).sum((0, *range(2, output.ndim)))
        return g * ctx.product.of_rows(scale), None, by_scale, None, None, None, None


class _Explained(Function):
    """g at the output of a layer -> at its input, |cos| being fixed: the transposed product of g |cos| scale."""

    @staticmethod
    def forward(
        g: Tensor,
        output: Tensor,
        norm: Tensor,
        scale: Tensor | None,
        weight: Tensor,
        product: Product,
        size: torch.Size,
    ) -> Tensor:
        turned = _cosine_of_output(output, norm).mul_(g)
        if scale is None:
            return product.backwards(turned, weight, size)
        if _is_small(weight, output):
            return product.backwards(turned, weight * scale[:, None, None, None], size)
        return product.backwards(turned.mul_(product.of_rows(scale)), weight, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        *tensors, ctx.product, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (v,) = gradients
        g, output, norm, scale, weight = ctx.saved_tensors
        product, cosine, by_scale = ctx.product, _cosine_of_output(output, norm), None
        if scale is None:
            by_weight, by_turned = product.to_weight(cosine * g, v, weight.shape), product.forwards(v, weight)
        elif _is_small(weight, output):
            rows = scale[:, None, None, None]
            by_rows = product.to_weight(cosine * g, v, weight.shape)
            by_turned = product.forwards(v, weight * rows)  # after it, so that less is alive at once
            by_weight, by_scale = by_rows * rows, (by_rows * weight).sum((1, 2, 3))
        else:
            by_turned, rows = product.forwards(v, weight), product.of_rows(scale)
            by_scale = (by_turned * cosine).mul_(g).sum((0, 2, 3))
            cosine.mul_(rows)
            by_weight = product.to_weight(cosine * g, v, weight.shape)
        by_g = cosine.mul_(by_turned)
        common = torch.mul(by_g, g, out=by_turned)
        # common is the derivative by log |cos|, which is (log |output| - log norm) / 2
        by_norm = common.sum_to_size(norm.shape).div(-2 * norm)
        by_output = common.div_(output).mul_(0.5).masked_fill_(output == 0, 0)
        return by_g, by_output, by_norm, by_scale, by_weight, None, None


def _is_small(weight: Tensor, output: Tensor) -> bool:
    """Whether it costs less to scale the weight than the output."""
    return weight.numel() < output.numel()
