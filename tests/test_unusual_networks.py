"""Students, teachers and loops that are not the usual ones: exact, or refused in words."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import e2kd
from e2kd.layout import Layout, layout_of
from e2kd.student import StudentExplainer

CLASSES = 5


class CNN(nn.Module):
    """Pooling and a linear layer after two convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.relu, self.pool, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.relu(self.conv2(F.relu(self.conv1(images))))
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.features(images)).flatten(1))
        return logits


def net(width: int = 8, seed: int = 0) -> CNN:
    torch.manual_seed(seed)
    return CNN(width)


def images(batch: int = 4, side: int = 32) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(7))


def gradcam(features: Tensor, logits: Tensor, classes: Tensor) -> Tensor:
    """By the book, differentiable."""
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features, create_graph=True)
    return F.relu((features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True))


def expected(student: CNN, teacher: nn.Module, x: Tensor) -> Tensor:
    """1 - cosine of the student's GradCAM by autograd and the teacher's map, for the teacher's classes."""
    theirs = e2kd.explain(teacher, x)
    features = student.features(x)
    logits = student.fc(student.pool(features).flatten(1))
    maps = gradcam(features, logits, theirs.classes)
    return 1 - F.cosine_similarity(maps.flatten(1), theirs.maps.flatten(1)).mean()


# What is dropped, drawn or counted inside


def test_a_network_that_drops_patches_in_training_is_refused() -> None:
    options: dict[str, Any] = {"num_classes": CLASSES, "img_size": 128}
    student = timm.create_model("test_vit", patch_drop_rate=0.75, **options)  # 16 of 64: a grid, but not of the image
    teacher, x = timm.create_model("test_vit", **options), images(2, 128)
    for criterion in (e2kd.E2KDLoss(student, teacher), e2kd.baselines.AT(student, teacher)):
        with pytest.raises(e2kd.UnsupportedModel, match=r"4 x 4 tokens.*patch_drop_rate=0"):
            criterion(student(x), torch.tensor([0, 1]))
        criterion.remove()
    assert not e2kd.check(student, teacher, x).ok
    other = timm.create_model("test_vit", dynamic_img_size=True, **options)
    assert e2kd.E2KDLoss(other, copy.deepcopy(other))(other(images(2, 96))).isfinite()


