"""What FSS and RS are measured on: whole images, UniCAM's and GradCAM's pixels, an untrained control."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import SharedActivation, TinyViT, cnn
from torch import Tensor, nn

import e2kd
from e2kd import plans
from e2kd.errors import UnsupportedModel
from e2kd.perturb import road
from e2kd.transfer import (
    GradCAMRegions,
    Models,
    SameRegions,
    UniCAMRegions,
    layer_features,
    scores_of,
    unicam,
    untrained,
)

pytestmark = [pytest.mark.filterwarnings("ignore:UniCAM of .* images"), pytest.mark.usefixtures("one_thread")]
LABELS = torch.arange(16) % 3
LAYERS = ["1", "3"]


def net(seed: int) -> nn.Sequential:
    return cnn(seed=seed).float()


def images() -> Tensor:
    return torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def output(model: nn.Module, layer: str, given: Tensor) -> Tensor:
    """By hand: the layer's output, flattened."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: kept.append(out.flatten(1)))
    with torch.no_grad():
        model(given)
    handle.remove()
    return kept[0]


def test_of_whole_images_are_the_layers_outputs() -> None:
    found = layer_features(net(0), net(1), images(), LABELS, LAYERS)
    sums = unicam(net(0), net(1), images(), LABELS, LAYERS)
    for layer in LAYERS:
        assert torch.equal(found[layer].student, output(net(0), layer, images()))
        assert torch.equal(found[layer].base, output(net(1), layer, images()))
        assert found[layer].rows.all()
        assert scores_of(found[layer].sums) == scores_of(sums.layers[layer].sums)
    assert set(scores_of(found["3"].sums)) == {"fss", "rs_student", "rs_base", "rs_distilled", "rs_residual"}
    assert set(scores_of(layer_features(net(0), net(1), images(), None, ["3"])["3"].sums)) == {"fss"}


def test_pooled_features_are_means_over_space() -> None:
    found = layer_features(net(0), net(1), images(), LABELS, ["3"], pooled=True)["3"]
    expected = output(net(0), "3", images()).unflatten(1, (6, -1)).double().mean(2)
    torch.testing.assert_close(found.student, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["unicam", "gradcam"])
def test_each_model_sees_the_pixels_of_its_own_maps(kind: str) -> None:
    many = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    regions = UniCAMRegions() if kind == "unicam" else GradCAMRegions()
    found = layer_features(net(0), net(3), many, labels, LAYERS, regions=regions, keep=30, seed=4)
    for layer in LAYERS:
        if kind == "unicam":
            both = unicam(net(0), net(3), many, labels, [layer]).layers[layer]
            maps = (both.distilled.maps, both.residual.maps)
        else:
            maps = tuple(e2kd.explain(net(s), many, explainer=e2kd.GradCAM(layer)).maps for s in (0, 3))
        alive = (maps[0].flatten(1).amax(1) > 0) & (maps[1].flatten(1).amax(1) > 0)
        assert torch.equal(found[layer].rows, alive)
        assert 4 <= alive.sum() <= 40
        assert found[layer].targets is not None
        assert len(found[layer].targets) == alive.sum()
        for seed, name, side in ((0, "student", maps[0]), (3, "base", maps[1])):
            shown = road(many[alive], side[alive], 30, seed=4).images
            torch.testing.assert_close(getattr(found[layer], name), output(net(seed), layer, shown))


def test_both_may_be_shown_the_students_pixels() -> None:
    twice = layer_features(net(0), net(0), images(), LABELS, ["3"], regions=SameRegions(GradCAMRegions()))["3"]
    assert torch.equal(twice.student, twice.base)
    mixed = layer_features(net(0), net(1), images(), LABELS, ["3"], regions=SameRegions(GradCAMRegions()))["3"]
    assert torch.equal(mixed.student, twice.student)
    assert not torch.equal(mixed.base, twice.base)


def test_regions_are_any_function() -> None:
    def corner(models: Models) -> list[tuple[Tensor, Tensor]]:
        maps = torch.zeros(16, 1, 4, 4)
        maps[:12, :, 0, 0] = 1
        return [(maps, maps) for _ in models.readings[0].layers]

    found = layer_features(net(0), net(1), images(), LABELS, ["3"], regions=corner, keep=10)["3"]
    assert found.rows.tolist() == [True] * 12 + [False] * 4
    assert len(found.student) == 12


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_images_whose_maps_are_not_finite_do_not_count(broken: float) -> None:
    mine, others = torch.rand(16, 1, 4, 4), torch.rand(16, 1, 4, 4)
    mine[:2], others[4, 0, 0, 0] = broken, broken
    found = layer_features(net(0), net(1), images(), LABELS, ["3"], regions=lambda _: [(mine, others)])["3"]
    assert (~found.rows).nonzero().flatten().tolist() == [0, 1, 4]
    assert scores_of(found.sums)["fss"].n == 13


def test_base_sees_its_own_images_and_labels_are_rows_of_embeddings() -> None:
    larger, table = nn.functional.interpolate(images(), (32, 32)), torch.rand(3, 5)
    found = layer_features(net(0), net(1), images(), LABELS, ["3"], embeddings=table, base_images=larger)["3"]
    assert torch.equal(found.student, output(net(0), "3", images()))
    assert torch.equal(found.base, output(net(1), "3", larger))
    assert found.targets is not None
    assert torch.equal(found.targets, table[LABELS])


