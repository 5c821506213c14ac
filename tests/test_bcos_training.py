"""Training with W(x): the papers' whole step, every way to the same gradient, fractions, hosts, encodings, refusals."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import cosine as direction
from reference import gradient
from safetensors.torch import load_file
from test_bcos_networks import assert_equal, explained, part
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import e2kd
from e2kd import bcos
from e2kd.bcos import AddInverse, BasicBlock, BcosConv2d
from e2kd.bcos.mode import current_mode
from e2kd.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
Shared = Callable[[str], Path]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHARED, SEPARATE = e2kd.BcosWeights(passes="shared"), e2kd.BcosWeights(passes="separate")
BUILD: dict[str, Callable[[], nn.Module]] = {
    "cnn": lambda: bcos.BcosResNet(BasicBlock, (1, 1), 5, width=4, small_images=True),
    "densenet": lambda: bcos.BcosDenseNet((2, 1), 5, growth=2, width=4, small_images=True),
    "vit": lambda: bcos.bcos_vit(8, 2, 2, 5, patch_size=4),
}


def net(kind: str = "cnn", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BUILD[kind]().double()


def colours(count: int = 4, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def encoded(count: int = 4, size: int = 16) -> Tensor:
    return AddInverse()(colours(count, size))


def standard(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.Softplus(), nn.Conv2d(6, 6, 3, 2, 1), nn.Softplus(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).double()  # fmt: skip


def reference_loss(student: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    """KL and 1 - cosine of W(x), from the layers alone."""
    x = x.clone().requires_grad_()
    with torch.no_grad():
        theirs = teacher.eval()(x)
    classes = theirs.argmax(1)
    _, wanted = explained(teacher, x, classes)
    logits, w = explained(student, x, classes, create_graph=True)
    kl = (theirs.softmax(1) * (theirs.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()
    return kl + (1 - cosine_similarity(w.flatten(1), wanted.flatten(1), eps=0)).mean()


def step(
    student: nn.Module, teacher: Any, x: Tensor, targets: Any = None, **settings: Any
) -> tuple[Tensor, Tensor, e2kd.E2KDLoss]:
    """Loss, gradient and criterion of one step."""
    criterion = e2kd.E2KDLoss(student, teacher, **({"example": x} | settings))
    loss = criterion(student(x), targets)
    loss.backward()
    return loss.detach(), gradient(student), criterion


def reference_step(student: nn.Module, teacher: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    loss = reference_loss(student, teacher, x)
    loss.backward()
    return loss.detach(), gradient(student)


# The same step, whichever way


@pytest.mark.parametrize("explainer", [None, SHARED, SEPARATE], ids=["default", "shared", "separate"])
def test_equal_a_whole_training_step_of_the_paper(shared: Shared, explainer: Any) -> None:
    """Loss, its parts and all gradients of KD + 5 e²KD by the papers' code; that of the logits is the ordinary one."""
    golden = load_file(shared("golden/e2kd/e2kd_bcos_step.safetensors"))
    student = bcos.BcosResNet(BasicBlock, (1, 1, 1, 1), 5, width=4).double()
    teacher = bcos.BcosResNet(BasicBlock, (1, 2, 1, 1), 5, width=4).double()
    student.load_state_dict(part(golden, "student."))
    teacher.load_state_dict(part(golden, "teacher."))
    x = golden["x"]
    _, _, criterion = step(student, teacher, x, explainer=explainer, temperature=2, weight=5)
    assert criterion.explained.way == ("separate" if explainer is SEPARATE else "shared")
    assert not x.requires_grad
    for value, key in {"kd": "kd_loss", "explanation": "exp_loss", "loss": "loss"}.items():
        assert_equal(criterion.parts[value], golden[key])
    for key, p in student.named_parameters():
        assert p.grad is not None
        assert_equal(p.grad, golden[f"grad.{key}"])
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("inside", [False, True], ids=["encoded outside", "encoded inside"])
@pytest.mark.parametrize("explainer", [SHARED, SEPARATE], ids=["shared", "separate"])
@pytest.mark.parametrize("kind", BUILD)
def test_equal_the_layers_own_explanations(kind: str, explainer: e2kd.Explainer, inside: bool) -> None:
    student, teacher = net(kind), net(kind, seed=1)
    loss, wanted = reference_step(copy.deepcopy(student), copy.deepcopy(teacher), encoded())
    buffers = copy.deepcopy(dict(student.named_buffers()))
    model, images = (nn.Sequential(AddInverse(), student), colours()) if inside else (student, encoded())
    found, mine, _ = step(model, teacher, images, explainer=explainer)
    assert_equal(found, loss)
    assert_equal(mine, wanted)
    if kind == "cnn":  # statistics count once
        assert int(student.bn1.num_batches_tracked) == int(buffers["bn1.num_batches_tracked"]) + 1


