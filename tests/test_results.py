"""Committed results: complete, and the README says what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tables

FOLDER = Path(__file__).parent.parent / "benchmarks" / "results"
RESULTS = sorted(path for path in FOLDER.glob("*.json") if path.stem != "demo_tuning")  # a record, not a result


def test_there_are_results() -> None:
    assert {path.stem for path in RESULTS} >= {"demo", "step_cpu", "families"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_comes_from(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    versions = found.get("environment") or found["versions"]
    assert {"torch", "python", "platform", "threads"} <= versions.keys()
    assert found.get("rows") or found.get("seeds")


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    """Run `python -m benchmarks.tables` after a benchmark."""
    text = tables.README.read_text(encoding="utf-8")
    assert tables.filled(text) == text


def test_no_family_is_silently_dead() -> None:
    """Everything the sweep ran is alive and right, or refused with a sentence; at least 95 % work as they come."""
    rows = [row for row in tables.results("families")["rows"] if row["section"] == "timm"]
    classifiers = [row for row in rows if row["verdict"] != "no classifier"]
    assert {row["verdict"] for row in classifiers} <= {"works", "refused"}
    assert all(row["sentence"] for row in classifiers if row["verdict"] == "refused")
    assert sum(row["verdict"] == "works" for row in classifiers) >= 0.95 * len(classifiers)
