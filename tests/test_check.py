"""What `check` says of a layer that is not the only way from the images to the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from nets import cnn as small
from nets import pair
from reference import CLASSES, cnn
from test_kernels import SIDE, crossvit
from torch import Tensor, nn

import e2kd


class Skips(nn.Module):
    """A residual branch, whose shortcut goes past what is in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.outer = (nn.Conv2d(c, 8, 3, 2 if c == 3 else 1, 1) for c in (3, 8, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return self.head((x + self.outer(self.inner(x).relu())).relu().mean((2, 3)))


CASES = {"two branches": (crossvit, None, "norm.0"), "shortcut": (Skips, "inner", "stem")}


def depends_on(model: nn.Module, name: str, images: Tensor, *, held: str) -> bool:
    """Whether the logits depend on what one module returns while what another returns is held."""
    kept: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out: kept.append(out)),
        model.get_submodule(held).register_forward_hook(lambda m, a, out: out.detach()),
    ]
    (gradient,) = torch.autograd.grad(model(images).square().sum(), kept[0])
    for handle in handles:
        handle.remove()
    return bool(gradient.any())


@pytest.mark.parametrize("name", CASES)
def test_way_past_the_layer_is_named_and_exists(name: str) -> None:
    build, layer, beside = CASES[name]
    student, images = build(), torch.randn(4, 3, SIDE, SIDE)
    report = e2kd.check(student, cnn(), images, explainer=e2kd.GradCAM(layer), teacher_explainer=e2kd.GradCAM())
    (note,) = (note for note in report.notes if note.startswith("*"))
    assert f"past this layer, for instance through {beside!r}" in note
    assert report.student.layer.endswith(" *")
    assert depends_on(student.eval(), beside, images, held=report.student.layer.removesuffix(" *"))


def test_networks_whose_layers_share_an_activation_pass() -> None:
    report = e2kd.check(*pair("shared"), torch.rand(3, 3, 16, 16).double())
    assert report.ok, report.problems
    assert (report.way, report.student.layer, report.student.grid) == ("replay", "act", (4, 4))


def test_layer_is_the_one_of_small_images_in_a_training_without_example() -> None:
    torch.manual_seed(0)
    student, teacher = (torchvision.models.resnet18(num_classes=CLASSES) for _ in range(2))
    images = torch.randn(4, 3, 32, 32)
    report = e2kd.check(student, teacher, images)
    assert report.ok, report.problems
    assert (report.student.layer, report.student.grid) == ("layer3", (2, 2))
    (note,) = (note for note in report.notes if "noise" in note)
    assert "is layer 'layer4'" in note
    assert "example=images" in note
    criterion = e2kd.E2KDLoss(student, teacher)
    criterion(student(images)).backward()
    assert criterion.explained.place == "layer 'layer3'"


