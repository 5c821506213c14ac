"""What a model that does not change was found to say of the probe, so that it is asked once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from e2kd.sharding import is_sharded

T = TypeVar("T")
GOLDEN = (5**0.5 - 1) / 2  # its multiples, without the whole part, are all different and evenly spread


class Fixed(Generic[T]):
    """Keeps what was found of a model for as long as its parameters and buffers stay the same, in any mode.

    A model whose parameters are sharded is asked anew every time, since all ranks have to ask it together.

    Args:
        worth: whether to keep what was found, if it might be too large.

    >>> model, asked = nn.Linear(2, 2), Fixed()
    >>> asked(model, lambda: "first"), asked(model, lambda: "second")
    ('first', 'first')
    >>> _ = nn.init.zeros_(model.weight)
    >>> asked(model, lambda: "third")
    'third'
    """

    def __init__(self, worth: Callable[[T], bool] = lambda found: True) -> None:
        self.worth = worth
        self.kept: tuple[Tensor, T] | None = None

    def __call__(self, model: nn.Module, ask: Callable[[], T]) -> T:
        """What was found of the model, or `ask()` where it is another than it was."""
        state = fingerprint(model)
        if state is not None and self.kept is not None and _same(self.kept[0], state):
            return self.kept[1]
        self.kept = None  # before asking: what is old need not take room
        found = ask()
        if state is not None and self.worth(found):
            self.kept = state, found
        return found


def fingerprint(model: nn.Module) -> Tensor | None:
    """Sums of all parameters and buffers, [m] float64 on their device; None if the parameters are sharded.

    By content, since writing to `.data` leaves no other trace; the time of reading the weights once. Every value weighs
    as its place does, so that another sign or order is another sum.

    >>> fingerprint(nn.Linear(2, 2)).shape
    torch.Size([2])
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_sharded(t) for t in tensors):
        return None
    with torch.no_grad():
        sums = [_weighted(t).to(tensors[0].device) for t in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def _weighted(tensor: Tensor) -> Tensor:
    values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().flatten().double()
    places = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
    return values @ (places * GOLDEN).frac_().add_(0.5)


def _same(before: Tensor, now: Tensor) -> bool:
    return before.device == now.device and torch.equal(before, now)
