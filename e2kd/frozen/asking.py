"""Asking a live teacher about canonical images, as `freeze` and `verify` do."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.classes import choose, every_class
from e2kd.explainers import Explainer, GradCAM
from e2kd.lessons import Lesson
from e2kd.modes import device_of, dtype_of, timm_configuration
from e2kd.normalization import Normalization, expected_normalization
from e2kd.similarity import pooled
from e2kd.teacher import Asking, Teacher

LARGEST_MAP = 56  # side of stored maps: finer ones agree less with an augmented image's own map, at more bytes
CHOICES = ("teacher", "labels", "all")


@dataclass(frozen=True)
class Answers:
    """Logits [B, K] float32, maps [B, C, h, w] float32 or None, and the explained classes [B]; on the CPU.

    Of all classes, the maps are one after another, [B, K * C, h, w], and `classes` are the teacher's top ones.
    """

    logits: Tensor
    maps: Tensor | None
    classes: Tensor


class Asked:
    """A teacher with everything that decides its answers about canonical images.

    Args:
        model: the teacher, or a timm name.
        example: a canonical image [C, H, W]; all others are of its type and size.
        explainer: None asks for logits alone.
        classes: "teacher", "labels" or "all".
        normalization: (mean, std) the teacher expects of images in [0, 1]; a timm model knows its own.
        size: side or (H, W) the teacher expects. None: the images' own, or a timm model's where that is smaller.
        map_size: (h, w) to which finer maps are averaged.

    Raises:
        ValueError: when it is not known what the teacher expects.
    """

    def __init__(
        self,
        model: nn.Module | str,
        example: Tensor,
        explainer: Explainer | None,
        classes: str,
        normalization: Normalization | None,
        size: int | tuple[int, int] | None,
        map_size: tuple[int, int] = (LARGEST_MAP, LARGEST_MAP),
    ) -> None:
        if classes not in CHOICES:
            raise ValueError(
                f"Expected classes to be one of {CHOICES}, but got {classes!r}: a cache holds a map of one class for "
                "each image, or of every class."
            )
        if explainer is None and classes == "all":
            raise ValueError('classes="all" says what maps explain, but there are to be none. Leave it out.')
        self.explainer, self.classes, self.map_size = explainer, classes, map_size
        self.pixels = example.dtype == torch.uint8
        given = ((0.0,) * len(example), (1.0,) * len(example)) if self.pixels else None
        self.teacher = Teacher(model, explainer or GradCAM(), Asking(normalization, given, size))
        self.normalization = _expected(self.teacher.model, normalization, self.pixels)
        if size is None and self.teacher.size is None:
            self.teacher.size = _smaller(self.teacher.model, example)
        self.model = self.teacher.model

    def __call__(self, images: Tensor, labels: Any) -> Answers:
        """Answers for canonical images [B, C, H, W] and their labels [B]."""
        images = self.prepared(images)
        lesson = self.teacher.lesson(images, explaining=self.explainer is not None)
        targets = _indices(labels, images.device) if self.classes == "labels" else None
        classes = choose("teacher" if targets is None else "labels", lesson.logits, targets)[0]
        maps = None if lesson.explain is None else self._maps(lesson, classes)
        return Answers(lesson.logits.float().cpu(), maps, classes[:, 0].cpu())

    def explain(self, images: Tensor, classes: Tensor) -> Tensor:
        """Maps of the classes [B], or of all, for images that are floating-point already: augmented ones."""
        assert self.explainer is not None
        images = images.to(device_of(self.model, images.device))
        return self._maps(self.teacher.lesson(images, explaining=True), classes.to(images.device)[:, None])

    def _maps(self, lesson: Lesson, classes: Tensor) -> Tensor:
        """Maps [B, C, h, w] of the classes [B, 1]; [B, K * C, h, w] of all, whatever those are."""
        assert lesson.explain is not None
        maps = lesson.explain(every_class(lesson.logits)[0] if self.classes == "all" else classes, None)
        return pooled(maps.flatten(1, 2), self.map_size).float().cpu()

    def prepared(self, images: Tensor) -> Tensor:
        """Canonical images as floating-point numbers on the teacher's device: pixels in [0, 1], others as they are."""
        images = images.to(device_of(self.model, images.device))
        return images.to(dtype_of(self.model)) / 255 if self.pixels else images


def _indices(labels: Any, device: torch.device) -> Tensor:
    """Labels [B] as class indices."""
    if not isinstance(labels, Tensor):
        try:
            numbers = [operator.index(label) for label in labels]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'classes="labels" needs class indices as labels, but got {list(labels)!r:.60}. Use classes="teacher", '
                "or a data set that gives them."
            ) from error
        labels = torch.tensor(numbers)
    found: Tensor = labels.to(device)
    return found


def _expected(model: nn.Module, given: Normalization | None, pixels: bool) -> list[list[float]] | None:
    """The normalisation a teacher expects, as it is recorded; None for images that need none."""
    if not pixels:
        if given is not None:
            raise ValueError(
                "normalization is for images that come as pixels (uint8), but the data set gives floating-point ones, "
                "which go to the teacher as they are. Leave it out."
            )
        return None
    wanted = expected_normalization(model, given)
    if wanted is None:
        raise ValueError(
            f"It is not known how {type(model).__name__} expects its images to be normalised. Pass "
            "normalization=(mean, std), for instance ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), or "
            "((0, 0, 0), (1, 1, 1)) for plain images in [0, 1]."
        )
    return [[float(v) for v in values] for values in wanted]


def _smaller(model: nn.Module, example: Tensor) -> tuple[int, int] | None:
    """The input size of a timm model, where canonical images are larger."""
    size = timm_configuration(model).get("input_size")
    if size is None or example.shape[-2] < size[-2] or example.shape[-1] < size[-1]:
        return None
    return (int(size[-2]), int(size[-1]))
