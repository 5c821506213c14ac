"""The losses: explanation similarity, and the one-line e²KD criterion."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.choosing import default_explainer, explainer_beside, explainers_of
from e2kd.classes import Choice, Chosen, check_choice, choose, drawn, equal_weights
from e2kd.comparing import Similarity, compare, compare_each
from e2kd.errors import check_reduction
from e2kd.explainers import Explainer, reads_images
from e2kd.forward import Forward
from e2kd.guards import (
    check_batch,
    check_explainers,
    check_grid,
    check_maps_of,
    check_module,
    check_not_empty,
    check_prepared,
    check_settings,
    is_multilabel,
    warn_dead,
    warn_graph,
)
from e2kd.lessons import Lesson, Prepared, lesson_of
from e2kd.logits import kd_loss
from e2kd.modes import unwrap
from e2kd.normalization import Normalization
from e2kd.showing import shown
from e2kd.similarity import at_least_float32, cosine, pooled
from e2kd.student import StudentExplainer
from e2kd.tasks import nested, reported, task_loss
from e2kd.taught import Taught, labels_of
from e2kd.teacher import Asking, Teacher
from e2kd.wrapping import Wrapping

Distillation = Callable[[Tensor, Tensor], Tensor]

# What the repr of a criterion tells, always and where it is not the default.
TOLD = ("weight", "kd_weight", "task_weight", "temperature", "classes", "explainer", "fraction", "every")
USUAL = {"similarity": cosine, "max_classes": None, "during": None, "resize": None, "distillation": None}

SOMETIMES = ("cosine", "agreement")  # parts that are nan where nothing was explained or the teacher not asked
NO_MAPS = (
    "Expected explanations for a weight other than 0, but the cache holds logits alone. Leave criterion.weight at 0, "
    "or freeze the teacher with an explainer."
)


class ExplanationLoss(nn.Module):
    """1 - similarity of student and teacher maps, averaged over the batch (e²KD, Eq. 3); with cosine in [0, 2].

    Args:
        similarity: any function (student maps [B, C, h, w], teacher maps [B, C, h, w]) -> [B].
        size: (H, W) both maps are first resized to, as the paper's code does with the image's size;
            None compares them on the student's grid.
        reduction: "mean" -> [], "none" -> [B].

    Raises:
        ValueError: for an unknown reduction.

    >>> ExplanationLoss()(torch.ones(2, 1, 7, 7), torch.ones(2, 1, 14, 14))
    tensor(0.)
    """

    def __init__(
        self, similarity: Similarity = cosine, *, size: tuple[int, int] | None = None, reduction: str = "mean"
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.similarity, self.size, self.reduction = similarity, size, reduction

    def extra_repr(self) -> str:
        """The settings."""
        return shown(similarity=self.similarity, size=self.size, reduction=self.reduction)

    def forward(self, student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
        """Maps [B, C, H, W] and [B, C, h, w] -> [] or [B]."""
        values = 1 - compare(self.similarity, student_maps, teacher_maps, self.size)[0]
        return values.mean() if self.reduction == "mean" else values


def _chosen(classes: Choice | None, teacher: object) -> Choice:
    """What is explained, where nothing was said too."""
    if classes is None:
        return teacher.choice if isinstance(teacher, Prepared) else "teacher"
    check_choice(classes)
    return classes


class E2KDLoss(Wrapping):
    """Explanation-enhanced knowledge distillation (e²KD, ECCV 2024, Eq. 2) around any criterion.

    loss = task_weight * criterion(outputs, targets) + kd_weight * τ² KL(teacher || student)
           + weight * mean(1 - cos(student's map, teacher's map))

    Called as the criterion was: `loss = criterion(student(images), targets)`. It listens to the student's training
    forwards with hooks, so the trainer's call stays as it is, under DistributedDataParallel, torch.compile, autocast,
    accumulation and activation checkpointing; it explains them by running the head, not the trunk, again.
    Teacher and student are not submodules: parameters and state_dict are those of `criterion` alone.

    In eval mode or under `no_grad` it returns the plain task loss and keeps nothing; without a criterion that is
    the cross-entropy with the targets. `.parts` holds detached scalars of the last training call: loss, task, kd,
    explanation, cosine, agreement (share of equal top classes) and zero_maps (how many samples have an all-zero map in
    student or teacher, and so teach nothing; with several classes, all-zero for more than half of their weight).
    task is what `criterion` returned: if that is another method, such as AT, its total loss, and its own terms are
    parts as well, under their names.
    Only reading a value waits for the device. In a step that explains nothing (`every`, `during`), explanation and
    zero_maps are 0 and cosine is nan; agreement is nan too if the teacher was not asked.

    Args:
        student: the module being trained, before or after it is wrapped by its trainer.
        teacher: a module, moved to its device by you, or a timm name; never trained, always in eval mode. Or a
            `FrozenTeacher`, whose lessons come with the batch in the targets' place.
        criterion: the criterion you had; None is pure distillation, the paper's setting. It may be another method
            around it, as `e2kd.baselines.CRD(student, teacher, criterion)`; the teacher still runs once.
        explainer: the student's; None is `GradCAM()` at the layer found for the model, `BcosWeights()` for a B-cos
            network, and `BcosContributions()` for one beside a network of the other kind.
        teacher_explainer: the teacher's; None is the student's, or chosen in the same way where that was not given.
        similarity: (student maps, teacher maps) -> [B].
        weight: λ, of the explanation term. The paper tries 1 to 10; with few images 25 was best here, at temperature 4.
            `criterion.weight` may be set anew between steps.
        kd_weight: of the logit term.
        task_weight: of the criterion; None is 1 with a criterion.
        temperature: τ. The paper tries 1 and 5.
        classes: what is explained: "teacher" (its top class), "labels", "positives" (multi-hot targets), "all",
            an integer k (the teacher's top k by its probabilities), or a function (see `e2kd.classes.choose`). None:
            what a frozen teacher's maps explain, or "teacher" for a live one.
        max_classes: of more classes than that, so many are explained for each sample, drawn anew in every step: an
            unbiased estimate of the term, whose noise wants a smaller weight. Saves time where each class takes a
            derivative of its own, as in networks that read a class token, and with explainers of images; None explains
            them all.
        fraction: share of each batch that is explained, drawn at random; an unbiased estimate of the term. Saves time
            with explainers that need a pass of the whole network, such as `BcosWeights`.
        every: explain every k-th step, the term times k. The paper's code skips without that factor.
        during: (start, stop): explain only in the steps start <= step < stop of the training, a step being a call of
            this criterion. With explainers that need a pass of the whole network, explaining only while the learning
            rate is high keeps most of the gain. The term is not rescaled. `every`, `max_classes`, `fraction` and
            `during` count from 0 in a resumed process, unless you set `criterion.step`.
        resize: "image" compares maps at image size as the paper's code does; None on the student's grid.
        distillation: (student logits, teacher logits) -> []; None is `kd_loss` at `temperature`. Use
            `MultiLabelKDLoss()` for multi-label teachers.
        input_normalization: (mean, std) your images are normalised with; tells how to renormalise for the teacher.
        teacher_normalization: (mean, std) the teacher expects; a timm teacher knows its own, a B-cos teacher takes
            images in [0, 1], and the inverse channels are added if it does not add them itself.
        teacher_size: side or (H, W) the teacher expects; timm teachers of fixed size know theirs.
        example: images [B, C, H, W] to find the student's layer with; None makes noise of a usual size, and looks again
            at the first images where they may be too small for the layer found.

    Raises:
        UnsupportedModel: when a model can't be explained; the message says what to do.
        ValueError, TypeError, RuntimeError: for bad settings or input; nothing has been changed then.

    >>> _ = torch.manual_seed(0)
    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    >>> student, teacher = net(4), net(8)
    >>> criterion = E2KDLoss(student, teacher, nn.CrossEntropyLoss())
    >>> loss = criterion(student(torch.rand(2, 3, 32, 32)), torch.tensor([0, 3]))
    >>> loss.backward()
    >>> sorted(criterion.parts)
    ['agreement', 'cosine', 'explanation', 'kd', 'loss', 'task', 'zero_maps']
    """

    part_names = ("task", "kd", "explanation", "cosine", "agreement", "zero_maps")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str | Prepared,
        criterion: Callable[..., Tensor] | None = None,
        *,
        explainer: Explainer | None = None,
        teacher_explainer: Explainer | None = None,
        similarity: Similarity = cosine,
        weight: float = 1.0,
        kd_weight: float = 1.0,
        task_weight: float | None = None,
        temperature: float = 1.0,
        classes: Choice | None = None,
        max_classes: int | None = None,
        fraction: float = 1.0,
        every: int = 1,
        during: tuple[int, int] | None = None,
        resize: str | None = None,
        distillation: Distillation | None = None,
        input_normalization: Normalization | None = None,
        teacher_normalization: Normalization | None = None,
        teacher_size: int | tuple[int, int] | None = None,
        example: Tensor | None = None,
    ) -> None:
        super().__init__(criterion)
        check_settings(weight, kd_weight, task_weight, temperature, fraction, every, during, max_classes, resize)
        classes = _chosen(classes, teacher)
        check_module(student, "student")
        check_explainers(explainer=explainer, teacher_explainer=teacher_explainer)
        self.similarity, self.classes, self.resize = similarity, classes, resize
        self.max_classes = None if max_classes is None else int(max_classes)
        self.weight, self.kd_weight, self.temperature = weight, kd_weight, temperature
        self.task_weight = task_weight if task_weight is not None else float(criterion is not None)
        self.fraction, self.every, self.during, self.distillation = fraction, every, during, distillation
        # Not registered as submodules: neither belongs to the criterion's parameters, state or device.
        asking = Asking(teacher_normalization, input_normalization, teacher_size)
        if isinstance(teacher, Prepared):
            check_prepared(teacher, explainer, classes, weight, distillation, (teacher_explainer, *asking))
            beside = teacher.explainer and explainer_beside(unwrap(student), teacher.explainer)
            self.explainer = explainer or beside or default_explainer(unwrap(student))
            self.teacher = teacher
        else:
            if not isinstance(teacher, str):
                check_module(teacher, "teacher")
            self.explainer, theirs = explainers_of(student, teacher, explainer, teacher_explainer)
            self.teacher = Teacher(teacher, theirs, asking).beside(unwrap(student))
        self.explained = StudentExplainer(unwrap(student), self.explainer, example, fraction)
        self.tap = self.explained.tap
        self.seed, self.step = torch.initial_seed(), 0
        self._share_teacher()

    def extra_repr(self) -> str:
        """The settings; of those that are seldom given, the ones that were."""
        told = {name: getattr(self, name) for name in TOLD}
        told |= {name: getattr(self, name) for name, usual in USUAL.items() if getattr(self, name) is not usual}
        return shown(**told, **self._said_of_teacher())

    def _said_of_teacher(self) -> dict[str, object]:
        """How a live teacher is asked and explained, as far as that was given."""
        if not isinstance(self.teacher, Teacher):
            return {}
        told = self.teacher.asking.said()
        theirs = self.teacher.explainer
        return told if shown(it=theirs) == shown(it=self.explainer) else {"teacher_explainer": theirs} | told

    @property
    def student(self) -> nn.Module:
        """The network that is trained, without wrappers."""
        return self.explained.student

    @property
    def step(self) -> int:
        """Training calls so far. Set it where a training is resumed; e2kd's trainers do."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        self.explained.expect(self._explains())

    def _teach(self, outputs: Any, logits: Tensor, targets: Any, options: dict[str, Any]) -> Tensor:
        check_not_empty(logits)
        forward = self.explained.forward_of(logits)
        taught = self._taught(targets, forward.images)
        labels = labels_of(targets) if taught is None else taught.labels
        explaining = self._explains()
        self.step += 1
        rows = self._rows(len(logits), logits.device) if explaining else None
        zero = at_least_float32(logits.new_zeros(()))
        parts = dict.fromkeys(self.part_names, zero) | dict.fromkeys(SOMETIMES, zero + torch.nan)
        loss, lesson = zero, None
        if explaining or self.kd_weight != 0:  # asked first, so that criteria inside of this one hear the answer
            lesson = self._lesson(forward, explaining, rows, taught)
            check_batch(logits, lesson.logits)
        if self.task_weight != 0:
            parts["task"] = task_loss(self.criterion, outputs, targets, labels, **options)
            loss = loss + self.task_weight * parts["task"]
        if lesson is not None:
            parts["agreement"] = (logits.argmax(1) == lesson.logits.argmax(1)).float().mean()
            if self.kd_weight != 0:
                parts["kd"] = self._distill(logits, lesson.logits)
                loss = loss + self.kd_weight * parts["kd"]
            if explaining:
                parts |= self._explain(forward, logits, lesson, labels, rows)
                loss = loss + self.weight * parts["explanation"]
        self._parts = reported(self.criterion, parts, loss)
        return loss

    def _task(self, outputs: Any, targets: Any, options: dict[str, Any]) -> Tensor:
        multilabel = is_multilabel(self.distillation)
        criterion = None if multilabel and nested(self.criterion)[-1] is None else self.criterion
        return task_loss(criterion, outputs, targets, self._labels(targets), multilabel=multilabel, **options)

    def _explains(self) -> bool:
        """Whether the next step explains."""
        start, stop = self.during or (0, math.inf)
        return self.weight != 0 and start <= self.step < stop and (self.step - start) % self.every == 0

    def _lesson(self, forward: Forward, explaining: bool, rows: Tensor | None, taught: Taught | None) -> Lesson:
        if not isinstance(self.teacher, Teacher):
            assert taught is not None
            return lesson_of(taught, self.teacher.choice)
        with forward.autocasting():
            return self.teacher.lesson(forward.images, explaining=explaining, rows=rows)

    def _distill(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if self.distillation is not None:
            return self.distillation(logits, teacher_logits)
        return kd_loss(logits, teacher_logits, self.temperature)

    def _explain(
        self, forward: Forward, logits: Tensor, lesson: Lesson, labels: Tensor | None, rows: Tensor | None
    ) -> dict[str, Tensor]:
        """The explanation term, unbiased over steps and batch, with what is reported of it."""
        if lesson.explain is None:
            raise ValueError(NO_MAPS)
        images, valid = forward.images, lesson.valid
        classes, weights = self._choose(lesson, labels)
        if rows is not None:
            weights, valid = weights[rows], None if valid is None else valid[rows]
        if valid is not None:  # an image half of which left the frame counts half
            weights = weights * valid.mean((1, 2, 3))[:, None]
        size = (images.shape[-2], images.shape[-1]) if self.resize == "image" else None
        with torch.autocast(images.device.type, enabled=False):
            theirs = lesson.explain(classes, rows)  # first: the teacher's graph is gone when the student's is made
            mine = self.explained.view(forward, logits, rows).explain_each(self.explainer, classes, rows)
            check_grid(mine, f"student's (at {self.explained.place})")
            check_grid(theirs, "teacher's", "teacher_explainer")
            if lesson.classes is not None and reads_images(self.explainer):  # cached maps were averaged
                mine = pooled(mine.flatten(1, 2), (theirs.shape[-2], theirs.shape[-1])).unflatten(1, mine.shape[1:3])
            check_maps_of(mine, weights, "student's")
            check_maps_of(theirs, weights, "teacher's")
            alike, zero = compare_each(self.similarity, mine, theirs, size, valid)
            warn_graph(alike)
        similarity, dead, total = (weights * alike).sum(1), (weights * zero).sum(1), weights.sum(1)
        warn_dead(dead, total, self.explained.place)
        return {
            "explanation": (total - similarity).mean() * self.every,
            "cosine": similarity.sum() / total.sum(),
            "zero_maps": ((dead > 0.5 * total) & (total > 0)).sum(),
        }

    def _choose(self, lesson: Lesson, labels: Tensor | None) -> Chosen:
        if lesson.classes is None:
            classes, weights = choose(self.classes, lesson.logits, labels)
        else:
            classes, weights = lesson.classes, equal_weights(lesson.classes, lesson.logits)
        if self.max_classes is None or classes.shape[1] <= self.max_classes:
            return classes, weights
        return drawn(classes, weights, self.max_classes, self._draws(1))

    def _draws(self, of: int) -> torch.Generator:
        """Random numbers of a step, others for each purpose; the trainer's own stay what they were."""
        return torch.Generator().manual_seed((self.seed + self.step + (of << 31)) % 2**63)  # of which 32 bits count

    def _rows(self, batch: int, device: torch.device) -> Tensor | None:
        """Indices of the samples to explain, None for all."""
        if self.fraction == 1:
            return None
        chosen = torch.randperm(batch, generator=self._draws(0))[: max(1, round(self.fraction * batch))]
        return chosen.to(device, non_blocking=True)
