"""The task loss: what the wrapped criterion is given, and what stands in for it where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from e2kd.errors import shape
from e2kd.outputs import logits_of


def task_input(outputs: Any, logits: Tensor) -> Any:
    """What the criterion is called with: outputs as they came, but the logits of a dict or ModelOutput."""
    return logits if isinstance(outputs, dict) else outputs


IGNORED = -100  # a label that counts for nothing, as in torch's and Hugging Face's losses


def task_loss(
    criterion: Callable[..., Tensor] | None,
    outputs: Any,
    targets: Any,
    labels: Any,
    *,
    multilabel: bool = False,
    **options: Any,
) -> Tensor:
    """The wrapped criterion's loss, or what stands in for it.

    A criterion of e2kd inside of another is given the targets as they came, any other the labels.

    Args:
        options: what else the criterion is called with.
    """
    logits = logits_of(outputs)
    if criterion is not None:
        return criterion(task_input(outputs, logits), targets if takes_lessons(criterion) else labels, **options)
    return default_task(logits, labels, multilabel=multilabel)


def takes_lessons(criterion: object) -> bool:
    """Whether a criterion is one of e2kd, by the attribute of this name."""
    return bool(getattr(criterion, "takes_lessons", False))


def nested(criterion: Any) -> list[Any]:
    """The criteria of e2kd that are inside of one another, the outermost first, and last what is inside of them all."""
    found = [criterion]
    while takes_lessons(found[-1]):
        found.append(found[-1].criterion)
    return found


def remove_hooks(criterion: Any) -> None:
    """Take the hooks of a criterion inside of another off the student; only those of e2kd have any."""
    if takes_lessons(criterion):
        criterion.remove()


def share(logits: Tensor, labels: Any, items: Tensor | int) -> Tensor | float:
    """Of a batch in all items that Hugging Face counts: class indices, or every entry of multi-hot labels.

    >>> import torch
    >>> share(torch.zeros(3, 4), torch.tensor([1, IGNORED, 0]), 8)
    tensor(0.2500)
    """
    return (labels.ne(IGNORED).sum() if isinstance(labels, Tensor) else len(logits)) / items


def reported(criterion: object, parts: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """The detached parts of a loss, with those of the criterion inside that have other names.

    The loss is copied, since trainers divide it in place when they accumulate.
    """
    inner = getattr(criterion, "parts", {}) if takes_lessons(criterion) else {}
    return {**inner, **{name: value.detach() for name, value in parts.items()}, "loss": loss.detach().clone()}


def default_task(logits: Tensor, targets: Tensor | None, *, multilabel: bool = False) -> Tensor:
    """The validation loss of pure distillation: cross-entropy with class indices or probabilities, else BCE.

    Values [B, K] are probabilities where each image's sum to 1 and they are floating-point, unless `multilabel`.

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
        return F.cross_entropy(logits, targets.long())
    if targets.shape != logits.shape:
        raise ValueError(
            f"Expected targets as class indices [{len(logits)}] or values {shape(logits.shape)}, "
            f"but got {shape(targets.shape)} of {targets.dtype}."
        )
    whole = not targets.is_floating_point()
    targets = targets.to(logits.dtype)
    is_distribution = not (multilabel or whole) and bool((targets.sum(1) - 1).abs().max() < 1e-3)
    return F.cross_entropy(logits, targets) if is_distribution else F.binary_cross_entropy_with_logits(logits, targets)
