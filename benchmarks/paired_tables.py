"""Paired studies in Markdown: means, differences of equal seeds, and the commands that made them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.paired import Row, differences, tested, tests_of, values
from e2kd.demo.results import summarise

BETWEEN = "in points, same seeds, with 95 % confidence"


def percent(shares: Sequence[float]) -> str:
    """Mean ± sd in percent.

    >>> percent([0.5, 0.6])
    '55.0 ±7.1'
    """
    found = summarise([100 * share for share in shares])
    return f"{found['mean']:.1f}" + ("" if found["sd"] is None else f" ±{found['sd']:.1f}")


def plain(value: float | None) -> str | None:
    """A setting, without zeros that say nothing.

    >>> plain(4.0), plain(None)
    ('4', None)
    """
    return None if value is None else f"{value:g}"


def means(rows: list[Row], arm: str, fields: Iterable[str]) -> list[str]:
    """An arm's mean ± sd on the test images, a cell for each measure."""
    return [percent(list(values(rows, arm, field).values())) for field in fields]


def seeds(rows: Iterable[Row], what: str = "paired seed") -> str:
    """How many the students have that were measured on the test images.

    >>> seeds([{"split": "test", "seed": 3}, {"split": "test", "seed": 4}, {"split": "validation", "seed": 100}])
    '2 paired seeds'
    """
    count = len({row["seed"] for row in rows if row["split"] == "test"})
    return f"{count} {what}" + "s" * (count != 1)


def chosen(rows: list[Row], arm: str) -> list[str | None]:
    """The τ and λ that an arm was tested with."""
    row = tests_of(rows, arm)[0]
    return [plain(row["temperature"]), plain(row["weight"])]


def gains(rows: list[Row], arm: str, base: str | None, fields: Sequence[str]) -> list[str | None]:
    """An arm less another in points, a cell for each measure; empty where they have no seed in common."""
    arms = tested(rows)
    if base is None or arm == base or not {arm, base} <= arms:
        return [None] * len(fields)
    most = max(len(tests_of(rows, name)) for name in (arm, base))
    return [in_points(found, most) for found in differences(rows, arm, base, fields).values()]


def in_points(found: Row, most: int) -> str | None:
    """One paired difference, with the number of pairs where it is less than the most there may be, or one alone.

    >>> in_points({"mean": 0.02, "sd": 0.01, "interval": [0.01, 0.03], "each": [0.01, 0.03]}, most=2)
    '+2.0 (+1.0 to +3.0)'
    >>> in_points({"mean": 0.02, "sd": None, "interval": None, "each": [0.02]}, most=2)
    '+2.0 (1 pair, no interval)'
    """
    pairs = len(found["each"])
    if not pairs:
        return None
    points = f"{100 * found['mean']:+.1f}"
    if found["interval"] is None:
        return f"{points} (1 pair, no interval)"
    low, high = found["interval"]
    fewer = "" if pairs == most else f", {pairs} pairs"
    return f"{points} ({100 * low:+.1f} to {100 * high:+.1f}{fewer})"


def made_by(commands: Iterable[str]) -> str:
    """Commands as a block that a page shows when asked to, each of them once."""
    lines = "\n".join(dict.fromkeys(commands))
    return f"<details><summary>Commands</summary>\n\n```sh\n{lines}\n```\n\n</details>"
