"""Do a student's explanations shift with the image as its teacher's do? (e²KD, Fig. 5)

    python -m benchmarks.limited --family vit --arms kd e2kd frozen_e2kd    # measures the curves
    python -m benchmarks.shift_curves                                       # draws them, and prints their table

A CNN's explanations move with the image, a ViT's jump with its patches. Results: benchmarks/results/shift_curves.png.
"""

from __future__ import annotations

import argparse
from typing import Any

import matplotlib
import torch
from torch import Tensor

from benchmarks.cifar_families import FAMILIES
from benchmarks.common import RESULTS, markdown_table
from benchmarks.limited import all_results
from benchmarks.limited_training import ARMS, SHIFTS
from benchmarks.paired import Row

SHOWN = (1, 2, 4, 8)  # pixels, in the table


def curves(found: Row) -> dict[str, Tensor]:
    """One row per student [seeds, shifts], by arm; the teacher's is alone."""
    rows = [row for row in found["rows"] if row["split"] == "test"]
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    taught = {ARMS[arm]: torch.tensor([row["shift"] for row in rows if row["arm"] == arm]) for arm in arms}
    return {"teacher": torch.tensor([found["shift"]]), **taught}


def measured() -> list[Row]:
    """The studies that have curves."""
    return [found for found in all_results() if FAMILIES[found["family"]].shifted]


def title(found: Row) -> str:
    """Who taught whom."""
    family = FAMILIES[found["family"]]
    return f"{family.kind.title} → {family.title}"


def table(results: list[Row]) -> str:
    """Similarity of an explanation to that of the shifted image, at some shifts, as Markdown."""
    body = []
    for found in results:
        for arm, each in curves(found).items():
            cells = [_cell(each[:, SHIFTS.index(pixels)]) for pixels in SHOWN]
            body.append([title(found), arm, *cells])
    return markdown_table(["", "", *(f"shifted by {pixels}" for pixels in SHOWN)], body)


def _cell(values: Tensor) -> str:
    spread = f" ±{values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def draw(results: list[Row]) -> Any:
    """A panel per study: mean over seeds, with the standard deviation as a band."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(4.5 * len(results), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, found in zip(panels[0], results, strict=True):
        for arm, each in curves(found).items():
            mean = each.mean(0)
            (line,) = panel.plot(SHIFTS, mean, marker=".", label=arm, color="black" if arm == "teacher" else None)
            if len(each) > 1:
                panel.fill_between(SHIFTS, mean - each.std(0), mean + each.std(0), color=line.get_color(), alpha=0.15)
        panel.set(title=title(found), xlabel="pixels shifted")
    panels[0, 0].set_ylabel("similarity to the explanation\nof the image that was not shifted")
    panels[0, 0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = measured()
    print(table(results))
    draw(results).savefig(RESULTS / "shift_curves.png", dpi=120)
