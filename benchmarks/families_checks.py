"""Is an explanation term alive and right? Checked on one model by means that share no code with e2kd's short cuts.

- Student: gradients of the explanation term against central finite differences of the whole procedure, and against
  a slow reference that differentiates the model's own logits with respect to what a plain forward hook saw.
- Teacher: `e2kd.explain` against the same slow reference.
- Grid: the corner cells of the map must depend most on the pixels of their own corner.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import e2kd
from benchmarks.families_models import CLASSES, Subject
from e2kd.heads import Head
from e2kd.outputs import first_tensor, logits_of
from e2kd.plans import Plan

BATCH = 4
STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)  # of finite differences, relative to each parameter's size
CORNERS = ((0, 0), (0, -1), (-1, 0), (-1, -1))
TRIES = 5  # draws of images until a map is not zero everywhere; the last with noise in a head that begins as zeros


@dataclass(frozen=True)
class SignedCAM:
    """GradCAM without its final ReLU, which random networks so often end in: same sites, same gradients, never dead."""

    layer: str | None = None

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        """[B, C, h, w] twice -> [B, 1, h, w]."""
        return torch.einsum("bchw,bc->bhw", features, gradient.mean((2, 3))).unsqueeze(1)


def images_for(subject: Subject, seed: int, dtype: torch.dtype = torch.float32, batch: int = BATCH) -> Tensor:
    """Smooth random images [B, 3, H, W]: noise at two scales."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(batch, 3, subject.size, subject.size, generator=generator, dtype=dtype)
    coarse = torch.randn(batch, 3, 4, 4, generator=generator, dtype=dtype)
    return fine + 2 * F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)


def quiet(model: nn.Module) -> nn.Module:
    """The model without dropout and stochastic depth."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop", "drop_rate", "attn_drop", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def stirred(model: nn.Module) -> nn.Module:
    """The model with small noise in parameters that begin as zeros, which hide whole branches from any gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """BatchNorm statistics of these images, so that eval mode is as well conditioned as training."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def frozen_norms(model: nn.Module) -> nn.Module:
    """The model in train mode with its BatchNorm in eval mode: of few values, batch statistics are nearly a step."""
    for module in model.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def check_student(subject: Subject, teacher: nn.Module) -> dict[str, Any]:
    """One ordinary training step of the model as student, then the two comparisons in float64."""
    torch.manual_seed(0)
    student = subject.build().train()
    found = _first_step(subject, student, teacher)
    student = frozen_norms(settled(stirred(quiet(student)), images_for(subject, 1)))
    student, teacher = student.double(), copy.deepcopy(teacher).double()
    return found | _gradients(subject, student, teacher)


def _first_step(subject: Subject, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss())
    rates: list[float] = []
    for seed in range(TRIES):
        if seed == TRIES - 1 and rates == [1.0] * seed:
            stirred(student)
        student.zero_grad(set_to_none=True)
        began = time.perf_counter()
        loss = criterion(student(images_for(subject, seed)), torch.arange(BATCH) % CLASSES)
        loss.backward()
        seconds = time.perf_counter() - began
        rates.append(float(criterion.parts["zero_maps"]) / BATCH)
        if rates[-1] < 1:
            break
    finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in student.parameters())
    plan = criterion.explained._plan()
    assert plan.site is not None
    site = {
        "site": plan.site.layer,
        "is_cut": plan.site.is_cut,
        "layout": plan.site.layout.order + (f"+{plan.site.layout.prefix}" if plan.site.layout.prefix else ""),
        "head": type(plan.head).__name__ if plan.head else None,
        "way": criterion.explained.way,
        "zero_maps": rates[-1],
        "draws": len(rates),
        "head_begins_as_zeros": len(rates) == TRIES,
        "step_finite": bool(loss.isfinite()) and finite,
        "step_seconds": round(seconds, 3),
    }
    criterion.remove()
    return site


def _gradients(subject: Subject, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    images = images_for(subject, 1, torch.float64, batch=2)
    criterion = e2kd.E2KDLoss(
        student, teacher, None, explainer=SignedCAM(), kd_weight=0, task_weight=0, example=images[:2]
    )
    parameters = [p for p in student.parameters() if p.requires_grad]
    mine = _gradient_of(criterion, student, images, parameters)
    plan = criterion.explained._plan()
    target = e2kd.explain(teacher, images, explainer=SignedCAM())
    expected, trunk, grid = _reference_gradient(student, plan, images, target, parameters)
    alive = [bool(g.isfinite().all() and g.any()) for g, t in zip(mine, trunk, strict=True) if t]
    return {
        "grid": f"{grid[0]}x{grid[1]}",
        "alive": round(sum(alive) / max(len(alive), 1), 3),
        "trunk_tensors": len(alive),
        "reference_error": _relative(mine, expected),
        "difference_error": _difference_error(criterion, student, images, parameters, mine),
    }


def _gradient_of(
    criterion: e2kd.E2KDLoss, student: nn.Module, images: Tensor, parameters: list[nn.Parameter]
) -> list[Tensor]:
    loss = criterion(student(images))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _relative(mine: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest entry."""
    largest = max(float(e.abs().max()) for e in expected)
    return max(float((m - e).abs().max()) for m, e in zip(mine, expected, strict=True)) / max(largest, 1e-300)