def test_loss_of_a_network_with_itself_is_zero() -> None:
    student = net("vit")
    loss, _, criterion = step(student, copy.deepcopy(student), encoded(), kd_weight=0)
    assert loss.abs() < 1e-12
    assert criterion.parts["cosine"] == pytest.approx(1)


def test_weights_times_image_is_the_logit() -> None:
    model = net()
    model(encoded())
    found = e2kd.explain(model, encoded())
    scores = found.logits.gather(1, found.classes[:, None])[:, 0] - model.logit_layer.bias
    assert found.maps.shape == (4, 6, 16, 16)
    assert_equal((found.maps * encoded()).flatten(1).sum(1), scores)
    parts = e2kd.explain(model, encoded(), explainer=e2kd.BcosContributions(4))
    assert_equal(parts.maps, F.avg_pool2d((found.maps * encoded()).sum(1, keepdim=True), 4).relu())
    inside = e2kd.explain(nn.Sequential(AddInverse(), model), colours())
    assert_equal(inside.maps, found.maps)


def test_weights_shift_with_the_image_where_the_network_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        BcosConv2d(6, 4, 3, 2, 1, padding_mode="circular"), BcosConv2d(4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    still = e2kd.explain(model, encoded())
    moved = e2kd.explain(model, encoded().roll((4, 8), (2, 3)), still.classes)
    assert_equal(moved.maps, still.maps.roll((4, 8), (2, 3)))


@pytest.mark.parametrize("resolution", [4, (4, 8)])
def test_weights_are_compared_at_a_resolution(resolution: Any) -> None:
    seen: list[Tensor] = []

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        seen.extend((a, b))
        return e2kd.cosine(a, b)

    student, teacher = net(), net(seed=1)
    step(student, teacher, encoded(), explainer=e2kd.BcosWeights(resolution), similarity=similarity)
    size = (4, 4) if resolution == 4 else resolution
    assert all(maps.shape == (4, 6, *size) for maps in seen)
    whole = e2kd.explain(teacher, encoded()).maps
    assert_equal(seen[1], F.adaptive_avg_pool2d(whole, size))


def test_several_classes_share_one_pass() -> None:
    student, teacher = net(), net(seed=1)
    runs = count_images(student)
    _, _, criterion = step(student, teacher, encoded(), classes=2)
    assert runs == [4]
    assert criterion.parts["explanation"] > 0


@pytest.mark.parametrize("inside", [False, True], ids=["encoded outside", "encoded inside"])
@pytest.mark.parametrize("second", [{}, {"fraction": 0.5}, {"explainer": e2kd.GradCAM()}], ids=str)
@pytest.mark.parametrize("first", [{}, {"fraction": 0.5}], ids=str)
def test_two_criteria_of_one_student_share_its_pass(
    first: dict[str, Any], second: dict[str, Any], inside: bool
) -> None:
    """Two teachers, each with its own way, give the sum of both gradients; nothing is left on."""
    wanted, losses = [], []
    for seed, settings in ((1, first), (2, second)):
        alone = nn.Sequential(AddInverse(), net()) if inside else net()
        torch.manual_seed(0)
        loss, found, _ = step(alone, net(seed=seed), colours() if inside else encoded(), **settings)
        wanted.append(found)
        losses.append(loss)
    student = nn.Sequential(AddInverse(), net()) if inside else net()
    x = colours() if inside else encoded()
    torch.manual_seed(0)
    criteria = [e2kd.E2KDLoss(student, net(seed=n), example=x, **s) for n, s in ((1, first), (2, second))]
    outputs = student(x)
    assert current_mode() is None
    total = sum(criterion(outputs) for criterion in criteria)
    total.backward()
    assert all(criterion.explained.way != "separate" for criterion in criteria), "nobody pays for a pass of its own"
    assert_equal(total.detach(), sum(losses))
    assert_equal(gradient(student), sum(wanted))


# A share of the batch


def count_images(model: nn.Module) -> list[int]:
    """How many images every forward of a model is given from now on."""
    runs: list[int] = []
    model.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    return runs


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("passes", [None, "shared", "separate"])
def test_a_fraction_is_unbiased_in_value_and_gradient(kind: str, passes: str | None) -> None:
    """The mean over all draws is the whole; in train mode, with the statistics of the whole batch."""
    whole = net(kind)
    teacher = net(kind, seed=1)
    loss, wanted, _ = step(whole, teacher, encoded())
    draws = list(itertools.combinations(range(4), 1))
    losses, gradients = [], []
    for draw in draws:
        student = net(kind)
        criterion = e2kd.E2KDLoss(
            student, teacher, explainer=e2kd.BcosWeights(passes=passes), fraction=0.25, example=encoded()
        )
        criterion._rows = lambda *_, draw=draw: torch.tensor(draw)  # type: ignore[method-assign]
        value = criterion(student(encoded()))
        value.backward()
        assert criterion.explained.way == ("shared" if passes == "shared" else "drawn")
        losses.append(value.detach())
        gradients.append(gradient(student))
    assert_equal(torch.stack(losses).mean(0), loss)
    assert_equal(torch.stack(gradients).mean(0), wanted)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6


def test_a_fraction_runs_what_was_drawn_alone() -> None:
    student, teacher = net(), net(seed=1)
    runs, asked = count_images(student), count_images(teacher)
    _, _, criterion = step(student, teacher, encoded(8), fraction=0.25)
    assert runs == [8, 2]
    assert asked == [2, 6]
    assert criterion.parts["explanation"] > 0


def test_logits_of_drawn_and_other_samples_are_the_teachers() -> None:
    student, teacher = net("vit"), net("vit", seed=1)
    seen: list[Tensor] = []

    def distillation(mine: Tensor, theirs: Tensor) -> Tensor:
        seen.append(theirs)
        return mine.sum() * 0

    step(student, teacher, encoded(8), fraction=0.25, distillation=distillation)
    assert_equal(seen[0], teacher(encoded(8)).detach())


def test_samples_that_need_their_batch_are_run_with_it() -> None:
    """Dropout draws for the whole batch; a standard batch norm keeps no statistics."""
    teacher = net(seed=1)
    for layer in (nn.Dropout(0.5), nn.BatchNorm2d(4).double()):
        student = net()
        student.pool = layer
        runs = count_images(student)
        torch.manual_seed(3)
        loss, mine, criterion = step(student, teacher, encoded(8), explainer=SEPARATE, fraction=0.25)
        assert runs[-2:] == [8, 8]
        assert criterion.explained.way == "separate"
        other = net()
        other.pool = copy.deepcopy(layer)
        torch.manual_seed(3)
        found, theirs, _ = step(other, teacher, encoded(8), explainer=SHARED, fraction=0.25)
        assert_equal(found, loss)
        assert_equal(mine, theirs)


@pytest.mark.parametrize(
    ("settings", "explained"),
    [({"every": 3}, [0, 3]), ({"during": (1, 3)}, [1, 2]), ({"during": (1, 9), "every": 2}, [1, 3])],
    ids=str,
)
def test_steps_without_an_explanation_cost_nothing(settings: dict[str, Any], explained: list[int]) -> None:
    student, teacher = net(), net(seed=1)
    criterion = e2kd.E2KDLoss(student, teacher, example=encoded(), **settings)
    entering: list[bool] = []
    student.conv1.register_forward_pre_hook(lambda module, args: entering.append(args[0].requires_grad))
    for step in range(4):
        criterion(student(encoded())).backward()
        assert criterion.explained.way == "shared"
        assert bool(criterion.parts["explanation"]) == (step in explained)
    assert entering == [step in explained for step in range(4)]


def test_the_weight_may_change_between_steps() -> None:
    """Every step is that of a criterion which had the weight from the start, whether or not its forward expected it."""
    student, teacher = net(), net(seed=1)
    criterion = e2kd.E2KDLoss(student, teacher, weight=0.0, example=encoded())
    ways = []
    for weight in (0.0, 5.0, 5.0, 0.0, 0.0):
        criterion.weight = weight
        student.zero_grad()
        loss = criterion(student(encoded()))
        loss.backward()
        ways.append(criterion.explained.way)
        wanted, slopes, _ = step(net(), teacher, encoded(), weight=weight)
        assert_equal(loss.detach(), wanted)
        assert_equal(gradient(student), slopes)
    assert ways[1:3] == ["separate", "shared"], "the first one was not prepared for"


# Hosts


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, *, reentrant: bool = False) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("settings", [{}, {"fraction": 0.25}], ids=str)
def test_checkpointed_parts_give_the_same_gradient(settings: dict[str, Any]) -> None:
    teacher = net(seed=1)
    torch.manual_seed(0)
    loss, wanted, _ = step(net(), teacher, encoded(), **settings)
    student = net()
    student.layer1 = Checkpointed(student.layer1)
    torch.manual_seed(0)
    found, mine, _ = step(student, teacher, encoded(), **settings)
    assert_equal(found, loss)
    assert_equal(mine, wanted)


