"""A criterion around another one: the other's loss, and more to learn while the student is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.capture import Tap
from e2kd.guards import check_task, is_teaching
from e2kd.lessons import Prepared
from e2kd.outputs import logits_of
from e2kd.tasks import nested, remove_hooks, share, task_loss
from e2kd.taught import Taught, labels_of
from e2kd.teacher import Teacher

TAUGHT_FOR_LIVE = (
    "The targets are lessons of a frozen teacher (e2kd.Taught), but the criterion was built with a live one. Pass "
    "`targets.labels`, or build the criterion with the cache: E2KDLoss(student, FrozenTeacher.open(path), ...)."
)
UNTAKEN = (
    "Expected outputs and targets alone, since there is no criterion that could take {names}. Leave that out, or pass "
    "the criterion that takes it."
)


class Wrapping(nn.Module):
    """What `E2KDLoss` and its rivals have in common; each brings a `tap` on the student, a `teacher`, and `_teach`.

    Args:
        criterion: the one inside, None where there is none.
    """

    takes_lessons = True  # as a criterion inside of another: it is given the targets as they came
    tap: Tap
    teacher: Teacher | Prepared

    def __init__(self, criterion: Callable[..., Tensor] | None) -> None:
        super().__init__()
        check_task(criterion)
        self.criterion = criterion
        self._parts: dict[str, Tensor] = {}

    @property
    def part_names(self) -> tuple[str, ...]:
        """What its own parts are called, but the loss."""
        raise NotImplementedError

    @property
    def parts(self) -> dict[str, Tensor]:
        """Detached scalars of the last training call; see the class."""
        return dict(self._parts)

    def remove(self) -> None:
        """Take every hook off the student, those of an e2kd criterion inside too. Neither can teach afterwards."""
        self.tap.remove()
        remove_hooks(self.criterion)

    def forward(
        self,
        outputs: Any,
        targets: Any = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss [] for the student's outputs.

        Args:
            outputs: what the student returned: logits [B, K], or a tuple, dict or ModelOutput with them.
            targets: what the criterion takes, None for pure distillation; `Taught` from a `FrozenDataset`.
            num_items_in_batch: labels of the whole accumulated batch, over all processes (Hugging Face Trainer); the
                loss is then this call's share of the batch's mean.
            options: for the criterion, as they are.
        """
        if torch.compiler.is_compiling():  # a whole step; asked for only then, since it loads the compiler
            loss: Tensor = torch.compiler.disable(self.forward)(
                outputs, targets, num_items_in_batch=num_items_in_batch, **options
            )
            return loss
        if options and nested(self)[-1] is None:
            raise TypeError(UNTAKEN.format(names=", ".join(options)))
        logits = logits_of(outputs)
        if is_teaching(self, self.tap.student, logits):
            loss = self._teach(outputs, logits, targets, options)
        else:
            loss = self._task(outputs, targets, options)
        return loss if num_items_in_batch is None else loss * share(logits, self._labels(targets), num_items_in_batch)

    def adopt(self, teacher: Teacher) -> Teacher:
        """Have one teacher with the criterion around this one, which brings its own; the one that answers for both.

        A criterion that says nothing of how the teacher is to be asked follows the one that does.
        """
        own = self.teacher
        if not isinstance(own, Teacher) or own is teacher:
            return teacher
        if own.model is teacher.model and own.unset != teacher.unset:
            silent, told = (own, teacher) if own.unset else (teacher, own)
            silent.follow(told)
        if teacher.serves(own):
            teacher.answer_for(own)
            self.teacher = teacher
        elif own.serves(teacher):
            own.answer_for(teacher)
            return own
        return teacher

    def _share_teacher(self) -> None:
        """One teacher for all criteria inside of one another, where one can answer for all: it runs once a step."""
        for module in self.modules():
            if isinstance(module, Wrapping) and isinstance(self.teacher, Teacher):
                self.teacher = module.adopt(self.teacher)

    def _teach(self, outputs: Any, logits: Tensor, targets: Any, options: dict[str, Any]) -> Tensor:
        """The loss [] of a training step, whose `_parts` it leaves."""
        raise NotImplementedError

    def _task(self, outputs: Any, targets: Any, options: dict[str, Any]) -> Tensor:
        return task_loss(self.criterion, outputs, targets, self._labels(targets), **options)

    def _labels(self, targets: Any) -> Any:
        return self.teacher.labels(targets) if isinstance(self.teacher, Prepared) else labels_of(targets)

    def _taught(self, targets: Any, images: Tensor) -> Taught | None:
        """The lesson that came with the batch, None where the teacher is asked now."""
        if isinstance(self.teacher, Prepared):
            return self.teacher.taught(targets, images)
        if isinstance(targets, Taught):
            raise ValueError(TAUGHT_FOR_LIVE)
        return None
