"""A memory of both networks' embeddings of every sample of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from e2kd.taught import Indexed

DICT = (
    "Expected samples (image, label), but the data set gave a dict with {keys}. Wrap the data set so that it gives "
    "(image, label), and this around it."
)
ROWS = ("student", "teacher", "labels")  # buffers with a row for each sample


class IndexedDataset(Dataset[Any]):
    """A data set whose labels carry their samples' places: (image, `Indexed`) for (image, label).

    Every criterion of e2kd takes such targets, `CRD` needs them; your criterion is given the labels alone.

    Args:
        dataset: anything with `len` that gives (image, label).

    Raises:
        TypeError: with the first sample, when those are dicts or no pairs.

    >>> image, target = IndexedDataset([("a", 3), ("b", 1)])[1]
    >>> image, target.labels, target.indices, target.counts
    ('b', 1, tensor(1), tensor(2))
    """

    def __init__(self, dataset: Dataset[Any] | Sequence[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Indexed]:
        sample = self.dataset[index]
        if isinstance(sample, dict):  # of two entries, its names would be taken for image and label
            raise TypeError(DICT.format(keys=sorted(sample)))
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise TypeError(f"Expected samples (image, label), but got {type(sample).__name__} {sample!r:.60}.")
        image, label = sample
        index = index + len(self) if index < 0 else index
        return image, Indexed(label, torch.tensor(index), torch.tensor(len(self)))


class ContrastMemory(nn.Module):
    """What CRD remembers of every sample (Tian et al. 2020, Sec. 3.3): embeddings, and labels as they come.

    It is empty until it is told how many samples there are, by `fit` or by a checkpoint.

    Args:
        width: of embeddings.
        momentum: share of the old embedding in a renewed one.

    >>> memory = ContrastMemory(8, momentum=0.5)
    >>> memory.fit(torch.tensor([20, 20]))
    >>> memory.teacher.shape, memory.labels[:3]
    (torch.Size([20, 8]), tensor([-1, -1, -1]))
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    partition: Tensor

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__()
        self.width, self.momentum = width, momentum
        self.register_buffer("student", torch.empty(0, width))
        self.register_buffer("teacher", torch.empty(0, width))
        self.register_buffer("labels", torch.empty(0, dtype=torch.long))
        self.register_buffer("partition", torch.full((2,), -1.0))  # Z of both directions, from the first batch
        self.seed, self.draws = torch.initial_seed(), 0

    def fit(self, counts: Tensor) -> None:
        """Make room for as many samples as the data set has, unless that was done.

        Raises:
            ValueError: when there already is room for another number.
        """
        known = len(self.labels)
        if known and (counts.device.type != "cpu" or known == int(counts[0])):
            return
        if known:
            raise ValueError(
                f"The memory holds {known} samples, but the data set has {int(counts[0])}. Train with the data set it "
                "was made for, or build the criterion anew."
            )
        count, like = int(counts[0]), self.partition
        generator = torch.Generator().manual_seed(0)
        bound = (3 / self.width) ** 0.5
        first, second = (
            ((2 * torch.rand(count, self.width, generator=generator) - 1) * bound).to(like) for _ in range(2)
        )
        self.student, self.teacher = first, second
        self.labels = torch.full((count,), -1, dtype=torch.long, device=like.device)

    @torch.no_grad()
    def draw(self, indices: Tensor, labels: Tensor | None, number: int) -> Tensor:
        """Samples to compare with, [B, number]: uniform over those of other classes, or over all other ones.

        Args:
            indices: of the batch, [B].
            labels: [B]; None draws other samples whatever their class.
        """
        count, device = len(self.labels), indices.device
        generator = torch.Generator(device).manual_seed((self.seed + self.draws) % 2**63)
        self.draws += 1
        drawn = torch.rand(len(indices), number, generator=generator, device=device, dtype=torch.float64)
        if labels is None:
            ranks = (drawn * (count - 1)).long().clamp(0, max(count - 2, 0))
            return ranks + (ranks >= indices[:, None])
        self.labels[indices] = labels
        ordered, order = self.labels.sort(stable=True)
        start, end = (torch.searchsorted(ordered, labels, right=right)[:, None] for right in (False, True))
        others = count - (end - start)
        ranks = torch.minimum((drawn * others).long(), others - 1)
        return order[(ranks + (ranks >= start) * (end - start)).clamp(max=count - 1)]

    def scores(self, student: Tensor, teacher: Tensor, columns: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """exp(similarity / τ) / Z with the other network's memory, of both networks, [B, 1 + N] each.

        Args:
            student, teacher: embeddings [B, width] of unit length.
            columns: samples to compare with, [B, 1 + N].
            temperature: τ.
        """
        raw = [  # of copies, since the memories are renewed before backward
            (embedding @ memory.clone().T).gather(1, columns).div(temperature).exp()
            for embedding, memory in ((student, self.teacher), (teacher, self.student))
        ]
        means = torch.stack([values.detach().mean() for values in raw]) * len(self.labels)
        self.partition = torch.where(self.partition < 0, means.to(self.partition.dtype), self.partition)
        return raw[0] / self.partition[0], raw[1] / self.partition[1]

    @torch.no_grad()
    def renew(self, indices: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Move the samples' rows towards their new embeddings [B, width]."""
        for memory, new in ((self.student, student), (self.teacher, teacher)):
            mixed = memory[indices] * self.momentum + new.to(memory.dtype) * (1 - self.momentum)
            memory[indices] = F.normalize(mixed)

    def get_extra_state(self) -> Tensor:
        """How often it was drawn from, so that a resumed training draws what an uninterrupted one does."""
        return torch.tensor(self.draws)

    def set_extra_state(self, state: Tensor) -> None:
        """Goes on drawing; the seed stays each process's own."""
        self.draws = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Makes room first for what the checkpoint holds."""
        for name in ROWS:
            found, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(found, Tensor) and len(own) == 0:
                setattr(self, name, own.new_zeros(len(found), *own.shape[1:]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
