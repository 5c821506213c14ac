"""Accelerate: the parts of the loss in its trackers, and what a resumed run needs."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from e2kd.baselines.base import Baseline
from e2kd.losses import E2KDLoss
from e2kd.trainers.averages import Averages


class Parts:
    """Logs the parts of a criterion through `accelerator.log`, as `e2kd/kd`, `e2kd/explanation` ...

    They are means over the steps since the last log and over all processes. The criterion itself needs nothing of
    this: it works before and after `accelerator.prepare`.

    Args:
        accelerator: whose trackers are used, once `init_trackers` was called.
        criterion: an `E2KDLoss`, or a method of `e2kd.baselines`; the parts of a criterion inside are logged as well.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = lambda: torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    ...     torch.nn.Linear(4, 5))
    >>> student = net()
    >>> criterion = E2KDLoss(student, net())
    >>> parts = Parts(Accelerator(cpu=True), criterion)
    >>> loss = criterion(student(torch.rand(2, 3, 16, 16)))
    >>> sorted(parts.log(step=1))
    ['e2kd/agreement', 'e2kd/cosine', 'e2kd/explanation', 'e2kd/kd', 'e2kd/task', 'e2kd/zero_maps']
    """

    def __init__(self, accelerator: Accelerator, criterion: E2KDLoss | Baseline) -> None:
        self.accelerator, self.averages = accelerator, Averages(criterion)

    def log(self, step: int | None = None) -> dict[str, float]:
        """Log the means since the last call, and return them. Every process has to call it."""
        values = {f"e2kd/{name}": value for name, value in self.averages.take().items()}
        self.accelerator.log(values, step=step)
        return values

    def state_dict(self) -> dict[str, Any]:
        """How many steps there were, for `accelerator.register_for_checkpointing(parts)`.

        A criterion with `every`, `max_classes` or `fraction` then goes on after a resume as if it had not been
        interrupted. The means since the last log are not kept: the first log after a resume is of the steps since then.
        """
        return {"step": self.averages.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.averages.resume(state["step"])
