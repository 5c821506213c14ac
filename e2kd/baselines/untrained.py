"""Trainable parts that the trainer's optimizer was not given: the student learns beside them, and they stay random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from e2kd.errors import warn_user
from e2kd.sharding import is_sharded

STEPS = 50  # between two looks
VALUES = 1000  # compared of a parameter
UNTRAINED = (
    "The student has learned for {steps} steps and the trainable parts of {name} are what they were, so its term "
    "compares with random layers. Give them to the optimizer: SGD([*student.parameters(), *criterion.parameters()])."
)


class Watch:
    """Looks every so many steps whether a criterion's own parts are trained with the student, and warns once if not.

    Reading what changed waits for the device, in one step of fifty, and no more once the answer is known.
    """

    def __init__(self) -> None:
        self.known, self.steps = False, 0
        self.before: tuple[Tensor, Tensor] | None = None

    def look(self, name: str, parts: Iterable[nn.Parameter], student: Iterable[nn.Parameter]) -> None:
        """One training step with a term that gives the parts a gradient."""
        if self.known:
            return
        self.steps += 1
        if self.before is not None and self.steps % STEPS:
            return
        mine, theirs = _some(parts), _some(student)
        if mine is None or theirs is None:  # nothing that could be trained
            self.known = True
            return
        now = mine, theirs
        if self.before is None or not all(map(_comparable, self.before, now)):
            self.before = now
            return
        trained, learned = (not torch.equal(*pair) for pair in zip(self.before, now, strict=True))
        self.known = trained or learned
        if learned and not trained:
            warn_user(UNTRAINED.format(steps=self.steps, name=name))


def _some(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Values of the largest trainable parameter, those of this rank where it is sharded."""
    largest = max(filter(lambda p: p.requires_grad, parameters), key=torch.numel, default=None)
    if largest is None:
        return None
    local: Any = largest
    if is_sharded(largest):
        local = local.to_local()
    found: Tensor = local.detach().flatten()[:VALUES].clone()
    return found


def _comparable(before: Tensor, now: Tensor) -> bool:
    """Whether a network was not moved to another device or type meanwhile."""
    return before.device == now.device and before.dtype == now.dtype
