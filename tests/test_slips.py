"""Slips that are easily made are told of where they are made: when a thing is built, in the words of its options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import cnn
from torch import nn

import e2kd
from e2kd.baselines import AFD, AT, Overhaul, ReviewKD
from e2kd.explainers import KINDS
from e2kd.guidance import GuidanceLoss
from e2kd.transfer import layer_features, read

X = torch.rand(4, 3, 16, 16, dtype=torch.float64)
DATA = torch.utils.data.TensorDataset(X.float(), torch.arange(4))


def monitor(**settings: Any) -> e2kd.TransferMonitor:
    return e2kd.TransferMonitor(cnn(), cnn(8), X, lambda scalars, step: None, **settings)


@pytest.mark.parametrize("option", ["layers", "teacher_layers"])
@pytest.mark.parametrize("rival", [AFD, AT, Overhaul, ReviewKD])
def test_one_name_is_no_list_of_layers(rival: Any, option: str) -> None:
    with pytest.raises(TypeError, match=rf"Expected {option} to be a list .* Pass {option}=\['1'\]"):
        rival(cnn(), "a timm name that is never asked for", **{option: "1"})


@pytest.mark.parametrize(
    "call",
    [
        lambda: e2kd.unicam(cnn(), cnn(8), X, layers="1"),
        lambda: layer_features(cnn(), cnn(8), X, layers="1"),
        lambda: read(cnn(), X, "1"),
        lambda: monitor(layers="1"),
    ],
    ids=["unicam", "layer_features", "read", "monitor"],
)
def test_one_name_is_no_list_of_layers_to_look_at(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"Expected layers to be a list of names, but got '1'\. Pass layers=\['1'\]"):
        call()


def test_one_name_is_no_list_in_a_method_of_ones_own() -> None:
    class Own(AT):
        def __init__(self, student: nn.Module, teacher: nn.Module, layers: Any) -> None:
            super(AT, self).__init__(student, teacher, None, 1.0, lambda pair: pair.stages(layers, None))

    with pytest.raises(TypeError, match=r"Pass layers=\['1'\]"):
        Own(cnn(), cnn(8), "1")


@pytest.mark.parametrize("wrong", [e2kd.GradCAM, "gradcam", e2kd.explain])
@pytest.mark.parametrize(
    "call",
    [
        lambda wrong, folder: GuidanceLoss(cnn(), nn.CrossEntropyLoss(), explainer=wrong),
        lambda wrong, folder: monitor(explainer=wrong),
        lambda wrong, folder: e2kd.freeze(cnn().float(), DATA, folder / "cache", explainer=wrong, progress=False),
    ],
    ids=["guidance", "monitor", "freeze"],
)
def test_what_is_no_explainer_is_refused(call: Callable[[Any, Path], object], wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Expected explainer to be an object with a layer"):
        call(wrong, tmp_path)
    assert not list(tmp_path.iterdir())


def test_verify_refuses_what_is_no_explainer(tmp_path: Path) -> None:
    frozen = e2kd.freeze(cnn().float(), DATA, tmp_path, progress=False)
    assert frozen is not None
    with pytest.raises(TypeError, match="Expected explainer to be an object with a layer"):
        frozen.verify(cnn().float(), DATA, explainer=e2kd.GradCAM, augmentations={})  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [e2kd.KDLoss(), e2kd.MultiLabelKDLoss()])
def test_guidance_is_around_a_loss_of_the_task(wrong: nn.Module) -> None:
    with pytest.raises(TypeError, match="which compares logits with a teacher's"):
        GuidanceLoss(cnn(), wrong)


def test_the_order_that_is_told_is_that_of_the_criterion() -> None:
    with pytest.raises(TypeError, match=r"Expected the model to be a network.* The order is model, criterion\."):
        GuidanceLoss(nn.CrossEntropyLoss(), cnn())
    with pytest.raises(TypeError, match=r"The order is student, teacher, criterion\."):
        e2kd.E2KDLoss(nn.CrossEntropyLoss(), cnn(), cnn(8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: e2kd.InputGradient("conv1"), TypeError, r"reads no layer, but got layer='conv1'.*GradCAM\('conv1'\)"),
        (lambda: e2kd.BcosWeights("layer4"), TypeError, "Expected resolution .* got 'layer4'. BcosWeights reads"),
        (lambda: e2kd.BcosContributions(("a", 2)), TypeError, "Expected resolution"),
        (lambda: e2kd.BcosContributions(7.5), TypeError, "Expected resolution"),
        (lambda: e2kd.BcosContributions(0), ValueError, "1 or more"),
        (lambda: e2kd.BcosWeights((7, 7, 7)), ValueError, "1 or more"),
    ],
)
def test_a_layer_of_what_reads_images_is_refused(make: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()


def test_explainers_print_as_caches_know_them() -> None:
    """`repr` is part of a cache's identity: another one would ask users to freeze again."""
    assert [repr(kind()) for kind in KINDS] == [
        "GradCAM(layer=None)",
        "CAM(layer=None)",
        "HiResCAM(layer=None)",
        "LayerCAM(layer=None)",
        "InputGradient(layer=None)",
        "BcosWeights(resolution=None, passes=None)",
        "BcosContributions(resolution=14, passes=None)",
    ]
    assert repr(e2kd.GradCAM("layer4")) == "GradCAM(layer='layer4')"
    assert repr(e2kd.BcosWeights((28, 28), "shared")) == "BcosWeights(resolution=(28, 28), passes='shared')"
    assert repr(e2kd.BcosContributions(np.int64(7))) == f"BcosContributions(resolution={np.int64(7)!r}, passes=None)"


CRITERIA: list[Any] = [e2kd.E2KDLoss, AT, ReviewKD]


@pytest.mark.parametrize("kind", CRITERIA)
@pytest.mark.parametrize(
    ("example", "error", "told"),
    [
        ("photo.jpg", TypeError, r"Expected example to be images \[B, C, H, W\], but got str"),
        (X[0], ValueError, r"Expected example to be a batch of images \[B, C, H, W\], but got \[3, 16, 16\]"),
        (X[:0], ValueError, r"a batch of images .* got \[0, 3, 16, 16\]"),
        (X[:, :1], ValueError, r"The student Sequential can't take images \[2, 1, 16, 16\]: .* through example="),
    ],
)
def test_what_is_no_example_of_images_is_refused(kind: Any, example: Any, error: type[Exception], told: str) -> None:
    student = cnn()
    with pytest.raises(error, match=told):
        kind(student, cnn(8), nn.CrossEntropyLoss(), example=example)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


@pytest.mark.parametrize("kind", CRITERIA)
def test_an_example_may_be_of_bytes(kind: Any) -> None:
    class Bytes(nn.Module):
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.inner = cnn(width).float()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(images / 255)
            return logits

    student, images = Bytes(), torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    criterion = kind(student, Bytes(8), nn.CrossEntropyLoss(), example=images)
    criterion(student(images), torch.arange(4) % 2).backward()
    assert criterion.parts["loss"].isfinite()


def test_an_example_that_the_teacher_refuses_is_told_of() -> None:
    gray = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"The teacher Sequential can't take images \[2, 3, 16, 16\]: .*teacher_size="):
        AT(cnn(), gray.double(), nn.CrossEntropyLoss(), example=X)


@pytest.mark.parametrize("kind", CRITERIA)
def test_an_example_may_be_of_another_precision(kind: Any) -> None:
    student = cnn().float()
    criterion = kind(student, cnn(8).float(), nn.CrossEntropyLoss(), example=X)
    criterion(student(X.float()), torch.arange(4) % 2).backward()
    assert criterion.parts["loss"].isfinite()