class Narrow(nn.Module):
    """Indexes a dimension that its features may not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 8), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        return self.head(features.mean((2, 3)) + features[:, :, 11].mean(2))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_images_that_a_model_indexes_out_of_are_a_problem_and_no_error(role: str) -> None:
    models = {"student": cnn(), "teacher": cnn()} | {role: Narrow()}
    report = e2kd.check(models["student"], models["teacher"], torch.randn(4, 3, 64, 64))
    assert not report.ok
    assert "out of" in str(report)


def test_layer_that_is_the_only_way_has_no_such_note() -> None:
    report = e2kd.check(cnn(), cnn(), torch.randn(4, 3, SIDE, SIDE))
    assert not [note for note in report.notes if note.startswith("*")]
    assert not report.student.layer.endswith("*")


def test_all_classes_are_tried_and_counted() -> None:
    """For next to nothing where the head pools and is linear; a second derivative for each where it is not."""
    costs = {}
    for name in ("closed", "class_token"):
        student, teacher = pair(name)
        images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
        tried: list[dict[str, Any]] = [{}, {"classes": "all"}, {"classes": "all", "max_classes": 1}]
        reports = [e2kd.check(student, teacher, images, **classes) for classes in tried]
        assert all(report.ok for report in reports), reports
        costs[name] = [report.cost for report in reports]
    assert costs["closed"][1] == pytest.approx(costs["closed"][0], rel=0.05)
    assert costs["class_token"][1] > 1.5 * costs["class_token"][0]
    assert costs["class_token"][2] == pytest.approx(costs["class_token"][0], rel=0.01)


def test_a_softmax_at_the_end_is_a_problem_and_other_statistics_a_note() -> None:
    student, teacher = pair("closed")
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    report = e2kd.check(student, nn.Sequential(teacher, nn.Softmax(1)), images)
    assert any("teacher's logits look like probabilities" in problem for problem in report.problems)
    for model, mean in ((student, 0.5), (teacher, 0.4)):
        model.pretrained_cfg = {"mean": (mean,) * 3, "std": (0.5,) * 3}
    said = {"input_normalization": ((0.5,) * 3, (0.5,) * 3)}
    noted = [e2kd.check(student, teacher, images, **settings).notes for settings in ({}, said)]
    assert ["normalised by (mean, std)" in "".join(notes) for notes in noted] == [True, False]


def test_networks_of_one_logit_are_a_problem_in_words() -> None:
    """A softmax of one logit is 1, whatever the student says."""
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    report = e2kd.check(small(classes=1, seed=0), small(classes=1, seed=1), images)
    assert any("MultiLabelKDLoss" in problem for problem in report.problems)
    assert "PROBLEM" in str(report)


def test_what_can_not_be_counted_is_no_problem() -> None:
    """torch's counter fails where a module is given a part of a parameter without a graph."""
    pit = pytest.importorskip("timm.models.pit")
    sizes: dict[str, Any] = {"base_dims": (8, 8), "depth": (1, 1), "heads": (1, 2), "mlp_ratio": 2, "num_classes": 4}
    teacher = pit.PoolingVisionTransformer(32, 4, 4, **sizes)
    report = e2kd.check(pair("closed")[0].float(), teacher, torch.rand(4, 3, 32, 32))
    assert report.ok, report
    assert report.cost != report.cost
    assert "can't be counted" in str(report)


def test_classes_that_ask_for_targets_are_a_problem_in_words() -> None:
    student, teacher = pair("closed")
    report = e2kd.check(student, teacher, torch.rand(4, 3, 16, 16, dtype=torch.float64), classes="labels")
    assert any("needs targets" in problem for problem in report.problems)


def test_the_teacher_is_asked_as_it_will_be_in_training() -> None:
    """Its own normalisation and size make other maps, which are those that the criterion compares."""
    student, teacher = pair("closed")
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    settings: dict[str, Any] = {
        "input_normalization": ((0.5,) * 3, (0.5,) * 3),
        "teacher_normalization": ((0.4,) * 3, (0.2,) * 3),
        "teacher_size": 24,
    }
    plain, report = e2kd.check(student, teacher, images), e2kd.check(student, teacher, images, **settings)
    assert (plain.teacher.grid, report.teacher.grid) == ((4, 4), (6, 6))
    assert report.explanation != plain.explanation
    criterion = e2kd.E2KDLoss(student, teacher, **settings)
    criterion(student.train()(images))
    assert report.explanation == pytest.approx(float(criterion.parts["explanation"]), abs=1e-9)


def test_zero_maps_are_those_of_the_classes_that_are_explained() -> None:
    """GradCAM of a class that all cells speak against is zero; that of the top class seldom is. CAM never is."""
    student, teacher = pair("closed")
    with torch.no_grad():
        weight = teacher[-1].weight.abs_()  # type: ignore[index]
        weight[1:] *= -1
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    assert e2kd.check(student, teacher, images).teacher.zero_maps == 0
    report = e2kd.check(student, teacher, images, classes="all")
    assert report.teacher.zero_maps == 0.75
    assert any("75% of the teacher's maps are zero" in problem for problem in report.problems)
    assert e2kd.check(student, teacher, images, classes="all", explainer=e2kd.CAM()).teacher.zero_maps == 0
