"""Scores over any number of batches: streaming, mergeable, with their error, their spread by chance, and reasons."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from e2kd.distance.centring import FEWEST, u_center
from e2kd.distance.correlation import check_batches
from e2kd.distance.estimates import averaged, null_spread, partial_of, pooled, semi_partial_of, unbiased_of
from e2kd.distance.matrices import distance_matrix

SOUND, FEW, NOT_FINITE, CONSTANT, EQUIDISTANT = range(5)  # what may be wrong with a batch of features


@dataclass(frozen=True)
class Score:
    """A bias-corrected distance correlation and what can be said of it.

    Attributes:
        value: in [-1, 1], NaN with a reason.
        error: standard error over the images (jackknife), over the batches for the mean of several. For features that
            are independent it is too small: there `chance` counts.
        chance: standard deviation of the value if the features were independent, √(2 / n(n - 3)) for one batch.
        n: images counted.
        batches: batches counted.
        skipped: batches left out, with one class or fewer than 4 images.
        reason: why the value is NaN, in words; empty if it is a number.

    >>> DistanceSums.of(x=torch.rand(3, 5), y=torch.rand(3, 5)).score("x", "y").reason
    '3 images are too few, the statistics need at least 4'
    """

    value: float
    error: float
    chance: float
    n: int
    batches: int
    skipped: int
    reason: str = ""

    def __str__(self) -> str:
        """
        >>> str(Score(0.5, 0.01, 0.1, 16, 1, 0)), str(Score(*[float("nan")] * 3, 3, 0, 1, "too few"))
        ('0.500 ± 0.010 (n = 16, by chance ± 0.100)', 'undefined: too few')
        """
        if self.reason:
            return f"undefined: {self.reason}"
        return f"{self.value:.3f} ± {self.error:.3f} (n = {self.n}, by chance ± {self.chance:.3f})"


@dataclass(frozen=True)
class DistanceSums:
    """What batches of named features contribute to every correlation between them. Add those of batches and ranks.

    A score is then the ratio of sums over the batches, whose bias is that of all images and not of one batch, or the
    mean of the batches' scores, as in UniCAM's Eq. 8 and 9.

    Attributes:
        names: of the m feature sets.
        rows: [N, m, m] float64, sum_j P_ij Q_ij of every image i and every two feature sets.
        sizes: images in every batch, [k] int64.
        flaws: [k, m] int64, what is wrong with the features of a batch; 0 is nothing.

    >>> x = torch.rand(16, 5)
    >>> total = DistanceSums.of(student=x, base=2 * x) + DistanceSums.of(student=x, base=-2 * x)
    >>> round(total.score("student", "base").value, 6), total.score("student", "base").n
    (1.0, 32)
    """

    names: tuple[str, ...]
    rows: Tensor
    sizes: Tensor
    flaws: Tensor

    @classmethod
    def of(cls, **features: Tensor) -> DistanceSums:
        """One batch of named features, each [n, d].

        Raises:
            ValueError: when they are not [n, d] with one n.
        """
        for x in features.values():
            if x.ndim != 2:
                raise ValueError(f"Expected features [n, d], but got {list(x.shape)}. Flatten maps: x.flatten(1).")
        check_batches(*features.values())
        with torch.no_grad():
            return cls.of_distances(**{name: distance_matrix(x) for name, x in features.items()})

    @classmethod
    def of_distances(cls, **distances: Tensor) -> DistanceSums:
        """One batch of named distance matrices, each [n, n]."""
        with torch.no_grad():
            stacked = torch.stack(list(distances.values()))
            centred = u_center(stacked)
            rows = torch.einsum("aij,bij->iab", centred, centred)
        flaws = torch.tensor([[_flaw(d, p) for d, p in zip(stacked, centred, strict=True)]])
        return cls(tuple(distances), rows, torch.tensor([len(rows)]).to(rows.device), flaws.to(rows.device))

    def __add__(self, other: DistanceSums) -> DistanceSums:
        """The batches of both."""
        if self.names != other.names:
            raise ValueError(
                f"Expected sums of {', '.join(self.names)}, but got sums of {', '.join(other.names)}. "
                "Name the features alike, in the same order."
            )
        pairs = ((self.rows, other.rows), (self.sizes, other.sizes), (self.flaws, other.flaws))
        return DistanceSums(self.names, *(torch.cat([a, b.to(a.device)]) for a, b in pairs))

    def score(self, x: str, y: str, given: str | None = None, *, partial: bool = False, mean: bool = False) -> Score:
        """The score of two of the feature sets, NaN with a reason where there is none.

        Args:
            x, y: names of two feature sets.
            given: of a third, which is taken away from x (semi-partial, the papers' P_DC).
            partial: take it away from y too.
            mean: average the batches' scores, as the papers do, in place of the ratio of sums.
        """
        names = [name for name in (x, y, given) if name is not None]
        picked = [self._index(name) for name in names]
        flaws = self._flaws(picked)
        sound = (flaws == SOUND).all(1)
        sizes = self.sizes[sound].tolist()
        if not sizes or (flaws == NOT_FINITE).any():
            return self._undefined(_say(flaws, self.sizes, names), sizes)
        rows = self.rows[sound.repeat_interleave(self.sizes)][:, picked][:, :, picked]
        statistic = unbiased_of if given is None else partial_of if partial else semi_partial_of
        value, error = averaged(statistic, rows, sizes) if mean else pooled(statistic, rows)
        if value != value:
            sums = [batch.sum(0) for batch in rows.split(sizes)] if mean else [rows.sum(0)]
            lost = x if any(semi_partial_of(one).isnan() for one in sums) else y
            return self._undefined(f"{lost} differs from {given} by nothing but scale", sizes)
        spread = null_spread(*sizes, partial=partial, mean=mean)
        return Score(value, error, spread, sum(sizes), len(sizes), len(self.sizes) - len(sizes))

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"There are no features named {name!r} in these sums, only {', '.join(self.names)}.")
        return self.names.index(name)

    def _flaws(self, picked: list[int]) -> Tensor:
        """Flaws [k, 2 or 3] of the picked features; a third that does not vary takes nothing away and is none."""
        flaws = self.flaws[:, picked]
        given = flaws[:, 2:]
        return torch.cat([flaws[:, :2], given * (given < CONSTANT)], 1)

    def _undefined(self, reason: str, sizes: list[int]) -> Score:
        nan = float("nan")
        return Score(nan, nan, null_spread(*sizes), sum(sizes), len(sizes), len(self.sizes) - len(sizes), reason)


def _flaw(distances: Tensor, centred: Tensor) -> int:
    """What is wrong with one feature set of a batch, from its distances and their U-centred matrix [n, n]."""
    if len(distances) < FEWEST:
        return FEW
    if not distances.isfinite().all():
        return NOT_FINITE
    if centred.any():
        return SOUND
    return EQUIDISTANT if distances.any() else CONSTANT


def _say(flaws: Tensor, sizes: Tensor, names: list[str]) -> str:
    """The first flaw of a batch in words, NaN before others."""
    if not len(flaws):
        return "no images were given"
    worst = flaws == NOT_FINITE if (flaws == NOT_FINITE).any() else flaws > SOUND
    batch, which = worst.nonzero()[0].tolist()
    return {
        FEW: f"{sizes[batch]} images are too few, the statistics need at least {FEWEST}",
        NOT_FINITE: f"{names[which]} has values that are NaN or infinite",
        CONSTANT: f"{names[which]} is the same for every image (one class, or a dead layer)",
        EQUIDISTANT: f"{names[which]} has no distances beyond what single images are apart from all others (as one-hot "
        "labels have if no two images are of one class, or all but one)",
    }[int(flaws[batch, which])]
