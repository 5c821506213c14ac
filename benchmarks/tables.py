"""Writes the tables of both READMEs from the JSON in benchmarks/results: python -m benchmarks.tables

Each table stands between `<!-- name -->` and `<!-- /name -->`. A test checks that pages and JSON agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks import (
    bcos,
    cells,
    every_class,
    families,
    frozen,
    hosts,
    limited,
    localisation,
    paired_tables,
    peers,
    right_reasons,
    shift_curves,
    sparing,
    step,
    transfer_studies,
)
from benchmarks.common import RESULTS, ROOT, markdown_table
from benchmarks.limited_training import ON_TOP, RIVALS, UNTAUGHT
from benchmarks.paired import Row, tested, values
from benchmarks.paired_tables import BETWEEN, chosen, gains, seeds
from e2kd.demo import report

README = ROOT / "README.md"


def results(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def demo() -> str:
    """Mean ± sd over seeds, in percent, and the paired differences."""
    found = results("demo")
    header = ["", *(column.title.replace("\n", " ") for column in report.COLUMNS)]
    lines = [
        markdown_table(header, report.rows(found)),
        "",
        f"Percent, mean ± sd of {len(found['seeds'])} paired seeds: `{found['command']}`. In points, mean, each seed "
        f"and 95 % confidence interval: {'; '.join(f'{pair} {differences(found[k])}' for k, pair in PAIRS.items())}.",
    ]
    return "\n".join(lines)


PAIRS = {"e2kd_minus_kd": "e²KD - KD", "frozen_e2kd_minus_frozen_kd": "frozen e²KD - frozen KD"}


def differences(found: dict[str, Any]) -> str:
    """A paired comparison of the demo in words."""
    said = []
    for title, field in (("OOD accuracy", "ood_accuracy"), ("OOD agreement", "ood_agreement")):
        each = ", ".join(f"{100 * value:+.1f}" for value in found[field]["each"])
        low, high = (100 * bound for bound in found[field]["interval"])
        said.append(f"{title} {100 * found[field]['mean']:+.1f} ({each}; {low:+.1f} to {high:+.1f})")
    return ", ".join(said)


def cost() -> str:
    """Time and peak memory of a step, as ratios to plain KD; a second table for compiled students, once measured."""
    parts = [_cost("step_cpu", '"Two forwards" is the way of CAM libraries.')]
    if (RESULTS / "step_cpu_compiled.json").exists():
        parts.append(_cost("step_cpu_compiled", "Every student, that of the KD step too, under `torch.compile`."))
    return "\n\n".join(parts)


def _cost(name: str, remark: str) -> str:
    found = results(name)
    rows, first = found["rows"], found["rows"][0]
    note = (
        f"Medians (quartiles) of {first['rounds']} interleaved rounds, batch {first['batch']} at {first['size']}, "
        f"float32, {found['environment']['cpus']} CPU cores; each ratio to a hand-written KD step of the same run: "
        f"`{found['command']}`. {remark}"
    )
    return f"{step.table(rows)}\n\n{note}"


def coverage() -> str:
    """How many model families are explained as they come."""
    rows = results("families")["rows"]
    lines = [
        f"- {section}: {families.summary([row for row in rows if row['section'] == section])}"
        for section in dict.fromkeys(row["section"] for row in rows)
    ]
    return "\n".join(lines)


def frozen_cost() -> str:
    """Time of a step with a frozen teacher, and what reading, moving and computing its maps takes."""
    found = results("frozen")
    rows, machine = found["rows"], found["environment"]
    note = (
        f"Medians (quartiles) of ratios within one run, batch {rows[0]['batch']}, float32, {machine['cpus']} CPU "
        f"cores: `{found['command']}`. {' '.join(frozen.facts(rows))}"
    )
    return f"{frozen.table(rows)}\n\n{note}"


def sizes() -> str:
    """The room a cache takes: arithmetic, so it needs no run."""
    return frozen.bytes_table(frozen.measure_bytes())


def misleading() -> str:
    """Students of misleading photos."""
    return right_reasons.section(right_reasons.all_results())


def cells_of_students() -> str:
    """What the cells of their maps know."""
    return cells.table(results("cells"))


def guided() -> str:
    """Students of teachers that were guided to look at the objects."""
    return localisation.section(localisation.all_results())


def limited_data() -> str:
    """CIFAR-10 with few images: accuracy and agreement of every family and number of images that was run."""
    return "\n\n".join(limited.section(found) for found in limited.all_results())


def few_images() -> str:
    """Every method that was tried beside one teacher, the least accurate students first."""
    found = results("limited_standard_50_again")
    rows = found["rows"]
    means = {arm: statistics.mean(values(rows, arm, "accuracy").values()) for arm in tested(rows)}
    body = [
        [
            limited.ARMS[arm],
            *paired_tables.means(rows, arm, ["accuracy"]),
            *gains(rows, arm, "kd", ["accuracy"]),
            _weight(rows, arm),
            _teacher(arm),
        ]
        for arm in sorted(means, key=means.__getitem__)
    ]
    header = ["CIFAR-10, 50 images per class", "accuracy", "over KD", "weight", "teacher"]
    note = (
        f"ResNet-20 students of a ResNet-32 that has {100 * found['teacher']['test']:.1f} %, without a label loss but "
        f"where it says labels: percent of {10 * found['settings']['test_per_class']:,} test images, mean ± sd "
        f"of {seeds(rows)}, differences {BETWEEN}. All at τ = {chosen(rows, 'kd')[0]}, unless another is "
        "named; weights chosen without labels."
    )
    return f"{markdown_table(header, body)}\n\n{note}"


def _teacher(arm: str) -> str:
    """Which teachers an arm can learn from: a frozen one keeps no features."""
    if arm in UNTAUGHT:
        return "none"
    return "live" if arm in ON_TOP or (arm in RIVALS and RIVALS[arm].takes_features) else "live or frozen"


def _weight(rows: list[Row], arm: str) -> str | None:
    """The λ of an explanation term, or how many times its default weight a rival has; τ where it is not KD's."""
    temperature, weight = chosen(rows, arm)
    other = f", τ = {temperature}" if temperature not in (None, chosen(rows, "kd")[0]) else ""
    return f"{weight} x default" if arm in RIVALS else weight and f"λ = {weight}{other}"


