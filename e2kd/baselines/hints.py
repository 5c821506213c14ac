"""FitNets: the student's middle predicts the teacher's (Romero et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from e2kd.baselines.attention import on_one_grid
from e2kd.baselines.base import Baseline
from e2kd.baselines.pairs import Batch, Pair
from e2kd.errors import shape
from e2kd.stages import Stage

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from e2kd.baselines.base import Settings


OTHER_GRID = (
    "Expected the regressor to bring the student's grid to the teacher's, for which its kernel {kernel} was made from "
    "{made}, but got {found}. Pass example=images, a batch [B, C, H, W] of the size that the student will be given; "
    "for images of several sizes name layers with one grid, layer= and teacher_layer=."
)


class FitNets(Baseline):
    """FitNets hints (Romero et al. 2015, Eq. 3): a convolution on a layer of the student predicts one of the teacher's.

    term = mean((r(student's features) - teacher's features)²), r the regressor: one convolution without padding whose
    kernel makes the student's grid the teacher's, 1x1 where the student's is no finer (the teacher's is then averaged
    to it). A larger kernel is for images of one size, that of `example`. The paper trains in two stages, the hint alone
    and then KD: `FitNets(student, teacher)` for some epochs, then `E2KDLoss(student, teacher, criterion, weight=0)`.
    With a criterion both are learned together, as in later comparisons (Tian et al. 2020), whose mean and weight these
    are.

    Args:
        student, teacher, criterion: see `Baseline`.
        weight: of the hint.
        layer, teacher_layer: name of the guided and of the hint layer; None is the middle one of up to four stages.
        settings: see `Baseline`.

    Raises:
        UnsupportedModel: when a named layer is not there or returns no map.
        ValueError: in a step, for images of a size for which the regressor was not made; see `Baseline` for the rest.

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
            ValueError: for images of a size for which the regressor was not made.
        """
        mine, theirs = batch.student[0], batch.teacher[0]
        kernel = self.regressor.kernel_size
        reached = tuple(1 + side - width for side, width in zip(mine.shape[2:], kernel, strict=True))
        if kernel != (1, 1) and reached != theirs.shape[2:]:
            made = _grids(self.student_stages[0].grid, self.teacher_stages[0].grid)
            found = _grids(mine.shape[2:], theirs.shape[2:])
            raise ValueError(OTHER_GRID.format(kernel=shape(kernel), made=made, found=found))
        return F.mse_loss(*on_one_grid(self.regressor(mine), theirs))


def _grids(mine: Iterable[int], theirs: Iterable[int]) -> str:
    return f"{shape(mine)} and {shape(theirs)}"
