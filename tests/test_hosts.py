"""The one line inside the hosts people have, and on the models that come with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from distributed_worker import GROUPS, joint_case, run_group
from reference import (
    CLASSES,
    SIDE,
    Case,
    case,
    cosine,
    error,
    freeze_statistics,
    gradient,
    logits_in,
    reference_loss,
    reference_step,
)
from safetensors.torch import load_file
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import e2kd

pytestmark = pytest.mark.usefixtures("one_thread")
both = pytest.mark.parametrize("name", ["cnn", "vit"])


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def steady(name: str, batch: int = 8) -> Case:
    """A case whose batch is the sum of its parts."""
    made = case(name, batch=batch)
    freeze_statistics(made.student)
    return made


def teach(student: nn.Module, made: Case, **settings: Any) -> e2kd.E2KDLoss:
    return e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss(), **settings)


# Accelerate


def _accelerate_epoch(made: Case, accelerator: Accelerator, *, before: bool) -> tuple[nn.Module, list[Tensor]]:
    """The user's loop over two batches; the student as it was trained and its gradient at every optimizer step."""
    student = made.copy()
    criterion = teach(student, made) if before else None
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    data = DataLoader(TensorDataset(made.images, made.targets), batch_size=len(made.images) // 2)
    model, optimizer, data = accelerator.prepare(student, optimizer, data)
    criterion = criterion or teach(model, made)
    gradients = []
    for images, targets in data:
        with accelerator.accumulate(model):
            loss = criterion(model(images), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                gradients.append(gradient(student))
            optimizer.step()
            optimizer.zero_grad()
    return student, gradients


@both
@pytest.mark.parametrize("before", [True, False], ids=["criterion_first", "prepare_first"])
def test_accelerate_loop_gives_the_reference_gradient_of_every_batch(name: str, before: bool) -> None:
    made = steady(name)
    _, gradients = _accelerate_epoch(made, Accelerator(cpu=True), before=before)
    for which, found in enumerate(gradients):
        assert error(found, reference_step(made.copy(), made.half(which))[1]) < 1e-5
    assert len(gradients) == 2


@both
@pytest.mark.parametrize("before", [True, False], ids=["criterion_first", "prepare_first"])
def test_accelerate_loop_in_bfloat16_has_the_float32_direction(name: str, before: bool) -> None:
    made = steady(name, batch=16)
    _, gradients = _accelerate_epoch(made, Accelerator(cpu=True, mixed_precision="bf16"), before=before)
    for which, found in enumerate(gradients):
        assert cosine(found, reference_step(made.copy(), made.half(which))[1]) > 0.998
    assert len(gradients) == 2


@both
def test_accelerate_accumulates_two_batches_to_the_gradient_of_both(name: str) -> None:
    made = steady(name)
    _, gradients = _accelerate_epoch(made, Accelerator(cpu=True, gradient_accumulation_steps=2), before=True)
    assert len(gradients) == 1
    assert error(gradients[0], reference_step(made.copy(), made)[1]) < 1e-5


def test_accelerate_saves_the_student_and_nothing_of_the_teacher(tmp_path: Path) -> None:
    made = steady("cnn")
    accelerator = Accelerator(cpu=True)
    student = made.copy()
    criterion = teach(student, made)
    model, criterion = accelerator.prepare(student, criterion)  # some prepare whatever is a module
    accelerator.backward(criterion(model(made.images), made.targets))
    accelerator.save_state(str(tmp_path))
    saved = [load_file(file) for file in tmp_path.glob("**/*.safetensors")]
    assert sorted(len(state) for state in saved) == [0, len(student.state_dict())]
    assert all(torch.equal(value, student.state_dict()[key]) for state in saved for key, value in state.items())
    size = sum(value.numel() * value.element_size() for value in student.state_dict().values())
    assert sum(file.stat().st_size for file in tmp_path.glob("**/*") if file.is_file()) < 1.5 * size
    accelerator.load_state(str(tmp_path))
    assert criterion(model(made.images), made.targets).isfinite()


# timm


@both
def test_timm_classification_task_gives_the_reference_step(name: str) -> None:
    made = case(name)
    loss, wanted = reference_step(made.copy(), made)
    student = made.copy()
    task = ClassificationTask(student, criterion=teach(student, made), verbose=False).train()
    found = task(made.images, made.targets)
    found["loss"].backward()
    torch.testing.assert_close(found["loss"].detach(), loss, rtol=1e-5, atol=0)
    assert error(gradient(student), wanted) < 1e-5
    assert found["output"].shape == (4, CLASSES)
    assert all(key.startswith("trainable_module.") for key in task.state_dict())


def test_timm_task_with_ema_evaluates_by_the_plain_loss_and_keeps_teaching() -> None:
    made = case("cnn")
    wanted = reference_step(made.copy(), made)[1]
    student = made.copy()
    task = ClassificationTask(student, criterion=teach(student, made), verbose=False)
    task.setup_ema(decay=0.9)
    task.update_ema()
    task.eval()
    with torch.inference_mode():
        plain = task(made.images, made.targets)
    assert plain["loss"] == nn.functional.cross_entropy(plain["output"], made.targets)
    task.train()
    task(made.images, made.targets)["loss"].backward()
    assert error(gradient(student), wanted) < 1e-5


# Hugging Face Trainer


def hf_vit() -> nn.Module:
    torch.manual_seed(1)
    config = hf.ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=SIDE,
        patch_size=16, num_labels=CLASSES,
    )  # fmt: skip
    return hf.ViTForImageClassification(config).train()


def _hf_case(batch: int = 8) -> Case:
    return replace(case("cnn", batch=batch), student=hf_vit(), layer="vit.layers.1")


class _KeepGradients(hf.TrainerCallback):
    """The student's gradient at every optimizer step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.found.append(gradient(model))


def _hf_trainer(made: Case, folder: Path, student: nn.Module, **settings: Any) -> tuple[hf.Trainer, list[Tensor]]:
    data = [
        {"pixel_values": image, "labels": int(target)} for image, target in zip(made.images, made.targets, strict=True)
    ]
    arguments = hf.TrainingArguments(
        output_dir=str(folder), use_cpu=True, learning_rate=0.0, max_grad_norm=0.0, report_to=[], disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False, **settings,
    )  # fmt: skip
    keep = _KeepGradients()
    trainer = hf.Trainer(
        student, arguments, train_dataset=data, eval_dataset=data, compute_loss_func=teach(student, made),
        callbacks=[keep],
    )  # fmt: skip
    return trainer, keep.found


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_hf_trainer_gives_the_reference_gradient_however_the_batch_is_accumulated(parts: int, tmp_path: Path) -> None:
    made = _hf_case()
    _, wanted = reference_step(made.copy(), made)
    settings = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    trainer, gradients = _hf_trainer(made, tmp_path, made.copy(), max_steps=2, **settings)
    trainer.train()
    assert len(gradients) == 2
    for found in gradients:  # the learning rate is zero
        assert error(found, wanted) < 1e-5


def test_hf_trainer_evaluates_by_the_plain_loss_and_goes_on(tmp_path: Path) -> None:
    made = _hf_case()
    student = made.copy()
    settings = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    trainer, gradients = _hf_trainer(
        made, tmp_path, student, max_steps=2, eval_strategy="steps", eval_steps=1, logging_steps=1, **settings
    )
    trainer.train()
    with torch.no_grad():
        plain = nn.functional.cross_entropy(student.eval()(made.images).logits, made.targets)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == pytest.approx([float(plain)] * 2, rel=1e-4)
    loss, wanted = reference_step(made.copy(), made)
    trained = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trained == pytest.approx([float(loss)] * 2, rel=1e-3)
    assert all(error(found, wanted) < 1e-5 for found in gradients)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}], ids=lambda s: next(iter(s)))
def test_hf_trainer_options_keep_the_gradient(settings: dict[str, Any], tmp_path: Path) -> None:
    made = _hf_case()
    _, wanted = reference_step(made.copy(), made)
    trainer, gradients = _hf_trainer(
        made, tmp_path, made.copy(), max_steps=1, per_device_train_batch_size=8, **settings
    )
    trainer.train()
    assert cosine(gradients[0], wanted) > 0.99
    if "bf16" not in settings:
        assert error(gradients[0], wanted) < 1e-5


def test_hf_trainer_saves_the_student_alone(tmp_path: Path) -> None:
    made = _hf_case()
    student = made.copy()
    trainer, _ = _hf_trainer(made, tmp_path, student, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")  # names of its own, the same numbers
    assert sorted(v.numel() for v in saved.values()) == sorted(v.numel() for v in student.state_dict().values())


# Models of other libraries, as students and as teachers


def hf_convnext() -> nn.Module:
    torch.manual_seed(1)
    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 24], depths=[1, 1, 1], num_stages=3, num_labels=CLASSES)
    return hf.ConvNextForImageClassification(config).train()


def hf_resnet() -> nn.Module:
    torch.manual_seed(1)
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    return hf.ResNetForImageClassification(config).train()


class _DenseNet(tv.DenseNet):
    """torchvision's, with a name for what its functional ReLU returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.after = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features = self.after(nn.functional.relu(self.features(x)))
        return self.classifier(features.mean((2, 3)))


def densenet(kind: type[nn.Module] = tv.DenseNet) -> nn.Module:
    torch.manual_seed(1)
    return kind(growth_rate=8, block_config=(2, 2, 2), num_init_features=16, drop_rate=0.1, num_classes=CLASSES).train()


def shufflenet() -> nn.Module:
    torch.manual_seed(1)
    return tv.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], num_classes=CLASSES).train()


