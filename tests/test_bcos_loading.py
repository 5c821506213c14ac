"""Official checkpoints: every released architecture is told from its keys, and what does not fit is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from e2kd import bcos
from e2kd.bcos import BasicBlock, BatchNormUncentered2d, load_official
from e2kd.bcos.recognition import recognised

RELEASES: dict[str, Callable[[], nn.Module]] = {
    name: getattr(bcos, name)
    for name in (
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50"),
        *("densenet121", "densenet161", "densenet169", "densenet201", "vgg11", "convnext_tiny", "convnext_base"),
        *("vit_ti", "vit_s", "vit_b", "vit_l", "vitc_ti", "vitc_s", "vitc_b", "vitc_l"),
    )
} | {
    "convnext_tiny_bnu": lambda: bcos.convnext_tiny(norm=BatchNormUncentered2d),
    "convnext_base_bnu": lambda: bcos.convnext_base(norm=BatchNormUncentered2d),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "ten classes": lambda: bcos.resnet50(10),
    "max-out": lambda: bcos.resnet18(max_out=2),
    "small images": lambda: bcos.resnet56(max_out=2),
    "small densenet": lambda: bcos.BcosDenseNet((3, 2, 4), 10, growth=12, width=24, small_images=True, max_out=2),
    "vgg without norms": lambda: bcos.vgg13(10, norm=None, max_out=2),
    "vgg19": lambda: bcos.vgg19(10),
    "biased norms": lambda: bcos.resnet20(norm=lambda c: BatchNormUncentered2d(c, bias=True)),
    "three channels": lambda: bcos.convnext_small(10, in_channels=3, max_out=2),
    "patches of 8": lambda: bcos.bcos_vit(128, 3, 2, 10, patch_size=8, max_out=2, hidden=200),
}


def settings(model: nn.Module) -> list[str]:
    """All layers with their settings, apart from their names."""
    return [repr(m) for m in model.modules() if not list(m.children())] + [
        f"{m.b} {m.max_out} {getattr(m, 'heads', '')}" for m in model.modules() if hasattr(m, "b")
    ]


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return bcos.BcosResNet(BasicBlock, (1, 2), 5, width=4).eval()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """Both give the same logits."""
    x = torch.rand(2, 6, 32, 32)
    assert torch.equal(found(x), expected.eval()(x))


@pytest.mark.parametrize("name", [*RELEASES, *OTHERS])
def test_networks_are_told_from_their_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model = (RELEASES | OTHERS)[name]()
        found = recognised(model.state_dict())(b=2, logit_bias=None)
    assert list(found.state_dict()) == list(model.state_dict())
    assert settings(found) == settings(model)


@pytest.mark.filterwarnings("ignore:The batch norms of")  # their means are random numbers, for the sake of the test
@pytest.mark.parametrize("name", ["resnet_tiny_eval", "densenet_tiny_eval"])
def test_the_papers_fixtures_load_unchanged(shared: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    golden = load_file(shared(f"golden/e2kd/{name}.safetensors"))
    state = {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}
    torch.save(state, tmp_path / "file.pth")
    torch.testing.assert_close(load_official(tmp_path / "file.pth")(golden["x"]), golden["logits"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["convnext_pn", "convnext_bnu", "resnext"])
def test_fixtures_of_the_bcos_package_load_unchanged(name: str, tmp_path: Path) -> None:
    golden = load_file(Path(__file__).parent / "golden" / "bcos.safetensors")
    prefix = f"{name}.state."
    state = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    save_file(state, tmp_path / "file.safetensors")
    model = load_official(tmp_path / "file.safetensors")
    torch.testing.assert_close(model(golden[f"{name}.x"]), golden[f"{name}.logits"], rtol=0, atol=1e-10)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3, "hyper_parameters": {"name": "resnet"}},
        lambda state: {"state_dict": {**prefixed(state, "model."), **prefixed(state, "teacher_model.")}},
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"model": prefixed(state, "module.")},
        lambda state: prefixed(prefixed(state, "_orig_mod."), "module."),
        lambda state: prefixed(state, "0."),
    ],
)
def test_wrappings_of_training_checkpoints(wrap: Callable[[Any], Any], tiny: nn.Module, tmp_path: Path) -> None:
    torch.save(wrap(tiny.state_dict()), tmp_path / "last.ckpt")
    model = load_official(tmp_path / "last.ckpt")
    assert not model.training
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert_same(model, tiny)


def test_averaged_weights_by_request(tiny: nn.Module, tmp_path: Path) -> None:
    average = bcos.BcosResNet(BasicBlock, (1, 2), 5, width=4)
    state = prefixed(tiny.state_dict(), "model.") | prefixed(average.state_dict(), "ema.module.")
    torch.save({"state_dict": {**state, "ema.n_averaged": torch.tensor(7)}}, tmp_path / "both.ckpt")
    assert_same(load_official(tmp_path / "both.ckpt"), tiny)
    assert_same(load_official(tmp_path / "both.ckpt", ema=True), average)
    torch.save(tiny.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="ema=False"):
        load_official(tmp_path / "plain.pth", ema=True)
    torch.save({"state_dict": prefixed(average.state_dict(), "ema.module.")}, tmp_path / "average.ckpt")
    with pytest.raises(ValueError, match="ema=True"):
        load_official(tmp_path / "average.ckpt")


def test_settings_that_no_file_says(tiny: nn.Module, tmp_path: Path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "tiny.pth")
    model = load_official(tmp_path / "tiny.pth", b=1.5, logit_bias=0.25, norm=lambda c: BatchNormUncentered2d(c, 1e-3))
    assert isinstance(model, bcos.BcosResNet)
    assert model.fc.b == 1.5
    assert model.logit_layer.bias == 0.25
    assert model.bn1.eps == 1e-3
    released = load_official(tmp_path / "tiny.pth")
    assert released.get_submodule("logit_layer").bias == pytest.approx(-torch.tensor(4.0).log())


def test_what_does_not_fit_is_named(tiny: nn.Module, tmp_path: Path) -> None:
    state = tiny.state_dict()
    state["layer2.0.bn1.weight"] = torch.ones(7)
    state["extra.weight"] = state.pop("layer2.1.conv1.linear.weight")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="does not fit the BcosResNet") as error:
        load_official(tmp_path / "odd.pth")
    assert "1 missing: layer2.1.conv1.linear.weight" in str(error.value)
    assert "1 without a place: extra.weight" in str(error.value)
    assert "1 of another shape: layer2.0.bn1.weight [7] in place of [8]" in str(error.value)


def test_a_lost_block_is_missing_not_a_smaller_network(tiny: nn.Module, tmp_path: Path) -> None:
    state = {key: value for key, value in tiny.state_dict().items() if not key.startswith("layer2.0.")}
    torch.save(state, tmp_path / "lost.pth")
    with pytest.raises(ValueError, match=r"missing: layer2\.0\.conv1"):
        load_official(tmp_path / "lost.pth")


def test_half_a_file_and_other_networks_are_named(tiny: nn.Module, tmp_path: Path) -> None:
    state = tiny.state_dict()
    state.pop("fc.linear.weight")
    cases: dict[str, tuple[Any, str]] = {
        "cut": (state, "lacks 'fc.linear.weight'"),
        "standard": ({"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}, "biases are those of a standard"),
        "nothing": ({"epoch": 3}, "found 0 tensors"),
        "list": ([torch.ones(1)], "found a list"),
        "odd vit": (bcos.bcos_vit(8, 1, 2, 5).state_dict(), "divisible by 64"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            load_official(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "absent.pth")


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tiny: nn.Module, tmp_path: Path) -> None:
    content = {"state_dict": prefixed(tiny.state_dict(), "model."), "hyper_parameters": Payload(tmp_path / "ran")}
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"holds objects of .*mkdir.*keep its tensors alone"):
        load_official(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()