@pytest.mark.parametrize("inside", [False, True], ids=["encoded outside", "encoded inside"])
def test_a_checkpointed_student_is_explained_by_a_second_pass(inside: bool) -> None:
    teacher, student = net(seed=1), net()
    student, x = (nn.Sequential(AddInverse(), student), colours()) if inside else (student, encoded())
    loss, wanted, _ = step(copy.deepcopy(student), teacher, x)
    criterion = e2kd.E2KDLoss(student, teacher, example=x)
    found = criterion(checkpoint(student, x, use_reentrant=False))
    found.backward()
    assert criterion.explained.way == "separate"
    assert_equal(found.detach(), loss)
    assert_equal(gradient(student), wanted)


def test_reentrant_checkpointing_is_refused() -> None:
    student = net()
    student.layer1 = Checkpointed(student.layer1, reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        step(student, net(seed=1), encoded())


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("where", ["around", "inside", "inside, float32 out"])
def test_under_autocast_the_explanation_is_computed_in_float32(where: str, fraction: float) -> None:
    student, teacher, x = net().float(), net(seed=1).float(), encoded().float()
    torch.manual_seed(0)
    _, wanted, _ = step(copy.deepcopy(student), teacher, x, fraction=fraction)
    types: set[torch.dtype] = set()

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        types.update((a.dtype, b.dtype))
        return e2kd.cosine(a, b)

    torch.manual_seed(0)
    criterion = e2kd.E2KDLoss(student, teacher, similarity=similarity, fraction=fraction, example=x)
    if where != "around":  # as Accelerate does
        student._original_forward = student.forward
        student.forward = torch.autocast("cpu", torch.bfloat16)(student.forward)
    if where == "inside, float32 out":
        inside = student.forward
        student.forward = lambda images: inside(images).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        outputs = student(x)
        loss = criterion(outputs, None)
    loss.backward()
    assert outputs.dtype == (torch.float32 if where == "inside, float32 out" else torch.bfloat16)
    assert types == {torch.float32}
    assert criterion.explained.way == ("separate" if fraction == 1 else "drawn")
    assert direction(gradient(student), wanted) > 0.98


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_a_compiled_student_is_explained_by_a_second_pass(fraction: float) -> None:
    student, teacher = net("vit"), net("vit", seed=1)
    torch.manual_seed(0)
    loss, wanted, _ = step(copy.deepcopy(student), teacher, encoded(), fraction=fraction)
    torch.manual_seed(0)
    criterion = e2kd.E2KDLoss(student, teacher, fraction=fraction, example=encoded())
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    found = criterion(compiled(encoded()))
    found.backward()
    torch._dynamo.reset()
    assert criterion.explained.way == ("separate" if fraction == 1 else "drawn")
    assert_equal(found.detach(), loss)
    assert_equal(gradient(student), wanted)


def test_a_student_of_which_a_part_is_compiled_is_explained_by_a_second_pass() -> None:
    student, teacher = net(), net(seed=1)
    loss, wanted, _ = step(copy.deepcopy(student), teacher, encoded())
    student.layer1.compile(backend="aot_eager")
    found, mine, criterion = step(student, teacher, encoded())
    torch._dynamo.reset()
    assert criterion.explained.way == "separate"
    assert_equal(found, loss)
    assert_equal(mine, wanted)


def test_accumulated_gradients_are_those_of_the_parts() -> None:
    """Two forwards before their losses, and evaluation in between."""
    student, teacher = net("vit"), net("vit", seed=1)
    _, wanted, _ = step(copy.deepcopy(student), teacher, encoded(4))
    criterion = e2kd.E2KDLoss(student, teacher, example=encoded())
    first, second = student(encoded()[:2]), student(encoded()[2:])
    student.eval()
    with torch.no_grad():
        criterion(student(encoded()), torch.zeros(4, dtype=torch.long))
    student.train()
    for part_of in (second, first):
        (criterion(part_of) / 2).backward()
    assert_equal(gradient(student), wanted)


def test_copies_carry_nothing_and_removal_leaves_nothing() -> None:
    student, teacher = net(), net(seed=1)
    criterion = e2kd.E2KDLoss(student, teacher, example=encoded())
    copied, pickled = copy.deepcopy(student), pickle.loads(pickle.dumps(student))
    entering: list[bool] = []
    for other in (copied, pickled):
        other.conv1.register_forward_pre_hook(lambda module, args: entering.append(args[0].requires_grad))
        other(encoded())
    assert entering == [False, False]
    criterion.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


@pytest.mark.parametrize("method", [e2kd.E2KDLoss, e2kd.baselines.AT])
def test_the_teacher_is_given_the_same_images_wherever_the_students_are_encoded(method: Any) -> None:
    """Its own normalisation is known, and that a network which encodes images itself takes them in [0, 1]."""

    def seen(student: nn.Module, x: Tensor) -> Tensor:
        teacher, given = standard(), list[Tensor]()
        teacher.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}  # type: ignore[assignment]
        criterion = method(student, teacher)
        teacher.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        criterion(student(x))
        return given[-1]

    inside = nn.Sequential(AddInverse(), net())
    assert torch.equal(seen(inside, colours()), seen(net(), encoded()))
    with pytest.raises(ValueError, match=r"student is a B-cos network, which expects images in \[0, 1\]"):
        seen(inside, 3 * colours())


