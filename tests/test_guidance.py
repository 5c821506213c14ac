"""Model guidance: the losses against loops over pixels, the criterion against its trainer's own graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import TinyViT, cnn
from torch import Tensor, nn

import e2kd
from e2kd.guidance import GuidanceLoss, energy_loss, l1_loss
from e2kd.localization import energy_on_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images [3, 3, 16, 16], labels [3] of 4 classes, masks [3, 16, 16]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.tensor([0, 3, 1]), torch.rand(3, 16, 16, generator=generator) > 0.6


def slow_energy(pixels: list[list[float]], mask: list[list[float]]) -> float:
    inside = sum(max(p, 0) * m for row, line in zip(pixels, mask, strict=True) for p, m in zip(row, line, strict=True))
    total = sum(max(p, 0) for row in pixels for p in row)
    return 1 - inside / total if total else 1.0


def slow_l1(pixels: list[list[float]], mask: list[list[float]]) -> float:
    peak = max(max(row) for row in pixels)
    pairs = [(p, m) for row, line in zip(pixels, mask, strict=True) for p, m in zip(row, line, strict=True)]
    return sum(abs((max(p, 0) / peak if peak > 0 else 0) - m) for p, m in pairs) / len(pairs)


@pytest.mark.parametrize(("loss", "slow"), [(energy_loss, slow_energy), (l1_loss, slow_l1)])
def test_losses_are_those_of_loops_over_pixels(loss: Any, slow: Any) -> None:
    maps = torch.randn(6, 1, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    maps[4], maps[5] = 0, -1
    masks = torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    masks[:3] = masks[:3].round()
    expected = [slow(m[0].tolist(), k.tolist()) for m, k in zip(maps, masks, strict=True)]
    torch.testing.assert_close(loss(maps, masks), torch.tensor(expected, dtype=torch.float64))
    assert ((loss(maps, masks) >= 0) & (loss(maps, masks) <= 1)).all()


@pytest.mark.parametrize("loss", [energy_loss, l1_loss])
def test_gradients_are_those_of_finite_differences_and_none_of_dead_maps(loss: Any) -> None:
    maps = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    masks = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: loss(m, masks), (maps,))
    dead = torch.zeros(2, 1, 3, 3, requires_grad=True)
    loss(dead, masks).sum().backward()
    assert dead.grad is not None
    assert not dead.grad.any()


@pytest.mark.parametrize("loss", [energy_loss, l1_loss])
def test_the_scale_of_a_map_does_not_matter(loss: Any) -> None:
    maps, masks = torch.rand(3, 1, 4, 4), torch.rand(3, 8, 8)
    torch.testing.assert_close(loss(1e-12 * maps, masks), loss(maps, masks))


def test_what_each_loss_is_least_for() -> None:
    """A spot on the object satisfies the energy loss; only the whole object, evenly, the L1 loss."""
    mask, spot = torch.zeros(1, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[:, 1:3, 1:3], spot[:, :, 1, 1] = 1, 1
    assert energy_loss(spot, mask).item() == energy_loss(mask[:, None], mask).item() == 0
    assert l1_loss(mask[:, None], mask).item() == 0
    assert l1_loss(spot, mask).item() == pytest.approx(3 / 16)


@pytest.mark.parametrize(("make", "layer"), [(cnn, "3"), (TinyViT, "blocks.0")])
@pytest.mark.parametrize("loss", [energy_loss, l1_loss])
def test_value_and_gradients_are_those_of_the_whole_graph(make: Any, layer: str, loss: Any) -> None:
    """The reference differentiates the trainer's own graph of a second network twice; nothing is replayed."""
    images, labels, masks = draw()
    model, other = make(), make()
    criterion = GuidanceLoss(model, F.cross_entropy, loss=loss, weight=3.0, explainer=e2kd.GradCAM(layer))
    value = criterion(model(images), labels, masks)
    value.backward()
    kept: list[Tensor] = []
    other.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = other(images)
        (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), kept[0], create_graph=True)
        features = kept[0]
        if make is TinyViT:
            gradient, features = (t[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) for t in (gradient, features))
        maps = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
        expected = F.cross_entropy(logits, labels) + 3 * loss(maps, masks).mean()
        expected.backward()
    assert value.item() == pytest.approx(expected.item())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-7, atol=1e-10)


def guided(model: nn.Module, *given: Tensor, criterion: Any = F.cross_entropy, **more: Any) -> dict[str, float]:
    """The parts of one call."""
    images, targets, masks = given
    loss = GuidanceLoss(model, criterion, example=images, **more)
    loss(model(images), targets, masks)
    loss.remove()
    return {name: value.item() for name, value in loss.parts.items()}


