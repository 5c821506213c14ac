"""FSS and RS as metrics: the papers' numbers, batches and ranks, reasons for NaN."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from e2kd.distance import DistanceSums, dcor_unbiased, semi_partial_dcor
from e2kd.metrics import Agreement, FeatureSimilarityScore, RelevanceScore

COUNTS = {"small": 4, "n5_batches": 6}


class Golden:
    """Features, labels and scores of the papers' code for one case."""

    def __init__(self, data: dict[str, Tensor], case: str) -> None:
        self.data, self.case = data, case
        self.embeddings = data[f"{case}/class_emb"]
        parts = [[data[f"{case}/{name}{i}"] for i in range(COUNTS[case])] for name in ("s", "b", "labels")]
        self.batches = list(zip(*parts, strict=True))
        self.whole = [tuple(torch.cat(part) for part in parts)]

    def __getitem__(self, key: str) -> float:
        return self.data[f"{self.case}/{key}.f64"].item()


@pytest.fixture(params=list(COUNTS))
def golden(request: pytest.FixtureRequest, shared: Callable[[str], Path]) -> Golden:
    return Golden(load_file(shared("golden/unicam/fss_rs.safetensors")), request.param)


class TestThePapersNumbers:
    def test_current_code_pools_all_images_into_one_batch(self, golden: Golden) -> None:
        fss = FeatureSimilarityScore(biased=True)
        scores = {name: RelevanceScore(golden.embeddings) for name in ("student", "base", "distilled", "residual")}
        for student, base, labels in golden.whole:
            fss.update(student, base)
            scores["student"].update(student, labels)
            scores["base"].update(base, labels)
            scores["distilled"].update(student, labels, base)
            scores["residual"].update(base, labels, student)
        assert fss.compute().item() == pytest.approx(golden["FSS_new_pooled_biased_normalized"], abs=1e-8)
        for name, key in (
            ("student", "RS_new_pooled_student"),
            ("base", "RS_new_pooled_base"),
            ("distilled", "PDC_new_pooled_student_given_base"),
            ("residual", "PDC_new_pooled_base_given_student"),
        ):
            assert scores[name].compute().item() == pytest.approx(golden[key], abs=1e-8), key

    def test_released_code_averages_batches(self, golden: Golden) -> None:
        fss, biased = FeatureSimilarityScore(mean=True), FeatureSimilarityScore(biased=True)
        student, base, distilled = (RelevanceScore(golden.embeddings, mean=True) for _ in range(3))
        for s, b, labels in golden.batches:
            fss.update(s, b)
            biased.update(s, b)
            student.update(s, labels)
            base.update(b, labels)
            distilled.update(s, labels, given=b)
        for metric, key in (
            (fss, "FSS_paper_mean_ucentered"),
            (biased, "FSS_paper_mean_biased_normalized"),
            (student, "RS_paper_mean_student"),
            (base, "RS_paper_mean_base"),
            (distilled, "PDC_mean_student_given_base"),
        ):
            assert metric.compute().item() == pytest.approx(golden[key], abs=1e-8), key


