"""Explainers and `explain`: finite differences, invariants by name, outside references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import BUILD, NETS, MLPHead, SharedActivation, cnn, pair
from properties import assert_matches_finite_difference
from torch import Tensor, nn

import e2kd
from e2kd.sites import find_site


@dataclass(frozen=True)
class FeatureGradient:
    """A user's own explainer, signed and with all channels."""

    layer: str | None = None

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        return features * gradient


EXPLAINERS = [e2kd.GradCAM(), e2kd.CAM(), e2kd.HiResCAM(), e2kd.LayerCAM(), e2kd.InputGradient(), FeatureGradient()]
BCOS = [e2kd.BcosWeights(), e2kd.BcosWeights(8, "separate"), e2kd.BcosContributions(8), e2kd.GradCAM()]
EVERY = [(net, e) for net in NETS for e in EXPLAINERS] + [("bcos", e) for e in BCOS]


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """A user's own similarity."""
    return e2kd.cosine(a - a.mean((2, 3), keepdim=True), b - b.mean((2, 3), keepdim=True))


def images(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("similarity", [e2kd.cosine, pearson], ids=["cosine", "pearson"])
@pytest.mark.parametrize(("net", "explainer"), EVERY, ids=str)
def test_gradient_of_the_loss_matches_finite_differences(net: str, explainer: e2kd.Explainer, similarity) -> None:
    (student, teacher), x = pair(net), images()
    criterion = e2kd.E2KDLoss(
        student, teacher, nn.CrossEntropyLoss(), explainer=explainer,
        similarity=similarity, example=x,
    )  # fmt: skip
    targets = torch.tensor([0, 1, 3])
    eps = 1e-8 if net == "bcos" else 1e-6  # a small step, to cross few kinks of |cos|
    assert_matches_finite_difference(lambda: criterion(student(x), targets), student, eps)
    assert criterion.parts["zero_maps"] == 0


@pytest.mark.parametrize("net", NETS)
def test_each_net_takes_the_way_it_is_named_for(net: str) -> None:
    (student, teacher), x = pair(net), images()
    criterion = e2kd.E2KDLoss(student, teacher, example=x)
    criterion(student(x))
    plan = criterion.explained.plan
    assert plan is not None
    assert (plan.linear is not None) == (net == "closed")
    assert (plan.head is None) == (net == "graph")


@pytest.mark.parametrize(("net", "explainer"), EVERY, ids=str)
def test_batch_equals_single_images(net: str, explainer: e2kd.Explainer) -> None:
    model, x = BUILD[net](), images()
    together = e2kd.explain(model, x, explainer=explainer)
    for i in range(len(x)):
        alone = e2kd.explain(model, x[i : i + 1], explainer=explainer)
        torch.testing.assert_close(alone.maps[0], together.maps[i])


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: type(e).__name__)
def test_maps_shift_with_the_image_where_the_network_does(explainer: e2kd.Explainer) -> None:
    """Circular convolutions commute with circular shifts by the stride, and so must the maps."""
    model = cnn()
    for module in model:
        if isinstance(module, nn.Conv2d):
            module.padding_mode, module._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    x = images()
    still = e2kd.explain(model, x, explainer=explainer)
    moved = e2kd.explain(model, x.roll((4, 8), (2, 3)), still.classes, explainer)
    stride = x.shape[-1] // still.maps.shape[-1]
    torch.testing.assert_close(moved.maps, still.maps.roll((4 // stride, 8 // stride), (2, 3)))


@pytest.mark.parametrize("net", NETS)
def test_explain_equals_a_slow_reference(net: str) -> None:
    model, x = NETS[net](), images()
    found = e2kd.explain(model, x)
    torch.testing.assert_close(found.logits, model(x).detach())
    assert torch.equal(found.classes, found.logits.argmax(1))
    assert torch.equal(found.maps, e2kd.explain(model, x, found.classes).maps)
    assert found.maps.shape == (3, 1, 4, 4)
    torch.testing.assert_close(found.maps, slow_gradcam(model, x, found.classes), rtol=1e-9, atol=1e-12)


def slow_gradcam(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """One image, one channel at a time, through the whole model's own graph."""
    from e2kd.plans import plan_for

    site = plan_for(model, e2kd.GradCAM(), x).site
    assert site is not None
    kept: list[Tensor] = []
    maps = []
    handle = model.get_submodule(site.layer).register_forward_hook(lambda m, a, out: kept.append(out))
    for image, label in zip(x, classes, strict=True):
        logit = model(image[None])[0, label]
        features = kept[-1]
        if type(model) in (MLPHead, SharedActivation):  # the activation is a function or ran again: written out
            features = F.softplus(model.conv2(F.softplus(model.conv(image[None]))))
            logit = model.out(F.softplus(model.hidden(features.mean((2, 3)))))[0, label]
        (gradient,) = torch.autograd.grad(logit, features)
        if features.ndim == 3:
            features, gradient = (t[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) for t in (features, gradient))
        total = torch.zeros(features.shape[-2:], dtype=features.dtype)
        for channel in range(features.shape[1]):
            total += features[0, channel] * gradient[0, channel].mean()
        maps.append(total.clamp_min(0).detach()[None])
    handle.remove()
    return torch.stack(maps)


def test_cam_is_gradcam_without_its_relu() -> None:
    """And below 0 where a class is not, summing with the bias to the logit of a head that pools and is linear."""
    model, x = cnn(), images()
    for label in range(4):
        classes = torch.full((3,), label)
        cam, gradcam = (e2kd.explain(model, x, classes, explainer) for explainer in (e2kd.CAM(), e2kd.GradCAM()))
        torch.testing.assert_close(cam.maps.relu(), gradcam.maps)
        torch.testing.assert_close(cam.maps.sum((1, 2, 3)) + model[-1].bias[label], cam.logits[:, label])


@pytest.mark.parametrize("layer", ["act", "conv2"])
def test_shared_module_is_explained_where_it_returns_a_map(layer: str) -> None:
    model, x = SharedActivation(), images()
    found = e2kd.explain(model, x, explainer=e2kd.GradCAM(layer))
    convolved = model.conv2(F.softplus(model.conv(x)))
    active = F.softplus(convolved)
    logits = model.out(F.softplus(model.hidden(active.mean((2, 3)))))
    features = {"act": active, "conv2": convolved}[layer]
    (gradient,) = torch.autograd.grad(logits.gather(1, found.classes[:, None]).sum(), features)
    torch.testing.assert_close(found.maps, e2kd.GradCAM()(features, gradient).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inplace", [True, False])
def test_layer_before_an_activation_that_its_block_runs_again(inplace: bool) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).double().eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    x, kept = images(2, 64), []
    found = e2kd.explain(model, x, explainer=e2kd.GradCAM("layer4.1.bn1"))
    handle = model.layer4[1].bn1.register_forward_hook(lambda m, a, out: kept.append(out))
    logits = model(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits.gather(1, found.classes[:, None]).sum(), kept[0])
    torch.testing.assert_close(found.maps, e2kd.GradCAM()(kept[0], gradient).detach(), rtol=1e-6, atol=1e-9)


class Overwriting(nn.Module):
    """A function changes what a norm returned, at the end of the trunk or in a branch."""

    def __init__(self, change: Callable[[Tensor], Tensor], *, branch: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change, self.branch = change, branch
        self.conv, self.norm, self.after = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, 1, 1)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        changed = self.change(self.norm(features))
        features = features + self.after(changed) if self.branch else changed
        return self.head(features.mean((2, 3)))


@pytest.mark.parametrize(
    ("change", "branch", "layer"),
    [
        (lambda x: F.silu(x, inplace=True), False, None),
        (lambda x: x.add_(1), False, None),
        (lambda x: F.relu(x, inplace=True), True, "norm"),
        (lambda x: x.mul_(2), True, "norm"),
    ],
)
def test_what_a_function_overwrites_is_refused(
    change: Callable[[Tensor], Tensor], branch: bool, layer: str | None
) -> None:
    """What was heard there would be another tensor by the time it is explained."""
    model, other, explainer = Overwriting(change, branch=branch), cnn(), e2kd.GradCAM(layer)
    said = "layer 'norm' of Overwriting to stay as it is, but a function changes it in place"
    with pytest.raises(e2kd.UnsupportedModel, match=said):
        e2kd.explain(model, images(), explainer=explainer)
    with pytest.raises(e2kd.UnsupportedModel, match=said):
        e2kd.E2KDLoss(model, other, explainer=explainer, teacher_explainer=e2kd.GradCAM(), example=images())
    kept = Overwriting(lambda x: change(x.clone()), branch=branch)
    found = e2kd.explain(kept, images(), explainer=explainer)
    loss = e2kd.E2KDLoss(kept.train(), other, kd_weight=0, explainer=explainer, teacher_explainer=e2kd.GradCAM())
    loss(kept(images())).backward()
    assert found.maps.shape == (3, 1, 8, 8)
    if branch:  # elsewhere it is not the last map
        e2kd.explain(model, images())


def test_layer_is_that_of_the_size_whatever_was_explained_before(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr("e2kd.plans.find_site", lambda *args: found.append(args) or find_site(*args))
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).double()
    sizes = [32, 96, 32, 33, 64, 50, 65, 128]
    grids = [e2kd.explain(model, images(2, size)).maps.shape[-1] for size in sizes]
    assert grids == [2, 3, 2, 2, 2, 2, 3, 4]  # of layer3 at 32, where layer4 has one cell
    assert len(found) == 3  # to 32, to 64, to 128


def test_gradcam_equals_captum() -> None:
    captum = pytest.importorskip("captum.attr")
    model, x = cnn(), images()
    found = e2kd.explain(model, x)
    theirs = captum.LayerGradCam(model, model[3]).attribute(x, found.classes, relu_attributions=True)
    torch.testing.assert_close(found.maps, theirs.detach())


def test_gradcam_equals_the_grad_cam_package() -> None:
    """The package resizes to the image and scales each map to [0, 1]; so do we here."""
    pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = cnn().float(), images().float()
    found = e2kd.explain(model, x)
    with pytorch_grad_cam.GradCAM(model, [model[3]]) as cam:
        theirs = cam(x, [ClassifierOutputTarget(int(c)) for c in found.classes])
    mine = unit_range(F.interpolate(unit_range(found.maps), (16, 16), mode="bilinear"))
    torch.testing.assert_close(mine[:, 0], torch.from_numpy(theirs), rtol=0, atol=1e-4)


def unit_range(maps: Tensor) -> Tensor:
    maps = maps - maps.amin((2, 3), keepdim=True)
    return maps / (1e-7 + maps.amax((2, 3), keepdim=True))


def test_closed_form_equals_autograd() -> None:
    model, x = cnn(), images()
    closed = e2kd.explain(model, x)
    features = model[:4](x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model[4:](features).gather(1, closed.classes[:, None]).sum(), features)
    torch.testing.assert_close(closed.maps, e2kd.GradCAM()(features, gradient).detach(), rtol=1e-12, atol=1e-12)


def test_hires_cam_equals_gradcam_for_pooled_linear_heads() -> None:
    model, x = cnn(), images()
    torch.testing.assert_close(e2kd.explain(model, x, explainer=e2kd.HiResCAM()).maps, e2kd.explain(model, x).maps)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_explain_works_in_any_grad_mode_and_leaves_the_model_as_it_was(net: str, context) -> None:
    model, x = NETS[net]().train(), images()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with context():
        found = e2kd.explain(model, x)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
    torch.testing.assert_close(found.maps, e2kd.explain(model, x).maps)
    assert not found.maps.requires_grad
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_hook_is_left_when_the_model_fails() -> None:
    model = cnn()
    e2kd.explain(model, images())
    with pytest.raises(RuntimeError):
        e2kd.explain(model, torch.rand(2, 5, 16, 16, dtype=torch.float64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_new_head_is_seen_although_plans_are_remembered() -> None:
    model, x = cnn(), images()
    e2kd.explain(model, x)
    model[6] = nn.Linear(6, 9).double()
    found = e2kd.explain(model, x)
    assert found.logits.shape == (3, 9)
    torch.testing.assert_close(found.maps, slow_gradcam(model, x, found.classes))


def test_classes_are_checked() -> None:
    for classes in (torch.tensor([0, 1]), torch.tensor([0, 1, 4]), torch.tensor([0.0, 1.0, 2.0])):
        with pytest.raises(ValueError, match="Expected class indices"):
            e2kd.explain(cnn(), images(), classes)
