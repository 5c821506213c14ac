"""The figure: where teacher and students look out of distribution; beside it what each seed gained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from e2kd.demo.data import SIZE, Scenes, all_digits
from e2kd.demo.experiment import EXAMPLES, SeedRun
from e2kd.demo.measure import maps_of, predictions
from e2kd.demo.settings import Arm
from e2kd.demo.show_scores import RIGHT, WRONG, draw_scores
from e2kd.pictures import enlarge, overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

FINE = (4 * SIZE, 4 * SIZE)  # size to which images and maps are brought, pixels
ROWS = {Arm.TEACHER: "teacher", Arm.KD: "KD", Arm.E2KD: "e²KD"}
CLASSES = ("0-4", "5-9")
TITLE = "Where each network looks when the background misleads"
SUBTITLE = (
    "In training, students saw 0-4 on stripes and 5-9 on blobs. Here it is the other way round. Colour: GradCAM of\n"
    "the predicted class, named below; dark is zero. First images that the teacher gets right; seed of median gain."
)


def draw(runs: Sequence[SeedRun], results: dict[str, Any], path: Path) -> None:
    """Writes the figure: maps of the typical seed's nets, scores of all seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.2, 6.0), dpi=200, facecolor="white")
    parts = figure.subfigures(1, 2, width_ratios=[9.1, 3.1], squeeze=False)[0]
    draw_maps(parts[0], typical(runs))
    draw_scores(parts[1], results)
    figure.savefig(path)


def typical(runs: Sequence[SeedRun]) -> SeedRun:
    """The run whose e²KD student gains the median over its KD student, out of distribution."""
    gains = [run.scores[Arm.E2KD].ood_accuracy - run.scores[Arm.KD].ood_accuracy for run in runs]
    return runs[gains.index(median_low(gains))]


def draw_maps(figure: SubFigure, run: SeedRun) -> None:
    """Images in columns; in rows the image itself, and the map of each net."""
    scenes, axes = run.examples, panels(figure)
    draw_images(axes[0], scenes)
    for row, arm in zip(axes[1:], ROWS, strict=True):
        draw_row(row, run.nets[arm], scenes)
    for row, name in zip(axes, ("image", *ROWS.values()), strict=True):
        row[0].set_ylabel(name, fontsize=11, rotation=0, ha="right", va="center", labelpad=8)
    figure.text(0.1, 0.975, TITLE, fontsize=13, weight="bold", va="top")
    figure.text(0.1, 0.93, SUBTITLE, fontsize=9, color="0.35", va="top", linespacing=1.4)
    for first, title in ((0, "0-4 on blobs"), (EXAMPLES, "5-9 on stripes")):
        ends = axes[0][first].get_position(), axes[0][first + EXAMPLES - 1].get_position()
        figure.text((ends[0].x0 + ends[1].x1) / 2, ends[0].y1 + 0.012, title, fontsize=10, ha="center")


def panels(figure: SubFigure) -> list[list[Axes]]:
    """A row of axes for the images and for each net, with a gap between the classes."""
    widths = [1.0] * EXAMPLES + [0.12] + [1.0] * EXAMPLES
    room = {"left": 0.1, "right": 0.985, "top": 0.815, "bottom": 0.055, "wspace": 0.07, "hspace": 0.25}
    grid = figure.add_gridspec(1 + len(ROWS), len(widths), width_ratios=widths, **room)
    columns = [k for k in range(len(widths)) if k != EXAMPLES]
    return [[figure.add_subplot(grid[row, column]) for column in columns] for row in range(1 + len(ROWS))]


def draw_images(row: list[Axes], scenes: Scenes) -> None:
    """The images, with their digits named."""
    for axis, image, mask, place in zip(row, enlarge(scenes.images, FINE), scenes.masks, scenes.places, strict=True):
        show(axis, image.permute(1, 2, 0), mask)
        axis.set_xlabel(f"digit {int(all_digits().classes[place])}", fontsize=9, labelpad=3, color="0.15")


def draw_row(row: list[Axes], net: nn.Module, scenes: Scenes) -> None:
    """A net's maps, each of the class that it predicts, which stands below with a tick or a cross."""
    classes = predictions(net, scenes.images)
    shaded = overlay(scenes.images, maps_of(net, scenes.images, classes), FINE)
    for axis, image, mask, found, label in zip(row, shaded, scenes.masks, classes, scenes.labels, strict=True):
        show(axis, image.permute(1, 2, 0), mask)
        good = bool(found == label)
        text = f"{CLASSES[int(found)]} {'✓' if good else '✗'}"
        axis.set_xlabel(text, fontsize=9, labelpad=3, color=RIGHT if good else WRONG)


def show(axis: Axes, image: Tensor, mask: Tensor) -> None:
    """An image [*FINE, 3] with the outline of the digit's mask [SIZE, SIZE]."""
    axis.imshow(image.numpy(), interpolation="nearest")
    outline = enlarge(mask[None, None].float(), FINE)[0, 0]
    axis.contour(outline.numpy(), levels=[0.5], colors="white", linewidths=0.9)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