def test_no_mode_is_left_when_the_student_fails() -> None:
    student, teacher = net(), net(seed=1)
    _, wanted, _ = step(copy.deepcopy(student), teacher, encoded())
    criterion = e2kd.E2KDLoss(student, teacher, example=encoded())
    with pytest.raises(ValueError, match="AddInverse"):
        student(colours())
    assert current_mode() is None
    criterion(student(encoded())).backward()
    assert_equal(gradient(student), wanted)


@pytest.mark.parametrize("settings", [{}, {"fraction": 0.25}], ids=str)
def test_nothing_of_a_step_outlives_it(settings: dict[str, Any]) -> None:
    student, teacher = net(), net(seed=1)
    criterion = e2kd.E2KDLoss(student, teacher, example=encoded(), **settings)
    alive: list[weakref.ref[Tensor]] = []
    student.conv1.register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    teacher.conv1.register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    criterion(student(encoded())).backward()
    gc.collect()
    assert len(alive) > 1
    assert not [ref for ref in alive if ref() is not None]


def test_images_of_the_trainer_stay_as_they_are() -> None:
    student, teacher, x = net(), net(seed=1), encoded()
    step(student, teacher, x)
    assert not x.requires_grad
    assert x.grad is None
    x.requires_grad_()
    step(student, teacher, x)
    assert x.grad is not None  # the trainer asked for it


