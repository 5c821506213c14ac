"""The numbers of a run, as one object of JSON's own types: shares in [0, 1], times in seconds."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from e2kd.demo.experiment import SeedRun
from e2kd.demo.measure import Scores
from e2kd.demo.settings import PAIRS, Arm, Settings
from e2kd.version import __version__

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, two-sided 95 %, from 1 degree on
Z95 = 1.959964  # what it falls to


def summarise(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation of the seeds that have a value; None where there are too few.

    >>> summarise([1.0, 3.0])["mean"], summarise([2.0, None])
    (2.0, {'mean': 2.0, 'sd': None})
    """
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return {"mean": mean, "sd": statistics.stdev(known) if len(known) > 1 else None}


def t95(degrees: int) -> float:
    """Student's t of so many degrees of freedom, two-sided 95 %, to three decimals; by Fisher's series past the table.

    >>> round(t95(4), 3), round(t95(10), 3), round(t95(30), 3)
    (2.776, 2.228, 2.042)
    """
    if degrees <= len(T95):
        return T95[degrees - 1]
    z, n = Z95, degrees
    terms = (
        z,
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return sum(terms)


def interval(values: Sequence[float | None]) -> list[float] | None:
    """95 % confidence interval of the mean (Student's t) of the values that are there; None for fewer than 2.

    >>> [round(bound, 2) for bound in interval([1.0, 2.0, 3.0])]
    [-0.48, 4.48]
    """
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    mean, reach = statistics.fmean(known), t95(len(known) - 1) * statistics.stdev(known) / math.sqrt(len(known))
    return [mean - reach, mean + reach]


def differences(seeds: Sequence[dict[str, Any]], field: str, arm: Arm, base: Arm) -> dict[str, Any]:
    """An arm minus another in one measure: per seed, and over the seeds with a 95 % confidence interval."""
    pairs = [(seed["scores"][arm.value][field], seed["scores"][base.value][field]) for seed in seeds]
    each = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    return {**summarise(each), "interval": interval(each), "each": each}


def results_of(runs: Sequence[SeedRun], settings: Settings, command: str, seconds: float) -> dict[str, Any]:
    """Everything about a run; what could not be measured is None."""
    seeds = [_seed(run) for run in runs]
    return {
        "command": command,
        "settings": asdict(settings) | {"part": settings.part.value},
        "versions": versions(),
        "seconds": seconds,
        "seeds": seeds,
        "summary": {arm.value: summary(seeds, arm) for arm in Arm},
        **{minus(*pair): {field: differences(seeds, field, *pair) for field in Scores._fields} for pair in PAIRS},
    }


def minus(arm: Arm, base: Arm) -> str:
    """The key of a paired comparison.

    >>> minus(Arm.E2KD, Arm.KD)
    'e2kd_minus_kd'
    """
    return f"{arm.value}_minus_{base.value}"


def _seed(run: SeedRun) -> dict[str, Any]:
    scores = {arm.value: _known(values._asdict()) for arm, values in run.scores.items()}
    seconds = {arm.value: t for arm, t in run.seconds.items()} | {"freezing": run.freezing}
    return {"seed": run.seed, "scores": scores, "seconds": seconds}


def _known(scores: dict[str, float]) -> dict[str, float | None]:
    return {field: None if math.isnan(value) else value for field, value in scores.items()}  # JSON has no nan


def summary(seeds: Sequence[dict[str, Any]], arm: Arm) -> dict[str, dict[str, float | None]]:
    """Each measure of an arm over the seeds."""
    return {field: summarise([seed["scores"][arm.value][field] for seed in seeds]) for field in Scores._fields}


def versions() -> dict[str, Any]:
    """What the numbers were computed with."""
    return {
        "e2kd": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
