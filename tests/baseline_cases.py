"""What two processes do in the tests of the rivals; `distributed_worker` starts them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from nets import cnn
from reference import gradient
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import e2kd
from e2kd.baselines import METHODS, Indexed

Batch = tuple[Tensor, Indexed]
SETTINGS: dict[str, dict[str, Any]] = {"CRD": {"negatives": 5, "width": 6}, "AFD": {"width": 5}}


def joint_batch() -> Batch:
    """Eight images of a data set of twelve; the ranks share them."""
    images = torch.rand(8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return images, Indexed(torch.arange(8) % 4, torch.arange(8) + 2, torch.full((8,), 12))


def of_rank(batch: Batch, rank: int) -> Batch:
    rows = slice(4 * rank, 4 * rank + 4)
    return batch[0][rows], Indexed(*(field[rows] for field in batch[1]))


def ranks_criterion(name: str) -> tuple[nn.Module, e2kd.E2KDLoss]:
    """A student, and e²KD on top of a rival."""
    student, teacher = cnn(seed=0), cnn(width=5, seed=1)
    example = joint_batch()[0][:2]
    torch.manual_seed(5)
    inner = METHODS[name](student, teacher, nn.CrossEntropyLoss(), example=example, **SETTINGS.get(name, {}))
    return student, e2kd.E2KDLoss(student, teacher, inner, example=example)


def trained(name: str) -> dict[str, Any]:
    student, criterion = ranks_criterion(name)
    model = DistributedDataParallel(student)
    loss_of: nn.Module = criterion
    if list(criterion.parameters()):
        loss_of = DistributedDataParallel(criterion, broadcast_buffers=False)
    images, targets = of_rank(joint_batch(), dist.get_rank())
    loss_of(model(images), targets).backward()
    return {"gradient": gradient(nn.ModuleList([student, criterion]))}


CASES = {f"rival-{name}": partial(trained, name) for name in METHODS}
