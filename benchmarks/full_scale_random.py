"""Random numbers that depend on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.utils.data import Dataset


def seed_of(*numbers: int) -> int:
    """A seed of 32 bits, which is what torch's generator for the CPU takes; others have nothing in common with it.

    >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "little")


class Augmented(Dataset[Any]):
    """Samples that are augmented by seed, epoch and index alone: the same with more workers, in another process, in a
    run that was stopped, and for another arm.

    Args:
        dataset: its transforms draw from torch's generator for the CPU, as torchvision's do.
        seed: of the student.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay alive see it change

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(seed_of(self.seed, int(self.epoch), index))
        try:
            return self.dataset[index]
        finally:
            generator.set_state(before)

    def set_epoch(self, number: int) -> None:
        """For all samples from now on."""
        self.epoch.fill_(number)
