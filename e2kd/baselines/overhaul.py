"""A comprehensive overhaul of feature distillation (Heo et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from e2kd.baselines.attention import on_one_grid
from e2kd.baselines.base import Baseline
from e2kd.baselines.pairs import Batch, Names, Pair
from e2kd.errors import check_names
from e2kd.stages import Stage

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from e2kd.baselines.base import Settings


def partial_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Partial L2 distance (Heo et al. 2019, Eq. 2), summed: 0 where student <= teacher <= 0.

    Args:
        student: transformed features [...].
        teacher: features [...] after the margin ReLU.

    Returns:
        [], >= 0.

    >>> partial_distance(torch.tensor([-2., 1., 0.]), torch.tensor([-1., -1., 3.]))
    tensor(13.)
    """
    counted = (student > teacher) | (teacher > 0)
    return ((student - teacher).square() * counted).sum()


class Margin(nn.Module):
    """Margin ReLU max(x, m): m is each channel's mean of negative values, over all batches so far.

    >>> margin = Margin(2)
    >>> margin(torch.tensor([[[[-1., -3.]], [[2., 4.]]]]))
    tensor([[[[-1., -2.]],
    <BLANKLINE>
             [[ 2.,  4.]]]])
    """

    total: Tensor
    count: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(channels, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Features [B, C, h, w] before their ReLU -> [B, C, h, w]; they count first."""
        self.total, self.count = self.total.double(), self.count.double()  # whatever the criterion was cast to
        negative = features.clamp(max=0)
        self.total += negative.sum((0, 2, 3)).to(self.total.dtype)
        self.count += (negative < 0).sum((0, 2, 3)).to(self.count.dtype)
        margin = self.total / self.count.clamp(min=1)
        return torch.maximum(features, margin.to(features.dtype)[:, None, None])


class Overhaul(Baseline):
    """Overhaul of feature distillation (Heo et al. 2019): features before the ReLU, at the end of each stage.

    term = sum over stages i of 2^(i - n) `partial_distance`(r_i(student), max(teacher, m_i)) / B, i = 1 ... n, with
    connectors r of a 1x1 convolution and batch norm. The margins m, each channel's mean negative response, are those of
    the teacher's features so far; the authors' code reads them off its batch norms, which not all networks have,
    and trains with the teacher's batch norm in train mode, which here is never so.

    Args:
        student, teacher, criterion: see `Baseline`.
        weight: 10⁻³, the authors' for CIFAR; theirs for ImageNet is 10⁻⁴.
        layers, teacher_layers: names of modules; None finds up to four stages of each network. Where a module ends in
            a ReLU, what enters that is compared.
        settings: see `Baseline`.

    Raises:
        UnsupportedModel: when the ReLU at a stage's end is no module.

    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    >>> student, teacher = net(4), net(8)
    >>> criterion = Overhaul(student, teacher, nn.CrossEntropyLoss())
    >>> criterion(student(torch.rand(2, 3, 32, 32)), torch.tensor([0, 3])).backward()
    >>> [tuple(p.shape) for p in criterion.parameters()]
    [(8, 4, 1, 1), (8,), (8,)]
    """

    name = "overhaul"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str,
        criterion: Callable[..., Tensor] | None = None,
        *,
        weight: float = 1e-3,
        layers: Names = None,
        teacher_layers: Names = None,
        **settings: Unpack[Settings],
    ) -> None:
        check_names(layers=layers, teacher_layers=teacher_layers)

        def choose(pair: Pair) -> tuple[list[Stage], list[Stage]]:
            mine, theirs = pair.stages(layers, teacher_layers)
            return pair.student.before_activation(mine), pair.teacher.before_activation(theirs)

        super().__init__(student, teacher, criterion, weight, choose, **settings)
        pairs = list(zip(self.student_stages, self.teacher_stages, strict=True))
        connectors = (_connector(mine.channels, theirs.channels) for mine, theirs in pairs)
        self.connectors = self.beside_student(nn.ModuleList(connectors))
        device = next(self.connectors.parameters()).device
        self.margins = nn.ModuleList(Margin(theirs.channels) for _, theirs in pairs).to(device)

    def term(self, batch: Batch) -> Tensor:
        """Distances of all stages -> []; 0 for one image with a stage of one cell, which has no variance."""
        if len(batch.student_logits) == 1 and any(maps.shape[2] * maps.shape[3] == 1 for maps in batch.student):
            return self.no_term(batch)
        total, stages = batch.student_logits.new_zeros(()), len(batch.student)
        for i, (mine, theirs) in enumerate(zip(batch.student, batch.teacher, strict=True), 1):
            distance = partial_distance(*on_one_grid(self.connectors[i - 1](mine), self.margins[i - 1](theirs)))
            total = total + distance / 2 ** (stages - i)
        return total / len(batch.student_logits)


def _connector(channels: int, wanted: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, wanted, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return nn.Sequential(convolution, nn.BatchNorm2d(wanted))
