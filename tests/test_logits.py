"""Logit distillation: against slow loops, in extremes, and at its identity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import e2kd


def logits(seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_kd_equals_a_loop(tau: float) -> None:
    student, teacher = logits(), logits(1)
    total = 0.0
    for s, t in zip((student / tau).softmax(1).tolist(), (teacher / tau).softmax(1).tolist(), strict=True):
        total += sum(q * (math.log(q) - math.log(p)) for p, q in zip(s, t, strict=True))
    assert e2kd.kd_loss(student, teacher, tau).item() == pytest.approx(tau**2 * total / 4)


def test_multilabel_kd_equals_a_loop() -> None:
    student, teacher = logits(), logits(1)
    total = 0.0
    for p, q in zip(student.sigmoid().flatten().tolist(), teacher.sigmoid().flatten().tolist(), strict=True):
        total += q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert e2kd.multilabel_kd_loss(student, teacher).item() == pytest.approx(total / 4)


@pytest.mark.parametrize("loss", [e2kd.kd_loss, e2kd.multilabel_kd_loss])
def test_zero_at_the_teacher_and_positive_elsewhere(loss) -> None:
    assert loss(logits(), logits()).item() == 0
    assert (loss(logits(), logits(1), reduction="none") > 0).all()
    assert torch.autograd.gradcheck(lambda s: loss(s, logits(1)), (logits().requires_grad_(),))


@pytest.mark.parametrize("loss", [e2kd.kd_loss, e2kd.multilabel_kd_loss])
def test_extreme_logits_stay_finite(loss) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = loss(student, torch.tensor([[-1e4, 1e4, 0.0]]))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_gradient_does_not_depend_on_the_scale_tau_squared_removes() -> None:
    """For small logits the gradient of τ² KL tends to (s - t)/K at any temperature (Hinton et al.)."""
    student, teacher = logits(scale=1e-3).requires_grad_(), logits(1, scale=1e-3)
    gradients = [torch.autograd.grad(e2kd.kd_loss(student, teacher, tau), student)[0] for tau in (1.0, 10.0)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-7)


def test_half_precision_is_computed_in_float32() -> None:
    assert e2kd.kd_loss(logits().half(), logits(1).half()).dtype == torch.float32


@pytest.mark.parametrize("module", [e2kd.KDLoss(3.0), e2kd.MultiLabelKDLoss()])
def test_modules_equal_their_functions(module) -> None:
    function = {"KDLoss": lambda s, t: e2kd.kd_loss(s, t, 3.0), "MultiLabelKDLoss": e2kd.multilabel_kd_loss}
    torch.testing.assert_close(module(logits(), logits(1)), function[type(module).__name__](logits(), logits(1)))


def test_bad_input_raises_a_sentence() -> None:
    with pytest.raises(ValueError, match="same classes"):
        e2kd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="finite temperature > 0"):
        e2kd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)
    with pytest.raises(ValueError, match="reduction"):
        e2kd.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), reduction="sum")