# Every model its own images


def test_a_bcos_teacher_beside_a_standard_student() -> None:
    """Normalised colours for the student, (x, 1 - x) for the teacher; GradCAM beside contributions."""
    student, teacher = standard(), net()
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in IMAGENET)
    given: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    criterion = e2kd.E2KDLoss(student, teacher, input_normalization=IMAGENET, example=colours())
    criterion(student((colours() - mean) / std)).backward()
    assert isinstance(criterion.explainer, e2kd.GradCAM)
    assert isinstance(criterion.teacher.explainer, e2kd.BcosContributions)
    torch.testing.assert_close(given[0], encoded(), rtol=0, atol=1e-12)
    assert criterion.parts["explanation"] > 0


def test_a_bcos_student_beside_a_standard_teacher() -> None:
    """The teacher is given the colours, normalised as it expects them, whether the student's came encoded or not."""
    teacher = standard()
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in IMAGENET)
    given: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    losses = []
    for student, x in ((net(), encoded()), (nn.Sequential(AddInverse(), net()), colours())):
        settings: dict[str, Any] = {"teacher_normalization": IMAGENET, "input_normalization": ((0.0,) * 3, (1.0,) * 3)}
        loss, _, criterion = step(student, teacher, x, **settings)
        losses.append(loss)
        assert isinstance(criterion.explainer, e2kd.BcosContributions)
        torch.testing.assert_close(given[-1], (colours() - mean) / std, rtol=0, atol=1e-12)
    assert_equal(*losses)


