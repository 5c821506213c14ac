"""What runs at full scale came to: their results side by side, and paired."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import markdown_table
from benchmarks.full_scale_checkpoints import RESULT
from benchmarks.full_scale_run import CHOSEN
from benchmarks.limited_training import ARMS as TITLES
from benchmarks.limited_training import FROZEN
from benchmarks.paired import Case, Row
from benchmarks.paired_tables import BETWEEN, gains, percent, plain
from e2kd.frozen.settings import differences

PAIRS = {arm: "frozen_kd" if arm in FROZEN else "kd" for arm in TITLES if arm not in ("kd", "frozen_kd")}
NOT_MEASURED = (*Case._fields, "processes")
OF_A_STUDENT = ("arm", "seed", "split", "cache")  # what may differ between the students of a table
CHOICE = "On validation images, to choose τ and λ by:"


class Student(NamedTuple):
    """A result, the folder it was found in, and what the student is made of."""

    folder: Path
    row: Row
    made_of: Row


def students(folder: Path) -> list[Student]:
    """All results below a folder.

    Raises:
        ValueError: when there are none, or they are of different settings.
    """
    found = [
        Student(path.parent, row, each["settings"] | {"teacher_weights": each["teacher"]})
        for path in sorted(folder.rglob(RESULT))
        for each in [json.loads(path.read_text(encoding="utf-8"))]
        for row in each["rows"]
    ]
    if not found:
        raise ValueError(f"Expected results below {folder}, but found none.")
    _check_same(found, (*OF_A_STUDENT, *CHOSEN))
    return found


def _check_same(some: Sequence[Student], without: Sequence[str]) -> None:
    """Raise a ValueError that names the settings that differ between students of one table or arm."""
    kept = [{name: value for name, value in one.made_of.items() if name not in without} for one in some]
    for student, settings in zip(some, kept, strict=True):
        apart = differences(kept[0], settings)
        if apart:
            raise ValueError(
                f"{some[0].folder} (there) and {student.folder} (here) do not belong together: {'; '.join(apart)}. "
                "Each table needs a folder of its own."
            )


def _check_once(some: Sequence[Student]) -> None:
    keys = [tuple(one.row[name] for name in Case._fields) for one in some]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"Expected one result of each student, but found several of {Case(*twice)}.")


def measures_of(rows: Sequence[Row]) -> list[str]:
    """What was measured in all of them.

    >>> measures_of([{"arm": "kd", "accuracy": 0.5, "agreement": None}])
    ['accuracy']
    """
    return [name for name in rows[0] if name not in NOT_MEASURED and all(row.get(name) is not None for row in rows)]


def report(folder: Path) -> str:
    """Markdown tables, arms by measures, mean ± sd in percent, and the paired differences; and what τ and λ are worth.

    Raises:
        ValueError: when there are no results, several of one student, or of different settings; says which.
    """
    found = students(folder)
    parts = {split: [one for one in found if one.row["split"] == split] for split in ("test", "validation")}
    tables = _tested(parts["test"]) if parts["test"] else []
    if parts["validation"]:
        tables += [CHOICE, _side_by_side(parts["validation"], Case._fields[3:])]
    return "\n\n".join(tables)


def _tested(some: list[Student]) -> list[str]:
    rows = [one.row for one in some]
    fields, arms = measures_of(rows), {row["arm"] for row in rows}
    tables = [_side_by_side(some, ())]
    compared = [
        [f"{TITLES[arm]} - {TITLES[base]}", *gains(rows, arm, base, fields)]
        for arm, base in PAIRS.items()
        if {arm, base} <= arms
    ]
    if compared:
        tables += [f"Differences, {BETWEEN}:", markdown_table(["", *fields], compared)]
    return tables


def _side_by_side(some: list[Student], by: Sequence[str]) -> str:
    """A line for each arm and what it is set to; arms are set to one thing each unless told apart `by` it."""
    _check_once(some)
    fields = measures_of([one.row for one in some])
    keys = dict.fromkeys(_key(one, by) for one in some)
    groups = [[one for one in some if _key(one, by) == key] for key in keys]
    for group in groups:
        _check_same(group, OF_A_STUDENT)
    return markdown_table(["arm", "τ", "λ", "seeds", *fields], [_line(group, fields) for group in groups])


def _key(one: Student, by: Iterable[str]) -> tuple[Any, ...]:
    return tuple(one.row[name] for name in ("arm", *by))


def _line(group: Sequence[Student], fields: Sequence[str]) -> list[Any]:
    row = group[0].row
    shares = [percent([one.row[field] for one in group]) for field in fields]
    return [TITLES.get(row["arm"], row["arm"]), plain(row["temperature"]), plain(row["weight"]), len(group), *shares]