class Observer(nn.Module):
    """What it saw: in eval mode too, and in buffers that grow, as observers of quantisation do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.empty(0))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        value = x.detach().amax().reshape(1)
        if not len(self.largest):
            self.largest.resize_(1).copy_(value)
        self.largest.data.copy_(torch.maximum(self.largest, value))
        self.seen += 1
        return x


def test_observers_see_what_they_see_without_the_criterion() -> None:
    student, x = net(), torch.rand(4, 3, 32, 32)
    student.pool = nn.Sequential(Observer(), nn.AdaptiveAvgPool2d(1))  # after the layer, where the head is run again
    student.relu = nn.Sequential(nn.ReLU(), Observer())
    before = copy.deepcopy(student)
    e2kd.check(student, net(12), x)
    criterion = e2kd.E2KDLoss(student, net(12), nn.CrossEntropyLoss())
    assert all(map(torch.equal, student.buffers(), before.buffers()))
    for _ in range(3):
        criterion(student(x), torch.arange(4)).backward()
        before(x)
    assert all(map(torch.equal, student.buffers(), before.buffers()))


class ToFloat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255 if x.dtype == torch.uint8 else x


def test_networks_that_take_bytes_are_both_given_them() -> None:
    student = nn.Sequential(ToFloat(), net())
    x = (images().sigmoid() * 255).to(torch.uint8)
    criterion = e2kd.E2KDLoss(student, copy.deepcopy(student))
    criterion(student(x)).backward()
    assert float(criterion.parts["kd"]) == pytest.approx(0, abs=1e-6)
    assert float(criterion.parts["cosine"]) == pytest.approx(1, abs=1e-5)
    assert e2kd.check(student, copy.deepcopy(student), x).explanation == pytest.approx(0, abs=1e-5)
    half = ((0.5,), (0.5,))
    for told in ({"teacher_size": 16}, {"input_normalization": half}, {"teacher_normalization": half}):
        criterion = e2kd.E2KDLoss(student, copy.deepcopy(student), **told)
        outputs = student(x)
        with pytest.raises(ValueError, match=r"torch\.uint8.*Make floats"):
            criterion(outputs)
    with pytest.raises(e2kd.UnsupportedModel, match=r"torch\.uint8 have no gradient"):
        e2kd.explain(student, x, explainer=e2kd.InputGradient())


# Layers that are not what their class says


def patched(layer: nn.Linear, a: Tensor, b: Tensor) -> None:
    plain = layer.forward
    layer.forward = lambda x: plain(x) + x @ a.T @ b.T  # type: ignore[method-assign]


def hooked(layer: nn.Linear, a: Tensor, b: Tensor) -> None:
    layer.register_forward_hook(lambda module, args, output: output + args[0] @ a.T @ b.T)


@pytest.mark.parametrize("adapt", [patched, hooked])
def test_an_adapter_of_the_classifier_is_explained_and_learns(adapt: Callable[..., None]) -> None:
    teacher, student, x = net(16), net(8, seed=1), images()
    torch.manual_seed(2)
    adapt(teacher.fc, torch.randn(2, 32), torch.randn(CLASSES, 2))
    a, b = torch.randn(2, 16), torch.zeros(CLASSES, 2, requires_grad=True)
    adapt(student.fc, a, b)  # as adapters begin: without an effect, but with a gradient
    theirs = e2kd.explain(teacher, x)
    features = teacher.eval().features(x)
    logits = teacher.fc(teacher.pool(features).flatten(1))
    torch.testing.assert_close(theirs.maps, gradcam(features, logits, theirs.classes).detach())
    loss = e2kd.E2KDLoss(student, teacher, kd_weight=0)(student(x))
    wanted = expected(student, teacher, x)
    torch.testing.assert_close(loss, wanted)
    gradients = [torch.autograd.grad(value, b)[0] for value in (loss, wanted)]
    assert gradients[1].any()
    torch.testing.assert_close(*gradients)


def pruned(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)


def weight_normed(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize("change", [pruned, weight_normed])
def test_a_classifier_whose_weight_is_computed_anew_keeps_its_gradient_in_mutual_learning(
    change: Callable[..., None],
) -> None:
    one, other, x = net(8), net(12, seed=1), images()
    change(one.fc)
    change(other.fc)
    first, second = e2kd.E2KDLoss(one, other, kd_weight=0), e2kd.E2KDLoss(other, one, kd_weight=0)
    outputs = one(x), other(x)  # each is then asked as the other's teacher, without gradients
    (first(outputs[0]) + second(outputs[1])).backward()
    for network in (one, other):
        weights = [p for name, p in network.fc.named_parameters() if name != "bias"]
        assert any(p.grad is not None and p.grad.any() for p in weights)


class GeM(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=1e-6).pow(3).mean((2, 3), keepdim=True).pow(1 / 3)


@pytest.mark.parametrize("part", ["pool", "fc"])
def test_a_part_replaced_during_the_training_is_explained(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where logits are not looked at, as in most steps on an accelerator."""
    monkeypatch.setattr(StudentExplainer, "_looks", lambda self, forward: self.checks <= 3)
    student, teacher, x = net(), net(16), images()
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0)
    for _ in range(5):
        criterion(student(x))
    assert criterion.explained.way == "closed"
    deeper = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    setattr(student, part, GeM() if part == "pool" else deeper)
    torch.testing.assert_close(criterion(student(x)), expected(student, teacher, x))


# Loops


