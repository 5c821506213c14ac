"""ROAD: the papers' own images and masks, a direct solver, singular holes, properties, curves as grad-cam's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import cnn
from safetensors.torch import load_file
from torch import Tensor

from e2kd.perturb import impute, keep_least, keep_most, road, road_curves
from e2kd.perturb.grids import Coarse, Pixels, prolong, restrict

HOLES = [
    "rand80", "rand20", "rand50_rect", "blob20", "blob80", "corner", "border_only_known", "one_known", "none_missing",
]  # fmt: skip


@pytest.fixture(scope="module")
def golden(shared: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(shared("golden/unicam/road.safetensors"))


def noise(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def solved(image: Tensor, kept: Tensor) -> Tensor:
    """Every hole of an image [C, H, W] by a dense direct solve, written from ROAD's definition pixel by pixel."""
    h, w = kept.shape
    holes = [(i, j) for i in range(h) for j in range(w) if not kept[i, j]]
    index = {hole: n for n, hole in enumerate(holes)}
    matrix = torch.zeros(len(holes), len(holes), dtype=torch.float64)
    right = torch.zeros(len(holes), len(image), dtype=torch.float64)
    for n, (i, j) in enumerate(holes):
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                other = (i + di, j + dj)
                if (di or dj) and 0 <= other[0] < h and 0 <= other[1] < w:
                    weight = 1 / 12 if di and dj else 1 / 6
                    matrix[n, n] += weight
                    if other in index:
                        matrix[n, index[other]] -= weight
                    else:
                        right[n] += weight * image[:, other[0], other[1]].double()
    filled = image.double().clone()
    for hole, values in zip(holes, torch.linalg.solve(matrix, right), strict=True):
        filled[:, hole[0], hole[1]] = values
    return filled


class TestThePapersImages:
    @pytest.mark.parametrize("case", HOLES)
    @pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-5)])
    def test_imputation(self, golden: dict[str, Tensor], case: str, dtype: torch.dtype, error: float) -> None:
        image, mask = golden[f"{case}/img"][None].to(dtype), golden[f"{case}/mask"][None, None] > 0.5
        found = impute(image, mask, noise=0)
        assert found.dtype == dtype
        torch.testing.assert_close(found[0].float(), golden[f"{case}/imputed"], rtol=0, atol=error)

    @pytest.mark.parametrize("case", HOLES)
    def test_imputation_to_the_digits_of_the_fixture(self, golden: dict[str, Tensor], case: str) -> None:
        image, mask = golden[f"{case}/img"][None].double(), golden[f"{case}/mask"][None, None] > 0.5
        found = impute(image, mask, noise=0, tolerance=1e-9)[0]
        torch.testing.assert_close(found.float(), golden[f"{case}/imputed"], rtol=0, atol=5e-7)

    @pytest.mark.parametrize("percent", [20, 50, 80])
    @pytest.mark.parametrize("cam", ["cam_smooth", "cam_relu_zeros", "cam_blank"])
    def test_masks(self, golden: dict[str, Tensor], cam: str, percent: int) -> None:
        maps = golden[f"{cam}/cam"][None, None]
        assert torch.equal(keep_most(maps, percent)[0, 0].float(), golden[f"{cam}/mask_least_first_p{percent}"])
        theirs, ours = golden[f"{cam}/mask_most_first_p{percent}"] > 0.5, keep_least(maps, percent)[0, 0]
        if cam == "cam_smooth":
            assert torch.equal(ours, theirs)
        else:  # theirs removes the tie at the threshold
            assert (ours | ~theirs).all()
            assert ours.float().mean() >= percent / 100 - 1 / 1024


