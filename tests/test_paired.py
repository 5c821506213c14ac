"""Paired studies: what is chosen, what is trained again, what the differences are, what is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from benchmarks import cells, limited, localisation, records, right_reasons
from benchmarks.limited import choices
from benchmarks.paired import Case, Study, differences
from benchmarks.paired_tables import gains
from benchmarks.records import Record, joined

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


def row(arm: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    case = Case("test", arm, seed, 4.0, None)._asdict()
    return {**case, "accuracy": accuracy, "agreement": accuracy, "cpu_seconds": 1.0, **more}


def test_an_arm_that_was_tested_with_two_settings_has_no_difference() -> None:
    rows = [{"split": "test", "seed": 0, "accuracy": 0.5} | case for case in (
        {"arm": "kd"}, {"arm": "e2kd", "weight": 1.0}, {"arm": "e2kd", "weight": 5.0},
    )]  # fmt: skip
    with pytest.raises(ValueError, match="e2kd was tested with several settings"):
        differences(rows, "e2kd", "kd", ["accuracy"])


def test_gains_are_empty_where_there_is_nothing_to_compare() -> None:
    rows = [row(arm, seed, worth) for arm, worth in (("kd", 0.5), ("e2kd", 0.7)) for seed in (3, 4)]
    assert gains(rows, "e2kd", "kd", ["accuracy"]) == ["+20.0 (+20.0 to +20.0)"]
    assert gains(rows, "kd", "kd", ["accuracy"]) == gains(rows, "e2kd", "frozen_kd", ["accuracy"]) == [None]


def test_the_page_says_what_every_arm_gains_and_what_rivals_lack() -> None:
    worth = {"kd": 0.5, "e2kd": 0.7, "frozen_kd": 0.4, "frozen_e2kd": 0.5, "catkd": 0.6}
    rows = [row(arm, seed, value) for arm, value in worth.items() for seed in (3, 4)]
    head = {"family": "standard", "unrelated": False, "teacher": {"test": 0.9}, "settings": vars(limited.Settings())}
    said = limited.section({**head, "commands": ["python -m x"], "rows": rows}).splitlines()
    assert "| e²KD | 70.0 ±0.0 | 70.0 ±0.0 | +20.0 (+20.0 to +20.0) | +20.0 (+20.0 to +20.0) | 4 |  |" in said
    assert "| frozen e²KD | 50.0 ±0.0 | 50.0 ±0.0 | +10.0 (+10.0 to +10.0) | +10.0 (+10.0 to +10.0) | 4 |  |" in said
    assert any("mean ± sd of 2 paired seeds" in line for line in said)
    assert "| less CATKD | +10.0 (+10.0 to +10.0) | +10.0 (+10.0 to +10.0) |" in said


@pytest.mark.parametrize("module", [right_reasons, localisation, cells], ids=lambda module: module.__name__)
def test_a_quick_run_leaves_no_teacher_behind(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kept(Exception):
        """Where a teacher would be kept."""

    def kept(path: Path, network: nn.Module, fit: Any) -> nn.Module:
        raise Kept(path)

    for one in (right_reasons, localisation):
        monkeypatch.setattr(one, "trained_once", kept)
        monkeypatch.setattr(one, "from_cifar", lambda blocks, classes: nn.Identity())
    pets = SimpleNamespace(load=lambda part: None, epochs=1, classes=3)
    monkeypatch.setattr(localisation, "TASKS", {"pets": pets})
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--work", str(tmp_path)])
    with pytest.raises(Kept) as found:
        module.main()
    (path,) = found.value.args
    assert not path.is_relative_to(tmp_path)
    assert not path.parent.exists()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path


def test_a_study_that_goes_on_keeps_rows_commands_and_notes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, arm in enumerate(("kd", "e2kd", "e2kd")):
        monkeypatch.setattr(sys, "argv", ["/x/limited.py", "--arms", arm])
        record = Record("study", {"settings": {"epochs": 5}})
        assert len(record.rows) == number
        record.write([*record.rows, row(arm, number, 0.5)])
        if number == 0:
            found = json.loads((folder / "study.json").read_text(encoding="utf-8"))
            (folder / "study.json").write_text(json.dumps(found | {"note": "by hand"}), encoding="utf-8")
    found = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    assert found["commands"] == [f"python -m benchmarks.limited --arms {arm}" for arm in ("kd", "e2kd")]
    assert found["note"] == "by hand"
    assert len(found["rows"]) == 3
    with pytest.raises(SystemExit, match="other settings"):
        Record("study", {"settings": {"epochs": 6}})
    taught = {"settings": {"epochs": 5}, "teacher": {"test": 0.8}}
    Record("taught", taught).write([])
    with pytest.raises(SystemExit, match="rows with another teacher"):
        Record("taught", taught | {"teacher": {"test": 0.9}})
    (folder / "taught.json").unlink()
    assert not Record("study", {"settings": {"epochs": 6}}, fresh=True).rows
    Record(None, {"settings": {}}).write([])
    assert [path.name for path in folder.iterdir()] == ["study.json"]


def test_rows_of_two_machines_are_joined_or_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = [row("kd", 3, 0.5), row("kd", 4, 0.6)], [row("kd", 4, 0.6, cpu_seconds=2.0), row("e2kd", 3, 0.7)]
    mine = {"environment": 1, "commands": ["a"], "settings": {"epochs": 5}, "note": "mine", "rows": first}
    other = {"environment": 2, "commands": ["a", "b"], "settings": {"epochs": 5}, "rows": second}
    found = joined(mine, other)
    assert found == {**mine, "commands": ["a", "b"], "rows": [*first, second[1]]}
    with pytest.raises(ValueError, match="different settings"):
        joined(mine, other | {"settings": {"epochs": 6}})
    with pytest.raises(ValueError, match="different teacher"):
        joined(mine, other | {"teacher": 0.9})
    with pytest.raises(ValueError, match="both files have"):
        joined(mine, other | {"rows": [row("kd", 4, 0.61)]})
    (folder / "study.json").write_text(json.dumps(mine), encoding="utf-8")
    elsewhere = folder / "elsewhere" / "study.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(json.dumps(other), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["records", str(elsewhere)])
    records.main()
    assert json.loads((folder / "study.json").read_text(encoding="utf-8")) == found


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        ((3, 4), (5, 6), None),
        ((3, 4), (4, 5), "+20.0 (1 pair, no interval)"),
        ((3,), (3,), "+20.0 (1 pair, no interval)"),
        ((3, 4, 5), (4, 5, 6), "+20.0 (+20.0 to +20.0, 2 pairs)"),
    ],
)
def test_gains_say_how_many_seeds_are_paired(mine: tuple[int, ...], theirs: tuple[int, ...], said: str | None) -> None:
    rows = [*(row("e2kd", seed, 0.7) for seed in mine), *(row("kd", seed, 0.5) for seed in theirs)]
    assert gains(rows, "e2kd", "kd", ["accuracy"]) == [said]
