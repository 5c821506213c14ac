"""E2KDLoss: its sum, its settings, its targets, its parts."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, cnn, pair
from torch import Tensor, nn

import e2kd


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


Y = torch.tensor([0, 1, 3, 2])


def models() -> tuple[nn.Module, nn.Module]:
    return pair("closed")


def test_the_loss_is_the_weighted_sum_of_its_parts(x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(
        student, teacher, nn.CrossEntropyLoss(), weight=3.0, kd_weight=0.5, task_weight=0.25, temperature=2.0, example=x
    )
    logits = student(x)
    loss = criterion(logits, Y)
    found = e2kd.explain(teacher, x)
    mine = e2kd.explain(student, x, found.classes)
    explanation = (1 - e2kd.cosine(mine.maps, found.maps)).mean()
    kd, task = e2kd.kd_loss(logits, found.logits, 2.0), F.cross_entropy(logits, Y)
    torch.testing.assert_close(loss, 3 * explanation + 0.5 * kd + 0.25 * task)
    expected = {
        "loss": loss, "task": task, "kd": kd, "explanation": explanation, "cosine": 1 - explanation,
        "agreement": (logits.argmax(1) == found.classes).double().mean(), "zero_maps": torch.tensor(0),
    }  # fmt: skip
    assert criterion.parts.keys() == expected.keys()
    for name, value in criterion.parts.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, expected[name].detach(), check_dtype=False)


@pytest.mark.parametrize("net", NETS)
def test_the_loss_of_a_student_that_is_its_teacher_is_zero(net: str, x: Tensor) -> None:
    model = pair(net)[1]
    criterion = e2kd.E2KDLoss(model, model, example=x)
    assert abs(criterion(model(x)).item()) < 1e-12
    assert model.training


@pytest.mark.parametrize("net", NETS)
def test_no_gradient_reaches_the_teacher_and_nothing_of_it_is_kept(net: str, x: Tensor) -> None:
    student, teacher = pair(net)
    teacher.train()
    criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), example=x)
    criterion(student(x), Y).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert not list(criterion.parameters())
    assert not criterion.state_dict()


def test_pure_distillation_needs_no_targets(x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, example=x)
    loss = criterion(student(x))
    torch.testing.assert_close(loss.detach(), criterion.parts["kd"] + criterion.parts["explanation"])
    assert criterion.parts["task"] == 0


@dataclass
class FakeOutput(dict):
    logits: Tensor

    def __post_init__(self) -> None:
        self["logits"] = self.logits


class Wrapped(nn.Module):
    """A model that returns its logits in some structure."""

    def __init__(self, model: nn.Module, wrap) -> None:
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, images: Tensor):
        return self.wrap(self.model(images))


Named = namedtuple("Named", ["logits", "aux"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: (z, None),
        lambda z: Named(z, z * 2),
        lambda z: {"loss": None, "logits": z},
        FakeOutput,
    ],
    ids=["tensor", "tuple", "namedtuple", "dict", "model_output"],
)
def test_outputs_of_any_structure_give_the_same_loss(wrap, x: Tensor) -> None:
    plain, teacher = models()
    expected = e2kd.E2KDLoss(plain, teacher, example=x)(plain(x))
    student = Wrapped(models()[0], wrap)
    torch.testing.assert_close(e2kd.E2KDLoss(student, teacher, example=x)(student(x)), expected)


def test_a_criterion_is_called_as_before(x: Tensor) -> None:
    """Tensors and tuples as they came, the logits of a dict or ModelOutput."""
    given = []

    def criterion(outputs, targets):
        given.append((outputs, targets))
        return torch.zeros((), dtype=torch.float64)

    teacher = models()[1]
    for wrap, expected in ((lambda z: z, Tensor), (lambda z: (z, 1), tuple), (lambda z: {"logits": z}, Tensor)):
        student = Wrapped(models()[0], wrap)
        loss = e2kd.E2KDLoss(student, teacher, criterion, example=x)
        loss(student(x), Y, num_items_in_batch=4)
        assert isinstance(given[-1][0], expected)
        assert given[-1][1] is Y


@pytest.mark.parametrize("targets", [Y, F.one_hot(Y, 4).double(), torch.full((4, 4), 0.25, dtype=torch.float64)])
def test_targets_of_any_kind_reach_the_criterion(targets: Tensor, x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), example=x)
    logits = student(x)
    criterion(logits, targets)
    torch.testing.assert_close(criterion.parts["task"], F.cross_entropy(logits, targets).detach())


def test_num_items_in_batch_makes_accumulated_parts_add_up(x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), example=x)
    whole = criterion(student(x), Y, num_items_in_batch=torch.tensor(4))
    parts = [criterion(student(x[i]), Y[i], num_items_in_batch=4) for i in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(whole, criterion(student(x), Y))


def test_every_skips_steps_and_scales_the_term(x: Tensor) -> None:
    student, teacher = models()
    always = e2kd.E2KDLoss(student, teacher, kd_weight=0, example=x)
    third = e2kd.E2KDLoss(student, teacher, kd_weight=0, every=3, example=x)
    expected = always(student(x))
    values = [third(student(x)) for _ in range(6)]
    torch.testing.assert_close(values[0], 3 * expected)
    torch.testing.assert_close(values[3], 3 * expected)
    assert [v.item() for v in (values[1], values[2], values[4], values[5])] == [0.0] * 4
    assert third.parts["cosine"].isnan()
    assert third.parts["explanation"] == 0


def test_fraction_is_an_unbiased_estimate(x: Tensor) -> None:
    student, teacher = models()
    torch.manual_seed(0)
    whole = e2kd.E2KDLoss(student, teacher, kd_weight=0, example=x)(student(x))
    half = e2kd.E2KDLoss(student, teacher, kd_weight=0, fraction=0.5, example=x)
    values = torch.stack([half(student(x)).detach() for _ in range(200)])
    assert values.std() > 0
    assert abs(values.mean() - whole) < 4 * values.std() / 200**0.5


DRAWN: list[dict[str, Any]] = [
    {"classes": "all"},
    {"classes": 3, "explainer": e2kd.LayerCAM()},
    {"classes": lambda logits, _: (torch.arange(4)[None], torch.tensor([[0.5, -1.0, 0.0, 2.0]]))},
]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("settings", DRAWN, ids=["all", "top", "own"])
def test_drawn_classes_are_an_unbiased_estimate(settings: dict[str, Any], count: int, x: Tensor) -> None:
    student, teacher = models()
    whole = e2kd.E2KDLoss(student, teacher, kd_weight=0, example=x, **settings)
    some = e2kd.E2KDLoss(student, teacher, kd_weight=0, example=x, max_classes=count, **settings)
    state, parameters = torch.get_rng_state(), [p for p in student.parameters() if p.ndim > 1]
    wanted = whole(student(x))
    gradient = torch.autograd.grad(wanted, parameters, allow_unused=True)[0]
    losses = [some(student(x)) for _ in range(200)]
    gradients = torch.stack([torch.autograd.grad(loss, parameters, allow_unused=True)[0] for loss in losses])
    values = torch.stack(losses).detach()
    assert values.std() > 0
    assert abs(values.mean() - wanted) < 4 * values.std() / 200**0.5
    assert ((gradients.mean(0) - gradient).abs() <= 5 * gradients.std(0) / 200**0.5 + 1e-12).all()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("explainer", [e2kd.CAM(), e2kd.GradCAM(), e2kd.InputGradient()], ids=repr)
def test_each_class_is_drawn_for_as_many_samples(explainer: e2kd.Explainer, x: Tensor) -> None:
    """Of one image, twice, every class is explained once by two for each: the loss of all, to the last digit."""
    student, teacher = models()
    twice = x[:1].repeat(2, 1, 1, 1)
    settings: dict[str, Any] = {"kd_weight": 0, "classes": "all", "explainer": explainer, "example": x}
    wanted = e2kd.E2KDLoss(student, teacher, **settings)(student(twice))
    some = e2kd.E2KDLoss(student, teacher, max_classes=2, **settings)
    for _ in range(5):
        torch.testing.assert_close(some(student(twice)), wanted, rtol=1e-10, atol=1e-12)
    enough = e2kd.E2KDLoss(student, teacher, max_classes=4, **settings)
    assert torch.equal(enough(student(twice)), wanted)


def test_a_sample_with_few_positives_has_all_of_them_explained(x: Tensor) -> None:
    """One crowded image makes the table of classes wide for the whole batch."""
    student, teacher = models()
    targets = torch.zeros(len(x), 4)
    targets[0], targets[1:, 2] = 1.0, 1.0
    settings: dict[str, Any] = {"kd_weight": 0, "task_weight": 0, "classes": "positives", "explainer": e2kd.CAM()}
    whole = e2kd.E2KDLoss(student, teacher, example=x, **settings)
    some = e2kd.E2KDLoss(student, teacher, example=x, max_classes=1, **settings)
    wanted = whole(student(x[1:]), targets[1:])
    torch.testing.assert_close(some(student(x[1:]), targets[1:]), wanted)
    values = torch.stack([some(student(x), targets).detach() for _ in range(100)])
    assert some.parts["cosine"].isfinite()
    assert 0 < values.std() < 2 / len(x)  # of the crowded image alone
    assert abs(values.mean() - whole(student(x), targets)) < 4 * values.std() / 10


def test_drawn_classes_are_those_of_the_step(x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(
        student, teacher, classes="all", explainer=e2kd.CAM(), max_classes=1, fraction=0.5, example=x
    )
    values = [criterion(student(x)).item() for _ in range(6)]
    assert len(set(values)) > 1
    criterion.step = 3
    assert criterion(student(x)).item() == values[3]


def test_top_k_is_weighted_by_the_teachers_probability(x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0, classes=2, explainer=e2kd.LayerCAM(), example=x)
    loss = criterion(student(x))
    top = e2kd.explain(teacher, x).logits.topk(2, 1)
    expected = 0.0
    for classes, weight in zip(top.indices.T, top.values.softmax(1).T, strict=True):
        mine, theirs = (e2kd.explain(m, x, classes, e2kd.LayerCAM()).maps for m in (student, teacher))
        expected = expected + (weight * (1 - e2kd.cosine(mine, theirs))).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("explainer", [e2kd.CAM(), e2kd.GradCAM(), e2kd.HiResCAM(), e2kd.InputGradient()], ids=repr)
def test_all_classes_are_explained_with_equal_weight(explainer: e2kd.Explainer, x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0, classes="all", explainer=explainer, example=x)
    loss = criterion(student(x))
    expected = 0.0
    for label in range(4):
        classes = torch.full((len(x),), label)
        mine, theirs = (e2kd.explain(m, x, classes, explainer).maps for m in (student, teacher))
        expected = expected + (1 - e2kd.cosine(mine, theirs)).mean() / 4
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in student.parameters() if p.ndim > 1)


@pytest.mark.parametrize("explainer", [e2kd.CAM(), e2kd.GradCAM()], ids=repr)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_closed_form_of_all_classes_is_that_of_one_after_another(
    explainer: e2kd.Explainer, fraction: float, x: Tensor
) -> None:
    """Told of each sample's classes, the criterion can't know that they are the same for all."""

    def told(logits: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        return torch.arange(4).repeat(len(logits), 1), torch.full_like(logits, 0.25)

    found = []
    for classes in ("all", told):
        student, teacher = models()
        criterion = e2kd.E2KDLoss(
            student, teacher, kd_weight=0, classes=classes, explainer=explainer, example=x, fraction=fraction
        )
        criterion.seed = 0
        loss = criterion(student(x))
        found.append((loss, torch.autograd.grad(loss, [p for p in student.parameters() if p.ndim > 1])))
    (at_once, gradients), (one_by_one, theirs) = found
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Absolute(e2kd.GradCAM):
    """A formula of one's own in a class of e2kd's."""

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        return (features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).abs()


def one_after_another(logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """All classes, stored for each sample, so that no way through all at once is taken."""
    return torch.arange(logits.shape[1]).repeat(len(logits), 1), torch.full_like(logits, 1 / logits.shape[1])


@pytest.mark.parametrize("explainer", [Absolute(), e2kd.CAM(), e2kd.InputGradient()], ids=repr)
def test_a_function_may_choose_for_every_sample_or_for_all_at_once(explainer: e2kd.Explainer, x: Tensor) -> None:
    def for_all(logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.arange(logits.shape[1])[None], torch.full_like(logits[:1], 1 / logits.shape[1])

    student, teacher = cnn(seed=2), cnn(seed=1)
    found = []
    for classes in ("all", for_all, one_after_another):
        criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0, classes=classes, explainer=explainer, example=x)
        found.append((criterion(student(x)).detach(), criterion.parts["cosine"]))
        criterion.remove()
    for loss, cosine in found:
        torch.testing.assert_close(loss, found[2][0])
        torch.testing.assert_close(cosine, 1 - loss)


@pytest.mark.parametrize(
    ("chosen", "came"),
    [
        (lambda logits: logits.argmax(1), "tensor"),
        (lambda logits: (logits.argmax(1), torch.ones(len(logits))), r"\[4\] of torch.int64 and \[4\]"),
        (lambda logits: (logits.argsort(1), torch.ones(len(logits), 1)), r"\[4, 4\] of torch.int64 and \[4, 1\]"),
        (lambda logits: (logits, logits), "float64"),
        (lambda logits: (logits.argsort(1) - 1, logits), "got -1 to 2"),
        (lambda logits: (logits.argsort(1) + 1, logits), "got 1 to 4"),
    ],
)
def test_what_a_function_of_classes_returns_is_looked_at(chosen: Any, came: str, x: Tensor) -> None:
    student = cnn(seed=2)
    criterion = e2kd.E2KDLoss(student, cnn(seed=1), classes=lambda logits, targets: chosen(logits), example=x)
    with pytest.raises(ValueError, match=came):
        criterion(student(x[:4]))


@pytest.mark.parametrize("classes", ["all", "teacher", 3])
def test_a_student_that_is_its_teacher_loses_nothing_in_half_precision(classes: Any) -> None:
    student, teacher = cnn().float(), cnn().float()
    images = torch.rand(257, 3, 16, 16)  # one more than bfloat16 can count
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0, classes=classes, explainer=e2kd.CAM(), example=images)
    with torch.autocast("cpu", torch.bfloat16):
        criterion(student(images))
    assert abs(float(criterion.parts["explanation"])) < 1e-5
    assert abs(float(criterion.parts["cosine"]) - 1) < 1e-5


def test_every_part_is_reported_in_every_step(x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), kd_weight=0, every=2, example=x)
    for agreement_is_known in (True, False):
        criterion(student(x), torch.zeros(len(x), dtype=torch.long))
        assert bool(criterion.parts["agreement"].isnan()) != agreement_is_known


def test_positives_are_all_explained_with_equal_weight(x: Tensor) -> None:
    student, teacher = models()
    targets = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]]).double()
    criterion = e2kd.E2KDLoss(
        student, teacher, nn.BCEWithLogitsLoss(), kd_weight=0, task_weight=0, classes="positives",
        distillation=e2kd.MultiLabelKDLoss(), explainer=e2kd.LayerCAM(), example=x,
    )  # fmt: skip
    loss = criterion(student(x), targets)
    expected = 0.0
    for i, row in enumerate(targets):
        for c in row.nonzero().flatten():
            mine, theirs = (e2kd.explain(m, x[i : i + 1], c[None], e2kd.LayerCAM()).maps for m in (student, teacher))
            expected = expected + (1 - e2kd.cosine(mine, theirs)).sum() / row.sum() / 4
    torch.testing.assert_close(loss, expected)


def test_labels_are_explained_on_request(x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(
        student, teacher, nn.CrossEntropyLoss(), kd_weight=0, task_weight=0, classes="labels",
        explainer=e2kd.LayerCAM(), example=x,
    )  # fmt: skip
    mine, theirs = (e2kd.explain(m, x, Y, e2kd.LayerCAM()).maps for m in (student, teacher))
    torch.testing.assert_close(criterion(student(x), Y), (1 - e2kd.cosine(mine, theirs)).mean())


def test_resize_to_the_image_compares_at_image_size(x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0, resize="image", example=x)
    loss = criterion(student(x))
    theirs = e2kd.explain(teacher, x)
    mine = e2kd.explain(student, x, theirs.classes)
    up = [F.interpolate(m.maps, (16, 16), mode="bilinear").flatten(1) for m in (mine, theirs)]
    torch.testing.assert_close(loss, 1 - F.cosine_similarity(*up).mean())


def test_own_normalisation_and_size_of_the_teacher(x: Tensor) -> None:
    student, teacher = models()
    given, wanted = ((0.5,) * 3, (0.25,) * 3), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    criterion = e2kd.E2KDLoss(
        student, teacher, input_normalization=given, teacher_normalization=wanted, teacher_size=24, example=x
    )
    (m0, s0), (m1, s1) = ([torch.tensor(v).double()[:, None, None] for v in n] for n in (given, wanted))
    expected = F.interpolate((x * s0 + m0 - m1) / s1, (24, 24), mode="bilinear", antialias=True)
    torch.testing.assert_close(criterion.teacher.prepared(x), expected)
    criterion(student(x)).backward()
    torch.testing.assert_close(criterion.parts["kd"], e2kd.kd_loss(student(x), teacher(expected)).detach())


def test_one_value_of_a_normalisation_is_for_all_channels(x: Tensor) -> None:
    student, teacher = models()
    settings: dict[str, Any] = {"teacher_normalization": ((0.0,), (1.0,)), "example": x}
    criterion = e2kd.E2KDLoss(student, teacher, input_normalization=((0.5,), (0.25,)), **settings)
    torch.testing.assert_close(criterion.teacher.prepared(x), x * 0.25 + 0.5)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"input_normalization": ((0.5,), (0.5,))}, "Pass teacher_normalization"),
        ({"teacher_normalization": ((0.5,), (0.5,))}, "Expected input_normalization"),
        (
            {"input_normalization": ((0.5,) * 2, (0.5,) * 2), "teacher_normalization": ((0.5,), (0.5,))},
            "of one channel or of the images' 3",
        ),
    ],
)
def test_a_normalisation_that_would_do_nothing_is_refused(x: Tensor, settings: dict[str, Any], advice: str) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, example=x, **settings)
    with pytest.raises(ValueError, match=advice):
        criterion(student(x))


def test_a_teacher_without_memory_says_so_as_torch_does(x: Tensor) -> None:
    """So that trainers which look for a batch size that fits go on looking."""
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, example=x)

    def full(module: nn.Module, args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    teacher.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        criterion(student(x))


def test_a_resumed_training_explains_in_the_steps_of_an_uninterrupted_one(x: Tensor) -> None:
    def explained(criterion: e2kd.E2KDLoss, student: nn.Module, steps: int) -> list[bool]:
        found = []
        for _ in range(steps):
            criterion(student(x))
            found.append(bool(criterion.parts["explanation"] > 0))
        return found

    student, teacher = models()
    whole = explained(e2kd.E2KDLoss(student, teacher, during=(2, 4), example=x), student, 6)
    assert whole == [False, False, True, True, False, False]
    resumed = e2kd.E2KDLoss(student, teacher, during=(2, 4), example=x)
    resumed.step = 3
    assert explained(resumed, student, 3) == whole[3:]


def test_removing_takes_the_hooks_of_a_method_inside_too(x: Tensor) -> None:
    student, teacher = models()
    before = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in student.modules())
    inner = e2kd.baselines.AT(student, teacher, nn.CrossEntropyLoss())
    e2kd.E2KDLoss(student, teacher, inner, example=x).remove()
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in student.modules()) == before


def test_a_timm_teacher_knows_its_normalisation_and_fixed_size() -> None:
    timm = pytest.importorskip("timm")
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, embed_dim=48)
    student, images = timm.create_model("test_resnet", num_classes=4), torch.rand(2, 3, 96, 96)
    criterion = e2kd.E2KDLoss(student, teacher, input_normalization=((0.0,) * 3, (1.0,) * 3))
    prepared = criterion.teacher.prepared(images)
    side = teacher.patch_embed.img_size[0]
    assert prepared.shape == (2, 3, side, side)
    mean, std = (torch.tensor(teacher.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    expected = F.interpolate((images - mean) / std, (side, side), mode="bilinear", antialias=True)
    torch.testing.assert_close(prepared, expected, rtol=1e-4, atol=1e-5)


def test_one_criterion_object_for_many_batch_sizes_and_image_sizes(x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher)
    for count, side in ((1, 16), (4, 32), (3, 24)):
        images = torch.rand(count, 3, side, side, dtype=torch.float64)
        criterion(student(images)).backward()


def test_a_model_of_unusual_input_is_planned_on_the_first_batch() -> None:
    class Odd(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.conv, self.fc = nn.Conv2d(3, 4, 5), nn.Linear(4 * 13 * 13, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(images)).flatten(1))

    student, teacher = Odd(0), Odd(1)
    criterion = e2kd.E2KDLoss(student, teacher, explainer=e2kd.LayerCAM())
    assert criterion.explained.plan is None
    criterion(student(torch.rand(2, 3, 17, 17))).backward()
    assert criterion.explained.plan is not None
    assert criterion.parts["cosine"] > 0


def test_the_teacher_follows_the_precision_of_the_student(x: Tensor) -> None:
    kinds = []
    student, teacher = cnn(seed=0).float(), cnn(seed=2).float()
    teacher[0].register_forward_hook(lambda m, a, out: kinds.append(out.dtype))
    criterion = e2kd.E2KDLoss(student, teacher, example=x.float())
    kinds.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits = student(x.float())
    criterion(logits)
    criterion(student(x.float()))
    assert torch.bfloat16 in kinds
    assert kinds[-1] == torch.float32


def test_a_step_that_explains_nothing_and_distils_nothing_is_the_hosts_own(x: Tensor) -> None:
    student, teacher = models()
    criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), weight=0, kd_weight=0, example=x)
    logits = student(x)
    assert criterion(logits, Y).item() == F.cross_entropy(logits, Y).item()


class FunctionalTail(nn.Module):
    """As torchvision's DenseNet: an in-place ReLU by function between the last module and the pooling."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(F.relu(self.features(images), inplace=True), 1).flatten(1))


@pytest.mark.parametrize("built_in_train_mode", [True, False])
def test_a_functional_relu_is_explained_after_it_whatever_mode_the_criterion_was_built_in(
    built_in_train_mode: bool,
) -> None:
    student, teacher, images = FunctionalTail(0), FunctionalTail(3), torch.rand(3, 3, 16, 16)
    criterion = e2kd.E2KDLoss(student.train(built_in_train_mode), teacher, kd_weight=0, example=images)
    loss = criterion(student.train()(images))
    assert criterion.explained.way == "closed"
    theirs = e2kd.explain(teacher, images)
    rows = student.head.weight[theirs.classes] / 49
    maps = F.relu((F.relu(student.features(images)) * rows[:, :, None, None]).sum(1, keepdim=True))
    expected = 1 - e2kd.cosine(maps, theirs.maps).mean()
    torch.testing.assert_close(loss, expected)
    actual, wanted = (
        torch.autograd.grad(value, list(student.parameters()), allow_unused=True) for value in (loss, expected)
    )
    torch.testing.assert_close(actual[:3], wanted[:3])
