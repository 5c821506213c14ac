"""timm's task of a training step, with explanations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationTask, DistillationTeacher
from torch import Tensor, nn

from e2kd.commands.models import make_model
from e2kd.lessons import Prepared
from e2kd.losses import E2KDLoss
from e2kd.modes import unwrap
from e2kd.normalization import expected_normalization, told_to
from e2kd.trainers.averages import Averages

RETURNED = ("task", "kd", "explanation")


class E2KDTask(ClassificationTask):
    """Explanation-enhanced distillation as a task of timm's; arguments as of `timm.task.LogitDistillationTask`.

    The student is compiled, distributed, averaged (EMA) and saved as in timm's own tasks. The teacher is no submodule:
    it is in no state_dict, and it is explained in eager mode also when the task is compiled. DistributedDataParallel
    on the CPU works.

    Args:
        student_model: the student.
        teacher_model: a timm name, a module, timm's `DistillationTeacher`, or a `FrozenTeacher`.
        criterion: the task loss; cross-entropy if neither it nor `criterion_kwargs` is given.
        criterion_kwargs: what timm makes the task loss of (timm >= 1.0.30).
        teacher_pretrained_path: weights of a teacher that is given by its name; timm's pretrained ones if None.
        teacher_pretrained_cfg_overlay: changes to a named teacher's pretrained configuration.
        loss_type: "kl".
        distill_loss_weight: of the logit term; 1 if no weight is given, 1 - task_loss_weight if that alone is.
        task_loss_weight: of the task loss, 1 if None.
        temperature: τ of the logit term.
        explanation_loss_weight: λ of the explanation term.
        device: of the teacher; the student is where you put it.
        dtype: of the teacher; float32 if None.
        verbose: log the settings.
        settings: of `E2KDLoss`: explainer, teacher_explainer, similarity, classes, fraction, every, resize ...

    >>> import timm
    >>> _ = torch.manual_seed(0)
    >>> student, teacher = (timm.create_model("test_resnet", num_classes=5) for _ in range(2))
    >>> task = E2KDTask(student, teacher, nn.CrossEntropyLoss(), temperature=2.0, verbose=False)
    >>> result = task(torch.rand(2, 3, 96, 96), torch.tensor([0, 4]))
    >>> result["loss"].backward()
    >>> sorted(result)
    ['explanation_loss', 'kd_loss', 'loss', 'output', 'task_loss']
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module | Prepared,
        criterion: Callable[..., Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        teacher_pretrained_path: str | Path | None = None,
        teacher_pretrained_cfg_overlay: dict[str, Any] | None = None,
        loss_type: str = "kl",
        distill_loss_weight: float | None = None,
        task_loss_weight: float | None = None,
        temperature: float = 1.0,
        explanation_loss_weight: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        **settings: Any,
    ) -> None:
        if loss_type != "kl":
            raise ValueError(f"Expected loss_type to be 'kl', but got {loss_type!r}. Use distillation= for another.")
        if criterion is None and criterion_kwargs is None:
            criterion = nn.CrossEntropyLoss()
        made = {} if criterion_kwargs is None else {"criterion_kwargs": criterion_kwargs}
        super().__init__(student_model, criterion, device=device, dtype=dtype, verbose=verbose, **made)
        teacher: nn.Module | Prepared
        if isinstance(teacher_model, Prepared):
            teacher = teacher_model
        else:
            checkpoint = None if teacher_pretrained_path is None else Path(teacher_pretrained_path)
            teacher = self._teacher(teacher_model, checkpoint, teacher_pretrained_cfg_overlay)
            given = expected_normalization(unwrap(student_model), None)
            given = told_to(teacher, given, settings.get("teacher_normalization"))
            settings = {"input_normalization": given} | settings
        only_task = task_loss_weight is not None and distill_loss_weight is None
        criterion = E2KDLoss(
            student_model,
            teacher,
            self.criterion,
            weight=explanation_loss_weight,
            kd_weight=1.0 - (task_loss_weight or 0.0) if only_task else _or_one(distill_loss_weight),
            task_weight=_or_one(task_loss_weight),
            temperature=temperature,
            **settings,
        )
        self.criterion, self.averages = criterion, Averages(criterion)

    def _teacher(self, teacher: str | nn.Module, checkpoint: Path | None, overlay: dict[str, Any] | None) -> nn.Module:
        if not isinstance(teacher, str):
            inner: nn.Module = teacher.model if isinstance(teacher, DistillationTeacher) else teacher
            return inner
        student: Any = unwrap(self.trainable_module)
        changes = {} if overlay is None else {"pretrained_cfg_overlay": overlay}
        with torch.random.fork_rng():  # the trainer's own random numbers stay what they were
            made = make_model(
                teacher,
                student.num_classes,
                checkpoint,
                pretrained=checkpoint is None,
                in_chans=student.in_chans,
                **changes,
            )
        return made.to(device=self.device, dtype=self.dtype).eval()

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> E2KDTask:
        """The teacher moves along with the task."""
        teacher = self.averages.criterion.teacher
        if not isinstance(teacher, Prepared):
            teacher.model._apply(fn)
        super()._apply(fn, *args, **kwargs)
        return self

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> E2KDTask:
        """Wrap the student in DistributedDataParallel; on the CPU without device_ids, which torch refuses there."""
        ids = None if self.device.type == "cpu" else device_ids
        super().prepare_distributed(device_ids=ids, **ddp_kwargs)
        return self

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """How many steps there were: what `every` and `fraction` go on from after a resume."""
        return {} if ema else {"step": self.averages.step}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Go on from a saved task state; checkpoints of other tasks have none."""
        if state is not None and not ema:
            self.averages.resume(state["step"])

    def forward(self, input: Tensor, target: Any) -> dict[str, Tensor]:
        """Student's output, loss and its parts, as timm's tasks return them.

        Args:
            input: images [B, C, H, W].
            target: labels [B], soft targets [B, K], or lessons of a frozen teacher.
        """
        criterion = self.averages.criterion
        output, step = self.trainable_module(input), criterion.step
        result = {"loss": criterion(output, target), "output": output}
        if criterion.step == step:  # an evaluation has no parts
            return result
        parts = criterion.parts
        return result | {f"{name}_loss": parts[name] for name in RETURNED}


def _or_one(weight: float | None) -> float:
    return 1.0 if weight is None else weight
