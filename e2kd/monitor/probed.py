"""The models that a monitor watches, the images they are given, and what is measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from e2kd.choosing import explainers_of
from e2kd.distance import DistanceSums, Score
from e2kd.explainers import Explainer
from e2kd.inspection import explain
from e2kd.monitor.answers import Answers, answered, check_classes, compared
from e2kd.monitor.fixed import Fixed
from e2kd.pictures import displayable, enlarge, overlay, panel
from e2kd.transfer import Models, Reading, Regions, compare, read, scores_of
from e2kd.transfer.contrasting import names_of, read_one
from e2kd.transfer.seeing import features_of

SIZE = (128, 128)  # of the pictures, pixels
ROOM = 2**29  # bytes of a base's maps that are kept from one probe to the next; larger ones are read anew


@dataclass(frozen=True)
class Part:
    """A part of a probe: scalars, pictures [3, H, W] uint8, and why some scalars are NaN, all by name.

    >>> Part({"a": 1.0}) | Part({"b": 2.0})
    Part(scalars={'a': 1.0, 'b': 2.0}, pictures={}, reasons={})
    """

    scalars: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __or__(self, other: Part) -> Part:
        """Both."""
        return Part(self.scalars | other.scalars, self.pictures | other.pictures, self.reasons | other.reasons)

    @classmethod
    def of(cls, scores: dict[str, Score], layer: str, group: str = "") -> Part:
        """The scores of a layer."""
        named = {f"{group}{name}/{layer}": score for name, score in scores.items()}
        return cls(
            {name: score.value for name, score in named.items()},
            reasons={name: score.reason for name, score in named.items() if score.reason},
        )


@dataclass(kw_only=True, eq=False, repr=False)
class Probed:
    """Models and images; what `TransferMonitor` was given. Base and teacher are asked once while they stay the same.

    Attributes:
        images, base_images, teacher_images: the same pictures for each model, [n, C, H, W].
        targets: what stands for the labels, [n, d].
        control: the student untrained, to compare it with.
        pictures: images shown in a picture, 0 for none.
        readings: of the probe that is under way, for its later stages.
    """

    student: nn.Module
    base: nn.Module
    teacher: nn.Module | None
    images: Tensor
    base_images: Tensor
    teacher_images: Tensor
    targets: Tensor | None
    masks: Tensor | None
    layers: Sequence[str | tuple[str, str]] | None
    regions: Regions | None
    control: nn.Module | None
    explainer: Explainer | None
    pictures: int
    normalization: tuple[Sequence[float], Sequence[float]] | None
    batch_size: int | None
    readings: tuple[Reading, Reading] | None = field(default=None, init=False)
    _reference: Fixed[Answers] = field(default_factory=Fixed, init=False)
    _base_reading: Fixed[Reading] = field(default_factory=lambda: Fixed(_has_room), init=False)
    _control_distances: list[Tensor] = field(default_factory=list, init=False)

    def answers(self, device: torch.device) -> Part:
        """How the student's answers and explanations compare with the teacher's, or the base's."""
        images = self.images.to(device)
        model, pictures = self.base, self.base_images
        if self.teacher is not None:
            model, pictures = self.teacher, self.teacher_images
        mine, theirs = explainers_of(self.student, model, self.explainer, None)

        def ask() -> Answers:
            found = answered(model, pictures.to(device), None, theirs, self.masks, self.batch_size)
            check_classes(explain(self.student, images[:2], explainer=mine).logits, found.logits)
            return found

        reference = self._reference(model, ask)
        student = answered(self.student, images, reference.classes, mine, self.masks, self.batch_size)
        drawn = self._drawn("explanations", student.maps, reference.maps)
        scalars, reasons = compared(student, reference)
        return Part(scalars, drawn, reasons)

    def transfer(self, device: torch.device) -> Part:
        """UniCAM, and the scores of whole images."""
        student, base = self.readings = self._read(device)
        part = Part({"n": float(student.count)})
        for name, layer in compare(student, base, self.targets).layers.items():
            scores = scores_of(layer.sums)
            both = {"distilled": layer.distilled, "residual": layer.residual}
            blank = {f"blank_{side}/{name}": found.blank.double().mean().item() for side, found in both.items()}
            drawn = self._drawn(f"unicam/{name}", layer.distilled.maps, layer.residual.maps)
            part |= Part.of(scores, name) | Part(blank | {"chance": scores["fss"].chance}, drawn)
        return part | self._against_control(student, self.images.to(device))

    def _read(self, device: torch.device) -> tuple[Reading, Reading]:
        """The layers of both models."""
        mine, others = names_of(self.layers)

        def ask() -> Reading:
            return read_one("base", self.base, self.base_images.to(device), others, batch_size=self.batch_size)

        student = read_one("student", self.student, self.images.to(device), mine, batch_size=self.batch_size)
        return student, self._base_reading(self.base, ask)

    def _against_control(self, student: Reading, images: Tensor) -> Part:
        """The student's similarity to the untrained network."""
        part = Part()
        if self.control is None:
            return part
        if not self._control_distances:
            names = [layer.layer for layer in student.layers]
            found = read(self.control.to(images.device), images, names, batch_size=self.batch_size)
            self._control_distances = [layer.distances for layer in found.layers]
        for layer, control in zip(student.layers, self._control_distances, strict=True):
            sums = DistanceSums.of_distances(student=layer.distances, control=control)
            part |= Part.of({"fss_control": sums.score("student", "control")}, layer.layer)
        return part

    def seen(self, device: torch.device) -> Part:
        """The scores of the pixels that each model's maps keep."""
        assert self.readings is not None  # UniCAM comes first
        images = (self.images.to(device), self.base_images.to(device))
        models = Models(self.student, self.base, images, self.readings, self.targets)
        found = features_of(models, self.regions, batch_size=self.batch_size)
        part = Part()
        for name, layer in found.items():
            part |= Part.of(scores_of(layer.sums), name, "regions/")
            part |= Part({f"regions/n/{name}": float(layer.rows.sum())})
        return part

    def _drawn(self, name: str, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """A picture of rows: the images, and two kinds of maps of them."""
        if not self.pictures:
            return {}
        images = displayable(self.images[: self.pictures], self.normalization)
        maps = (m[: self.pictures].abs().sum(1, keepdim=True) for m in (first, second))
        return {name: panel([enlarge(images, SIZE), *(overlay(images, m, SIZE) for m in maps)])}


def _has_room(reading: Reading) -> bool:
    return sum(layer.maps.nbytes for layer in reading.layers) <= ROOM
