"""`check`: what e²KD will do with two models, in seconds, before a long run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from e2kd.classes import Choice, choose
from e2kd.errors import REFUSALS, NoEffectWarning, shape
from e2kd.explainers import Explainer
from e2kd.guards import PROBABILITIES, are_probabilities
from e2kd.inspection import explain, explain_each
from e2kd.logits import ONE_LOGIT
from e2kd.losses import E2KDLoss
from e2kd.modes import kept_buffers, kept_statistics, undrawn, unwrap
from e2kd.normalization import Normalization, expected_normalization
from e2kd.plans import Plan, plan_for
from e2kd.similarity import is_zero
from e2kd.teacher import Teacher

WAYS = {
    "closed": "closed form (pooling and one linear layer)",
    "narrow": "head run again on the live features, past its attention for the tokens it reads",
    "replay": "head run again on the live features",
    "graph": "the trainer's own graph",
    "shared": "its own forward, its dynamic weights held fixed and differentiated once more",
    "drawn": "a second pass of the samples to explain",
    "separate": "a second pass of the whole network",
}
AGAIN = "student may be compiled, whole or in parts; no dropout or stochastic depth then"
REPLAYED = "student may be compiled, whole or in parts; no dropout or stochastic depth after the layer then"
COMPILE = {
    "closed": "student may be compiled, whole or in parts",
    "narrow": REPLAYED,
    "replay": REPLAYED,
    "graph": "don't compile the student and don't use DistributedDataParallel(static_graph=True): both are refused",
    "shared": f"{AGAIN}, and a second, uncompiled pass",
    "drawn": AGAIN,
    "separate": AGAIN,
}


@dataclass
class Side:
    """What is known of one of the two models."""

    name: str
    layer: str = "?"
    grid: tuple[int, int] = (0, 0)
    zero_maps: float = float("nan")
    classes: int = 0
    beside: str | None = None


@dataclass
class Report:
    """The result of `check`; print it. `ok` is whether training can start, `problems` says in words what to mend."""

    student: Side
    teacher: Side
    way: str = "?"
    cost: float = float("nan")
    explanation: float = float("nan")
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way of training."""
        return not self.problems

    def __str__(self) -> str:
        found = [*self._table(), *self._step()] if self.student.layer != "?" else []
        found += [f"note       {note}" for note in self.notes]
        found += [f"PROBLEM    {problem}" for problem in self.problems] or ["ok         no problem found"]
        return "\n".join(found)

    def _table(self) -> list[str]:
        rows = [f"{'':10}{'layer':32}{'map grid':>10}{'zero maps':>11}{'classes':>9}"]
        for role, side in (("student", self.student), ("teacher", self.teacher)):
            grid = f"{side.grid[0]}x{side.grid[1]}"
            rows.append(f"{role:10}{side.layer:32}{grid:>10}{side.zero_maps:>11.0%}{side.classes:>9}")
        return rows

    def _step(self) -> list[str]:
        if self.way not in WAYS:
            return []
        return [
            f"student    {self.student.name}, explained by: {WAYS[self.way]}",
            f"teacher    {self.teacher.name}",
            f"compile    {COMPILE[self.way]}",
            f"cost       {self._cost()}",
            f"now        1 - similarity of the explanations is {self.explanation:.3f}",
        ]

    def _cost(self) -> str:
        return f"{self.cost:.3f} x the FLOPs of a plain KD step" if self.cost == self.cost else "can't be counted"