@contextlib.contextmanager
def _hooked(model: nn.Module, name: str, prologue: Head | None) -> Iterator[list[Tensor]]:
    """Collects what a module returns; where a bare ReLU follows it, what that ReLU makes of it."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        features = first_tensor(output)
        assert features is not None
        if prologue is not None and not torch.equal(given := prologue.prologue(features), features):
            kept.append(given)
            return given
        kept.append(features if features.requires_grad else features.requires_grad_())
        return None

    plain = F.relu

    def relu_once(x: Tensor, inplace: bool = False) -> Tensor:
        return x if any(x is k for k in kept) else plain(x, inplace)

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        with mock.patch.object(F, "relu", relu_once):
            yield kept
    finally:
        handle.remove()


def _reference_maps(
    model: nn.Module, plan: Plan, images: Tensor, classes: Tensor | None, explainer: Any, *, create_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, maps and features from the model's own forward, by a hook and one gradient."""
    assert plan.site is not None
    with sdpa_kernel(SDPBackend.MATH), _hooked(model, plan.site.heard_by_name(), plan.head) as kept:
        logits = logits_of(model(images))
        chosen = logits.argmax(1) if classes is None else classes
        scores = logits.gather(1, chosen[:, None]).sum()
        (gradient,) = torch.autograd.grad(scores, kept[-1], create_graph=create_graph, retain_graph=True)
    size = (images.shape[-2], images.shape[-1])
    return logits, explainer(plan.maps(kept[-1], size), plan.maps(gradient, size)), kept[-1]


def _reference_gradient(
    student: nn.Module, plan: Plan, images: Tensor, target: e2kd.Explanation, parameters: list[nn.Parameter]
) -> tuple[list[Tensor], list[bool], tuple[int, int]]:
    """Gradients of the explanation term, which parameters lie before the site, and the grid."""
    _, maps, features = _reference_maps(student, plan, images, target.classes, SignedCAM(), create_graph=True)
    loss = (1 - e2kd.cosine(maps, target.maps)).mean()
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    projection = torch.randn(features.shape, generator=torch.Generator().manual_seed(6)).to(features)
    reached = torch.autograd.grad((features * projection).sum(), parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return gradients, [g is not None for g in reached], (maps.shape[2], maps.shape[3])


def _difference_error(
    criterion: e2kd.E2KDLoss,
    student: nn.Module,
    images: Tensor,
    parameters: list[nn.Parameter],
    gradients: list[Tensor],
) -> float:
    """Relative error of the directional derivative against central differences, the best of several step sizes."""
    generator = torch.Generator().manual_seed(2)
    scales = [float(p.detach().square().mean().sqrt()) or 0.1 for p in parameters]
    along = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) * s for p, s in zip(parameters, scales, strict=True)
    ]
    exact = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True))
    start = [p.detach().clone() for p in parameters]

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for p, s, d in zip(parameters, start, along, strict=True):
                p.copy_(s + step * d)
        return criterion(student(images)).item()

    errors = []
    for step in STEPS:
        found = (loss_at(step) - loss_at(-step)) / (2 * step)
        errors.append(abs(found - exact) / max(abs(exact), 1e-12))
        if errors[-1] < 1e-4:
            break
    loss_at(0.0)
    return min(errors)


