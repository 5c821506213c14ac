"""AFD: which layers of the student should learn from which of the teacher's, by attention (Ji et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.baselines.base import Baseline
from e2kd.baselines.pairs import Batch, Names, Pair
from e2kd.errors import check_names
from e2kd.stages import Stage

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from e2kd.baselines.base import Settings


class Matching(nn.Module):
    """How much each layer of the student attends to each of the teacher's (Ji et al. 2021, Eq. 1-3).

    Args:
        student, teacher: channels of their layers.
        width: d, of queries and keys.

    >>> Matching([4, 8], [16], 8)([torch.ones(3, 4), torch.ones(3, 8)], [torch.ones(3, 16)]).shape
    torch.Size([3, 1, 2])
    """

    def __init__(self, student: list[int], teacher: list[int], width: int) -> None:
        super().__init__()
        self.width = width
        self.queries = nn.ModuleList(_normed(channels, width) for channels in teacher)
        self.keys = nn.ModuleList(nn.Sequential(_normed(channels, width), nn.ReLU()) for channels in student)
        self.bilinear = _normed(width, width * len(teacher))
        self.teacher_positions = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(teacher), width)))
        self.student_positions = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(student), width)))

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Pooled features [B, C] of S and T layers -> attention [B, T, S] that sums to 1 over S."""
        queries = torch.stack([query(x) for query, x in zip(self.queries, teacher, strict=True)], 1)
        keys = torch.stack([key(x) for key, x in zip(self.keys, student, strict=True)], 1)
        seen = self.bilinear(keys.flatten(0, 1)).view(len(keys), len(student), len(teacher), self.width)
        scores: Tensor = (
            torch.einsum("bstd,btd->bts", seen, queries) + self.teacher_positions @ self.student_positions.T
        )
        return (scores / math.sqrt(self.width)).softmax(2)


class AFD(Baseline):
    """Attention-based feature matching ("Show, attend and distill", Ji et al. 2021): all pairs of layers, weighted.

    term = sum over the teacher's layers t and the student's s of α_ts mean((F_t - F_s)²), F the channel mean of squared
    features, of unit length on t's grid; the weights α are learned attention of t's pooled features on s's.
    A batch of one image teaches nothing: batch norm of its pooled features has no variance.

    Args:
        student, teacher, criterion: see `Baseline`.
        weight: β; the authors' 200.
        layers, teacher_layers: names of modules, any number of each; None takes every block, as the authors do.
        width: d of queries and keys; the authors' 128.
        settings: see `Baseline`.

    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    >>> student, teacher = net(4), net(8)
    >>> criterion = AFD(student, teacher, nn.CrossEntropyLoss(), width=16)
    >>> criterion(student(torch.rand(2, 3, 32, 32)), torch.tensor([0, 3])).backward()
    """

    name = "afd"
    shows = ("width",)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str,
        criterion: Callable[..., Tensor] | None = None,
        *,
        weight: float = 200.0,
        layers: Names = None,
        teacher_layers: Names = None,
        width: int = 128,
        **settings: Unpack[Settings],
    ) -> None:
        check_names(layers=layers, teacher_layers=teacher_layers)

        def choose(pair: Pair) -> tuple[list[Stage], list[Stage]]:
            mine = pair.student.blocks() if layers is None else pair.student.named(layers)
            return mine, pair.teacher.blocks() if teacher_layers is None else pair.teacher.named(teacher_layers)

        super().__init__(student, teacher, criterion, weight, choose, **settings)
        mine, theirs = ([s.channels for s in stages] for stages in (self.student_stages, self.teacher_stages))
        self.width = width
        self.matching = self.beside_student(Matching(mine, theirs, width))

    def term(self, batch: Batch) -> Tensor:
        """Weighted distances of all pairs -> []; 0 for a batch of one image."""
        if len(batch.student_logits) == 1:
            return self.no_term(batch)
        attention = self.matching(_pooled(batch.student), _pooled(batch.teacher))  # [B, T, S]
        total = batch.student_logits.new_zeros(())
        mine = [_strength(maps) for maps in batch.student]
        for t, target in enumerate(_strength(maps) for maps in batch.teacher):
            grid = (target.shape[2], target.shape[3])
            values = torch.stack([F.adaptive_avg_pool2d(maps, grid).flatten(1) for maps in mine], 1)
            error = (F.normalize(values, dim=2) - F.normalize(target.flatten(1))[:, None]).square().mean(2)
            total = total + (attention[:, t] * error).sum(1).mean()
        return total


def _pooled(side: list[Tensor]) -> list[Tensor]:
    return [maps.mean((2, 3)) for maps in side]


def _strength(maps: Tensor) -> Tensor:
    """Channel means of squared features, [B, 1, h, w]."""
    return maps.square().mean(1, keepdim=True)


def _normed(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, width), nn.BatchNorm1d(width))