def explained_in_part() -> str:
    """Gain against cost of explaining a part of what is seen."""
    found = results("sparing")
    note = (
        f"B-cos students of 50 images per class, gains as above; time of {sparing.STEPS} steps, medians (quartiles) of "
        f"{found['rounds']} interleaved rounds on one core: `{found['command']}`."
    )
    return f"{sparing.table(found['rows'])}\n\n{note}"


def all_classes() -> str:
    """What explaining every class costs."""
    found = results("every_class_cpu")
    note = (
        f"Medians (quartiles) of {found['rounds']} interleaved rounds, batch {found['rows'][0]['batch']} at 224, "
        f"float32, {found['environment']['cpus']} CPU cores, to a hand-written KD step: `{found['command']}`."
    )
    return f"{every_class.table(found['rows'])}\n\n{note}"


def shifts() -> str:
    """How explanations follow a shifted image, of the CNNs and the ViTs they taught."""
    return shift_curves.table(shift_curves.measured())


def trainers() -> str:
    """Which ways to train were run, interrupted and resumed."""
    found = results("hosts")
    return (
        f"{hosts.table(found['rows'])}\n\nNumbers of processes (gloo, CPU) for which a run resumed after its first "
        "epoch ends with the weights and averages of an uninterrupted one, bit by bit: "
        "`python -m benchmarks.hosts`. With weights of 0 the host's own result comes out bit by bit."
    )


def bcos_cost() -> str:
    """Time and peak memory of a step with W(x)."""
    rows = results("bcos_cpu")["rows"]
    commands = ", ".join(f"`{row['command']}`" for row in rows)
    return (
        f"{bcos.table(rows)}\n\nMedians (quartiles) of ratios to a hand-written KD step of the same networks in the "
        f"same run, float32, 2 CPU cores: {commands}. `official` is `frozen` with the attention of the papers' code."
    )


def transfer_cost() -> str:
    """What UniCAM, ROAD and the monitor cost."""
    found = results("transfer")
    lines = [[name, f"{ratio:.3g}"] for name, ratio in found["ratios"].items()]
    note = f"CPU time but for memory, {found['images']} images at {found['side']}, ResNet-50 and ResNet-50"
    return f"{markdown_table(['ratio', ''], lines)}\n\n{note}: `{found['command']}`."


def studies() -> str:
    """What each way of distilling hands over, and what a capacity gap costs, on either data set."""
    return "\n\n".join(_study(data) for data in ("cifar10", "catsdogs"))


def _study(data: str) -> str:
    found = results(f"transfer_studies_{data}")
    rows, settings = found["rows"], found["settings"]
    images = f"{10 * settings['per_class']:,} images of CIFAR-10" if data == "cifar10" else "1,120 photos of ASIRRA"
    seeds = len({row["seed"] for row in rows})
    note = (
        f"{images} at {settings['side']} pixels, {settings['epochs']} epochs, {seeds} paired seeds, mean ± sd; "
        f"accuracy and agreement in percent, scores at the last stage: `{found['command']}`. "
        f"{' '.join(transfer_studies.facts(rows))}"
    )
    return f"{transfer_studies.table(rows)}\n\n{note}"


TABLES = {
    "demo": demo, "cost": cost, "coverage": coverage, "sizes": sizes, "hosts": trainers, "bcos": bcos_cost,
    "transfer": transfer_cost, "frozen": frozen_cost, "limited": limited_data, "peers": peers.table,
    "studies": studies, "sparing": explained_in_part, "every_class": all_classes, "shifts": shifts,
    "few": few_images, "misleading": misleading, "cells": cells_of_students, "localisation": guided,
}  # fmt: skip
EVIDENCE = ("limited", "misleading", "cells", "localisation", "sparing", "every_class", "shifts", "studies", "peers")
PAGES = {README: [name for name in TABLES if name not in EVIDENCE], ROOT / "benchmarks" / "README.md": EVIDENCE}


def filled(text: str, names: Iterable[str]) -> str:
    """A page with its tables made anew."""
    for name in names:
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"Expected one place for the table {name!r}.")
        before, rest = text.split(start)
        text = f"{before}{start}{TABLES[name]()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for page, names in PAGES.items():
        page.write_text(filled(page.read_text(encoding="utf-8"), names), encoding="utf-8")
