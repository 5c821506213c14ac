"""`e2kd demo`: trains, prints the table, and writes `demo.json` and `demo.png`."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from e2kd.commands.numbers import count_said
from e2kd.demo.data import Part
from e2kd.demo.experiment import SeedRun, run_seed
from e2kd.demo.extras import require_extras
from e2kd.demo.progress import tracking
from e2kd.demo.report import NAMES, NOTE, difference_lines, sentence, table_of
from e2kd.demo.results import results_of
from e2kd.demo.settings import QUICK, Arm, Settings
from e2kd.demo.show import draw

if TYPE_CHECKING:
    from rich.console import Console

THREADS = 2  # small nets gain nothing from more, and one number of threads gives one result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `e2kd demo`."""
    defaults = Settings()
    parser.add_argument("--seeds", type=count_said, help="repetitions; 2 by default, 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="half a minute instead of three")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of demo.json and demo.png")
    parser.add_argument(
        "--split",
        choices=[Part.VALIDATION.value, Part.TEST.value],
        default=Part.TEST.value,
        help="digits to measure on: validation to try settings, test to report",
    )
    parser.add_argument("--weight", type=float, default=defaults.weight, help="λ of e²KD's explanation term")
    parser.add_argument("--frozen-weight", type=float, default=defaults.frozen_weight, help="λ with a frozen teacher")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="τ of KD and e²KD")


def main(args: argparse.Namespace) -> int:
    """Runs the demo as asked; returns the exit status. A missing package raises `MissingExtra`, with a sentence."""
    weights = {"weight": args.weight, "frozen_weight": args.frozen_weight}
    run(args.seeds, args.quick, args.out, part=Part(args.split), temperature=args.temperature, **weights)
    return 0


def run(
    seeds: int | None = None,
    quick: bool = False,
    out: Path = Path("demo-out"),
    *,
    part: Part = Part.TEST,
    weight: float = Settings.weight,
    frozen_weight: float = Settings.frozen_weight,
    temperature: float = Settings.temperature,
) -> dict[str, Any]:
    """Trains a teacher and five students per seed, prints what came out, and returns what `demo.json` holds.

    Args:
        seeds: how many; None is 2, or 1 when quick. They are 0, 1, ...
        quick: fewer epochs, for all students alike, and fewer test images.
        out: folder for `demo.json` and `demo.png`; made if need be.
        part: digits to measure on. Settings are tried on `Part.VALIDATION` and reported on `Part.TEST`.
        weight: λ with a live teacher.
        frozen_weight: λ with a frozen one.
        temperature: τ.

    Raises:
        ValueError: for less than one seed.
        MissingExtra: when a package of the extra `demo` is not installed; says which, and how to get it.
    """
    settings = replace(QUICK if quick else Settings(), part=part, temperature=temperature)
    settings = replace(settings, weight=weight, frozen_weight=frozen_weight)
    seeds = (1 if quick else 2) if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"Expected at least one seed, but got {seeds}.")
    require_extras()
    out.mkdir(parents=True, exist_ok=True)
    console = console_of()
    start = time.perf_counter()
    with threads(THREADS):
        runs = run_seeds(seeds, settings, console)
        results = results_of(runs, settings, command_of(seeds, quick, out, settings), time.perf_counter() - start)
        files = write(results, runs, out)
    tell(console, results, files)
    return results


def console_of() -> Console:
    """Where the demo prints."""
    from rich.console import Console

    return Console(highlight=False, markup=False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Has torch use so many threads, and restores what it used before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_seeds(seeds: int, settings: Settings, console: Console) -> list[SeedRun]:
    """All seeds, under progress bars, with a line for each that is done."""
    cost = seeds * (sum(settings.cost(arm) for arm in Arm) + settings.test_cost())
    runs = []
    with tracking(console, cost) as tracker:
        for seed in range(seeds):
            runs.append(run_seed(seed, settings, tracker))
            console.print(line_of(runs[-1]))
    return runs


def line_of(run: SeedRun) -> str:
    """One seed in a line."""
    found = [f"{NAMES[arm.value]} {100 * run.scores[arm].ood_accuracy:.1f}" for arm in list(Arm)[1:]]
    seconds = sum(run.seconds.values()) + run.freezing
    return f"seed {run.seed}: OOD accuracy {', '.join(found)} ({seconds:.0f} s)"


def command_of(seeds: int, quick: bool, out: Path, settings: Settings) -> str:
    """The command line that repeats the run.

    >>> command_of(5, False, Path("demo-out"), Settings())
    'e2kd demo --seeds 5 --out demo-out --split test --weight 1.0 --frozen-weight 5.0 --temperature 2.0'
    """
    words = ["e2kd", "demo", "--seeds", str(seeds), *(["--quick"] if quick else []), "--out", str(out)]
    words += ["--split", settings.part.value, "--weight", str(settings.weight)]
    words += ["--frozen-weight", str(settings.frozen_weight)]
    return shlex.join([*words, "--temperature", str(settings.temperature)])


def write(results: dict[str, Any], runs: list[SeedRun], out: Path) -> list[Path]:
    """Writes the JSON and the figure into the folder; returns their paths."""
    table, figure = out / "demo.json", out / "demo.png"
    table.write_text(json.dumps(results, indent=1) + "\n")
    draw(runs, results, figure)
    return [table, figure]


def tell(console: Console, results: dict[str, Any], files: list[Path]) -> None:
    """Prints the table, the paired differences, what they mean, and where the files are."""
    console.print("", table_of(results), NOTE, "", *difference_lines(results), sep="\n")
    console.print(sentence(results))
    console.print(f"{results['seconds']:.0f} s. Written: {', '.join(map(str, files))}", soft_wrap=True)
