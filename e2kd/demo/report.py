"""The numbers of a run: as JSON, as a table, and in a sentence. All are read from the one JSON object."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from e2kd.demo.experiment import Arm, SeedRun, Settings
from e2kd.demo.extras import needs
from e2kd.demo.measure import Scores
from e2kd.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

NAMES = {"teacher": "teacher", "cross_entropy": "cross-entropy", "kd": "KD", "e2kd": "e²KD"}


class Column(NamedTuple):
    """A measure in the table: its field in `Scores`, its title, and whether it is shown in percent."""

    field: str
    title: str
    percent: bool = True


COLUMNS = (
    Column("id_accuracy", "ID\naccuracy"),
    Column("ood_accuracy", "OOD\naccuracy"),
    Column("ood_agreement", "OOD\nagreement"),
    Column("worst_group_accuracy", "worst\ngroup"),
    Column("epg", "EPG\nown class", percent=False),
    Column("epg_teacher_class", "EPG\nteacher's", percent=False),
)


def summarise(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation of the seeds that have a value; None where there are too few.

    >>> summarise([1.0, 3.0])["mean"], summarise([2.0, None])
    (2.0, {'mean': 2.0, 'sd': None})
    """
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return {"mean": mean, "sd": statistics.stdev(known) if len(known) > 1 else None}


def differences(seeds: Sequence[dict[str, Any]], field: str) -> dict[str, Any]:
    """e²KD minus KD of one measure, per seed and over the seeds."""
    pairs = [(seed["scores"]["e2kd"][field], seed["scores"]["kd"][field]) for seed in seeds]
    each = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    return {**summarise(each), "each": each}


def results_of(runs: Sequence[SeedRun], settings: Settings, command: str, seconds: float) -> dict[str, Any]:
    """Everything about a run, of JSON's own types: shares in [0, 1], times in seconds."""
    seeds = [_seed(run) for run in runs]
    return {
        "command": command,
        "settings": asdict(settings) | {"part": settings.part.value},
        "versions": versions(),
        "seconds": seconds,
        "seeds": seeds,
        "summary": {arm.value: summary(seeds, arm) for arm in Arm},
        "e2kd_minus_kd": {column.field: differences(seeds, column.field) for column in COLUMNS},
    }


def _seed(run: SeedRun) -> dict[str, Any]:
    scores = {arm.value: _known(values._asdict()) for arm, values in run.scores.items()}
    return {"seed": run.seed, "scores": scores, "seconds": {arm.value: t for arm, t in run.seconds.items()}}


def _known(scores: dict[str, float]) -> dict[str, float | None]:
    return {field: None if math.isnan(value) else value for field, value in scores.items()}  # JSON has no nan


def summary(seeds: Sequence[dict[str, Any]], arm: Arm) -> dict[str, dict[str, float | None]]:
    """Each measure of an arm over the seeds."""
    return {field: summarise([seed["scores"][arm.value][field] for seed in seeds]) for field in Scores._fields}


def versions() -> dict[str, Any]:
    """What the numbers were computed with."""
    return {
        "e2kd": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def cell(value: dict[str, float | None], percent: bool) -> str:
    """A mean and its standard deviation, in percent or with two decimals.

    >>> cell({"mean": 0.7312, "sd": 0.0249}, percent=True), cell({"mean": 0.314, "sd": None}, percent=False)
    ('73.1 ±2.5', '.31')
    """
    shown = [f"{100 * v:.1f}" if percent else f"{v:.2f}".removeprefix("0") for v in value.values() if v is not None]
    return " ±".join(shown) or "none"


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The table's body: per arm its name and a cell per column."""
    body = [[NAMES[a], *(cell(s[c.field], c.percent) for c in COLUMNS)] for a, s in results["summary"].items()]
    body[0][1 + [column.field for column in COLUMNS].index("ood_agreement")] = ""  # with itself
    return body


def table_of(results: dict[str, Any]) -> Table:
    """The rows under their titles."""
    with needs("rich"):
        from rich import box
        from rich.table import Table
    count = len(results["seeds"])
    spread = f"mean ± standard deviation of {count} seeds" if count > 1 else "one seed"
    table = Table(box=box.SIMPLE_HEAD, title=f"{results['settings']['part']} digits, {spread}", collapse_padding=True)
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column.title, justify="right", no_wrap=True)
    for row in rows(results):
        table.add_row(*row, style="bold" if row[0] == NAMES["e2kd"] else "")
    return table


def difference_line(results: dict[str, Any]) -> str:
    """e²KD minus KD in points, the mean and each seed."""
    parts = []
    for field, name in (("ood_accuracy", "OOD accuracy"), ("ood_agreement", "OOD agreement")):
        found = results["e2kd_minus_kd"][field]
        each = ", ".join(f"{100 * value:+.1f}" for value in found["each"])
        parts.append(f"{name} {100 * found['mean']:+.1f} points ({each})")
    return "e²KD minus KD, same seed: " + "; ".join(parts)


def sentence(results: dict[str, Any]) -> str:
    """What the table says, in words."""
    right, looks = _rounded(results, "ood_accuracy"), _rounded(results, "epg")
    return (
        f"When the background contradicts the digit, e²KD's student is right on {right['e2kd']} of 100 images, "
        f"KD's on {right['kd']}, cross-entropy's on {right['cross_entropy']} (teacher: {right['teacher']}); "
        f"on the digit lie {looks['e2kd']} % of e²KD's explanation, {looks['kd']} % of KD's, "
        f"{looks['cross_entropy']} % of cross-entropy's ({looks['teacher']} % of the teacher's)."
    )


def _rounded(results: dict[str, Any], field: str) -> dict[str, str]:
    means = {arm: measures[field]["mean"] for arm, measures in results["summary"].items()}
    return {arm: "?" if mean is None else f"{100 * mean:.0f}" for arm, mean in means.items()}
