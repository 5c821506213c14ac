"""Kernels of attention: the fused ones have no second derivative, the math kernel has."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from e2kd.graph import between


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
    names = (node.name() for node in between(features.grad_fn, logits.grad_fn))
    return next((name for name in names if name.startswith("ScaledDotProduct")), None)
