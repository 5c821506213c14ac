"""The loss that B-cos networks are trained with where nobody teaches them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.errors import shape
from e2kd.showing import shown


def bcos_loss(logits: Tensor, targets: Tensor, off_label: float | None = None) -> Tensor:
    """Binary cross-entropy with every class, whose targets are never below `off_label` (B-cos v2; e²KD's teachers).

    With 1 / K off the label an undecided network, whose logits are the bias -log(K - 1), has no gradient there.

    Args:
        logits: [B, K].
        targets: class indices [B], or probabilities of every class [B, K] (mixup, several labels).
        off_label: in [0, 1); None is 1 / K, which needs two classes or more.

    Returns:
        The mean over samples and classes, [].

    Raises:
        ValueError: for targets of another shape, an off_label out of range, or none for one logit.

    >>> import torch
    >>> bcos_loss(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(0.6931)
    """
    if targets.ndim == 1 and len(targets) == len(logits) and not targets.is_floating_point():
        targets = F.one_hot(targets.long(), logits.shape[1])
    if targets.shape != logits.shape:
        raise ValueError(
            f"Expected targets as class indices [{len(logits)}] or probabilities {shape(logits.shape)}, but got "
            f"{shape(targets.shape)} of {targets.dtype}."
        )
    classes = logits.shape[1]
    if off_label is None and classes < 2:
        raise ValueError(f"Expected logits of two classes or more, but got {shape(logits.shape)}. Pass off_label=0.0.")
    lowest = 1 / classes if off_label is None else check_off_label(off_label)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype).clamp_min(lowest))


def check_off_label(off_label: float) -> float:
    """The value itself.

    Raises:
        ValueError: unless it is in [0, 1).
    """
    if not 0 <= off_label < 1:
        raise ValueError(f"Expected off_label in [0, 1), but got {off_label}.")
    return off_label


class BcosLoss(nn.Module):
    """`bcos_loss` as a module.

    >>> import torch
    >>> BcosLoss()(torch.zeros(1, 10), torch.tensor([3]))
    tensor(0.6931)
    """

    def __init__(self, off_label: float | None = None) -> None:
        super().__init__()
        self.off_label = None if off_label is None else check_off_label(off_label)

    def extra_repr(self) -> str:
        """The setting."""
        return shown(off_label=self.off_label)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits [B, K] and targets [B] or [B, K] -> []."""
        return bcos_loss(logits, targets, self.off_label)
