"""A map is of its own sample, also where BatchNorm follows the layer; and a head is not judged by its first values."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Branching, bcos_cnn, cnn
from properties import assert_matches_finite_difference
from torch import Tensor, nn

import e2kd
from e2kd.held import Holding
from e2kd.plans import plan_for


def normed(classes: int = 4, *, seed: int = 0, hidden: bool = False) -> nn.Sequential:
    """BatchNorm in the trunk, and between pooling and classifier."""
    torch.manual_seed(seed)
    head = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Softplus()] if hidden else [nn.BatchNorm1d(6)]
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.Softplus(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.Softplus(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head, nn.Linear(6, classes),
    ).double()  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(7)
    return torch.rand(6, 3, 16, 16, dtype=torch.double)


def with_fixed_statistics(student: nn.Module, x: Tensor) -> nn.Module:
    """The student in eval mode with the statistics of this batch: each of its logits depends on one image alone."""
    for module in student.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
    student.train()(x)
    for module in student.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_var is not None:
            count = x.shape[0] * (64 if isinstance(module, nn.BatchNorm2d) else 1)
            if not isinstance(module, e2kd.bcos.BatchNormUncentered2d):
                module.running_var *= (count - 1) / count  # torch keeps the unbiased one
    return student.eval()


@pytest.mark.parametrize("explainer", [e2kd.CAM(), e2kd.GradCAM(), e2kd.LayerCAM(), e2kd.InputGradient()], ids=repr)
@pytest.mark.parametrize("hidden", [False, True])
def test_maps_in_training_are_those_of_each_sample_alone(explainer: e2kd.Explainer, hidden: bool, x: Tensor) -> None:
    student, teacher = normed(seed=1, hidden=hidden), cnn(seed=2)
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0, classes="all", explainer=explainer, example=x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", e2kd.NoEffectWarning)  # GradCAM of classes that are not seen
        loss = criterion(student(x))
    fixed = with_fixed_statistics(student, x)
    found = []
    for k in range(4):
        classes = torch.full((len(x),), k)
        alone = torch.cat([e2kd.explain(fixed, x[i : i + 1], classes[:1], explainer).maps for i in range(len(x))])
        found.append(1 - e2kd.cosine(alone, e2kd.explain(teacher, x, classes, explainer).maps))
    torch.testing.assert_close(loss.detach(), torch.stack(found).mean(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("explainer", [e2kd.CAM(), e2kd.InputGradient()], ids=repr)
@pytest.mark.parametrize("classes", ["all", "teacher"])
def test_gradients_are_finite_differences(explainer: e2kd.Explainer, classes: Any, x: Tensor) -> None:
    """The statistics are held fixed in the map, and yet the map changes with them."""
    student, teacher = normed(seed=1, hidden=True), cnn(seed=2)
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0, classes=classes, explainer=explainer, example=x)
    assert_matches_finite_difference(lambda: criterion(student(x)), student)


def test_running_statistics_count_once_and_losses_are_stable(x: Tensor) -> None:
    losses = []
    for moved in (0.0, 1e-10):
        student, plain = normed(seed=1), normed(seed=1)
        criterion = e2kd.E2KDLoss(student, cnn(seed=2), kd_weight=0, classes="all", explainer=e2kd.CAM(), example=x)
        losses.append(criterion(student(x + moved)).item())
        plain(x + moved)
        for own, host in zip(student.buffers(), plain.buffers(), strict=True):
            assert torch.equal(own, host)
    assert abs(losses[0] - losses[1]) < 1e-8


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 7), (4, 3, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_held_statistics_are_those_of_batch_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same numbers and ordinary gradients; held fixed, no gradient reaches another sample."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size, dtype=dtype).requires_grad_() for size in (shape, (3,), (3,)))
    expected = F.batch_norm(x, None, None, weight, bias, training=True)
    with Holding() as holding:
        found = F.batch_norm(x, None, None, weight, bias, training=True)
        running = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
        torch.testing.assert_close(F.batch_norm(x, *running, eps=0.0), x)
    tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **tolerance)
    along = torch.randn(shape, dtype=dtype)
    leaves = (x, weight, bias)
    both = (torch.autograd.grad((y * along).sum(), leaves, retain_graph=True) for y in (found, expected))
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    alone = holding.gradient(found[0].sum(), x)
    assert alone[0].all()
    assert not alone[1:].any()


@pytest.mark.parametrize("explainer", [e2kd.CAM("1.layer1.0.conv1"), e2kd.InputGradient()], ids=repr)
def test_gradients_of_bcos_networks_are_those_of_each_sample_alone(explainer: e2kd.Explainer, x: Tensor) -> None:
    student, teacher = bcos_cnn(seed=1), bcos_cnn(seed=2)
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0, explainer=explainer, example=x)
    loss, classes = criterion(student(x)), e2kd.explain(teacher, x).classes
    fixed = with_fixed_statistics(student, x)
    alone = torch.cat([e2kd.explain(fixed, x[i : i + 1], classes[i : i + 1], explainer).maps for i in range(len(x))])
    expected = 1 - e2kd.cosine(alone, e2kd.explain(teacher, x, classes, explainer).maps)
    torch.testing.assert_close(loss.detach(), expected.mean(), rtol=1e-8, atol=1e-8)
    assert_matches_finite_difference(lambda: criterion(student.train()(x)), student)


class NormedBranching(Branching):
    """BatchNorm in a head that only the trainer's own graph knows."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.out = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)).double()


