"""What two processes do in the tests of the metrics and the monitor; `distributed_worker` starts them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from faithfulness_cases import faithfulness
from nets import cnn
from torch import Tensor, nn

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


def monitored(*, sharded: bool) -> Result:
    """Three steps of training with the monitor in the loop, and the same without it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from e2kd.monitor import TransferMonitor
    from e2kd.transfer import scores_of, unicam

    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 3
    logged: list[tuple[int, dict[str, float]]] = []

    def train(watched: bool) -> tuple[nn.Module, list[float]]:
        student, alone = cnn(seed=0).float(), []
        if sharded:
            fully_shard(student, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        model = student if sharded else DistributedDataParallel(student)
        optimizer = torch.optim.SGD(student.parameters(), 0.1)
        monitor = TransferMonitor(
            model,
            cnn(seed=3).float(),
            (images, labels),
            lambda scalars, step: logged.append((step, scalars)),
            layers=["3"],
            every=2,
            max_share=None,
        )
        for step in range(3):
            nn.functional.cross_entropy(model(images[dist.get_rank() :: 2]), labels[dist.get_rank() :: 2]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if watched:
                monitor(step)
        if not sharded:
            layer = unicam(student, cnn(seed=3).float(), images, labels, ["3"]).layers["3"]
            alone.append(scores_of(layer.sums)["fss"].value)
        return student, alone

    plain, _ = train(False)
    watched, alone = train(True)
    pairs = zip(plain.parameters(), watched.parameters(), strict=True)
    apart = max((_local(a) - _local(b)).abs().max().item() for a, b in pairs)
    last = logged[-1][1]["e2kd/probe/fss/3"] if logged else 0.0
    return {
        "apart": apart,
        "steps": [step for step, _ in logged],
        "fss": last,
        "fss_alone": alone[0] if alone else last,
    }


def _local(parameter: Tensor) -> Tensor:
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()


CASES = {
    "metrics-uneven": partial(metrics, idle=False),
    "metrics-idle": partial(metrics, idle=True),
    "faithfulness-uneven": partial(faithfulness, idle=False),
    "faithfulness-idle": partial(faithfulness, idle=True),
    "monitor-ddp": partial(monitored, sharded=False),
    "monitor-sharded": partial(monitored, sharded=True),
}
