"""Which process watches, and how several agree."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from e2kd.modes import device_of
from e2kd.sharding import is_sharded


def is_main() -> bool:
    """Whether this is the process that logs: rank 0, or the only one.

    >>> is_main()
    True
    """
    return not _many() or dist.get_rank() == 0


def takes_all(*models: nn.Module) -> bool:
    """Whether a forward needs all processes, because a model's parameters are sharded among them.

    >>> takes_all(nn.Linear(2, 2))
    False
    """
    return _many() and any(is_sharded(parameter) for model in models for parameter in model.parameters())


def agreed(said: bool, like: nn.Module) -> bool:
    """What rank 0 says; every process must ask."""
    told = torch.tensor(int(said), device=device_of(like, torch.device("cpu")))
    dist.broadcast(told, 0)
    return bool(told.item())


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
