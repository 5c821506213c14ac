"""FitNets: the student's middle predicts the teacher's (Romero et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.baselines.attention import on_one_grid
from e2kd.baselines.base import Baseline, Batch, Pair
from e2kd.errors import shape
from e2kd.stages import Stage

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from e2kd.baselines.base import Settings


TOO_SMALL = (
    "The regressor was made {kernel} for the images that the layers were found with, but the features of these images "
    "are {grid}. Pass example=images, a batch [B, C, H, W] as the student will be given."
)


class FitNets(Baseline):
    """FitNets hints (Romero et al. 2015, Eq. 3): a convolution on a layer of the student predicts one of the teacher's.

    term = mean((r(student's features) - teacher's features)²), r the regressor: one convolution without padding whose
    kernel makes the student's grid the teacher's, 1x1 where the student's is no finer (the teacher's is then averaged
    to it). The paper trains in two stages, the hint alone and then KD: `FitNets(student, teacher)` for some epochs,
    then `E2KDLoss(student, teacher, criterion, weight=0)`. With a criterion both are learned together, as in later
    comparisons (Tian et al. 2020), whose mean and weight these are.

    Args:
        student, teacher, criterion: see `Baseline`.
        weight: of the hint.
        layer, teacher_layer: name of the guided and of the hint layer; None is the middle one of up to four stages.
        settings: see `Baseline`.

    Raises:
        UnsupportedModel: when a named layer is not there or returns no map.
        ValueError: in a step, for images on whose features the regressor does not fit; see `Baseline` for the rest.

    >>> import torch
    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    >>> student, teacher = net(4), net(8)
    >>> criterion = FitNets(student, teacher, nn.CrossEntropyLoss())
    >>> [tuple(p.shape) for p in criterion.parameters()]
    [(8, 4, 1, 1), (8,)]
    >>> optimizer = torch.optim.SGD([*student.parameters(), *criterion.parameters()], lr=0.1)
    """

    name = "hint"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str,
        criterion: Callable[..., Tensor] | None = None,
        *,
        weight: float = 100.0,
        layer: str | None = None,
        teacher_layer: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        def choose(pair: Pair) -> tuple[list[Stage], list[Stage]]:
            mine, theirs = pair.stages(None, None)
            middle = slice((len(mine) - 1) // 2, (len(mine) - 1) // 2 + 1)
            return (
                mine[middle] if layer is None else pair.student.named([layer]),
                theirs[middle] if teacher_layer is None else pair.teacher.named([teacher_layer]),
            )

        super().__init__(student, teacher, criterion, weight, choose, **settings)
        (mine,), (theirs,) = self.student_stages, self.teacher_stages
        finer = all(a >= b for a, b in zip(mine.grid, theirs.grid, strict=True))
        kernel = (1 + mine.grid[0] - theirs.grid[0], 1 + mine.grid[1] - theirs.grid[1]) if finer else (1, 1)
        self.regressor = self.beside_student(nn.Conv2d(mine.channels, theirs.channels, kernel))

    def term(self, batch: Batch) -> Tensor:
        """The regressor's error -> [].

        Raises:
            ValueError: for images on whose features the regressor does not fit.
        """
        grid, kernel = batch.student[0].shape[2:], self.regressor.kernel_size
        if any(side < width for side, width in zip(grid, kernel, strict=True)):
            raise ValueError(TOO_SMALL.format(kernel=shape(kernel), grid=shape(grid)))
        return F.mse_loss(*on_one_grid(self.regressor(batch.student[0]), batch.teacher[0]))
