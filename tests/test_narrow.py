"""The narrow replay of class-token transformers: the same numbers as the whole head, or the whole head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers as hf
from nets import TinyViT, pair
from properties import assert_bfloat16_has_the_float32_direction, assert_matches_finite_difference
from reference import CLASSES, Case, case, error, gradient, lively, reference_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import e2kd
from e2kd.narrow import NotNarrow
from e2kd.plans import Plan, plan_for

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 64
TINY = {"img_size": SIDE, "depth": 3, "embed_dim": 48, "num_classes": CLASSES}


def of_timm(name: str = "vit_tiny_patch16_224", **settings: Any) -> nn.Module:
    return timm.create_model(name, **TINY | settings)


def unfused(model: nn.Module) -> nn.Module:
    """Attention written out as two products."""
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def of_torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(SIDE, 16, 3, 2, 32, 64, num_classes=CLASSES)


def of_transformers(model: type[nn.Module], attention: str) -> nn.Module:
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    configuration = model.config_class(image_size=SIDE, num_labels=CLASSES, **sizes)
    configuration._attn_implementation = attention
    return model(configuration)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "vit": (of_timm, "blocks.1"),
    "layer_scale": (partial(of_timm, init_values=1e-5), "blocks.1"),
    "qk_norm": (partial(of_timm, qk_norm=True), "blocks.1"),
    "registers": (partial(of_timm, reg_tokens=4), "blocks.1"),
    "distilled": (partial(of_timm, "deit_tiny_distilled_patch16_224"), "blocks.1"),
    "attention_mask": (partial(of_timm, "vit_relpos_base_patch16_cls_224", num_heads=3), "blocks.1"),
    "unfused": (lambda: unfused(of_timm()), "blocks.1"),
    "convit": (partial(of_timm, "convit_tiny", num_heads=4, local_up_to_layer=1), "blocks.1"),
    "torchvision": (of_torchvision, "encoder.layers.encoder_layer_1"),
    "hf_vit": (partial(of_transformers, hf.ViTForImageClassification, "sdpa"), "vit.layers.1"),
    "hf_vit_eager": (partial(of_transformers, hf.ViTForImageClassification, "eager"), "vit.layers.1"),
    "hf_deit": (partial(of_transformers, hf.DeiTForImageClassification, "sdpa"), "deit.layers.1"),
}
every = pytest.mark.parametrize("name", MODELS)


def made_of(student: nn.Module, layer: str) -> Case:
    """A student without dropout, and random images, in float64."""
    base = case("cnn")
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6))
    student = lively(student, 3).train()
    return Case(student, layer, base.teacher, base.teacher_layer, images, base.targets).to(torch.float64)


def made(name: str) -> Case:
    torch.manual_seed(2)
    build, layer = MODELS[name]
    return made_of(build(), layer)


def teach(student: nn.Module, on: Case, **settings: Any) -> e2kd.E2KDLoss:
    return e2kd.E2KDLoss(student, on.teacher, nn.CrossEntropyLoss(), example=on.images[:2], **settings)


def plan_of(model: nn.Module, images: Tensor) -> Plan:
    training = model.training
    plan = plan_for(model.eval(), e2kd.GradCAM(), images)
    model.train(training)
    return plan


def assert_step_is_exact(
    on: Case, way: str, *, host: Callable[[nn.Module], Any] | None = None, tolerance: float = 1e-10
) -> None:
    torch.manual_seed(5)
    wanted_loss, wanted = reference_step(on.copy(), on)
    student = on.copy()
    criterion = teach(student, on)
    model = host(student) if host else student
    for _ in range(2):
        student.zero_grad()
        torch.manual_seed(5)
        loss = criterion(model(on.images), on.targets)
        loss.backward()
        torch.testing.assert_close(loss.detach(), wanted_loss, rtol=tolerance, atol=0)
        assert error(gradient(student), wanted) < tolerance
    assert criterion.explained.way == way
    assert criterion.parts["zero_maps"] < 4


@every
def test_training_step_is_exact(name: str) -> None:
    tolerance = 1e-7 if name == "hf_vit_eager" else 1e-10  # its softmax is taken in float32
    assert_step_is_exact(made(name), "narrow", tolerance=tolerance)


@every
def test_explanation_is_that_of_the_whole_head(name: str) -> None:
    on = made(name)
    model = on.student.eval()
    found = e2kd.explain(model, on.images)
    plan = plan_of(model, on.images)
    assert plan.narrow is not None
    object.__setattr__(plan, "narrow", None)
    whole = e2kd.explain(model, on.images)
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.maps, whole.maps, rtol=1e-10, atol=1e-12)
    assert found.maps.any()


def _second_derivatives(run: Callable[[Tensor], Tensor], model: nn.Module, features: Tensor) -> Tensor:
    """Of a sum of squares of the gradient at the features: with respect to them and to all parameters."""
    features = features.clone().requires_grad_()
    (first,) = torch.autograd.grad(run(features).square().sum(), features, create_graph=True)
    given = [features, *model.parameters()]
    found = torch.autograd.grad(first.square().sum(), given, allow_unused=True, materialize_grads=True)
    return torch.cat([value.flatten() for value in found])


@every
def test_second_derivatives_are_those_of_the_whole_head(name: str) -> None:
    on = made(name)
    plan = plan_of(on.student, on.images)
    assert plan.head is not None
    assert plan.narrow is not None
    kept: list[Tensor] = []
    on.student.get_submodule(on.layer).register_forward_hook(
        lambda m, a, out: kept.append((out if isinstance(out, Tensor) else out[0]).detach())
    )
    on.student(on.images)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = _second_derivatives(plan.narrow, on.student, kept[0])
        wanted = _second_derivatives(plan.head, on.student, kept[0])
    assert error(found, wanted) < 1e-10


def test_gradient_equals_finite_differences() -> None:
    student, teacher = pair("class_token")
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0.0, example=images)
    assert_matches_finite_difference(lambda: criterion(student(images)), student)
    assert criterion.explained.way == "narrow"


def test_step_costs_few_operations_more_than_plain_distillation() -> None:
    student = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    teacher = timm.create_model("resnet18", num_classes=10)
    report = e2kd.check(student, teacher, torch.randn(2, 3, 224, 224))
    assert report.way == "narrow"
    assert report.cost < 1.03


def test_narrow_head_computes_keys_and_values_alone_for_all_tokens() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    images = torch.randn(2, 3, 224, 224)
    plan, features = plan_of(model, images), torch.randn(2, 197, 192)
    assert plan.head is not None
    assert plan.narrow is not None
    count = []
    for run in (plan.head, plan.narrow):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(features)
        count.append(counter.get_total_flops())
    qkv = 2 * 2 * 197 * 192 * 3 * 192
    assert qkv < count[1] < 1.05 * qkv < 0.3 * count[0]


# Random numbers


def test_stochastic_depth_is_exact_and_stays_narrow() -> None:
    torch.manual_seed(2)
    assert_step_is_exact(made_of(of_timm(drop_path_rate=0.6), "blocks.1"), "narrow")


@pytest.mark.parametrize("dropout", ["proj_drop_rate", "attn_drop_rate"])
def test_dropout_of_tokens_is_exact_with_the_whole_head(dropout: str) -> None:
    torch.manual_seed(2)
    on = made_of(of_timm(**{dropout: 0.3}), "blocks.1")
    for block in on.student.blocks:
        for module in (block.attn.attn_drop, block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2):
            module.p = 0.3
    assert_step_is_exact(on, "replay")


# Heads that need all tokens, or mix them in another way


class ReadsPatches(TinyViT):
    """The class token, and the mean of what it attended to."""

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.position[:, : patches.shape[1] + 1]
        x = self.norm(self.blocks[1](self.blocks[0](x)))
        return self.head(x[:, 0] + 0.1 * x.mean(1))


class NormsTokens(TinyViT):
    """BatchNorm over all tokens: in train mode its statistics need every one of them."""

    def __init__(self) -> None:
        super().__init__(classes=CLASSES)
        self.norm = nn.BatchNorm1d(17).double()


def test_head_that_reads_all_tokens_is_run_whole() -> None:
    student = ReadsPatches(classes=CLASSES)
    student.position = nn.Parameter(torch.randn(1, 257, 8) / 2)
    on = made_of(student, "norm")
    assert plan_of(on.student, on.images).narrow is None
    assert_step_is_exact(on, "replay")


def test_earlier_layer_before_two_attentions_is_run_whole() -> None:
    on = made("vit")
    student = on.copy()
    criterion = teach(student, on, explainer=e2kd.GradCAM("blocks.0"), teacher_explainer=e2kd.GradCAM())
    criterion(student(on.images), on.targets).backward()
    assert criterion.explained.way == "replay"


def test_attention_whose_positions_are_counted_is_run_whole() -> None:
    torch.manual_seed(2)
    on = made_of(of_timm("eva02_tiny_patch14_224", patch_size=16, num_heads=4, global_pool="token"), "blocks.1")
    assert_step_is_exact(on, "replay")


class OtherCodeInTraining(nn.Module):
    """A block that looks at how many tokens it has, when it is trained."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[1] < 4:
            raise ValueError("too few tokens")
        return self.block(x)


