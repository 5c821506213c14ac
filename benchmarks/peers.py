"""All ratios to other people's code in one list, read from the committed results."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.common import RESULTS, markdown_table


class Ratio(NamedTuple):
    """One measured ratio; below 1 we take less."""

    what: str
    ours_to_theirs: float
    command: str
    machine: str


def _found(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _machine(found: dict[str, Any]) -> str:
    machine = found["environment"]
    return machine["gpu"] or f"{machine['cpus']} CPU cores"


def _steps() -> list[Ratio]:
    """An e²KD step to one that explains as CAM libraries do, with a second forward of teacher and student."""
    found = _found("step_cpu")
    what = "e²KD step, {}, to one with the forwards of a CAM library"
    return [
        Ratio(what.format(row["pair"]), row["ratio"]["e2kd"] / row["ratio"]["twice"], found["command"], _machine(found))
        for row in found["rows"]
    ]


def _bcos() -> list[Ratio]:
    """A B-cos ViT's step to that with the attention of the papers' code."""
    found = _found("bcos_cpu")
    return [
        Ratio(
            f"frozen e²KD step, {row['pair']}, to one with the attention of the papers' code",
            row["ratio"]["frozen"] / row["ratio"]["official"],
            row["command"],
            _machine(found),
        )
        for row in found["rows"]
        if "official" in row["ratio"]
    ]


def _transfer() -> list[Ratio]:
    """UniCAM and ROAD."""
    found = _found("transfer")
    theirs = {
        "UniCAM of 4 layers, both directions, to the papers' code": "papers' procedure, 4 of 4 layers, to UniCAM of 4",
        "ROAD imputation of a batch, to grad-cam's": "ROAD: grad-cam's to ours",
    }
    return [Ratio(what, 1 / found["ratios"][name], found["command"], _machine(found)) for what, name in theirs.items()]


def table() -> str:
    """The list as Markdown."""
    parts: tuple[Callable[[], list[Ratio]], ...] = (_steps, _bcos, _transfer)
    ratios = [ratio for part in parts for ratio in part()]
    body = [[r.what, f"{r.ours_to_theirs:.2f}x", r.machine, f"`{r.command}`"] for r in ratios]
    return markdown_table(["time of", "ratio", "on", "command"], body)