class TestImputation:
    @pytest.mark.parametrize("size", [(12, 12), (9, 17), (33, 8), (1, 6), (5, 1)])
    @pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
    def test_equals_a_direct_solve(self, size: tuple[int, int], share: float) -> None:
        images = noise(2, 3, *size)
        kept = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1)) < share
        kept[:, :, 0, 0] = True
        found = impute(images, kept, noise=0, tolerance=1e-10)
        for image, mask, mine in zip(images, kept[:, 0], found, strict=True):
            torch.testing.assert_close(mine, solved(image, mask), rtol=0, atol=1e-9)

    def test_the_default_tolerance_is_far_below_the_noise(self) -> None:
        images = noise(3, 3, 96, 96, dtype=torch.float32)
        maps = F.interpolate(noise(3, 1, 5, 5, dtype=torch.float32), (96, 96), mode="bilinear")
        kept = keep_most(maps, 20)
        exact = impute(images.double(), kept, noise=0, tolerance=1e-11)
        assert (impute(images, kept, noise=0) - exact).abs().max() < 1e-4

    @pytest.mark.parametrize("known", [(0, 0), (100, 150)])
    def test_one_known_pixel_fills_the_image(self, known: tuple[int, int]) -> None:
        images = noise(1, 3, 224, 224, dtype=torch.float32)
        kept = torch.zeros(1, 1, 224, 224, dtype=torch.bool)
        kept[0, 0, known[0], known[1]] = True
        expected = images[:, :, known[0], known[1], None, None].expand_as(images)
        torch.testing.assert_close(impute(images, kept, noise=0), expected)

    def test_two_far_pixels_in_a_large_image(self) -> None:
        images = noise(1, 1, 224, 224, dtype=torch.float32)
        kept = torch.zeros(1, 1, 224, 224, dtype=torch.bool)
        kept[0, 0, [3, 220], [7, 200]] = True
        exact = impute(images.double(), kept, noise=0, tolerance=1e-11)
        assert (impute(images, kept, noise=0) - exact).abs().max() < 1e-3

    def test_an_image_that_keeps_nothing_becomes_zero_and_spoils_no_other(self) -> None:
        images = noise(3, 2, 10, 10)
        kept = torch.rand(3, 1, 10, 10, generator=torch.Generator().manual_seed(2)) < 0.5
        kept[1] = False
        found = impute(images, kept, noise=0)
        assert found[1].count_nonzero() == 0
        torch.testing.assert_close(found[[0, 2]], impute(images[[0, 2]], kept[[0, 2]], noise=0))

    def test_what_is_kept_stays_bit_for_bit_and_holes_are_never_read(self) -> None:
        images, kept = noise(2, 3, 20, 20), noise(2, 1, 20, 20, seed=5) > 0
        holes = torch.where(kept, images, torch.nan)
        found = impute(holes, kept)
        assert torch.equal(torch.where(kept, found, 0.0), torch.where(kept, images, 0.0))
        assert found.isfinite().all()

    def test_known_nan_spoils_its_own_image_alone(self) -> None:
        images, kept = noise(2, 3, 16, 16), noise(2, 1, 16, 16, seed=5) > 0
        images[0] = torch.where(kept[0], torch.nan, 0.0)
        found = impute(images, kept)
        assert found[0].isnan().any()
        assert found[1].isfinite().all()

    def test_planes_and_constants_are_reproduced(self) -> None:
        """A weighted mean of all eight neighbours keeps what is linear, inside the image."""
        y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
        plane = (2 * x - y + 3).double()[None, None]
        kept = noise(1, 1, 20, 20, seed=3) > 0.5
        kept[..., [0, -1]] = kept[..., [0, -1], :] = True
        torch.testing.assert_close(impute(plane, kept, noise=0, tolerance=1e-10), plane, rtol=0, atol=1e-8)

    def test_batch_equals_single_images_and_follows_a_flip(self) -> None:
        images, kept = noise(3, 3, 24, 40), noise(3, 1, 24, 40, seed=4) > 0.8
        found = impute(images, kept, noise=0, tolerance=1e-9)
        alone = torch.cat([impute(images[i : i + 1], kept[i : i + 1], noise=0, tolerance=1e-9) for i in range(3)])
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-7)
        flipped = impute(images.flip(-1), kept.flip(-1), noise=0, tolerance=1e-9).flip(-1)
        torch.testing.assert_close(found, flipped, rtol=0, atol=1e-7)

    def test_noise_is_seeded_and_falls_on_imputed_pixels_alone(self) -> None:
        images, kept = noise(2, 3, 64, 64, dtype=torch.float32), noise(2, 1, 64, 64, seed=4) > 0
        state = torch.get_rng_state()
        a, b, other = (impute(images, kept, noise=0.1, seed=s) for s in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(a, b)
        grain = (a - impute(images, kept, noise=0))[(~kept).expand_as(images)]
        assert grain.std().item() == pytest.approx(0.1, rel=0.05)
        assert not torch.equal(a, other)
        assert torch.equal(a[kept.expand_as(a)], images[kept.expand_as(a)])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_and_autocast(self, dtype: torch.dtype) -> None:
        images, kept = noise(1, 3, 32, 32, dtype=torch.float32).to(dtype), noise(1, 1, 32, 32, seed=4) > 0
        with torch.autocast("cpu", torch.bfloat16):
            found = impute(images, kept, noise=0)
        assert found.dtype == dtype
        assert torch.equal(found, impute(images.float(), kept, noise=0).to(dtype))

    def test_shapes_that_do_not_fit_raise(self) -> None:
        with pytest.raises(ValueError, match="bool mask"):
            impute(torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4))
        with pytest.raises(ValueError, match="bool mask"):
            impute(torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 5, dtype=torch.bool))

    def test_a_tolerance_that_is_not_reached_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("e2kd.perturb.multigrid.MOST_STEPS", 2)
        with pytest.raises(RuntimeError, match="did not converge"):
            impute(noise(1, 1, 16, 16), noise(1, 1, 16, 16, seed=1) > 0, tolerance=1e-12)


