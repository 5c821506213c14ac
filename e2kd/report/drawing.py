"""The figures of a report as PNGs: curves over the layers, and UniCAM maps over the images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from e2kd.distance import Score
from e2kd.pictures import enlarge, overlay
from e2kd.report.measuring import Measured, Pair, Pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's: told apart with any colour vision
GREY = "0.55"
SIDE = (160, 160)  # of a picture, pixels


def similarity_curves(measured: Measured) -> bytes:
    """FSS over the layers of every pair, and of the student with an untrained network."""
    figure, axis = _axes(
        "Feature similarity (FSS)",
        "1: the same geometry, 0: nothing in common; the band is what chance gives, two spreads",
    )
    for place, pair in enumerate(measured.pairs):
        scores = [layer.scores["fss"] for layer in pair.layers]
        _curve(axis, scores, place, f"{pair.roles[0]} - {pair.roles[1]}")
    first = measured.pairs[0]
    _curve(axis, [layer.scores["fss_control"] for layer in first.layers], -1, "student - untrained", dashed=True)
    _finish(axis, first)
    return _png(figure)


def relevance_curves(measured: Measured) -> bytes:
    """RS over the layers of the first pair, whole and beyond each other; none without labels."""
    pair = measured.pairs[0]
    figure, axis = _axes("Relevance to the labels (RS)", "0: none; the band is what chance gives, two spreads")
    for place, (name, said) in enumerate(relevance_names(pair).items()):
        scores = [layer.scores[name] for layer in pair.layers]
        _curve(axis, scores, place, said, dashed="beyond" in said)
    _finish(axis, pair)
    return _png(figure)


def relevance_names(pair: Pair) -> dict[str, str]:
    """What each relevance score of a pair is called.

    >>> list(relevance_names(Pair(("student", "base"), 0.5, 0.5, [], None)).values())[2]
    'student beyond base (distilled)'
    """
    student, base = pair.roles
    return {
        "rs_student": student,
        "rs_base": base,
        "rs_distilled": f"{student} beyond {base} (distilled)",
        "rs_residual": f"{base} beyond {student} (residual)",
    }


def panels(pair: Pair, layer: int, pictures: Pictures, count: int = 8) -> bytes:
    """UniCAM at one layer: images evenly from all, what the first network sees beyond the second, and the reverse."""
    from matplotlib.figure import Figure

    n = len(pictures.images)
    rows = torch.linspace(0, n - 1, min(count, n)).round().long()
    transfer = list(pair.maps.layers.values())[layer]
    images = enlarge(pictures.images[rows], SIDE)
    figure = Figure(figsize=(1.35 * len(rows) + 1.3, 4.5), dpi=110, facecolor="white")
    axes = figure.subplots(3, len(rows), squeeze=False)
    left = 1.25 / (1.35 * len(rows) + 1.3)
    figure.subplots_adjust(left=left, right=0.995, top=0.93, bottom=0.04, wspace=0.05, hspace=0.12)
    for axis, image, row in zip(axes[0], images, rows.tolist(), strict=True):
        _show(axis, image)
        if pictures.labels is not None:
            axis.set_title(_short(pictures.classes[int(pictures.labels[row])]), fontsize=8)
    for line, side in zip(axes[1:], (transfer.distilled, transfer.residual), strict=True):
        shaded = overlay(images, side.maps[rows.to(side.maps.device)], SIDE)
        for axis, picture, blank in zip(line, shaded, side.blank[rows.to(side.blank.device)].tolist(), strict=True):
            _show(axis, picture)
            if blank:
                axis.set_xlabel("blank", fontsize=7, labelpad=1, color=GREY)
    student, base = pair.roles
    for line, said in zip(axes, ("image", f"{student}\nbeyond\n{base}", f"{base}\nbeyond\n{student}"), strict=True):
        line[0].set_ylabel(said, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    return _png(figure)


def _axes(title: str, subtitle: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.6), dpi=130, facecolor="white", layout="constrained")
    axis = figure.add_subplot()
    axis.set_title(f"{title}\n", fontsize=11, loc="left", weight="bold")
    axis.text(0, 1.02, subtitle, transform=axis.transAxes, fontsize=8, color="0.35")
    return figure, axis


def _curve(axis: Axes, scores: Sequence[Score], place: int, said: str, *, dashed: bool = False) -> None:
    """Values with their standard errors, beside those of other places; NaN leaves a gap. Place -1 is grey."""
    colour = GREY if place < 0 else COLOURS[place]
    values, errors = [s.value for s in scores], [s.error for s in scores]
    style: dict[str, Any] = {"ls": "--" if dashed else "-", "marker": "o", "ms": 4, "lw": 1.4, "capsize": 2}
    axis.errorbar(
        [k + 0.05 * place for k in range(len(scores))], values, yerr=errors, color=colour, label=said, **style
    )


def _finish(axis: Axes, pair: Pair) -> None:
    """What chance gives, and the layers' names."""
    chance = pair.layers[0].scores["fss"].chance
    axis.axhspan(-2 * chance, 2 * chance, color="0.9", zorder=0)
    axis.axhline(0, color=GREY, lw=0.8)
    names = [_short(a) if a == b else f"{_short(a)}\n{_short(b)}" for a, b in (layer.layers for layer in pair.layers)]
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7.5, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _show(axis: Axes, picture: torch.Tensor) -> None:
    axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _short(name: str, most: int = 18) -> str:
    """A name that fits, with nothing in it that matplotlib would take for mathematics."""
    cut = name if len(name) <= most else name[: most - 1] + "…"
    return cut.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
