"""Paired studies: what is chosen, what is trained again, what the differences are."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.limited import choices
from benchmarks.paired import Case, Study, differences

WORTH = {1.0: 0.5, 5.0: 0.7, 10.0: 0.6}  # of each weight


def measured(case: Case) -> dict[str, Any]:
    return {"accuracy": WORTH[case.weight or 1.0] + 0.001 * case.seed}


@pytest.fixture
def study() -> Study:
    return Study(measured, [], lambda rows: None, jobs=1)


def test_the_best_weight_on_validation_images_is_chosen(study: Study) -> None:
    best = study.best(choices("e2kd", [1.0], list(WORTH)), [100, 101])
    assert (best.temperature, best.weight) == (1.0, 5.0)
    assert {(row["split"], row["seed"]) for row in study.rows} == {("validation", 100), ("validation", 101)}


def test_one_choice_needs_no_training_and_done_students_no_second_one(study: Study) -> None:
    only = study.best(choices("kd", [4.0], [1.0, 5.0]), [100])
    assert only.weight is None
    assert not study.rows
    study.fill([only, only._replace(seed=1)])
    study.measured = lambda case: pytest.fail("trained twice")
    study.fill([only._replace(seed=1), only])
    assert len(study.rows) == 2


def test_a_student_that_dies_is_an_error_and_leaves_no_row(study: Study) -> None:
    study.measured = lambda case: 1 / 0  # type: ignore[assignment, return-value]
    with pytest.raises(EOFError):
        study.fill(choices("kd", [1.0], []))
    assert not study.rows


def test_differences_are_those_of_equal_seeds(study: Study) -> None:
    study.fill([Case("test", arm, seed, 1.0, weight) for arm, weight in (("a", 5.0), ("b", 1.0)) for seed in (3, 4)])
    study.fill([Case("test", "a", 5, 1.0, 5.0)])  # has no partner
    found = differences(study.rows, "a", "b", ["accuracy"])["accuracy"]
    assert found["each"] == pytest.approx([0.2, 0.2])
