"""What one training forward of a student leaves for the loss."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from e2kd.passes import Pass
from e2kd.sharding import is_any_sharded


class Mark:
    """Left at the node that made the logits: found again from whatever was computed from them, and gone with it."""


@dataclass
class Forward:
    """One training forward of the student, kept until the loss has used it."""

    images: Tensor
    features: Tensor | None = None
    rng: list[Tensor] | None = None  # random state when the head began
    autocast: torch.dtype | None = None
    static_graph: bool = False  # inside DistributedDataParallel(static_graph=True)
    compiled: bool = False
    mark: weakref.ref[Mark] | None = None  # lives as long as the graph of the logits
    logits: weakref.ref[Tensor] | None = None
    version: int | None = None  # of the images, where it can be asked for
    random: bool = False  # whether it drew random numbers, where that was looked at
    explained: Pass | None = None  # of a B-cos network
    modules: list[nn.Module] = field(default_factory=list)  # of the student, where they were noted
    parameters: list[nn.Parameter | None] = field(default_factory=list)  # of these, that it ran with
    heard: dict[str, Tensor] = field(default_factory=dict)  # at the places that were listened to, by their keys

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return (self.images.shape[-2], self.images.shape[-1])

    @property
    def device(self) -> torch.device:
        """The images'."""
        return self.images.device

    @property
    def alive(self) -> bool:
        """Whether a loss may still be computed from its logits."""
        return any(held is not None and held() is not None for held in (self.mark, self.logits))

    @property
    def replaced(self) -> bool:
        """Whether it ran with other parameters than its modules have now, as in torch.func.functional_call."""
        now = _parameters_of(self.modules)
        if len(now) == len(self.parameters) and all(a is b for a, b in zip(now, self.parameters, strict=True)):
            return False
        return not is_any_sharded(self.modules[0])  # whose hosts replace them

    @property
    def overwritten(self) -> bool:
        """Whether the images are others now than those that the student was given."""
        return self.version is not None and self.images._version != self.version

    def made(self, logits: Tensor, steps: int = 64) -> bool:
        """Whether logits were computed from its own, perhaps through casts, slices or a wrapper's identities."""
        mark = None if self.mark is None else self.mark()
        queue = [logits.grad_fn]
        for node in queue:
            if node is None:
                continue
            if mark is not None and mark in _notes(node).values():
                return True
            if len(queue) < steps:
                queue.extend(parent for parent, _ in node.next_functions)
        return False

    def ran_in(self, model: nn.Module) -> None:
        """Notes a model's parameters while it still has those it runs with: functional_call puts its own back after."""
        self.modules = list(model.modules())
        self.parameters = _parameters_of(self.modules)

    def end(self, logits: Tensor) -> None:
        """These are its logits."""
        self.logits = weakref.ref(logits)
        if logits.grad_fn is not None:
            mark = Mark()
            self.mark = weakref.ref(mark)
            _notes(logits.grad_fn)[id(mark)] = mark

    def autocasting(self) -> AbstractContextManager[Any]:
        """The precision that the forward ran in, for a teacher that is asked in the same."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)


def _parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter | None]:
    """The modules' own parameters, without those of their children."""
    return [parameter for module in modules for parameter in module._parameters.values()]


def _notes(node: Node) -> dict[Any, Any]:
    """What was left at a node of a graph."""
    return cast("dict[Any, Any]", node.metadata)
