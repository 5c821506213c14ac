"""Criteria inside of one another, and what users plug into them: one teacher, every term, or a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import e2kd
from e2kd.baselines import AT, CATKD, CRD, DKD, FitNets, IndexedDataset, Overhaul
from e2kd.baselines.decoupled import dkd_loss
from e2kd.baselines.overhaul import Margin
from e2kd.guidance import GuidanceLoss
from e2kd.trainers.averages import Averages

CLASSES = 5
TOLD: dict[str, Any] = {"input_normalization": ((0.5,), (0.5,)), "teacher_normalization": ((0.1,), (0.2,))}


def net(width: int = 8, seed: int = 0, classes: int = CLASSES) -> nn.Sequential:
    """No map of it is zero everywhere: no weight of its classifier is below 0."""
    torch.manual_seed(seed)
    classifier = nn.Linear(2 * width, classes)
    classifier.weight.data.abs_()
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier,
    )  # fmt: skip


X, Y = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(4)


@pytest.mark.parametrize("told", ["inner", "outer", "both"])
@pytest.mark.parametrize("outermost", ["e2kd", "rival"])
def test_what_one_criterion_was_told_of_the_images_holds_for_all(outermost: str, told: str) -> None:
    student, teacher = net(), net(12, 1)
    seen: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    kinds = (e2kd.E2KDLoss, AT) if outermost == "e2kd" else (AT, e2kd.E2KDLoss)
    settings = [TOLD if told in (which, "both") else {} for which in ("outer", "inner")]
    criterion = kinds[0](
        student, teacher, kinds[1](student, teacher, nn.CrossEntropyLoss(), **settings[1]), **settings[0]
    )
    criterion(student(X), Y)  # layers that were found on noise are looked for again on the first images
    seen.clear()
    criterion(student(X), Y)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], (X * 0.5 + 0.5 - 0.1) / 0.2)


def test_one_logit_is_distilled_as_a_yes_or_no_or_refused() -> None:
    student, teacher = net(classes=1), net(12, 1, classes=1)
    targets = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    plain = e2kd.E2KDLoss(student, teacher, nn.BCEWithLogitsLoss())
    with pytest.raises(ValueError, match=r"two classes or more.*MultiLabelKDLoss"):
        plain(student(X), targets)
    logits = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="two classes or more"):
        dkd_loss(logits, logits, torch.zeros(4, dtype=torch.long))
    criterion = e2kd.E2KDLoss(student, teacher, nn.BCEWithLogitsLoss(), distillation=e2kd.MultiLabelKDLoss())
    criterion(student(X), targets)
    assert float(criterion.parts["kd"]) > 0


@pytest.mark.parametrize("rival", [AT, FitNets, Overhaul])
def test_features_that_are_frozen_are_warned_of(rival: Any) -> None:
    student = net()
    criterion = rival(student, net(12, 1), nn.CrossEntropyLoss())
    criterion(student(X), Y)
    student[:4].requires_grad_(False)
    with pytest.warns(e2kd.NoEffectWarning, match=f"No feature that {rival.__name__} compares has a graph"):
        criterion(student(X), Y)


@dataclass(frozen=True)
class Own:
    """An explainer whose maps are changed by a function."""

    change: Any
    layer: str | None = None

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        maps: Tensor = self.change((features * gradient).sum(1, keepdim=True))
        return maps


def test_maps_without_a_graph_are_warned_of() -> None:
    student = net()
    criterion = e2kd.E2KDLoss(student, net(12, 1), nn.CrossEntropyLoss(), explainer=Own(torch.detach))
    with pytest.warns(e2kd.NoEffectWarning, match="explanations has no graph"):
        criterion(student(X), Y)


def test_maps_of_other_samples_are_refused() -> None:
    student = net()
    criterion = e2kd.E2KDLoss(student, net(12, 1), explainer=Own(lambda maps: maps[:1]))
    with pytest.raises(ValueError, match="maps to be of 4 samples, but got 1"):
        criterion(student(X))


def test_guidance_inside_of_a_criterion_is_one_of_the_family() -> None:
    student, teacher, masks = net(), net(12, 1), torch.ones(4, 32, 32)
    masks[:, :, 16:] = 0
    inner = CRD(student, teacher, nn.CrossEntropyLoss())
    criterion = e2kd.E2KDLoss(student, teacher, GuidanceLoss(student, inner))
    averages = Averages(criterion)
    dataset = IndexedDataset([(x, int(y)) for x, y in zip(X, Y, strict=True)])
    _, targets = torch.utils.data.default_collate([dataset[i] for i in range(4)])
    criterion(student(X), targets, masks=masks).backward()
    assert {"kd", "explanation", "guidance", "crd", "task"} <= set(criterion.parts)
    assert {"guidance", "crd"} <= set(averages.names)
    averages.remove()
    criterion.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_a_batch_without_masks_has_no_guidance_to_report() -> None:
    student, teacher = net(), net(12, 1)
    criterion = e2kd.E2KDLoss(student, teacher, GuidanceLoss(student, nn.CrossEntropyLoss()))
    averages = Averages(criterion)
    criterion(student(X), Y, masks=torch.ones(4, 32, 32))
    guided = float(criterion.parts["guidance"])
    criterion(student(X), Y)
    assert "guidance" not in criterion.parts
    assert averages.take()["guidance"] == pytest.approx(guided)


@pytest.mark.parametrize("bare", [True, False])
def test_zero_maps_of_guidance_are_in_the_logs_too(bare: bool) -> None:
    student = net()
    inner = GuidanceLoss(student, nn.CrossEntropyLoss(), explainer=Own(lambda maps: maps * 0))
    criterion: Any = inner if bare else AT(student, net(12, 1), inner, layers=["1"])
    averages = Averages(criterion)
    for _ in range(2):
        criterion(student(X), Y, masks=torch.ones(4, 32, 32))
    assert averages.take()["zero_maps"] == 4


@pytest.mark.parametrize("kind", ["e2kd", "at", "guidance"])
def test_part_names_are_those_of_the_parts(kind: str) -> None:
    student, teacher, task = net(), net(12, 1), nn.CrossEntropyLoss()
    made = {
        "e2kd": lambda: e2kd.E2KDLoss(student, teacher, task),
        "at": lambda: AT(student, teacher, task),
        "guidance": lambda: GuidanceLoss(student, task),
    }
    criterion: Any = made[kind]()
    criterion(student(X), Y, *([torch.ones(4, 32, 32)] if kind == "guidance" else []))
    assert {*criterion.part_names, "loss"} == set(criterion.parts)


def test_what_nobody_inside_takes_is_refused_in_evaluation_too() -> None:
    student, teacher = net(), net(12, 1)
    criterion = e2kd.E2KDLoss(student, teacher, FitNets(student, teacher), distillation=e2kd.MultiLabelKDLoss())
    outputs = student(X).detach()
    with pytest.raises(TypeError, match="no criterion that could take sample_weight"):
        criterion(outputs, F.one_hot(Y, CLASSES).float(), sample_weight=torch.ones(4))


def test_a_loss_of_guidance_returns_a_value_for_each_sample() -> None:
    student = net()
    for loss in (lambda maps, masks: maps.mean((2, 3)), lambda maps, masks: maps.mean()):
        criterion = GuidanceLoss(student, nn.CrossEntropyLoss(), loss=loss)
        with pytest.raises(ValueError, match=r"one value per sample, \[4\]"):
            criterion(student(X), Y, torch.ones(4, 32, 32))


def test_smoothed_labels_have_no_positives() -> None:
    student = net()
    criterion = e2kd.E2KDLoss(student, net(12, 1), nn.BCEWithLogitsLoss(), classes="positives")
    hot = F.one_hot(Y, CLASSES).float()
    assert criterion(student(X), hot).isfinite()
    outputs = student(X)
    with pytest.raises(ValueError, match="between 0 and 1"):
        criterion(outputs, 0.9 * hot + 0.02)


def test_the_validation_loss_of_several_labels_is_the_same_around_a_rival() -> None:
    student, teacher, hot = net(), net(12, 1), F.one_hot(Y, CLASSES).float()
    criterion = e2kd.E2KDLoss(student, teacher, FitNets(student, teacher), distillation=e2kd.MultiLabelKDLoss())
    with torch.no_grad():
        torch.testing.assert_close(criterion(student(X), hot), F.binary_cross_entropy_with_logits(student(X), hot))


def test_a_classifier_that_was_replaced_is_refused_by_cat_kd() -> None:
    student = net()
    criterion = CATKD(student, net(12, 1), nn.CrossEntropyLoss())
    student[6] = nn.Sequential(nn.Linear(16, CLASSES))
    outputs = student(X)
    with pytest.raises(RuntimeError, match="replaced or adapted since the criterion was built"):
        criterion(outputs, Y)


def test_labels_outside_of_the_classes_are_refused_by_dkd() -> None:
    student = net()
    criterion = DKD(student, net(12, 1), nn.CrossEntropyLoss(ignore_index=9))
    outputs = student(X)
    with pytest.raises(ValueError, match="labels from 0 to 4"):
        criterion(outputs, torch.tensor([0, 1, 2, 9]))


def test_margins_are_counted_in_double_whatever_they_were_cast_to() -> None:
    margin, x = Margin(2).half(), -1000 * torch.ones(4, 2, 8, 8)
    for _ in range(300):
        found = margin(x)
    torch.testing.assert_close(found, x)


def test_negative_weights_of_classes_are_no_dead_maps(recwarn: pytest.WarningsRecorder) -> None:
    student = net()

    def choose(logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.zeros(4, 1, dtype=torch.long), -torch.ones(4, 1)

    e2kd.E2KDLoss(student, net(12, 1), classes=choose)(student(X))
    assert not [w for w in recwarn if issubclass(w.category, e2kd.NoEffectWarning)]
