"""Similarities and resizing: named properties, extremes of the number range, the traps of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from properties import (
    assert_in_range,
    assert_permutation_equivariant,
    assert_scale_invariant,
    assert_self_is_one,
)
from torch import Tensor

import e2kd
from e2kd.similarity import is_zero, resize


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 6])
def test_cosine_has_the_properties_of_a_similarity(channels: int) -> None:
    a, b = maps(5, channels, 7, 7), maps(5, channels, 7, 7, seed=1)
    assert_self_is_one(e2kd.cosine, a)
    assert_in_range(e2kd.cosine, a, b)
    assert_scale_invariant(e2kd.cosine, a, b)
    assert_permutation_equivariant(e2kd.cosine, a, b)
    torch.testing.assert_close(e2kd.cosine(a, -a), -torch.ones(5, dtype=torch.float64))


def test_cosine_equals_torch_on_the_students_grid() -> None:
    a, b = maps(4, 1, 14, 14), maps(4, 1, 7, 7, seed=1)
    up = F.interpolate(b, (14, 14), mode="bilinear")
    torch.testing.assert_close(e2kd.cosine(a, b), F.cosine_similarity(a.flatten(1), up.flatten(1)))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-8, 1.0, 1e18])
def test_cosine_and_its_direction_survive_any_float32_scale(scale: float) -> None:
    a, b = maps(3, 1, 5, 5, dtype=torch.float32), maps(3, 1, 5, 5, seed=1, dtype=torch.float32)
    torch.testing.assert_close(e2kd.cosine(a * scale, b), e2kd.cosine(a, b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    a, b = maps(3, 1, 5, 5).to(dtype), maps(3, 1, 5, 5, seed=1).to(dtype)
    assert e2kd.cosine(a, b).dtype == torch.float32
    torch.testing.assert_close(e2kd.cosine(a, b), e2kd.cosine(a.float(), b.float()))


def test_zero_maps_give_zero_and_no_gradient() -> None:
    a = maps(4, 1, 3, 3).requires_grad_()
    b = maps(4, 1, 3, 3, seed=1)
    dead = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)[:, None, None, None]
    student = a * dead
    values = e2kd.cosine(student, b * torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)[:, None, None, None])
    assert values[1:].tolist() == [0.0, 0.0, 0.0]
    values.sum().backward()
    assert a.grad is not None
    assert a.grad[0].abs().sum() > 0
    assert a.grad[1:].abs().sum() == 0
    assert a.grad.isfinite().all()


def test_gradient_of_cosine_is_exact() -> None:
    a, b = maps(3, 2, 3, 3).requires_grad_(), maps(3, 2, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda x: e2kd.cosine(x, b), (a,))
    assert torch.autograd.gradgradcheck(lambda x: e2kd.cosine(x, b), (a,))


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 1, 7, 7), (3, 1, 7, 7)), ((2, 1, 7, 7), (2, 6, 7, 7)), ((2, 7), (2, 7))]
)
def test_maps_that_can_not_be_compared_raise(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Expected maps \[B, C, h, w\]"):
        e2kd.cosine(torch.rand(student), torch.rand(teacher))


def test_a_similarity_that_reduces_the_batch_raises() -> None:
    with pytest.raises(ValueError, match="one value per sample"):
        e2kd.ExplanationLoss(lambda a, b: (a * b).sum())(torch.rand(2, 1, 3, 3), torch.rand(2, 1, 3, 3))


def test_explanation_loss_is_one_minus_similarity() -> None:
    a, b = maps(4, 1, 5, 5), maps(4, 1, 5, 5, seed=1)
    each = e2kd.ExplanationLoss(reduction="none")(a, b)
    torch.testing.assert_close(each, 1 - e2kd.cosine(a, b))
    torch.testing.assert_close(e2kd.ExplanationLoss()(a, b), each.mean())


@pytest.mark.parametrize(
    ("given", "wanted"), [((8, 1), (4, 1)), ((14, 2), (7, 1)), ((14, 14), (7, 1)), ((5, 1), (9, 3)), ((6, 4), (9, 1))]
)
def test_narrow_maps_are_resized_as_flat_ones(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    """torch's antialiased interpolation returns wrong values where rows of one pixel shrink, but not columns."""
    tall, shrinks = maps(2, 3, *given), given[0] > wanted[0] or given[1] > wanted[1]
    lying = F.interpolate(tall.mT, wanted[::-1], mode="bilinear", antialias=shrinks)
    torch.testing.assert_close(resize(tall, wanted), lying.mT)


def test_resize_down_averages_and_up_interpolates() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    down = resize(ramp, (4, 4))
    assert (down[..., 1:] > down[..., :-1]).all()
    torch.testing.assert_close(down.mean(), ramp.mean())
    assert resize(ramp, (8, 8)) is ramp


def test_is_zero_counts_maps_not_cells() -> None:
    assert is_zero(torch.stack([torch.zeros(1, 2, 2), torch.tensor([[[0.0, -1e-30], [0, 0]]])])).tolist() == [
        True,
        False,
    ]
