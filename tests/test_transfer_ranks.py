"""All metrics and the monitor on two processes."""

from __future__ import annotations

from typing import Any

import pytest
from distributed_worker import run_group
from faithfulness_cases import BATCHES, METRICS, faithfulness_batch, faithfulness_metric
from transfer_cases import transfer_batches

from e2kd.metrics import FeatureSimilarityScore, RelevanceScore


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_group("transfer", tmp_path_factory.mktemp("transfer"))


@pytest.mark.parametrize(("case", "batches"), [("metrics-uneven", 3), ("metrics-idle", 2)])
def test_ranks_agree_on_the_score_of_all_batches(case: str, batches: int, ranks: list[dict[str, Any]]) -> None:
    """Also where one has more batches, of other sizes, and where one has none."""
    fss, rs = FeatureSimilarityScore(), RelevanceScore()
    for student, base, labels in transfer_batches()[:batches]:
        fss.update(student, base)
        rs.update(student, labels, base)
    for rank in ranks:
        assert "refusal" not in rank[case], rank[case]
        assert rank[case]["fss"].item() == pytest.approx(fss.compute().item(), abs=1e-12)
        assert rank[case]["rs"].item() == pytest.approx(rs.compute().item(), abs=1e-12)
        assert rank[case]["n"] == fss.score().n
        assert rank[case]["error"] == pytest.approx(rs.score().error, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(("case", "batches"), [("faithfulness-uneven", 3), ("faithfulness-idle", 2)])
def test_ranks_agree_on_the_mean_of_all_samples(
    case: str, batches: int, name: str, ranks: list[dict[str, Any]]
) -> None:
    metric = faithfulness_metric(name)
    for n in BATCHES[:batches]:
        metric.update(*faithfulness_batch(name, n))
    for rank in ranks:
        assert "refusal" not in rank[case], rank[case]
        assert rank[case][name]["value"].item() == pytest.approx(metric.compute().item(), abs=1e-12)
        assert rank[case][name]["n"] == metric.score().n
        assert rank[case][name]["left_out"] == metric.score().left_out


@pytest.mark.parametrize("case", ["monitor-ddp", "monitor-sharded"])
def test_the_first_rank_watches_and_training_stays_the_same(case: str, ranks: list[dict[str, Any]]) -> None:
    """It logs what one process would; of a sharded student all ranks run the forwards, and none keeps it gathered."""
    for rank in ranks:
        assert "refusal" not in rank[case], rank[case]
        assert rank[case]["apart"] == 0
    assert ranks[0][case]["steps"] == [0, 2]
    assert ranks[1][case]["steps"] == []
    assert ranks[0][case]["fss"] == pytest.approx(ranks[0][case]["fss_alone"], abs=1e-9)