def test_masks_of_classes_are_those_of_the_explained_class() -> None:
    images, labels, masks = draw()
    each = torch.zeros(3, 4, 16, 16)
    each[torch.arange(3), labels] = masks.float()
    assert guided(cnn(), images, labels, each) == pytest.approx(guided(cnn(), images, labels, masks))


def test_every_positive_class_is_guided_alike() -> None:
    """Two positives are the mean of either alone; one without a box counts nothing."""
    images, _, masks = draw()
    images, bce = images[:1], F.binary_cross_entropy_with_logits
    each = masks[[0, 1, 2, 0]].double()[None]
    both = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    first, second = both * torch.tensor([1, 0, 0, 0]), both * torch.tensor([0, 0, 1, 0])
    found = [guided(cnn(), images, t, each, criterion=bce)["guidance"] for t in (first, second, both)]
    assert found[2] == pytest.approx((found[0] + found[1]) / 2)
    each[:, 2] = 0
    assert guided(cnn(), images, both, each, criterion=bce)["guidance"] == pytest.approx(found[0] / 2)


def test_images_without_a_mask_are_not_guided() -> None:
    images, labels, masks = draw()
    alone = GuidanceLoss(cnn(), F.cross_entropy, example=images)
    model = alone.model
    alone(model(images), labels, masks * torch.tensor([1, 0, 0])[:, None, None])
    one = alone.parts["guidance"]
    alone(model(images[:1]), labels[:1], masks[:1])
    torch.testing.assert_close(3 * one, alone.parts["guidance"])


def test_without_masks_or_training_it_is_the_criterion() -> None:
    images, labels, masks = draw()
    model = cnn()
    loss = GuidanceLoss(model, F.cross_entropy, weight=9.0)
    plain = F.cross_entropy(model(images), labels)
    assert loss(model(images), labels) == plain
    with torch.no_grad():
        assert loss(model(images), labels, masks) == plain
    assert loss(model(images).detach(), labels, masks) == plain
    model.eval()
    with pytest.warns(e2kd.NoEffectWarning, match=r"the model is in eval mode.* Call model\.train\(\)"):
        assert loss(model(images), labels, masks) == plain
    assert loss.eval()(model(images), labels, masks) == plain
    assert not loss.parts
    assert not list(loss.parameters())


def test_guidance_moves_the_explanation_onto_the_object() -> None:
    """Objects in one corner, labels that any place tells: guided networks look at the corner, others needn't."""
    images, labels, _ = draw()
    images = images + labels[:, None, None, None]
    masks = torch.zeros(3, 16, 16)
    masks[:, :8, :8] = 1
    found = {}
    for weight in (0.0, 5.0):
        model = cnn()
        criterion = GuidanceLoss(model, F.cross_entropy, weight=weight, example=images)
        optimizer = torch.optim.Adam(model.parameters(), 0.04)
        for _ in range(30):
            optimizer.zero_grad()
            criterion(model(images), labels, masks).backward()
            optimizer.step()
        found[weight] = energy_on_mask(e2kd.explain(model, images, labels).maps, masks).nanmean().item()
    assert found[5.0] > found[0.0] + 0.1


def test_a_bcos_network_is_guided_by_its_contributions() -> None:
    model = e2kd.bcos.BcosResNet(e2kd.bcos.BasicBlock, (1, 1, 1), 4, width=4).double()
    images, labels, masks = draw()
    criterion = GuidanceLoss(model, F.cross_entropy, example=e2kd.bcos.AddInverse()(images))
    criterion(model(e2kd.bcos.AddInverse()(images)), labels, masks).backward()
    assert 0 < criterion.parts["guidance"] < 1
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_is_left_on_the_model() -> None:
    model = cnn()
    criterion = GuidanceLoss(model, F.cross_entropy)
    criterion.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_does_not_fit_is_said() -> None:
    images, labels, masks = draw()
    model = cnn()
    criterion = GuidanceLoss(model, F.cross_entropy, example=images)
    for wrong in (masks[:2], masks[:, None], masks[0]):
        with pytest.raises(ValueError, match=r"Expected masks of the batch's objects, \[3, H, W\], or of each class"):
            criterion(model(images), labels, wrong)
    with pytest.raises(RuntimeError, match="training forward"):
        criterion(model(images).clone().detach().requires_grad_(), labels, masks)
    with pytest.raises(ValueError, match="weight >= 0"):
        GuidanceLoss(model, F.cross_entropy, weight=-1.0)
    with pytest.raises(TypeError, match="model"):
        GuidanceLoss("resnet18", F.cross_entropy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of the same images"):
        energy_loss(torch.rand(2, 3, 4, 4), masks[:2])