@pytest.mark.parametrize("classes", ["all", "teacher"])
def test_maps_through_the_trainers_own_graph_are_those_of_each_sample_alone(classes: Any, x: Tensor) -> None:
    student, teacher, plain = NormedBranching(seed=2), Branching(seed=1), NormedBranching(seed=2)
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0, classes=classes, explainer=e2kd.CAM(), example=x)
    assert_matches_finite_difference(lambda: criterion(student(x)), student)
    assert criterion.explained.way == "graph"
    student.load_state_dict(plain.state_dict())
    loss = criterion(student(x))
    plain(x)
    for own, host in zip(student.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own, host, rtol=1e-12, atol=0)
    fixed, found = with_fixed_statistics(student, x), []
    for k in range(4) if classes == "all" else [None]:
        chosen = e2kd.explain(teacher, x).classes if k is None else torch.full((len(x),), k)
        alone = torch.cat(
            [e2kd.explain(fixed, x[i : i + 1], chosen[i : i + 1], e2kd.CAM()).maps for i in range(len(x))]
        )
        found.append(1 - e2kd.cosine(alone, e2kd.explain(teacher, x, chosen, e2kd.CAM()).maps))
    torch.testing.assert_close(loss.detach(), torch.stack(found).mean(), rtol=1e-8, atol=1e-8)


def test_a_batch_norm_that_can_not_be_held_fixed_is_refused(x: Tensor) -> None:
    """A head that could be run again when it was found, and not any more."""
    student = normed(seed=1)
    criterion = e2kd.E2KDLoss(student, cnn(seed=2), explainer=e2kd.CAM(), example=x)
    logits = student(x) * 1.01
    with pytest.raises((e2kd.UnsupportedModel, RuntimeError), match=r"BatchNorm '7' makes every logit depend"):
        criterion(logits)


class Scaled(nn.Module):
    """A scale that begins as 1, a parameter of the whole model's own, and another inside of a module."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Softplus())
        self.where, self.linear = where, nn.Linear(6, 4)
        self.own = nn.Parameter(torch.ones(6))
        self.norm = nn.BatchNorm1d(6, eps=0.0, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.trunk(images).mean((2, 3))
        return self.linear(pooled * self.own if self.where == "own" else self.norm(pooled))


@pytest.mark.parametrize("where", ["own", "norm"])
def test_a_head_that_begins_as_pooling_and_a_linear_layer_is_explained_as_it_becomes(where: str) -> None:
    model = Scaled(where).double().eval()
    x = torch.rand(4, 3, 16, 16, dtype=torch.double)
    e2kd.explain(model, x, explainer=e2kd.CAM())
    assert plan_for(model, e2kd.CAM(), x).linear is None
    with torch.no_grad():
        model.own *= torch.tensor([1.0, -2.0, 0.5, 3.0, 0.1, -1.0])
        model.norm.running_var.copy_(torch.tensor([1.0, 4.0, 9.0, 0.1, 0.01, 25.0]))  # type: ignore[union-attr]
    classes = torch.tensor([0, 1, 2, 3])
    scale = model.own if where == "own" else model.norm.running_var.rsqrt()  # type: ignore[union-attr]
    weights = (model.linear.weight * scale)[classes] / 49
    expected = torch.einsum("bchw,bc->bhw", model.trunk(x), weights)[:, None]
    torch.testing.assert_close(e2kd.explain(model, x, classes, e2kd.CAM()).maps, expected.detach())


def test_heads_of_pooling_and_a_linear_layer_keep_their_closed_form() -> None:
    x = torch.rand(2, 3, 16, 16, dtype=torch.double)
    assert plan_for(cnn(), e2kd.CAM(), x).linear == "6"
