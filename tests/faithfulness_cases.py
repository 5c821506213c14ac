"""Batches for every metric of faithfulness, for one process or two."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from nets import cnn

BATCHES = (4, 7, 5)  # samples


METRICS = {
    "agreement": ("Agreement", ()),
    "worst_group": ("WorstGroupAccuracy", (2,)),
    "similarity": ("ExplanationSimilarity", ()),
    "epg": ("EnergyPointingGame", ()),
    "iou": ("ExplanationIoU", ()),
    "shifts": ("ShiftEquivariance", (cnn(seed=2).float(), (1, 4), 16)),
}


def faithfulness_metric(name: str) -> Any:
    """A new one, of a library that other tests' processes need not load."""
    from e2kd import metrics

    kind, settings = METRICS[name]
    return getattr(metrics, kind)(*settings)


def faithfulness_batch(name: str, n: int) -> tuple[Any, ...]:
    """What a metric is updated with; some of the regions are empty and some of the maps blank."""
    generator = torch.Generator().manual_seed(n)
    if name == "agreement":
        return tuple(torch.randn(n, 3, generator=generator) for _ in range(2))
    if name == "worst_group":
        return torch.randn(n, 2, generator=generator), torch.arange(n) % 2, torch.arange(n) % 2
    if name == "shifts":
        return (torch.rand(n, 3, 16, 20, generator=generator),)
    maps = torch.rand(n, 1, 4, 4, generator=generator)
    maps[1] = 0
    if name == "similarity":
        return maps, torch.rand(n, 1, 8, 8, generator=generator)
    return maps, torch.rand(n, 8, 8, generator=generator) * (torch.arange(n) > 0)[:, None, None]


def faithfulness(*, idle: bool) -> dict[str, Any]:
    """Rank 0 has the first two batches, rank 1 the third, or none."""
    mine = BATCHES[:2] if dist.get_rank() == 0 else () if idle else BATCHES[2:]
    found = {}
    for name in METRICS:
        metric = faithfulness_metric(name)
        for n in mine:
            metric.update(*faithfulness_batch(name, n))
        found[name] = {"value": metric.compute(), "n": metric.score().n, "left_out": metric.score().left_out}
    return found
