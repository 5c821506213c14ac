"""The slow, obviously right e²KD step, and the tiny students and teachers that tests compare it on.

It hooks a layer by name, differentiates through the user's own forward under the math kernel of attention, and
uses nothing of e2kd but its B-cos layers. Any host, wrapper or precision must give the same loss and gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from e2kd import bcos

CLASSES = 7
SIDE = 96


@dataclass(frozen=True)
class Case:
    """A student with a layer to explain, its teacher, and a batch."""

    student: nn.Module
    layer: str
    teacher: nn.Module
    teacher_layer: str
    images: Tensor
    targets: Tensor

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.student)

    def half(self, which: int) -> Case:
        half = len(self.images) // 2
        rows = slice(which * half, (which + 1) * half)
        return replace(self, images=self.images[rows], targets=self.targets[rows])

    def to(self, dtype: torch.dtype) -> Case:
        student, teacher = copy.deepcopy(self.student).to(dtype), copy.deepcopy(self.teacher).to(dtype)
        return replace(self, student=student, teacher=teacher, images=self.images.to(dtype))


def lively(model: nn.Module, seed: int) -> nn.Module:
    """Noise on every parameter, so that no zero-initialised scale or bias hides a term."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def cnn(seed: int = 1, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    return lively(timm.create_model("test_resnet", num_classes=CLASSES, **settings), seed).train()


