"""What stands for the labels when features are compared with them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from e2kd.errors import shape


def label_features(targets: Tensor, embeddings: Tensor | None = None) -> Tensor:
    """What stands for every image's label, [n, d]: its class's embedding, one-hot, or the row that was given.

    Args:
        targets: labels [n] as integers, or one row per image [n, d].
        embeddings: of the classes, [K, d], for labels; None is one-hot.

    Raises:
        ValueError: when they don't fit.

    >>> import torch
    >>> label_features(torch.tensor([1, 0]), torch.tensor([[5., 6.], [7., 8.]]))
    tensor([[7., 8.],
            [5., 6.]])
    """
    rows = targets.is_floating_point()
    if targets.ndim != (2 if rows else 1):
        raise ValueError(
            "Expected labels [n] as integers, or what stands for them, one row per image [n, d], but got "
            f"{shape(targets.shape)} of {targets.dtype}."
        )
    if rows and embeddings is not None:
        raise ValueError("Embeddings of classes need labels as integers [n], but the targets are rows of numbers.")
    if rows:
        return targets.detach()
    if not len(targets):
        return targets.new_zeros(0, 1).double() if embeddings is None else embeddings.detach()[:0]
    low, high = int(targets.min()), int(targets.max())
    count = high + 1 if embeddings is None else len(embeddings)
    if not 0 <= low <= high < count:
        raise ValueError(
            f"The labels go from {low} to {high}, but there are embeddings of {count} classes, 0 to {count - 1}. Pass "
            "one row per class, in the order of the labels."
        )
    if embeddings is None:
        return F.one_hot(targets.long(), count).double()
    return embeddings.detach()[targets.to(embeddings.device).long()]
