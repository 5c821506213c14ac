"""The student's side: explaining the forward pass that its trainer just ran, differentiably."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.bcos.images import check_range
from e2kd.bcos.statistics import NotKept
from e2kd.capture import COMPILED, NO_RECORD, Tap
from e2kd.errors import UnsupportedModel, shape, taking_images
from e2kd.explainers import Explainer, shares_pass
from e2kd.forward import Forward
from e2kd.guards import EXAMPLE, check_example
from e2kd.held import Holding, holding_of
from e2kd.kernels import math_kernel
from e2kd.modes import as_written, device_of, dtype_of
from e2kd.narrow import NotNarrow
from e2kd.passes import PassKeeper
from e2kd.plans import Plan, plan_for
from e2kd.probing import example_images
from e2kd.sharding import gather, groups_of, is_any_sharded
from e2kd.views import View
from e2kd.ways import Ways, norms_after

FIRST_CHECKS = 3  # on an accelerator, steps that compare logits although that waits for the device

NO_FEATURES = (
    "The student ran, but layer {layer!r} did not return a tensor with gradients, so nothing can be explained there. "
    "Reentrant activation checkpointing around that layer or a frozen student does this: use "
    "`use_reentrant=False`, or name a layer outside of the checkpointed part through layer=. " + COMPILED
)
NO_PICKLE = (
    "The criterion listens to the network that it trains in this process, so it can't be pickled. Save that network, "
    "and the step of an E2KDLoss, and build the criterion anew where they are loaded."
)
ALONE = "Its layers are found by calling it with images alone: give what else it takes a default."
ONE_CELL = (
    "The student's maps have one cell (at {place}), which says nothing about where it looks. That layer was found on "
    "noise of {noise}. Pass some of your images, E2KDLoss(..., example=images), so that an earlier one can be "
    "found, or name one: explainer=GradCAM(layer=...)."
)


class StudentExplainer:
    """Records the student's forwards and turns each into a `View`, by the first way that reproduces its logits.

    What was run again must give the logits the criterion was called with: that check finds a wrong layer, features of
    another forward and random numbers drawn anew.

    Args:
        student: being trained.
        explainer: of it.
        images: to find its layer with; None makes noise, and looks again at the first images that are too small for the
            layer found.
        fraction: of each batch that will be explained.
    """

    def __init__(self, student: nn.Module, explainer: Explainer, images: Tensor | None, fraction: float = 1.0) -> None:
        check_example(images)
        self.student, self.explainer, self.fraction = student, explainer, fraction
        self.tap = Tap(student)
        self.plan: Plan | None = None
        self.holding: Holding | None = None  # of BatchNorms in the trainer's own forward, where there is no other way
        self.failed: dict[bool, set[str]] = {True: set(), False: set()}  # in train and in eval mode
        self.last: str | None = None
        self.checks = 0
        self.parts: list[nn.Module] = []  # that run after the site
        noise = example_images(student) if images is None else None
        self.noise = None if noise is None else shape(noise.shape)  # that stood for images
        weakref.finalize(self, self.tap.remove)
        try:
            if images is not None:
                self._prepare_on(images.to(device_of(student, images.device)), EXAMPLE)
            elif noise is not None:
                self.prepare(noise)
        except Exception:
            self.tap.remove()
            raise
        if images is None:
            self.tap.first = weakref.ref(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> StudentExplainer:
        made: StudentExplainer = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(vars(self), memo))
        return made

    def __reduce__(self) -> Any:
        raise TypeError(NO_PICKLE)

    def meet(self, images: Tensor) -> None:
        """See the first images of the training before the student does: those that noise stood for."""
        self.tap.first = None
        if self.plan is None:
            self._prepare_on(images, ALONE)
        elif self._outgrows_images((images.shape[-2], images.shape[-1])) and not is_any_sharded(self.student):
            with suppress(UnsupportedModel):  # what can't be explained may still be distilled; `view` will say so
                self.prepare(images[:2])
                self.noise = None

    def _prepare_on(self, images: Tensor, advice: str) -> None:
        """Find the site on images that the student may not take; then say so, and what to do."""
        few = images[:2]
        with taking_images("student", self.student, few.shape, advice):
            self.prepare(few)

    def _outgrows_images(self, image_size: tuple[int, int]) -> bool:
        """Whether the layer was found on noise and may have one cell for images of a size (H, W)."""
        site = self._plan().site
        found = self.noise is not None and self.explainer.layer is None
        return found and site is not None and site.may_be_one_cell(image_size)

    def prepare(self, images: Tensor) -> None:
        """Find the site on these images and listen there."""
        images = images.to(dtype_of(self.student))
        with _outside_of_hosts(images.device), self.tap.silent(), as_written(self.student):
            self.plan = plan_for(self.student, self.explainer, images)
        self.tap.read(self.plan.site)
        self.holding, self.parts = None, self._parts(self.plan)
        if self.plan.head is None:  # the trainer's own graph is what will be differentiated twice
            holding = self.holding = holding_of(self.student)
            self.tap.run_within(self.plan.after, math_kernel)
            self.tap.run_within(norms_after(self.student, self.plan), lambda: holding)
        shared = shares_pass(self.explainer, self.fraction)
        if self.plan.dynamic and (shared or self.fraction < 1):
            self.tap.keep_passes(PassKeeper(self.student, self.plan.encoder, weights=shared))

    def expect(self, explaining: bool) -> None:
        """Say whether the next forward's loss will ask for an explanation, so that others needn't prepare for it."""
        self.tap.explaining = explaining

    def forward_of(self, logits: Tensor) -> Forward:
        """The forward that made these logits.

        Raises:
            RuntimeError: when there was none.
        """
        return self.tap.forward_of(logits)

    def view(self, forward: Forward, logits: Tensor, rows: Tensor | None = None) -> View:
        """The differentiable view of a recorded forward, logits [B, K] being what it returned.

        Args:
            rows: indices of the samples that will be explained; None for all.
        """
        plan = self._plan()
        if plan.site is not None and forward.features is None:
            raise RuntimeError(NO_FEATURES.format(layer=plan.site.layer))
        if plan.dynamic and self._looks(forward):
            check_range(forward.images, "student")
        self._check_grid(forward, plan)
        plan = self._as_built(plan)
        groups = groups_of(self.student, plan.after)
        gather(groups)
        return _gathering(self._view(forward, logits, plan, rows), groups)

    def _as_built(self, plan: Plan) -> Plan:
        """The plan, without what holds for the modules alone that it was made with, if others run now."""
        parts = self._parts(plan)
        if len(parts) != len(self.parts) or any(now is not then for now, then in zip(parts, self.parts, strict=True)):
            self.plan, self.parts, self.checks = replace(plan, linear=None, narrow=None), parts, 0
            self.failed = {True: set(), False: set()}
        return self._plan()

    def _parts(self, plan: Plan) -> list[nn.Module]:
        """The modules that run after the site, those that are still there."""
        found: list[nn.Module] = []
        for name in plan.after if plan.site is not None else ():
            with suppress(AttributeError):
                found.append(self.student.get_submodule(name))
        return found

    def _view(self, forward: Forward, logits: Tensor, plan: Plan, rows: Tensor | None) -> View:
        """By the first way whose logits are those that were given; what fails once is not tried again."""
        ways = Ways(self.student, plan, self.parts, forward, logits, rows)
        failed, error = self.failed[self.student.training], 0.0
        tried: set[str] = set()
        with self.tap.silent():
            for way, make in ways.run_again():
                if way in failed:
                    continue
                tried.add(way)
                try:
                    view = make()
                except (NotNarrow, NotKept):
                    continue
                error = ways.difference(view) if self._must_check(forward) else 0.0
                if error <= ways.tolerance:
                    failed |= tried - {way}
                    self.last = way
                    return view
        view = ways.graph(self.holding, error)
        failed |= tried
        self.last = "graph"
        return view

    def _check_grid(self, forward: Forward, plan: Plan) -> None:
        """Raise for maps of one cell where real images may lead to another layer than noise did."""
        if forward.features is None or not self._outgrows_images(forward.size):
            return
        maps = plan.maps(forward.features.detach(), forward.size)
        if maps.shape[2] * maps.shape[3] == 1:
            raise UnsupportedModel(ONE_CELL.format(place=plan.place, noise=self.noise))

    @property
    def way(self) -> str:
        """How forwards are explained, in one word of `Ways`."""
        plan = self._plan()
        if self.last is not None:
            return self.last
        if plan.site is None:
            return "shared" if self.tap.keeper is not None and self.tap.keeper.weights else "separate"
        return "graph" if plan.head is None else "closed" if plan.linear else "narrow" if plan.narrow else "replay"

    @property
    def place(self) -> str:
        """Where it reads, in words."""
        return self._plan().place

    def _plan(self) -> Plan:
        if self.plan is None:
            raise RuntimeError(NO_RECORD)
        return self.plan

    def _must_check(self, forward: Forward) -> bool:
        self.checks += 1
        return self._looks(forward) or self.checks % 1000 == 0

    def _looks(self, forward: Forward) -> bool:
        """Whether values may be looked at: on an accelerator that waits for the device."""
        return forward.images.device.type == "cpu" or self.checks <= FIRST_CHECKS


def _gathering(view: View, groups: list[Any]) -> View:
    """The view whose gradient leaves the parameters of all ranks where they are.

    fully_shard takes them back after any backward, and that of the explanation is still to be differentiated, before
    the student's own backward asks for them again.
    """
    if not groups:
        return view

    def gradient(classes: Tensor, again: bool) -> Tensor:
        found = view.gradient(classes, again)
        gather(groups)
        return found

    return replace(view, gradient=gradient)


@contextmanager
def _outside_of_hosts(device: torch.device) -> Iterator[None]:
    """Without the autocast and the checkpoint that a host may have put around the student's forward."""
    kept = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)  # checkpoint counts them
    with torch.autocast(device.type, enabled=False), kept:
        yield
