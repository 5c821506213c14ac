"""The numbers of a run as a table, a line and a sentence, all read from the object that `demo.json` holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from e2kd.demo.results import minus
from e2kd.demo.settings import EXPLAINED, PAIRS, Arm

if TYPE_CHECKING:
    from rich.table import Table

NAMES = {
    "teacher": "teacher",
    "cross_entropy": "cross-entropy",
    "kd": "KD",
    "e2kd": "e²KD",
    "frozen_kd": "frozen KD",
    "frozen_e2kd": "frozen e²KD",
}
BOLD = {NAMES[arm.value] for arm in EXPLAINED}


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

NOTE = (
    "ID: the texture equals the label. OOD: it contradicts it. EPG: share of a\n"
    "GradCAM map on the digit, for the net's own top class or for the teacher's.\n"
    "Frozen: the teacher was asked once, before the images were augmented."
)


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
    from rich import box
    from rich.table import Table

    count = len(results["seeds"])
    spread = f"mean ± standard deviation of {count} seeds" if count > 1 else "one seed"
    title = f"{results['settings']['part']} digits, {spread}"
    table = Table(box=box.SIMPLE_HEAD, title=title, padding=(0, 0), show_edge=False)  # fits 80 columns
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column.title, justify="right", no_wrap=True)
    for row in rows(results):
        table.add_row(*row, style="bold" if row[0] in BOLD else "")
    return table


def difference_lines(results: dict[str, Any]) -> list[str]:
    """For live and frozen teachers, e²KD minus KD in points: the mean and each seed."""
    return [_difference_line(results, *pair) for pair in PAIRS]


def _difference_line(results: dict[str, Any], arm: Arm, base: Arm) -> str:
    parts = []
    for field, name in (("ood_accuracy", "OOD accuracy"), ("ood_agreement", "OOD agreement")):
        found = results[minus(arm, base)][field]
        each = ", ".join(f"{100 * value:+.1f}" for value in found["each"])
        parts.append(f"{name} {100 * found['mean']:+.1f} points ({each})")
    return f"{NAMES[arm.value]} minus {NAMES[base.value]}, same seed: {'; '.join(parts)}"


def sentence(results: dict[str, Any]) -> str:
    """What the table says, in words."""
    right, looks = _rounded(results, "ood_accuracy"), _rounded(results, "epg")
    return (
        f"When the background contradicts the digit, e²KD's student is right on {right['e2kd']} of 100 images, "
        f"KD's on {right['kd']}, cross-entropy's on {right['cross_entropy']} (teacher: {right['teacher']}), and with "
        f"a teacher that was frozen e²KD's on {right['frozen_e2kd']}, KD's on {right['frozen_kd']}; "
        f"on the digit lie {looks['e2kd']} % of e²KD's explanation, {looks['kd']} % of KD's, "
        f"{looks['cross_entropy']} % of cross-entropy's ({looks['teacher']} % of the teacher's)."
    )


def _rounded(results: dict[str, Any], field: str) -> dict[str, str]:
    means = {arm: measures[field]["mean"] for arm, measures in results["summary"].items()}
    return {arm: "?" if mean is None else f"{100 * mean:.0f}" for arm, mean in means.items()}
