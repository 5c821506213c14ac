"""Warnings point at the user's own line, however the criterion was called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import cnn
from torch import Tensor, nn

import e2kd
from e2kd.baselines import AT, FitNets
from e2kd.baselines.untrained import STEPS
from e2kd.errors import warn_user
from e2kd.guidance import GuidanceLoss

X, Y = torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)

Step = Callable[[], Any]


class Silent:
    """An explainer whose maps are zero everywhere."""

    layer = None

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        return (features * gradient).sum(1, keepdim=True) * 0


class Cut(Silent):
    """An explainer whose maps have no graph."""

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        return (features * gradient).sum(1, keepdim=True).detach()


def evaluated() -> tuple[nn.Module, Step]:
    student = cnn()
    criterion = e2kd.E2KDLoss(student, cnn(8), nn.CrossEntropyLoss()).eval()
    return criterion, lambda: criterion(student(X), Y)


def guided() -> tuple[nn.Module, Step]:
    student = cnn()
    criterion = GuidanceLoss(student, nn.CrossEntropyLoss()).eval()
    return criterion, lambda: criterion(student(X), Y, torch.ones(4, 16, 16))


def probabilities() -> tuple[nn.Module, Step]:
    student = cnn()
    criterion = e2kd.E2KDLoss(student, cnn(8), weight=0)
    return criterion, lambda: criterion(student(X).softmax(1), Y)


def dead() -> tuple[nn.Module, Step]:
    student = cnn()
    criterion = e2kd.E2KDLoss(student, cnn(8), explainer=Silent())
    return criterion, lambda: criterion(student(X), Y)


def graphless() -> tuple[nn.Module, Step]:
    student = cnn()
    criterion = e2kd.E2KDLoss(student, cnn(8), explainer=Cut())
    return criterion, lambda: criterion(student(X), Y)


def inside() -> tuple[nn.Module, Step]:
    """A rival in the place of the criterion, whose compared features are frozen."""
    student = cnn()
    criterion = e2kd.E2KDLoss(student, cnn(8), AT(student, cnn(8), nn.CrossEntropyLoss(), layers=["1"]))
    student[:2].requires_grad_(False)
    return criterion, lambda: criterion(student(X), Y)


def forgotten() -> tuple[nn.Module, Step]:
    """Trainable parts that the optimizer was not given."""
    student = cnn()
    criterion = FitNets(student, cnn(8), nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)

    def train() -> None:
        for _ in range(STEPS):
            criterion(student(X), Y).backward()
            optimizer.step()

    return criterion, train


CASES = [evaluated, guided, probabilities, dead, graphless, inside, forgotten]


@pytest.mark.parametrize("hooked", [False, True], ids=["bare", "hooked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_warnings_are_of_the_users_line(case: Callable[[], tuple[nn.Module, Step]], hooked: bool) -> None:
    criterion, step = case()
    if hooked:
        criterion.register_forward_hook(lambda *_: None)
    with pytest.warns(e2kd.NoEffectWarning) as caught:
        step()
    assert {warning.filename for warning in caught if warning.category is e2kd.NoEffectWarning} == {__file__}


def test_warnings_of_functions_are_of_the_users_line() -> None:
    with pytest.warns(UserWarning, match="UniCAM of 6 images") as caught:
        e2kd.unicam(cnn(), cnn(8), X.repeat(2, 1, 1, 1)[:6].clone(), layers=["1"])
    assert caught[0].filename == __file__


def test_compiled_steps_warn_too() -> None:
    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        warn_user("nothing was learned")
        return x + 1

    with pytest.warns(e2kd.NoEffectWarning, match="nothing was learned") as caught:
        assert step(torch.zeros(2)).sum() == 2
    assert caught[0].filename == __file__


def test_a_warning_of_ours_alone_is_still_given() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec("warn_user('at the very end')", {"__name__": "torch.somewhere", "warn_user": warn_user})
    assert caught[0].filename == __file__
