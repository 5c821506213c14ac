"""One seed of the comparison: a teacher, and students that differ in their criterion only."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

import e2kd
from e2kd.demo.data import Mode, Part, Scenes, make_scenes
from e2kd.demo.lessons import Lessons, frozen_lessons
from e2kd.demo.measure import Scores, evaluate, predictions
from e2kd.demo.progress import Tracker
from e2kd.demo.settings import FROZEN, Arm, Settings
from e2kd.demo.train import Criterion, batches, small_net, train

TEACHER_WIDTH, STUDENT_WIDTH = 24, 12
EXAMPLES = 4  # images of each class that the figure shows


class SeedData(NamedTuple):
    """The four sets of one seed; `reversed_` is the out-of-distribution one."""

    unbiased: Scenes
    biased: Scenes
    aligned: Scenes
    reversed_: Scenes


class SeedRun(NamedTuple):
    """What one seed leaves: scores and seconds per arm, the trained nets, and a few images to show them with.

    `freezing` is the seconds of the frozen arms' teacher, asked once for both.
    """

    seed: int
    scores: dict[Arm, Scores]
    seconds: dict[Arm, float]
    freezing: float
    nets: dict[Arm, nn.Module]
    examples: Scenes


class Clock:
    """Seconds from one lap to the next."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def make_data(seed: int, settings: Settings) -> SeedData:
    """The data of a seed: nothing of the train part is in the test sets, which hold the digits of `settings.part`."""
    first = 10 * seed
    return SeedData(
        make_scenes(Part.TRAIN, Mode.RANDOM, settings.teacher_images, first),
        make_scenes(Part.TRAIN, Mode.ALIGNED, settings.student_images, first + 1),
        make_scenes(settings.part, Mode.ALIGNED, settings.test_images, first + 2),
        make_scenes(settings.part, Mode.REVERSED, settings.test_images, first + 3),
    )


def criterion_for(
    arm: Arm, student: nn.Module, teacher: nn.Module | e2kd.FrozenTeacher, settings: Settings
) -> Criterion:
    """The one line in which the arms differ; a frozen arm's teacher is a `FrozenTeacher`."""
    if arm is Arm.CROSS_ENTROPY:
        return nn.CrossEntropyLoss()
    weight = settings.weight_of(arm)
    return e2kd.E2KDLoss(student, teacher, None, temperature=settings.temperature, weight=weight)


def train_teacher(seed: int, data: SeedData, settings: Settings, tracker: Tracker) -> nn.Module:
    """The teacher: wider, and trained with labels on images whose texture tells nothing."""
    teacher = small_net(TEACHER_WIDTH, seed)
    scenes, plan = data.unbiased, batches(settings.teacher_images, settings.teacher_epochs, seed)

    def feed(batch: Tensor) -> tuple[Tensor, Tensor]:
        return scenes.images[batch], scenes.labels[batch]

    with tracker.stage(f"seed {seed}: {Arm.TEACHER.value}", len(plan), settings.cost(Arm.TEACHER)) as advance:
        train(teacher, nn.CrossEntropyLoss(), feed, plan, seed, advance)
    return teacher


def train_student(
    arm: Arm, seed: int, lessons: Lessons, teacher: nn.Module, settings: Settings, tracker: Tracker
) -> nn.Module:
    """A student. All of one seed start from the same weights and see the same images, augmented alike."""
    student = small_net(STUDENT_WIDTH, seed)
    criterion = criterion_for(arm, student, lessons.frozen if arm in FROZEN else teacher, settings)
    feed, plan = lessons.feed(frozen=arm in FROZEN), batches(settings.student_images, settings.student_epochs, seed)
    with tracker.stage(f"seed {seed}: {arm.value}", len(plan), settings.cost(arm)) as advance:
        train(student, criterion, feed, plan, seed, advance)
    if isinstance(criterion, e2kd.E2KDLoss):
        criterion.remove()
    return student


def run_seed(seed: int, settings: Settings, tracker: Tracker) -> SeedRun:
    """Trains the nets of a seed and measures them."""
    data, clock = make_data(seed, settings), Clock()
    teacher = train_teacher(seed, data, settings, tracker)
    nets, seconds = {Arm.TEACHER: teacher}, {Arm.TEACHER: clock.lap()}
    with frozen_lessons(teacher, data.biased) as lessons:
        freezing = clock.lap()
        for arm in list(Arm)[1:]:
            nets[arm] = train_student(arm, seed, lessons, teacher, settings, tracker)
            seconds[arm] = clock.lap()
    classes = predictions(nets[Arm.TEACHER], data.reversed_.images)
    scores = {}
    with tracker.stage(f"seed {seed}: measuring", len(nets), settings.test_cost()) as advance:
        for arm, net in nets.items():
            scores[arm] = evaluate(net, data.aligned, data.reversed_, classes)
            advance()
    shown = example_places(data.reversed_.labels, classes)
    return SeedRun(seed, scores, seconds, freezing, nets, Scenes(*(field[shown] for field in data.reversed_)))


def example_places(labels: Tensor, teacher_classes: Tensor) -> Tensor:
    """The first EXAMPLES images of each class that the teacher gets right, whatever the students say about them.

    >>> example_places(torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 0]))
    tensor([1, 3, 2, 0])
    """
    order = (labels != teacher_classes).int().argsort(stable=True)  # those it gets wrong last
    return torch.cat([order[labels[order] == label][:EXAMPLES] for label in (0, 1)])
