"""`TransferMonitor`: what a student learned beyond its base, what it left behind, and where it looks, every N steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from e2kd.distance import DistanceSums, Score
from e2kd.errors import shape
from e2kd.explainers import Explainer
from e2kd.inspection import explain
from e2kd.modes import device_of, rng_state, set_rng_state, unwrap
from e2kd.monitor import ranks
from e2kd.monitor.answers import Answers, answers_of, check_classes, compared
from e2kd.monitor.budget import Budget
from e2kd.monitor.sinks import Log, LogImages
from e2kd.pictures import displayable, enlarge, overlay, panel
from e2kd.transfer import Regions, UniCAMResult, compare, layer_features, read, scores_of, untrained
from e2kd.transfer.contrasting import label_rows, read_both

Probe = Tensor | tuple[Tensor, Tensor]
SIDE = 128  # of the pictures, pixels


class TransferMonitor:
    """Shows, every so many training steps, what was transferred to a student; one line in the loop.

    A fixed batch of images is given to the student, and to the fixed models it is compared with. What is logged:

    - `agreement` on the top class, `explanation_cosine` and `zero_maps` (share of maps without evidence) between the
      student and the teacher, or the base if there is no teacher, explained for that one's top class; with masks
      `epg_student` and `epg_reference`, the share of the maps' energy on the object;
    - for each layer `fss`, `rs_student`, `rs_base`, `rs_distilled` and `rs_residual` of whole images, with labels those
      of relevance; the same under `regions/` of the pixels that each model's map keeps, if regions were asked for;
      `fss_control`, the student's similarity to an untrained network, if a control was;
      `blank_distilled` and `blank_residual`, shares of blank maps;
    - `n`, `chance` (the spread of a score of independent features), `seconds` and `share`, what it costs;
    - pictures: rows of images, the student's and the reference's explanation; and for each layer rows of images, what
      the student sees beyond the base, and the base beyond the student.

    The student's mode, gradients, buffers and the random state stay as they were. On several processes the first
    measures and logs, the others go on; where the student is sharded among them all take part and agree on when.

    Args:
        student: the model in training; wrapped by DDP or torch.compile or not.
        base: what it is compared with: the same architecture trained without distillation, or the teacher.
        probe: images [n, C, H, W], or (images, labels [n]); 64 or more, the same throughout.
        log: called as log(scalars, step).
        log_images: called as log_images(pictures, step), with pictures [3, H, W] uint8; None draws none.
        teacher: what answers and explanations are compared with, if that is not the base.
        layers: names in both, or pairs (student's, base's); None is the layer an explanation reads in each.
        embeddings: of the classes, [K, d]; None is one-hot.
        masks: of the objects, [n, H, W].
        base_images, teacher_images: the same pictures as these models expect them, if that differs.
        regions: such as `e2kd.transfer.UniCAMRegions()`: adds scores of perturbed images. On a CPU the imputation
            costs more than all forwards together.
        control: compare the student with an untrained network as well.
        explainer: of the answers; `GradCAM()` if None.
        every: steps between probes.
        max_seconds: of one probe: explanations come first, then UniCAM, then regions, and what would begin later is
            skipped, with a warning.
        max_share: of the training time that probes may take; they come later where `every` would exceed it. None lets
            `every` alone decide.
        pictures: images shown in a picture.
        normalization: (mean, std) of the probe's images, to show them in their own colours.
        batch_size: images per forward; None is all.

    Raises:
        ValueError: when the probe's images, labels, masks and other images are not as many.

    >>> make = lambda: nn.Sequential(
    ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> probe = torch.rand(16, 3, 8, 8), torch.arange(16) % 3
    >>> seen = {}
    >>> monitor = TransferMonitor(make(), make(), probe, lambda scalars, step: seen.update(scalars), every=100)
    >>> for step in range(3):
    ...     monitor(step)  # after the optimizer's step
    >>> sorted(name for name in seen if name.startswith(("e2kd/f", "e2kd/rs")))
    ['e2kd/fss/1', 'e2kd/rs_base/1', 'e2kd/rs_distilled/1', 'e2kd/rs_residual/1', 'e2kd/rs_student/1']
    """

    def __init__(
        self,
        student: nn.Module,
        base: nn.Module,
        probe: Probe,
        log: Log,
        log_images: LogImages | None = None,
        *,
        teacher: nn.Module | None = None,
        layers: Sequence[str | tuple[str, str]] | None = None,
        embeddings: Tensor | None = None,
        masks: Tensor | None = None,
        base_images: Tensor | None = None,
        teacher_images: Tensor | None = None,
        regions: Regions | None = None,
        control: bool = False,
        explainer: Explainer | None = None,
        every: int = 500,
        max_seconds: float | None = 60.0,
        max_share: float | None = 0.02,
        pictures: int = 8,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        batch_size: int | None = None,
        prefix: str = "e2kd/",
    ) -> None:
        self.student, self.base, self.teacher = (
            unwrap(student),
            unwrap(base),
            None if teacher is None else unwrap(teacher),
        )
        self.images, labels = probe if isinstance(probe, tuple) else (probe, None)
        self.base_images = self.images if base_images is None else base_images
        self.teacher_images = self.images if teacher_images is None else teacher_images
        self.masks = masks
        self.targets = label_rows(labels, embeddings, len(self.images))
        _check(len(self.images), base_images=base_images, teacher_images=teacher_images, masks=masks)
        self.log, self.log_images, self.prefix = log, log_images, prefix
        self.layers, self.regions, self.explainer, self.batch_size = layers, regions, explainer, batch_size
        self.pictures, self.normalization = pictures, normalization
        self.control = untrained(self.student) if control else None
        self.budget = Budget(every, max_seconds, max_share)
        self.latest: dict[str, float] = {}  # every scalar of the last probe, NaN included
        self.reasons: dict[str, str] = {}  # why scalars of the last probe are NaN
        self._reference: Answers | None = None
        self._control_distances: list[Tensor] = []
        self._warned: set[str] = set()

    def __call__(self, step: int) -> None:
        """Probe if it is time to. Call it at every step, in every process."""
        together = ranks.takes_all(self.student, self.base)
        if not together and not ranks.is_main():
            return
        due = self.budget.steps_passed(step)
        if due:
            now = self.budget.affordable()
            due = ranks.agreed(now, self.student) if together else now
        if due:
            self.measure(step, together=together)

    def measure(self, step: int, *, together: bool = False) -> dict[str, float]:
        """Probe now and log; returns the scalars, NaN included."""
        device = device_of(self.student, self.images.device)
        states = rng_state(device)
        self.budget.begin(step)
        try:
            scalars, drawn = self._measured(device, together)
        finally:
            set_rng_state(states, device)
            if together:
                ranks.reshard(self.student, self.base)
            self.budget.end()
        scalars |= {"seconds": self.budget.last, "share": self.budget.share}
        self.latest = {self.prefix + name: value for name, value in scalars.items()}
        if ranks.is_main():
            self._warn()
            self.log({name: value for name, value in self.latest.items() if value == value}, step)
            if self.log_images is not None and drawn:
                self.log_images({self.prefix + name: picture for name, picture in drawn.items()}, step)
        return self.latest

    def _measured(self, device: torch.device, together: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
        """All scalars and pictures that the budget allows."""
        scalars: dict[str, float] = {}
        drawn: dict[str, Tensor] = {}
        self.reasons = {}
        stages: list[tuple[str, Callable[[torch.device, dict[str, Tensor]], dict[str, float]]]] = [
            ("explanations", self._answers),
            ("UniCAM", self._transfer),
        ]
        stages += [("regions", self._regions)] if self.regions is not None else []
        for place, (_, stage) in enumerate(stages):
            over = place > 0 and self.budget.over()
            if ranks.agreed(over, self.student) if together else over:
                left = ", ".join(left for left, _ in stages[place:])
                self.reasons["max_seconds"] = f"{left} skipped after {self.budget.max_seconds} seconds"
                break
            scalars |= stage(device, drawn)
        return scalars, drawn

    def _answers(self, device: torch.device, drawn: dict[str, Tensor]) -> dict[str, float]:
        """How the student's answers and explanations compare with the reference's, which is asked once."""
        images = self.images.to(device)
        if self._reference is None:
            self._reference = self._asked(device)
            check_classes(explain(self.student, images[:2], explainer=self.explainer).logits, self._reference.logits)
        student = answers_of(self.student, images, self._reference.classes, self.explainer, self.batch_size)
        if self.log_images is not None:
            drawn["explanations"] = self._drawn(student.maps, self._reference.maps)
        return compared(student, self._reference, self.masks)

    def _asked(self, device: torch.device) -> Answers:
        """The answers of the teacher, or of the base."""
        model, images = (self.base, self.base_images)
        if self.teacher is not None:
            model, images = self.teacher, self.teacher_images
        return answers_of(model, images.to(device), None, self.explainer, self.batch_size)

    def _transfer(self, device: torch.device, drawn: dict[str, Tensor]) -> dict[str, float]:
        """UniCAM, and the scores of whole images."""
        pictures = (self.images.to(device), self.base_images.to(device))
        readings = read_both(self.student, self.base, pictures, self.layers, batch_size=self.batch_size)
        found = compare(*readings, self.targets)
        scalars: dict[str, float] = {}
        for name, layer in found.layers.items():
            scalars |= self._scores(layer.sums, name)
            scalars[f"blank_distilled/{name}"] = layer.distilled.blank.double().mean().item()
            scalars[f"blank_residual/{name}"] = layer.residual.blank.double().mean().item()
            if self.log_images is not None:
                drawn[f"unicam/{name}"] = self._drawn(layer.distilled.maps, layer.residual.maps)
        distances = [(layer.layer, layer.distances) for layer in readings[0].layers]
        return scalars | self._against_control(distances, pictures[0]) | _chance(found)

    def _against_control(self, student: list[tuple[str, Tensor]], images: Tensor) -> dict[str, float]:
        """The student's similarity to the untrained network, whose distances are measured once."""
        if self.control is None:
            return {}
        if not self._control_distances:
            found = read(
                self.control.to(images.device), images, [name for name, _ in student], batch_size=self.batch_size
            )
            self._control_distances = [layer.distances for layer in found.layers]
        both = zip(student, self._control_distances, strict=True)
        sums = {name: DistanceSums.of_distances(student=mine, control=control) for (name, mine), control in both}
        return {
            key: value
            for name, each in sums.items()
            for key, value in self._kept({"fss_control": each.score("student", "control")}, name).items()
        }

    def _regions(self, device: torch.device, drawn: dict[str, Tensor]) -> dict[str, float]:
        """The scores of the pixels that each model's maps keep."""
        found = layer_features(
            self.student,
            self.base,
            self.images.to(device),
            self.targets,
            self.layers,
            regions=self.regions,
            base_images=self.base_images.to(device),
            batch_size=self.batch_size,
        )
        scalars: dict[str, float] = {}
        for name, layer in found.items():
            scalars |= self._scores(layer.sums, name, "regions/")
            scalars[f"regions/n/{name}"] = float(layer.rows.sum())
        return scalars

    def _scores(self, sums: DistanceSums, layer: str, group: str = "") -> dict[str, float]:
        return self._kept(scores_of(sums), layer, group)

    def _kept(self, scores: dict[str, Score], layer: str, group: str = "") -> dict[str, float]:
        """The values by full name; why some are NaN is noted."""
        found = {f"{group}{name}/{layer}": score for name, score in scores.items()}
        self.reasons |= {name: score.reason for name, score in found.items() if score.reason}
        return {name: score.value for name, score in found.items()}

    def _drawn(self, first: Tensor, second: Tensor) -> Tensor:
        """A picture of rows: the images, and two kinds of maps of them."""
        pictures = displayable(self.images[: self.pictures], self.normalization)
        size = (SIDE, SIDE)
        maps = (m[: self.pictures].abs().sum(1, keepdim=True) for m in (first, second))
        return panel([enlarge(pictures, size), *(overlay(pictures, m, size) for m in maps)])

    def _warn(self) -> None:
        """Every reason once in a run: a dead layer stays dead, and a tracker full of NaN tells nobody."""
        new = {reason for reason in self.reasons.values() if reason not in self._warned}
        for reason in sorted(new):
            where = ", ".join(name for name, said in self.reasons.items() if said == reason)
            warnings.warn(f"The monitor has no value for {where}: {reason}.", stacklevel=4)
        self._warned |= new


def _chance(found: UniCAMResult) -> dict[str, float]:
    """How many images there are, and the spread of a score by chance."""
    score = next(iter(found.layers.values())).sums.score("student", "base")
    return {"n": float(found.n), "chance": score.chance}


def _check(count: int, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and len(other) != count:
            raise ValueError(f"Expected {name} of the probe's {count} images, but got {shape(other.shape)}.")