def test_explainers_are_chosen_by_the_model() -> None:
    for model, kind in ((net(), e2kd.BcosWeights), (net("vit"), e2kd.BcosWeights), (standard(), e2kd.GradCAM)):
        criterion = e2kd.E2KDLoss(model, copy.deepcopy(model))
        assert isinstance(criterion.explainer, kind)
        assert isinstance(criterion.teacher.explainer, kind)
    _, mine, both = step(net(), standard(), encoded(), explainer=e2kd.GradCAM())
    assert isinstance(both.teacher.explainer, e2kd.GradCAM)
    assert mine.isfinite().all()


def test_check_reports_a_bcos_pair() -> None:
    x = encoded(8)
    report = e2kd.check(net(), net(seed=1), x)
    assert report.ok, report.problems
    assert (report.way, report.student.layer, report.student.grid) == ("shared", "images", (16, 16))
    assert 1.5 < report.cost < 2.2
    assert "its own forward" in str(report)
    mixed = e2kd.check(nn.Sequential(AddInverse(), net()), standard(), colours(8))
    assert mixed.ok, mixed.problems


# Frozen


def pixels(count: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return TensorDataset(images, torch.arange(count) % 5)


@pytest.mark.parametrize("size", [8, 56])
def test_a_frozen_step_is_the_live_one_at_that_resolution(tmp_path: Path, size: int) -> None:
    teacher, dataset = net(seed=1).float(), pixels()
    frozen = e2kd.freeze(teacher, dataset, tmp_path, map_size=size, map_type="int8", progress=False)
    assert frozen is not None
    assert frozen.explainer == e2kd.BcosWeights()
    assert frozen.verify(teacher, dataset).ok
    images, taught = next(iter(torch.utils.data.DataLoader(e2kd.FrozenDataset(dataset, frozen), 16)))
    assert taught.maps.shape == (16, 6, min(size, 16), min(size, 16))
    found = []
    for source, targets in ((teacher, None), (frozen, taught)):
        student = nn.Sequential(AddInverse(), net().float())
        settings: dict[str, Any] = {} if source is frozen else {"explainer": e2kd.BcosWeights(size)}
        loss, mine, _ = step(student, source, images / 255, targets, **settings)
        found.append((loss, mine))
    (live, wanted), (cold, mine) = found
    torch.testing.assert_close(cold, live, rtol=2e-3, atol=2e-4)
    assert direction(mine, wanted) > 0.999


def test_augmentation_moves_weights_with_the_image(tmp_path: Path) -> None:
    """W(x) of a flipped image is the flipped W(x), channel by channel, for a network that sees no sides."""
    kornia = pytest.importorskip("kornia.augmentation")
    torch.manual_seed(0)
    teacher = nn.Sequential(
        AddInverse(), BcosConv2d(6, 8, 1), nn.AvgPool2d(2), BcosConv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    dataset = pixels()
    frozen = e2kd.freeze(teacher, dataset, tmp_path, progress=False)
    assert frozen is not None
    augment = e2kd.JointAugmentation(kornia.RandomHorizontalFlip(p=1.0))
    images, taught = next(iter(torch.utils.data.DataLoader(e2kd.FrozenDataset(dataset, frozen), 16)))
    flipped, moved = augment(images / 255, taught)
    live = e2kd.explain(teacher, flipped, taught.classes).maps
    assert (e2kd.cosine(moved.maps, live) > 0.999).all()


def test_a_cache_remembers_the_resolution_of_its_maps(tmp_path: Path) -> None:
    teacher, dataset = net(seed=1).float(), pixels()
    for explainer in (e2kd.BcosWeights(4), e2kd.BcosContributions((4, 8)), e2kd.BcosContributions(None)):
        frozen = e2kd.freeze(teacher, dataset, tmp_path / str(explainer), explainer=explainer, progress=False)
        assert frozen is not None
        assert frozen.explainer == explainer
        assert frozen.verify(teacher, dataset).ok


# The command line


def test_a_bcos_teacher_is_frozen_and_checked_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for n in range(8):
        (tmp_path / "data" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        pixels_of = pixels(8).tensors[0][n].permute(1, 2, 0).numpy()
        image.fromarray(pixels_of).save(tmp_path / "data" / "ab"[n % 2] / f"{n}.png")
    torch.manual_seed(0)
    torch.save(bcos.resnet20(2).state_dict(), tmp_path / "teacher.pth")
    teacher = ["--teacher", "bcos.resnet20", "--teacher-checkpoint", str(tmp_path / "teacher.pth")]
    data = ["--data", str(tmp_path / "data"), "--workers", "0", "--device", "cpu"]
    assert main(["freeze", *teacher, *data, "--out", str(tmp_path / "cache"), "--view", "32"]) == 0
    assert "maps [6, 32, 32] int8" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "cache"), *teacher, *data]) == 0
    pair = ["--student", "bcos.resnet20", *teacher, "--num-classes", "2", "--size", "32", "--batch", "2"]
    assert main(["check", *pair]) == 0
    assert "its own forward" in capsys.readouterr().out
    assert main(["check", *pair, "--student-layer", "layer2", "--images", str(tmp_path / "data")]) == 0
    assert "network.layer2" in capsys.readouterr().out
    student = ["--student", "test_resnet", *teacher, "--num-classes", "2", "--size", "32", "--batch", "2"]
    for images in ([], ["--images", str(tmp_path / "data")]):
        main(["check", *student, *images])
        assert "[0, 1]" not in capsys.readouterr().out  # the teacher gets colours, however the student sees them
    assert main(["check", *pair[2:], "--student", "bcos.Attention"]) == 2
    assert "has no network 'Attention'" in capsys.readouterr().err