def check_teacher(subject: Subject, student: nn.Module) -> dict[str, Any]:
    """The model as a teacher: its maps against the slow reference's, its grid's corners, and one step."""
    torch.manual_seed(0)
    images = images_for(subject, 3)
    model = settled(stirred(quiet(subject.build())), images).eval()
    found = e2kd.explain(model, images)
    signed = e2kd.explain(model, images, explainer=SignedCAM())
    plan = e2kd.plans.plan_for(model, SignedCAM(), images)
    logits, maps, _ = _reference_maps(model, plan, images, None, SignedCAM(), create_graph=False)
    criterion = e2kd.E2KDLoss(student.train(), model, nn.CrossEntropyLoss())
    loss = criterion(student(images), torch.arange(BATCH) % CLASSES)
    loss.backward()
    criterion.remove()
    return {
        "logits_error": _relative([found.logits], [logits.detach()]),
        "maps_error": _relative([signed.maps], [maps.detach()]),
        "teacher_zero_maps": float((~found.maps.flatten(1).any(1)).double().mean()),
        "teacher_step_finite": bool(loss.isfinite()),
        **corner_shares(model, plan, images),
    }


def corner_shares(model: nn.Module, plan: Plan, images: Tensor) -> dict[str, Any]:
    """On which pixels the four corner cells depend: energy of the gradient of random projections of their features.

    `corners` is the share of each in its own quadrant of the image, `common` what all four share, quadrant by quadrant:
    1 where every cell sees the same. `along` is how far the centre of that energy moves
    from the left cells to the right ones and from the top ones to the bottom ones, as a share of the image's side;
    `across` how far it moves the other way, which a transposed grid would swap.
    """
    assert plan.site is not None
    inputs = images.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), _hooked(model, plan.site.heard_by_name(), plan.head) as kept:
        model(inputs)
    maps = plan.maps(kept[-1], (images.shape[-2], images.shape[-1]))
    directions = torch.randn(3, maps.shape[1], generator=torch.Generator().manual_seed(4)).to(maps)
    energies = []
    for row, column in CORNERS:
        energy = torch.zeros(images.shape[-2:], dtype=torch.float64)
        for direction in directions:
            score = (maps[:, :, row, column] * direction).sum()
            (gradient,) = torch.autograd.grad(score, inputs, retain_graph=True)
            energy += gradient.double().square().sum((0, 1))
        energies.append(energy / energy.sum())
    a, b, c, d = (_centre(energy) for energy in energies)
    right, down = (b + d - a - c) / 2, (c + d - a - b) / 2
    quadrants = torch.stack([_quadrants(energy) for energy in energies])
    return {
        "corners": [round(float(q[corner]), 3) for q, corner in zip(quadrants, CORNERS, strict=True)],
        "common": round(float(quadrants.amin(0).sum()), 3),
        "along": round(float(min(right[1], down[0])), 4),
        "across": round(float(max(right[0].abs(), down[1].abs())), 4),
    }


def _centre(energy: Tensor) -> Tensor:
    """Centre (y, x) of an energy [H, W] of sum 1, from 0 to 1."""
    return torch.stack([energy.sum(1 - axis) @ torch.linspace(0, 1, energy.shape[axis]).double() for axis in (0, 1)])


def _quadrants(energy: Tensor) -> Tensor:
    """What lies in each quadrant of the image, [2, 2]; of an odd side the middle belongs to none."""
    half = energy.shape[-1] // 2
    rows = torch.stack([energy[:half], energy[-half:]]).sum(1)
    return torch.stack([rows[:, :half], rows[:, -half:]], 1).sum(2)


def silence() -> None:
    """No warnings: random networks have dead maps, which the table counts."""
    warnings.simplefilter("ignore")
