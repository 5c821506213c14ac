"""A view of one forward pass: its logits, the maps it was made from, and the gradient between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.bcos.mode import ExplanationMode, explanation_mode
from e2kd.bcos.statistics import Kept, using_statistics
from e2kd.errors import UnsupportedModel
from e2kd.explainers import Explainer, weighs
from e2kd.held import Holding, current_holding
from e2kd.modes import as_computed
from e2kd.outputs import first_tensor
from e2kd.plans import Plan
from e2kd.similarity import at_least_float32

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
LOW_PRECISION = 0.1  # in its place for other types


@dataclass(frozen=True)
class View:
    """What an explainer needs of one forward pass.

    Attributes:
        logits: [B, K].
        features: maps [B, C, h, w], at least float32.
        gradient: classes [B], and whether it will be asked again -> gradient of those logits with respect to
            `features`, [B, C, h, w].
        rows: indices of the samples it is of, in their batch; None for all.
        weights: classes [...] -> their gradient [..., C], where that is the same for every sample and cell; None
            elsewhere.
    """

    logits: Tensor
    features: Tensor
    gradient: Callable[[Tensor, bool], Tensor]
    rows: Tensor | None = None
    weights: Callable[[Tensor], Tensor] | None = None

    def explain(
        self, explainer: Explainer, classes: Tensor, rows: Tensor | None = None, *, again: bool = True
    ) -> Tensor:
        """Maps [B, C', h, w] for one class per sample of the batch, classes [B].

        Args:
            rows: of these samples alone; where the view is of some of the batch, it is of those.
            again: whether it will be asked for other classes; if not, what the pass left is given back.
        """
        if self.rows is not None:
            return explainer(self.features, self.gradient(classes[self.rows], again))
        features, gradient = self.features, self.gradient(classes, again)
        return explainer(features, gradient) if rows is None else explainer(features[rows], gradient[rows])

    def explain_each(self, explainer: Explainer, classes: Tensor, rows: Tensor | None = None) -> Tensor:
        """Maps [B, k, C', h, w] of k classes for each sample of the batch, classes [B, k]; asked once."""
        shared = is_shared(classes)
        if self.weights is not None and weighs(explainer) and (shared or classes.shape[1] > 1):
            features, wanted = (self.features, classes) if rows is None else (self.features[rows], classes[rows])
            return explainer.weighed(features, self.weights(classes[0] if shared else wanted)).unsqueeze(2)
        last = classes.shape[1] - 1
        found = [self.explain(explainer, c, rows, again=i < last) for i, c in enumerate(classes.T)]
        return found[0].unsqueeze(1) if len(found) == 1 else torch.stack(found, 1)


def is_shared(classes: Tensor) -> bool:
    """Whether every sample has the same classes [B, k], by the way they are stored: values are not looked at.

    >>> is_shared(torch.arange(3).expand(4, 3)), is_shared(torch.zeros(4, 3, dtype=torch.long))
    (True, False)
    """
    return len(classes) > 0 and classes.stride(0) == 0


def closed_view(captured: Tensor, logits: Tensor, plan: Plan, linear: nn.Module, image_size: tuple[int, int]) -> View:
    """Average pooling and a linear layer: the gradient is the classifier's row over h*w, at every cell."""
    maps = at_least_float32(plan.maps(captured, image_size))
    cells = maps.shape[2] * maps.shape[3]
    weight = linear.weight
    assert isinstance(weight, Tensor)

    def weights(classes: Tensor) -> Tensor:
        return weight[classes].to(maps.dtype) / cells

    def gradient(classes: Tensor, again: bool) -> Tensor:
        return weights(classes)[:, :, None, None].expand_as(maps)

    return View(logits, maps, gradient, weights=weights)


def pooled_logits(view: View, linear: nn.Linear) -> Tensor:
    """The logits [B, K] of a closed form: those of its pooled maps, without a graph."""
    with torch.no_grad(), torch.autocast(view.features.device.type, enabled=False):
        means = view.features.mean((2, 3)).to(linear.weight.dtype)
        return F.linear(means, linear.weight, linear.bias)  # not the module: hosts have hooks there


def tolerance(*dtypes: torch.dtype, low: float = LOW_PRECISION) -> float:
    """The largest `difference` of logits that were computed from the same in these types.

    >>> tolerance(torch.float32, torch.float64)
    0.001
    """
    return max(TOLERANCE.get(dtype, low) for dtype in dtypes)


def difference(found: Tensor, given: Tensor) -> float:
    """The largest difference of logits that were computed again, relative to the spread of those that were given."""
    if found.shape != given.shape:
        return float("inf")
    found, given = found.detach().double(), given.detach().double()
    spread = (given - given.mean()).abs().amax() + 1e-6 * given.abs().amax() + 1e-12
    return float((found - given).abs().amax() / spread)


def autograd_view(
    captured: Tensor,
    logits: Tensor,
    plan: Plan,
    image_size: tuple[int, int],
    *,
    create_graph: bool,
    holding: Holding | None = None,
) -> View:
    """Any head: the gradient by autograd, differentiable once more with `create_graph`.

    Batch statistics are held fixed, of a pass that ran in `holding`, or runs in `holding_statistics` now.
    """
    take = (holding or current_holding()).gradient

    def gradient(classes: Tensor, again: bool) -> Tensor:
        found = take(_scores(logits, classes), captured, create_graph=create_graph, retain_graph=again or create_graph)
        return at_least_float32(plan.maps(found, image_size))

    return View(logits, at_least_float32(plan.maps(captured, image_size)), gradient)


def dynamic_view(encoded: Tensor, logits: Tensor, mode: ExplanationMode, *, create_graph: bool) -> View:
    """A B-cos network: the gradient with respect to its encoded images, the dynamic weights of its pass held fixed."""

    def gradient(classes: Tensor, again: bool) -> Tensor:
        scores = _scores(logits, classes)
        return mode.weights(scores, encoded, create_graph=create_graph, retain_graph=again or create_graph)

    return View(logits, encoded, gradient)


def whole_view(
    model: nn.Module,
    plan: Plan,
    images: Tensor,
    *,
    create_graph: bool,
    kept: Kept | None = None,
    rows: Tensor | None = None,
) -> View:
    """A pass of the whole model, explained at its images [B, C, H, W] or, of a B-cos network, at the encoded ones.

    Args:
        kept: what the pass of the batch left of which the images are `rows`; None computes all from the images.
    """
    assert plan.head is not None
    source = differentiable(as_computed(model, images))
    if not plan.dynamic:
        return autograd_view(
            source, plan.head(source), plan, (source.shape[-2], source.shape[-1]), create_graph=create_graph
        )
    with ExitStack() as stack:
        mode = stack.enter_context(explanation_mode(detached=not create_graph, compact=create_graph))
        encoded = [] if plan.encoder is None else stack.enter_context(captured_from(model, plan.encoder))
        if kept is not None and rows is not None:
            stack.enter_context(using_statistics(kept, rows))
        logits = plan.head(source)
    return dynamic_view(encoded[-1] if encoded else source, logits, mode, create_graph=create_graph)


def differentiable(images: Tensor) -> Tensor:
    """The images, such that there is a gradient with respect to them; those that came stay as they are.

    >>> differentiable(torch.zeros(1, 3, 2, 2)).requires_grad
    True
    """
    if not images.is_floating_point():
        raise UnsupportedModel(
            f"Images of {images.dtype} have no gradient, so they can't be explained. Make floats of them before the "
            "network is called, or explain a layer, as GradCAM() does."
        )
    source = images if images.requires_grad else images.detach().requires_grad_()
    return source.view_as(source)  # hosts' hooks (fully_shard, FLOP counters) don't expect a leaf


def _scores(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).sum()


@contextmanager
def captured_from(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Collects what a module of the model returns, call by call."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        features = first_tensor(output)
        assert features is not None
        kept.append(features)

    handle = model.get_submodule(name).register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