class Normed(CNN):
    """BatchNorm after the layer, and a head that only the trainer's own graph can explain."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(2 * width)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.norm(self.pool(self.features(images)).flatten(1))
        logits: Tensor = self.fc(pooled if pooled.sum() > -1e9 else -pooled)
        return logits


@pytest.mark.parametrize("beside", ["another", "without weight", "of the images", "around"])
def test_criteria_of_one_student_do_not_disturb_one_another(beside: str) -> None:
    torch.manual_seed(0)
    student, teacher, x = Normed(), net(16), images()
    alone = e2kd.E2KDLoss(student, teacher, kd_weight=0)
    wanted = alone(student(x))
    assert alone.explained.way == "graph"
    gradients = torch.autograd.grad(wanted, list(student.parameters()), allow_unused=True)
    if beside == "around":
        found = e2kd.E2KDLoss(student, net(12), alone, kd_weight=0, weight=0)(student(x))
    else:
        settings = {"explainer": e2kd.InputGradient(), "teacher_explainer": e2kd.InputGradient()}
        other = e2kd.E2KDLoss(
            student, net(12), weight=float(beside != "without weight"), **settings if beside == "of the images" else {}
        )
        outputs = student(x)
        found = alone(outputs)
        other(outputs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, list(student.parameters()), allow_unused=True), gradients)


@pytest.mark.parametrize(
    "change", [lambda o: o.float(), lambda o: o / 2, lambda o: o[:, :]], ids=["cast", "over", "cut"]
)
def test_two_views_before_two_losses(change: Callable[[Tensor], Tensor]) -> None:
    student, x = net().double(), images().double()
    criterion = e2kd.E2KDLoss(student, net(16), kd_weight=0)
    views = x, x.flip(3)
    apart = [criterion(change(student(view))) for view in views]
    together = [change(student(view)) for view in views]
    torch.testing.assert_close([criterion(outputs) for outputs in together], apart)
    first = change(student(views[0]))
    student(views[1])  # of which no loss is taken
    torch.testing.assert_close(criterion(first), apart[0])


def test_forwards_without_a_loss_leave_nothing() -> None:
    student = net()
    criterion = e2kd.E2KDLoss(student, net(16))
    for _ in range(4):
        student(images())
    assert len(criterion.tap.forwards) <= 1


def test_images_overwritten_before_the_loss_are_refused() -> None:
    student, x = net(), images()
    criterion = e2kd.E2KDLoss(student, net(16))
    outputs = student(x)
    x.copy_(images().flip(3))
    with pytest.raises(RuntimeError, match="changed in place after the student saw them"):
        criterion(outputs)
    criterion(student(x)).backward()


def weighted(outputs: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    each = F.cross_entropy(outputs, targets, reduction="none")
    return (each if sample_weight is None else each * sample_weight).mean()


def test_what_else_a_criterion_takes_is_handed_on() -> None:
    student, targets, x = net(), torch.arange(4), images()
    criterion = e2kd.E2KDLoss(student, net(16), e2kd.baselines.AT(student, net(16), weighted))
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0])
    outputs = student(x)
    wanted = weighted(outputs, targets, sample_weight=weights)
    criterion(outputs, targets, sample_weight=weights)
    inner = criterion.criterion
    assert isinstance(inner, e2kd.baselines.AT)
    torch.testing.assert_close(inner.parts["task"], wanted.detach())
    with torch.no_grad():
        torch.testing.assert_close(criterion(student(x), targets, sample_weight=weights), wanted.detach())
    with pytest.raises(TypeError, match="no criterion that could take sample_weight"):
        e2kd.E2KDLoss(student, net(16))(student(x), targets, sample_weight=weights)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        e2kd.E2KDLoss(student, net(16), nn.CrossEntropyLoss())(student(x), targets, sample_weight=weights)


class Features(CNN):
    def forward(self, images: Tensor, features: bool = False) -> Tensor:
        return self.features(images) if features else super().forward(images)


def test_a_call_for_features_is_no_forward_to_explain() -> None:
    torch.manual_seed(0)
    student, x = Features(), images()
    criterion = e2kd.E2KDLoss(student, net(16))
    student(x, features=True)
    assert criterion(student(x)).isfinite()


def test_a_criterion_can_be_copied_between_forward_and_loss() -> None:
    student = net()
    criterion = e2kd.E2KDLoss(student, net(16))
    outputs = student(images())
    copied = copy.deepcopy(criterion)
    assert not copied.tap.forwards
    assert criterion(outputs).isfinite()


# Refused in words


class Without(nn.Module):
    """A network whose forward switches gradients off."""

    def __init__(self, inner: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.inner, self.context = inner, context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_teacher_whose_forward_switches_gradients_off_is_refused(context: Any) -> None:
    student = net()
    with pytest.raises(e2kd.UnsupportedModel, match="its forward switches gradients off"):
        e2kd.explain(Without(net(16), context), images())
    criterion = e2kd.E2KDLoss(student, Without(net(16), context))
    with pytest.raises(e2kd.UnsupportedModel, match="its forward switches gradients off"):
        criterion(student(images()))


class TwoArguments(CNN):
    def forward(self, images: Tensor, epoch: int) -> Tensor:  # type: ignore[override]
        return super().forward(images)


def test_a_student_that_needs_more_than_images_is_refused() -> None:
    torch.manual_seed(0)
    student = TwoArguments()
    criterion = e2kd.E2KDLoss(student, net(16))
    assert criterion.training
    with pytest.raises(ValueError, match=r"student TwoArguments can't take images.*'epoch'.*a default"):
        student(images(), 3)


@pytest.mark.filterwarnings("ignore:.*jit.*:FutureWarning", "ignore:.*jit.*:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    with pytest.raises(e2kd.UnsupportedModel, match="The teacher is TorchScript"):
        e2kd.E2KDLoss(net(), scripted)


# Plans at other sizes of images


@pytest.mark.parametrize("size", [(80, 96), (160, 224), (64, 80), (32, 96), (32, 32), (80, 90)], ids=str)
def test_registers_are_not_taken_for_patches(size: tuple[int, int]) -> None:
    """Tokens less some of the prefix may form a grid as well, of about the image's aspect ratio."""
    patch = 32 if size == (160, 224) else 16
    made = timm.models.VisionTransformer(
        size, patch, embed_dim=16, depth=1, num_heads=2, num_classes=CLASSES, reg_tokens=4, global_pool="avg"
    )
    assert tuple(e2kd.explain(made, torch.rand(2, 3, *size)).maps.shape[-2:]) == made.patch_embed.grid_size
    assert layout_of((2, 5 * 6 + 5, 16), (80, 96)) == Layout("NLC", 5, (5, 6, 80, 96))  # without a word of the network


