"""Kernels of attention: the fused ones have no second derivative, the math kernel has."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel


class MathKernel:
    """Actions of two hooks between which a module of a student runs under the math kernel, in training forwards."""

    def __init__(self, student: nn.Module) -> None:
        self.student, self.stack = student, ExitStack()

    def enter(self, *_: Any) -> None:
        """Before the module's forward."""
        self.stack.close()  # an interrupted forward may have left it open
        if self.student.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.stack.enter_context(sdpa_kernel(SDPBackend.MATH))

    def leave(self, *_: Any) -> None:
        """After it, and when it raised."""
        self.stack.close()


def fused_attention_between(logits: Tensor, features: Tensor) -> str | None:
    """The name of a fused attention kernel on a way in the graph from features to logits, if there is one."""
    users = _users(logits.grad_fn)
    queue, seen = [features.grad_fn], {features.grad_fn}
    for node in queue:
        for user in users.get(node, ()):
            if user.name().startswith("ScaledDotProduct"):
                return user.name()
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return None


def _users(end: Node | None) -> dict[Node | None, list[Node]]:
    """Which nodes of the graph that leads to `end` use each of them."""
    users: dict[Node | None, list[Node]] = {}
    queue = [] if end is None else [end]
    for node in queue:
        for parent, _ in node.next_functions:
            if parent is not None and parent not in users:
                queue.append(parent)
            users.setdefault(parent, []).append(node)
    return users
