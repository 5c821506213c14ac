"""Who teaches at full scale: a live teacher, or the cache of a frozen one that is known to be its."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

import e2kd
from benchmarks.full_scale_data import Split
from benchmarks.full_scale_networks import asked, network
from benchmarks.full_scale_run import SHORTER_SIDE, Run
from benchmarks.limited_training import EVERY_CLASS
from benchmarks.paired import Row
from e2kd.frozen.fingerprints import hash_weights
from e2kd.frozen.settings import differences
from e2kd.teacher import Teacher


def live_teacher(run: Run, student: nn.Module, classes: int, device: torch.device) -> Teacher | None:
    """The one that can be asked; None where there is a cache alone."""
    if run.recipe.teacher == "none":
        return None
    ready = run.pretrained and run.teacher_checkpoint is None
    model = network(run.recipe.teacher, classes, run.teacher_checkpoint, pretrained=ready)
    return asked(model.to(device).eval(), student, signed=run.arm in EVERY_CLASS)


def weights_of(teacher: Teacher | e2kd.FrozenTeacher | None) -> str | None:
    """The hash of its weights."""
    if isinstance(teacher, e2kd.FrozenTeacher):
        return str(teacher.plan["teacher"]["weights"])
    return None if teacher is None else hash_weights(teacher.model)


def frozen_teacher(run: Run, teacher: Teacher | None, train: Split, accelerator: Accelerator) -> e2kd.FrozenTeacher:
    """The cache, complete; what is missing every process helps to freeze.

    Raises:
        ValueError: when it is not there and can't be made, or is of another teacher.
    """
    cache = run.cache or run.out / "cache"
    if not (cache / "manifest.json").exists():
        if teacher is None:
            raise ValueError(f"There is no complete cache in {cache} and no teacher to make it: pass --teacher.")
        e2kd.freeze(
            teacher.model,
            train,
            cache,
            explainer=teacher.explainer,
            classes="all" if run.arm in EVERY_CLASS else "teacher",
            view=round(run.recipe.size * SHORTER_SIDE),
            normalization=teacher.wanted,
            teacher_size=run.recipe.size,
            workers=run.workers,
            progress=accelerator.is_local_main_process,
        )
    accelerator.wait_for_everyone()
    frozen = e2kd.FrozenTeacher.open(cache)
    _check_cache(frozen, cache, run.recipe.size, teacher)
    return frozen


def _check_cache(frozen: e2kd.FrozenTeacher, cache: Path, size: int, teacher: Teacher | None) -> None:
    """Raise a ValueError for the cache of another teacher, or of images of another size."""
    wanted: Row = {"size": [size, size]}
    if teacher is not None:
        wanted["weights"] = weights_of(teacher)
    apart = differences({name: frozen.plan["teacher"][name] for name in wanted}, wanted)
    if apart:
        raise ValueError(
            f"The cache in {cache} is of another teacher: {'; '.join(apart)}. Name another --cache, or move it away."
        )
