"""Paired comparisons: students that differ in their criterion alone, trained for the same seeds.

A study trains every arm's students in processes of their own, writes each row at once, and goes on where it was
stopped. What an arm may be set to is chosen on validation images and seeds that are not reported.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from e2kd.demo.results import interval, summarise

Row = dict[str, Any]


class Case(NamedTuple):
    """One student to train, and the images it is measured on: "validation" or "test"."""

    split: str
    arm: str
    seed: int
    temperature: float | None
    weight: float | None


class Study:
    """All rows so far; new ones are written at once.

    Args:
        measured: trains a case's student and says what it is worth, by name.
        rows: those of a run that was stopped.
        write: called with all rows after each.
        jobs: students trained at a time.
        by: what settings are chosen by.
    """

    def __init__(
        self,
        measured: Callable[[Case], Row],
        rows: list[Row],
        write: Callable[[list[Row]], object],
        jobs: int,
        by: str = "accuracy",
    ) -> None:
        self.measured, self.rows, self.write, self.jobs, self.by = measured, rows, write, jobs, by

    def found(self, case: Case) -> Row | None:
        """A student's row, if it is there."""
        key = case._asdict()
        return next((row for row in self.rows if all(row[name] == value for name, value in key.items())), None)

    def fill(self, cases: Sequence[Case]) -> None:
        """Trains the students that have no row yet."""
        todo = [case for case in dict.fromkeys(cases) if self.found(case) is None]
        with ThreadPoolExecutor(self.jobs) as pool:
            for done in as_completed([pool.submit(self._in_process, case) for case in todo]):
                self.rows.append(done.result())
                self.write(self.rows)
                print(json.dumps(self.rows[-1]), flush=True)

    def _in_process(self, case: Case) -> Row:
        """The row of a forked process, which shares the images and has random numbers of its own."""
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=lambda: there.send(self._row(case)))
        process.start()
        there.close()
        try:
            row: Row = here.recv()  # raises EOFError when the process died
        finally:
            process.join()
        return row

    def _row(self, case: Case) -> Row:
        torch.set_num_threads(1)
        begun = time.process_time()  # of this process alone
        return case._asdict() | self.measured(case) | {"cpu_seconds": round(time.process_time() - begun, 1)}

    def best(self, choices: list[Case], seeds: Sequence[int]) -> Case:
        """The choice of the highest mean on validation images; one alone needs no training."""
        if len(choices) == 1:
            return choices[0]
        tried = {choice: [choice._replace(split="validation", seed=seed) for seed in seeds] for choice in choices}
        self.fill(list(itertools.chain(*tried.values())))
        return max(choices, key=lambda choice: self._mean(tried[choice]))

    def _mean(self, cases: list[Case]) -> float:
        return summarise([row[self.by] for case in cases if (row := self.found(case))])["mean"] or 0.0


def parser_of(doc: str | None, weights: Sequence[float], work: Path) -> ArgumentParser:
    """A study's command line, with the options that all have."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=weights, help="to choose λ from")
    parser.add_argument("--jobs", type=int, default=2, help="students trained at a time, on one core each")
    parser.add_argument("--work", type=Path, default=work, help="folder of the teachers")
    parser.add_argument("--quick", action="store_true", help="one seed, a tiny budget; nothing written")
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    return parser


@contextmanager
def work_of(args: Namespace) -> Iterator[Path]:
    """The folder of the teachers; under `--quick`, which writes nothing, one that is gone afterwards."""
    if not args.quick:
        yield args.work
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def tested(rows: list[Row]) -> set[str]:
    """The arms that were measured on the test images."""
    return {row["arm"] for row in rows if row["split"] == "test"}


def tests_of(rows: list[Row], arm: str) -> list[Row]:
    """An arm's students as they were measured on the test images.

    Raises:
        ValueError: where an arm was tested with two settings, as when more were tried after the first test.
    """
    mine = [row for row in rows if row["split"] == "test" and row["arm"] == arm]
    if len({row["seed"] for row in mine}) < len(mine):
        raise ValueError(f"{arm} was tested with several settings. Keep the rows of the one that was chosen.")
    return mine


def values(rows: list[Row], arm: str, field: str) -> dict[int, float]:
    """A measure of an arm's students on the test images, by seed."""
    return {row["seed"]: row[field] for row in tests_of(rows, arm)}


def differences(rows: list[Row], arm: str, base: str, fields: Sequence[str]) -> Row:
    """Paired differences of measures: mean, sd, 95 % confidence interval, and each seed's."""
    found = {}
    for field in fields:
        first, second = values(rows, arm, field), values(rows, base, field)
        each = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
        found[field] = {**summarise(each), "interval": interval(each), "each": each}
    return found
