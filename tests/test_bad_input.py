"""Bad input and bad settings: a sentence that says what came and what to do, and nothing changed by the attempt."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import CLASSES, Case, case, cnn, identical, snapshot
from torch import Tensor, nn

import e2kd
from e2kd.baselines import METHODS, dkd_loss
from e2kd.bcos import LogitLayer
from e2kd.guidance import GuidanceLoss

pytestmark = pytest.mark.usefixtures("one_thread")


class Trainer:
    """A student that has been trained for a step, so that gradients and optimizer state exist to be damaged."""

    def __init__(self, made: Case, *, teacher: nn.Module | None = None, **settings: Any) -> None:
        self.student, self.teacher = made.copy(), teacher or made.teacher
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-3)
        nn.functional.cross_entropy(self.student(made.images), made.targets).backward()
        self.optimizer.step()
        self.criterion = e2kd.E2KDLoss(self.student, self.teacher, nn.CrossEntropyLoss(), **settings)

    def step(self, images: Tensor, targets: Any, change: Callable[[Tensor], Any] = lambda outputs: outputs) -> Tensor:
        loss = self.criterion(change(self.student(images)), targets)
        loss.backward()
        return loss.detach()

    @contextmanager
    def refuses(self, kind: type[Exception], *phrases: str) -> Iterator[None]:
        """The block raises a sentence with these phrases and leaves everything bit-identical."""
        holders = (self.student, self.optimizer, self.teacher)
        before, modes = snapshot(*holders), [m.training for m in self.student.modules()]
        self.student.register_forward_hook(lambda *_: before.clear() or before.extend(snapshot(*holders)))
        with pytest.raises(kind) as caught:
            yield
        for phrase in phrases:
            assert re.search(phrase, str(caught.value)), f"{phrase!r} is not in: {caught.value}"
        assert identical(before, snapshot(*holders))
        assert [m.training for m in self.student.modules()] == modes
        assert torch.is_grad_enabled()


@pytest.fixture
def made() -> Case:
    return case("cnn")


def assert_next_step_is_sound(trainer: Trainer, made: Case) -> None:
    """After a refusal the criterion goes on as if nothing had been."""
    loss = trainer.step(made.images, made.targets)
    assert loss.isfinite()
    assert trainer.criterion.parts["explanation"] > 0


# Numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_student_logits_that_are_not_finite_are_refused(made: Case, value: float) -> None:
    trainer = Trainer(made)
    with torch.no_grad():
        kept = trainer.student.fc.bias[2].clone()
        trainer.student.fc.bias[2] = value
    with trainer.refuses(ValueError, "student's logits", "4 values that are nan or infinite", "learning rate"):
        trainer.step(made.images, made.targets)
    with torch.no_grad():
        trainer.student.fc.bias[2] = kept
    assert_next_step_is_sound(trainer, made)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_teacher_logits_that_are_not_finite_are_refused(made: Case, value: float, weight: float) -> None:
    teacher = cnn(5).eval()
    with torch.no_grad():
        teacher.fc.bias[0] = value
    trainer = Trainer(made, teacher=teacher, weight=weight)
    with trainer.refuses(ValueError, "teacher's logits", "nan or infinite"):
        trainer.step(made.images, made.targets)


def test_images_that_are_not_finite_are_refused_and_do_not_spoil_what_was_found_of_the_models() -> None:
    made = case("vit")  # no BatchNorm whose statistics the images themselves would spoil
    trainer = Trainer(made, teacher=copy.deepcopy(made.teacher))
    wanted = Trainer(made).step(made.images, made.targets)
    images = made.images.clone()
    images[1, 0, 3, 4] = float("nan")
    with trainer.refuses(ValueError, "logits hold", "nan or infinite", "look at the images"):
        trainer.step(images, made.targets)
    torch.testing.assert_close(trainer.step(made.images, made.targets), wanted)
    assert trainer.criterion.parts["explanation"] > 0


# Shapes


def test_teacher_of_other_classes_is_refused(made: Case) -> None:
    teacher = cnn(5)
    teacher.reset_classifier(CLASSES + 2)
    trainer = Trainer(made, teacher=teacher.eval())
    with trainer.refuses(ValueError, r"\[4, 7\]", r"\[4, 9\]", "same classes"):
        trainer.step(made.images, made.targets)


@pytest.mark.parametrize("explaining", [True, False])
def test_teacher_of_other_classes_is_refused_whatever_the_weights(made: Case, explaining: bool) -> None:
    teacher = cnn(5)
    teacher.reset_classifier(CLASSES - 2)
    weights = {"weight": float(explaining), "kd_weight": float(not explaining)}
    trainer = Trainer(made, teacher=teacher.eval(), **weights)
    with trainer.refuses(ValueError, r"\[4, 7\]", r"\[4, 5\]", "same classes"):
        trainer.step(made.images, made.targets)


def test_images_of_other_channels_than_the_teacher_are_refused(made: Case) -> None:
    grey = cnn(5, in_chans=1).eval()
    trainer = Trainer(made, teacher=grey)
    with trainer.refuses((ValueError, RuntimeError), "teacher", "channels", r"\[4, 3, 96, 96\]"):
        trainer.step(made.images, made.targets)


def test_images_of_a_size_the_teacher_cannot_take_are_refused(made: Case) -> None:
    flat = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, CLASSES)).eval()
    trainer = Trainer(made, teacher=flat)
    with trainer.refuses((ValueError, RuntimeError), "teacher", r"\[4, 3, 96, 96\]", "teacher_size"):
        trainer.step(made.images, made.targets)


def test_wrong_channels_given_to_the_student_leave_the_criterion_usable(made: Case) -> None:
    trainer = Trainer(made)
    with trainer.refuses(RuntimeError, "channels"):  # torch's own sentence: the student refuses before the loss
        trainer.step(made.images[:, :1], made.targets)
    assert_next_step_is_sound(trainer, made)


def test_forward_that_fails_does_not_lend_its_images_to_the_next_loss(made: Case) -> None:
    trainer = Trainer(made)
    outputs = trainer.student(made.images)
    with pytest.raises(RuntimeError):
        trainer.student(made.images[:, :1])
    wanted = Trainer(made).step(made.images, made.targets)
    torch.testing.assert_close(trainer.criterion(outputs, made.targets).detach(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_empty_batch_is_refused(name: str) -> None:
    made = case(name)
    for module in made.student.modules():  # an empty batch has no statistics
        module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    trainer = Trainer(made)
    with trainer.refuses(ValueError, "at least one image", "empty", "Skip empty batches"):
        trainer.step(made.images[:0], made.targets[:0])
    assert_next_step_is_sound(trainer, made)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda outputs: outputs[:2], r"images \[4, 3, 96, 96\]"),
        (lambda outputs: torch.cat([outputs, outputs]), r"logits \[8, 7\]"),
    ],
    ids=["part", "doubled"],
)
def test_part_of_the_output_is_refused(made: Case, change: Any, phrase: str) -> None:
    trainer = Trainer(made)
    with trainer.refuses(ValueError, phrase, "whole output of one forward"):
        trainer.step(made.images, made.targets.repeat(2)[: len(change(made.images))], change)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda outputs: outputs[None], r"tensor \[1, 4, 7\]"),
        (lambda outputs: {"features": outputs[None]}, "dict with features"),
        (lambda outputs: None, "NoneType"),
    ],
    ids=["3d", "dict", "none"],
)
def test_outputs_without_logits_are_refused(made: Case, change: Any, phrase: str) -> None:
    trainer = Trainer(made)
    with trainer.refuses(TypeError, "Expected logits", phrase, "as it came from the model"):
        trainer.step(made.images, made.targets, change)


# Calls


def test_criterion_without_a_forward_is_refused(made: Case) -> None:
    trainer = Trainer(made)
    logits = torch.randn(4, CLASSES, requires_grad=True)
    with trainer.refuses(RuntimeError, "without a training forward", r"criterion\(student\(images\), targets\)"):
        trainer.criterion(logits, made.targets)


def test_second_call_for_one_forward_is_refused(made: Case) -> None:
    trainer = Trainer(made)
    outputs = trainer.student(made.images)
    trainer.criterion(outputs, made.targets)
    with trainer.refuses(RuntimeError, "once per\\s+forward"):
        trainer.criterion(outputs, made.targets)


def test_logits_of_another_model_are_refused(made: Case) -> None:
    trainer = Trainer(made)
    other = made.copy()
    trainer.student(made.images)
    with trainer.refuses(RuntimeError, "without a training forward", "build the criterion with the module it trains"):
        trainer.criterion(other(made.images), made.targets)


def test_changed_logits_are_refused_or_exact(made: Case) -> None:
    trainer = Trainer(made, task_weight=0.0, kd_weight=0.0)
    outputs = trainer.student(made.images)
    loss = trainer.criterion(outputs * 2, made.targets)  # still this forward: by its graph the map is the doubled one
    wanted = Trainer(made, task_weight=0.0, kd_weight=0.0).step(made.images, made.targets)
    torch.testing.assert_close(loss.detach(), wanted)  # cosine does not see the scale


def test_logits_of_an_earlier_forward_are_refused_once_forgotten(made: Case) -> None:
    trainer = Trainer(made)
    outputs = trainer.student(made.images)
    trainer.criterion(outputs, made.targets)
    trainer.student(made.images)
    with trainer.refuses(RuntimeError, "without a training forward"):
        trainer.criterion(outputs, made.targets)


def test_loss_after_remove_is_refused(made: Case) -> None:
    trainer = Trainer(made)
    outputs = trainer.student(made.images)
    trainer.criterion.remove()
    with trainer.refuses(RuntimeError, "without a training forward"):
        trainer.criterion(outputs, made.targets)


# Targets


def soft(made: Case) -> Tensor:
    return torch.full((len(made.targets), CLASSES), 1 / CLASSES)


def test_soft_labels_where_indices_are_needed_are_refused(made: Case) -> None:
    trainer = Trainer(made, classes="labels")
    with trainer.refuses(ValueError, r"class indices \[4\]", r"\[4, 7\] of torch.float32", 'classes="teacher"'):
        trainer.step(made.images, soft(made))
    assert_next_step_is_sound(trainer, made)


def test_labels_that_did_not_come_are_refused(made: Case) -> None:
    trainer = Trainer(made, classes="labels", task_weight=0.0)
    with trainer.refuses(ValueError, r"class indices \[4\]", "got None"):
        trainer.step(made.images, None)


@pytest.mark.parametrize("label", [CLASSES, -1, -100])
def test_label_outside_the_classes_is_refused(made: Case, label: int) -> None:
    trainer = Trainer(made, classes="labels", task_weight=0.0)
    with trainer.refuses((ValueError, IndexError), str(label), f"0 to {CLASSES - 1}"):
        trainer.step(made.images, made.targets.clone().fill_(label))


def test_indices_where_multi_hot_targets_are_needed_are_refused(made: Case) -> None:
    trainer = Trainer(made, classes="positives")
    with trainer.refuses(ValueError, r"multi-hot targets \[4, 7\]", r"got \[4\]", 'classes="labels"'):
        trainer.step(made.images, made.targets)


def test_targets_of_another_length_are_refused_by_the_task(made: Case) -> None:
    trainer = Trainer(made)
    with trainer.refuses(ValueError, "batch_size"):  # torch's own sentence: the user's criterion speaks
        trainer.step(made.images, made.targets[:2])


def test_pure_distillation_without_targets_is_refused_in_evaluation(made: Case) -> None:
    trainer = Trainer(made)
    criterion = e2kd.E2KDLoss(trainer.student, made.teacher)
    with torch.no_grad(), pytest.raises(ValueError, match="no targets came") as caught:
        criterion(trainer.student(made.images))
    assert "Pass targets" in str(caught.value)


# Maps


def _dead(model: nn.Module) -> nn.Module:
    """Features that are zero everywhere behind the last ReLU."""
    with torch.no_grad():
        model.layer4[-1].bn2.weight.zero_()
        model.layer4[-1].bn2.bias.fill_(-1e6)
    return model


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_dead_maps_warn_are_counted_and_give_no_gradient(made: Case, who: str) -> None:
    teacher = _dead(cnn(5).eval()) if who == "teacher" else None
    if who == "student":
        _dead(made.student)
    trainer = Trainer(made, teacher=teacher, task_weight=0.0, kd_weight=0.0)
    trainer.student.zero_grad()
    before = snapshot(trainer.optimizer)
    with pytest.warns(e2kd.NoEffectWarning, match="more than half of the maps are zero everywhere") as caught:
        loss = trainer.step(made.images, made.targets)
    assert "layer4" in str(caught[0].message)
    assert trainer.criterion.parts["zero_maps"] == 4
    assert trainer.criterion.parts["cosine"] == 0
    assert loss == 1
    assert all(p.grad is None or not p.grad.any() for p in trainer.student.parameters())
    assert identical(before, snapshot(trainer.optimizer))


def test_few_dead_maps_are_counted_without_a_warning(made: Case, recwarn: pytest.WarningsRecorder) -> None:
    class FirstIsZero:
        layer = None

        def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
            maps = e2kd.GradCAM()(features, gradient)
            return torch.cat([maps[:1] * 0, maps[1:]])

    trainer = Trainer(made, explainer=FirstIsZero())
    loss = trainer.step(made.images, made.targets)
    assert loss.isfinite()
    assert trainer.criterion.parts["zero_maps"] == 1
    assert not [w for w in recwarn if issubclass(w.category, e2kd.NoEffectWarning)]
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.student.parameters())


def test_map_of_one_cell_is_refused() -> None:
    made = case("cnn")
    trainer = Trainer(made, explainer=e2kd.GradCAM("layer4"))
    small = torch.randn(4, 3, 32, 32)
    with trainer.refuses(e2kd.UnsupportedModel, "layer4", "no map of more than one cell", "for instance .layer3"):
        trainer.step(small, made.targets)
    assert_next_step_is_sound(trainer, made)


def test_map_of_one_cell_in_the_teacher_is_refused_or_named() -> None:
    class OneCell(nn.Module):
        layer = None

        def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
            return e2kd.GradCAM()(features, gradient).mean((2, 3), keepdim=True)

    made = case("cnn")
    trainer = Trainer(made, teacher_explainer=OneCell())
    with trainer.refuses(e2kd.UnsupportedModel, "teacher.s maps have one cell", "teacher_explainer="):
        trainer.step(made.images, made.targets)


def test_explainers_of_different_channels_are_refused(made: Case) -> None:
    trainer = Trainer(made, teacher_explainer=e2kd.InputGradient())
    with trainer.refuses(ValueError, r"\[4, 1, 3, 3\]", r"\[4, 3, 96, 96\]", "same number of channels"):
        trainer.step(made.images, made.targets)


def test_similarity_that_reduces_the_batch_is_refused(made: Case) -> None:
    trainer = Trainer(made, similarity=lambda a, b: (a * b).mean())
    with trainer.refuses(ValueError, r"one value per sample, \[4\]", "not over the batch"):
        trainer.step(made.images, made.targets)


# Settings


def test_unknown_layer_names_those_that_come_close(made: Case) -> None:
    before = snapshot(made.student)
    with pytest.raises(e2kd.UnsupportedModel, match="no layer named 'layer5'") as caught:
        e2kd.E2KDLoss(made.student, made.teacher, explainer=e2kd.GradCAM("layer5"))
    assert "layer4" in str(caught.value)
    assert identical(before, snapshot(made.student))
    assert not made.student._forward_hooks
    assert not made.student._forward_pre_hooks


@pytest.mark.parametrize("layer", ["fc", "global_pool"])
def test_layer_without_a_map_is_refused_with_one_to_try(made: Case, layer: str) -> None:
    with pytest.raises(e2kd.UnsupportedModel, match=f"Layer '{layer}' of .* returned a tensor") as caught:
        e2kd.E2KDLoss(made.student, made.teacher, explainer=e2kd.GradCAM(layer))
    assert "layer4" in str(caught.value)
    assert not made.student._forward_hooks


def test_layer_without_gradient_is_refused_with_one_to_try() -> None:
    made = case("vit")
    with pytest.raises(e2kd.UnsupportedModel, match="no gradient with respect to the map of layer 'norm'") as caught:
        e2kd.E2KDLoss(made.student, made.teacher, explainer=e2kd.GradCAM("norm"))
    assert "blocks.1" in str(caught.value)


def test_model_without_a_map_is_refused(made: Case) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    with pytest.raises(e2kd.UnsupportedModel, match="no layer"):
        e2kd.E2KDLoss(flat, made.teacher)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in flat.modules())


BAD_SETTINGS = [
    ({"weight": -1.0}, "weight >= 0, but got -1"),
    ({"weight": float("nan")}, "weight >= 0, but got nan"),
    ({"weight": float("inf")}, "weight >= 0, but got inf"),
    ({"kd_weight": -0.5}, "kd_weight >= 0"),
    ({"task_weight": -0.5}, "task_weight >= 0"),
    ({"temperature": 0.0}, "temperature > 0, but got 0"),
    ({"temperature": -1.0}, "temperature > 0"),
    ({"temperature": float("nan")}, "temperature > 0"),
    ({"temperature": float("inf")}, "temperature > 0"),
    ({"fraction": 0.0}, r"fraction in \(0, 1\], but got 0.0. weight=0 switches"),
    ({"fraction": 1.5}, r"fraction in \(0, 1\]"),
    ({"fraction": float("nan")}, r"fraction in \(0, 1\]"),
    ({"max_classes": 0}, "max_classes to be an integer >= 1, or None for all that classes= says, but got 0"),
    ({"max_classes": 1.5}, "max_classes to be an integer >= 1"),
    ({"max_classes": float("nan")}, "max_classes to be an integer >= 1"),
    ({"max_classes": float("inf")}, "max_classes to be an integer >= 1"),
    ({"max_classes": True}, "max_classes to be an integer >= 1"),
    ({"every": 0}, "every to be an integer >= 1, but got 0"),
    ({"every": 1.5}, "every to be an integer >= 1"),
    ({"every": float("nan")}, "every to be an integer >= 1, but got nan"),
    ({"every": float("inf")}, "every to be an integer >= 1, but got inf"),
    ({"during": (5, 5)}, r"during to be \(start, stop\) in steps, 0 <= start < stop, but got \(5, 5\)"),
    ({"during": (0.2, 0.5)}, r"during to be \(start, stop\) in steps"),
    ({"during": (1, 2, 3)}, r"during to be \(start, stop\) in steps"),
    ({"resize": "map"}, "resize to be None or \"image\", but got 'map'"),
    ({"classes": "top"}, "classes to be .* but got 'top'"),
    ({"classes": 0}, "classes to be .* but got 0"),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD_SETTINGS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_bad_settings_are_refused_when_the_criterion_is_built(made: Case, settings: Any, sentence: str) -> None:
    before = snapshot(made.student)
    with pytest.raises(ValueError, match=sentence):
        e2kd.E2KDLoss(made.student, made.teacher, nn.CrossEntropyLoss(), **settings)
    assert identical(before, snapshot(made.student))
    assert not made.student._forward_hooks
    assert not made.student._forward_pre_hooks


OUTSIDE = [float("nan"), float("inf"), -1.0]
BUILT_OR_CALLED: dict[str, Callable[..., object]] = {
    "KDLoss": e2kd.KDLoss,
    "LogitLayer": partial(LogitLayer, 0.0),
    "kd_loss": partial(e2kd.kd_loss, torch.zeros(2, 3), torch.zeros(2, 3)),
    "dkd_loss": partial(dkd_loss, torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 2])),
}


@pytest.mark.parametrize("value", [*OUTSIDE, 0.0])
@pytest.mark.parametrize("name", BUILT_OR_CALLED)
def test_temperatures_are_looked_at_wherever_one_is_given(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Expected a finite temperature > 0, but got {value}. 1 leaves the logits"):
        BUILT_OR_CALLED[name](temperature=value)


@pytest.mark.parametrize("loss", [e2kd.KDLoss, e2kd.MultiLabelKDLoss, e2kd.ExplanationLoss])
def test_reductions_are_looked_at_when_a_loss_is_built(loss: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"Expected reduction to be 'mean' or 'none', but got 'sum'\. For a sum"):
        loss(reduction="sum")


RANGES = [
    *((method, "weight", value, "a finite weight >= 0") for method in (*METHODS, "GuidanceLoss") for value in OUTSIDE),
    *((method, "warmup", value, "warmup to be a number") for method in METHODS for value in OUTSIDE),
    *(("DKD", name, value, f"a finite {name} >= 0") for name in ("alpha", "beta") for value in OUTSIDE),
    *((method, "temperature", value, "a finite temp") for method in ("CRD", "DKD") for value in (*OUTSIDE, 0.0)),
    *(("CRD", "momentum", value, r"momentum in \[0, 1\)") for value in (*OUTSIDE, 1.0)),
]


@pytest.mark.parametrize(("method", "setting", "value", "sentence"), RANGES)
def test_settings_of_other_criteria_are_looked_at_before_the_student_is(
    made: Case, method: str, setting: str, value: float, sentence: str
) -> None:
    build = {**METHODS, "GuidanceLoss": lambda student, _, **settings: GuidanceLoss(student, nn.MSELoss(), **settings)}
    with pytest.raises(ValueError, match=f"Expected {sentence}.* but got {value}"):
        build[method](made.student, made.teacher, **{setting: value})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.student.modules())


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", OUTSIDE)
def test_weights_of_dkds_terms_are_looked_at(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Expected a finite {name} >= 0, but got {value}"):
        BUILT_OR_CALLED["dkd_loss"](**{name: value})


@pytest.mark.parametrize("option", ["explainer", "teacher_explainer"])
@pytest.mark.parametrize("wrong", ["cam", e2kd.CAM, lambda features, gradient: features])
def test_what_is_no_explainer_is_refused_when_the_criterion_is_built(made: Case, option: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"Expected {option} to be an object with a layer.*e2kd\.CAM\(\)"):
        e2kd.E2KDLoss(made.student, made.teacher, **{option: wrong})
    with pytest.raises(TypeError, match="Expected explainer to be"):
        e2kd.explain(made.student, made.images, explainer=wrong)
    assert not made.student._forward_hooks


@pytest.mark.parametrize("distillation", [e2kd.KDLoss(), e2kd.MultiLabelKDLoss()])
def test_a_distillation_loss_is_no_task(made: Case, distillation: nn.Module) -> None:
    with pytest.raises(TypeError, match="Pass distillation="):
        e2kd.E2KDLoss(made.student, made.teacher, distillation)
    e2kd.E2KDLoss(made.student, made.teacher, distillation=distillation)(made.student(made.images), made.targets)


def test_probabilities_in_the_place_of_logits_are_warned_of(made: Case) -> None:
    criterion = e2kd.E2KDLoss(made.student, made.teacher, weight=0)
    with pytest.warns(e2kd.NoEffectWarning, match="student's logits look like probabilities"):
        criterion(made.student(made.images).softmax(1), made.targets)
    criterion = e2kd.E2KDLoss(made.student, nn.Sequential(made.teacher, nn.Softmax(1)), weight=0)
    with pytest.warns(e2kd.NoEffectWarning, match="teacher's logits look like probabilities"):
        criterion(made.student(made.images), made.targets)


@pytest.mark.parametrize("wrong", ["student", "teacher"])
def test_features_in_the_place_of_logits_are_refused(wrong: str) -> None:
    class Returning(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.trunk, self.head, self.first = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 4), first

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            features = self.trunk(images).relu().mean((2, 3))
            return (self.head(features), features) if self.first else (features, self.head(features))

    def step(wrong: str) -> None:
        student, teacher = (Returning(first=name != wrong) for name in ("student", "teacher"))
        criterion = e2kd.E2KDLoss(student, teacher)
        criterion(student(torch.rand(2, 3, 32, 32)))

    step("neither")
    with pytest.raises(e2kd.UnsupportedModel, match=r"Expected logits first in what Returning returns"):
        step(wrong)


def test_a_loss_a_folder_and_half_a_normalisation_are_refused_for_what_they_are(made: Case, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Expected the teacher to be a network, but got CrossEntropyLoss"):
        e2kd.E2KDLoss(made.student, nn.CrossEntropyLoss(), made.teacher)
    with pytest.raises(ValueError, match=r"is a folder.*FrozenTeacher\.open"):
        e2kd.E2KDLoss(made.student, str(tmp_path))
    for option in ("input_normalization", "teacher_normalization"):
        with pytest.raises(ValueError, match=rf"Expected {option} to be \(mean, std\).*got \(0\.5, 0\.5\)"):
            e2kd.E2KDLoss(made.student, made.teacher, **{option: (0.5, 0.5)})
    assert not made.student._forward_hooks


def test_a_criterion_in_eval_mode_is_warned_of(made: Case) -> None:
    criterion = e2kd.E2KDLoss(made.student, made.teacher, nn.CrossEntropyLoss()).eval()
    with pytest.warns(e2kd.NoEffectWarning, match=r"the criterion is in eval mode.* Call criterion\.train\(\)"):
        criterion(made.student(made.images), made.targets)


@pytest.mark.parametrize("wrong", ["student", "teacher"])
def test_things_that_are_no_modules_are_refused_when_the_criterion_is_built(made: Case, wrong: str) -> None:
    models: dict[str, Any] = {"student": made.student, "teacher": made.teacher}
    models[wrong] = models[wrong].forward
    with pytest.raises(TypeError, match=wrong):
        e2kd.E2KDLoss(**models)
    assert not made.student._forward_hooks


def test_teacher_on_another_device_is_refused(made: Case) -> None:
    trainer = Trainer(made)
    trainer.criterion = e2kd.E2KDLoss(trainer.student, cnn(5).eval().to("meta"))
    with trainer.refuses(RuntimeError, "teacher is on meta", r"teacher\.to\('cpu'\)"):
        trainer.step(made.images, made.targets)