# The papers' task loss


def test_bcos_loss_equals_the_papers(shared: Shared) -> None:
    golden = load_file(shared("golden/e2kd/kd.safetensors"))
    for case in ("a", "b"):
        logits = golden[f"{case}.student_logits"].clone()
        kd = e2kd.kd_loss(logits, golden[f"{case}.teacher_logits"])
        task = bcos.BcosLoss()(logits, golden[f"{case}.targets"])
        torch.testing.assert_close(0.3 * task + kd, golden[f"{case}.tau1.loss_gt0.3_bce"], rtol=1e-12, atol=1e-12)


def test_bcos_loss_of_probabilities_and_bad_targets() -> None:
    logits, labels = torch.randn(3, 5), torch.tensor([0, 4, 2])
    assert torch.equal(bcos.bcos_loss(logits, F.one_hot(labels, 5).float()), bcos.bcos_loss(logits, labels))
    undecided = torch.full((2, 5), bcos.LogitLayer.of(5, None).bias, requires_grad=True)
    (slope,) = torch.autograd.grad(bcos.bcos_loss(undecided, torch.tensor([1, 1])), undecided)
    assert slope[:, [0, 2, 3, 4]].abs().max() < 1e-7
    with pytest.raises(ValueError, match=r"class indices \[3\]"):
        bcos.bcos_loss(logits, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="off_label"):
        bcos.BcosLoss(1.0)
    with pytest.raises(ValueError, match=r"two classes or more, but got \[4, 1\]"):
        bcos.bcos_loss(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))


