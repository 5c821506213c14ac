"""Equality with the papers' own code: fixtures computed by it in float64 (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import e2kd

GOLDEN = Path(__file__).parent / "golden"
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def kd() -> dict[str, Tensor]:
    return load_file(GOLDEN / "kd.safetensors")


@pytest.fixture(scope="module")
def gradcam() -> dict[str, Tensor]:
    return load_file(GOLDEN / "gradcam.safetensors")


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("tau", [1, 2, 5])
def test_kd_loss_and_gradient(kd: dict[str, Tensor], case: str, tau: int) -> None:
    student = kd[f"{case}.student_logits"].clone().requires_grad_()
    loss = e2kd.kd_loss(student, kd[f"{case}.teacher_logits"], temperature=tau)
    loss.backward()
    torch.testing.assert_close(loss.detach(), kd[f"{case}.tau{tau}.loss"], **TIGHT)
    torch.testing.assert_close(student.grad, kd[f"{case}.tau{tau}.grad_student"], **TIGHT)


def test_multilabel_kd_loss_up_to_the_papers_clamp(kd: dict[str, Tensor]) -> None:
    """The papers' code clamps probabilities to [1e-6, 1 - 1e-6]; the fixture's logits stay inside."""
    student, teacher = kd["mld.student_logits"], kd["mld.teacher_logits"]
    assert max(student.abs().max(), teacher.abs().max()) < 13.8
    torch.testing.assert_close(e2kd.multilabel_kd_loss(student, teacher), kd["mld.loss"], **TIGHT)


class PooledHead(nn.Module):
    """Features -> logits as in the fixtures: average pooling and a linear layer, features being the input."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0]).double()
        self.fc.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(self.body(features).mean((2, 3)))


@pytest.mark.parametrize("case", ["same", "diff", "zero"])
class TestGradCAM:
    def test_maps_and_logits_of_explain(self, gradcam: dict[str, Tensor], case: str) -> None:
        for who in ("student", "teacher"):
            head = PooledHead(gradcam[f"{case}.fc_weight_{who}"], gradcam[f"{case}.fc_bias_{who}"])
            features = gradcam[f"{case}.features_{who}"]
            found = e2kd.explain(head, features, gradcam[f"{case}.class"], e2kd.GradCAM("body"))
            size = tuple(gradcam[f"{case}.image_size"].tolist())
            resized = F.interpolate(found.maps, size, mode="bilinear", antialias=True)
            torch.testing.assert_close(found.logits, gradcam[f"{case}.logits_{who}"], **TIGHT)
            torch.testing.assert_close(resized, gradcam[f"{case}.cam_{who}"], **TIGHT)

    @pytest.mark.filterwarnings("ignore::e2kd.NoEffectWarning")
    def test_loss_and_second_order_gradients_of_the_criterion(self, gradcam: dict[str, Tensor], case: str) -> None:
        student, teacher = (
            PooledHead(gradcam[f"{case}.fc_weight_{who}"], gradcam[f"{case}.fc_bias_{who}"])
            for who in ("student", "teacher")
        )
        images = gradcam[f"{case}.features_student"].clone().requires_grad_()
        teacher_features = gradcam[f"{case}.features_teacher"]
        size = tuple(gradcam[f"{case}.image_size"].tolist())
        view = e2kd.explain(teacher, teacher_features, explainer=e2kd.GradCAM("body"))
        assert torch.equal(view.classes, gradcam[f"{case}.class"])

        mine = student_maps(student, images, view.classes)
        values = e2kd.ExplanationLoss(size=size, reduction="none")(mine, view.maps)
        torch.testing.assert_close(values.detach(), gradcam[f"{case}.exp_loss_per_sample"], **TIGHT)
        values.mean().backward()
        torch.testing.assert_close(images.grad, gradcam[f"{case}.grad_features_student"], **TIGHT)
        torch.testing.assert_close(student.fc.weight.grad, gradcam[f"{case}.grad_fc_weight_student"], **TIGHT)


def student_maps(student: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The student's maps by the code the criterion uses."""
    from e2kd.student import StudentExplainer

    explainer = StudentExplainer(student, e2kd.GradCAM("body"), images)
    logits = student(images)
    return explainer.view(explainer.forward_of(logits), logits).explain(e2kd.GradCAM(), classes)


def test_whole_criterion_in_image_resize_mode(gradcam: dict[str, Tensor]) -> None:
    """E2KDLoss(resize="image") on same-size images equals the fixture's loss, up to the image size of the fixture."""
    student, teacher = (
        PooledHead(gradcam[f"same.fc_weight_{who}"][:, :5], gradcam[f"same.fc_bias_{who}"])
        for who in ("student", "teacher")
    )
    images = gradcam["same.features_student"].clone().requires_grad_()
    criterion = e2kd.E2KDLoss(
        student, teacher, explainer=e2kd.GradCAM("body"), resize="image", kd_weight=0.0, example=images
    )
    loss = criterion(student(images))
    found = e2kd.explain(teacher, images, explainer=e2kd.GradCAM("body"))
    mine = e2kd.explain(student, images, found.classes, e2kd.GradCAM("body"))
    expected = 1 - F.cosine_similarity(mine.maps.flatten(1), found.maps.flatten(1)).mean()
    torch.testing.assert_close(loss, expected, **TIGHT)
