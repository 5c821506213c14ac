"""The criteria that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

import e2kd
from benchmarks.full_scale_run import Run
from benchmarks.limited_training import RIVALS
from e2kd.baselines import CRD, DKD, Baseline
from e2kd.bcos.images import is_bcos
from e2kd.classes import Choice
from e2kd.teacher import Teacher

Criterion = Callable[[nn.Module, Any, Run, bool], nn.Module]


def supervised(student: nn.Module, teacher: Any, run: Run, multilabel: bool) -> nn.Module:
    """Labels alone."""
    if is_bcos(student):
        return e2kd.bcos.BcosLoss()
    return nn.BCEWithLogitsLoss() if multilabel else nn.CrossEntropyLoss()


def distilled(
    student: nn.Module,
    teacher: Teacher | e2kd.FrozenTeacher,
    run: Run,
    multilabel: bool,
    *,
    explained: bool = False,
    classes: Choice = "teacher",
    rival: type[Baseline] | None = None,
) -> nn.Module:
    """The teacher alone, with its explanations or not; a rival comes on top, DKD in the place of KD.

    λ multiplies a rival's own weight, unless it is that of e²KD around it.
    """
    settings: dict[str, Any] = {}
    if isinstance(teacher, Teacher):
        settings = {"teacher_normalization": teacher.wanted, "input_normalization": teacher.given}
        if isinstance(teacher.explainer, e2kd.CAM):
            settings["explainer"] = teacher.explainer
    inner = None if rival is None or not isinstance(teacher, Teacher) else rival(student, teacher.model)
    if inner is not None and not explained:
        inner.weight *= run.weight
    return e2kd.E2KDLoss(
        student,
        teacher.model if isinstance(teacher, Teacher) else teacher,
        inner,
        kd_weight=0.0 if rival is DKD else run.kd_weight,
        weight=run.weight if explained else 0.0,
        temperature=run.temperature,
        classes=classes,
        max_classes=run.max_classes,
        fraction=run.fraction,
        resize=run.recipe.resize,
        distillation=e2kd.MultiLabelKDLoss() if multilabel else None,
        **settings,
    )


ARMS: dict[str, Criterion] = {
    "cross_entropy": supervised,
    "kd": distilled,
    "e2kd": partial(distilled, explained=True),
    "e2kd_all": partial(distilled, explained=True, classes="all"),
    "frozen_kd": distilled,
    "frozen_e2kd": partial(distilled, explained=True),
    "frozen_e2kd_all": partial(distilled, explained=True, classes="all"),
    "crd_e2kd": partial(distilled, explained=True, rival=CRD),
}
ARMS |= {arm: partial(distilled, rival=method) for arm, method in RIVALS.items()}