# Bad input


def test_zero_images_patches_and_tokens_are_finite() -> None:
    teacher = net(seed=1).float()
    for kind in BUILD:
        student, x = net(kind).float(), encoded().float()
        x[0], x[1, :, :8] = 0, 0
        loss, mine, _ = step(student, teacher, x)
        assert loss.isfinite()
        assert mine.isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: e2kd.explain(standard(), colours(), explainer=e2kd.BcosWeights()), "has no B-cos layers"),
        (lambda: e2kd.E2KDLoss(standard(), net(), explainer=SHARED), "has no B-cos layers"),
        (lambda: step(net(), standard(), encoded(), explainer=SHARED), "has no B-cos layers"),
        (lambda: e2kd.E2KDLoss(net().half(), net().half()), "needs float32"),
        (lambda: e2kd.explain(net().bfloat16(), encoded().bfloat16()), "needs float32"),
        (lambda: e2kd.explain(net(), colours()), "AddInverse"),
        (lambda: step(net(), net(seed=1), torch.rand(2, 5, 16, 16).double()), "Expected an input"),
        (lambda: step(net(), net(seed=1), 255 * encoded()), r"B-cos network, which expects images in \[0, 1\]"),
        (lambda: e2kd.explain(net(), encoded() * 4 - 2), r"images in \[0, 1\]"),
        (lambda: step(standard(), net(), colours() * 4 - 2), "input_normalization"),
        (lambda: step(net(), standard(), torch.rand(2, 6, 16, 16).double()), "Augment before you encode"),
        (lambda: step(net(), standard(), encoded(), explainer=SHARED, teacher_explainer=e2kd.GradCAM()),
         "BcosContributions"),
        (lambda: e2kd.BcosWeights(passes="both"), '"shared", "separate"'),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_sentence(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
    assert current_mode() is None


@pytest.mark.parametrize("inside", [False, True])
def test_an_activation_in_place_behind_a_bcos_layer_is_refused(inside: bool) -> None:
    block = nn.Sequential(BcosConv2d(6, 4, 3), nn.ReLU(inplace=True))
    layers = [nn.Sequential(block), *block] if inside else [*block]
    model = nn.Sequential(*layers[: 1 if inside else 2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), bcos.BcosLinear(4, 5))
    name = "0.0.1" if inside else "1"
    for refused in (lambda: e2kd.explain(model, encoded().float()), lambda: e2kd.E2KDLoss(model, copy.deepcopy(model))):
        with pytest.raises(e2kd.UnsupportedModel, match=f"'{name}' changes it in place. Make it with inplace=False"):
            refused()
