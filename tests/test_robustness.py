"""The one line inside everything a trainer does to a model: each is exact against the slow reference, or refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from nets import bcos_cnn, cnn, pair
from reference import (
    CLASSES,
    Branching,
    Case,
    case,
    cosine,
    error,
    freeze_statistics,
    gradient,
    identical,
    reference_loss,
    reference_step,
    small,
    snapshot,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import e2kd
from e2kd.baselines import CATKD

pytestmark = pytest.mark.usefixtures("one_thread")
EXPLANATION_ONLY = (("task_weight", 0.0), ("kd_weight", 0.0))
both = pytest.mark.parametrize("name", ["cnn", "vit"])


@lru_cache
def expected(name: str, weights: tuple[tuple[str, float], ...] = (), seed: int | None = None, **settings: Any) -> Any:
    """A case with its reference loss and gradient. Tests train copies of its student."""
    frozen = settings.pop("frozen_statistics", False)
    made = case(name, **settings)
    if frozen:
        freeze_statistics(made.student)
    student = made.copy()
    if seed is not None:
        torch.manual_seed(seed)
    return made, *reference_step(student, made, **dict(weights))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def teach(student: nn.Module, made: Case, **settings: Any) -> e2kd.E2KDLoss:
    return e2kd.E2KDLoss(student, made.teacher, nn.CrossEntropyLoss(), **settings)


def assert_exact(student: nn.Module, loss: Tensor, wanted: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(loss.detach(), wanted[0], rtol=tolerance, atol=0)
    assert error(gradient(student), wanted[1]) < tolerance


@both
def test_reference_gradient_is_far_from_plain_distillation(name: str) -> None:
    made, _, wanted = expected(name)
    _, plain = reference_step(made.copy(), made, weight=0)
    assert error(plain, wanted) > 0.1


# Hosts that change how the student runs


def _channels_last(student: nn.Module) -> nn.Module:
    return student.to(memory_format=torch.channels_last)


def _timm_checkpointing(student: nn.Module) -> nn.Module:
    student.set_grad_checkpointing(True)
    return student


def _checkpointed_model(student: nn.Module) -> Callable[[Tensor], Tensor]:
    return partial(checkpoint, student, use_reentrant=False)


def _checkpointed_trunk(student: nn.Module) -> nn.Module:
    student.forward_features = partial(checkpoint, student.forward_features, use_reentrant=False)
    return student


def _checkpointed_stages(student: nn.Module, implementation: CheckpointImpl) -> nn.Module:
    """Every stage or block on its own, the explained one and those after it too."""
    for name in ("layer2", "layer3", "layer4"):
        if hasattr(student, name):
            setattr(student, name, checkpoint_wrapper(getattr(student, name), implementation))
    for index, block in enumerate(getattr(student, "blocks", [])):
        student.blocks[index] = checkpoint_wrapper(block, implementation)
    return student


HOSTS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda student: student,
    "channels_last": _channels_last,
    "data_parallel": nn.DataParallel,
    "timm_checkpointing": _timm_checkpointing,
    "checkpointed_model": _checkpointed_model,
    "checkpointed_trunk": _checkpointed_trunk,
    "checkpointed_stages": partial(_checkpointed_stages, implementation=CheckpointImpl.NO_REENTRANT),
}


@both
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("order", ["criterion_first", "host_first"])
def test_step_in_host_is_exact(name: str, host: str, order: str) -> None:
    made, *wanted = expected(name)
    student = made.copy()
    if order == "criterion_first":
        criterion = teach(student, made)
        model = HOSTS[host](student)
    else:
        model = HOSTS[host](student)
        criterion = teach(student, made)
    for _ in range(2):  # the second step of the same criterion is as good as the first
        student.zero_grad()
        loss = criterion(model(made.images), made.targets)
        loss.backward()
        assert_exact(student, loss, wanted)


@both
@pytest.mark.parametrize("order", ["criterion_first", "checkpoint_first"])
def test_reentrant_checkpoint_of_every_stage_is_exact_or_refused(name: str, order: str) -> None:
    made, *wanted = expected(name)
    student = made.copy()

    def step() -> Tensor:
        criterion = teach(student, made) if order == "criterion_first" else None
        _checkpointed_stages(student, CheckpointImpl.REENTRANT)
        criterion = criterion or teach(student, made)
        return criterion(student(made.images), made.targets)

    if name == "vit" and order == "criterion_first":  # the hooks are on the blocks, inside of the checkpoints
        with pytest.raises((RuntimeError, e2kd.UnsupportedModel), match="use_reentrant=False"):
            step()
        return
    loss = step()  # the hooks are outside, on the pooling or on the checkpointing wrappers
    loss.backward()
    assert_exact(student, loss, wanted)


@both
def test_double_precision_step_is_exact_to_rounding(name: str) -> None:
    made = case(name).to(torch.float64)
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    loss = teach(student, made)(student(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted, tolerance=1e-12)


@both
def test_reentrant_checkpoint_around_the_whole_model_is_refused(name: str) -> None:
    made = case(name)
    student = made.copy()
    criterion = teach(student, made)
    outputs = checkpoint(student, made.images.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"without a training forward|use_reentrant=False"):
        criterion(outputs, made.targets)


class HeadCheckpointed(nn.Module):
    """Target layer and pooling in one reentrant checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU())
        self.top = nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(checkpoint(self.top, self.stem(images), use_reentrant=self.training))