def features(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    student = torch.randn(n, 7, generator=generator) + labels[:, None]
    return student, student[:, :5] + torch.randn(n, 5, generator=generator), labels


class TestBatches:
    def test_one_batch_is_the_statistic(self) -> None:
        student, base, labels = features()
        fss, distilled = FeatureSimilarityScore(), RelevanceScore()
        fss.update(student, base)
        distilled.update(student, labels, base)
        one_hot = torch.nn.functional.one_hot(labels)
        assert fss.compute().item() == pytest.approx(dcor_unbiased(student, base).item(), abs=1e-12)
        assert distilled.compute().item() == pytest.approx(
            semi_partial_dcor(student, one_hot.double(), base).item(), abs=1e-10
        )

    def test_many_are_a_ratio_of_sums_in_any_order(self) -> None:
        batches = [features(n, seed=n)[:2] for n in (5, 8, 11)]
        sums = sum((DistanceSums.of(student=s, base=b) for s, b in batches[1:]), DistanceSums.of(
            student=batches[0][0], base=batches[0][1]
        ))  # fmt: skip
        expected = sums.score("student", "base")
        for order in (batches, batches[::-1]):
            fss = FeatureSimilarityScore()
            for batch in order:
                fss.update(*batch)
            assert fss.compute().item() == pytest.approx(expected.value, abs=1e-14)
            assert (fss.score().n, fss.score().batches) == (24, 3)
            assert fss.score().chance == expected.chance

    def test_forward_gives_the_batchs_and_keeps_the_whole(self) -> None:
        first, second = features(8)[:2], features(9, seed=1)[:2]
        fss = FeatureSimilarityScore()
        fss.update(*first)
        assert fss(*second).item() == pytest.approx(dcor_unbiased(*second).item(), abs=1e-12)
        assert fss.score().n == 17

    def test_metrics_of_one_collection_stay_apart(self) -> None:
        """Though their first states are equal: a batch of one class says the same under any embeddings."""
        features, labels = torch.rand(3, 16, 5), torch.arange(3).repeat_interleave(16).view(3, 16)
        labels[1:] = torch.arange(16) % 3
        text = torch.rand(3, 4)
        both = MetricCollection({"onehot": RelevanceScore(), "text": RelevanceScore(text)})
        alone = RelevanceScore(text)
        for x, y in zip(features, labels, strict=True):
            both.update(x, y)
            alone.update(x, y)
        assert both.compute()["text"] == alone.compute() != both.compute()["onehot"]

    def test_batches_that_are_skipped_do_not_count_in_the_biased_score(self) -> None:
        fss = FeatureSimilarityScore(biased=True)
        x, y = torch.rand(16, 5), torch.rand(16, 4)
        fss.update(x, y)
        alone = fss.score()
        for flawed in (0, 2):
            fss.update(torch.rand(flawed, 5), torch.rand(flawed, 4))
        found = fss.score()
        assert found.value == alone.value
        assert math.isnan(found.error)
        assert (found.batches, found.skipped) == (1, 2)

    def test_reset_forgets(self) -> None:
        fss = FeatureSimilarityScore()
        fss.update(*features()[:2])
        fss.reset()
        fss.update(*features(8)[:2])
        assert fss.score().n == 8

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("make", [FeatureSimilarityScore, Agreement])
    def test_what_was_loaded_is_what_is_computed(self, make: Callable[[], Metric], nested: bool) -> None:
        """Also where another score was computed before."""
        saved, loaded = make(), make()
        first, second = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
        saved.update(first, first)
        loaded.update(first, second)
        assert loaded.compute() < saved.compute()
        outer = [nn.ModuleDict({"metric": metric}) if nested else metric for metric in (saved, loaded)]
        for metric in (saved, loaded):
            metric.persistent(True)
        outer[1].load_state_dict(copy.deepcopy(outer[0].state_dict()))
        assert loaded.compute() == saved.compute()

    def test_copies_travel_with_their_batches(self) -> None:
        fss = FeatureSimilarityScore()
        fss.update(*features()[:2])
        assert copy.deepcopy(fss).compute() == fss.compute()

    def test_half_precision_features_are_measured_in_full(self) -> None:
        fss = FeatureSimilarityScore()
        student, base, _ = features()
        fss.update(student.half(), base.half())
        assert fss.compute().item() == pytest.approx(dcor_unbiased(student, base).item(), abs=1e-3)
        assert fss.compute().dtype == torch.float64


class TestBadInput:
    @pytest.mark.parametrize(
        ("student", "reason"),
        [
            (torch.rand(3, 4), "3 images are too few"),
            (torch.ones(8, 4), "student is the same for every image"),
            (torch.full((8, 4), torch.nan), "student has values that are NaN"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_has_no_number_but_a_reason(self, student: Tensor, reason: str) -> None:
        fss = FeatureSimilarityScore()
        fss.update(student, torch.rand(len(student), 4))
        assert fss.compute().isnan()
        assert reason in fss.score().reason

    def test_one_class(self) -> None:
        rs = RelevanceScore()
        rs.update(torch.rand(8, 4), torch.zeros(8, dtype=torch.long))
        assert math.isnan(rs.score().value)
        assert "labels is the same for every image" in rs.score().reason

    @pytest.mark.filterwarnings("ignore:The ``compute`` method")
    def test_no_batch(self) -> None:
        for metric in (FeatureSimilarityScore(), FeatureSimilarityScore(biased=True), RelevanceScore()):
            assert metric.compute().isnan()
            assert metric.score().reason == "no images were given"

    def test_an_empty_batch(self) -> None:
        """The last one of a rank may be."""
        student, base, labels = features()
        for embeddings in (None, torch.rand(16, 3)):
            rs, whole = RelevanceScore(embeddings), RelevanceScore(embeddings)
            for metric, parts in ((whole, [slice(None)]), (rs, [slice(0), slice(None), slice(0)])):
                for part in parts:
                    metric.update(student[part], labels[part], base[part])
            assert rs.compute() == whole.compute()

    def test_given_in_some_updates_only(self) -> None:
        student, base, labels = features()
        rs = RelevanceScore()
        rs.update(student, labels)
        with pytest.raises(ValueError, match="given= in every update or in none"):
            rs.update(student, labels, base)

    def test_shapes_and_labels_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="of the same images"):
            FeatureSimilarityScore().update(torch.rand(8, 4), torch.rand(7, 4))
        with pytest.raises(ValueError, match="Flatten maps"):
            FeatureSimilarityScore().update(torch.rand(8, 4, 2, 2), torch.rand(8, 4))
        with pytest.raises(ValueError, match="embeddings of 2 classes"):
            RelevanceScore(torch.rand(2, 3)).update(torch.rand(8, 4), torch.arange(8) % 3)
