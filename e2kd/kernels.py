"""Kernels of attention: the fused ones have no second derivative, the math kernel has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from e2kd.graph import between


class _Users:
    """How many are inside of `math_kernel`, and what restores the kernels that were allowed before the first."""

    count = 0
    restore = ExitStack()


@contextmanager
def math_kernel() -> Iterator[None]:
    """Inside, attention runs under the math kernel, until the last who came has left.

    The hooks of two criteria on one module leave in the order in which they came, so neither may restore what it met.
    """
    if not _Users.count:
        _Users.restore.enter_context(sdpa_kernel(SDPBackend.MATH))
    _Users.count += 1
    try:
        yield
    finally:
        _Users.count -= 1
        if not _Users.count:
            _Users.restore.close()


class Within:
    """Actions of two hooks between which a module of a student runs inside of a context, in training forwards."""

    def __init__(self, student: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self.student, self.context, self.stack = student, context, ExitStack()

    def enter(self, *_: Any) -> None:
        """Before the module's forward."""
        self.stack.close()  # an interrupted forward may have left it open
        if self.student.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.stack.enter_context(self.context())

    def leave(self, *_: Any) -> None:
        """After it, and when it raised."""
        self.stack.close()


def fused_attention_between(logits: Tensor, features: Tensor) -> str | None:
    """The name of a fused attention kernel on a way in the graph from features to logits, if there is one."""
    names = (node.name() for node in between(features.grad_fn, logits.grad_fn))
    return next((name for name in names if name.startswith("ScaledDotProduct")), None)
