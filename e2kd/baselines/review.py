"""ReviewKD: deep stages of the student help to learn the teacher's earlier ones (Chen et al. 2021)."""

from __future__ import annotations

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

LEVELS = (4, 2, 1)  # sides of the grids that context is compared on


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL (Chen et al. 2021, Sec. 3.4): mean squared error at full size and averaged to 4x4, 2x2 and 1x1.

    The levels weigh 1, 1/2, 1/4, 1/8, normalised by their sum; levels no coarser than the features are left out.

    Args:
        student, teacher: [B, C, h, w].

    Returns:
        [], >= 0.

    >>> hierarchical_context_loss(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    tensor(1.)
    """
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for side in LEVELS:
        if side >= student.shape[2]:
            continue
        weight /= 2
        mine, theirs = (F.adaptive_avg_pool2d(x, side) for x in (student, teacher))
        loss, total = loss + weight * F.mse_loss(mine, theirs), total + weight
    return loss / total


class Fusion(nn.Module):
    """Attention-based fusion (ABF): a stage of the student with what came of the deeper ones.

    Args:
        channels: of the stage.
        middle: of what is handed on.
        wanted: of the teacher's stage.
        fuse: whether there is a deeper stage.
    """

    def __init__(self, channels: int, middle: int, wanted: int, fuse: bool) -> None:
        super().__init__()
        reduce = nn.Conv2d(channels, middle, 1, bias=False)
        expand = nn.Conv2d(middle, wanted, 3, padding=1, bias=False)
        for convolution in (reduce, expand):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(middle))
        self.attend = nn.Conv2d(2 * middle, 2, 1) if fuse else None
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(wanted))

    def forward(self, stage: Tensor, deeper: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Features [B, C, h, w] and deeper ones [B, M, h', w'] -> [B, W, *grid] to compare, [B, M, *grid] to go on."""
        fused = self.reduce(stage)
        if self.attend is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, fused.shape[-2:], mode="nearest")
            attention = self.attend(torch.cat([fused, deeper], 1)).sigmoid()
            fused = fused * attention[:, :1] + deeper * attention[:, 1:]
        if tuple(fused.shape[-2:]) != grid:
            fused = F.interpolate(fused, grid, mode="nearest")
        return self.expand(fused), fused


class ReviewKD(Baseline):
    """Knowledge review (Chen et al. 2021): fused stages of the student against the teacher's, last to first.

    term = sum over stages of `hierarchical_context_loss`(fusion of this and all deeper stages, teacher's stage). As in
    the authors' code the vector that enters the classifier is the last stage, and the teacher's features are those
    before their ReLU, where that is a module. A batch of one image teaches nothing: batch norm of its vector has no
    variance.

    Args:
        student, teacher, criterion: see `Baseline`.
        weight: λ; the authors' 1 for ImageNet. For CIFAR-100 they use 0.6 to 8, with `warmup` of 20 epochs.
        layers, teacher_layers: names of modules; None finds up to four stages of each network.
        settings: see `Baseline`.

    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    >>> student, teacher = net(4), net(8)
    >>> criterion = ReviewKD(student, teacher, nn.CrossEntropyLoss())
    >>> criterion(student(torch.rand(2, 3, 32, 32)), torch.tensor([0, 3])).backward()
    >>> len(criterion.fusions)
    2
    """

    name = "review"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str,
        criterion: Callable[..., Tensor] | None = None,
        *,
        weight: float = 1.0,
        layers: Names = None,
        teacher_layers: Names = None,
        **settings: Unpack[Settings],
    ) -> None:
        check_names(layers=layers, teacher_layers=teacher_layers)

        def choose(pair: Pair) -> tuple[list[Stage], list[Stage]]:
            mine, theirs = pair.stages(layers, teacher_layers)
            theirs = pair.teacher.before_activation(theirs, strict=False)
            vectors = pair.student.embedding(), pair.teacher.embedding()
            return [*mine, vectors[0]], [*theirs, vectors[1]]

        super().__init__(student, teacher, criterion, weight, choose, **settings)
        pairs = list(zip(self.student_stages, self.teacher_stages, strict=True))
        middle = min(512, self.student_stages[-1].channels)
        self.fusions = self.beside_student(
            nn.ModuleList(
                Fusion(mine.channels, middle, theirs.channels, fuse=n < len(pairs) - 1)
                for n, (mine, theirs) in enumerate(pairs)
            )
        )

    def term(self, batch: Batch) -> Tensor:
        """Losses of all stages -> []; 0 for a batch of one image."""
        if len(batch.student_logits) == 1:
            return self.no_term(batch)
        total, deeper = batch.student_logits.new_zeros(()), None
        students, teachers = (  # a classifier of every cell is given a map in the place of its mean
            [*maps[:-1], maps[-1].mean((2, 3), keepdim=True)] for maps in (batch.student, batch.teacher)
        )
        for fusion, mine, theirs in zip(reversed(self.fusions), reversed(students), reversed(teachers), strict=True):
            out, deeper = fusion(mine, deeper, (theirs.shape[2], theirs.shape[3]))
            total = total + hierarchical_context_loss(out, theirs)
        return total
