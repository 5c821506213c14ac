"""Which classes of a sample are explained, and with which weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.errors import shape

# Classes [B, k] and weights [B, k], which sum to 1, or 0 where nothing is explained; a function's need not.
Chosen = tuple[Tensor, Tensor]
Name = Literal["teacher", "labels", "positives", "all"]
NAMED: tuple[Name, ...] = get_args(Name)
Choice = Name | int | Callable[[Tensor, Tensor | None], Chosen]


def choose(choice: Choice, teacher_logits: Tensor, targets: Tensor | None) -> Chosen:
    """The classes to explain, [B, k], and their weights, [B, k].

    "teacher": the teacher's top class, as in the paper. "labels": the target's class. "positives": every positive
    of multi-hot targets, with equal weights. "all": every class, with equal weights, which is a map for each, so it is
    for few classes. An integer k: the teacher's top k, weighted by its probabilities. A function of (teacher_logits,
    targets) returns its own, or [1, k] of both for every sample; its weights are used as they are, whatever their sum.

    Raises:
        ValueError: when the choice needs targets of another kind than came, or a function returns something else.

    >>> choose(1, torch.tensor([[0., 2., 1.]]), None)
    (tensor([[1]]), tensor([[1.]]))
    >>> choose("positives", torch.zeros(1, 3), torch.tensor([[1., 0., 1.]]))
    (tensor([[0, 2]]), tensor([[0.5000, 0.5000]]))
    >>> choose("all", torch.zeros(1, 2), None)
    (tensor([[0, 1]]), tensor([[0.5000, 0.5000]]))
    """
    if callable(choice):
        return _own(choice(teacher_logits, targets), teacher_logits)
    if choice == "teacher":
        return _ones(teacher_logits.argmax(1, keepdim=True), teacher_logits)
    if choice == "labels":
        return _ones(_labels(teacher_logits, targets), teacher_logits)
    if choice == "positives":
        return _positives(teacher_logits, targets)
    if choice == "all":
        return every_class(teacher_logits)
    top = teacher_logits.topk(min(choice, teacher_logits.shape[1]), dim=1)
    return top.indices, F.softmax(top.values, dim=1, dtype=_wide(teacher_logits))


def every_class(logits: Tensor) -> Chosen:
    """All classes of logits [B, K], with equal weights, [B, K] both.

    >>> every_class(torch.zeros(1, 2))
    (tensor([[0, 1]]), tensor([[0.5000, 0.5000]]))
    """
    classes = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    return classes, equal_weights(classes, logits)


def equal_weights(classes: Tensor, logits: Tensor) -> Tensor:
    """Weights [B, k] of classes [B, k] that all count alike, in the type of the logits but no less than float32."""
    weight = 1 / max(classes.shape[1], 1)
    return torch.full_like(logits[:, :1], weight, dtype=_wide(logits)).expand(classes.shape)


def drawn(classes: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Chosen:
    """So many of every sample's classes [B, k], with weights [B, count] whose weighted sum is that of all in the mean.

    Over a batch all classes come in turn, in a random order, so that each is explained for as many samples as any
    other. Classes of weight 0 are drawn where a sample has no others.

    >>> classes, weights = every_class(torch.zeros(2, 4))
    >>> found, heavier = drawn(classes, weights, 2, torch.Generator().manual_seed(0))
    >>> sorted(found.flatten().tolist()), heavier
    ([0, 1, 2, 3], tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]]))
    >>> drawn(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[1., 0., 0., 0.]]), 1, torch.Generator())
    (tensor([[0]]), tensor([[1.]]))
    """
    batch, among = classes.shape
    rank = torch.randperm(among, generator=generator).argsort().to(classes.device, non_blocking=True)
    counts = weights != 0
    order = (rank + among * ~counts).argsort(1)  # those that count come first
    number = counts.sum(1, keepdim=True).clamp_min(1)
    places = torch.arange(batch * count, device=classes.device).view(batch, count)
    few = number <= count
    columns = order.gather(1, torch.where(few, places % count, places % number))
    heavier = torch.where(few, 1, number.to(weights) / count)
    return classes.gather(1, columns), weights.gather(1, columns) * heavier


def check_choice(choice: object) -> None:
    """Raise a ValueError for what `choose` does not know."""
    known = choice in NAMED or callable(choice)
    if not known and not (isinstance(choice, int) and not isinstance(choice, bool) and choice >= 1):
        raise ValueError(
            'Expected classes to be "teacher", "labels", "positives", "all", an integer k >= 1 or a function, '
            f"but got {choice!r}."
        )


def choice_said(said: str) -> Choice:
    """A choice on a command line, a name or a number; whether it is known, `check_choice` sees.

    >>> choice_said("all"), choice_said("3")
    ('all', 3)
    """
    return cast(Choice, int(said) if said.isdigit() else said)


def _ones(classes: Tensor, like: Tensor) -> Chosen:
    return classes, torch.ones_like(classes, dtype=_wide(like))


def _wide(logits: Tensor) -> torch.dtype:
    """The type of weights: sums of them over a batch are not exact in half precision."""
    return torch.promote_types(logits.dtype, torch.float32)


def _own(found: object, logits: Tensor) -> Chosen:
    """What a function chose, for every sample."""
    batch, count = logits.shape
    match found:
        case (Tensor() as classes, Tensor() as weights):
            fits = classes.ndim == 2 and classes.shape[1] >= 1 and len(classes) in (1, batch)
            fits = fits and weights.ndim == 2 and weights.shape[1] == classes.shape[1] and len(weights) in (1, batch)
            if fits and not classes.is_floating_point() and classes.dtype != torch.bool:
                _check_range(classes, count)
                return classes.long().expand(batch, -1), weights.to(_wide(logits)).expand(batch, -1)
            came = f"{shape(classes.shape)} of {classes.dtype} and {shape(weights.shape)}"
        case _:
            came = f"{found!r:.60}"
    raise ValueError(
        f"Expected a function of classes to return whole numbers [{batch}, k] and their weights [{batch}, k], or "
        f"[1, k] of both for every sample, but got {came}."
    )


def _check_range(classes: Tensor, count: int) -> None:
    """On an accelerator, looking would wait for the device."""
    if classes.device.type == "cpu" and not 0 <= int(classes.min()) <= int(classes.max()) < count:
        raise ValueError(
            f"Expected classes from 0 to {count - 1} of a function, but got {int(classes.min())} to "
            f"{int(classes.max())}."
        )


def _labels(teacher_logits: Tensor, targets: Tensor | None) -> Tensor:
    if targets is None or targets.shape != teacher_logits.shape[:1] or targets.is_floating_point():
        came = "None" if targets is None else f"{shape(targets.shape)} of {targets.dtype}"
        raise ValueError(
            f'classes="labels" needs targets as class indices [{len(teacher_logits)}], but got {came}. '
            'With mixup, soft or multi-hot targets use classes="teacher".'
        )
    count = teacher_logits.shape[1]
    if targets.device.type == "cpu" and not 0 <= int(targets.min()) <= int(targets.max()) < count:
        raise ValueError(
            f'classes="labels" explains labels from 0 to {count - 1}, but some are {int(targets.min())} or '
            f'{int(targets.max())}. Labels that are ignored or unknown can\'t be explained: use classes="teacher".'
        )
    return targets[:, None].long()


def _positives(teacher_logits: Tensor, targets: Tensor | None) -> Chosen:
    if targets is None or targets.shape != teacher_logits.shape:
        came = "None" if targets is None else shape(targets.shape)
        raise ValueError(
            f'classes="positives" needs multi-hot targets {shape(teacher_logits.shape)}, but got {came}. '
            'With class indices use classes="labels" or "teacher".'
        )
    if targets.is_floating_point() and targets.device.type == "cpu" and ((targets > 0) & (targets < 1)).any():
        raise ValueError(
            'classes="positives" needs multi-hot targets, 1 for each class that is there, but some are between 0 and '
            '1. With mixed or smoothed labels use classes="teacher".'
        )
    positive = (targets > 0).to(_wide(teacher_logits))
    width = max(int(positive.sum(1).amax()), 1) if len(positive) else 1
    top = positive.topk(width, dim=1)
    ordered = top.indices.where(top.values > 0, torch.full_like(top.indices, positive.shape[1])).sort(1).values
    weights = (ordered < positive.shape[1]).to(positive.dtype)
    return ordered.clamp_max(positive.shape[1] - 1), weights / weights.sum(1, keepdim=True).clamp_min(1)
