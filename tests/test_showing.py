"""Criteria print with their settings."""

from __future__ import annotations

from collections.abc import Callable

import kornia.augmentation as K
import pytest
import torch
from nets import cnn
from torch import Tensor, nn

import e2kd
from e2kd.baselines import AFD, AT, CATKD, CRD, DKD, FitNets, Overhaul, ReviewKD
from e2kd.bcos import BcosLoss
from e2kd.guidance import GuidanceLoss, l1_loss

PLAIN: dict[str, Callable[[], nn.Module]] = {
    "KDLoss(temperature=2.0, reduction='none')": lambda: e2kd.KDLoss(2.0, reduction="none"),
    "MultiLabelKDLoss(reduction='mean')": e2kd.MultiLabelKDLoss,
    "ExplanationLoss(similarity=cosine, size=(8, 8), reduction='mean')": lambda: e2kd.ExplanationLoss(size=(8, 8)),
    "BcosLoss(off_label=0.1)": lambda: BcosLoss(0.1),
    "GuidanceLoss(\n  weight=2, loss=l1_loss, explainer=GradCAM(layer='1')\n  (criterion): CrossEntropyLoss()\n)": (
        lambda: GuidanceLoss(cnn(), nn.CrossEntropyLoss(), weight=2, loss=l1_loss, explainer=e2kd.GradCAM("1"))
    ),
}


@pytest.mark.parametrize("text", PLAIN)
def test_losses_print_with_their_settings(text: str) -> None:
    assert repr(PLAIN[text]()) == text


def test_an_augmentation_prints_the_size_of_its_maps() -> None:
    assert "size=(7, 7)\n" in repr(e2kd.JointAugmentation(K.RandomHorizontalFlip(), size=(7, 7)))


def test_the_criterion_prints_what_is_not_usual() -> None:
    usual = "weight=1.0, kd_weight=1.0, task_weight=0.0, temperature=1.0, classes='teacher', "
    usual += "explainer=GradCAM(layer=None), fraction=1.0, every=1"
    assert repr(e2kd.E2KDLoss(cnn(), cnn(8))) == f"E2KDLoss({usual})"
    changed = e2kd.E2KDLoss(
        cnn(), cnn(8), resize="image", max_classes=3, during=(0, 9), teacher_explainer=e2kd.CAM("1"), teacher_size=16
    )
    told = "max_classes=3, during=(0, 9), resize='image', teacher_explainer=CAM(layer='1'), teacher_size=16"
    assert repr(changed) == f"E2KDLoss({usual}, {told})"


@pytest.mark.parametrize(
    ("rival", "own"),
    [
        (AFD, "width=128, layers="),
        (AT, "power=2.0, layers=('1', '3'), teacher_layers=('1', '3')"),
        (CATKD, "resolution=2, normalize=False, layers="),
        (CRD, "negatives=16384, temperature=0.07, momentum=0.5, width=128, layers=('before 6'), "),
        (DKD, "alpha=1.0, beta=8.0, temperature=4.0"),
        (FitNets, "layers="),
        (Overhaul, "layers="),
        (ReviewKD, "layers="),
    ],
)
def test_rivals_print_with_their_settings(rival: type[nn.Module], own: str) -> None:
    text = rival(cnn(), cnn(8), weight=3.0, warmup=5).extra_repr()
    assert text.startswith(f"weight=3.0, warmup=5, {own}")


def test_values_on_a_device_are_not_waited_for() -> None:
    class Scaled:
        layer = None

        def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
            return features * gradient

        def __repr__(self) -> str:
            raise AssertionError("it may read a tensor")

    criterion = e2kd.E2KDLoss(cnn(), cnn(8), explainer=Scaled())
    criterion.weight = torch.ones((), device="meta")
    assert "weight=tensor []" in repr(criterion)
    assert "explainer=Scaled" in repr(criterion)
