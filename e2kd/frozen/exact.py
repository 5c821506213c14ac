"""Data sets that raise where they would give another sample in the place of one that can't be read."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import ConcatDataset, Subset

SKIPPED = (
    "timm's data set could not read sample {asked}{name} and would give sample {given} in its place, with the lesson "
    'of another image. The reason is in timm\'s log, "Skipped sample". Repair the file, or leave it out.'
)


def exact(dataset: Any) -> Any:
    """The data set itself, or one that reads the same samples and raises where timm's would skip some.

    >>> exact([3, 4])
    [3, 4]
    """
    if isinstance(dataset, Subset):
        inside = exact(dataset.dataset)
        return dataset if inside is dataset.dataset else _with(dataset, dataset=inside)
    if isinstance(dataset, ConcatDataset):
        parts = [exact(part) for part in dataset.datasets]
        same = all(part is before for part, before in zip(parts, dataset.datasets, strict=True))
        return dataset if same else _with(dataset, datasets=parts)
    ours = any(kind.__module__.startswith("timm.data") for kind in type(dataset).__mro__)
    return _Exact(dataset) if ours and hasattr(dataset, "reader") else dataset


def _with(original: Any, **changes: Any) -> Any:
    """A shallow copy with other attributes."""
    changed = copy.copy(original)
    changed.__dict__.update(changes)
    return changed


class _Exact:
    """timm's data set, whose every read may ask its reader for one sample alone."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _with(self.dataset, reader=_Only(self.dataset.reader, index))[index]


class _Only:
    """A timm reader that gives one sample; what it raises otherwise is none of the errors that timm passes over."""

    def __init__(self, reader: Any, index: int) -> None:
        self.reader, self.index = reader, index

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Any:
        if index != self.index:
            raise ValueError(SKIPPED.format(asked=self.index, name=self._name(), given=index))
        return self.reader[index]

    def _name(self) -> str:
        """Which file it is, where the reader knows."""
        named = getattr(self.reader, "filename", None)
        return f" ({named(self.index)!r})" if callable(named) else ""
