"""Writes the README's tables from the JSON in benchmarks/results: python -m benchmarks.tables

Each table stands between `<!-- name -->` and `<!-- /name -->`. A test checks that README and JSON agree.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks import families, step
from benchmarks.common import RESULTS, ROOT, markdown_table
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
    differences = [
        f"{title} {100 * d['mean']:+.1f} ({', '.join(f'{100 * v:+.1f}' for v in d['each'])})"
        for title, d in (
            ("OOD accuracy", found["e2kd_minus_kd"]["ood_accuracy"]),
            ("OOD agreement", found["e2kd_minus_kd"]["ood_agreement"]),
        )
    ]
    lines = [
        markdown_table(header, report.rows(found)),
        "",
        f"Percent, mean ± sd of {len(found['seeds'])} paired seeds: `{found['command']}`. "
        f"e²KD - KD in points, mean and each seed: {'; '.join(differences)}.",
    ]
    return "\n".join(lines)


def cost() -> str:
    """Time and peak memory of a step, as ratios to plain KD; a second table for compiled students, once measured."""
    parts = [_cost("step_cpu", '"Two forwards" is the way of CAM libraries.')]
    if (RESULTS / "step_cpu_compiled.json").exists():
        parts.append(_cost("step_cpu_compiled", "Every student, that of the KD step too, under `torch.compile`."))
    return "\n\n".join(parts)


def _cost(name: str, remark: str) -> str:
    found = results(name)
    rows = found["rows"]
    note = (
        f"Medians of {rows[0]['rounds']} interleaved rounds, batch {rows[0]['batch']} at {rows[0]['size']}, float32, "
        f"{found['environment']['cpus']} CPU cores; each ratio to a hand-written KD step of the same run (1.000x): "
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


TABLES = {"demo": demo, "cost": cost, "coverage": coverage}


def filled(text: str) -> str:
    """The README with every table made anew."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"Expected one place for the table {name!r} in README.md.")
        before, rest = text.split(start)
        text = f"{before}{start}{make()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
