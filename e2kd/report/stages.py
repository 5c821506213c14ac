"""The layers a report looks at: the ends of a network's stages."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from e2kd.errors import UnsupportedModel
from e2kd.modes import unwrap
from e2kd.probe import trace
from e2kd.sites import layout_in


def stages(model: nn.Module, images: Tensor, count: int = 4) -> list[str]:
    """Names of at most `count` layers with a map, from early to late: evenly spaced ends of a timm model's stages.

    Args:
        images: [n, C, H, W] as the model expects them; two of them are run.

    Raises:
        UnsupportedModel: when the model does not tell its stages (timm's `feature_info`).
    """
    model = unwrap(model)
    found = trace(model, images[:2])
    with_map = {call.name for call in found.calls if layout_in(call, found, model) is not None}
    names = [name for name in _told(model) if name in with_map]
    if not names:
        raise UnsupportedModel(
            f"{type(model).__name__} does not tell the layers at which its stages end. Name them through --layers."
        )
    return evenly(names, count)


def _told(model: nn.Module) -> list[str]:
    """The modules in a timm model's `feature_info`, in order."""
    info: Any = getattr(model, "feature_info", None) or []
    return list(dict.fromkeys(str(stage["module"]) for stage in getattr(info, "info", info) if "module" in stage))


def evenly(names: list[str], count: int) -> list[str]:
    """Some of the names, the last always, a stem's dropped first.

    >>> evenly(["stem", "layer1", "layer2", "layer3", "layer4"], 4)
    ['layer1', 'layer2', 'layer3', 'layer4']
    >>> evenly([f"blocks.{k}" for k in range(12)], 4)
    ['blocks.2', 'blocks.5', 'blocks.8', 'blocks.11']
    """
    if len(names) <= count + 1:
        return names[-count:]
    return [names[round((k + 1) * len(names) / count) - 1] for k in range(count)]


def paired(student: list[str], base: list[str]) -> list[tuple[str, str]]:
    """Stages of two models matched from early to late, as many as the one with fewer has.

    >>> paired(["a", "b", "c", "d"], ["x", "y"])
    [('b', 'x'), ('d', 'y')]
    """
    count = min(len(student), len(base))
    return list(zip(_spread(student, count), _spread(base, count), strict=True))


def _spread(names: list[str], count: int) -> list[str]:
    return [names[round((k + 1) * len(names) / count) - 1] for k in range(count)]
