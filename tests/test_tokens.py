"""Tokens are a map where they are patches of the images, and not where a pooling's outputs happen to be a square."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import e2kd
from e2kd.baselines import AT, FitNets
from e2kd.plans import plan_for
from e2kd.probe import trace
from e2kd.shapes import at_half_size
from e2kd.sites import find_site
from e2kd.stages import Layers

CLASSES, WIDTH = 5, 64
Make = Callable[[], nn.Module]


class Bilinear(nn.Module):
    """[B, C, C]."""

    def forward(self, features: Tensor) -> Tensor:
        flat = features.flatten(2)
        return flat @ flat.transpose(1, 2) / flat.shape[2]


class VLAD(nn.Module):
    """[B, clusters, C]."""

    def __init__(self, clusters: int) -> None:
        super().__init__()
        self.assign, self.centres = nn.Conv2d(WIDTH, clusters, 1), nn.Parameter(torch.randn(clusters, WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        shares = self.assign(features).flatten(2).softmax(1)
        return shares @ features.flatten(2).transpose(1, 2) - shares.sum(2, keepdim=True) * self.centres


class Parts(nn.Module):
    """[B, parts, C]."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(WIDTH, parts, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.look(features).flatten(2).softmax(2) @ features.flatten(2).transpose(1, 2)


class Pool1d(nn.Module):
    """[B, C, cells] of a pool over all positions."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(cells)

    def forward(self, features: Tensor) -> Tensor:
        pooled: Tensor = self.pool(features.flatten(2))
        return pooled


class Decoder(nn.Module):
    """[B, queries, C], as Query2Label and DETR read features."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, WIDTH))
        self.layer = nn.TransformerDecoderLayer(WIDTH, 2, 32, 0.0, batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        asked: Tensor = self.layer(self.queries.expand(len(features), -1, -1), features.flatten(2).transpose(1, 2))
        return asked


class Root(nn.Module):
    """Signed square roots of unit length."""

    def forward(self, flat: Tensor) -> Tensor:
        return F.normalize(flat.sign() * (flat.abs() + 1e-6).sqrt(), dim=1)


HEADS: dict[str, tuple[Make, int]] = {
    "bilinear": (Bilinear, WIDTH * WIDTH),
    "64 clusters": (lambda: VLAD(64), 64 * WIDTH),
    "32 clusters": (lambda: VLAD(32), 32 * WIDTH),
    "4 parts": (lambda: Parts(4), 4 * WIDTH),
    "16 parts": (lambda: Parts(16), 16 * WIDTH),
    "49 queries": (lambda: Decoder(49), 49 * WIDTH),
    "one value": (lambda: Pool1d(1), WIDTH),
    "seven values": (lambda: Pool1d(7), 7 * WIDTH),
}


def fine_grained(head: str, seed: int = 0) -> nn.Sequential:
    """A trunk of stride 16, a pooling, one linear layer; 64 clusters at 256 px are as many as half its rows squared."""
    torch.manual_seed(seed)
    make, width = HEADS[head]
    trunk = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.Softplus(), nn.Conv2d(16, WIDTH, 3, 4, 1), nn.Softplus())
    layers = {"trunk": trunk, "pool": make(), "flat": nn.Flatten(), "root": Root(), "fc": nn.Linear(width, CLASSES)}
    return nn.Sequential(OrderedDict(layers))


