"""B-cosification: the function is kept where nothing but B-cos is switched on, contributions explain the logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from properties import assert_matches_finite_difference
from safetensors.torch import load_file
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import e2kd
from e2kd.bcos import AddInverse, BatchNormUncentered2d, bcosify, explanation_mode, load_official
from e2kd.errors import UnsupportedModel

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAME: dict[str, Any] = {"b": 1, "bias": True, "max_pool": True, "logit_bias": 0.0}  # keeps the function
VIT: dict[str, Any] = {"img_size": SIDE, "depth": 2}
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet18", {}),
    "resnet50": ("resnet50", {}),
    "deep stem": ("resnet26d", {}),
    "group norms": ("resnet50_gn", {"layers": (1, 1, 1, 1)}),
    "densenet121": ("densenet121", {}),
    "convnext_atto": ("convnext_atto", {}),
    "linear layers": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "norm before pooling": ("convnext_tiny_hnf", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "vgg11": ("vgg11", {"mlp_ratio": 1 / 64}),
    "vgg11_bn": ("vgg11_bn", {"mlp_ratio": 1 / 64}),
    "vit_tiny": ("vit_tiny_patch16_224", VIT),
    "vit pooled": ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg"}),
    "vit pooled after its norm": ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg", "fc_norm": False}),
    "vit registers": ("vit_tiny_patch16_224", {**VIT, "class_token": False, "reg_tokens": 2, "global_pool": "avg"}),
    "vit norms and scales": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True, "init_values": 0.5}),
}
SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(BasicBlock, (1, 1, 1, 1), 5, channels=(4, 4, 6, 8), stem_width=4),
    "densenet": lambda: DenseNet(4, (2, 2), num_classes=5, bn_size=2),
    "convnext": lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 4, 6, 8), num_classes=5, ls_init_value=1.0),
    "vgg": lambda: strong(VGG([4, "M", 6, "M"], 5, mlp_ratio=1 / 512, norm_layer=nn.BatchNorm2d)),
    "vit": lambda: VisionTransformer(32, 8, num_classes=5, embed_dim=8, depth=2, num_heads=2),
    "vit pooled": lambda: VisionTransformer(32, 8, num_classes=5, embed_dim=8, depth=1, num_heads=2, global_pool="avg"),
}


def strong(model: nn.Module) -> nn.Module:
    """With weights so large that what |cos| leaves of a signal stays far above the 1e-6 of the norms and its kinks."""
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p)
    return model


def shaken(model: nn.Module) -> nn.Module:
    """In eval mode and float64, with no parameter or statistic left as it is made."""
    torch.manual_seed(0)
    model = model.double().eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3 * float(p.data.std()) if p.numel() > 1 and p.data.std() > 0 else 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def named(name: str) -> nn.Module:
    architecture, options = NAMED[name]
    return shaken(timm.create_model(architecture, num_classes=7, **options))


def small(name: str, **options: Any) -> nn.Module:
    return bcosify(shaken(SMALL[name]()), mean=MEAN, std=STD, **options)


def colours(side: int = SIDE) -> Tensor:
    """Images in [0, 1] [2, 3, side, side], never at the 0.5 where colour and inverse are one."""
    return torch.rand(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normalised(x: Tensor, model: Any) -> Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[key], dtype=x.dtype)[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std


def explained(model: nn.Module, x: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    """Logits and W(x) of the first and the last class's logits, for the first and the second image."""
    with explanation_mode() as mode:
        logits = model(x)
    return logits, mode.weights(chosen(logits), x, **options)


def chosen(logits: Tensor) -> Tensor:
    return logits[[0, 1], [0, -1]]


