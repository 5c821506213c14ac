"""Two processes, one of which dies in its second epoch: `killed_worker.py train FOLDER`, then `... resume FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import e2kd
from benchmarks.hosts import equal
from benchmarks.hosts_loops import Cell, trained

CELL = Cell("accelerate")
FATAL = 3  # the step in which the second process dies: the first epoch has two


class Fatal(e2kd.E2KDLoss):
    """Kills the second process."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.training and torch.is_grad_enabled() and self.step == FATAL - 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(*args, **kwargs)


def train(folder: Path) -> None:
    whole = trained(CELL, folder / "whole")
    if dist.get_rank() == 0:
        torch.save(whole.student, folder / "whole.pt")
    e2kd.E2KDLoss = Fatal  # type: ignore[misc]
    trained(CELL, folder / "killed")
    (folder / "killed" / "done").touch()


def resume(folder: Path) -> None:
    found = trained(CELL, folder / "resumed", folder / "killed")
    if equal(found.student, torch.load(folder / "whole.pt", weights_only=True)):
        (folder / "equal").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    {"train": train, "resume": resume}[sys.argv[1]](Path(sys.argv[2]))
