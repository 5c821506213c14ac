"""Distance statistics: the papers' own numbers, the dcor package, exactness, properties, streaming, bad input."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from e2kd import distance
from e2kd.distance import PAPERS, PAPERS_BIASED, DistanceSums, distance_matrix, inner, residual, u_center

CASES = [
    "n4", "n5", "n8", "n16_duplabels", "n32_relu_offset", "n8_dep", "n8_oneclass", "n8_A_eq_B", "n8_B_const",
    "n8_duprowsA",
]  # fmt: skip
SOUND = [case for case in CASES if case not in ("n8_oneclass", "n8_A_eq_B", "n8_B_const")]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def features(n: int, d: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def direct(x: Tensor) -> Tensor:
    """Distances one row at a time, from the differences: slow and obviously right."""
    x = x.double()
    return torch.stack([(x - row).square().sum(-1).sqrt() for row in x])


@pytest.fixture(scope="module")
def stats(shared: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(shared("golden/unicam/stats.safetensors"))


def golden(stats: dict[str, Tensor], case: str) -> list[Tensor]:
    return [stats[f"{case}/{name}"].double() for name in "ABG"]


class TestThePapersNumbers:
    """With its guards, e2kd's functions are the papers' code: the fixtures' float64 values to 1e-9."""

    @pytest.mark.parametrize("case", CASES)
    def test_centred_matrices_and_inner_products(self, stats: dict[str, Tensor], case: str) -> None:
        p = {name: u_center(distance_matrix(stats[f"{case}/{name}"], eps=PAPERS.distance)) for name in "ABG"}
        for name in "ABG":
            torch.testing.assert_close(p[name], stats[f"{case}/P_{name}.f64"], rtol=1e-9, atol=1e-11)
        for pair in ("AA", "AB", "BB"):
            got = inner(p[pair[0]], p[pair[1]])
            torch.testing.assert_close(got, stats[f"{case}/bracket_{pair}.f64"][0], rtol=1e-8, atol=1e-12)

    @pytest.mark.parametrize("case", CASES)
    def test_residuals(self, stats: dict[str, Tensor], case: str) -> None:
        p, q = (u_center(distance_matrix(stats[f"{case}/{name}"], eps=PAPERS.distance)) for name in "AB")
        torch.testing.assert_close(residual(p, q, guards=PAPERS), stats[f"{case}/A_given_B.f64"], rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(residual(q, p, guards=PAPERS), stats[f"{case}/B_given_A.f64"], rtol=1e-8, atol=1e-11)

    @pytest.mark.parametrize("case", CASES)
    def test_correlations(self, stats: dict[str, Tensor], case: str) -> None:
        a, b, g = golden(stats, case)
        found = {
            "Correlation_AB": distance.dcor_unbiased(a, b, guards=PAPERS),
            "New_DC_AG": distance.dcor_unbiased(a, g, guards=PAPERS),
            "New_DC_BG": distance.dcor_unbiased(b, g, guards=PAPERS),
            "Distance_Correlation_AB": distance.dcor(a, b, normalize=True, guards=PAPERS_BIASED),
            "Distance_Correlation_AG": distance.dcor(a, g, normalize=True, guards=PAPERS_BIASED),
        }
        if case != "n8_A_eq_B":  # whose residual is nothing but rounding
            found["P_DC_AB_G"] = distance.semi_partial_dcor(a, g, b, guards=PAPERS)
            found["P_DC_BA_G"] = distance.semi_partial_dcor(b, g, a, guards=PAPERS)
        for name, value in found.items():
            torch.testing.assert_close(value, stats[f"{case}/{name}.f64"][0], rtol=1e-8, atol=1e-10, msg=f"{name}")

    @pytest.mark.parametrize("case", SOUND)
    def test_without_guards_they_differ_by_the_guards_alone(self, stats: dict[str, Tensor], case: str) -> None:
        a, b, g = golden(stats, case)
        close = {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(distance.dcor_unbiased(a, g), stats[f"{case}/New_DC_AG.f64"][0], **close)
        torch.testing.assert_close(distance.semi_partial_dcor(a, g, b), stats[f"{case}/P_DC_AB_G.f64"][0], **close)

    @pytest.mark.parametrize("case", SOUND)
    def test_the_dcor_package_as_stored(self, stats: dict[str, Tensor], case: str) -> None:
        a, b, g = golden(stats, case)
        found = {
            "distance_correlation_sqr_AB": distance.dcor(a, b),
            "distance_correlation_sqr_normalizedAB": distance.dcor(a, b, normalize=True),
            "u_distance_correlation_sqr_AB": distance.dcor_unbiased(a, b),
            "u_distance_correlation_sqr_AG": distance.dcor_unbiased(a, g),
            "partial_distance_correlation_AG_B": distance.partial_dcor(a, g, b),
            "partial_distance_correlation_BG_A": distance.partial_dcor(b, g, a),
        }
        for name, value in found.items():
            torch.testing.assert_close(value, stats[f"{case}/dcor.{name}"].reshape(()), **EXACT, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 7, 20])
def test_equals_the_dcor_package_on_fresh_data(n: int) -> None:
    """Slow, for dcor compiles while it is imported: half a minute, and not for two workers at once (numba#4807)."""
    import dcor as oracle

    x, z = features(n, 9), features(n, 4, seed=1)
    y = x[:, :3] ** 2 + features(n, 3, seed=2)
    a, b, c = x.numpy(), y.numpy(), z.numpy()
    assert distance.dcor(x, y).item() == pytest.approx(oracle.distance_correlation_sqr(a, b), abs=1e-12)
    assert distance.dcor_unbiased(x, y).item() == pytest.approx(oracle.u_distance_correlation_sqr(a, b), abs=1e-12)
    expected = oracle.partial_distance_correlation(a, b, c)
    assert distance.partial_dcor(x, y, z).item() == pytest.approx(expected, abs=1e-11)


class TestDistances:
    @pytest.mark.parametrize("kind", ["gauss", "offset", "duplicates", "one_pair", "clusters"])
    def test_keep_float64_accuracy_with_many_dimensions(self, kind: str) -> None:
        d = 800_000
        x = features(8, d, dtype=torch.float32)
        x = {
            "gauss": lambda: x,
            "offset": lambda: x.relu() + 30,
            "duplicates": lambda: x[:1] + 1e-3 * x,
            "one_pair": lambda: torch.cat([x[:-1], x[:1] + 1e-4 * x[1:2]]),
            "clusters": lambda: 100 * x[:2].repeat(4, 1) + 1e-4 * x,
        }[kind]()
        found, expected = distance_matrix(x), direct(x)
        assert found.diagonal().count_nonzero() == 0
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)

    def test_memory_is_that_of_a_chunk(self) -> None:
        """The n x n x d tensor of this batch would take 3.3 GB, a float64 copy 0.1 GB; a fresh process shows it."""
        code = (
            "import resource, torch; from e2kd.distance import distance_matrix as f; x = torch.rand(64, 200_000); "
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; f(x[:, :1000]); before = peak(); "
            "f(x); print(peak() - before)"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert int(out) < 60_000  # KiB

    def test_of_equal_rows_are_zero_and_have_no_gradient(self) -> None:
        x = features(5)
        x[3] = x[1]
        x.requires_grad_()
        found = distance_matrix(x)
        assert found[1, 3] == 0
        (gradient,) = torch.autograd.grad(found[1, 3], x)
        assert gradient.count_nonzero() == 0

    def test_symmetric_translation_and_scale(self) -> None:
        x = features(6)
        found = distance_matrix(x)
        assert torch.equal(found, found.mT)
        torch.testing.assert_close(distance_matrix(x + 1e6), found, rtol=1e-8, atol=0)
        torch.testing.assert_close(distance_matrix(1e-30 * x), 1e-30 * found, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
    def test_any_type_becomes_float64(self, dtype: torch.dtype) -> None:
        x = (10 * features(4)).to(dtype)
        assert distance_matrix(x).dtype == torch.float64
        torch.testing.assert_close(distance_matrix(x), direct(x), rtol=1e-12, atol=1e-14)

    def test_autocast_changes_nothing(self) -> None:
        x = features(4, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(distance_matrix(x), distance_matrix(x))
            inside = distance_matrix(x)
        assert torch.equal(inside, distance_matrix(x))

    @pytest.mark.parametrize("shape", [(5,), (3, 4, 0)])
    def test_shapes_without_features_raise(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"Expected features \[..., n, d\]"):
            distance_matrix(torch.zeros(shape))


STATISTICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dcor": lambda x, y, z: distance.dcor(x, y),
    "normalized": lambda x, y, z: distance.dcor(x, y, normalize=True),
    "unbiased": lambda x, y, z: distance.dcor_unbiased(x, y),
    "partial": distance.partial_dcor,
    "semi_partial": distance.semi_partial_dcor,
}


@pytest.mark.parametrize("name", STATISTICS)
class TestEveryStatistic:
    def test_gradient_is_exact_and_differentiable(self, name: str) -> None:
        x, y, z = (features(6, 3, seed=s).requires_grad_() for s in range(3))
        used = (x, y, z) if "partial" in name else (x, y)
        function = lambda *t: STATISTICS[name](*t, *(z,) * (3 - len(t)))  # noqa: E731
        assert torch.autograd.gradcheck(function, used)
        assert torch.autograd.gradgradcheck(function, used)

    def test_leading_dimensions_are_batches(self, name: str) -> None:
        x, y, z = (torch.stack([features(7, 5, seed=3 * s + k) for s in range(4)]).view(2, 2, 7, 5) for k in range(3))
        found = STATISTICS[name](x, y, z)
        assert found.shape == (2, 2)
        for i in range(2):
            for j in range(2):
                torch.testing.assert_close(found[i, j], STATISTICS[name](x[i, j], y[i, j], z[i, j]))

    def test_range_and_order_of_the_images(self, name: str) -> None:
        order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
        for seed in range(20):
            x, y, z = (features(9, 3, seed=3 * seed + k) for k in range(3))
            value = STATISTICS[name](x, y, z)
            assert value.abs() <= 1 + 1e-12
            torch.testing.assert_close(STATISTICS[name](x[order], y[order], z[order]), value)

    def test_symmetric_but_for_the_semi_partial(self, name: str) -> None:
        x, y, z = (features(8, 3, seed=k) for k in range(3))
        same = torch.isclose(STATISTICS[name](x, y, z), STATISTICS[name](y, x, z), rtol=1e-12)
        assert same == (name != "semi_partial")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("offset", [0.0, 10.0, 1e5])
    @pytest.mark.parametrize("scale", [1e-18, 1e-5, 1.0, 1e18])
    def test_of_features_with_themselves_is_one(
        self, name: str, scale: float, offset: float, dtype: torch.dtype
    ) -> None:
        x = (scale * (0.3 * features(8, 50) + offset)).to(dtype)
        if name == "semi_partial":  # which is below 1 by what y shares with z
            return
        torch.testing.assert_close(STATISTICS[name](x, x.clone(), features(8)).item(), 1.0, rtol=0, atol=1e-6)


def test_of_features_with_a_moved_turned_and_scaled_copy_is_one() -> None:
    x = features(10, 5)
    turn, _ = torch.linalg.qr(features(5, 5, seed=1))
    assert distance.dcor_unbiased(x, 1e3 * x @ turn - 7).item() == pytest.approx(1, abs=1e-12)


def test_semi_partial_is_partial_but_for_what_the_other_shares() -> None:
    x, y, z = (features(9, 3, seed=k) for k in range(3))
    factor = (1 - distance.dcor_unbiased(y, z) ** 2).sqrt()
    torch.testing.assert_close(distance.semi_partial_dcor(x, y, z), distance.partial_dcor(x, y, z) * factor)


def test_residual_is_orthogonal_and_centred() -> None:
    p, q = (u_center(distance_matrix(features(9, 3, seed=k))) for k in range(2))
    left = residual(p, q)
    assert abs(inner(left, q)) < 1e-14
    assert left.sum(0).abs().max() < 1e-12
    torch.testing.assert_close(u_center(p), p)  # a projection


@pytest.mark.parametrize("n", [8, 16, 32, 64])
def test_unbiased_for_independent_features(n: int) -> None:
    """Over 12 draws at d = 50,000 the mean stays within 4 standard errors of 0, the spread within its own; the biased
    one says 1."""
    generator = torch.Generator().manual_seed(n)
    draws = 12
    pairs = [[torch.randn(n, 50_000, generator=generator) for _ in range(2)] for _ in range(draws)]
    values = torch.stack([distance.dcor_unbiased(x, y) for x, y in pairs])
    spread = distance.null_spread(n)
    assert abs(values.mean()) < 4 * spread / math.sqrt(draws)
    assert 0.4 * spread < values.std() < 1.9 * spread
    assert distance.dcor(*pairs[0]) > 0.999


def test_spread_by_chance_of_partial_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [[torch.randn(6, 500, dtype=torch.float64, generator=generator) for _ in range(3)] for _ in range(400)]
    x, y, z = (torch.stack(t) for t in zip(*draws, strict=True))
    assert distance.partial_dcor(x, y, z).std().item() == pytest.approx(distance.null_spread(6, partial=True), rel=0.15)
    assert distance.semi_partial_dcor(x, y, z).std().item() == pytest.approx(distance.null_spread(6), rel=0.15)
    assert math.isnan(distance.null_spread())


class TestPermutations:
    def test_spread_is_that_of_fresh_independent_features(self) -> None:
        x, y = features(24, 400), features(24, 400, seed=1)
        null = distance.permutation_null(x, y, generator=torch.Generator().manual_seed(0))
        assert null.std().item() == pytest.approx(distance.null_spread(24), rel=0.3)
        assert abs(null.mean()) < 0.02

    def test_tells_dependence_from_chance(self) -> None:
        x = features(16)
        null = distance.permutation_null(x, x**3, features(16, seed=1), generator=torch.Generator().manual_seed(0))
        assert (null < distance.semi_partial_dcor(x, x**3, features(16, seed=1))).all()

    def test_is_seeded(self) -> None:
        x, y = features(8), features(8, seed=1)
        a, b = (distance.permutation_null(x, y, count=5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(a, b)


def three(n: int = 12, *, seed: int = 0) -> dict[str, Tensor]:
    """A student that is near its base, and labels it knows something of."""
    labels = torch.arange(n) % 3
    base = features(n, 20, seed=seed) + 2 * torch.nn.functional.one_hot(labels, 20)
    return {"student": base + features(n, 20, seed=seed + 50), "labels": features(3, 5, seed=99)[labels], "base": base}


class TestStreaming:
    def test_one_batch_gives_the_plain_functions(self) -> None:
        t = three()
        sums = DistanceSums.of(**t)
        plain = {
            ("student", "base"): distance.dcor_unbiased(t["student"], t["base"]),
            ("student", "labels", "base"): distance.semi_partial_dcor(t["student"], t["labels"], t["base"]),
            ("base", "labels", "student"): distance.semi_partial_dcor(t["base"], t["labels"], t["student"]),
        }
        for names, value in plain.items():
            assert sums.score(*names).value == pytest.approx(value.item(), abs=1e-12)
            assert sums.score(*names, mean=True) == sums.score(*names)
        partial = distance.partial_dcor(t["student"], t["labels"], t["base"]).item()
        assert sums.score("student", "labels", "base", partial=True).value == pytest.approx(partial, abs=1e-12)

    def test_ratio_of_sums_and_the_papers_mean(self) -> None:
        batches = [three(seed=s) for s in range(5)]
        sums = sum((DistanceSums.of(**t) for t in batches[1:]), DistanceSums.of(**batches[0]))
        p, q = ([u_center(distance_matrix(t[name])) for t in batches] for name in ("student", "base"))
        top, xx, yy = (sum(inner(a, b) for a, b in zip(*pair, strict=True)) for pair in ((p, q), (p, p), (q, q)))
        assert sums.score("student", "base").value == pytest.approx((top / (xx * yy).sqrt()).item(), abs=1e-12)
        each = torch.stack([distance.dcor_unbiased(t["student"], t["base"]) for t in batches])
        mean = sums.score("student", "base", mean=True)
        assert mean.value == pytest.approx(each.mean().item(), abs=1e-12)
        assert mean.error == pytest.approx(each.std().item() / math.sqrt(5), abs=1e-12)
        assert (mean.n, mean.batches, mean.skipped) == (60, 5, 0)

    def test_larger_batches_count_more(self) -> None:
        small, large = three(4, seed=5), three(30)
        both = DistanceSums.of(**small) + DistanceSums.of(**large)
        near, far = (DistanceSums.of(**t).score("student", "base").value for t in (large, small))
        assert abs(both.score("student", "base").value - near) < 0.1 * abs(far - near)

    def test_order_of_merging_does_not_matter(self) -> None:
        a, b, c = (DistanceSums.of(**three(n, seed=n)) for n in (5, 8, 11))
        one, other = ((a + b) + c).score("student", "labels"), (c + (b + a)).score("student", "labels")
        assert one.value == pytest.approx(other.value, abs=1e-14)
        assert one.error == pytest.approx(other.error, abs=1e-12)

    def test_paper_time_fixtures(self, shared: Callable[[str], Path]) -> None:
        data = load_file(shared("golden/unicam/fss_rs.safetensors"))
        for case, count in (("small", 4), ("n5_batches", 6)):
            batches = []
            for i in range(count):
                labels = data[f"{case}/class_emb"][data[f"{case}/labels{i}"]]
                batches.append(DistanceSums.of(s=data[f"{case}/s{i}"], gt=labels, b=data[f"{case}/b{i}"]))
            sums = sum(batches[1:], batches[0])
            for names, key in (
                (("s", "b"), "FSS_paper_mean_ucentered"),
                (("s", "gt"), "RS_paper_mean_student"),
                (("b", "gt"), "RS_paper_mean_base"),
                (("s", "gt", "b"), "PDC_mean_student_given_base"),
            ):
                expected = data[f"{case}/{key}.f64"].item()
                assert sums.score(*names, mean=True).value == pytest.approx(expected, abs=1e-8), key

    def test_error_is_the_delete_one_jackknife(self) -> None:
        t = three(40)
        names = ("student", "labels", "base")
        deleted = []
        for i in range(40):
            rest = {k: torch.cat([v[:i], v[i + 1 :]]) for k, v in t.items()}
            deleted.append(DistanceSums.of(**rest).score(*names).value)
        values = torch.tensor(deleted)
        exact = ((values - values.mean()).square().sum() * 39 / 40).sqrt().item()
        assert DistanceSums.of(**t).score(*names).error == pytest.approx(exact, rel=0.05)

    def test_error_is_the_spread_over_fresh_images(self) -> None:
        scores = [DistanceSums.of(**three(32, seed=100 * s)).score("student", "base") for s in range(60)]
        spread = torch.tensor([s.value for s in scores]).std().item()
        assert torch.tensor([s.error for s in scores]).mean().item() == pytest.approx(spread, rel=0.35)

    def test_chance_of_several_batches(self) -> None:
        values = []
        for seed in range(150):
            x, y = (torch.stack([features(6, 200, seed=4000 * k + 10 * seed + b) for b in range(3)]) for k in range(2))
            sums = [DistanceSums.of(x=a, y=b) for a, b in zip(x, y, strict=True)]
            total = sum(sums[1:], sums[0])
            values.append([total.score("x", "y").value, total.score("x", "y", mean=True).value])
        spread = torch.tensor(values).std(0)
        assert spread[0].item() == pytest.approx(distance.null_spread(6, 6, 6), rel=0.2)
        assert spread[1].item() == pytest.approx(distance.null_spread(6, 6, 6, mean=True), rel=0.2)


class TestDegenerateInput:
    """NaN with a reason, never a number."""

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"labels": torch.ones(12, 5)}, "labels is the same for every image"),
            ({"student": torch.full((12, 20), 3.3)}, "student is the same for every image"),
            ({"student": torch.full((12, 20), torch.nan)}, "student has values that are NaN"),
            ({"base": torch.full((12, 20), torch.inf)}, "base has values that are NaN or infinite"),
            ({"labels": torch.eye(12)}, "labels has no distances beyond what single images are apart from all others"),
            ({"labels": torch.eye(2)[torch.arange(12) // 11]}, "or all but one"),
            ({"student": 3 * three()["base"] + 1}, "student differs from base by nothing but scale"),
        ],
    )
    def test_gives_nan_with_a_reason(self, change: dict[str, Tensor], reason: str) -> None:
        t = {**three(), **change}
        score = DistanceSums.of(**t).score("student", "labels", "base")
        assert math.isnan(score.value)
        assert math.isnan(score.error)
        assert reason in score.reason
        assert torch.isnan(distance.semi_partial_dcor(t["student"], t["labels"], t["base"]))

    def test_the_batch_whose_features_are_left_without_anything_is_named_by_them(self) -> None:
        good, bad = three(), three(seed=7)
        sums = DistanceSums.of(**good) + DistanceSums.of(**{**bad, "student": bad["base"]})
        assert sums.score("student", "labels", "base").value == sums.score("student", "labels", "base").value
        reason = sums.score("student", "labels", "base", mean=True).reason
        assert reason == "student differs from base by nothing but scale"

    def test_four_images_have_no_error(self) -> None:
        score = DistanceSums.of(**three(4)).score("student", "base")
        assert math.isfinite(score.value)
        assert math.isnan(score.error)
        assert math.isfinite(
            (DistanceSums.of(**three(4)) + DistanceSums.of(**three(4, seed=1))).score("student", "base").error
        )

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_fewer_than_four_images(self, n: int) -> None:
        t = three(n)
        score = DistanceSums.of(**t).score("student", "base")
        assert f"{n} images are too few" in score.reason
        assert torch.isnan(distance.dcor_unbiased(t["student"], t["base"]))
        assert torch.isnan(distance.partial_dcor(t["student"], t["labels"], t["base"]))

    def test_constant_conditioning_features_take_nothing_away(self) -> None:
        t = {**three(), "base": torch.ones(12, 3)}
        score = DistanceSums.of(**t).score("student", "labels", "base")
        assert score.value == pytest.approx(distance.dcor_unbiased(t["student"], t["labels"]).item(), abs=1e-12)
        assert not score.reason

    def test_batches_of_one_class_and_small_last_batches_are_left_out(self) -> None:
        good, one_class = three(), {**three(seed=7), "labels": torch.ones(12, 5)}
        sums = DistanceSums.of(**good) + DistanceSums.of(**one_class) + DistanceSums.of(**three(3))
        score = sums.score("student", "labels")
        assert score.value == pytest.approx(DistanceSums.of(**good).score("student", "labels").value, abs=1e-12)
        assert (score.n, score.batches, score.skipped) == (12, 1, 2)
        assert sums.score("student", "base").batches == 2

    def test_nan_in_one_batch_is_not_averaged_away(self) -> None:
        broken = {**three(), "student": torch.full((12, 20), torch.nan)}
        sums = DistanceSums.of(**three()) + DistanceSums.of(**broken)
        assert "NaN" in sums.score("student", "base").reason
        assert not sums.score("base", "labels").reason

    def test_gradients_of_undefined_statistics_are_zero(self) -> None:
        x = features(6).requires_grad_()
        (gradient,) = torch.autograd.grad(distance.dcor_unbiased(x, torch.ones(6, 2)), x)
        assert gradient.count_nonzero() == 0

    def test_features_of_different_images_raise(self) -> None:
        with pytest.raises(ValueError, match="same images"):
            distance.dcor_unbiased(features(5), features(6))
        with pytest.raises(ValueError, match="same images"):
            DistanceSums.of(x=features(5), y=features(6))
        with pytest.raises(ValueError, match="Flatten maps"):
            DistanceSums.of(x=torch.rand(4, 2, 2, 2))

    def test_names_that_do_not_match_raise(self) -> None:
        sums = DistanceSums.of(x=features(5), y=features(5, seed=1))
        with pytest.raises(ValueError, match="no features named 'z'"):
            sums.score("x", "z")
        with pytest.raises(ValueError, match="Expected sums of x, y"):
            _ = sums + DistanceSums.of(x=features(5))