class TestGrids:
    def test_restriction_is_the_transpose_of_prolongation(self) -> None:
        fine, coarse = noise(1, 1, 9, 17), noise(1, 1, 5, 9)
        torch.testing.assert_close((restrict(fine) * coarse).sum(), (fine * prolong(coarse)).sum())

    def test_coarse_matrices_are_galerkins(self) -> None:
        """P^T A P by its definition: what the fine matrix makes of a prolonged coarse map, restricted."""
        missing = (noise(1, 1, 9, 9, seed=1) > -0.5).double()
        pixels = Pixels(missing, torch.ones_like(missing))
        x = noise(1, 2, 5, 5)
        fine = prolong(x) * missing
        expected = restrict(missing * pixels.diagonal * fine - pixels.spread(fine))
        coarse = Coarse(pixels.stencil())
        torch.testing.assert_close(coarse.entries[:, 1, 1][:, None] * x - coarse.spread(x), expected)

    def test_the_bottom_is_inverted(self) -> None:
        missing = torch.ones(1, 1, 9, 9, dtype=torch.float64)
        missing[..., 4, 4] = 0
        coarse = Coarse(Pixels(missing, torch.ones_like(missing)).stencil())
        x = noise(1, 1, 5, 5)
        right = coarse.entries[:, 1, 1][:, None] * x - coarse.spread(x)
        torch.testing.assert_close(right.flatten(2) @ coarse.inverted(), x.flatten(2), rtol=1e-2, atol=1e-2)


class TestMasks:
    @pytest.mark.parametrize("percent", [0, 10, 33, 50, 100])
    def test_share_kept_is_the_percentage(self, percent: float) -> None:
        maps = torch.rand(3, 1, 50, 50, generator=torch.Generator().manual_seed(0))
        for keep in (keep_most, keep_least):
            share = keep(maps, percent).float().mean((1, 2, 3))
            assert (share - percent / 100).abs().max() <= 1 / 2500 + 1e-6
        assert not (keep_most(maps, 30) & keep_least(maps, 70)).any()

    def test_what_most_keeps_is_more_relevant(self) -> None:
        maps = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0))
        kept = keep_most(maps, 25)
        assert maps[kept].min() > maps[~kept].max()

    def test_ties_are_never_split(self) -> None:
        maps = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)).sub(0.5).relu()
        zeros = maps == 0
        most, least = keep_most(maps, 80), keep_least(maps, 20)
        assert torch.equal(most, ~zeros)
        assert torch.equal(least, zeros)

    def test_all_and_nothing_are_kept_whatever_the_map(self) -> None:
        maps = torch.rand(2, 1, 4, 4).sub(0.5).relu()
        maps[1] = torch.nan
        assert keep_most(maps, 100).all()
        assert not keep_least(maps, 0).any()
        image = torch.rand(2, 3, 4, 4)
        found = road(image, maps, 100)
        assert torch.equal(found.images, image)
        assert found.blank.tolist() == [False, True]

    def test_scale_of_maps_does_not_matter(self) -> None:
        maps = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0))
        assert torch.equal(keep_most(1e-20 * maps, 30), keep_most(maps, 30))

    def test_a_percentage_beyond_raises(self) -> None:
        with pytest.raises(ValueError, match="from 0 to 100"):
            keep_most(torch.rand(1, 1, 4, 4), 101)