@pytest.mark.parametrize("size", [(14, 20), (20, 14), (16, 40)], ids=str)
@pytest.mark.parametrize("side", [8, 12, 16])
def test_without_padding_channels_are_not_taken_for_rows(side: int, size: tuple[int, int]) -> None:
    """The grid has not the images' aspect ratio then, but channels and rows may."""
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, side, 3), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(side, CLASSES))
    x = torch.rand(2, 3, *size)
    found, features = e2kd.explain(model, x), model[:4](x)
    torch.testing.assert_close(found.maps, gradcam(features, model[4:](features), found.classes))
    assert torch.equal(e2kd.transfer.read(model, x, ["3"]).layers[0].maps, features)


@pytest.mark.parametrize("explainer", [e2kd.HiResCAM(), e2kd.LayerCAM()])
def test_a_pooling_that_leaves_cells_out_is_no_closed_form(explainer: e2kd.Explainer) -> None:
    """At one size it pools all cells; the plan that was found there serves other sizes too."""
    layers = nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AvgPool2d(7), nn.Flatten(), nn.Linear(4, CLASSES)
    model = nn.Sequential(*layers)
    e2kd.explain(model, images(2, 56), explainer=explainer)
    later = e2kd.explain(model, images(2, 64), explainer=explainer)
    torch.testing.assert_close(later, e2kd.explain(copy.deepcopy(model), images(2, 64), explainer=explainer))
    assert not later.maps[..., -1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_in_half_precision_is_given_other_sizes(dtype: torch.dtype) -> None:
    student, x = net(), images()
    teacher = net(16).eval()
    wanted = e2kd.E2KDLoss(student, teacher, teacher_size=24)(student(x))
    found = e2kd.E2KDLoss(student, copy.deepcopy(teacher).to(dtype), teacher_size=24)(student(x))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.01)


# Poolings whose outputs count up to a square


class Bilinear(nn.Module):
    """Bilinear pooling, [B, C, h, w] -> [B, C, C]."""

    def forward(self, x: Tensor) -> Tensor:
        cells = x.flatten(2)
        return cells @ cells.transpose(1, 2) / cells.shape[2]


class Parts(nn.Module):
    """Attention over the cells, [B, C, h, w] -> [B, parts, C]."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(width, parts, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x).flatten(2).softmax(2) @ x.flatten(2).transpose(1, 2)


class Unfolded(nn.Module):
    """Patches of 2 x 2 cells, [B, C, h, w] -> [B, h w / 4, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.project(F.unfold(x, 2, stride=2).transpose(1, 2))
        return tokens


class Averaged(nn.Module):
    """Tokens [B, L, C] -> [B, C]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def with_head(pool: nn.Module, size: int) -> nn.Sequential:
    """A trunk of 14 x 14 cells of 224 pixels, 16 channels, with a pooling of its own."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, 16, 5, 4, 2), nn.ReLU())
    return nn.Sequential(trunk, pool, nn.Flatten(), nn.Linear(size, CLASSES))


@pytest.mark.parametrize(
    ("pool", "size"),
    [(Bilinear(), 16 * 16), (Parts(16, 16), 16 * 16), (Parts(16, 25), 25 * 16)],
    ids=["bilinear", "16 parts", "25 parts"],
)
def test_what_a_pooling_returns_is_no_map_of_other_cells(pool: nn.Module, size: int) -> None:
    model, x = with_head(copy.deepcopy(pool), size), torch.randn(2, 3, 224, 224)
    assert e2kd.explain(model.eval(), x).maps.shape[2:] == (14, 14)
    criterion = e2kd.E2KDLoss(model.train(), net(), nn.CrossEntropyLoss(), example=x)
    criterion(model(x), torch.tensor([0, 1])).backward()
    assert criterion.explained.place == "layer '0'"


def test_tokens_of_a_maps_cells_are_a_map() -> None:
    """Each is of 2 x 2 cells, by a function that no module tells of."""
    model = with_head(nn.Sequential(Unfolded(16), nn.LayerNorm(16), Averaged()), 16)
    assert e2kd.explain(model.eval(), torch.randn(2, 3, 224, 224)).maps.shape[2:] == (7, 7)
