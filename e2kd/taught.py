"""What a frozen teacher says about images, in the place of their labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Fields(NamedTuple):
    labels: Any
    logits: Tensor
    maps: Tensor
    valid: Tensor
    classes: Tensor
    cache: Tensor


class Taught(_Fields):
    """Labels with what the teacher said, as one value that travels where labels travel.

    A named tuple of tensors with `.to()`: `default_collate` stacks it, Accelerate, timm and Hugging Face move it. An
    `E2KDLoss` with a frozen teacher takes it as its targets and gives `labels` on to the criterion.

    Attributes:
        labels: [B], or whatever the data set has.
        logits: the teacher's, [B, K] float32.
        maps: its explanations in the frame of the image they come with, [B, C, h, w] float32, those of all classes
            one after another, [B, K * C, h, w], where it was frozen with classes="all"; [B, 0, 0, 0] from a cache of
            logits alone.
        valid: share in [0, 1] of each cell for which the teacher's map is known, [B, 1, h, w]: augmentations move
            cells out of the frame.
        classes: which class the maps explain, [B] int64; the teacher's top class where they explain all.
        cache: number of the cache they come from, [B] int64. Criteria of other caches refuse them; 0, the default,
            matches any.

    >>> import torch
    >>> one = Taught(torch.tensor(3), torch.zeros(5), torch.zeros(1, 7, 7), torch.ones(1, 7, 7), torch.tensor(2))
    >>> batch = torch.utils.data.default_collate([one, one])
    >>> type(batch).__name__, batch.logits.shape, batch.to(torch.float64).maps.dtype
    ('Taught', torch.Size([2, 5]), torch.float64)
    """

    __slots__ = ()

    def __new__(cls, labels: Any, *rest: Tensor) -> Taught:
        """All fields, or all but the last; or one iterable of them, as hosts rebuild tuples (Hugging Face Trainer)."""
        if len(rest) == len(cls._fields) - 2:
            rest = (*rest, torch.zeros_like(rest[-1], dtype=torch.int64))
        return super().__new__(cls, *_rebuilt(cls._fields, labels, rest))

    def to(self, *args: Any, **kwargs: Any) -> Taught:
        """Every field as `Tensor.to` gives it; a type is for what is floating-point alone."""
        return type(self)(*(_to(field, args, kwargs) for field in self))

    def ne(self, value: Any) -> Any:
        """`labels != value`: Hugging Face's Trainer counts the samples of an accumulated batch so."""
        return self.labels.ne(value)

    @property
    def explains(self) -> bool:
        """Whether there are maps."""
        return self.maps.numel() > 0


class _IndexedFields(NamedTuple):
    labels: Any
    indices: Tensor
    counts: Tensor


class Indexed(_IndexedFields):
    """Labels with the places of their samples in the data set, as one value that travels where labels travel.

    What `e2kd.baselines.IndexedDataset` gives; `default_collate` stacks it, and every criterion of e2kd gives `labels`
    on to the criterion it wraps.

    Attributes:
        labels: [B], or whatever the data set has.
        indices: of the samples, [B] int64.
        counts: samples of the data set, the same number for each, [B] int64.

    >>> import torch
    >>> one = Indexed(torch.tensor(3), torch.tensor(17), torch.tensor(50_000))
    >>> torch.utils.data.default_collate([one, one]).indices
    tensor([17, 17])
    """

    __slots__ = ()

    def __new__(cls, labels: Any, *rest: Tensor) -> Indexed:
        """All three fields; or one iterable of them, as hosts rebuild tuples (Hugging Face Trainer)."""
        return super().__new__(cls, *_rebuilt(cls._fields, labels, rest))

    def to(self, *args: Any, **kwargs: Any) -> Indexed:
        """Every field as `Tensor.to` gives it; a type is for what is floating-point alone."""
        return type(self)(*(_to(field, args, kwargs) for field in self))

    def ne(self, value: Any) -> Any:
        """`labels != value`: Hugging Face's Trainer counts the samples of an accumulated batch so."""
        return self.labels.ne(value)


def all_known(maps: Tensor) -> Tensor:
    """The `valid` of maps [B, C, h, w] of which every cell is known, [B, 1, h, w].

    >>> import torch
    >>> all_known(torch.zeros(2, 6, 3, 3)).shape
    torch.Size([2, 1, 3, 3])
    """
    return maps.new_ones(len(maps), 1, *maps.shape[-2:])


def labels_of(targets: Any) -> Any:
    """The labels alone, of targets with or without lessons or indices.

    >>> labels_of(3)
    3
    """
    return targets.labels if isinstance(targets, (Taught, Indexed)) else targets


def _rebuilt(names: tuple[str, ...], first: Any, rest: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The fields, which came one by one or as one iterable."""
    whole = not rest and isinstance(first, Iterable) and not isinstance(first, Tensor)
    fields = tuple(first) if whole else (first, *rest)
    if len(fields) != len(names):
        raise TypeError(f"Expected the fields {', '.join(names)}, but got {len(fields)} values.")
    return fields


def _to(field: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(field, (list, tuple)) and not hasattr(field, "_fields"):  # several labels of each sample
        return type(field)(_to(part, args, kwargs) for part in field)
    if isinstance(field, dict):
        return {key: _to(part, args, kwargs) for key, part in field.items()}
    if not isinstance(field, Tensor):
        return field
    moved = field.to(*args, **kwargs)
    return moved if field.is_floating_point() else moved.to(field.dtype)
