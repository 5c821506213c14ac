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
from e2kd.demo.settings import Arm, Settings
from e2kd.version import __version__


def summarise(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation of the seeds that have a value; None where there are too few.

    >>> summarise([1.0, 3.0])["mean"], summarise([2.0, None])
    (2.0, {'mean': 2.0, 'sd': None})
    """
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return {"mean": mean, "sd": statistics.stdev(known) if len(known) > 1 else None}


def differences(seeds: Sequence[dict[str, Any]], field: str) -> dict[str, Any]:
    """e²KD minus KD of one measure, per seed and over the seeds."""
    pairs = [(seed["scores"]["e2kd"][field], seed["scores"]["kd"][field]) for seed in seeds]
    each = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    return {**summarise(each), "each": each}


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
        "e2kd_minus_kd": {field: differences(seeds, field) for field in Scores._fields},
    }


def _seed(run: SeedRun) -> dict[str, Any]:
    scores = {arm.value: _known(values._asdict()) for arm, values in run.scores.items()}
    return {"seed": run.seed, "scores": scores, "seconds": {arm.value: t for arm, t in run.seconds.items()}}


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
