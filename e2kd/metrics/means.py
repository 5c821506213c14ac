"""Means over samples as metrics: what batches and ranks contribute, and which samples have no value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.metrics.host import Apart

SOUND, BLANK, EMPTY, NOT_FINITE = range(4)  # what may be wrong with a sample
LEFT_OUT = {BLANK: "blank maps", EMPTY: "empty regions"}
NOTHING = "no samples were given"
NAN = float("nan")


@dataclass(frozen=True)
class Mean:
    """A mean over samples and what can be said of it.

    Attributes:
        value: NaN with a reason.
        error: standard error over the samples, NaN for fewer than two.
        n: samples counted.
        left_out: samples that have no value, by what they have instead ("blank maps", "empty regions").
        reason: why the value is NaN, in words; empty if it is a number.
    """

    value: float
    error: float
    n: int
    left_out: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        """
        >>> str(Mean(0.5, 0.01, 16, {"blank maps": 2})), str(Mean(NAN, NAN, 0, reason=NOTHING))
        ('0.500 ± 0.010 (n = 16, left out: 2 blank maps)', 'undefined: no samples were given')
        """
        if self.reason:
            return f"undefined: {self.reason}"
        left_out = f", left out: {_listed(self.left_out)}" if self.left_out else ""
        return f"{self.value:.3f} ± {self.error:.3f} (n = {self.n}{left_out})"

    @classmethod
    def of(cls, total: float, squares: float, *counts: float) -> Mean:
        """The mean of values of this sum and this sum of squares, and how many samples there are of every kind."""
        kinds = [int(found) for found in counts]
        n, left_out = kinds[SOUND], {name: kinds[kind] for kind, name in LEFT_OUT.items() if kinds[kind]}
        if kinds[NOT_FINITE]:
            reason = f"{kinds[NOT_FINITE]} of {sum(kinds)} samples have values that are NaN or infinite"
        elif not n:
            reason = f"there were only {_listed(left_out)}" if left_out else NOTHING
        else:
            spread = max(squares / n - (total / n) ** 2, 0.0)
            return cls(total / n, (spread / (n - 1)) ** 0.5 if n > 1 else NAN, n, left_out)
        return cls(NAN, NAN, n, left_out, reason)


def _listed(left_out: dict[str, int]) -> str:
    return ", ".join(f"{found} {name}" for name, found in left_out.items())


class MeanMetric(Apart):
    """The means of `width` kinds of values over all batches and ranks; subclasses say what the values are.

    The state is one float64 tensor of sums and counts.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor

    def __init__(self, width: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self.means: list[Mean] = []
        self.add_state("sums", torch.zeros(width, 2 + NOT_FINITE + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor, flaws: Tensor | int = SOUND, rows: Tensor | int = 0) -> None:
        """Values [n], what is wrong with their samples [n], and which mean each counts in [n]."""
        sums = self.sums
        values = values.detach().to(sums)
        flaws, rows = (torch.as_tensor(x, device=sums.device).expand(len(values)) for x in (flaws, rows))
        flaws = torch.where((flaws == SOUND) & ~values.isfinite(), NOT_FINITE, flaws)
        values = torch.where(flaws == SOUND, values, 0.0)
        added = torch.cat([values[:, None], values[:, None] ** 2, F.one_hot(flaws, NOT_FINITE + 1)], 1)
        self.sums = sums.index_add(0, rows, added)

    def _summary(self, means: Sequence[Mean]) -> Mean:
        """What `compute` is of the means."""
        return means[0]

    def compute(self) -> Tensor:
        """The value, [] float64; NaN where there is none, and `score().reason` says why."""
        self.means = [Mean.of(*row) for row in self.sums.tolist()]
        return torch.tensor(self._summary(self.means).value, dtype=torch.float64, device=self.device)

    def score(self) -> Mean:
        """The value with its standard error, n, samples left out, and the reason for NaN.

        Synced across ranks as `compute` is: call it on all of them.
        """
        self.compute()
        return self._summary(self.means)

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self.means = []