def test_a_checkpoint_around_student_and_criterion_is_refused() -> None:
    for reentrant in (False, True):
        student, x = cnn(), torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
        criterion = e2kd.E2KDLoss(student, cnn(seed=1), nn.CrossEntropyLoss())
        step = lambda images: criterion(student(images), torch.tensor([0, 1]))  # noqa: B023, E731
        with pytest.raises(RuntimeError, match="a checkpoint around student and criterion"):
            checkpoint(step, x, use_reentrant=reentrant).backward()


def test_reentrant_checkpoint_around_target_and_pooling_is_refused() -> None:
    made = case("cnn")
    student = HeadCheckpointed()
    criterion = teach(student, made, explainer=e2kd.GradCAM("top.1"), teacher_explainer=e2kd.GradCAM())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        criterion(student(made.images), made.targets)


class Shared(nn.Module):
    """An activation that is one module for all layers, or a module of each."""

    def __init__(self, *, shared: bool, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 5, 4), nn.Conv2d(8, 8, 3, 2)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        acts = [nn.ReLU(inplace) for _ in range(3)]
        self.acts = nn.ModuleList(acts[:1] * 3 if shared else acts)

    def forward(self, images: Tensor) -> Tensor:
        x = self.acts[1](self.conv2(self.acts[0](self.conv1(images))))
        return self.fc2(self.acts[2](self.fc1(x.mean((2, 3)))))


SHARED_HOSTS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda student: student,
    "checkpointed_model": _checkpointed_model,
    "compiled": lambda student: torch.compile(student, backend="aot_eager", fullgraph=True),
    "compiled_parts": lambda student: [m.compile(backend="aot_eager") for m in student.children()] and student,
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("host", SHARED_HOSTS)
def test_activation_that_layers_share_is_captured_at_its_own_call(host: str, inplace: bool) -> None:
    made = Case(**{**case("cnn").__dict__, "student": Shared(shared=False, inplace=inplace), "layer": "acts.1"})
    wanted = reference_step(made.copy(), made)
    student = Shared(shared=True, inplace=inplace)
    criterion = teach(student, made)
    model = SHARED_HOSTS[host](student)
    for _ in range(2):
        student.zero_grad()
        loss = criterion(model(made.images), made.targets)
        loss.backward()
        assert_exact(student, loss, wanted, tolerance=1e-6)
        with torch.no_grad():
            model(made.images)
    assert criterion.explained.way == "replay"


@pytest.mark.parametrize("inplace", [False, True])
def test_layer_before_an_activation_that_its_block_runs_again_is_exact(inplace: bool) -> None:
    torch.manual_seed(1)
    network = torchvision.models.resnet18(num_classes=CLASSES)
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    made = Case(**{**case("cnn").__dict__, "student": network, "layer": "layer4.1.bn1"}).to(torch.float64)
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    loss = teach(student, made, explainer=e2kd.GradCAM(made.layer), teacher_explainer=e2kd.GradCAM())(
        student(made.images), made.targets
    )
    loss.backward()
    assert_exact(student, loss, wanted, tolerance=1e-6)


