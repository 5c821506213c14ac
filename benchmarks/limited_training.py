"""One student of the limited-data study: its images, its criterion, its training, its measures."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

import e2kd
from benchmarks.cifar import NORMALIZATION
from benchmarks.cifar_data import Images, few, orders, places
from benchmarks.cifar_families import BCOS, Family, predictions
from benchmarks.paired import Case, Row
from e2kd.baselines import METHODS, Indexed
from e2kd.metrics import ShiftEquivariance

BATCH = 50
SHIFTS, SHIFTED_PER_CLASS = range(9), 20  # pixels to the right; images of each class
BASIC = {
    "cross_entropy": "cross-entropy, no teacher", "kd": "KD", "e2kd": "e²KD", "frozen_kd": "frozen KD",
    "frozen_e2kd": "frozen e²KD",
}  # fmt: skip
RIVALS = {name.lower(): method for name, method in METHODS.items()}  # with KD, but for DKD, which is in its place
SPARING = {
    **{f"fraction_{n}": {"fraction": 1 / n} for n in (2, 4, 8)},
    **{f"every_{n}": {"every": n} for n in (2, 4, 8)},
}
SIGNED: dict[str, Any] = {"classes": "all", "explainer": e2kd.CAM()}
EVERY_CLASS = {"e2kd_all": "e²KD of all classes, CAM", "frozen_e2kd_all": "frozen e²KD of all classes, CAM"}
DRAWN = {f"e2kd_{n}_of_all": {**SIGNED, "max_classes": n} for n in (2, 5)}
UNDER_ALL = {"at": 1.0, "fitnets": 1.0, "afd": 5.0, "reviewkd": 25.0, "overhaul": 25.0}  # times a rival's own weight
TOGETHER = {f"{name}_e2kd_all": f"{RIVALS[name].__name__} + {EVERY_CLASS['e2kd_all']}" for name in UNDER_ALL}
LABELLED = {  # with a label loss too, as in most trainers; what they are without
    **{f"{arm}_labels": arm for arm in ("kd", "e2kd", "e2kd_all")},
    "one_line": "e2kd",  # the README's first line, for λ = τ = 1
}
SIGNED_ARMS = (*EVERY_CLASS, *TOGETHER, *(arm for arm, without in LABELLED.items() if without in EVERY_CLASS))
STRETCHES = {"stretch_20_50": (0.2, 0.5)}  # of the training: e²KD there, KD elsewhere
ARMS = (
    BASIC
    | {arm: method.__name__ for arm, method in RIVALS.items()}
    | {"crd_e2kd": "CRD + e²KD"}
    | EVERY_CLASS
    | TOGETHER
    | {arm: f"{EVERY_CLASS['e2kd_all']}, {options['max_classes']} drawn" for arm, options in DRAWN.items()}
    | {arm: f"{(BASIC | EVERY_CLASS)[without]} + labels" for arm, without in LABELLED.items()}
    | {"one_line": "e²KD + labels, defaults"}
    | {arm: f"e²KD, {name}={value:g}" for arm, options in SPARING.items() for name, value in options.items()}
    | {arm: f"e²KD from {start:.0%} to {stop:.0%}" for arm, (start, stop) in STRETCHES.items()}
)
ON_TOP = {  # the rival under e²KD, and how many times its own weight
    "crd_e2kd": ("crd", 1.0),
    **{f"{name}_e2kd_all": (name, multiple) for name, multiple in UNDER_ALL.items()},
}
UNTAUGHT = ("cross_entropy", "unbiased")  # arms without a teacher
INDEXED = ("crd", "crd_e2kd")  # need to know which samples they see
FROZEN = ("frozen_kd", "frozen_e2kd", "frozen_e2kd_all")
EXPLAINED = (
    "e2kd", "frozen_e2kd", *EVERY_CLASS, *DRAWN, *ON_TOP, *SPARING, *STRETCHES,
    *(arm for arm, without in LABELLED.items() if without != "kd"),
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    """The teacher, what students may draw their images from, and what they are measured on."""

    family: Family
    teacher: nn.Module
    pool: Images
    measured: dict[str, Images]
    taught: dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """The budget, the same in every arm."""

    per_class: int = 50
    epochs: int = 50
    teacher_epochs: int = 3
    validation_per_class: int = 200
    test_per_class: int = 500


def criterion_of(
    case: Case, family: Family, student: nn.Module, teacher: nn.Module | e2kd.FrozenTeacher, steps: int
) -> nn.Module:
    """The one line in which the arms differ. A rival's weight is a multiple of its own; steps are the training's."""
    labels = e2kd.bcos.BcosLoss() if family.kind is BCOS else nn.CrossEntropyLoss()
    if case.arm == "cross_entropy":
        return labels
    rival, weight = labels if case.arm in LABELLED else None, case.weight or 0.0
    if case.arm in RIVALS:
        rival = RIVALS[case.arm](student, teacher)
        rival.weight, weight = rival.weight * weight, 0.0
    elif case.arm in ON_TOP:
        name, multiple = ON_TOP[case.arm]
        rival = RIVALS[name](student, teacher)
        rival.weight *= multiple
    assert case.temperature is not None
    return e2kd.E2KDLoss(
        student, teacher, rival,
        temperature=case.temperature, weight=weight, kd_weight=float(case.arm != "dkd"), **settings_of(case.arm, steps),
    )  # fmt: skip


def settings_of(arm: str, steps: int) -> dict[str, Any]:
    """What an arm explains, if that is not the teacher's class in every step of so many.

    >>> settings_of("stretch_20_50", 500), settings_of("every_4", 500), settings_of("kd", 500)
    ({'during': (100, 250)}, {'every': 4}, {})
    """
    if arm in SIGNED_ARMS:
        return dict(SIGNED)
    if arm in STRETCHES:
        start, stop = STRETCHES[arm]
        return {"during": (round(start * steps), round(stop * steps))}
    return dict((SPARING | DRAWN).get(arm, {}))


def lessons_of(data: Data, images: Images, arm: str) -> tuple[e2kd.FrozenTeacher, Tensor, e2kd.Taught]:
    """The frozen teacher of a student's images, their pixels [N, 3, 32, 32], and its lessons for them."""
    explained = SIGNED if arm in FROZEN and arm in EVERY_CLASS else {}
    normalization = None if data.family.kind is BCOS else NORMALIZATION
    pairs = TensorDataset(*images)
    with tempfile.TemporaryDirectory() as folder:
        frozen = e2kd.freeze(data.teacher, pairs, folder, normalization=normalization, progress=False, **explained)
        assert frozen is not None
        return frozen, *default_collate(e2kd.FrozenDataset(pairs, frozen).__getitems__(list(range(len(pairs)))))


