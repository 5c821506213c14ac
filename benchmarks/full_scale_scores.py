"""What a student is worth on the images of a split: every process measures its share, torchmetrics joins them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MultilabelF1Score

from benchmarks.full_scale_networks import evidence
from benchmarks.paired import Row
from e2kd.guards import check_batch
from e2kd.localization import energy_on_mask
from e2kd.outputs import logits_of
from e2kd.teacher import Teacher

VISIBLE = 0.5  # of some pixel, so that a class counts as one that the image shows


class Scores:
    """Measures over batches and processes, as shares in [0, 1].

    `accuracy`, or where images show several classes `f1` over all of them together, at logits >= 0, as the authors
    count it, and `f1_macro`, the mean over classes; `agreement` of the top classes (e²KD, Eq. 4); both
    for every group, the worst, and the groups whose class and background belong together or don't; `epg`, the share
    of positive evidence for each class in an image that lies on its objects; where there is none it is left out.

    Args:
        classes: K.
        multilabel: whether targets are multi-hot.
        groups: names, of class and background alternating, none if there are no groups.
        regions: whether objects are marked.
        taught: whether there is a teacher to compare with.
    """

    def __init__(
        self, classes: int, *, multilabel: bool = False, groups: Sequence[str] = (), regions: bool = False, taught: bool
    ) -> None:
        self.groups, self.multilabel, self.regions = groups, multilabel, regions
        self.answers = ["accuracy"] * (not multilabel) + ["agreement"] * taught
        names = self.answers + [f"{name} {group}" for name in self.answers for group in groups]
        names += ["epg"] * regions + ["teacher_epg"] * (regions and taught)
        self.metrics: dict[str, Metric] = {name: MeanMetric(nan_strategy="ignore") for name in names}
        if multilabel:
            self.metrics["f1"] = MultilabelF1Score(classes, average="micro")
            self.metrics["f1_macro"] = MultilabelF1Score(classes, average="macro")

    def to(self, device: torch.device) -> Scores:
        """With the sums on a device."""
        for metric in self.metrics.values():
            metric.to(device)
        return self

    def update(self, logits: Tensor, taught: Tensor | None, batch: Row) -> None:
        """Of a batch: the student's logits [B, K], the teacher's, targets and groups."""
        found = logits.argmax(1)
        if self.multilabel:
            for name in ("f1", "f1_macro"):
                self.metrics[name].update((logits >= 0).long(), batch["target"].long())
        else:
            self._add("accuracy", found == batch["target"], batch)
        if taught is not None:
            check_batch(logits, taught)
            self._add("agreement", found == taught.argmax(1), batch)

    def _add(self, name: str, right: Tensor, batch: Row) -> None:
        self.metrics[name].update(right.float())
        for number, group in enumerate(self.groups):
            self.metrics[f"{name} {group}"].update(right[batch["group"] == number].float())

    def localize(self, name: str, model: nn.Module, images: Tensor, masks: Tensor) -> None:
        """Where the evidence for each class in an image lies; masks [B, K, H, W] in [0, 1]."""
        rows, classes = (masks.flatten(2).amax(2) > VISIBLE).nonzero(as_tuple=True)
        if len(rows):
            self.metrics[name].update(energy_on_mask(evidence(model, images[rows], classes), masks[rows, classes]))

    def compute(self) -> Row:
        """All measures; None where nothing was measured. Every process has to call it."""
        values = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        found = {name: None if math.isnan(value) else value for name, value in values.items()}
        return found | (self._of_groups(found) if self.groups else {})

    def _of_groups(self, found: Row) -> Row:
        """The worst group, and means over the groups that belong together (landbird on land) or don't."""
        each = {name: [found[f"{name} {group}"] for group in self.groups] for name in self.answers}
        known = [value for value in each["accuracy"] if value is not None]
        summary: Row = {"worst_group": min(known, default=None)}
        for name, values in each.items():
            summary[f"in_distribution_{name}"] = _mean(values[0], values[3])
            summary[f"out_of_distribution_{name}"] = _mean(values[1], values[2])
        return summary


def _mean(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def measured(
    student: nn.Module, teacher: Teacher | None, batches: Iterable[Row], scores: Scores, device: torch.device
) -> Row:
    """The student, and where objects are marked the teacher as well, on a process's share of the images."""
    student.eval()
    for batch in _moved(batches, device):
        images = batch["image"]
        with torch.no_grad():
            logits = logits_of(student(images)).float()
        scores.update(logits, None if teacher is None else teacher.logits(images), batch)
        if scores.regions:
            scores.localize("epg", student, batch["whole"], batch["masks"])
            if teacher is not None:
                scores.localize("teacher_epg", teacher.model, teacher.prepared(batch["whole"]), batch["masks"])
    return scores.compute()


def _moved(batches: Iterable[Row], device: torch.device) -> Iterator[Row]:
    for batch in batches:
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}
