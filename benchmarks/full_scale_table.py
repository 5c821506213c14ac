"""What runs at full scale came to: their results side by side, and paired."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown_table
from benchmarks.limited_training import ARMS as TITLES
from benchmarks.paired import Case, Row, values
from benchmarks.paired_tables import BETWEEN, gains, percent

PAIRS = (("e2kd", "kd"), ("frozen_e2kd", "frozen_kd"))
NOT_MEASURED = (*Case._fields, "processes")


def tested(folder: Path) -> list[Row]:
    """The results on test images below a folder.

    Raises:
        ValueError: when there are none, or several of one arm and seed.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("result.json"))]
    rows = [row for each in found for row in each["rows"] if row["split"] == "test"]
    students = [(row["arm"], row["seed"]) for row in rows]
    twice = sorted({student for student in students if students.count(student) > 1})
    if not rows or twice:
        came = f"several of {twice}: one folder for each table" if rows else "none"
        raise ValueError(f"Expected a result on test images for each arm and seed below {folder}, but found {came}.")
    return rows


def measures_of(rows: Sequence[Row]) -> list[str]:
    """What was measured in all of them.

    >>> measures_of([{"arm": "kd", "accuracy": 0.5, "agreement": None}])
    ['accuracy']
    """
    return [name for name in rows[0] if name not in NOT_MEASURED and all(row.get(name) is not None for row in rows)]


def report(folder: Path) -> str:
    """Markdown tables, arms by measures, mean ± sd in percent, and the paired differences."""
    rows = tested(folder)
    fields, arms = measures_of(rows), list(dict.fromkeys(row["arm"] for row in rows))
    body: list[list[Any]] = [
        [TITLES.get(arm, arm), len(values(rows, arm, fields[0])), *_cells(rows, arm, fields)] for arm in arms
    ]
    compared = [
        [f"{TITLES[arm]} - {TITLES[base]}", *gains(rows, arm, base, fields)]
        for arm, base in PAIRS
        if {arm, base} <= set(arms)
    ]
    tables = [markdown_table(["arm", "seeds", *fields], body)]
    if compared:
        tables += [f"Differences, {BETWEEN}:", markdown_table(["", *fields], compared)]
    return "\n\n".join(tables)


def _cells(rows: list[Row], arm: str, fields: Sequence[str]) -> list[str]:
    return [percent(list(values(rows, arm, field).values())) for field in fields]