@pytest.mark.parametrize("name", NAMED)
def test_nothing_but_b_changes_the_function(name: str) -> None:
    """With b = 1 and all that the recipe drops kept, logits are those of the network it was made from."""
    model, x = named(name), colours()
    made = bcosify(model, **SAME)
    expected = model(normalised(x, model)).detach()
    assert type(made) is type(model)
    assert not any(p.is_meta for p in [*made.parameters(), *made.buffers()])
    torch.testing.assert_close(made(AddInverse()(x)), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    if name != "densenet121":  # as long again
        single = model.float()(normalised(x, model).float()).detach()
        found = made.float()(AddInverse()(x).float())
        torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-5 * float(single.abs().max()))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("options", [{}, {"b": 1}, {"b": 1.5, "bias": True}, {"max_pool": True, "bias": True}])
def test_contributions_and_what_is_added_sum_to_the_logit(name: str, options: dict[str, Any]) -> None:
    """Pixels explain the logit; where biases, positions or tokens are added inside, those explain the rest."""
    model, x = small(name, logit_bias=0.0, **options), AddInverse()(colours(32)).requires_grad_()
    with explanation_mode() as mode:
        logits = model(x)
    expected = chosen(logits).detach()
    parts = (mode.weights(chosen(logits), x, retain_graph=True) * x).flatten(1).sum(1)
    added = [model.get_parameter(key) for key in model.conversion.added]
    assert bool(added) == (name.startswith("vit") or options.get("bias", False))
    rest = sum((mode.weights(chosen(logits), p, retain_graph=True) * p).sum() for p in added)
    torch.testing.assert_close(parts.sum() + rest, expected.sum(), rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    if not added:
        torch.testing.assert_close(parts, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [False, True])
def test_second_derivative_equals_finite_differences(name: str, training: bool) -> None:
    model, x = small(name).train(training), AddInverse()(colours(32)).requires_grad_()
    other = torch.rand_like(x)

    def loss() -> Tensor:
        logits, w = explained(model, x, create_graph=True)
        return F.cross_entropy(logits, torch.tensor([1, 4])) - e2kd.cosine(w, other).sum()  # however small W(x) is

    assert_matches_finite_difference(loss, model, eps=1e-8)  # a small step, to cross few kinks


@pytest.mark.parametrize("name", SMALL)
def test_trains(name: str) -> None:
    """A step on logits and explanations reaches every parameter of the network."""
    model = small(name).float().train()
    x, targets = AddInverse()(colours(32)).float().requires_grad_(), torch.eye(5)[[1, 4]]

    def loss() -> Tensor:
        logits, w = explained(model, x, create_graph=True)
        similarity = F.cosine_similarity(w.flatten(1), torch.ones_like(w).flatten(1)).mean()
        return F.binary_cross_entropy_with_logits(logits, targets) - similarity

    before = loss()
    before.backward()
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert p.grad.any()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert loss() < before


@pytest.mark.parametrize("name", SMALL)
def test_state_and_copies(name: str) -> None:
    """The state_dict holds all that was learnt, and a copy is a network of its own."""
    model, x = small(name), AddInverse()(colours(32))
    expected = model(x)
    other = bcosify(SMALL[name]().double().eval(), mean=MEAN, std=STD)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    twin = copy.deepcopy(model)
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(twin(x), expected)
    assert str(twin.conversion) == str(model.conversion)


@pytest.mark.parametrize("name", SMALL)
def test_the_given_network_stays_as_it_is(name: str) -> None:
    model = shaken(SMALL[name]())
    model.get_classifier().weight.requires_grad_(False)
    before, state = repr(model), {key: value.clone() for key, value in model.state_dict().items()}
    made = bcosify(model, mean=MEAN, std=STD)
    for p in made.parameters():
        p.data.zero_()
    assert repr(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m.training for m in made.modules())
    assert not made.get_classifier().linear.weight.requires_grad
    assert [p.requires_grad for p in made.parameters()].count(False) == 1
    if name == "vit pooled":
        assert (model.global_pool, made.global_pool) == ("avg", "")
        assert model.blocks[0].attn.fused_attn
        assert not made.blocks[0].attn.fused_attn


def test_equals_the_papers_code() -> None:
    """Weights, logits and W(x) of a DenseNet that the code of B-cosification converted.

    Its W(x) leaves out what the mean of the colours adds, so that its contributions don't sum to the logit: equal is
    the weight of each colour less that of its inverse, all that the network knows of a pixel.
    """
    golden = load_file(Path(__file__).parent / "golden" / "bcosification.safetensors")
    standard = DenseNet(4, (2, 2), num_classes=5, bn_size=2).double().eval()
    standard.load_state_dict({k.removeprefix("standard."): v for k, v in golden.items() if k.startswith("standard.")})
    model = bcosify(standard, mean=MEAN, std=STD, logit_bias=-float(torch.tensor(999.0, dtype=torch.float64).log()))
    official = [golden[key] for key in sorted(golden) if key.startswith("official.")]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), official, strict=True))
    x = golden["x"].requires_grad_()
    with explanation_mode() as mode:
        logits = model(x)
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-12, atol=0)
    w = mode.weights(logits.gather(1, golden["class"][:, None]), x)
    torch.testing.assert_close(w[:, :3] - w[:, 3:], golden["W"][:, :3] - golden["W"][:, 3:], rtol=1e-9, atol=1e-14)