def check(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    *,
    explainer: Explainer | None = None,
    teacher_explainer: Explainer | None = None,
    classes: Choice | None = None,
    max_classes: int | None = None,
    input_normalization: Normalization | None = None,
    teacher_normalization: Normalization | None = None,
    teacher_size: int | tuple[int, int] | None = None,
) -> Report:
    """Try one e²KD step on images [B, C, H, W] and report layers, grids, zero maps, double backward, compile and cost.

    Explainers, classes, how many are drawn of them, normalisations and the teacher's size as for `E2KDLoss`; classes
    that depend on targets ("labels", "positives") can't be tried.

    Models, gradients, BatchNorm statistics, modes and random state are left as they were. Never raises for what a
    model can't do: that is what `problems` is for.

    >>> _ = torch.manual_seed(0)
    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    >>> report = check(net(4), net(8), torch.rand(8, 3, 16, 16))
    >>> report.student.layer, report.student.grid, report.way, report.ok
    ('1', (14, 14), 'closed', True)
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(
            f"check tries two live models, but the teacher is a {type(teacher).__name__}. For a frozen one use "
            "FrozenTeacher.verify."
        )
    student, teacher = unwrap(student), unwrap(teacher)
    report = Report(Side(type(student).__name__), Side(type(teacher).__name__))
    with warnings.catch_warnings(), kept_buffers([*student.modules(), *teacher.modules()]):
        warnings.simplefilter("ignore", NoEffectWarning)
        try:
            criterion = E2KDLoss(
                student, teacher, explainer=explainer, teacher_explainer=teacher_explainer, classes=classes,
                max_classes=max_classes,
                input_normalization=input_normalization, teacher_normalization=teacher_normalization,
                teacher_size=teacher_size,
            )  # fmt: skip
        except REFUSALS as error:
            report.problems.append(str(error))
            return report
        noise = criterion.explained.plan
        try:
            _look(report, criterion, images)
            _compare_statistics(report, criterion)
            _step(report, criterion, images)
            _compare(report, noise, criterion.explained.plan)
        except REFUSALS as error:
            report.problems.append(str(error))
        finally:
            criterion.remove()
    return report


def _look(report: Report, criterion: E2KDLoss, images: Tensor) -> None:
    """Layers, grids and zero maps of both models in eval mode, for the classes that will be explained."""
    assert isinstance(criterion.teacher, Teacher)
    assert criterion.teacher.explainer is not None
    prepared = criterion.teacher.prepared(images)
    theirs = explain_each(
        criterion.teacher.model, prepared, lambda z: choose(criterion.classes, z, None)[0], criterion.teacher.explainer
    )
    weights = choose(criterion.classes, theirs.logits, None)[1]
    model = criterion.student
    report.teacher.classes = theirs.logits.shape[1]
    _describe(report.teacher, criterion.teacher.model, criterion.teacher.explainer, prepared, theirs.maps, weights)
    own = explain(model, images, explainer=criterion.explainer)
    report.student.classes = own.logits.shape[1]
    for role, logits in (("student", own.logits), ("teacher", theirs.logits)):
        if are_probabilities(logits):
            report.problems.append(f"the {role}'s logits {PROBABILITIES}")
    if report.student.classes != report.teacher.classes:
        report.problems.append(
            f"the student has {report.student.classes} classes and the teacher {report.teacher.classes}: both must be "
            "classifiers of the same classes in the same order"
        )
        return
    if report.teacher.classes == 1:
        report.problems.append(ONE_LOGIT.format(shape=shape(theirs.logits.shape)))
    mine = explain_each(model, images, lambda logits: theirs.classes.to(logits.device), criterion.explainer)
    _describe(report.student, model, criterion.explainer, images, mine.maps, weights)
    _read_maps(report)


def _describe(
    side: Side, model: nn.Module, explainer: Explainer, images: Tensor, maps: Tensor, weights: Tensor
) -> None:
    """What is known of a model, whose maps [B, k, C, h, w] are of classes with these weights [B, k]."""
    site = plan_for(model, explainer, images).site
    side.layer = site.layer if site else "images"
    side.grid = (maps.shape[-2], maps.shape[-1])
    dead = is_zero(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
    side.zero_maps = float((dead.to(weights) * weights).sum() / weights.sum())
    if site is not None and not site.is_cut:
        side.layer += " *"
        side.beside = site.beside


def _read_maps(report: Report) -> None:
    """What the maps say about the layers chosen."""
    for role, side in (("student", report.student), ("teacher", report.teacher)):
        if side.grid[0] * side.grid[1] == 1:
            report.problems.append(
                f"the {role}'s maps have one cell, which says nothing about where it looks: use larger images or an "
                "earlier layer, GradCAM(layer=...)"
            )
        if side.layer.endswith("*"):
            way = f", for instance through {side.beside!r}" if side.beside else ""
            report.notes.append(
                f"* the {role}'s logits also depend on the images past this layer{way}, which the map does not show"
            )
    if report.teacher.zero_maps > 0.5:
        report.problems.append(
            f"{report.teacher.zero_maps:.0%} of the teacher's maps are zero everywhere, so they teach nothing: is the "
            "teacher trained, and are the images normalised as it expects? Else name another layer or explainer"
        )
    if report.student.zero_maps > 0.5:
        report.notes.append(
            f"{report.student.zero_maps:.0%} of the student's maps are zero everywhere and get no gradient; usual for "
            "an untrained student, and it should fall in the first epoch (watch .parts['zero_maps'])"
        )


def _step(report: Report, criterion: E2KDLoss, images: Tensor) -> None:
    """One training step with and without explanations: does the double backward run, and what does it cost?"""
    if report.problems:
        return
    with _borrowed(criterion.student, images.device):
        _take(criterion, images, weight=1.0)  # counting is not part of what has to work
        with suppress(*REFUSALS):  # by the counter, whose hooks sit on every module
            plain, full = (_flops(criterion, images, weight) for weight in (0.0, 1.0))
            report.cost = full / plain if plain else float("nan")
    report.explanation = float(criterion.parts["explanation"])
    report.way = criterion.explained.way


def _compare_statistics(report: Report, criterion: E2KDLoss) -> None:
    """A note where the models are known to expect images that are not normalised alike, and nobody said so."""
    assert isinstance(criterion.teacher, Teacher)
    theirs, own = criterion.teacher.wanted, expected_normalization(criterion.student, None)
    if theirs is None or own is None or criterion.teacher.given is not None:
        return
    if tuple(map(tuple, theirs)) != tuple(map(tuple, own)):
        report.notes.append(
            f"the student expects images normalised by (mean, std) {own} and the teacher by {theirs}, but gets them as "
            "the student does: say how they are normalised, input_normalization=(mean, std)"
        )


def _compare(report: Report, noise: Plan | None, plan: Plan | None) -> None:
    """A note where noise leads to another layer: a compiled or sharded student can't go on to that of the images."""
    if noise is not None and plan is not None and noise.place != plan.place:
        report.notes.append(
            f"on noise, which stands for images before the first come, the student's place is {noise.place}: give "
            "E2KDLoss some of them, example=images, if the student is compiled or sharded"
        )


def _flops(criterion: E2KDLoss, images: Tensor, weight: float) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # loads triton, which importing e2kd should not

    with FlopCounterMode(display=False) as counter:
        _take(criterion, images, weight)
    return int(counter.get_total_flops())


def _take(criterion: E2KDLoss, images: Tensor, weight: float) -> None:
    """A training step without its update."""
    criterion.weight = weight
    criterion.explained.expect(weight != 0)
    parameters = [p for p in criterion.student.parameters() if p.requires_grad]
    loss = criterion(criterion.student(images))
    torch.autograd.grad(loss, parameters, allow_unused=True)


@contextmanager
def _borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Train mode inside; statistics, random state and mode as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with torch.enable_grad(), kept_statistics(model), undrawn(device):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
