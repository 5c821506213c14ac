"""On real photographs with really trained networks: what the one line is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import e2kd
from benchmarks.cifar import ResNet, images, pretrained
from e2kd.cli import main

Shared = Callable[[str], Path]


@pytest.fixture(scope="module")
def photos(shared: Shared) -> tuple[Tensor, Tensor]:
    return images(shared("data/cifar10/test_jpeg.safetensors"), per_class=20)


@pytest.fixture(scope="module")
def teacher(shared: Shared) -> ResNet:
    return pretrained(shared("data/pretrained/cifar_resnet32-d509ac18.safetensors"), blocks=5)


def test_a_trained_teacher_has_live_maps_and_looks_at_different_places(teacher: ResNet, photos) -> None:
    found = e2kd.explain(teacher, photos[0])
    assert (found.classes == photos[1]).float().mean() > 0.7
    assert found.maps.shape == (200, 1, 8, 8)
    assert found.maps.flatten(1).any(1).all()
    peaks = found.maps.flatten(1).argmax(1)
    assert len(peaks.unique()) > 20


def trained(weight: float, teacher: ResNet, photos: Tensor) -> dict[str, float]:
    """Agreement and explanation similarity after a short training from one starting point, on the same batches."""
    torch.manual_seed(0)
    student = ResNet(1)
    criterion = e2kd.E2KDLoss(student, teacher, weight=weight)
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    for step in range(60):
        batch = photos[torch.randperm(len(photos), generator=torch.Generator().manual_seed(step))[:50]]
        optimizer.zero_grad()
        criterion(student(batch)).backward()
        optimizer.step()
    theirs = e2kd.explain(teacher, photos)
    mine = e2kd.explain(student, photos, theirs.classes)
    return {
        "cosine": e2kd.cosine(mine.maps, theirs.maps).mean().item(),
        "agreement": (mine.logits.argmax(1) == theirs.classes).float().mean().item(),
    }


@pytest.mark.filterwarnings("ignore::e2kd.NoEffectWarning")
def test_the_explanation_term_makes_the_student_look_where_the_teacher_looks(teacher: ResNet, photos) -> None:
    kd, full = (trained(weight, teacher, photos[0]) for weight in (0.0, 2.0))
    assert full["cosine"] > kd["cosine"] + 0.1
    assert full["agreement"] > 0.5


def test_check_command_on_a_folder_of_photographs(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    folder = str(shared("data/catsdogs1400/val"))
    arguments = ["check", "--student", "test_vit", "--teacher", "test_resnet", "--num-classes", "2", "--images", folder]
    status = main([*arguments, "--batch", "4"])
    printed = capsys.readouterr().out
    assert "map grid" in printed
    assert "x the FLOPs of a plain KD step" in printed or "PROBLEM" in printed
    assert status == (1 if "PROBLEM" in printed else 0)


def test_check_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    arguments = ["check", "--student", "test_resnet", "--teacher", "test_resnet", "--images", str(tmp_path)]
    assert main(arguments) == 2
    assert "found none" in capsys.readouterr().err
    assert main([*arguments[:-2], "--student-layer", "stage9"]) == 1
    assert "no layer named 'stage9'" in capsys.readouterr().out
