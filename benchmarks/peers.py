"""All ratios of time in one list, to plain training and to other people's code, read from the committed results.

A benchmark that was run on a GPU as well (`--device cuda`) has a second result, whose rows stand beside the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.common import RESULTS, markdown_table
from benchmarks.every_class import DRAWN

DEVICES = ("cpu", "cuda")


class Ratio(NamedTuple):
    """One measured ratio; below 1 the first takes less."""

    what: str
    to: str
    ratio: float
    command: str
    machine: str


Found = dict[str, Any]
Ratios = Iterator[Ratio]


def _found(*names: str) -> Iterator[Found]:
    """The results that are there."""
    for path in (RESULTS / f"{name}.json" for name in names):
        if path.exists():
            yield json.loads(path.read_text(encoding="utf-8"))


def _on(name: str) -> Iterator[Found]:
    """A benchmark's results on every device it was run on."""
    return _found(*(f"{name}_{device}" for device in DEVICES))


def _machine(found: Found) -> str:
    machine = found["environment"]
    return machine["gpu"] or f"{machine['cpus']} CPU cores"


def _steps() -> Ratios:
    """e²KD steps as they are and compiled: to KD, and to explaining as CAM libraries do, with second forwards."""
    for found in (*_on("step"), *_found(*(f"step_{device}_compiled" for device in DEVICES))):
        for row in found["rows"]:
            how, ratio = ", compiled" if row["compiled"] else "", row["ratio"]
            said = found["command"], _machine(found)
            yield Ratio(f"e²KD step, {row['pair']}{how}", "KD step", ratio["e2kd"], *said)
            theirs = "one with a CAM library's forwards"
            yield Ratio(f"e²KD step, {row['pair']}{how}", theirs, ratio["e2kd"] / ratio["twice"], *said)


def _every_class() -> Ratios:
    """All classes in place of the teacher's, or some that are drawn from them."""
    for found in _on("every_class"):
        for row in found["rows"]:
            for arm, which in (("all", "all"), ("drawn", f"{DRAWN} of")):
                if arm in row["ratio"]:
                    what = f"e²KD step of {which} {row['classes']:,} classes, {row['pair']}"
                    yield Ratio(what, "KD step", row["ratio"][arm], found["command"], _machine(found))


def _frozen() -> Ratios:
    """A step with a frozen teacher, its maps and their making."""
    for found in _found("frozen"):
        said = found["command"], _machine(found)
        rows = {row.get("arm", row["what"]): row for row in found["rows"]}
        step = "frozen e²KD step, ResNet-34 -> ResNet-18"
        yield Ratio(step, "step with labels alone", rows["frozen"]["to_supervised"]["median"], *said)
        yield Ratio(step, "with the teacher live", 1 / rows["resnet34"]["to_frozen"]["median"], *said)
        yield Ratio("augmenting cached maps", "augmenting their images", rows["warp"]["ratio"]["median"], *said)
        yield Ratio("freezing a ResNet-34", "its inference", rows["precompute"]["ratio"]["median"], *said)


def _bcos() -> Ratios:
    """W(x) in a step, live and frozen; a ViT's also to the attention of the papers' code."""
    for found in _on("bcos"):
        for row in found["rows"]:
            ratio, said = row["ratio"], (row["command"], _machine(found))
            for arm, name in (("shared", "e²KD"), ("frozen", "frozen e²KD")):
                yield Ratio(f"{name} step, {row['pair']}", "KD step", ratio[arm], *said)
            if "official" in ratio:
                theirs = "with the attention of the papers' code"
                yield Ratio(f"frozen e²KD step, {row['pair']}", theirs, ratio["frozen"] / ratio["official"], *said)


def _transfer() -> Ratios:
    """UniCAM, ROAD and the monitor."""
    for found in _found("transfer"):
        ratios, said = found["ratios"], (found["command"], _machine(found))
        unicam = "UniCAM of 4 layers, both directions"
        yield Ratio(unicam, "plain forwards of both", ratios["UniCAM, 4 layers, to two plain forwards"], *said)
        papers = ratios["papers' procedure, 4 of 4 layers, to UniCAM of 4"]
        yield Ratio(unicam, "the papers' code", 1 / papers, *said)
        yield Ratio("ROAD imputation of a batch", "grad-cam's", 1 / ratios["ROAD: grad-cam's to ours"], *said)
        share = ratios["monitor's share of training, every 500 steps"]
        yield Ratio("TransferMonitor, every=500", "the training it watches", share / (1 - share), *said)


def _beside() -> Ratios:
    """The same work by other libraries."""
    for found in _on("beside"):
        for row in found["rows"]:
            yield Ratio(row["what"], row["to"], row["ratio"], found["command"], _machine(found))


def ratios() -> list[Ratio]:
    """All of them."""
    parts: tuple[Callable[[], Ratios], ...] = (_steps, _every_class, _frozen, _bcos, _transfer, _beside)
    return [ratio for part in parts for ratio in part()]


def table() -> str:
    """The list as Markdown."""
    body = [[r.what, r.to, f"{r.ratio:.3f}x", r.machine, f"`{r.command}`"] for r in ratios()]
    return markdown_table(["time of", "to that of", "ratio", "on", "command"], body)
