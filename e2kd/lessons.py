"""What a teacher, live or frozen, gives to one step of distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from e2kd.classes import Name, every_class
from e2kd.explainers import Explainer
from e2kd.taught import Taught


@dataclass(frozen=True)
class Lesson:
    """One batch as the teacher sees it; nothing in it has a gradient.

    Attributes:
        logits: [B, K].
        explain: classes [B, k] and rows (indices of samples, None for all) -> maps [B, k, C, h, w]; None in a step
            that explains nothing. Asked once.
        classes: the only classes there are maps of, [B, k]; all of them or some are asked for. None when any class
            can be explained.
        valid: share of each cell of the maps that is known, [B, 1, h, w]; None when all are.
    """

    logits: Tensor
    explain: Callable[[Tensor, Tensor | None], Tensor] | None = None
    classes: Tensor | None = None
    valid: Tensor | None = None


def lesson_of(taught: Taught, choice: Name) -> Lesson:
    """The lesson that came with the batch, whose maps explain the classes of a choice (see `Prepared`)."""
    known = every_class(taught.logits)[0] if choice == "all" else taught.classes[:, None]

    def explain(classes: Tensor, rows: Tensor | None) -> Tensor:
        maps, wanted = (taught.maps, classes) if rows is None else (taught.maps[rows], classes[rows])
        found: Tensor = maps.unflatten(1, (known.shape[1], -1))
        if wanted.shape[1] == known.shape[1]:
            return found
        return found[torch.arange(len(found), device=found.device)[:, None], wanted]

    return Lesson(taught.logits, explain if taught.explains else None, known, taught.valid)


@runtime_checkable
class Prepared(Protocol):
    """A teacher whose lessons were prepared: what `E2KDLoss` asks of `FrozenTeacher`."""

    @property
    def explains(self) -> bool:
        """Whether it has maps."""

    @property
    def explainer(self) -> Explainer | None:
        """What a student is explained with to be compared with its maps; None where the user has to say."""

    @property
    def complete(self) -> bool:
        """Whether every logit is the teacher's own, and none the others' probability shared out evenly."""

    @property
    def choice(self) -> Name:
        """Which class its maps explain, in the words of `E2KDLoss`: "teacher", "labels" or "all"."""

    def taught(self, targets: Any, images: Tensor | None = None) -> Taught:
        """The lessons that came with a batch in the labels' place, for the images that the student was given."""

    def labels(self, targets: Any) -> Any:
        """The labels alone, of targets with lessons or without."""