def test_block_that_refuses_few_tokens_in_training_is_run_whole() -> None:
    on = made("vit")
    on.student.blocks[2] = OtherCodeInTraining(on.student.blocks[2])
    assert plan_of(on.student, on.images).narrow is not None
    assert_step_is_exact(on, "replay")


def test_head_without_attention_is_refused_by_name() -> None:
    on = made("vit")
    plan = plan_of(on.student, on.images)
    assert plan.narrow is not None
    on.student.blocks[2] = nn.Identity()
    with pytest.raises(NotNarrow, match="no attention"):
        plan.narrow(torch.randn(2, 17, 48, dtype=torch.float64))


# Hosts


def _checkpointed_blocks(student: nn.Module) -> nn.Module:
    student.set_grad_checkpointing(True)
    return student


HOSTS: dict[str, Callable[[nn.Module], Any]] = {
    "checkpointed_blocks": _checkpointed_blocks,
    "checkpointed_model": lambda student: partial(checkpoint, student, use_reentrant=False),
    "compiled": partial(torch.compile, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("host", HOSTS)
def test_step_in_host_is_exact(host: str) -> None:
    assert_step_is_exact(made("vit"), "narrow", host=HOSTS[host])
    torch._dynamo.reset()


def test_step_under_bfloat16_autocast_has_the_float32_direction() -> None:
    criterion = assert_bfloat16_has_the_float32_direction(made("vit").to(torch.float32), teach)
    assert criterion.explained.way == "narrow"


def test_nothing_listens_to_torch_functions_afterwards() -> None:
    on = made("vit")
    student = on.copy()
    criterion = teach(student, on)
    criterion(student(on.images), on.targets).backward()
    assert torch._C._len_torch_function_stack() == 0
