"""FSS and RS out of the sums that student, base and labels share."""

from __future__ import annotations

from e2kd.distance import DistanceSums, Score

LABELS = "labels"
SCORES: dict[str, tuple[str, ...]] = {
    "fss": ("student", "base"),
    "rs_student": ("student", LABELS),
    "rs_base": ("base", LABELS),
    "rs_distilled": ("student", LABELS, "base"),
    "rs_residual": ("base", LABELS, "student"),
}


def scores_of(sums: DistanceSums, *, mean: bool = False) -> dict[str, Score]:
    """Every score there is, by name; those that need labels only if the sums have them.

    fss: how similar the student's features are to the base's (UniCAM, Eq. 8). rs_student, rs_base: how relevant either
    is to the labels (Eq. 9). rs_distilled: the student's beyond the base (semi-partial, the papers' P_DC);
    rs_residual: the base's beyond the student.

    Args:
        sums: of "student", "base" and, if there are any, "labels".
        mean: average the batches' scores, as the papers do, in place of the ratio of sums.

    >>> import torch
    >>> x = torch.rand(16, 5)
    >>> found = scores_of(DistanceSums.of(student=x, base=2 * x))
    >>> {name: round(score.value, 6) for name, score in found.items()}
    {'fss': 1.0}
    """
    there = {name: sets for name, sets in SCORES.items() if set(sets) <= set(sums.names)}
    return {name: sums.score(*sets, mean=mean) for name, sets in there.items()}
