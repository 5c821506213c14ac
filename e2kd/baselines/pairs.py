"""What a rival is built on and computed from: the layers of two networks, and what they returned of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from e2kd.errors import check_names
from e2kd.stages import Layers, Stage

Names = Sequence[str] | None

UNEQUAL = (
    "Expected as many layers of the student as of the teacher, but got {student} and {teacher}. Name those of both, "
    "layers= and teacher_layers=, where one of them has not as many stages."
)


@dataclass(frozen=True)
class Batch:
    """What a term is computed from.

    Attributes:
        student: maps [B, C, h, w] of the student's stages, with their graph.
        teacher: those of the teacher's, without.
        student_logits, teacher_logits: [B, K].
        targets: as they came, with lessons or indices.
        labels: the labels alone.
    """

    student: list[Tensor]
    teacher: list[Tensor]
    student_logits: Tensor
    teacher_logits: Tensor
    targets: Any
    labels: Any


@dataclass(frozen=True)
class Pair:
    """Both networks' layers, to choose from."""

    student: Layers
    teacher: Layers

    def stages(self, layers: Names, teacher_layers: Names, count: int = 4) -> tuple[list[Stage], list[Stage]]:
        """As many stages of both, last with last; those that were named, where they were.

        Raises:
            TypeError: for one name in the place of a list.
            ValueError: when other numbers of layers were named.
        """
        check_names(layers=layers, teacher_layers=teacher_layers)
        count = len(layers or teacher_layers or ()) or count
        mine = self.student.stages(count) if layers is None else self.student.named(layers)
        theirs = self.teacher.stages(count) if teacher_layers is None else self.teacher.named(teacher_layers)
        if len(mine) != len(theirs) and (layers is not None or teacher_layers is not None):
            raise ValueError(UNEQUAL.format(student=len(mine), teacher=len(theirs)))
        some = min(len(mine), len(theirs))
        mine = mine if len(mine) == some else self.student.stages(some)
        return mine, theirs if len(theirs) == some else self.teacher.stages(some)