def train(case: Case, data: Data, settings: Settings) -> nn.Module:
    """A student of one arm and seed.

    All arms take their images from the same reader and the same augmentation, so that a seed's draws are the same.
    """
    family, frozen_arm = data.family, case.arm in FROZEN
    images = few(data.pool, settings.per_class, case.seed)
    frozen, pixels, lessons = lessons_of(data, images, case.arm)
    torch.manual_seed(case.seed)
    student, augmentation = family.student(), e2kd.JointAugmentation(*family.kind.augmentation())
    plan = list(orders(len(pixels), BATCH, settings.epochs, case.seed))
    with torch.random.fork_rng(devices=[]):  # a rival draws layers of its own; augmentations are drawn as without them
        criterion = criterion_of(case, family, student, frozen if frozen_arm else data.teacher, len(plan))
    teaching = isinstance(criterion, e2kd.E2KDLoss)
    optimizer = family.optimizer(nn.ModuleList([student, criterion]))  # a rival may have parts to train
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=len(plan))
    student.train()
    for batch in plan:
        augmented, taught = augmentation(pixels[batch], e2kd.Taught(*(field[batch] for field in lessons)))
        targets = taught if frozen_arm else Indexed(taught.labels, batch, torch.full_like(batch, len(pixels)))
        loss = criterion(student(family.kind.encode(augmented)), targets if teaching else taught.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if isinstance(criterion, e2kd.E2KDLoss):
        criterion.remove()
    return student.eval()


def measures(case: Case, data: Data, student: nn.Module) -> Row:
    """Accuracy, and agreement with the teacher's top classes, as shares; the curve of Fig. 5 where it is wanted."""
    images = data.measured[case.split]
    found = predictions(data.family.kind, student, images.pixels)
    row: Row = {
        "accuracy": (found == images.labels).double().mean().item(),
        "agreement": (found == data.taught[case.split]).double().mean().item(),
    }
    if data.family.shifted and case.split == "test":
        row["shift"] = shift_curve(data, student)
    return row


def shift_curve(data: Data, model: nn.Module) -> list[float]:
    """Similarity of a model's explanations to its own of shifted images, one value per shift: 200 test images, enlarged
    by a quarter so that crops of 32 pixels have room to move."""
    equivariance = ShiftEquivariance(model, SHIFTS, crop=32)
    chosen = data.measured["test"].some(places(data.measured["test"].labels, 0, SHIFTED_PER_CLASS))
    for pixels in chosen.pixels.split(50):
        larger = F.interpolate(pixels / 255, scale_factor=1.25, mode="bilinear", antialias=True).clamp(0, 1)
        equivariance.update(data.family.kind.encode(larger))
    curve: list[float] = equivariance.curve().tolist()
    return curve
