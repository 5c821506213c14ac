"""Who teaches at full scale: a live teacher, or the cache of a frozen one that is known to be its."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import e2kd
from benchmarks.full_scale_data import Split
from benchmarks.full_scale_networks import asked, network
from benchmarks.full_scale_run import SHORTER_SIDE, Run
from benchmarks.limited_training import EVERY_CLASS
from benchmarks.paired import Row
from e2kd.frozen.fingerprints import hash_weights
from e2kd.frozen.settings import differences
from e2kd.modes import device_of, evaluating
from e2kd.outputs import logits_of
from e2kd.teacher import Teacher


def live_teacher(run: Run, student: nn.Module, classes: int, device: torch.device) -> Teacher | None:
    """The one that can be asked; None where there is a cache alone."""
    if run.recipe.teacher == "none":
        return None
    ready = run.pretrained and run.teacher_checkpoint is None
    name, bias = run.recipe.teacher, run.teacher_logit_bias
    model = network(name, classes, run.teacher_checkpoint, pretrained=ready, logit_bias=bias)
    return asked(model.to(device).eval(), student, signed=run.arm in EVERY_CLASS)


def check_heads(models: dict[str, nn.Module], image: Tensor, classes: int) -> None:
    """Raise a ValueError for a network that tells other classes apart than the data set has; image [3, H, W]."""
    for name, model in models.items():
        found = _classes_of(model, image)
        if found != classes:
            raise ValueError(
                f"Expected the {classes} classes of the data set, but the {name} has {found}. Pass weights of one that "
                f"was trained on it: --{name}-checkpoint."
            )


def _classes_of(model: nn.Module, image: Tensor) -> int:
    device = device_of(model, image.device)
    with torch.no_grad(), evaluating(model):
        return int(logits_of(model(image[None].to(device))).shape[1])


def weights_of(teacher: Teacher | e2kd.FrozenTeacher | None) -> str | None:
    """The hash of its weights."""
    if isinstance(teacher, e2kd.FrozenTeacher):
        return str(teacher.plan["teacher"]["weights"])
    return None if teacher is None else hash_weights(teacher.model)


def frozen_teacher(
    run: Run, teacher: Teacher | None, train: Split, classes: int, accelerator: Accelerator
) -> e2kd.FrozenTeacher:
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
    side, weights = run.recipe.size, weights_of(teacher)
    wanted = {"size": [side, side], "classes": classes} | ({} if weights is None else {"weights": weights})
    _check_cache(frozen, cache, wanted)
    return frozen


def _check_cache(frozen: e2kd.FrozenTeacher, cache: Path, wanted: Row) -> None:
    """Raise a ValueError for the cache of another teacher, or of images of another size."""
    found = frozen.plan["teacher"] | {"classes": frozen.num_classes}
    apart = differences({name: found[name] for name in wanted}, wanted)
    if apart:
        raise ValueError(
            f"The cache in {cache} is of another teacher: {'; '.join(apart)}. Name another --cache, or move it away."
        )
