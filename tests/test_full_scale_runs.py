"""Full scale: what a run may go on from, and what its result holds, when things are not as they were."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.full_scale_networks import network
from benchmarks.full_scale_training import distil
from tests.full_scale_cases import Make, reset, run_on

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::e2kd.errors.NoEffectWarning"),  # networks of random weights
]


def teacher_file(path: Path, seed: int, classes: int = 2) -> Path:
    torch.manual_seed(seed)
    save_file(network("test_resnet", classes, None).state_dict(), path)
    return path


def test_checkpoints_of_other_settings_are_not_gone_on_with(folder: Make, tmp_path: Path) -> None:
    """Also where the result that would have told was moved away; what differs is named, as it was and as it is."""
    run = run_on(folder("plantvillage"), tmp_path, "plantvillage", arm="e2kd")
    distil(run)
    other = replace(run, weight=7.0, recipe=replace(run.recipe, lr=0.5))

    def refused(said: str) -> None:
        reset()
        with pytest.raises(SystemExit, match=f"{said}.*Move the folder away, or name another --out"):
            distil(other)

    apart = "recipe.lr is 0.01 there but 0.5 here; weight is 1.0 there but 7.0 here"
    refused(f"result.json with other settings: {apart}")
    (tmp_path / "result.json").unlink()
    refused(f"checkpoints with other settings: {apart}")
    (tmp_path / "checkpoints" / "settings.json").unlink()
    refused("without the settings")
    shutil.rmtree(tmp_path / "checkpoints")
    reset()
    assert distil(other)["weight"] == 7.0


def test_checkpoints_of_another_teacher_are_not_gone_on_with(folder: Make, tmp_path: Path) -> None:
    """A file of the same name, but of other weights."""
    file = teacher_file(tmp_path / "teacher.safetensors", 1)
    run = run_on(folder("imagenet"), tmp_path / "out", "imagenet", arm="kd", teacher_checkpoint=file)
    distil(run)
    (tmp_path / "out" / "result.json").unlink()
    teacher_file(file, 2)
    reset()
    with pytest.raises(SystemExit, match="teacher is '"):
        distil(run)


def test_a_result_says_how_it_was_made(folder: Make, tmp_path: Path) -> None:
    run = run_on(folder("plantvillage"), tmp_path, "plantvillage", arm="cross_entropy")
    distil(run)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["command"].startswith("python -m ")
    assert len(found["teacher"]) == 32


@pytest.mark.parametrize("shared_cache", [True, False])
def test_a_cache_of_another_teacher_or_size_teaches_nobody(folder: Make, tmp_path: Path, shared_cache: bool) -> None:
    """Whether it was named, or is what a first try left in the folder."""
    one, other = (teacher_file(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    cache = tmp_path / "cache" if shared_cache else None
    run = run_on(
        folder("imagenet"), tmp_path / "out", "imagenet", arm="frozen_kd", teacher_checkpoint=one, cache=cache,
        recipe={"batch": 256},
    )  # fmt: skip
    with pytest.raises(ValueError, match="smaller --batch"):
        distil(run)
    run = replace(run, recipe=replace(run.recipe, batch=4))
    for wrong, said in (
        (replace(run, teacher_checkpoint=other), "weights"),
        (replace(run, recipe=replace(run.recipe, size=96)), r"\[64, 64\] there but \[96, 96\] here"),
    ):
        reset()
        with pytest.raises(ValueError, match=f"another teacher.*{said}.*--cache"):
            distil(wrong)
    reset()
    distil(run)
