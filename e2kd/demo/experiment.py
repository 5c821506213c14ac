"""One seed of the comparison: a teacher, and three students that differ in their criterion only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from torch import nn

import e2kd
from e2kd.demo.data import Mode, Part, Scenes, make_scenes
from e2kd.demo.measure import Scores, evaluate, predictions
from e2kd.demo.progress import Tracker
from e2kd.demo.train import Criterion, batches, small_net, train

TEACHER_WIDTH, STUDENT_WIDTH = 24, 12


class Arm(Enum):
    """A row of the table: the teacher, or a student by its criterion. The value is its name in the JSON."""

    TEACHER = "teacher"
    CROSS_ENTROPY = "cross_entropy"
    KD = "kd"
    E2KD = "e2kd"


# seconds per image and pass on two cores: for the progress bars alone
COST = {Arm.TEACHER: 5.5e-4, Arm.CROSS_ENTROPY: 2.7e-4, Arm.KD: 4e-4, Arm.E2KD: 4.3e-4}


@dataclass(frozen=True)
class Settings:
    """What every seed does, teacher and students alike in every arm; `weight` is λ, `temperature` τ."""

    part: Part = Part.TEST
    weight: float = 1.0
    temperature: float = 2.0
    teacher_images: int = 4000
    teacher_epochs: int = 8
    student_images: int = 2000
    student_epochs: int = 10
    test_images: int = 2000

    def cost(self, arm: Arm) -> float:
        """Seconds that training the arm takes on two cores, roughly."""
        if arm is Arm.TEACHER:
            return COST[arm] * self.teacher_images * self.teacher_epochs
        return COST[arm] * self.student_images * self.student_epochs


QUICK = Settings(teacher_images=4000, teacher_epochs=5, student_images=2000, student_epochs=6, test_images=1000)


class SeedData(NamedTuple):
    """The four sets of one seed; `reversed_` is the out-of-distribution one."""

    unbiased: Scenes
    biased: Scenes
    aligned: Scenes
    reversed_: Scenes


class SeedRun(NamedTuple):
    """What one seed leaves: scores and seconds per arm, the trained nets, and the data."""

    seed: int
    scores: dict[Arm, Scores]
    seconds: dict[Arm, float]
    nets: dict[Arm, nn.Module]
    data: SeedData


def make_data(seed: int, settings: Settings) -> SeedData:
    """The data of a seed: nothing of the train part is in the test sets, which hold the digits of `settings.part`."""
    first = 10 * seed
    return SeedData(
        make_scenes(Part.TRAIN, Mode.RANDOM, settings.teacher_images, first),
        make_scenes(Part.TRAIN, Mode.ALIGNED, settings.student_images, first + 1),
        make_scenes(settings.part, Mode.ALIGNED, settings.test_images, first + 2),
        make_scenes(settings.part, Mode.REVERSED, settings.test_images, first + 3),
    )


def criterion_for(arm: Arm, student: nn.Module, teacher: nn.Module, settings: Settings) -> Criterion:
    """The one line in which the arms differ."""
    if arm is Arm.CROSS_ENTROPY:
        return nn.CrossEntropyLoss()
    weight = settings.weight if arm is Arm.E2KD else 0.0
    return e2kd.E2KDLoss(student, teacher, None, temperature=settings.temperature, weight=weight)


def train_teacher(seed: int, data: SeedData, settings: Settings, tracker: Tracker) -> nn.Module:
    """The teacher: wider, and trained with labels on images whose texture tells nothing."""
    teacher = small_net(TEACHER_WIDTH, seed)
    steps = len(batches(settings.teacher_images, settings.teacher_epochs, seed))
    with tracker.stage(f"seed {seed}: {Arm.TEACHER.value}", steps, settings.cost(Arm.TEACHER)) as advance:
        train(teacher, nn.CrossEntropyLoss(), data.unbiased, settings.teacher_epochs, seed, advance)
    return teacher


def train_student(
    arm: Arm, seed: int, data: SeedData, teacher: nn.Module, settings: Settings, tracker: Tracker
) -> nn.Module:
    """A student. All of one seed start from the same weights and see the same batches in the same order."""
    student = small_net(STUDENT_WIDTH, seed)
    criterion = criterion_for(arm, student, teacher, settings)
    steps = len(batches(settings.student_images, settings.student_epochs, seed))
    with tracker.stage(f"seed {seed}: {arm.value}", steps, settings.cost(arm)) as advance:
        train(student, criterion, data.biased, settings.student_epochs, seed, advance)
    if isinstance(criterion, e2kd.E2KDLoss):
        criterion.remove()
    return student


def run_seed(seed: int, settings: Settings, tracker: Tracker) -> SeedRun:
    """Trains the four nets of a seed and measures them."""
    data = make_data(seed, settings)
    nets: dict[Arm, nn.Module] = {}
    seconds: dict[Arm, float] = {}
    for arm in Arm:
        start = time.perf_counter()
        if arm is Arm.TEACHER:
            nets[arm] = train_teacher(seed, data, settings, tracker)
        else:
            nets[arm] = train_student(arm, seed, data, nets[Arm.TEACHER], settings, tracker)
        seconds[arm] = time.perf_counter() - start
    classes = predictions(nets[Arm.TEACHER], data.reversed_.images)
    scores = {arm: evaluate(net, data.aligned, data.reversed_, classes) for arm, net in nets.items()}
    return SeedRun(seed, scores, seconds, nets, data)
