"""UniCAM: the papers' own maps, autograd, properties of the closed form, any architecture, degenerate batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import TinyViT, cnn
from safetensors.torch import load_file
from torch import Tensor, nn

from e2kd import distance
from e2kd.distance import PAPERS, correlation, residual, u_center
from e2kd.errors import UnsupportedModel
from e2kd.transfer.companions import stability
from e2kd.transfer.contrasting import UniCAM, compare, unicam
from e2kd.transfer.readings import LayerReading, read
from e2kd.transfer.targets import label_features
from e2kd.transfer.unique import (
    Objective,
    channel_weights,
    energy,
    papers_scaled,
    relevance,
    scaled,
    unlikeness,
    weighted,
)

pytestmark = pytest.mark.filterwarnings("ignore:UniCAM of .* images")
LAYER = {1: "layer4", 2: "layer4", 3: "layer3", 4: "layer2", 5: "layer1"}  # by the papers' depth; 1 is pooled


class TinyNet(nn.Module):
    """The networks of the fixtures."""

    def __init__(self, widths: list[int], strides: list[int]) -> None:
        super().__init__()
        inputs = [3, *widths[:-1]]
        names = ["stem", "layer1", "layer2", "layer3", "layer4"]
        for name, a, b, stride in zip(names, inputs, widths, strides, strict=True):
            conv = nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False)
            self.add_module(name, nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU()))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.stem, self.layer1, self.layer2, self.layer3, self.layer4):
            x = block(x)
        return self.fc(self.avgpool(x).flatten(1))


WIDTHS = {
    "pair_a": ([6, 8, 10, 12, 14], [6, 12, 12, 16, 20]),
    "pair_b": ([6, 8, 8, 8, 8], [6, 8, 8, 8, 8]),
}


@pytest.fixture(scope="module")
def golden(shared: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(shared("golden/unicam/unicam.safetensors"))


def net(golden: dict[str, Tensor], case: str, who: str) -> TinyNet:
    model = TinyNet(WIDTHS[case][who == "base"], [1, 1, 2, 2, 2])
    prefix = f"{case}/{who}."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
    return model


@pytest.mark.parametrize("case", ["pair_a", "pair_b"])
@pytest.mark.parametrize("mode", ["gt", "argmax"])
class TestThePapersMaps:
    @pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
    def test_maps_weights_and_scores(self, golden: dict[str, Tensor], case: str, mode: str, depth: int) -> None:
        """To the float32 noise of the papers' own run: maps in [0, 1] within 5e-5, weights and scores 1e-4."""
        student, base = (net(golden, case, who) for who in ("student", "base"))
        targets = golden[f"{case}/emb"] if mode == "gt" else None
        found = unicam(
            student, base, golden[f"{case}/x"], targets, [LAYER[depth]], pooled=depth == 1, papers=True
        ).layers[LAYER[depth]]
        for direction, mine in (("distilled", found.distilled), ("residual", found.residual)):
            theirs = {k: golden[f"{case}/{direction}.depth{depth}.{mode}.{k}"] for k in ("map", "weights", "y")}
            scale = theirs["weights"].abs().max()
            torch.testing.assert_close(mine.maps[:, 0], theirs["map"], rtol=0, atol=5e-5)
            torch.testing.assert_close(mine.weights.float() / scale, theirs["weights"] / scale, rtol=0, atol=1e-4)
            assert mine.score == pytest.approx(theirs["y"].item(), rel=1e-4, abs=1e-5)
            assert torch.equal(mine.blank, (theirs["map"] == 0).flatten(1).all(1))

    def test_unique_matrices(self, golden: dict[str, Tensor], case: str, mode: str) -> None:
        student, base = (net(golden, case, who) for who in ("student", "base"))
        names = ["layer4", "layer3", "layer2", "layer1"]
        mine, other = (read(m, golden[f"{case}/x"], names, eps=PAPERS.distance) for m in (student, base))
        for depth, x, y in zip((2, 3, 4, 5), mine.layers, other.layers, strict=True):
            p, q = u_center(x.distances), u_center(y.distances)
            for direction, unique in (("distilled", residual(p, q)), ("residual", residual(q, p))):
                theirs = golden[f"{case}/{direction}.depth{depth}.{mode}.unique"]
                torch.testing.assert_close(unique.float(), theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
            torch.testing.assert_close(x.maps, golden[f"{case}/distilled.depth{depth}.act"], rtol=1e-4, atol=1e-5)

    def test_default_maps_are_the_papers_before_its_resizing(
        self, golden: dict[str, Tensor], case: str, mode: str
    ) -> None:
        student, base = (net(golden, case, who) for who in ("student", "base"))
        targets = golden[f"{case}/emb"] if mode == "gt" else None
        found = unicam(student, base, golden[f"{case}/x"], targets, ["layer3"])
        for direction, mine in (("distilled", found.distilled), ("residual", found.residual)):
            raw = golden[f"{case}/{direction}.depth3.{mode}.rawcam"][:, None].relu()
            torch.testing.assert_close(mine["layer3"].maps, scaled(raw), rtol=0, atol=1e-4)


def reading(*size: int, seed: int = 0, pooled: bool = False) -> LayerReading:
    maps = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    features = maps.mean((2, 3)) if pooled else maps.flatten(1)
    return LayerReading("", maps, distance.distance_matrix(features), pooled)


def naive(maps: Tensor, given: Tensor, labels: Tensor, objective: Objective, pooled: bool) -> tuple[Tensor, Tensor]:
    """Score and weights the papers' way: a graph from the raw activations through n x n x d differences."""
    maps = maps.clone().requires_grad_()

    def centred(x: Tensor) -> Tensor:
        difference = x[:, None] - x[None]
        off = ~torch.eye(len(x), dtype=torch.bool)
        d = torch.zeros(len(x), len(x), dtype=x.dtype)
        d = d.masked_scatter(off, difference[off].square().sum(-1).sqrt())
        n = len(x)
        rows, total = d.sum(1) / (n - 2), d.sum() / ((n - 1) * (n - 2))
        return (d - rows[:, None] - rows[None] + total) * off

    p, q, g = centred(maps.mean((2, 3)) if pooled else maps.flatten(1)), centred(given), centred(labels)
    unique = p - (p * q).sum() / (q * q).sum() * q
    score = objective(unique, g, distance.Guards())
    (gradient,) = torch.autograd.grad(score, maps)
    return score.detach(), gradient.mean((2, 3))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("objective", [relevance, unlikeness, energy])
@pytest.mark.parametrize("n", [5, 12])
def test_closed_form_equals_autograd_in_float64(n: int, objective: Objective, pooled: bool) -> None:
    x, y = reading(n, 7, 3, 4, pooled=pooled), reading(n, 5, 2, 2, seed=1)
    labels = torch.randn(n, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    score, weights = channel_weights(x, y.distances, distance.distance_matrix(labels), objective)
    expected, gradient = naive(x.maps, y.maps.flatten(1), labels, objective, pooled)
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=1e-12)
    assert (weights - gradient).abs().max() <= 1e-12 * gradient.abs().max()


class TestClosedForm:
    def test_every_channels_weights_sum_to_zero(self) -> None:
        """So not all images of a batch can be seen by the same channel, and some maps are blank."""
        x, y = reading(9, 6, 4, 4), reading(9, 6, 4, 4, seed=1)
        weights = channel_weights(x, y.distances, None, energy)[1]
        assert weights.sum(0).abs().max() <= 1e-12 * weights.abs().max()

    def test_follows_the_order_of_the_images(self) -> None:
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        x, y = reading(9, 6, 4, 4), reading(9, 6, 4, 4, seed=1)
        straight = channel_weights(x, y.distances, None, unlikeness)[1]
        turned = channel_weights(x.of(order), y.of(order).distances, None, unlikeness)[1]
        torch.testing.assert_close(turned, straight[order])

    @pytest.mark.parametrize("scale", [1e-15, 1e15])
    def test_maps_do_not_depend_on_the_scale_of_the_features(self, scale: float) -> None:
        x, y = reading(9, 6, 4, 4), reading(9, 6, 4, 4, seed=1)
        small = LayerReading("", (scale * x.maps).float(), scale * x.distances)
        maps, again = (
            scaled(weighted(t.maps, channel_weights(t, y.distances, y.distances.roll(3), relevance)[1]))
            for t in (x, small)
        )
        torch.testing.assert_close(again.double(), maps, rtol=0, atol=1e-5)

    def test_partial_correlation_has_the_same_maps(self) -> None:
        """It differs from the semi-partial by a factor that does not depend on the features that are explained."""

        def partial(unique: Tensor, labels: Tensor | None, guards: distance.Guards) -> Tensor:
            assert labels is not None
            return correlation(unique, residual(labels, u_center(y.distances)))

        x, y = reading(9, 6, 4, 4), reading(9, 6, 4, 4, seed=1)
        labels = reading(9, 3, 1, 1, seed=2).distances
        semi, full = (channel_weights(x, y.distances, labels, f)[1] for f in (relevance, partial))
        torch.testing.assert_close(full / full.norm(), semi / semi.norm())

    def test_gradient_points_where_the_score_grows(self) -> None:
        x, y = reading(8, 4, 3, 3), reading(8, 4, 3, 3, seed=1)
        before, weights = channel_weights(x, y.distances, None, energy)
        moved = x.maps + 1e-4 * (weights / weights.norm())[:, :, None, None]
        after = channel_weights(
            LayerReading("", moved, distance.distance_matrix(moved.flatten(1))), y.distances, None, energy
        )[0]
        assert after > before


def small(seed: int) -> nn.Module:
    return cnn(seed=seed).float()


def batch(n: int = 12, size: int = 16) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(12) % 3


class TestAnyModel:
    def test_all_layers_and_directions_from_one_forward_each(self) -> None:
        student, base, calls = small(0), small(1), []
        for model in (student, base):
            model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        found = unicam(student, base, batch(), LABELS, ["1", "3", ("0", "2")])
        assert calls == [False, False]
        assert list(found.layers) == ["1", "3", "0"]
        assert found.layers["0"].base_layer == "2"
        for layer in found.layers.values():
            for direction in (layer.distilled, layer.residual):
                assert direction.maps.shape[:2] == (12, 1)
                assert 0 <= direction.maps.min() <= direction.maps.max() <= 1
                assert torch.equal(direction.blank, direction.maps.flatten(1).amax(1) == 0)
                assert not direction.maps.requires_grad
        alone = unicam(student, base, batch(), LABELS, ["3"]).distilled["3"]
        assert torch.equal(alone.maps, found.distilled["3"].maps)

    def test_directions_are_mirrored(self) -> None:
        one = unicam(small(0), small(1), batch(), LABELS, ["3"]).layers["3"]
        other = unicam(small(1), small(0), batch(), LABELS, ["3"]).layers["3"]
        torch.testing.assert_close(one.distilled.maps, other.residual.maps)
        assert one.residual.score == pytest.approx(other.distilled.score)

    def test_scores_are_those_of_the_statistics(self) -> None:
        found = unicam(small(0), small(1), batch(), LABELS, ["3"]).layers["3"]
        mine, other = (read(m, batch(), ["3"]).layers[0].maps.flatten(1) for m in (small(0), small(1)))
        labels = nn.functional.one_hot(LABELS).double()
        expected = distance.semi_partial_dcor(mine, labels, other).item()
        assert found.distilled.score == pytest.approx(expected, abs=1e-12)
        assert found.sums.score("student", "labels", "base").value == pytest.approx(expected, abs=1e-10)
        fss = distance.dcor_unbiased(mine, other).item()
        assert found.sums.score("student", "base").value == pytest.approx(fss, abs=1e-12)

    def test_transformers_through_their_patches(self) -> None:
        vit = TinyViT().float()
        found = unicam(vit, small(1), batch(), LABELS, [("blocks.0", "3"), ("blocks.1", "1")])
        assert found.distilled["blocks.0"].maps.shape == (12, 1, 4, 4)
        assert found.residual["blocks.1"].maps.shape == (12, 1, 8, 8)
        assert not found.distilled["blocks.1"].reason  # has no gradient at the head, and needs none
        assert torch.equal(
            read(vit, batch(), ["blocks.0"]).layers[0].maps.flatten(2).transpose(1, 2),
            _tokens(vit, "blocks.0")[:, 1:],
        )

    def test_default_layers_are_those_an_explanation_reads(self) -> None:
        found = unicam(TinyViT().float(), small(1), batch(), LABELS)
        assert [(x.layer, x.base_layer) for x in found.layers.values()] == [("blocks.0", "3")]

    def test_channels_last_models(self) -> None:
        timm = pytest.importorskip("timm")
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, num_classes=3)
        found = read(model, batch(4, 64), ["layers.0", "layers.3"])
        assert [tuple(x.maps.shape[1:]) for x in found.layers] == [(96, 16, 16), (768, 2, 2)]

    def test_models_of_different_input_sizes(self) -> None:
        vit = TinyViT().float()
        large = nn.functional.interpolate(batch(), (32, 32))
        with pytest.raises(ValueError, match=r"The base TinyViT can't take images .*base_images="):
            unicam(small(0), vit, large, LABELS, [("3", "blocks.0")])
        found = unicam(small(0), vit, large, LABELS, [("3", "blocks.0")], base_images=batch())
        assert found.distilled["3"].maps.shape == (12, 1, 8, 8)
        with pytest.raises(ValueError, match="same pictures"):
            unicam(small(0), vit, large, LABELS, [("3", "blocks.0")], base_images=batch(4))

    def test_batches_change_nothing(self) -> None:
        whole = unicam(small(0), small(1), batch(), LABELS, ["3"]).layers["3"]
        parts = unicam(small(0), small(1), batch(), LABELS, ["3"], batch_size=5).layers["3"]
        torch.testing.assert_close(parts.distilled.maps, whole.distilled.maps, rtol=0, atol=1e-4)

    def test_a_shared_layer_goes_by_each_of_its_names(self) -> None:
        model = small(0)
        model.get_submodule("1").other = model.get_submodule("0")
        mine, again = (read(model, batch(), [name]).layers[0].maps for name in ("0", "1.other"))
        assert torch.equal(mine, again)

    def test_a_later_layer_that_works_in_place_does_not_change_what_was_read(self) -> None:
        def make(inplace: bool) -> nn.Module:
            torch.manual_seed(0)
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), *head)

        plain, inplace = (read(make(flag), batch(), ["0"]).layers[0].maps for flag in (False, True))
        assert torch.equal(plain, inplace)
        assert plain.min() < 0

    def test_leaves_models_as_they_were(self) -> None:
        base, head = small(0), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), *head)
        model.train()
        model[2].eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        state = torch.get_rng_state()
        unicam(model, base, batch(), LABELS, [("1", "1")])
        assert [m.training for m in model] == [True, True, False, True, True, True]
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())

    def test_no_hooks_stay_after_an_error(self) -> None:
        model = small(0)
        with pytest.raises(UnsupportedModel, match="no layer named 'nowhere'"):
            unicam(model, small(1), batch(), LABELS, ["1", "nowhere"])
        assert not any(m._forward_hooks for m in model.modules())

    def test_half_precision_models_inference_mode_and_autocast(self) -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            images = batch() * 1
            inside = unicam(small(0), small(1), images, LABELS, ["3"]).distilled["3"]
        outside = unicam(small(0), small(1), batch(), LABELS, ["3"]).distilled["3"]
        assert torch.equal(inside.maps, outside.maps)
        half = unicam(small(0).bfloat16(), small(1), batch(), LABELS, ["3"]).distilled["3"]
        assert half.maps.dtype == torch.float32
        assert math.isfinite(half.score)

    def test_a_base_is_read_once(self) -> None:
        bank = read(small(1), batch(), ["3"])
        again = compare(read(small(0), batch(), ["3"]), bank, LABELS).distilled["3"]
        assert torch.equal(again.maps, unicam(small(0), small(1), batch(), LABELS, ["3"]).distilled["3"].maps)
        with pytest.raises(ValueError, match="as many layers"):
            compare(read(small(0), batch(), ["1", "3"]), bank, LABELS)


