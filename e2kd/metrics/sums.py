"""Distance correlation as a metric: what batches and ranks contribute, and the score of it all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from e2kd.distance import DistanceSums, Score
from e2kd.metrics.host import Apart


class DistanceMetric(Apart):
    """Gathers `DistanceSums` of the features in `names`; subclasses say of which two or three the score is.

    States are flat float64 vectors, so that ranks with batches of other sizes, or with none, are gathered alike.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    rows: list[Tensor]
    sizes: list[Tensor]
    flaws: list[Tensor]

    def __init__(self, *, mean: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.set_dtype(torch.float64)
        self.mean = mean
        self.found: Score | None = None
        for name in ("rows", "sizes", "flaws"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def _names(self, count: int) -> tuple[str, ...]:
        """The names of two or three feature sets, those of the score in its order."""
        raise NotImplementedError

    def _add(self, sums: DistanceSums) -> None:
        known = sum(len(sizes) for sizes in self.sizes)
        if known and sum(len(flaws) for flaws in self.flaws) != known * len(sums.names):
            raise ValueError("Expected given= in every update or in none, since they are one score.")
        self.rows.append(sums.rows.flatten())
        self.sizes.append(sums.sizes.double())
        self.flaws.append(sums.flaws.flatten().double())

    def _sums(self) -> DistanceSums:
        """All batches, of all ranks while synced."""
        rows, sizes, flaws = (_joined(state) for state in (self.rows, self.sizes, self.flaws))
        count = len(flaws) // max(len(sizes), 1) or len(self._names(2))
        names = self._names(count)
        return DistanceSums(names, rows.view(-1, count, count), sizes.long(), flaws.view(-1, count).long())

    def _score(self) -> Score:
        sums = self._sums()
        return sums.score(*sums.names, mean=self.mean)

    def compute(self) -> Tensor:
        """The score, [] float64; NaN where there is none, and `score().reason` says why."""
        self.found = self._score()
        return torch.tensor(self.found.value, dtype=torch.float64, device=self.device)

    def score(self) -> Score:
        """The score with its standard error, its spread by chance, n, batches left out, and the reason for NaN.

        Synced across ranks as `compute` is: call it on all of them.
        """
        self.compute()
        assert self.found is not None
        return self.found

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self.found = None


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    """A list state in one piece; torchmetrics hands it over so once it is synced."""
    if isinstance(state, Tensor):
        return state
    return torch.cat([part.to(state[0].device) for part in state]) if state else torch.zeros(0, dtype=torch.float64)
