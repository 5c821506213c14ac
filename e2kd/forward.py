"""What one training forward of a student leaves for the loss."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from e2kd.passes import Pass


@dataclass
class Forward:
    """One training forward of the student, kept until the loss has used it."""

    images: Tensor
    features: Tensor | None = None
    rng: list[Tensor] | None = None  # random state when the head began
    autocast: torch.dtype | None = None
    static_graph: bool = False  # inside DistributedDataParallel(static_graph=True)
    compiled: bool = False
    node: Node | None = None  # what made the logits
    logits: weakref.ref[Tensor] | None = None
    random: bool = False  # whether it drew random numbers, where that was looked at
    explained: Pass | None = None  # of a B-cos network
    heard: dict[str, Tensor] = field(default_factory=dict)  # at the places that were listened to, by their keys

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return (self.images.shape[-2], self.images.shape[-1])

    @property
    def device(self) -> torch.device:
        """The images'."""
        return self.images.device

    def autocasting(self) -> AbstractContextManager[Any]:
        """The precision that the forward ran in, for a teacher that is asked in the same."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
