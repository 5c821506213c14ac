"""fully_shard (FSDP2): what is sharded, and what it takes back before an explanation has used it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def is_sharded(parameter: Tensor) -> bool:
    """Whether fully_shard holds only a part of a parameter here, at this moment.

    >>> import torch
    >>> is_sharded(torch.zeros(3))
    False
    """
    return hasattr(parameter, "placements")


def is_group(module: nn.Module) -> bool:
    """Whether fully_shard shards a module's parameters in a group of their own.

    >>> is_group(nn.Linear(2, 2))
    False
    """
    return hasattr(module, "reshard")


def is_any_sharded(model: nn.Module) -> bool:
    """Whether any part of a model is sharded.

    >>> is_any_sharded(nn.Sequential(nn.Linear(2, 2)))
    False
    """
    return any(map(is_group, model.modules()))


def groups_of(model: nn.Module, names: Iterable[str]) -> list[Any]:
    """The groups that hold the parameters of modules of these names; none where the model is not sharded."""
    if not is_any_sharded(model):
        return []
    holders = dict.fromkeys(_holder(model, name.split(".")) for name in names)
    return [holder for holder in holders if holder is not None]


def gather(groups: Iterable[Any]) -> None:
    """The parameters of all ranks, until the next backward has used them. Every rank has to ask."""
    for group in groups:
        group.unshard()


def reshard(model: nn.Module) -> None:
    """Give back what a forward without a backward has gathered: the root's parameters are kept for a backward."""
    groups: Iterable[Any] = filter(is_group, model.modules())
    for group in groups:
        group.reshard()


def _holder(model: nn.Module, path: list[str]) -> nn.Module | None:
    """The group of a module itself, or of the next one around it."""
    around = (model.get_submodule(".".join(path[:length])) for length in range(len(path), -1, -1))
    return next(filter(is_group, around), None)
