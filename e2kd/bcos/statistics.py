"""Statistics over a whole batch, for a later pass over some of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Kept = list[Tensor | None]


class NotKept(Exception):
    """The statistics of the earlier pass don't fit to the later one."""


_KEPT: ContextVar[Kept | None] = ContextVar("statistics that are kept", default=None)
_USED: ContextVar[Iterator[Tensor | None] | None] = ContextVar("statistics that are used", default=None)


@contextmanager
def keeping_statistics(kept: Kept) -> Iterator[None]:
    """Inside, `of_batch` adds what it computes to `kept`, in the order of the calls."""
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)


@contextmanager
def using_statistics(kept: Kept) -> Iterator[None]:
    """Inside, `of_batch` returns what was kept, call by call, with its graph.

    Raises:
        NotKept: when more or fewer calls come than were kept, or one ran in activation checkpointing.
    """
    given = iter(kept)
    token = _USED.set(given)
    try:
        yield
    finally:
        _USED.reset(token)
    if next(given, token) is not token:
        raise NotKept("fewer statistics were asked for than were kept")


def of_batch(compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` returns; or, where a part of a batch is run again, what it returned for the whole batch.

    >>> kept: Kept = []
    >>> with keeping_statistics(kept):
    ...     whole = of_batch(torch.tensor([1., 3.]).mean)
    >>> with using_statistics(kept):
    ...     of_batch(torch.tensor([3.]).mean)
    tensor(2.)
    """
    used = _USED.get()
    if used is not None:
        found = next(used, None)
        if found is None:
            raise NotKept("a statistic was not kept, or was checkpointed")
        return found
    value, kept = compute(), _KEPT.get()
    if kept is not None:
        kept.append(None if is_checkpointed() else value)
    return value


def is_checkpointed() -> bool:
    """Whether the code that runs now may run again inside of backward, where no context of its first run is left.

    >>> is_checkpointed()
    False
    """
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