def test_official_files_of_converted_networks_need_the_network(tmp_path: Path) -> None:
    """Their keys are those of other B-cos networks; a prefix tells, and the network is asked for."""
    model, x = small("resnet"), AddInverse()(colours(32))
    torch.save({"state_dict": {f"model.model.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="pass it as `into`"):
        load_official(tmp_path / "last.ckpt")
    fresh = bcosify(SMALL["resnet"]().double(), mean=MEAN, std=STD)
    loaded = load_official(tmp_path / "last.ckpt", into=fresh)
    assert loaded is fresh
    assert not loaded.training
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match="does not fit the DenseNet that was given"):
        load_official(tmp_path / "last.ckpt", into=small("densenet"))
    with pytest.raises(ValueError, match="settings of its own"):
        load_official(tmp_path / "last.ckpt", into=fresh, b=1.5)


def test_without_the_prefix_means_in_the_batch_norms_warn(tmp_path: Path) -> None:
    torch.save(small("densenet").state_dict(), tmp_path / "stripped.pth")
    with pytest.warns(UserWarning, match="hold means.* pass it as `into`.* name its `norm`"):
        load_official(tmp_path / "stripped.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_official(tmp_path / "stripped.pth", norm=BatchNormUncentered2d)
        load_official(tmp_path / "stripped.pth", into=small("densenet"))


def test_official_files_with_other_names_in_the_same_order(tmp_path: Path) -> None:
    """The papers' DenseNets lose the names of their parts when they are converted."""
    golden = load_file(Path(__file__).parent / "golden" / "bcosification.safetensors")
    official = {key[len("official.000.") :]: golden[key] for key in sorted(golden) if key.startswith("official.")}
    torch.save({"state_dict": {f"model.{k}": v for k, v in official.items()}}, tmp_path / "last.ckpt")
    model = small("densenet", logit_bias=-float(torch.tensor(999.0, dtype=torch.float64).log()))
    assert "features.conv0.linear.weight" in model.state_dict()
    assert "model.features.0.linear.weight" in official
    loaded = load_official(tmp_path / "last.ckpt", into=model)
    torch.testing.assert_close(loaded(golden["x"]), golden["logits"], rtol=1e-12, atol=0)


def test_a_converted_simple_vit_is_named(tmp_path: Path) -> None:
    torch.save({"model.model.to_patch_embedding.linear.linear.weight": torch.ones(4, 4)}, tmp_path / "vit.ckpt")
    with pytest.raises(ValueError, match="no such network for its simple ViT"):
        load_official(tmp_path / "vit.ckpt")


def test_tells_what_it_changed() -> None:
    conversion = small("vit").conversion
    changes = {change.name: (change.before, change.after) for change in conversion.changes}
    assert changes["patch_embed.proj"] == ("Conv2d", "bcos.EncodedConv2d")
    assert changes["blocks.1.attn.attn_drop"] == ("Dropout", "bcos.HeldAttention")
    assert changes["blocks.1.mlp.act"] == ("GELU", "bcos.GELU")
    assert changes["head"] == ("Linear", "bcos.LinearClassifier")
    assert not [name for name in changes if "qkv" in name]
    assert "blocks.0.attn.qkv.bias" in conversion.removed
    assert conversion.added == ("cls_token", "pos_embed")
    assert "2 parameters add to the logits: cls_token, pos_embed" in str(conversion)
    assert small("vit", bias=True).conversion.removed == ()


def test_what_shapes_an_attention_adds_nothing_to_logits() -> None:
    net = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5, qk_norm=True
    )
    model = bcosify(net, bias=True, mean=MEAN, std=STD).eval()
    images = AddInverse()(torch.rand(2, 3, 32, 32)).requires_grad_()
    with explanation_mode() as mode:
        score = model(images)[:, 1].sum()
    assert "blocks.0.attn.q_norm.bias" not in model.conversion.added
    for name in model.conversion.added:
        assert mode.weights(score, model.get_parameter(name), retain_graph=True).isfinite().all()


@pytest.mark.parametrize("convert", [timm.layers.freeze_batch_norm_2d, timm.layers.convert_splitbn_model])
def test_batch_norms_that_would_subtract_the_mean_are_refused(convert: Callable[[nn.Module], nn.Module]) -> None:
    made = bcosify(timm.create_model("test_resnet", num_classes=5), bias=True)
    with pytest.raises(UnsupportedModel, match="eval mode"):
        convert(made)


def test_means_folded_into_biases_are_not_there_to_be_subtracted_again() -> None:
    net = timm.create_model("test_resnet", num_classes=5)
    net(torch.rand(8, 3, 32, 32))
    made = bcosify(net, bias=True)
    assert made.bn1.running_mean.count_nonzero() == 0
    assert net.bn1.running_mean.count_nonzero() > 0


def test_takes_plain_images_from_now_on() -> None:
    """timm's loaders and the normalisation of e2kd's teachers read it from the model."""
    model = timm.create_model("resnet18", num_classes=7)
    made = bcosify(model)
    assert made.pretrained_cfg["mean"] == (0.0, 0.0, 0.0)
    assert made.pretrained_cfg["std"] == (1.0, 1.0, 1.0)
    assert model.pretrained_cfg["mean"] == MEAN
    assert timm.data.resolve_model_data_config(made)["std"] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_is_explained_by_its_weights_and_by_other_explainers(name: str) -> None:
    model, images = small(name).float(), AddInverse()(colours(32)).float()
    assert e2kd.explain(model, images).maps.shape == images.shape
    assert e2kd.explain(model, images, explainer=e2kd.GradCAM()).maps.shape[:2] == (2, 1)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_learns_from_another_by_its_weights(name: str) -> None:
    torch.manual_seed(0)
    student, teacher, images = small(name).float().train(), small(name).float(), AddInverse()(colours(32)).float()
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0, example=images)
    criterion(student(images), None).backward()
    assert 0 < abs(criterion.parts["cosine"]) <= 1 + 1e-6
    moved = [p for p in student.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(moved) > len(list(student.parameters())) / 2


def test_a_layer_used_twice_stays_one() -> None:
    model = shaken(SMALL["resnet"]())
    model.layer1[0].bn2 = model.layer1[0].bn1
    made = bcosify(model, mean=MEAN, std=STD)
    assert made.layer1[0].bn2 is made.layer1[0].bn1


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **options)


def doubled() -> nn.Module:
    model = SMALL["resnet"]()
    model.layer1[0].conv2 = nn.Conv2d(3, 4, 3)
    return model


def convnext_of_rms_norms() -> nn.Module:
    made: nn.Module = timm.models.ConvNeXt(depths=(1,) * 4, dims=(8,) * 4, num_classes=5, norm_layer="rmsnorm2d")
    return made


@pytest.mark.parametrize(
    ("build", "messages"),
    [
        (timm_model("seresnet50", layers=(1, 1, 1, 1)), ["4 SEModule without a B-cos form: layer1.0.se, layer2.0.se"]),
        (timm_model("resnet18", act_layer="silu"), ["17 SiLU without a B-cos form: act1, layer1.0.act1"]),
        (
            timm_model("resnet18", act_layer="silu", block_args={"attn_layer": "se"}, num_classes=0),
            ["gave Identity", "SiLU without a B-cos form", "8 SEModule without a B-cos form: layer1.0.se"],
        ),
        (
            lambda: DenseNet(4, (2, 2), act_layer="silu"),
            ["11 BatchNormAct2d with Identity and SiLU, one without a B-cos form: features.norm0"],
        ),
        (timm_model("convnextv2_atto"), ["GlobalResponseNormMlp without a B-cos form: stages.0.blocks.0.mlp"]),
        (timm_model("resnet18", aa_layer=timm.layers.BlurPool2d), ["BlurPool2d without a B-cos form: "]),
        (timm_model("resnet18", global_pool="avgmax"), ["SelectAdaptivePool2d by 'avgmax' in place of 'avg': global"]),
        (timm_model("vit_tiny_patch16_224", depth=1, global_pool="max"), ["tokens are pooled by 'max'"]),
        (
            timm_model("vit_tiny_patch16_224", depth=1, global_pool="map"),
            ["AttentionPoolLatent without a B-cos form"],
        ),
        (
            timm_model("convnext_atto", head_hidden_size=8),
            ["a hidden layer lies between the pooling and the classifier"],
        ),
        (
            timm_model("swin_tiny_patch4_window7_224", depths=(1, 1)),
            ["swin_transformer.SwinTransformer is not known"],
        ),
        (timm_model("resnet18", in_chans=1), ["one convolution of 3 colours must see the images, but found none"]),
        (doubled, ["found conv1, layer1.0.conv2"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 1)), ["get_classifier"]),
        (lambda: e2kd.bcos.resnet18(), ["e2kd.bcos.resnet.BcosResNet is not known"]),
        (convnext_of_rms_norms, ["RmsNorm2d lies between the pooling and the classifier"]),
    ],
)
def test_what_it_cannot_convert_is_named(build: Callable[[], nn.Module], messages: list[str]) -> None:
    with pytest.raises(e2kd.UnsupportedModel, match="can't become a B-cos network") as error:
        bcosify(build(), mean=MEAN, std=STD)
    assert [message for message in messages if message not in str(error.value)] == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bcosify(SMALL["resnet"]()), "Expected the mean and std > 0 of the colours"),
        (lambda: bcosify(SMALL["resnet"](), mean=MEAN, std=(1, 0, 1)), r"std > 0 .* got \(0.485, 0.456, 0.406\)"),
        (lambda: bcosify(SMALL["resnet"](), mean=MEAN, std=STD, b=0.5), "b >= 1"),
        (lambda: small("resnet")(torch.rand(1, 3, 32, 32)), "encode them with AddInverse"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", SMALL)
def test_what_was_converted_is_explained_and_distilled(name: str) -> None:
    """By the library's own passes, whose layers keep what they returned: no activation may change it in place."""
    model, x = small(name), AddInverse()(colours(32))
    _, weights = explained(model, x.clone().requires_grad_())
    classes = torch.tensor([0, model(x).shape[1] - 1])
    torch.testing.assert_close(e2kd.explain(model, x, classes).maps, weights, rtol=1e-9, atol=1e-12)
    losses, teacher = {}, copy.deepcopy(model)
    for passes in ("shared", "separate"):
        criterion = e2kd.E2KDLoss(model.train(), teacher, explainer=e2kd.BcosWeights(passes=passes))
        losses[passes] = criterion(model(x))
        losses[passes].backward()
        criterion.remove()
    torch.testing.assert_close(losses["shared"], losses["separate"])
