"""The ways to explain a recorded forward: run again from what was kept of it, or in the trainer's own graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from e2kd.bcos.statistics import Kept
from e2kd.errors import UnsupportedModel
from e2kd.forward import Forward
from e2kd.heads import Head, is_plain_linear
from e2kd.held import Holding, uses_batch
from e2kd.kernels import fused_attention_between
from e2kd.modes import dtype_of, kept_buffers, replaying
from e2kd.narrow import NarrowHead
from e2kd.passes import alone_in_batch
from e2kd.plans import Plan
from e2kd.views import (
    LOW_PRECISION,
    View,
    autograd_view,
    closed_view,
    difference,
    dynamic_view,
    pooled_logits,
    tolerance,
    whole_view,
)

WHOLE_TOLERANCE = 0.3  # of a whole network in low precision, as `LOW_PRECISION` is of what comes after a layer

MISMATCH = (
    "The logits given to the criterion differ from those that the student's head gives for the captured features of "
    "layer {layer!r} (relative difference {error:.2g}). {why}"
)
ALTERED = (
    "Pass the student's output as it came from the student: two forwards through a compiled student before one loss, "
    "or logits that were changed on the way, can't be explained."
)
NO_SECOND_DERIVATIVE = (
    "The head after layer {layer!r} can't be run again on its own, and {node} in the student's graph has no second "
    "derivative. Run the student under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or name a layer through layer=."
)
MIXED = (
    "The head after layer {layer!r} can't be run again on its own, and in the student's graph BatchNorm {norm!r} makes "
    "every logit depend on all images of the batch, so no map would describe its own image alone. Keep that norm "
    "in eval mode, or name a layer through layer=."
)
REPLACED = (
    "The student ran with other parameters than its own, as in torch.func.functional_call, and its images can't be "
    "explained without running it again, which would be with its own. Explain a layer, explainer=GradCAM(), or call "
    "the student itself."
)
BARE_ACTIVATION = (
    "The head after layer {layer!r} can't be run again with the same logits, and it begins with an activation that is "
    "a function: the features after it, which are to be explained, can't be found in the student's own graph. Make "
    "that activation a module, or name another layer through layer=."
)
GRAPH_REFUSED = (
    "The head after layer {layer!r} can't be run again with the same logits: dropout or stochastic depth inside a "
    "compiled region, two forwards before one loss, or code that can't be followed. And differentiating through "
    "{where} gives wrong or no gradients. Call the criterion after each forward, switch off dropout after that layer, "
    "compile only the trunk (`forward_features`), use static_graph=False, or name another layer through layer=."
)


@dataclass(frozen=True)
class Ways:
    """The ways to a `View` of one forward.

    At a layer, in turn: "closed", the closed form of pooled linear heads; "narrow" and "replay", running the head again
    on the live features; "graph", the trainer's own. At the images: "shared", the trainer's own forward in explanation
    mode; "drawn", a second pass of the samples to explain; "separate", a second pass of all.

    Attributes:
        student: that ran.
        plan: how it is explained.
        parts: its modules that run after the site.
        forward: as it was recorded.
        logits: [B, K], as the criterion was given them.
        rows: indices of the samples to explain; None for all.
    """

    student: nn.Module
    plan: Plan
    parts: list[nn.Module]
    forward: Forward
    logits: Tensor
    rows: Tensor | None

    def run_again(self) -> Iterator[tuple[str, Callable[[], View]]]:
        """The ways that need no graph of the trainer's but that of an explained pass, cheapest first; with parameters
        that are not the student's nothing can be run again."""
        plan, features = self.plan, self.forward.features
        if plan.head is None or not plan.head.follows():
            return
        if plan.site is None:
            yield from self._whole()
            return
        if self.forward.replaced:
            return
        classifier = None if plan.linear is None else self.student.get_submodule(plan.linear)
        if classifier is not None and is_plain_linear(classifier) and features is not None:
            yield "closed", partial(self._closed, features, plan.head, classifier)
        for way, run in (("narrow", plan.narrow), ("replay", plan.head)):
            if run is not None:
                yield way, partial(self._replay, plan.head, run)

    def graph(self, holding: Holding | None, error: float) -> View:
        """Through the trainer's own graph, where nothing that was run again gave the logits.

        Args:
            holding: of BatchNorms that ran after the site; None where they were not held.
            error: the last difference of logits, to be told of.

        Raises:
            UnsupportedModel: for a graph that would give wrong or no second derivatives.
            RuntimeError: for logits that did not come from this forward.
        """
        plan, forward = self.plan, self.forward
        layer = plan.site.layer if plan.site else "images"
        if forward.compiled or forward.static_graph:
            where = "a compiled student" if forward.compiled else "DistributedDataParallel(static_graph=True)"
            raise UnsupportedModel(GRAPH_REFUSED.format(layer=layer, where=where))
        if self.forward.replaced and plan.site is None:
            raise UnsupportedModel(REPLACED)
        if forward.features is None or not forward.features.requires_grad or forward.mark is None:
            raise RuntimeError(MISMATCH.format(layer=layer, error=error, why=ALTERED))
        if plan.head is not None and plan.head.explains_another():
            raise UnsupportedModel(BARE_ACTIVATION.format(layer=layer))
        mixing = [name for name in norms_after(self.student, plan) if uses_batch(self.student.get_submodule(name))]
        if mixing and holding is None:
            raise UnsupportedModel(MIXED.format(layer=layer, norm=mixing[0]))
        fused = fused_attention_between(self.logits, forward.features)
        if fused is not None:
            raise UnsupportedModel(NO_SECOND_DERIVATIVE.format(layer=layer, node=fused))
        return autograd_view(forward.features, self.logits, plan, forward.size, create_graph=True, holding=holding)

    def difference(self, view: View) -> float:
        """The largest of a view's logits from those that were given, relative to the spread of these."""
        return difference(view.logits, self.logits if view.rows is None else self.logits[view.rows])

    @property
    def tolerance(self) -> float:
        """The largest `difference` of the same forward run again."""
        forward = self.forward
        low = WHOLE_TOLERANCE if forward.features is None else LOW_PRECISION
        read = forward.images if forward.features is None else forward.features
        return low if forward.autocast is not None else tolerance(self.logits.dtype, read.dtype, low=low)

    def _whole(self) -> Iterator[tuple[str, Callable[[], View]]]:
        found = self.forward.explained
        if found is not None and found.readable:
            assert found.encoded is not None
            assert found.logits is not None
            yield "shared", partial(dynamic_view, found.encoded, found.logits, found.mode, create_graph=True)
        if self.forward.replaced:
            return
        kept = None if found is None else found.statistics
        alone = self.rows is not None and not self.forward.random
        if alone and alone_in_batch(self.student, kept=kept is not None):
            yield "drawn", partial(self._again, self.rows, kept)
        yield "separate", partial(self._again, None, None)

    def _again(self, rows: Tensor | None, kept: Kept | None) -> View:
        images = self.forward.images if rows is None else self.forward.images[rows]
        with replaying(self.student, images.device, self.forward.rng), kept_buffers(self.student.modules()):
            view = whole_view(self.student, self.plan, images, create_graph=True, kept=kept, rows=rows)
        return replace(view, rows=rows)

    def _closed(self, features: Tensor, head: Head, classifier: nn.Linear) -> View:
        captured = head.prologue(features)
        view = closed_view(captured, self.logits, self.plan, classifier, self.forward.size)
        return replace(view, logits=pooled_logits(view, classifier))

    def _replay(self, head: Head, run: Head | NarrowHead) -> View:
        assert self.forward.features is not None
        source = self.forward.features.to(dtype_of(self.student))
        if not source.requires_grad:  # the features of a frozen trunk
            source = source.detach().requires_grad_()
        stateful = (part for module in self.parts for part in module.modules())
        with replaying(self.student, source.device, self.forward.rng), kept_buffers(stateful):
            captured = head.prologue(source.view_as(source))  # fully_shard's hooks sit on the tensor itself
            return autograd_view(captured, run(captured), self.plan, self.forward.size, create_graph=True)


def norms_after(student: nn.Module, plan: Plan) -> tuple[str, ...]:
    """The BatchNorms that run after the site."""
    return tuple(name for name in plan.after if isinstance(student.get_submodule(name), _BatchNorm))