def test_compiled_student_that_was_explained_before_is_exact() -> None:
    made = Case(**{**case("cnn").__dict__, "student": Shared(shared=False, inplace=False), "layer": "acts.1"})
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    student.compile(backend="aot_eager")
    e2kd.explain(student, made.images)
    loss = teach(student, made, example=made.images)(student(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)


def _thumbnails() -> Case:
    """Images on which the last stage, found on noise of 224 pixels, has one cell."""
    torch.manual_seed(1)
    made = Case(**{**case("cnn").__dict__, "student": torchvision.models.resnet18(num_classes=CLASSES)})
    return replace(made, layer="layer3", teacher_layer="layer3", images=made.images[..., :32, :32].contiguous()).to(
        torch.float64
    )


@pytest.mark.parametrize("host", ["eager", "checkpointed_model", "data_parallel"])
def test_layer_found_on_noise_is_found_again_on_images_too_small_for_it(host: str) -> None:
    made = _thumbnails()
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    criterion = teach(student, made)
    model = HOSTS[host](student)
    loss = criterion(model(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted, tolerance=1e-6)


def test_layer_found_on_noise_is_refused_by_a_compiled_student_on_images_too_small_for_it() -> None:
    made = _thumbnails()
    student = made.copy()
    criterion = teach(student, made)
    with pytest.raises(e2kd.UnsupportedModel, match=r"found on noise of \[2, 3, 224, 224\].*example=images"):
        criterion(torch.compile(student, backend="aot_eager")(made.images), made.targets)
    student = made.copy()
    criterion = teach(student, made, example=made.images)
    loss = criterion(torch.compile(student, backend="aot_eager")(made.images), made.targets)
    assert float(loss.detach()) == pytest.approx(float(reference_step(made.copy(), made)[0]), rel=1e-6)


def test_student_without_a_map_on_its_images_is_distilled_unless_it_is_to_be_explained() -> None:
    made = case("cnn")
    student = nn.Sequential(
        nn.Conv2d(3, 8, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    images = made.images[..., :16, :16]
    for weight in (0.0, 1.0):
        criterion = teach(student, made, weight=weight)
        outputs = student(images)
        if weight == 0:
            assert criterion(outputs, made.targets) > 0
        else:
            with pytest.raises(e2kd.UnsupportedModel):
                criterion(outputs, made.targets)


def test_lazy_layers_take_their_sizes_from_images() -> None:
    made = case("cnn")
    trunk = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Conv2d(8, 8, 3, 4), nn.ReLU(), nn.Flatten())
    student = nn.Sequential(*trunk, nn.LazyLinear(CLASSES))
    criterion = teach(student, made)
    assert isinstance(student[-1], nn.LazyLinear)
    criterion(student(made.images), made.targets).backward()
    assert student[-1].in_features == trunk(made.images).shape[1]
    assert criterion.parts["explanation"] > 0


def _branching_case() -> Case:
    return Case(**{**case("cnn").__dict__, "student": Branching(), "layer": "trunk"})


def test_head_that_cannot_be_followed_is_exact_by_the_trainers_own_graph() -> None:
    made = _branching_case()
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    criterion = teach(student, made)
    loss = criterion(student(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)
    assert criterion.explained.plan is not None
    assert criterion.explained.plan.head is None


def test_head_that_cannot_be_followed_is_refused_inside_a_compiled_student() -> None:
    made = _branching_case()
    student = made.copy()
    criterion = teach(student, made)
    outputs = torch.compile(student, backend="aot_eager")(made.images)
    with pytest.raises(e2kd.UnsupportedModel, match="compile only the trunk"):
        criterion(outputs, made.targets)


# Precision: BatchNorm in eval mode, since in train mode half precision alone turns the gradient of a small batch


def _precise(name: str, weights: Any = ()) -> Any:
    return expected(name, weights, batch=16, frozen_statistics=True)


def _low_precision_step(made: Case, dtype: torch.dtype, *, inside: bool, scale: float = 1.0, **weights: float) -> Any:
    student = made.copy()
    criterion = teach(student, made, **weights)
    with torch.autocast("cpu", dtype):
        outputs = student(made.images)
        loss = criterion(outputs, made.targets) if inside else None
    if loss is None:  # half-precision logits would overflow in the task loss itself, so hosts cast them here
        loss = criterion(outputs.float() if dtype == torch.float16 else outputs, made.targets)
    (loss * scale).backward()
    return loss.detach(), gradient(student) / scale


@both
@pytest.mark.parametrize("inside", [True, False], ids=["loss_inside", "loss_outside"])
@pytest.mark.parametrize("weights", [(), EXPLANATION_ONLY], ids=["all_terms", "explanation"])
def test_bfloat16_autocast_step_has_the_float32_direction(name: str, inside: bool, weights: Any) -> None:
    made, wanted_loss, wanted = _precise(name, weights)
    loss, found = _low_precision_step(made, torch.bfloat16, inside=inside, **dict(weights))
    assert loss.dtype == torch.float32
    assert abs(loss - wanted_loss) < 0.03
    assert cosine(found, wanted) > 0.999


@both
@pytest.mark.parametrize("inside", [True, False], ids=["loss_inside", "loss_outside"])
def test_outputs_cast_to_float32_by_the_host_are_accepted(name: str, inside: bool) -> None:
    made, _, wanted = _precise(name)  # what accelerate does: the output is float32, the features are not
    student = made.copy()
    criterion = teach(student, made)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = student(made.images).float()
        if inside:
            criterion(outputs, made.targets).backward()
    if not inside:
        criterion(outputs, made.targets).backward()
    assert cosine(gradient(student), wanted) > 0.999


@both
@pytest.mark.parametrize("inside", [True, False], ids=["loss_inside", "loss_outside"])
@pytest.mark.parametrize("weights", [(), EXPLANATION_ONLY], ids=["all_terms", "explanation"])
def test_float16_autocast_with_loss_scale_65536_stays_finite_and_true(name: str, inside: bool, weights: Any) -> None:
    made, _, wanted = _precise(name, weights)
    _, found = _low_precision_step(made, torch.float16, inside=inside, scale=65536.0, **dict(weights))
    assert found.isfinite().all()
    assert cosine(found, wanted) > 0.9999


@both
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pure_bfloat16_student_has_the_float32_direction(name: str, teacher_dtype: torch.dtype) -> None:
    made, _, wanted = _precise(name)
    student = made.copy().bfloat16()
    criterion = e2kd.E2KDLoss(student, copy.deepcopy(made.teacher).to(teacher_dtype), nn.CrossEntropyLoss())
    loss = criterion(student(made.images.bfloat16()), made.targets)
    loss.backward()
    assert loss.isfinite()
    assert cosine(gradient(student), wanted) > 0.99


# Loops


def own_and_borrowed(
    student: nn.Module, teacher: nn.Module, x: Tensor, transform: str, **settings: Any
) -> list[dict[str, Tensor]]:
    """Gradients of one step, of a student and of its like that runs with copies of its parameters."""
    other, targets = copy.deepcopy(student), torch.arange(len(x)) % 4
    e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), weight=5.0, **settings)(student(x), targets).backward()
    criterion = e2kd.E2KDLoss(other, teacher, nn.CrossEntropyLoss(), weight=5.0, **settings)
    names, values = zip(*((name, p.detach().clone()) for name, p in other.named_parameters()), strict=True)

    def loss(values: tuple[Tensor, ...]) -> Tensor:
        found: Tensor = criterion(
            torch.func.functional_call(other, dict(zip(names, values, strict=True)), (x,)), targets
        )
        return found

    if transform == "grad":
        gradients = torch.func.grad(loss)(values)
    else:
        values = tuple(value.requires_grad_() for value in values)
        gradients = torch.autograd.grad(loss(values), values, allow_unused=True)
    assert all(p.grad is None for p in other.parameters())
    own = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return [own, dict(zip(names, gradients, strict=True))]


@pytest.mark.parametrize(("net", "transform"), [("closed", "call"), ("closed", "grad"), ("graph", "call")])
def test_parameters_that_a_student_is_called_with_get_the_gradient(net: str, transform: str) -> None:
    """The same numbers, so that no comparison of logits could tell them from the student's own."""
    student, teacher = pair(net)
    for module in (*student.modules(), *teacher.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    own, borrowed = own_and_borrowed(student.train(), teacher, torch.rand(6, 3, 16, 16).double(), transform)
    for name, wanted in own.items():
        torch.testing.assert_close(borrowed[name], wanted, rtol=1e-9, atol=1e-12)


class Rectified(nn.Module):
    """As torchvision's DenseNet: a function activates the features, in place."""

    def __init__(self, width: int = 6, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.classifier = nn.Linear(width, 4)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.relu(self.features(images), inplace=True)
        return self.classifier(nn.functional.adaptive_avg_pool2d(maps, 1).flatten(1))


class Cosine(nn.Module):
    """A classifier whose weight is read and that is never called, inside of another module."""

    def __init__(self, width: int = 6, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Module()
        self.net.conv = nn.Conv2d(3, width, 3, 2)
        self.net.act = nn.ReLU()
        self.net.fc = nn.Linear(width, 4)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.normalize(self.net.act(self.net.conv(images)).mean((2, 3)))
        return 4 * nn.functional.linear(pooled, nn.functional.normalize(self.net.fc.weight))


@pytest.mark.parametrize("kind", [Rectified, Cosine])
def test_parameters_that_an_unusual_student_is_called_with_get_the_gradient(kind: Any) -> None:
    own, borrowed = own_and_borrowed(kind(), kind(8, seed=1), torch.rand(6, 3, 16, 16).double(), "call")
    assert len(own) >= 3
    for name, wanted in own.items():
        torch.testing.assert_close(borrowed[name], wanted, rtol=1e-9, atol=1e-12)


def test_logits_that_are_adjusted_are_explained_after_an_activation_in_place() -> None:
    found, x = [], torch.rand(6, 3, 16, 16).double()
    for shift in (0.0, 1.0):
        student = Rectified()
        criterion = e2kd.E2KDLoss(student, Rectified(8, seed=1), kd_weight=0)
        criterion(student(x) + shift).backward()
        found.append((criterion.explained.way, [p.grad for p in student.features.parameters()]))
    assert [way for way, _ in found] == ["closed", "graph"]
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_parameter_that_is_made_in_the_forward_is_the_students_own() -> None:
    class Fresh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = cnn(), nn.Parameter(torch.ones(1).double())

        def forward(self, images: Tensor) -> Tensor:
            self.scale = nn.Parameter(torch.ones(1).double())
            return self.inner(images)

    student = Fresh()
    criterion = e2kd.E2KDLoss(student, cnn(8), explainer=e2kd.InputGradient())
    criterion(student(torch.rand(6, 3, 16, 16).double())).backward()
    assert criterion.explained.way == "separate"


def test_class_attention_is_not_transferred_with_parameters_that_a_student_was_called_with() -> None:
    student = cnn()
    criterion = CATKD(student, cnn(8), nn.CrossEntropyLoss())
    copies = {name: p.detach().clone().requires_grad_() for name, p in student.named_parameters()}
    outputs = torch.func.functional_call(student, copies, (torch.rand(6, 3, 16, 16).double(),))
    with pytest.raises(e2kd.UnsupportedModel, match="CATKD reads the student's classifier, but"):
        criterion(outputs, torch.arange(6) % 4)


def test_parameters_that_a_bcos_student_is_called_with_get_the_gradient() -> None:
    own, borrowed = own_and_borrowed(bcos_cnn(), bcos_cnn(8, seed=1), torch.rand(6, 3, 16, 16).double(), "call")
    for name, wanted in own.items():
        torch.testing.assert_close(borrowed[name], wanted, rtol=1e-9, atol=1e-12)


def test_what_follows_a_bare_activation_is_not_explained_with_parameters_that_a_student_was_called_with() -> None:
    with pytest.raises(e2kd.UnsupportedModel, match="begins with an activation that is a function"):
        own_and_borrowed(*pair("traced"), torch.rand(6, 3, 16, 16).double(), "call")


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: pair("closed"), {"explainer": e2kd.InputGradient()}),
        (lambda: (bcos_cnn(), bcos_cnn(8, seed=1)), {"fraction": 0.5}),
    ],
    ids=["input gradient", "fraction"],
)
def test_images_are_not_explained_with_parameters_that_a_student_was_called_with(make: Any, settings: Any) -> None:
    with pytest.raises(e2kd.UnsupportedModel, match="ran with other parameters than its own"):
        own_and_borrowed(*make(), torch.rand(6, 3, 16, 16).double(), "call", **settings)


@both
def test_two_accumulated_halves_equal_the_whole_batch(name: str) -> None:
    made = case(name)
    freeze_statistics(made.student)
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    criterion = teach(student, made)
    losses = []
    for which in (0, 1):
        half = made.half(which)
        loss = criterion(student(half.images), half.targets) / 2
        loss.backward()
        losses.append(loss.detach())
    assert_exact(student, losses[0] + losses[1], wanted)


@both
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1), (1, 0)], ids=str)
def test_two_forwards_before_the_loss_are_told_apart(name: str, used: tuple[int, ...]) -> None:
    made = case(name)
    freeze_statistics(made.student)
    reference = made.copy()
    sum(reference_loss(reference, made.half(which)) for which in used).backward()
    student = made.copy()
    criterion = teach(student, made)
    outputs = [student(made.half(which).images) for which in (0, 1)]
    sum(criterion(outputs[which], made.half(which).targets) for which in used).backward()
    assert error(gradient(student), gradient(reference)) < 1e-5


