"""AT: where a network's activations are strong (Zagoruyko and Komodakis 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.baselines.base import Baseline
from e2kd.baselines.pairs import Batch, Names
from e2kd.errors import check_names
from e2kd.similarity import pooled

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from e2kd.baselines.base import Settings


def attention(features: Tensor, power: float = 2.0) -> Tensor:
    """The spatial attention map of features: mean over channels of |A|^p, of unit length.

    Args:
        features: [B, C, h, w].
        power: p.

    Returns:
        [B, h * w], >= 0.

    >>> import torch
    >>> attention(torch.tensor([[[[1., 1.]], [[1., 0.]]]]))
    tensor([[0.8944, 0.4472]])
    """
    return F.normalize(features.abs().pow(power).mean(1).flatten(1))


def on_one_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of maps on the coarser grid of both, to which the finer is averaged.

    >>> import torch
    >>> [tuple(m.shape) for m in on_one_grid(torch.ones(1, 2, 8, 8), torch.ones(1, 5, 4, 4))]
    [(1, 2, 4, 4), (1, 5, 4, 4)]
    """
    grid = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return pooled(a, grid), pooled(b, grid)


class AT(Baseline):
    """Attention transfer (Zagoruyko and Komodakis 2017, Eq. 2): where activations are strong, at several depths.

    term = sum over stages of mean((Q_student - Q_teacher)²), Q = `attention` of the stage's features. The
    square and the mean are those of the authors' code; the paper writes the norm.

    Args:
        student, teacher, criterion: see `Baseline`.
        weight: β; the paper's 10³.
        layers, teacher_layers: names of modules; None finds up to four stages of each network.
        power: p of the maps.
        settings: see `Baseline`.

    >>> import torch
    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    >>> student, teacher = net(4), net(8)
    >>> criterion = AT(student, teacher, nn.CrossEntropyLoss())
    >>> criterion(student(torch.rand(2, 3, 32, 32)), torch.tensor([0, 3])).backward()
    >>> sorted(criterion.parts)
    ['at', 'loss', 'task']
    """

    name = "at"
    shows = ("power",)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str,
        criterion: Callable[..., Tensor] | None = None,
        *,
        weight: float = 1000.0,
        layers: Names = None,
        teacher_layers: Names = None,
        power: float = 2.0,
        **settings: Unpack[Settings],
    ) -> None:
        check_names(layers=layers, teacher_layers=teacher_layers)
        super().__init__(
            student, teacher, criterion, weight, lambda pair: pair.stages(layers, teacher_layers), **settings
        )
        self.power = power

    def term(self, batch: Batch) -> Tensor:
        """Attention maps of all stages -> []."""
        pairs = (on_one_grid(s, t) for s, t in zip(batch.student, batch.teacher, strict=True))
        return sum(
            ((attention(s, self.power) - attention(t, self.power)).square().mean() for s, t in pairs),
            batch.student_logits.new_zeros(()),
        )