def plain(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    convolutions = nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def images(side: int, batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(7))


CAM, TRUNK = e2kd.GradCAM(), e2kd.GradCAM("trunk")


@pytest.mark.parametrize("side", [224, 128, 256])
@pytest.mark.parametrize("head", HEADS)
def test_a_pooling_is_no_map(head: str, side: int) -> None:
    model, x = fine_grained(head).eval(), images(side)
    found = e2kd.explain(model, x)
    assert found.maps.shape[-1] == side // 16
    assert torch.equal(found.maps, e2kd.explain(model, x, found.classes, TRUNK).maps)
    with pytest.raises(e2kd.UnsupportedModel, match=r"'pool' .* holds no map .* Name one through layer="):
        e2kd.explain(model, x, explainer=e2kd.GradCAM("pool"))
    with pytest.raises(e2kd.UnsupportedModel, match=r"'pool' .* holds no map"):
        e2kd.transfer.read(model, x, ["pool"])


@pytest.mark.parametrize("side", [224, 128])
@pytest.mark.parametrize("head", ["bilinear", "32 clusters", "one value"])
def test_students_and_teachers_with_a_pooling_compare_their_trunks(head: str, side: int) -> None:
    x, labels = images(side), torch.arange(3)

    def term(student: nn.Module, teacher: nn.Module, **settings: e2kd.Explainer) -> float:
        criterion = e2kd.E2KDLoss(student, teacher, nn.CrossEntropyLoss(), **settings)
        criterion(student(x), labels).backward()
        return criterion.parts["cosine"].item()

    assert term(fine_grained(head), plain()) == term(
        fine_grained(head), plain(), explainer=TRUNK, teacher_explainer=CAM
    )
    assert term(plain(), fine_grained(head)) == term(plain(), fine_grained(head), teacher_explainer=TRUNK)


@pytest.mark.parametrize("side", [224, 128])
def test_a_frozen_teacher_with_a_pooling_has_maps_of_its_trunk(side: int, tmp_path: Path) -> None:
    teacher, x = fine_grained("bilinear").eval(), images(side)
    cache = e2kd.freeze(teacher, TensorDataset(x, torch.arange(3)), tmp_path, progress=False)
    assert cache is not None
    live = e2kd.explain(teacher, x, explainer=TRUNK).maps
    assert (e2kd.cosine(cache.rows(torch.arange(3)).maps, live) > 0.9999).all()


# Rivals


class Staged(nn.Module):
    """Tokens of a convolution, merged once, and a pool to [B, C, 1], as Hugging Face's Swin has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, width // 4, 8, 8), nn.Linear(width // 4, width // 4)
        self.merge, self.last = nn.Linear(width, width), nn.LayerNorm(width)
        self.pooler, self.fc = nn.AdaptiveAvgPool1d(1), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(self.patches(x).flatten(2).transpose(1, 2)).relu()
        side = round(tokens.shape[1] ** 0.5)
        cells = tokens.view(len(x), side // 2, 2, side // 2, 2, -1).transpose(2, 3).flatten(3).flatten(1, 2)
        logits: Tensor = self.fc(self.pooler(self.last(self.merge(cells)).transpose(1, 2)).flatten(1))
        return logits


@pytest.mark.parametrize("width", [64, 96, 256, 1024])
def test_what_a_pool_leaves_of_tokens_is_no_stage(width: int) -> None:
    stages = AT(plain(), Staged(width), None, example=images(128)).teacher_stages
    assert (stages[-1].place.module, stages[-1].grid, stages[-1].channels) == ("last", (8, 8), width)


@pytest.mark.parametrize("width", [24, 36, 64])
def test_stages_of_hugging_faces_swin(width: int) -> None:
    transformers = pytest.importorskip("transformers")
    configuration = transformers.SwinConfig(
        image_size=64, embed_dim=width, depths=[1, 1, 1], num_heads=[1, 2, 4], window_size=4, num_labels=CLASSES
    )
    model = transformers.SwinForImageClassification(configuration).eval()
    logits = model(images(64)).logits
    for method in (AT, FitNets):
        stages = method(plain(), model, None, example=images(64)).teacher_stages
        assert "swin.pooler" not in [stage.place.module for stage in stages]
        assert all(stage.grid[0] > 1 and stage.channels == width * 16 // stage.grid[0] for stage in stages)
    assert torch.equal(model(images(64)).logits, logits)  # it notes the size it saw last


# What smaller images say


class Watching(nn.Module):
    """A network that notes which images it saw last, in attributes and buffers, and takes no others afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen, self.fc = nn.Conv2d(3, 8, 8, 8), None, nn.Linear(8, CLASSES)
        self.mix = nn.Identity()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.seen not in (None, x.shape[-1]):
            self.spoiled = True
        self.count += 1
        self.seen = x.shape[-1]
        if x.shape[-1] < 32:
            raise KeyError("too small")
        logits: Tensor = self.fc(self.mix(self.conv(x).flatten(2).transpose(1, 2) * 2).mean(1))
        return logits


@pytest.mark.parametrize("side", [32, 64])
def test_smaller_images_leave_nothing_behind(side: int) -> None:
    model = Watching()
    model(images(side))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    shapes = at_half_size(model, images(side))
    assert shapes.of("conv", 0) == (None if side == 32 else (2, 8, 4, 4))
    assert (model.seen, model.training, hasattr(model, "spoiled")) == (side, True, False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_networks_without_tokens_see_no_smaller_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2kd.probe.at_half_size", lambda *_: pytest.fail("a forward that nobody needed"))
    find_site(plain(), images(64))
    Layers(plain(), images(64)).stages()


class Fixed(nn.Module):
    """Tokens with positions of their own, so that images have one size; then a pooling to `slots`."""

    def __init__(self, slots: int, *, by_convolution: bool = True) -> None:
        super().__init__()
        self.by_convolution = by_convolution
        self.patches = nn.Conv2d(3, 16, 8, 8) if by_convolution else nn.Linear(3 * 64, 16)
        self.positions, self.block = nn.Parameter(torch.randn(1, 100, 16)), nn.Sequential(nn.Linear(16, 16), nn.GELU())
        self.pool, self.fc = nn.Sequential(Slots(slots)), nn.Linear(16 * slots, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_convolution:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
        else:
            tokens = self.patches(F.unfold(x, 8, stride=8).transpose(1, 2))
        tokens = self.block(tokens + self.positions)
        logits: Tensor = self.fc(self.pool(tokens).flatten(1))
        return logits


class Slots(nn.Module):
    """[B, slots, C] out of tokens, as poolings by attention."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.queries = nn.Linear(16, slots)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.queries(tokens).softmax(1).transpose(1, 2) @ tokens


@pytest.mark.parametrize("slots", [64, 36, 32, 16])
def test_where_images_have_one_size_tokens_have_the_grid_of_convolutions(slots: int) -> None:
    found = plan_for(Fixed(slots), e2kd.GradCAM(), images(80)).site
    assert found is not None
    assert (found.layer, found.grid) == ("block", (10, 10))


def test_tokens_of_a_network_without_convolutions_are_found() -> None:
    found = plan_for(Fixed(2, by_convolution=False), e2kd.GradCAM(), images(80)).site
    assert found is not None
    assert (found.layer, found.grid) == ("block", (10, 10))


class Prefixed(nn.Module):
    """Tokens of any image, with some in front of them."""

    def __init__(self, prefix: int, size: int | None = None) -> None:
        super().__init__()
        self.conv, self.front = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, prefix, 16))
        self.pool = nn.Identity() if size is None else nn.AdaptiveAvgPool2d(size)
        self.block, self.fc = nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.pool(self.conv(x)).flatten(2).transpose(1, 2)
        logits: Tensor = self.fc(self.block(torch.cat([self.front.expand(len(x), -1, -1), tokens], 1)).mean(1))
        return logits


@pytest.mark.parametrize("prefix", [0, 1, 4, 9, 16])
@pytest.mark.parametrize("side", [40, 56, 64, 128])
def test_what_comes_before_the_patches_is_told_by_smaller_images(prefix: int, side: int) -> None:
    """49 + 16 tokens may be 64 + 1."""
    site, _ = find_site(Prefixed(prefix), images(side))
    assert (site.layer, site.layout.prefix, site.grid) == ("block", prefix, (side // 8, side // 8))


@pytest.mark.parametrize("size", [4, 7])
def test_tokens_of_a_grid_that_is_the_same_for_all_images(size: int) -> None:
    site, _ = find_site(Prefixed(1, size), images(128))
    assert (site.layer, site.layout.prefix, site.grid) == ("block", 1, (size, size))


def test_tokens_of_a_network_that_resizes_its_images() -> None:
    model = nn.Sequential(nn.Upsample((128, 128)), Staged(64))
    site, _ = find_site(model, images(96))
    assert (site.layer, site.grid) == ("1.last", (8, 8))


def test_the_shapes_of_a_trace_are_those_of_its_calls() -> None:
    found = trace(Staged(64), images(64))
    assert {call.name for call in found.calls} == set(found.shapes.returned)
    assert all(found.shapes.of(call.name, call.index) == call.output.shape for call in found.calls)
    assert found.shapes.convolved == {(3, 16, 8, 8)}