def vit(seed: int = 1, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    settings = {"img_size": SIDE, "depth": 3, "embed_dim": 48, "num_classes": CLASSES} | settings
    return lively(timm.create_model("vit_tiny_patch16_224", **settings), seed).train()


def small(seed: int = 0, *, hidden: bool = False) -> nn.Module:
    """The least network with a map; its last one is the output of "3". With a hidden layer CAM has no closed form."""
    torch.manual_seed(seed)
    trunk = [nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()]
    middle = [nn.Linear(8, 8), nn.Tanh()] if hidden else []
    return nn.Sequential(*trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *middle, nn.Linear(8, CLASSES))


class Branching(nn.Module):
    """A head that looks at its values, so that it can't be followed and only the trainer's own graph is left."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.trunk, self.fc = small(seed)[:4], nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.trunk(images).mean((2, 3))
        return self.fc(pooled if pooled.sum() > 0 else -pooled)


def convnext(seed: int = 1, **settings: Any) -> nn.Module:
    """A norm between pooling and classifier: no closed form, and timm's own `forward_head`."""
    torch.manual_seed(seed)
    return lively(timm.create_model("test_convnext", num_classes=CLASSES, **settings), seed).train()


STUDENTS = {"cnn": (cnn, "layer4"), "vit": (vit, "blocks.1"), "convnext": (convnext, "stages")}


def case(name: str, *, batch: int = 4, seed: int = 4, **settings: Any) -> Case:
    """A student by name, a CNN teacher whose maps are alive, and random images."""
    build, layer = STUDENTS[name]
    student, teacher = build(seed, **settings), cnn(seed + 1).eval()
    generator = torch.Generator().manual_seed(seed + 2)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
    targets = torch.randint(0, CLASSES, (batch,), generator=generator)
    return Case(student, layer, teacher, "layer4", images, targets)


def bcos_case(*, batch: int = 4, seed: int = 4) -> Case:
    """A B-cos student that encodes its images and a B-cos teacher that is given them encoded."""
    torch.manual_seed(seed)
    student, teacher = (bcos.BcosResNet(bcos.BasicBlock, (1, n), CLASSES, width=4, small_images=True) for n in (1, 2))
    generator = torch.Generator().manual_seed(seed + 2)
    images = torch.rand(batch, 3, 16, 16, generator=generator)
    targets = torch.randint(0, CLASSES, (batch,), generator=generator)
    return Case(nn.Sequential(bcos.AddInverse(), student).train(), "", teacher.eval(), "", images, targets)


def freeze_statistics(model: nn.Module) -> nn.Module:
    """BatchNorm in eval mode, so that a batch is the sum of its parts."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def to_maps(tokens: Tensor) -> Tensor:
    """[B, C, h, w] as it is; [B, tokens, C] without the tokens that come before a square grid."""
    if tokens.ndim == 4:
        return tokens
    side = int(tokens.shape[1] ** 0.5)
    return tokens[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))


def gradcam(model: nn.Module, images: Tensor, layer: str, classes: Tensor | None = None) -> tuple[Any, Tensor, Tensor]:
    """The model's output, its logits and differentiable GradCAM maps of `classes` (its top class by default).

    Where BatchNorm after the layer takes the statistics of the batch, the maps are those of a second pass that is given
    the statistics of the first: they are no function of its features then, and each map is of its own image.
    """
    kept: list[Tensor] = []
    known_at: list[int] = []
    statistics: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        known_at.append(len(statistics))
        features = output if isinstance(output, Tensor) else output[0]
        if features.requires_grad:
            kept.append(features)
            return None
        kept.append(features.detach().requires_grad_())  # frozen trunk: the features' gradient exists all the same
        return kept[-1]

    handle, state = model.get_submodule(layer).register_forward_hook(keep), torch.get_rng_state()
    with sdpa_kernel(SDPBackend.MATH), batch_norm_by(statistics, given=False):
        outputs = again = model(images)
    if len(statistics) > known_at[-1]:
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        with sdpa_kernel(SDPBackend.MATH), batch_norm_by(statistics, given=True):
            again = model(images)
        torch.set_rng_state(after)
    handle.remove()
    logits = logits_in(outputs)
    classes = logits.argmax(1) if classes is None else classes
    scores = logits_in(again).gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(scores, kept[-1], create_graph=True)
    features, gradient = to_maps(kept[-1]), to_maps(gradient)
    return outputs, logits, torch.relu((features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True))


@contextmanager
def batch_norm_by(statistics: list[tuple[Tensor, Tensor]], *, given: bool) -> Iterator[None]:
    """Inside, every `batch_norm` in train mode adds its batch's variance and mean, or takes the next that are given."""
    original, left = F.batch_norm, iter(statistics)

    def batch_norm(
        x: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False,
        momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if training and not given:
            statistics.append(torch.var_mean(x, [0, *range(2, x.ndim)], correction=0))
        if training and given:
            var, mean = next(left)
            shape = [1, -1] + [1] * (x.ndim - 2)
            out = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt()
            out = out if weight is None else out * weight.view(shape)
            return out if bias is None else out + bias.view(shape)
        return original(x, mean, var, weight, bias, training, momentum, eps)

    F.batch_norm = batch_norm
    try:
        yield
    finally:
        F.batch_norm = original


def bcos_weights(
    model: nn.Module, images: Tensor, layer: str, classes: Tensor | None = None
) -> tuple[Any, Tensor, Tensor]:
    """Logits, twice, and W(x) of a B-cos network, from the layers alone."""
    network = model[1] if isinstance(model, nn.Sequential) else model
    x = torch.cat([images, 1 - images], 1).requires_grad_()
    with bcos.explanation_mode() as mode:
        logits = network(x)
    classes = logits.argmax(1) if classes is None else classes
    return logits, logits, mode.weights(logits.gather(1, classes[:, None]), x, create_graph=True)


def logits_in(outputs: Any) -> Tensor:
    outputs = getattr(outputs, "logits", outputs)
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def task(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_in(outputs), targets)


def reference_loss(
    student: nn.Module,
    case: Case,
    *,
    weight: float = 1.0,
    kd_weight: float = 1.0,
    task_weight: float = 1.0,
    criterion: Callable[[Any, Tensor], Tensor] = task,
    teacher_images: Tensor | None = None,
) -> Tensor:
    """The e²KD loss of the student as it stands, on the case's teacher and batch; differentiable."""
    teacher = copy.deepcopy(case.teacher).eval()
    given = case.images if teacher_images is None else teacher_images
    how = gradcam if case.layer else bcos_weights
    _, teacher_logits, theirs = how(teacher, given, case.teacher_layer)
    teacher_logits, theirs = teacher_logits.detach(), theirs.detach()
    outputs, logits, mine = how(student, case.images, case.layer, teacher_logits.argmax(1))
    if theirs.shape[-1] != mine.shape[-1]:
        assert theirs.shape[-1] < mine.shape[-1], "the reference only enlarges"
        theirs = F.interpolate(theirs, mine.shape[-2:], mode="bilinear", align_corners=False)
    a, b = mine.flatten(1), theirs.flatten(1)
    alive = (a != 0).any(1) & (b != 0).any(1)
    similarity = a.new_zeros(len(a))
    similarity[alive] = F.cosine_similarity(a[alive], b[alive], dim=1, eps=0)
    p, q = teacher_logits.softmax(1), logits.softmax(1)
    kl = (p * (p.log() - q.log())).sum(1).mean()
    return task_weight * criterion(outputs, case.targets) + kd_weight * kl + weight * (1 - similarity).mean()


def reference_step(student: nn.Module, case: Case, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss [] and the student's gradient, of one reference step that also runs backward."""
    loss = reference_loss(student, case, **settings)
    loss.backward()
    return loss.detach(), gradient(student)


def gradient(model: nn.Module) -> Tensor:
    """All gradients of a model in one vector, zeros where a parameter has none."""
    parts = [torch.zeros_like(p) if p.grad is None else full(p.grad) for p in model.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


def full(value: Tensor) -> Tensor:
    """The whole of a sharded tensor; any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def snapshot(*holders: Any) -> list[Tensor]:
    """Copies of all parameters, buffers, gradients and optimizer state."""
    found: list[Tensor] = []
    for holder in holders:
        if isinstance(holder, torch.optim.Optimizer):
            found += [v for state in holder.state.values() for v in state.values() if isinstance(v, Tensor)]
        else:
            found += [*holder.parameters(), *holder.buffers()]
            found += [p.grad for p in holder.parameters() if p.grad is not None]
    return [value.detach().clone() for value in found]


def identical(before: list[Tensor], after: list[Tensor]) -> bool:
    """Bit for bit, nan included."""
    return len(before) == len(after) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
        for a, b in zip(before, after, strict=True)
    )
