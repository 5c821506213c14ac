"""The task loss: what the wrapped criterion is given, and what stands in for it where there is none."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from e2kd.errors import shape


def task_input(outputs: Any, logits: Tensor) -> Any:
    """What the criterion is called with: outputs as they came, but the logits of a dict or ModelOutput."""
    return logits if isinstance(outputs, dict) else outputs


def default_task(logits: Tensor, targets: Tensor | None) -> Tensor:
    """The validation loss of pure distillation: cross-entropy with class indices or probabilities, else BCE.

    >>> import torch
    >>> default_task(torch.zeros(2, 4), torch.tensor([0, 1]))
    tensor(1.3863)
    """
    if targets is None:
        raise ValueError(
            "Pure distillation (criterion=None) has no loss without a training forward, and no targets came to compare "
            "the logits with. Pass targets, or don't call the criterion in eval mode or under no_grad."
        )
    if targets.shape == logits.shape[:1] and not targets.is_floating_point():
        return F.cross_entropy(logits, targets)
    if targets.shape != logits.shape:
        raise ValueError(
            f"Expected targets as class indices [{len(logits)}] or values {shape(logits.shape)}, "
            f"but got {shape(targets.shape)} of {targets.dtype}."
        )
    targets = targets.to(logits.dtype)
    is_distribution = bool((targets.sum(1) - 1).abs().max() < 1e-3)
    return F.cross_entropy(logits, targets) if is_distribution else F.binary_cross_entropy_with_logits(logits, targets)
