"""Short runs at full scale: tiny folders, tiny networks, one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState

from benchmarks.full_scale import QUICK
from benchmarks.full_scale_data import Split
from benchmarks.full_scale_presets import PRESETS
from benchmarks.full_scale_run import Run

Make = Callable[[str], Path]


def reset() -> None:
    """As in a new process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def names(split: Split) -> list[str]:
    return [Path(path).relative_to(split.root).as_posix() for path, _ in split.samples]


def targets(split: Split) -> list[Any]:
    return [target for _, target in split.samples]


def run_on(folder: Path, out: Path, layout: str, **changed: Any) -> Run:
    """A short run of tiny networks."""
    recipe = replace(PRESETS[layout], **QUICK | changed.pop("recipe", {}))
    return Run(recipe, layout, folder, out, pretrained=False, workers=0, cpu=True, **changed)
