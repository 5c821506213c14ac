"""The layers a report looks at: the ends of a network's stages."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from e2kd.errors import UnsupportedModel
from e2kd.modes import unwrap
from e2kd.probe import trace
from e2kd.sites import layout_in
from e2kd.stages import Layers


def stages(model: nn.Module, images: Tensor, count: int = 4) -> list[str]:
    """Names of at most `count` layers with a map, from early to late: ends of stages, those that a timm model tells,
    evenly spaced, else those that are found.

    Args:
        images: [n, C, H, W] as the model expects them; two of them are run.

    Raises:
        UnsupportedModel: when no stage ends in a module that can be read by its name.
    """
    model, images = unwrap(model), images[:2]
    names = evenly(_told(model, images), count) or _found(model, images, count)
    if not names:
        raise UnsupportedModel(
            f"No stages were found in {type(model).__name__} that end in a module of their own. Name layers through "
            "--layers."
        )
    return names


def _told(model: nn.Module, images: Tensor) -> list[str]:
    """The modules in a timm model's `feature_info` that return maps, in order."""
    info: Any = getattr(model, "feature_info", None) or []
    names = dict.fromkeys(str(stage["module"]) for stage in getattr(info, "info", info) if "module" in stage)
    if not names:
        return []
    found = trace(model, images)
    with_map = {call.name for call in found.calls if layout_in(call, found, model) is not None}
    return [name for name in names if name in with_map]


def _found(model: nn.Module, images: Tensor, count: int) -> list[str]:
    """The modules whose last output, which is what is read by a name, ends a stage."""
    try:
        turns = [stage.place.turn for stage in Layers(model, images).stages(count)]
    except UnsupportedModel:
        return []
    return [turn.name for turn in turns if turn.index == turn.count - 1]


def evenly(names: list[str], count: int) -> list[str]:
    """Some of the names, the last always, a stem's dropped first.

    >>> evenly(["stem", "layer1", "layer2", "layer3", "layer4"], 4)
    ['layer1', 'layer2', 'layer3', 'layer4']
    >>> evenly([f"blocks.{k}" for k in range(12)], 4)
    ['blocks.2', 'blocks.5', 'blocks.8', 'blocks.11']
    """
    return names[-count:] if len(names) <= count + 1 else _spread(names, count)


def paired(student: list[str], base: list[str]) -> list[tuple[str, str]]:
    """Stages of two models matched from early to late, as many as the one with fewer has.

    >>> paired(["a", "b", "c", "d"], ["x", "y"])
    [('b', 'x'), ('d', 'y')]
    """
    count = min(len(student), len(base))
    return list(zip(_spread(student, count), _spread(base, count), strict=True))


def _spread(names: list[str], count: int) -> list[str]:
    return [names[round((k + 1) * len(names) / count) - 1] for k in range(count)]
