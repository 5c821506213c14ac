"""What is left of e²KD's gain when a part of each batch is explained, every k-th batch, or a stretch of the training.

    python -m benchmarks.limited --family bcos --arms fraction_4 stretch_20_50 ...    # the gains: minutes per student
    python -m benchmarks.sparing                                                # the time of a step, then the curve
    python -m benchmarks.sparing --quick                                        # to see that it runs; writes nothing

Time is that of 40 steps of the B-cos students of benchmarks.limited, with the live teacher's, on one core: median of
ratios to KD's, interleaved round by round. Results: benchmarks/results/sparing.json, and sparing.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import matplotlib
import torch

from benchmarks.cifar_families import FAMILIES
from benchmarks.common import RESULTS, between, command, markdown_table, read_rows, write_results
from benchmarks.frozen import interleaved, ratios
from benchmarks.limited import MEASURES
from benchmarks.limited_training import ARMS, BATCH, STRETCHES, criterion_of
from benchmarks.paired import Case, Row, differences, tested

FAMILY, STUDY = FAMILIES["bcos"], "limited_bcos_50"
STEPS = 40
COMPARED = ("kd", "e2kd", "fraction_4", "every_4", *STRETCHES)


def steps(arm: str, images: torch.Tensor) -> Callable[[], None]:
    """A short training of an arm's student at each call."""
    torch.manual_seed(0)
    teacher, student = FAMILY.kind.teacher().eval(), FAMILY.student().train()
    case = Case("test", arm, 0, 1.0, None if arm == "kd" else 5.0)
    criterion = criterion_of(case, FAMILY, student, teacher, STEPS)
    optimizer = FAMILY.optimizer(student)

    def call() -> None:
        criterion.step = 0
        for _ in range(STEPS):
            loss = criterion(student(images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return call


def costs(rounds: int) -> list[Row]:
    """Time of every arm's steps, as ratios to KD's."""
    images = FAMILY.kind.encode(torch.rand(BATCH, 3, 32, 32))
    seconds = interleaved({arm: steps(arm, images) for arm in COMPARED}, rounds, warmup=1)
    return [{"arm": arm, "time": ratios(seconds, arm, "kd")} for arm in COMPARED]


def gains() -> dict[str, dict[str, Row]]:
    """Of every arm that was trained: its paired differences to KD."""
    rows = read_rows(STUDY)
    trained = tested(rows)
    return {arm: differences(rows, arm, "kd", MEASURES) for arm in COMPARED if arm in trained}


def share(found: dict[str, dict[str, Row]], arm: str, measure: str) -> float:
    """Of e²KD's gain."""
    return float(found[arm][measure]["mean"] / found["e2kd"][measure]["mean"])


def table(rows: list[Row]) -> str:
    """The curve as Markdown."""
    found, body = gains(), []
    for row in rows:
        arm = row["arm"]
        gained = [_gain(found, arm, name) if arm in found else None for name in MEASURES]
        body.append([ARMS[arm], between(row["time"], "x"), *gained])
    header = ["", "time of a KD step", *(f"{name}, points over KD (share of e²KD's)" for name in MEASURES)]
    return markdown_table(header, body)


def _gain(found: dict[str, dict[str, Row]], arm: str, measure: str) -> str:
    return f"{100 * found[arm][measure]['mean']:+.1f} ({share(found, arm, measure):.0%})"


def draw(rows: list[Row]) -> Any:
    """Gain against cost, as a figure: a point for every arm, and the line from KD to e²KD."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, time = gains(), {row["arm"]: row["time"]["median"] for row in rows}
    figure, axes = pyplot.subplots(1, len(MEASURES), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, measure in zip(axes, MEASURES, strict=True):
        gained = {arm: 100 * share(found, arm, measure) for arm in found}
        axis.plot([time["kd"], time["e2kd"]], [0, 100], color="0.7", linestyle=":")
        for arm, value in gained.items():
            axis.plot(time[arm], value, marker="o")
            axis.annotate(ARMS[arm], (time[arm], value), (6, -4), textcoords="offset points", fontsize=8)
        axis.set(xlabel="time of a step / of a KD step", title=measure, xlim=(0.9, 1.25 * max(time.values())))
    axes[0].set_ylabel("share of e²KD's gain over KD in %")
    return figure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="draw the curve anew from times that were measured")
    parser.add_argument("--quick", action="store_true", help="two rounds; nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows("sparing") if args.table else costs(2 if args.quick else args.rounds)
    print(table(rows))
    if not args.quick:
        if not args.table:
            write_results("sparing", rows, command=command(), rounds=args.rounds)
        draw(rows).savefig(RESULTS / "sparing.png", dpi=120)


if __name__ == "__main__":
    main()
