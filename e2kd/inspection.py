"""Explaining a model that is not being trained: one pass, no graph over its trunk, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from e2kd.bcos.images import check_range
from e2kd.choosing import default_explainer
from e2kd.errors import UnsupportedModel, shape
from e2kd.explainers import Explainer
from e2kd.guards import check_explainers, check_not_empty
from e2kd.heads import is_plain_linear
from e2kd.modes import as_computed, as_written, dtype_of, evaluating, kept_buffers, replaying, untrained, unwrap
from e2kd.narrow import NotNarrow
from e2kd.outputs import first_tensor, logits_of
from e2kd.plans import Plan, plan_for
from e2kd.probe import Turn
from e2kd.views import View, autograd_view, captured_from, closed_view, difference, pooled_logits, tolerance, whole_view


class Explanation(NamedTuple):
    """Logits [B, K], maps [B, C, h, w] on the network's own grid, and the explained classes [B]."""

    logits: Tensor
    maps: Tensor
    classes: Tensor


def explain(
    model: nn.Module, images: Tensor, classes: Tensor | None = None, explainer: Explainer | None = None
) -> Explanation:
    """Explain a classifier's decisions, outside of training.

    The model runs once, in eval mode, without a graph over its trunk; its mode, gradients and hooks are left
    as they were. Works inside `no_grad` and `inference_mode`. Results carry no graph.

    Args:
        model: any image classifier.
        images: [B, C, H, W], as the model expects them.
        classes: [B] class indices; None explains each sample's top class.
        explainer: None is `BcosWeights()` for a B-cos network, else `GradCAM()`.

    Raises:
        UnsupportedModel: when no layer of the model can be explained; the message says which `layer=` to try.
        ValueError: for classes of the wrong shape or outside the logits, or no images.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    >>> found = explain(model, torch.rand(2, 3, 16, 16))
    >>> found.logits.shape, found.maps.shape, found.classes.shape
    (torch.Size([2, 5]), torch.Size([2, 1, 14, 14]), torch.Size([2]))
    """
    check_explainers(explainer=explainer)

    def chosen(logits: Tensor) -> Tensor:
        return logits.argmax(1, keepdim=True) if classes is None else _checked(classes, logits)[:, None]

    found = explain_each(model, images, chosen, explainer or default_explainer(unwrap(model)))
    return Explanation(found.logits, found.maps[:, 0], found.classes[:, 0])


def explain_each(
    model: nn.Module, images: Tensor, choose: Callable[[Tensor], Tensor], explainer: Explainer
) -> Explanation:
    """As `explain`, for k classes [B, k] that are chosen by the logits [B, K]: maps [B, k, C, h, w]."""
    check_not_empty(images)
    model = unwrap(model)
    with torch.inference_mode(False), torch.enable_grad(), kept_buffers(model.modules()):
        view = inspect(model, images, explainer)
        classes = choose(view.logits.detach())
        classes = classes.clone() if classes.is_inference() else classes
        maps = view.explain_each(explainer, classes)
    return Explanation(view.logits.detach(), maps.detach(), classes)


def _checked(classes: Any, logits: Tensor) -> Tensor:
    count = logits.shape[1]
    if not isinstance(classes, Tensor):
        raise ValueError(
            f"Expected class indices [{len(logits)}] from 0 to {count - 1}, one of each image, but got {classes!r:.60}."
        )
    good = classes.shape == logits.shape[:1] and not classes.is_floating_point()
    if not good or (len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < count):
        raise ValueError(
            f"Expected class indices [{len(logits)}] from 0 to {count - 1}, "
            f"but got {shape(classes.shape)} of {classes.dtype}, {classes.flatten()[:4].tolist()}..."
        )
    return classes.to(logits.device)


def inspect(model: nn.Module, images: Tensor, explainer: Explainer) -> View:
    """The view of an eval-mode forward whose logits and gradients can be asked for any class."""
    with torch.inference_mode(False):
        images = as_computed(model, images.clone() if images.is_inference() else images.detach())
        with evaluating(model), as_written(model):
            plan = plan_for(model, explainer, images.to(dtype_of(model)))
            if plan.dynamic:
                check_range(images, "model")
            if plan.head is None:
                return _inspect_in_place(model, images, plan)
            return _inspect_by_replay(model, images, plan)


def _inspect_by_replay(model: nn.Module, images: Tensor, plan: Plan) -> View:
    assert plan.head is not None
    if plan.site is None:
        with torch.enable_grad(), untrained(model), replaying(model, images.device, None):
            return whole_view(model, plan, images, create_graph=False)
    size = (images.shape[-2], images.shape[-1])
    with torch.no_grad(), captured_from(model, plan.site.producers[0].name) as kept:
        logits = logits_of(model(images))
    captured = plan.head.prologue(_kept_in(plan.site.producers[0], kept))
    classifier = None if plan.linear is None else model.get_submodule(plan.linear)
    if classifier is not None and is_plain_linear(classifier):
        view = closed_view(captured, logits, plan, classifier, size)
        if _holds(view, classifier, size == plan.site.image_size):
            return view
    captured = captured.to(dtype_of(model)).requires_grad_()
    with torch.enable_grad(), replaying(model, images.device, None):
        return autograd_view(captured, _logits(plan, captured), plan, size, create_graph=False)


def _holds(view: View, classifier: nn.Linear, as_found: bool) -> bool:
    """Whether a closed form gives the logits at this size of images too; an accelerator only waits for others."""
    if as_found and view.logits.device.type != "cpu":
        return True
    error = difference(pooled_logits(view, classifier), view.logits)
    return error <= tolerance(view.logits.dtype, classifier.weight.dtype)


def _logits(plan: Plan, captured: Tensor) -> Tensor:
    assert plan.head is not None
    with suppress(NotNarrow):
        if plan.narrow is not None:
            return plan.narrow(captured)
    return plan.head(captured)


def _inspect_in_place(model: nn.Module, images: Tensor, plan: Plan) -> View:
    """The graph begins at the site: what runs before it is run without gradients."""
    assert plan.site is not None
    kept: list[Tensor] = []
    turn, calls = plan.site.made_by, count()

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        if next(calls) != turn.index:
            return output
        torch.set_grad_enabled(True)
        features = first_tensor(output)
        assert features is not None
        kept.append(features.detach().requires_grad_())
        return _with_first(output, features, kept[-1])

    handle = model.get_submodule(turn.name).register_forward_hook(cut)
    try:
        with torch.no_grad():  # ends with the grad mode it began with, whatever the hook set inside
            logits = logits_of(model(images))
    finally:
        handle.remove()
    _check_calls(turn, next(calls))
    size = (images.shape[-2], images.shape[-1])
    return autograd_view(kept[0], logits, plan, size, create_graph=False)


def _with_first(output: Any, old: Tensor, new: Tensor) -> Any:
    if output is old:
        return new
    return type(output)(new if item is old else item for item in output)


def _kept_in(turn: Turn, kept: list[Tensor]) -> Tensor:
    """What was kept in one of a module's calls."""
    _check_calls(turn, len(kept))
    return kept[turn.index]


def _check_calls(turn: Turn, calls: int) -> None:
    if calls != turn.count:
        raise UnsupportedModel(
            f"Layer {turn.name!r} ran {calls} times in this forward pass, and {turn.count} times when it was chosen. "
            "Name one that always runs once through layer=."
        )
