"""What a pass over a whole batch leaves, for a later pass over some of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

Layer = tuple[Tensor, ...]
Kept = list[Tensor | Layer | None]


class NotKept(Exception):
    """The statistics of the earlier pass don't fit to the later one."""


@dataclass(frozen=True)
class Using:
    """What a later pass is given, and which samples it runs."""

    given: Iterator[Tensor | Layer | None]
    rows: Tensor


_KEPT: ContextVar[Kept | None] = ContextVar("statistics that are kept", default=None)
_USING: ContextVar[Using | None] = ContextVar("statistics that are used", default=None)


@contextmanager
def keeping_statistics(kept: Kept) -> Iterator[None]:
    """Inside, `of_batch` and `of_layer` add what they return to `kept`, call by call."""
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)


@contextmanager
def using_statistics(kept: Kept, rows: Tensor) -> Iterator[None]:
    """Inside, what was kept is returned, call by call, with its graph.

    Args:
        kept: by `keeping_statistics`.
        rows: indices of the samples that are run.

    Raises:
        NotKept: when more or fewer calls come than were kept, or a statistic was needed in activation checkpointing.
    """
    using = Using(iter(kept), rows)
    token = _USING.set(using)
    try:
        yield
    finally:
        _USING.reset(token)
    if next(using.given, token) is not token:
        raise NotKept("fewer statistics were asked for than were kept")


def of_batch(compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` returns; or, where a part of a batch is run again, what it returned for the whole batch.

    >>> kept: Kept = []
    >>> with keeping_statistics(kept):
    ...     whole = of_batch(torch.tensor([1., 3.]).mean)
    >>> with using_statistics(kept, torch.tensor([1])):
    ...     of_batch(torch.tensor([3.]).mean)
    tensor(2.)
    """
    using, kept = _USING.get(), _KEPT.get()
    if using is not None:
        found = next(using.given, None)
        if not isinstance(found, Tensor):
            raise NotKept("a statistic was not kept, or was checkpointed")
        return found
    value = compute()
    if kept is not None:
        kept.append(None if is_checkpointed() else value)
    return value


def of_layer(run: Callable[[], Layer] | None) -> Layer | None:
    """What `run` returns; or, where a part of a batch is run again, the part that it returned for these samples.

    Args:
        run: returns tensors of the samples, [B, ...], and last of all a weight; None for what can't be kept.
    """
    using, kept = _USING.get(), _KEPT.get()
    if using is not None:
        found = next(using.given, using)
        if isinstance(found, (Using, Tensor)):
            raise NotKept("a layer was run that had not been kept")
        if found is not None:
            *samples, weight = found
            return *(t.index_select(0, using.rows) for t in samples), weight
    ran = None if run is None else run()
    if kept is not None:
        kept.append(ran)
    return ran


def is_checkpointed() -> bool:
    """Whether the code that runs now may run again inside of backward, where no context of its first run is left.

    >>> is_checkpointed()
    False
    """
    if not torch.is_grad_enabled():
        return True
    try:
        with disable_saved_tensors_hooks("only asked"):  # refused where a checkpoint's are in use
            return False
    except RuntimeError:
        return True