class TestRoad:
    def test_keeps_what_the_map_ranks_first_and_last(self) -> None:
        images, maps = noise(2, 3, 32, 32), noise(2, 1, 4, 4).relu()
        most, least = road(images, maps, 30), road(images, maps, 30, least=True)
        large = F.interpolate(maps, (32, 32), mode="bilinear")
        assert torch.equal(most.kept, keep_most(large, 30))
        assert torch.equal(least.kept, keep_least(large, 30))
        assert torch.equal(most.images, impute(images, most.kept))
        torch.testing.assert_close(most.share, most.kept.double().flatten(1).mean(1))

    def test_constant_maps_are_flagged(self) -> None:
        maps = torch.stack([torch.zeros(1, 4, 4), torch.rand(1, 4, 4), torch.ones(1, 4, 4)])
        found = road(noise(3, 3, 8, 8), maps)
        assert found.blank.tolist() == [True, False, True]
        assert found.share.tolist()[0] == found.share.tolist()[2] == 0

    def test_maps_of_several_channels_raise(self) -> None:
        with pytest.raises(ValueError, match="Sum maps of several channels"):
            road(torch.rand(2, 3, 8, 8), torch.rand(2, 6, 8, 8))


class TestCurves:
    def test_equal_grad_cams_up_to_the_solver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        metrics = pytest.importorskip("pytorch_grad_cam.metrics.road")
        targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # theirs has unseeded noise
        model, images = cnn().float().eval(), noise(2, 3, 18, 18, dtype=torch.float32)
        cams = torch.rand(2, 18, 18, generator=torch.Generator().manual_seed(1))
        classes = torch.tensor([1, 3])
        wanted = [targets.ClassifierOutputSoftmaxTarget(int(c)) for c in classes]
        percentages = [20, 50, 80]
        with torch.no_grad():
            theirs = metrics.ROADCombined(percentages)(images, cams.numpy(), wanted, model)
        found = road_curves(model, images, cams[:, None], classes, percentages=percentages, noise=0)
        np.testing.assert_allclose(found.score.numpy(), np.asarray(theirs), atol=1e-5)

    def test_a_map_of_the_evidence_scores_and_its_opposite_does_not(self) -> None:
        """The class is decided by a bright square: a map of it scores, its negative the same below 0."""
        images = torch.zeros(2, 1, 16, 16)
        images[0, 0, 4:8, 4:8] = images[1, 0, 9:13, 2:6] = 5
        model = torch.nn.Sequential(torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten(), torch.nn.Linear(1, 2))
        torch.nn.init.constant_(model[2].bias, 0.0)
        model[2].weight.data = torch.tensor([[1.0], [-1.0]])
        maps = F.avg_pool2d(images, 5, 1, 2) + 0.01 * torch.rand(images.shape)
        good = road_curves(model, images, maps, noise=0)
        bad = road_curves(model, images, -maps, noise=0)
        assert (good.score > 0.05).all()
        torch.testing.assert_close(good.score, -bad.score, rtol=0, atol=0.02)
        assert (good.most >= good.least - 1e-6).all()

    def test_are_of_a_seed_which_counts_where_there_is_noise(self) -> None:
        model, images, maps = cnn().float(), noise(2, 3, 16, 16, dtype=torch.float32), torch.rand(2, 1, 4, 4)

        def most(grain: float, seed: int) -> Tensor:
            return road_curves(model, images, maps, percentages=[50], noise=grain, seed=seed).most

        state = torch.get_rng_state()
        assert torch.equal(most(0.5, 1), most(0.5, 1))
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(most(0.5, 1), most(0.5, 2))
        assert torch.equal(most(0.0, 1), most(0.0, 2))

    def test_leaves_the_model_as_it_was_and_flags_constant_maps(self) -> None:
        model = cnn().float()
        model.train()
        maps = torch.rand(2, 1, 4, 4)
        maps[1] = 0
        found = road_curves(model, noise(2, 3, 16, 16, dtype=torch.float32), maps, percentages=[50])
        assert model.training
        assert all(p.grad is None for p in model.parameters())
        assert found.score.isnan().tolist() == [False, True]
