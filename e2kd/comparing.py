"""Comparing the student's maps with the teacher's: on one grid, where both are known."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from e2kd.similarity import check_each, check_maps, is_zero, resize

Similarity = Callable[[Tensor, Tensor], Tensor]
KNOWN = 0.5  # share of a cell that must be known for the cell to be compared


def compare(
    similarity: Similarity,
    student: Tensor,
    teacher: Tensor,
    size: tuple[int, int] | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Similarity [B] of maps on one grid, and which samples [B] have a map that is zero everywhere in it.

    Args:
        similarity: (student maps, teacher maps) -> [B].
        student: maps [B, C, H, W].
        teacher: maps [B, C, h, w].
        size: the grid (height, width); the student's if None.
        valid: share of each cell in which the teacher's map is known, [B, 1, h, w]; cells known by less than half
            count in neither map.

    >>> import torch
    >>> from e2kd.similarity import cosine
    >>> maps = torch.tensor([[[[1., 0.], [0., 5.]]]])
    >>> known = torch.tensor([[[[1., 1.], [1., 0.]]]])
    >>> compare(cosine, maps, torch.eye(2)[None, None], valid=known)
    (tensor([1.]), tensor([False]))
    """
    check_maps(student, teacher)
    size = size or (student.shape[-2], student.shape[-1])
    student, teacher = resize(student, size), resize(teacher, size)
    if valid is not None:
        known = resize(valid, size) >= KNOWN
        student, teacher = student * known, teacher * known
    values = similarity(student, teacher)
    check_each(values, student, "similarity", "channels and space")
    return values, is_zero(student) | is_zero(teacher)


def compare_each(
    similarity: Similarity,
    student: Tensor,
    teacher: Tensor,
    size: tuple[int, int] | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `compare`, for maps [B, k, C, H, W] and [B, k, C, h, w] of k classes: [B, k] both."""
    count = student.shape[:2]
    if valid is not None:
        valid = valid.unsqueeze(1).expand(*count, *valid.shape[1:]).flatten(0, 1)
    values, dead = compare(similarity, student.flatten(0, 1), teacher.flatten(0, 1), size, valid)
    return values.unflatten(0, count), dead.unflatten(0, count)
