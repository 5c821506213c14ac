"""What a host's log shows of a criterion: its parts, averaged over steps and processes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from e2kd.losses import SOMETIMES, E2KDLoss
from e2kd.modes import unwrap
from e2kd.tasks import nested


class Averages:
    """Adds up `.parts` after every training call of a criterion; nothing waits for the device before it is read.

    A part counts in the calls that had it: `cosine` where something was explained, `agreement` where the teacher was
    asked. `zero_maps` is the mean number of samples per call. `names` are those of all parts, of the criteria inside as
    well.

    Args:
        criterion: an `E2KDLoss`, or a method of `e2kd.baselines`, before or after it is wrapped for several processes.

    Raises:
        TypeError: for another criterion.

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

    def __init__(self, criterion: Any) -> None:
        if isinstance(criterion, nn.Module):
            criterion = unwrap(criterion)
        *self.inside, _ = nested(criterion)
        if not self.inside:
            raise TypeError(
                "Expected the criterion to be an E2KDLoss or a method of e2kd.baselines, around any other criterion, "
                f"but got {type(criterion).__name__}."
            )
        self.criterion, self.names = criterion, names_of(self.inside)
        self.last = criterion.parts.get("loss")
        self.sums: Tensor | None = None
        self.hook: RemovableHandle | None = None
        self.listen()

    def listen(self) -> None:
        """Add up from now on, with nothing of before; from the beginning an `Averages` does."""
        self.remove()
        self.sums = None
        self.hook = self.criterion.register_forward_hook(self._add)

    def remove(self) -> None:
        """Take the hook off the criterion."""
        if self.hook is not None:
            self.hook.remove()

    def _add(self, *_: object) -> None:
        parts = self.criterion.parts
        loss = parts.get("loss")
        if loss is None or loss is self.last:  # an evaluation, or a batch without masks
            return
        self.last = loss
        missing = torch.full_like(self.last, torch.nan)
        values = torch.stack([parts.get(name, missing).to(missing) for name in self.names])
        known = values.isnan().logical_not()
        for place, name in enumerate(self.names):
            if name in parts and name not in SOMETIMES:  # a nan in another part is a nan of the training
                known[place] = True
        new = torch.stack([torch.where(known, values, 0.0), known.to(values)])
        self.sums = new if self.sums is None else self.sums + new

    @property
    def step(self) -> int:
        """Training calls of the criterion that explains; 0 where there is none."""
        return max((one.step for one in self.inside if isinstance(one, E2KDLoss)), default=0)

    def resume(self, step: int) -> None:
        """The criterion goes on after so many training calls: what `every`, `during` and `fraction` depend on."""
        for one in self.inside:
            if isinstance(one, E2KDLoss):
                one.step = step

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
        return {} if sums is None else means(self.names, sums)


def names_of(inside: Sequence[Any]) -> tuple[str, ...]:
    """What the parts of these criteria are called, but the loss itself."""
    return tuple(dict.fromkeys(chain.from_iterable(one.part_names for one in inside)))


def means(names: Sequence[str], sums: Tensor) -> dict[str, float]:
    """Every part's sum [0] over its count [1], of those that have any.

    >>> means(("kd", "cosine"), torch.tensor([[6.0, 0.0], [3.0, 0.0]]))
    {'kd': 2.0}
    """
    table = sums.double().cpu()
    return {name: float(s / n) for name, s, n in zip(names, table[0], table[1], strict=True) if n > 0}
