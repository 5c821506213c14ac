"""What a host's log shows of a criterion: its parts, averaged over steps and processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from e2kd.losses import E2KDLoss

PARTS = ("task", "kd", "explanation", "cosine", "agreement", "zero_maps")
ALWAYS = ("task", "kd", "explanation", "zero_maps")  # a nan in one of these is a nan of the training


class Averages:
    """Adds up `.parts` after every training call of a criterion; nothing waits for the device before it is read.

    A part counts in the calls that had it: `cosine` where something was explained, `agreement` where the teacher was
    asked. `zero_maps` is the mean number of samples per call.

    >>> _ = torch.manual_seed(0)
    >>> net = lambda: torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    ...     torch.nn.Linear(4, 5))
    >>> student, teacher = net(), net()
    >>> criterion = E2KDLoss(student, teacher)
    >>> averages = Averages(criterion)
    >>> for _ in range(3):
    ...     _ = criterion(student(torch.rand(2, 3, 16, 16)))
    >>> sorted(averages.take())
    ['agreement', 'cosine', 'explanation', 'kd', 'task', 'zero_maps']
    >>> averages.take()
    {}
    """

    def __init__(self, criterion: object) -> None:
        if not isinstance(criterion, E2KDLoss):
            raise TypeError(f"Expected the criterion to be an E2KDLoss, but got {type(criterion).__name__}.")
        self.criterion = criterion
        self.step = criterion.step
        self.sums: Tensor | None = None
        criterion.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        if self.criterion.step == self.step:  # an evaluation
            return
        self.step = self.criterion.step
        parts = self.criterion.parts
        missing = torch.full_like(parts["loss"], torch.nan)
        values = torch.stack([parts.get(name, missing).to(missing) for name in PARTS])
        known = values.isnan().logical_not()
        for name in ALWAYS:
            known[PARTS.index(name)] = True
        new = torch.stack([torch.where(known, values, 0.0), known.to(values)])
        self.sums = new if self.sums is None else self.sums + new

    def resume(self, step: int) -> None:
        """The criterion goes on after so many training calls: what `every`, `during` and `fraction` depend on."""
        self.criterion.step = self.step = step

    def sums_of_all(self) -> Tensor | None:
        """Sums and counts since the last call, [2, parts], over all processes; None where there was no call.

        Every process has to call it, and all alike.
        """
        sums, self.sums = self.sums, None
        if sums is not None and dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        return sums

    def take(self) -> dict[str, float]:
        """Means since the last call, over steps and processes. Every process has to call it."""
        sums = self.sums_of_all()
        return {} if sums is None else means(sums)


def means(sums: Tensor) -> dict[str, float]:
    """Every part's sum [0] over its count [1], of those that have any.

    >>> means(torch.tensor([[6.0] * 6, [3.0] * 5 + [0.0]]))["kd"]
    2.0
    """
    table = sums.double().cpu()
    return {name: float(s / n) for name, s, n in zip(PARTS, table[0], table[1], strict=True) if n > 0}
