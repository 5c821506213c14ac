"""What two processes do in the tests of the metrics and the monitor; `distributed_worker` starts them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Result = dict[str, Any]
Batch = tuple[Tensor, Tensor, Tensor]  # student's and base's features, labels


def transfer_batches() -> list[Batch]:
    """Three batches of different sizes; the ranks of a test share them."""
    found = []
    for n in (6, 9, 12):
        generator = torch.Generator().manual_seed(n)
        labels = torch.arange(n) % 3
        student = torch.randn(n, 7, generator=generator) + labels[:, None]
        found.append((student, student[:, :5] + torch.randn(n, 5, generator=generator), labels))
    return found


def metrics(*, idle: bool) -> Result:
    """Rank 0 has the first two batches, rank 1 the third, or none."""
    from e2kd.metrics import FeatureSimilarityScore, RelevanceScore

    batches = transfer_batches()
    mine = batches[:2] if dist.get_rank() == 0 else [] if idle else batches[2:]
    fss, rs = FeatureSimilarityScore(), RelevanceScore()
    for student, base, labels in mine:
        fss.update(student, base)
        rs.update(student, labels, base)
    return {"fss": fss.compute(), "rs": rs.compute(), "n": fss.score().n, "error": rs.score().error}


CASES = {
    "metrics-uneven": partial(metrics, idle=False),
    "metrics-idle": partial(metrics, idle=True),
}
