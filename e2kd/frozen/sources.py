"""Reading a data set for a teacher: canonical images with their rows, and what could not be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from e2kd.errors import shape
from e2kd.frozen.errors import listed
from e2kd.frozen.exact import exact
from e2kd.frozen.samples import image_and_label, pixel_hash
from e2kd.frozen.views import CanonicalView

SHOWN = 10  # unreadable samples that a message lists
READ_AGAIN, READINGS = 4, 4  # samples, and readings of each: one flip in two passes once in 4096


class Sample(NamedTuple):
    """Row, canonical image [C, H, W], label and hash of the name."""

    row: int
    image: Tensor
    label: Any
    id: int


class Unreadable(NamedTuple):
    """A sample that raised, and what it said."""

    row: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """Images [B, C, H, W], labels [B], ids [B]; and the samples of this batch that could not be read."""

    shard: int
    images: Tensor
    labels: list[Any]
    ids: np.ndarray
    unreadable: list[Unreadable]


class Source(Dataset[Sample | Unreadable]):
    """A data set as the teacher sees it. A sample that can't be read is reported, not raised."""

    def __init__(self, dataset: Any, view: CanonicalView, hashes: np.ndarray | None) -> None:
        self.dataset, self.view, self.hashes = dataset, view, hashes
        self.exact = exact(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, row: int) -> Sample:
        """One sample; raises what the data set raises."""
        image, label = image_and_label(self.exact[row])
        image = self.view(image)
        return Sample(row, image, label, pixel_hash(image) if self.hashes is None else int(self.hashes[row]))

    def __getitem__(self, row: int) -> Sample | Unreadable:
        try:
            return self.read(row)
        except Exception as error:  # data sets raise anything; all of it is reported when the pass ends
            return Unreadable(row, f"{type(error).__name__}: {error}")


def batches(source: Source, shards: dict[int, range], size: int, workers: int) -> Iterator[Batch]:
    """Batches of at most `size` rows, none of which crosses a shard: so a shard is the same whoever computes it."""
    plan = [(k, rows[i : i + size]) for k, rows in shards.items() for i in range(0, len(rows), size)]
    loader = DataLoader(
        source,
        batch_sampler=[list(rows) for _, rows in plan],
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator().manual_seed(0),  # the caller's random numbers stay what they were
    )
    for (shard, _), samples in zip(plan, loader, strict=True):
        yield _stacked(shard, samples)


def _stacked(shard: int, samples: list[Sample | Unreadable]) -> Batch:
    good = [sample for sample in samples if isinstance(sample, Sample)]
    sizes = {tuple(sample.image.shape): sample.row for sample in good}
    if len(sizes) > 1:
        (one, row), (other, place) = list(sizes.items())[:2]
        raise ValueError(
            f"Sample {row} is {shape(one)} but sample {place} is {shape(other)}: images must come in one size. Pass "
            "view=256, or another side, to freeze."
        )
    return Batch(
        shard,
        torch.stack([sample.image for sample in good]) if good else torch.empty(0),
        [sample.label for sample in good],
        np.array([sample.id for sample in good], np.uint64),
        [sample for sample in samples if isinstance(sample, Unreadable)],
    )


def check_numbered(dataset: Any) -> None:
    """Raise a TypeError for a stream, whose samples have no numbers."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"Expected a data set whose samples have numbers, but {type(dataset).__name__} is a stream. Write "
            "its samples to disk, or wrap it in a data set with __len__ and __getitem__."
        )


def check_deterministic(source: Source) -> Sample:
    """The first sample; a ValueError when each reading is another image, a TypeError for a stream without numbers."""
    check_numbered(source.dataset)
    if not len(source):
        raise ValueError("Expected a data set with at least one sample, but it is empty.")
    if (row := unsteady(source)) is not None:
        raise ValueError(
            f"The data set gives another image each time it is asked for sample {row}, so it has a random transform. "
            "Freeze it without: random changes belong into JointAugmentation, which moves image and map together."
        )
    return source.read(0)


def spread(count: int, many: int) -> list[int]:
    """At most so many places, from the first to the last of `count`.

    >>> spread(10, 4), spread(2, 4), spread(0, 4)
    ([0, 3, 6, 9], [0, 1], [])
    """
    return list(dict.fromkeys(k * (count - 1) // (many - 1) for k in range(many if count else 0)))


def unsteady(source: Source) -> int | None:
    """A sample that differs from one reading to the next; None if none does of a few that are spread over the data set.

    One that can't be read is passed over, and told of when its turn comes.
    """
    for row in spread(len(source), READ_AGAIN):
        first = source[row]
        again = (source[row] for _ in range(READINGS - 1))
        if isinstance(first, Sample) and any(
            isinstance(other, Sample) and not torch.equal(first.image, other.image) for other in again
        ):
            return row
    return None


def unreadable_message(unreadable: list[Unreadable], done: int, total: int) -> str:
    """What could not be read, what is kept, and how to go on."""
    said = listed([f"sample {sample.row}: {sample.reason}" for sample in unreadable], SHOWN)
    return (
        f"{len(unreadable)} samples could not be read: {said}. {done} of {total} shards are finished and kept. "
        "Repair the files, or freeze a data set without them, and run freeze again: only missing shards are computed."
    )
