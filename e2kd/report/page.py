"""The report as one HTML file: everything in it, everything escaped."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from e2kd.distance import Score
from e2kd.report import drawing, wording
from e2kd.report.measuring import LayerScores, Measured, Pair
from e2kd.version import __version__

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block; overflow-x: auto; }
th, td { padding: .25em .7em; text-align: left; border-bottom: 1px solid #eee; vertical-align: top; }
th { border-bottom: 2px solid #bbb; } .n { text-align: right; } td.n { white-space: nowrap; } .who { color: #555; }
td:last-child { min-width: 14em; }
img { max-width: 100%; } figure { margin: 1em 0; } figcaption { color: #555; font-size: 13px; }
.row { display: flex; flex-wrap: wrap; gap: 1em; } .row figure { flex: 1 1 440px; } code { font-size: 12px; }
"""
UNDEFINED = "undefined"
SCORES = ("fss", "fss_control", "rs_student", "rs_base", "rs_distilled", "rs_residual")  # columns, in their order


def write(measured: Measured, folder: Path, command: str = "") -> Path:
    """Writes `report.html`, its figures as PNGs and its numbers as `report.json` into a folder; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = _figures(measured)
    for name, data in figures.items():
        (folder / name).write_bytes(data)
    (folder / "report.json").write_text(json.dumps(numbers(measured), indent=1, ensure_ascii=False) + "\n", "utf-8")
    page = folder / "report.html"
    page.write_text(render(measured, figures, command), encoding="utf-8")
    return page


def _figures(measured: Measured) -> dict[str, bytes]:
    found = {"fss.png": drawing.similarity_curves(measured)}
    if measured.pictures.labels is not None:
        found["rs.png"] = drawing.relevance_curves(measured)
    first = measured.pairs[0]
    for index in range(len(first.layers)):
        found[f"unicam-{index + 1}.png"] = drawing.panels(first, index, measured.pictures)
    return found


def render(measured: Measured, figures: dict[str, bytes], command: str = "") -> str:
    """The page's text."""
    first = measured.pairs[0]
    who = ", ".join(f"{subject.role} {subject.name}" for subject in measured.subjects)
    parts = [
        f'<h1>What was transferred</h1><p class="who">{escape(who)}</p>',
        _list(wording.findings(measured)),
        "<h2>The networks</h2>",
        _answers(measured),
        "<h2>Layer by layer</h2>",
        '<div class="row">',
        *(_figure(figures[name], name) for name in ("fss.png", "rs.png") if name in figures),
        "</div>",
        *(_table(pair, measured) for pair in measured.pairs),
        "<h2>Where each sees what the other does not (UniCAM)</h2>",
        *(
            f"<h3>{escape(_name(layer))}</h3>" + _figure(figures[name], name)
            for layer, name in zip(first.layers, [name for name in figures if name.startswith("unicam")], strict=True)
        ),
        "<h2>What these numbers can't say</h2>",
        _list(wording.limits(measured)),
        f"<p><code>{escape(command)}</code><br>e2kd {escape(__version__)}</p>",
    ]
    head = f'<meta charset="utf-8"><title>What was transferred: {escape(who)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _answers(measured: Measured) -> str:
    """The networks; columns that no network has a value for, as those of masks without masks, are left out."""
    columns = {
        "accuracy": "accuracy",
        "epg": "energy on the object (EPG)",
        "iou": "IoU",
        "zero_maps": "maps without evidence",
    }
    found = {subject.role: vars(measured.answers[subject.role]) for subject in measured.subjects}
    shown = [name for name in columns if any(not math.isnan(values[name]) for values in found.values())]
    rows = [
        [s.role, s.name, *(_share(found[s.role][name]) for name in shown), ", ".join(s.layers)]
        for s in measured.subjects
    ]
    return _html_table(["", "network", *(columns[name] for name in shown), "layers"], rows)


def _table(pair: Pair, measured: Measured) -> str:
    """Scores of whole images and, if there are any, of the pixels that the maps keep."""
    first, second = pair.roles
    heading = f"<h3>{escape(first)} and {escape(second)}</h3>"
    columns = ["FSS", "FSS, untrained", f"RS {first}", f"RS {second}", "RS distilled", "RS residual"]
    header = ["layer", "pixels", *columns, "n", "by chance", "to keep in mind"]
    rows = []
    for layer in pair.layers:
        rows.append(_scores(_name(layer), "all", layer.scores, wording.flags(layer)))
        if layer.regions:
            reasons = "; ".join(dict.fromkeys(s.reason for s in layer.regions.values() if s.reason))
            rows.append(_scores("", f"{measured.keep:g} % by own map", layer.regions, reasons))
    note = f"Distilled: the {first} beyond the {second}; residual: the {second} beyond the {first}."
    if any(layer.regions for layer in pair.layers):
        note += " By own map: each network is shown the pixels that its own maps keep, so the two see different images."
    return heading + _html_table(header, rows) + f"<figcaption>{escape(note)}</figcaption>"


def _name(layer: LayerScores) -> str:
    """Both networks' names of a layer, one if they are equal."""
    return " / ".join(dict.fromkeys(layer.layers))


def _scores(layer: str, pixels: str, scores: dict[str, Score], said: str) -> list[str]:
    fss = scores["fss"]
    values = [_score(scores[name]) if name in scores else "" for name in SCORES]
    return [layer, pixels, *values, str(fss.n), _number(fss.chance, 3), said]


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers are aligned to the right."""
    numeric = [all(_is_number(cell) for cell in column) for column in zip(*rows, strict=True)]

    def line(tag: str, cells: Sequence[str]) -> str:
        styled = zip(cells, numeric, strict=True)
        return "".join(f"<{tag}{' class=n' if number else ''}>{escape(cell)}</{tag}>" for cell, number in styled)

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    return f"<table><thead><tr>{line('th', header)}</tr></thead>\n<tbody>{body}</tbody></table>"


def _is_number(text: str) -> bool:
    return text[:1] in "-0123456789" or text == UNDEFINED


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _figure(data: bytes, name: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return f'<figure><img src="{source}" alt="{escape(name, quote=True)}"></figure>'


def _score(score: Score) -> str:
    return UNDEFINED if score.reason else f"{score.value:.2f} ± {score.error:.2f}"


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f} %"


def numbers(measured: Measured) -> dict[str, Any]:
    """Everything in the tables as plain values; None is what could not be measured."""

    def plain(score: Score) -> dict[str, Any]:
        return {name: _finite(value) for name, value in vars(score).items()}

    return {
        "n": measured.n,
        "networks": [
            {"role": s.role, "name": s.name, "layers": s.layers}
            | {name: _finite(value) for name, value in vars(measured.answers[s.role]).items()}
            for s in measured.subjects
        ],
        "pairs": [
            {
                "roles": list(pair.roles),
                "agreement": _finite(pair.agreement),
                "cosine": _finite(pair.cosine),
                "layers": [
                    {
                        "layers": list(layer.layers),
                        "scores": {name: plain(score) for name, score in layer.scores.items()},
                        "regions": {name: plain(score) for name, score in layer.regions.items()},
                        "blank": list(layer.blank),
                        "steady": [_finite(value) for value in layer.steady],
                    }
                    for layer in pair.layers
                ],
            }
            for pair in measured.pairs
        ],
        "notes": measured.notes,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
