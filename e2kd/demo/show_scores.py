"""The figure's right side: out of distribution, every seed a line through its students."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

RIGHT, WRONG, GREY = "#0072B2", "#D55E00", "0.45"  # Okabe and Ito's: told apart with any colour vision
LIVE = {"cross_entropy": "CE", "kd": "KD", "e2kd": "e²KD"}
FROZEN = {"frozen_kd": "frozen\nKD", "frozen_e2kd": "frozen\ne²KD"}
PANELS = {"ood_accuracy": "accuracy, %", "epg": "explanation on the digit, %"}


def draw_scores(figure: SubFigure, results: dict[str, Any]) -> None:
    """One panel of accuracy, one of where the explanation lies."""
    count = len(results["seeds"])
    said = f"{count} seeds, each a line; dots: their means" if count > 1 else "one seed"
    figure.text(0.16, 0.975, "Out of distribution", fontsize=13, weight="bold", va="top")
    figure.text(0.16, 0.93, f"{said}\nDashed: the teacher", fontsize=9, color="0.35", va="top", linespacing=1.4)
    axes = figure.subplots(2, 1)
    figure.subplots_adjust(left=0.16, right=0.95, top=0.795, bottom=0.075, hspace=0.42)
    for axis, (field, title) in zip(axes, PANELS.items(), strict=True):
        draw_lines(axis, results, field)
        axis.set_title(title, fontsize=10, loc="left")


def draw_lines(axis: Axes, results: dict[str, Any], field: str) -> None:
    """One measure of the students in percent, by seed and in the mean, and the teacher's mean."""
    for students in (LIVE, FROZEN):
        names = list(students.values())
        for seed in results["seeds"]:
            each = [percent(seed["scores"][arm][field]) for arm in students]
            axis.plot(names, each, color=RIGHT, alpha=0.45, lw=1, marker=".", ms=4)
        draw_means(axis, names, [percent(results["summary"][arm][field]["mean"]) for arm in students])
    teacher = percent(results["summary"]["teacher"][field]["mean"])
    axis.axhline(teacher, color=GREY, ls=(0, (4, 3)), lw=1)
    axis.set_ylim(0, 1.12 * axis.get_ylim()[1])  # room for the numbers
    axis.margins(x=0.13)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5)


def draw_means(axis: Axes, names: list[str], means: list[float]) -> None:
    """Dots with their numbers."""
    axis.plot(names, means, "o", color=RIGHT, ms=6)
    for name, mean in zip(names, means, strict=True):
        if not math.isnan(mean):
            axis.annotate(f"{mean:.0f}", (name, mean), (-6, 6), textcoords="offset points", ha="right", fontsize=9)


def percent(share: float | None) -> float:
    """A share in percent; nan, which is not drawn, for what could not be measured."""
    return math.nan if share is None else 100 * share
