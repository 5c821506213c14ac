"""Properties by name, asserted over every explainer and similarity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference import Case, cosine, gradient, reference_step
from torch import Tensor, nn

import e2kd


def assert_matches_finite_difference(loss: Callable[[], Tensor], model: nn.Module, eps: float = 1e-6) -> None:
    """The gradient along a random direction in parameter space equals the central difference, in float64."""
    torch.manual_seed(7)
    parameters = [p for p in model.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in parameters]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    assert slope != 0

    def at(step: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=step)
        value = loss().detach()
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=step)
        return value

    torch.testing.assert_close(slope, (at(eps) - at(-eps)) / (2 * eps), rtol=1e-5, atol=1e-9)


def assert_self_is_one(similarity: Callable[[Tensor, Tensor], Tensor], maps: Tensor) -> None:
    """A map is as similar to itself as can be: 1."""
    torch.testing.assert_close(similarity(maps, maps), torch.ones(len(maps), dtype=maps.dtype))


def assert_in_range(similarity: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> None:
    """Similarities lie in [-1, 1]."""
    values = similarity(a, b)
    assert values.shape == (len(a),)
    assert values.abs().max() <= 1 + 1e-12


def assert_scale_invariant(similarity: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> None:
    """Neither the student's nor the teacher's scale matters, over the whole range of the type."""
    for scale in (1e-30, 1e-3, 1e30):
        torch.testing.assert_close(similarity(a * scale, b), similarity(a, b))
        torch.testing.assert_close(similarity(a, b * scale), similarity(a, b))


def assert_permutation_equivariant(similarity: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> None:
    """The order of the batch does not matter."""
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(similarity(a[order], b[order]), similarity(a, b)[order])


def assert_bfloat16_has_the_float32_direction(
    on: Case, teach: Callable[[nn.Module, Case], e2kd.E2KDLoss]
) -> e2kd.E2KDLoss:
    """A step under autocast points where the reference's float32 step does; the criterion it was taken with."""
    _, wanted = reference_step(on.copy(), on)
    student = on.copy()
    criterion = teach(student, on)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(student(on.images), on.targets)
    loss.backward()
    assert cosine(gradient(student), wanted) > 0.99
    return criterion