def test_noise_is_all_that_the_seed_changes() -> None:
    maps = torch.rand(16, 1, 4, 4)

    def student(noise: float, seed: int) -> Tensor:
        given = net(0), net(1), images(), LABELS, ["3"]
        return layer_features(*given, regions=lambda _: [(maps, maps)], noise=noise, seed=seed)["3"].student

    assert len(student(0.0, 0)) == 16
    assert torch.equal(student(0.0, 0), student(0.0, 1))
    assert not torch.equal(student(0.5, 0), student(0.5, 1))
    assert torch.equal(student(0.5, 1), student(0.5, 1))


def test_mean_of_scores_is_over_the_batches() -> None:
    """In place of the ratio of sums, which weighs batches by what varies in them."""
    halves = [
        layer_features(net(0), net(1), images()[rows] * scale, LABELS[rows], ["3"])["3"].sums
        for rows, scale in ((slice(0, 8), 1), (slice(8, 16), 3))
    ]
    alone, mean = [scores_of(sums) for sums in halves], scores_of(halves[0] + halves[1], mean=True)
    for name in ("fss", "rs_student", "rs_base", "rs_distilled", "rs_residual"):
        assert mean[name].value == pytest.approx((alone[0][name].value + alone[1][name].value) / 2, abs=1e-9)
    assert mean["fss"].value != pytest.approx(scores_of(halves[0] + halves[1])["fss"].value, abs=1e-6)


def test_where_every_map_is_blank_there_is_no_score_but_a_reason() -> None:
    found = layer_features(net(0), net(0), images(), LABELS, ["3"], regions=UniCAMRegions())["3"]
    assert not found.rows.any()
    for score in scores_of(found.sums).values():
        assert score.value != score.value
        assert "0 images are too few" in score.reason


def test_transformers_and_layers_without_a_gradient() -> None:
    vit = TinyViT().float()
    found = layer_features(vit, net(1), images(), LABELS, [("blocks.0", "3")], regions=UniCAMRegions())["blocks.0"]
    assert found.student.shape[1] == 8 * 16
    with pytest.raises(UnsupportedModel, match="gradient"):
        layer_features(vit, net(1), images(), LABELS, [("blocks.1", "3")], regions=GradCAMRegions())


def test_plans_of_several_layers_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = plans._make_plan
    monkeypatch.setattr(plans, "_make_plan", lambda *args: made.append(args[1]) or original(*args))
    model = net(0)
    for _ in range(2):
        for layer in LAYERS:
            e2kd.explain(model, images(), explainer=e2kd.GradCAM(layer))
    assert made == LAYERS
    model.append(nn.Identity())  # another model now
    e2kd.explain(model, images(), explainer=e2kd.GradCAM("3"))
    assert made == [*LAYERS, "3"]


class TestUntrained:
    def test_shares_no_weight_and_no_statistics(self) -> None:
        trained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
        trained(torch.rand(8, 3, 3, 3))
        control = untrained(trained)
        assert not any(torch.equal(a, b) for a, b in zip(trained[0].parameters(), control[0].parameters(), strict=True))
        assert control[1].running_mean.count_nonzero() == 0
        assert not control.training
        assert trained.training

    def test_draws_tokens_and_positions_anew(self) -> None:
        vit = TinyViT()
        control = untrained(vit, seed=3)
        assert not torch.equal(control.token, vit.token)
        assert control.position.std().item() == pytest.approx(vit.position.std().item(), rel=0.3)

    @pytest.mark.parametrize(
        "norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm]
    )
    def test_draws_weights_that_a_norm_keeps_elsewhere(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        trained = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), norm(nn.Linear(4, 2)))
        x = torch.rand(4, 3, 3, 3)
        control = untrained(trained.eval())
        assert not torch.allclose(control[0](x), trained[0](x), atol=0.05)
        assert control(x).isfinite().all()

    def test_is_not_what_the_same_seed_made(self) -> None:
        """A control with the student's own first weights would be alike to it for that reason."""
        assert not any(torch.equal(untrained(net(0), seed=s)[0].weight, net(0)[0].weight) for s in range(3))

    def test_is_seeded_and_leaves_the_random_state(self) -> None:
        model = net(0)
        state = torch.get_rng_state()
        first, again, other = untrained(model), untrained(model), untrained(model, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first[0].weight, again[0].weight)
        assert not torch.equal(first[0].weight, other[0].weight)

    def test_shows_how_alike_networks_are_without_learning(self) -> None:
        """Both see the same images: an FSS far above 0 that no training made."""
        found = layer_features(net(0), untrained(net(0)), images(), None, ["1"])["1"]
        assert scores_of(found.sums)["fss"].value > 3 * scores_of(found.sums)["fss"].chance


def test_a_layer_that_runs_several_times_is_named_or_refused() -> None:
    """Nobody hears the wrong call of an activation that serves every layer."""
    student, base = (SharedActivation(seed=seed).float() for seed in (0, 1))
    with pytest.raises(UnsupportedModel, match="'act', which makes the last map, runs several times"):
        unicam(student, base, images(), LABELS)
    found = unicam(student, base, images(), LABELS, ["conv2"])
    assert found.layers.keys() == {"conv2"}
