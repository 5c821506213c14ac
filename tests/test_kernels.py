"""Students whose head can't be run again: their own forward is differentiated twice, so it needs the math kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from properties import assert_bfloat16_has_the_float32_direction
from reference import CLASSES, Case, case, error, gradient, lively, reference_step
from timm.models.crossvit import CrossVit
from timm.models.pit import PoolingVisionTransformer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import e2kd
from e2kd.kernels import fused_attention_between

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 48


def crossvit() -> nn.Module:
    """Two branches; each one's class token attends to the patches of the other."""
    sizes: dict[str, Any] = {"patch_size": (8, 12), "embed_dim": (16, 32), "depth": ((1, 2, 0),), "num_heads": (2, 2)}
    return CrossVit(img_size=SIDE, img_scale=(1.0, 1.0), mlp_ratio=(2, 2, 1), num_classes=CLASSES, **sizes)


def pit() -> nn.Module:
    """Passes pairs of tensors on, and cuts tokens by a number from before the explained layer."""
    sizes: dict[str, Any] = {"base_dims": (16, 16, 16), "depth": (1, 1, 2), "heads": (1, 2, 2), "mlp_ratio": 2}
    return PoolingVisionTransformer(
        img_size=SIDE, patch_size=8, stride=4, stem_type="overlap", num_classes=CLASSES, **sizes
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "crossvit": (crossvit, "blocks.0.fusion.1.norm1"),
    "pit": (pit, "transformers.2.blocks.0"),
}
every = pytest.mark.parametrize("name", MODELS)


def made(name: str, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    build, layer = MODELS[name]
    base = case("cnn")
    images = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6))
    return Case(lively(build(), 3).train(), layer, base.teacher, base.teacher_layer, images, base.targets).to(dtype)


def teach(student: nn.Module, on: Case) -> e2kd.E2KDLoss:
    return e2kd.E2KDLoss(student, on.teacher, nn.CrossEntropyLoss(), example=on.images[:2])


def kernels() -> tuple[bool, ...]:
    """Which kernels of attention are allowed now."""
    allowed = torch.backends.cuda
    return (
        allowed.flash_sdp_enabled(),
        allowed.mem_efficient_sdp_enabled(),
        allowed.cudnn_sdp_enabled(),
        allowed.math_sdp_enabled(),
    )


@every
def test_step_is_exact(name: str) -> None:
    on = made(name)
    wanted_loss, wanted = reference_step(on.copy(), on)
    _, plain = reference_step(on.copy(), on, weight=0)
    student, before = on.copy(), kernels()
    criterion = teach(student, on)
    for _ in range(2):
        student.zero_grad()
        loss = criterion(student(on.images), on.targets)
        loss.backward()
        torch.testing.assert_close(loss.detach(), wanted_loss, rtol=1e-10, atol=0)
        assert error(gradient(student), wanted) < 1e-10
    assert error(plain, wanted) > 1e-3
    assert criterion.explained.way == "graph"
    assert kernels() == before


@every
def test_step_under_bfloat16_autocast_has_the_float32_direction(name: str) -> None:
    assert_bfloat16_has_the_float32_direction(made(name, torch.float32), teach)


def _fused(outputs: Tensor, images: Tensor) -> bool:
    return fused_attention_between(outputs, images) is not None


def test_only_what_follows_the_layer_in_training_runs_under_the_math_kernel() -> None:
    on = made("pit")
    student = on.copy()
    images = on.images.requires_grad_() * 1
    features: list[Tensor] = []
    student.get_submodule(on.layer).register_forward_hook(lambda m, a, out: features.append(out))
    assert _fused(student(images), features[-1])
    criterion = teach(student, on)
    outputs = student(images)
    assert not _fused(outputs, features[-1])
    assert _fused(outputs, images)
    student.eval()
    assert _fused(student(images), features[-1])
    student.train()
    criterion.remove()
    assert _fused(student(images), features[-1])


def test_users_own_choice_of_kernels_comes_back() -> None:
    on = made("crossvit")
    student = on.copy()
    criterion = teach(student, on)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        before = kernels()
        criterion(student(on.images), on.targets).backward()
        assert kernels() == before


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_interrupted_forward_does_not_leave_the_math_kernel_on(interruption: type[BaseException]) -> None:
    on = made("pit")
    student, before = on.copy(), kernels()
    criterion = teach(student, on)
    seen: list[tuple[bool, ...]] = []

    def interrupt(module: nn.Module, args: Any) -> None:
        seen.append(kernels())
        raise interruption

    handle = student.transformers[2].blocks[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(interruption):
        student(on.images)
    handle.remove()
    assert seen[0] != before
    assert kernels() == before or interruption is KeyboardInterrupt
    loss = criterion(student(on.images), on.targets)
    assert kernels() == before
    loss.backward()


def test_two_criteria_on_one_student_leave_the_kernels_as_they_were() -> None:
    on, before = made("pit"), kernels()
    student = on.copy()
    criteria = [teach(student, on) for _ in range(2)]
    outputs = student(on.images)
    assert kernels() == before
    for criterion in criteria:
        criterion(outputs, on.targets)
    criteria[0].remove()
    student(on.images)
    assert kernels() == before


@every
def test_copies_run_with_any_kernel(name: str) -> None:
    on = made(name)
    student = on.copy()
    criterion = teach(student, on)
    before, seen = kernels(), list[tuple[bool, ...]]()
    twin = copy.deepcopy(student)
    for module in twin.modules():
        module.register_forward_hook(lambda *_: seen.append(kernels()))
    twin(on.images)
    assert set(seen) == {before}
    assert criterion.training


def test_compiled_student_is_refused() -> None:
    on = made("pit")
    student = on.copy()
    criterion = teach(student, on)
    outputs = torch.compile(student, backend="aot_eager")(on.images)
    with pytest.raises(e2kd.UnsupportedModel, match="compile"):
        criterion(outputs, on.targets)
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["criterion_first", "checkpoint_first"])
def test_step_with_the_last_block_checkpointed_is_exact(order: str) -> None:
    on = made("pit")
    _, wanted = reference_step(on.copy(), on)
    student = on.copy()
    criterion = teach(student, on) if order == "criterion_first" else None
    blocks = student.transformers[2].blocks
    blocks[1] = checkpoint_wrapper(blocks[1], CheckpointImpl.NO_REENTRANT)
    criterion = criterion or teach(student, on)
    criterion(student(on.images), on.targets).backward()
    assert error(gradient(student), wanted) < 1e-10


@every
def test_step_of_a_checkpointed_model_is_exact(name: str) -> None:
    on = made(name)
    _, wanted = reference_step(on.copy(), on)
    student = on.copy()
    criterion = teach(student, on)
    model = partial(checkpoint, student, use_reentrant=False)
    criterion(model(on.images), on.targets).backward()
    assert error(gradient(student), wanted) < 1e-10