def _tokens(vit: nn.Module, name: str) -> Tensor:
    kept = []
    handle = vit.get_submodule(name).register_forward_hook(lambda m, a, output: kept.append(output))
    with torch.no_grad():
        vit(batch())
    handle.remove()
    return kept[0]


class TestTargets:
    def test_labels_are_one_hot_rows_and_embeddings_their_rows(self) -> None:
        table = torch.rand(3, 5)
        pairs = [(LABELS, None), (nn.functional.one_hot(LABELS).float(), None), (LABELS, torch.eye(3))]
        maps = [unicam(small(0), small(1), batch(), t, ["3"], embeddings=e).distilled["3"].maps for t, e in pairs]
        torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(maps[0], maps[2], rtol=0, atol=1e-6)
        a, b = (
            unicam(small(0), small(1), batch(), t, ["3"], embeddings=e).distilled["3"]
            for t, e in ((LABELS, table), (table[LABELS], None))
        )
        assert torch.equal(a.maps, b.maps)
        assert not torch.allclose(a.maps, maps[0])

    @pytest.mark.parametrize("papers", [False, True])
    @pytest.mark.parametrize("objective", [None, energy])
    def test_of_what_was_read_before_it_is_the_same(self, objective: Objective | None, papers: bool) -> None:
        settings: dict[str, Any] = {"embeddings": torch.rand(3, 5), "objective": objective, "papers": papers}
        whole = unicam(small(0), small(1), batch(), LABELS, ["3"], **settings)
        readings = (read(small(s), batch(), ["3"], eps=PAPERS.distance if papers else 0.0) for s in (0, 1))
        again = compare(*readings, LABELS, **settings)
        for found, expected in ((again.distilled, whole.distilled), (again.residual, whole.residual)):
            assert torch.equal(found["3"].maps, expected["3"].maps)
            assert found["3"].score == expected["3"].score

    def test_two_classes_make_embeddings_equal(self) -> None:
        """Distances have two values then, and their scale does not matter."""
        labels = torch.arange(12) % 2
        a, b = (
            unicam(small(0), small(1), batch(), labels, ["3"], embeddings=torch.rand(2, 5) * s).distilled["3"].score
            for s in (1, 9)
        )
        assert a == pytest.approx(b, abs=1e-9)

    def test_without_targets(self) -> None:
        found = unicam(small(0), small(1), batch(), None, ["3"]).layers["3"]
        assert found.distilled.score > 0
        assert found.sums.names == ("student", "base")
        assert not found.distilled.reason

    @pytest.mark.parametrize(
        ("targets", "embeddings", "message"),
        [
            (torch.arange(12), torch.rand(5, 3), "from 0 to 11, but there are embeddings of 5"),
            (torch.arange(12) - 1, None, "from -1 to 10"),
            (torch.arange(5), None, "Expected targets of 12 images"),
            (torch.rand(12), None, "one row per image"),
            (torch.rand(12, 3), torch.rand(4, 3), "need labels as integers"),
        ],
    )
    def test_that_do_not_fit_raise(self, targets: Tensor, embeddings: Tensor | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            unicam(small(0), small(1), batch(), targets, ["3"], embeddings=embeddings)

    def test_embeddings_with_a_gradient_are_detached(self) -> None:
        assert not label_features(torch.tensor([0, 1]), torch.rand(2, 3, requires_grad=True)).requires_grad

    def test_relevance_needs_labels(self) -> None:
        with pytest.raises(ValueError, match="there are none"):
            unicam(small(0), small(1), batch(), None, ["3"], objective=relevance)


def is_blank(found: UniCAM) -> bool:
    return math.isnan(found.score) and found.maps.count_nonzero() == 0 and bool(found.blank.all())


class TestDegenerateBatches:
    """Blank maps, no score and a reason; never noise stretched to [0, 1]."""

    def test_a_student_that_is_its_base(self) -> None:
        for targets in (LABELS, None):
            found = unicam(small(0), small(0), batch(), targets, ["3"]).layers["3"]
            assert is_blank(found.distilled)
            assert "student differs from base by nothing but scale" in found.distilled.reason
            assert "base differs from student by nothing but scale" in found.residual.reason
            assert found.sums.score("student", "base").value == pytest.approx(1, abs=1e-6)

    def test_one_class(self) -> None:
        found = unicam(small(0), small(1), batch(), torch.zeros(12, dtype=torch.long), ["3"]).distilled["3"]
        assert is_blank(found)
        assert "labels is the same for every image" in found.reason

    @pytest.mark.parametrize("objective", [energy, unlikeness])
    def test_labels_that_the_objective_ignores(self, objective: Objective) -> None:
        one_class = torch.zeros(12, dtype=torch.long)
        found, without = (
            unicam(small(0), small(1), batch(), labels, ["3"], objective=objective).distilled["3"]
            for labels in (one_class, None)
        )
        assert not found.reason
        assert torch.equal(found.maps, without.maps)
        assert found.score == without.score

    def test_labels_that_an_objective_of_ones_own_may_read(self) -> None:
        def own(unique: Tensor, labels: Tensor | None, guards: distance.Guards) -> Tensor:
            return 2 * relevance(unique, labels, guards)

        found = unicam(small(0), small(1), batch(), torch.arange(12), ["3"], objective=own).distilled["3"]
        assert is_blank(found)
        assert "no two images are of one class" in found.reason

    def test_every_image_its_own_class(self) -> None:
        found = unicam(small(0), small(1), batch(), torch.arange(12), ["3"]).distilled["3"]
        assert is_blank(found)
        assert "no two images are of one class" in found.reason

    @pytest.mark.parametrize("papers", [False, True])
    def test_fewer_than_four_images(self, papers: bool) -> None:
        found = unicam(small(0), small(1), batch(3), torch.arange(3), ["3"], papers=papers).distilled["3"]
        assert is_blank(found)
        assert "3 images are too few" in found.reason

    def test_nan_features(self) -> None:
        images = batch()
        images[3] = torch.nan
        found = unicam(small(0), small(1), images, LABELS, ["3"]).distilled["3"]
        assert is_blank(found)
        assert "NaN" in found.reason

    def test_a_dead_base_takes_nothing_away(self) -> None:
        dead = small(1)
        nn.init.zeros_(dead[2].weight)
        found = unicam(small(0), dead, batch(), LABELS, ["3"]).layers["3"]
        assert math.isfinite(found.distilled.score)
        assert is_blank(found.residual)
        assert "base is the same for every image" in found.residual.reason

    def test_few_images_warn(self) -> None:
        with pytest.warns(UserWarning, match="UniCAM of 12 images"):
            unicam(small(0), small(1), batch(), LABELS, ["3"])

    @pytest.mark.parametrize("size", [-1, 0, 2.5])
    def test_a_batch_size_that_is_no_count(self, size: Any) -> None:
        said = f"^Expected batch_size to be a whole number from 1, or None for all images, but got {size}."
        with pytest.raises(ValueError, match=said):
            read(small(0), batch(), ["3"], batch_size=size)
        with pytest.raises(ValueError, match=said):
            unicam(small(0), small(1), batch(), LABELS, ["3"], batch_size=size)

    def test_layers_without_a_map_raise(self) -> None:
        with pytest.raises(UnsupportedModel, match="holds no map"):
            unicam(small(0), small(1), batch(), LABELS, ["6"])
        with pytest.raises(ValueError, match="every layer of the student once"):
            unicam(small(0), small(1), batch(), LABELS, [("3", "1"), ("3", "3")])


class TestScaling:
    def test_papers_picture_of_a_blank_map_is_blank(self) -> None:
        assert papers_scaled(torch.zeros(1, 1, 3, 3), (6, 6)).count_nonzero() == 0

    def test_scaled_maps_reach_both_ends(self) -> None:
        maps = scaled(torch.rand(3, 1, 4, 4) * 1e-20)
        assert maps.amax((1, 2, 3)).tolist() == [1, 1, 1]
        assert maps.amin((1, 2, 3)).tolist() == [0, 0, 0]


class TestStability:
    def test_of_maps_whose_companions_do_not_matter_is_one(self) -> None:
        """With one channel, whatever the companions: the map is that channel or blank."""
        base = read(small(1), batch(24), ["3"])
        one = read(small(0), batch(24), ["3"])
        x = one.layers[0]
        maps = x.maps[:, :1].relu() + 1
        single = type(one)(one.logits, (LayerReading("3", maps, x.distances),), one.image_size)
        found = stability(single, base, torch.arange(24) % 3, draws=6)["3"].distilled
        seen = found[found.isfinite()]
        assert len(seen) > 0
        torch.testing.assert_close(seen, torch.ones_like(seen))

    def test_falls_with_companions_and_is_seeded(self) -> None:
        student, base = (read(small(s), batch(24), ["1", "3"]) for s in (0, 1))
        state = torch.get_rng_state()
        a, b = (stability(student, base, torch.arange(24) % 3, seed=1) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        assert list(a) == ["1", "3"]
        for name in a:
            torch.testing.assert_close(a[name].distilled, b[name].distilled, equal_nan=True)
            values = a[name].distilled
            assert values.shape == (24,)
            assert values.nanmean() < 0.999
            assert values[values.isfinite()].abs().max() <= 1 + 1e-9

    def test_is_of_the_labels_embeddings_and_the_objective(self) -> None:
        readings, labels = [read(small(s), batch(24), ["3"]) for s in (0, 1)], torch.arange(24) % 3
        table = torch.rand(3, 5)

        def distilled(targets: Tensor | None = labels, **settings: Any) -> Tensor:
            return stability(*readings, targets, **settings)["3"].distilled.nan_to_num(2)

        assert torch.equal(distilled(embeddings=table), distilled(table[labels]))
        assert not torch.equal(distilled(embeddings=table), distilled())
        assert torch.equal(distilled(objective=relevance), distilled())
        assert torch.equal(distilled(objective=energy), distilled(None, objective=energy))  # it does not ask for labels
        assert not torch.equal(distilled(objective=energy), distilled())

    def test_halves_too_small_are_nan(self) -> None:
        student, base = (read(small(s), batch(6), ["3"]) for s in (0, 1))
        assert stability(student, base, torch.arange(6) % 2)["3"].distilled.isnan().all()
        with pytest.raises(ValueError, match="2 draws or more"):
            stability(student, base, draws=1)