def googlenet() -> nn.Module:
    torch.manual_seed(1)
    return tv.GoogLeNet(num_classes=CLASSES, aux_logits=True, init_weights=False).train()


def vgg() -> nn.Module:
    """VGG's forward with its dropout, without its hundred million weights."""
    torch.manual_seed(1)
    features = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)]
    for width in (8, 16, 24, 32):
        features += [nn.MaxPool2d(2), nn.LazyConv2d(width, 3, padding=1), nn.ReLU(inplace=True)]
    with torch.device("meta"):
        model = tv.VGG(nn.Sequential(), num_classes=CLASSES, init_weights=False)
    model.features, model.avgpool = nn.Sequential(*features), nn.AdaptiveAvgPool2d(7)
    model.classifier = nn.Sequential(
        nn.Linear(32 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout(),
        nn.Linear(32, CLASSES),
    )  # fmt: skip
    with torch.no_grad():
        model(torch.zeros(1, 3, SIDE, SIDE))
    return model.train()


def efficientnet() -> nn.Module:
    torch.manual_seed(1)
    block = partial(tv.efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    stages = [block(1, 3, 2, 8, 8, 2), block(4, 3, 2, 8, 16, 2), block(4, 3, 2, 16, 24, 2)]
    return tv.EfficientNet(stages, dropout=0.3, stochastic_depth_prob=0.2, num_classes=CLASSES).train()


def _main_and_aux(outputs: Any, targets: Tensor) -> Tensor:
    """The criterion of a GoogLeNet loop; plain outputs have no second logits."""
    loss = nn.functional.cross_entropy(logits_in(outputs), targets)
    if isinstance(outputs, tuple):
        loss = loss + 0.3 * sum(nn.functional.cross_entropy(aux, targets) for aux in outputs[1:])
    return loss


STUDENTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hf_vit": (hf_vit, "vit.layers.1"),
    "hf_convnext": (hf_convnext, "convnext.encoder.stages.2"),
    "hf_resnet": (hf_resnet, "resnet.encoder.stages.1"),
    "densenet": (densenet, "after"),
    "shufflenet": (shufflenet, "conv5"),
    "googlenet": (googlenet, "inception5b"),
    "vgg": (vgg, "features"),
    "efficientnet": (efficientnet, "features"),
}


def _reference_of(name: str, student: nn.Module) -> nn.Module:
    if name != "densenet":
        return copy.deepcopy(student)
    named = densenet(_DenseNet)
    named.load_state_dict(student.state_dict())
    return named


@pytest.mark.parametrize("name", STUDENTS)
def test_student_of_another_library_gets_the_reference_step_without_configuration(name: str) -> None:
    build, layer = STUDENTS[name]
    made = replace(case("cnn", batch=6), student=build(), layer=layer)
    student, twin = made.student, _reference_of(name, made.student)
    torch.manual_seed(5)
    loss, wanted = reference_step(twin, made, criterion=_main_and_aux)
    _, plain = reference_step(_reference_of(name, student), made, criterion=_main_and_aux, weight=0)
    assert error(plain, wanted) > 0.01, "the explanation takes part"
    criterion = e2kd.E2KDLoss(student, made.teacher, _main_and_aux)
    torch.manual_seed(5)
    found = criterion(student(made.images), made.targets)
    found.backward()
    torch.testing.assert_close(found.detach(), loss, rtol=1e-5, atol=0)
    assert error(gradient(student), wanted) < 1e-5
    assert criterion.parts["zero_maps"] < 3


TEACHERS = ["hf_vit", "hf_convnext", "hf_resnet", "shufflenet", "googlenet", "vgg", "efficientnet"]


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_of_another_library_is_explained_as_the_reference_explains_it(name: str) -> None:
    build, layer = STUDENTS[name]
    teacher = build().eval()
    made = replace(case("vit", batch=6), teacher=teacher, teacher_layer=layer)
    try:
        loss, wanted = reference_step(made.copy(), made)
    except AssertionError:  # a teacher of a finer grid
        made = replace(made, student=hf_resnet(), layer="resnet.encoder.stages.1")
        loss, wanted = reference_step(made.copy(), made)
    student = made.copy()
    found = teach(student, made)(student(made.images), made.targets)
    found.backward()
    torch.testing.assert_close(found.detach(), loss, rtol=1e-5, atol=0)
    assert error(gradient(student), wanted) < 1e-5


# Two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_group("hosts", tmp_path_factory.mktemp("hosts"))


@pytest.mark.parametrize("label", GROUPS["hosts"])
def test_host_on_two_processes_gives_equal_gradients_of_the_joint_batch(label: str, ranks: Any) -> None:
    made = joint_case(label.split("-")[0])
    student = made.copy()
    if label.endswith("_dead"):  # the second half teaches by task and logits alone
        (reference_loss(student, made.half(0)) + reference_loss(student, made.half(1), weight=0)).div(2).backward()
        wanted = gradient(student)
    else:
        wanted = reference_step(student, made)[1]
    found = [rank[label] for rank in ranks]
    assert "refusal" not in found[0], found[0]
    assert torch.equal(found[0]["gradient0"], found[1]["gradient0"])
    assert error(found[0]["gradient0"], wanted) < 1e-5


@pytest.mark.parametrize("label", ["cnn-accelerate_dead", "vit-transformers"])
def test_logged_parts_are_means_of_both_processes(label: str, ranks: Any) -> None:
    one, other = ({n: v for n, v in rank[label].items() if n.startswith("e2kd/")} for rank in ranks)
    assert set(one) >= {"e2kd/task", "e2kd/kd", "e2kd/explanation"}
    assert one == other
    if "task" in ranks[0][label]:
        assert one["e2kd/task"] == pytest.approx(float(sum(rank[label]["task"] for rank in ranks)) / 2, rel=1e-6)
        assert ranks[0][label]["task"] != ranks[1][label]["task"]