def _pass_under_no_grad(student: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        student(images)


def _pass_in_eval(student: nn.Module, images: Tensor) -> None:
    student.eval()(images)
    student.train()


def _pass_under_inference_mode(student: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        student.eval()(images)
    student.train()


def _copy_runs(student: nn.Module, images: Tensor) -> None:
    copy.deepcopy(student).train()(images)


def _ema_updates_and_runs(student: nn.Module, images: Tensor) -> None:
    ema = timm.utils.ModelEmaV3(student)
    ema.update(student)
    ema.module.train()(images)


def _explain_student(student: nn.Module, images: Tensor) -> None:
    e2kd.explain(student, images)


INTERLUDES = [
    _pass_under_no_grad,
    _pass_in_eval,
    _pass_under_inference_mode,
    _copy_runs,
    _ema_updates_and_runs,
    _explain_student,
]


@both
@pytest.mark.parametrize("interlude", INTERLUDES, ids=lambda f: f.__name__.strip("_"))
def test_what_happens_between_forward_and_loss_changes_nothing(name: str, interlude: Any) -> None:
    made, *wanted = expected(name)
    student = made.copy()
    criterion = teach(student, made)
    outputs = student(made.images)
    interlude(student, made.images.flip(0) * 2)
    loss = criterion(outputs, made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_returns_the_plain_task_loss(name: str, mode: Any) -> None:
    made = case(name)
    student = made.copy()
    criterion = teach(student, made, weight=100.0)
    student.eval()
    with mode():
        outputs = student(made.images)
        loss = criterion(outputs, made.targets)
    assert loss == nn.functional.cross_entropy(outputs, made.targets)
    assert not criterion.parts


@both
def test_criterion_in_eval_mode_returns_the_plain_task_loss(name: str) -> None:
    made = case(name)
    student = made.copy()
    criterion = teach(student, made, weight=100.0).eval()
    outputs = student(made.images)
    with pytest.warns(e2kd.NoEffectWarning, match=r"criterion\.train\(\)"):
        assert criterion(outputs, made.targets) == nn.functional.cross_entropy(outputs, made.targets)


@both
def test_student_in_eval_with_gradients_warns_and_returns_the_task_loss(name: str) -> None:
    made = case(name)
    student = made.copy().eval()
    criterion = teach(student, made)
    outputs = student(made.images)
    with pytest.warns(e2kd.NoEffectWarning, match=r"student\.train\(\)"):
        loss = criterion(outputs, made.targets)
    assert loss == nn.functional.cross_entropy(outputs, made.targets)


@both
def test_frozen_backbone_trains_its_head_exactly(name: str) -> None:
    made = case(name)
    for parameter in made.student.parameters():
        parameter.requires_grad_(False)
    for parameter in made.student.get_classifier().parameters():
        parameter.requires_grad_(True)
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    loss = teach(student, made)(student(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)
    assert {n for n, p in student.named_parameters() if p.grad is not None} <= {
        n for n, p in student.named_parameters() if p.requires_grad
    }


@both
def test_partly_frozen_trunk_is_exact(name: str) -> None:
    made = case(name)
    for part in ("conv1", "bn1", "layer1", "patch_embed"):
        if hasattr(made.student, part):
            getattr(made.student, part).requires_grad_(False)
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    loss = teach(student, made)(student(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)


# Randomness and state


@both
@pytest.mark.parametrize("part", ["drop_rate", "drop_path_rate"])
def test_dropout_and_stochastic_depth_are_exact_in_eager(name: str, part: str) -> None:
    made, *wanted = expected(name, seed=5, **{part: 0.5})
    student = made.copy()
    criterion = teach(student, made)
    torch.manual_seed(5)
    loss = criterion(student(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)
    torch.manual_seed(6)
    _, other = reference_step(made.copy(), made)
    assert error(other, wanted[1]) > 0.01, "the random part took part"


@both
def test_dropout_is_exact_in_every_step_and_for_both_of_two_forwards(name: str) -> None:
    made = case(name, batch=8, drop_rate=0.5)
    reference, student = made.copy(), made.copy()
    criterion = teach(student, made)
    for seed in (1, 2):
        torch.manual_seed(seed)
        sum(reference_loss(reference, made.half(which)) for which in (0, 1)).backward()
        torch.manual_seed(seed)
        outputs = [student(made.half(which).images) for which in (0, 1)]
        sum(criterion(outputs[which], made.half(which).targets) for which in (0, 1)).backward()
        assert error(gradient(student), gradient(reference)) < 1e-5


@both
def test_global_random_stream_is_the_same_with_and_without_the_criterion(name: str) -> None:
    made = case(name, drop_rate=0.3, drop_path_rate=0.3)

    def draws(loss_of: Callable[[nn.Module], Callable[..., Tensor]]) -> Tensor:
        student = made.copy()
        torch.manual_seed(11)
        loss = loss_of(student)
        found = []
        for _ in range(2):
            outputs = student(made.images)
            found.append(torch.rand(3))  # a replay must come back to after this draw
            loss(outputs, made.targets).backward()
            found.append(torch.rand(3))
        return torch.stack(found)

    with_criterion = draws(lambda student: teach(student, made))
    assert torch.equal(with_criterion, draws(lambda student: nn.CrossEntropyLoss()))


class NormHead(nn.Module):
    """BatchNorm and a hidden layer after the pooling: no closed form, so the head is replayed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2))
        self.norm, self.hidden, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.hidden(self.norm(self.trunk(images).mean((2, 3)))).tanh())


def test_batchnorm_statistics_of_a_replayed_head_are_updated_once_per_step() -> None:
    made = case("cnn")
    student, plain = NormHead(), NormHead()
    criterion = teach(student, made)
    for _ in range(3):
        loss = criterion(student(made.images), made.targets)
        loss.backward()
        plain(made.images)
    assert identical(list(student.buffers()), list(plain.buffers()))
    assert student.norm.num_batches_tracked == 3
    assert student.norm.track_running_stats
    assert criterion.explained.way == "replay"


def test_replayed_head_with_batchnorm_is_exact() -> None:
    made = Case(**{**case("cnn").__dict__, "student": NormHead(), "layer": "trunk"}).to(torch.float64)
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    loss = teach(student, made)(student(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted, tolerance=1e-10)


@both
def test_batchnorm_statistics_of_the_student_are_those_of_one_forward(name: str) -> None:
    made = case(name)
    student, plain = made.copy(), made.copy()
    criterion = teach(student, made)
    assert identical(list(made.student.buffers()), list(student.buffers())), "building changes nothing"
    criterion(student(made.images), made.targets).backward()
    plain(made.images)
    assert identical(list(plain.buffers()), list(student.buffers()))


@both
def test_teacher_is_left_as_it_was(name: str) -> None:
    made = case(name)
    teacher = copy.deepcopy(made.teacher).train()
    teacher.layer1.eval()
    before, modes = snapshot(teacher), [module.training for module in teacher.modules()]
    student = made.copy()
    criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss())
    loss = criterion(student(made.images), made.targets)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected(name)[1], rtol=1e-5, atol=0)  # it ran in eval mode
    assert identical(before, snapshot(teacher))
    assert [module.training for module in teacher.modules()] == modes
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in teacher.modules())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


# Copies, files and lifetime


def _pickled(student: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _ema(student: nn.Module) -> nn.Module:
    return timm.utils.ModelEmaV3(student).module.train()


@both
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, _pickled, _ema])
def test_copies_of_a_hooked_student_run_and_are_inert(name: str, copied: Any) -> None:
    made, *wanted = expected(name)
    student = made.copy()
    criterion = teach(student, made)
    outputs = student(made.images)
    twin = copied(student).requires_grad_(True)
    torch.testing.assert_close(twin(made.images), student(made.images))
    with pytest.raises(RuntimeError, match="without a training forward"):
        criterion(twin(made.images), made.targets)
    loss = criterion(outputs, made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)


@both
def test_copy_of_a_hooked_student_gets_its_own_criterion(name: str) -> None:
    made, *wanted = expected(name)
    first = made.copy()
    criterion = teach(first, made)
    second = copy.deepcopy(first)
    other = teach(second, made)
    del criterion
    loss = other(second(made.images), made.targets)
    loss.backward()
    assert_exact(second, loss, wanted)


@pytest.mark.parametrize("steps", [0, 1])
def test_criterion_can_be_copied_but_not_pickled(steps: int) -> None:
    made = case("cnn")
    student = made.copy()
    criterion = teach(student, made)
    for _ in range(steps):
        criterion(student(made.images), made.targets)
    copied = copy.deepcopy(criterion)
    with torch.no_grad():
        assert copied(student(made.images), made.targets) > 0
    with pytest.raises(TypeError, match="build the criterion anew"):
        pickle.dumps(criterion)


@both
def test_state_dict_and_names_of_the_student_are_untouched(name: str) -> None:
    made = case(name)
    student = made.copy()
    criterion = teach(student, made)
    criterion(student(made.images), made.targets).backward()
    assert list(student.state_dict()) == list(made.student.state_dict())
    assert [n for n, _ in student.named_modules()] == [n for n, _ in made.student.named_modules()]
    torch.save(student.state_dict(), file := io.BytesIO())
    file.seek(0)
    made.copy().load_state_dict(torch.load(file, weights_only=True))


@both
def test_criterion_owns_no_parameter_buffer_or_module(name: str) -> None:
    made = case(name)
    criterion = teach(made.copy(), made)
    criterion.load_state_dict(criterion.state_dict())
    assert not criterion.state_dict()
    assert not list(criterion.parameters())
    assert not list(criterion.buffers())
    assert all(type(m) in (e2kd.E2KDLoss, nn.CrossEntropyLoss) for m in criterion.modules())


def _hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@both
def test_remove_takes_every_hook_off_and_leaves_mode_and_gradients(name: str) -> None:
    made = case(name)
    student = made.copy()
    student.get_classifier().eval()
    modes = [module.training for module in student.modules()]
    criterion = teach(student, made)
    criterion(student(made.images), made.targets).backward()
    assert _hooks(student) > 0
    student(made.images)
    before = snapshot(student)
    criterion.remove()
    assert _hooks(student) == 0
    assert identical(before, snapshot(student))
    assert [module.training for module in student.modules()] == modes
    assert set(vars(student)) == set(vars(made.student))
    with pytest.raises(RuntimeError, match="without a training forward"):
        criterion(student(made.images), made.targets)


@both
def test_deleting_the_criterion_removes_its_hooks(name: str) -> None:
    made = case(name)
    student = made.copy()
    criterion = teach(student, made)
    criterion(student(made.images), made.targets).backward()
    del criterion
    gc.collect()
    assert _hooks(student) == 0


@both
def test_student_and_teacher_are_freed_with_the_criterion(name: str) -> None:
    made = case(name)
    student, teacher = made.copy(), copy.deepcopy(made.teacher)
    criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss())
    criterion(student(made.images), made.targets).backward()
    alive = weakref.ref(student), weakref.ref(teacher)
    del student, teacher, criterion
    gc.collect()
    assert [ref() is None for ref in alive] == [True, True]


class Watch:
    """Weak references to what a layer returned, call by call."""

    def __init__(self, student: nn.Module, layer: str) -> None:
        self.seen: list[weakref.ref[Tensor]] = []
        student.get_submodule(layer).register_forward_hook(lambda m, a, o: self.seen.append(weakref.ref(o)))

    def alive(self) -> list[bool]:
        gc.collect()
        return [ref() is not None for ref in self.seen]


@both
def test_forwards_without_a_loss_keep_at_most_one_graph(name: str) -> None:
    made = case(name)
    student = made.copy()
    criterion = teach(student, made)
    watch = Watch(student, made.layer)
    for _ in range(3):
        student(made.images)
    assert sum(watch.alive()) <= 1
    assert criterion.training


@both
def test_nothing_is_kept_after_the_loss(name: str) -> None:
    made = case(name)
    student = made.copy()
    criterion = teach(student, made)
    watch = Watch(student, made.layer)
    criterion(student(made.images), made.targets).backward()
    assert watch.alive() == [False]


@both
def test_nothing_is_kept_after_the_backward_of_a_checkpointed_model(name: str) -> None:
    made = case(name)
    student = made.copy()
    criterion = teach(student, made)
    watch = Watch(student, made.layer)
    criterion(checkpoint(student, made.images, use_reentrant=False), made.targets).backward()
    assert watch.alive() == [False, False]  # the layer ran once more in backward


@both
def test_evaluation_passes_keep_nothing(name: str) -> None:
    made = case(name)
    student = made.copy()
    criterion = teach(student, made)
    watch = Watch(student, made.layer)
    with torch.no_grad():
        criterion(student(made.images), made.targets)
    student.eval()
    student(made.images)
    with torch.inference_mode():
        criterion(student(made.images), made.targets)
    assert watch.alive() == [False] * 3


# torch.compile


def _compiled(student: nn.Module, way: str) -> nn.Module:
    if way == "function":
        return torch.compile(student, backend="aot_eager", fullgraph=True)
    student.compile(backend="aot_eager", fullgraph=True)
    return student


@both
@pytest.mark.parametrize("way", ["function", "method"])
@pytest.mark.parametrize("order", ["criterion_first", "compile_first"])
def test_compiled_student_is_exact_without_graph_breaks(name: str, way: str, order: str) -> None:
    made, *wanted = expected(name)
    student = made.copy()
    if order == "criterion_first":
        criterion = teach(student, made)
        model = _compiled(student, way)
    else:
        model = _compiled(student, way)
        criterion = teach(model, made)
    for _ in range(2):
        student.zero_grad()
        loss = criterion(model(made.images), made.targets)
        loss.backward()
        assert_exact(student, loss, wanted)
        with torch.no_grad():
            model(made.images)


@both
def test_a_step_that_is_compiled_as_a_whole_is_exact(name: str) -> None:
    """As Lightning compiles a module; the criterion's first call would else be traced with its search for layers."""
    made, *wanted = expected(name)
    student = made.copy()
    criterion = teach(student, made)
    step = torch.compile(lambda images, targets: criterion(student(images), targets), backend="aot_eager")
    loss = step(made.images, made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)


def test_compiled_student_under_autocast_with_outputs_cast_by_the_host_has_the_float32_direction() -> None:
    made, _, wanted = _precise("vit")
    student = made.copy()
    criterion = teach(student, made)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = torch.compile(student, backend="aot_eager")(made.images).float()
    criterion(outputs, made.targets).backward()
    assert cosine(gradient(student), wanted) > 0.999


@pytest.mark.parametrize("name", ["vit"])
@pytest.mark.parametrize("way", ["trunk", "blocks", "wrapped_blocks"])
@pytest.mark.parametrize("order", ["criterion_first", "compile_first"])
def test_partly_compiled_student_is_exact(name: str, way: str, order: str) -> None:
    made, *wanted = expected(name)
    student = made.copy()
    if order == "criterion_first":
        criterion = teach(student, made)
    if way == "trunk":
        student.forward_features = torch.compile(student.forward_features, backend="aot_eager")
    else:
        for index, block in enumerate(student.blocks):
            if way == "blocks":
                block.compile(backend="aot_eager")
            else:
                student.blocks[index] = torch.compile(block, backend="aot_eager")
    if order == "compile_first":
        criterion = teach(student, made)
    loss = criterion(student(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)


def _small_case() -> Case:
    return Case(**{**case("cnn").__dict__, "student": small(), "layer": "3"})


@pytest.mark.slow
def test_student_compiled_by_inductor_is_exact() -> None:
    made = _small_case()
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    criterion = teach(student, made)
    model = torch.compile(student, fullgraph=True)
    loss = criterion(model(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)


def test_graph_break_before_the_head_is_exact() -> None:
    made = _small_case()
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    student[4].forward = torch._dynamo.disable(student[4].forward)
    criterion = teach(student, made)
    loss = criterion(torch.compile(student, backend="aot_eager")(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)


@pytest.mark.parametrize(("name", "part"), [("vit", "drop_path_rate"), ("cnn", "drop_rate")])
def test_random_head_inside_a_compiled_student_is_refused(name: str, part: str) -> None:
    made = case(name, **{part: 0.9})
    student = made.copy()
    criterion = teach(student, made)
    outputs = torch.compile(student, backend="aot_eager")(made.images)
    before = snapshot(student)
    with pytest.raises(e2kd.UnsupportedModel, match="dropout or stochastic depth inside a"):
        criterion(outputs, made.targets)
    assert identical(before, snapshot(student))


@pytest.mark.parametrize("used", [0, 1])
def test_two_forwards_of_a_compiled_student_are_exact_or_refused(used: int) -> None:
    made = _small_case()
    student = made.copy()
    criterion = teach(student, made)
    model = torch.compile(student, backend="aot_eager")
    outputs = [model(made.half(which).images) for which in (0, 1)]
    if used == 0:
        with pytest.raises((RuntimeError, e2kd.UnsupportedModel), match="two forwards"):
            criterion(outputs[0], made.half(0).targets)
        return
    reference = made.copy()
    wanted = reference_step(reference, made.half(1))
    loss = criterion(outputs[1], made.half(1).targets)
    loss.backward()
    assert_exact(student, loss, wanted)


def test_code_compiled_for_another_model_of_the_class_is_not_run_again() -> None:
    made = _small_case()
    wanted = reference_step(made.copy(), made)
    torch.compile(made.copy(), backend="aot_eager")(made.images)  # nothing listens to this one
    student = made.copy()
    criterion = teach(student, made)
    model = torch.compile(student, backend="aot_eager")
    loss = criterion(model(made.images), made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)


def test_code_of_a_model_compiled_after_the_criterion_was_built_is_refused() -> None:
    made = _small_case()
    student = made.copy()
    criterion = teach(student, made)
    torch.compile(made.copy(), backend="aot_eager")(made.images)
    with pytest.raises(RuntimeError, match="another model of this class was compiled"):
        criterion(torch.compile(student, backend="aot_eager")(made.images), made.targets)


def test_eager_forward_before_a_compiled_one_is_told_apart() -> None:
    made = _small_case()
    wanted = reference_step(made.copy(), made)
    student = made.copy()
    criterion = teach(student, made)
    outputs = student(made.images)
    torch.compile(student, backend="aot_eager")(made.images.flip(0) * 2)
    loss = criterion(outputs, made.targets)
    loss.backward()
    assert_exact(student, loss, wanted)


def test_eager_forward_after_a_compiled_one_makes_the_first_refused() -> None:
    made = _small_case()
    student = made.copy()
    criterion = teach(student, made)
    outputs = torch.compile(student, backend="aot_eager")(made.images)
    student(made.images.flip(0) * 2)
    with pytest.raises((RuntimeError, e2kd.UnsupportedModel), match=r"once per forward|two forwards"):
        criterion(outputs, made.targets)


# What looking at a model must not change


class DrawsInEval(nn.Module):
    """Monte Carlo dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.3, training=True)


def test_looking_for_a_layer_draws_no_random_numbers() -> None:
    student, teacher = small(), small()
    student.insert(len(student) - 1, DrawsInEval())
    before = torch.get_rng_state()
    e2kd.E2KDLoss(student, teacher)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_that_somebody_patched_stays_patched() -> None:
    model = timm.create_model("test_resnet", num_classes=5).eval()
    own = model.forward_head
    model.forward_head = lambda x, pre_logits=False: 10 * own(x, pre_logits=pre_logits)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        e2kd.explain(model, images)
        e2kd.E2KDLoss(timm.create_model("test_resnet", num_classes=5), model)
        assert torch.equal(model(images), before)


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), torchvision.transforms.Normalize([0.5], [0.5], inplace=True)])
def test_a_model_that_changes_its_images_in_place_is_refused(first: nn.Module) -> None:
    with pytest.raises(e2kd.UnsupportedModel, match="changes the images it is given in place"):
        e2kd.E2KDLoss(nn.Sequential(first, *small()), small())
    images = torch.rand(2, 3, 16, 16) - 0.5
    before = images.clone()
    with pytest.raises(e2kd.UnsupportedModel, match="changes the images it is given in place"):
        e2kd.explain(nn.Sequential(first, *small()), images)
    assert torch.equal(images, before)


def test_a_student_wrapped_by_the_first_fsdp_is_refused() -> None:
    """Told by the class's name: making one asks for a process group."""
    wrapped = type("FullyShardedDataParallel", (nn.Sequential,), {})(*small())
    with pytest.raises(e2kd.UnsupportedModel, match="fully_shard"):
        e2kd.E2KDLoss(wrapped, small())
