"""How alike two batches of explanation maps are, per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.errors import shape


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions become float32; float32 and float64 stay as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of maps [B, C, h, w] to [B, C, H, W], antialiased when it shrinks them; float32 at least.

    >>> resize(torch.ones(2, 1, 7, 7), (14, 14)).shape
    torch.Size([2, 1, 14, 14])
    """
    if size[1] == 1 or maps.shape[-1] == 1:  # torch shrinks rows of one pixel wrongly (CPU): they go as columns
        along = _bilinear(maps, (maps.shape[-2], size[1]))
        return _bilinear(along.mT, (size[1], size[0])).mT
    return _bilinear(maps, size)


def _bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    shrinks = maps.shape[-2] > size[0] or maps.shape[-1] > size[1]
    return F.interpolate(at_least_float32(maps), size, mode="bilinear", align_corners=False, antialias=shrinks)


def pooled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps averaged to at most `size`; coarser ones stay as they are.

    >>> pooled(torch.ones(1, 6, 224, 224), (56, 56)).shape, pooled(torch.ones(1, 1, 7, 7), (56, 56)).shape
    (torch.Size([1, 6, 56, 56]), torch.Size([1, 1, 7, 7]))
    """
    height, width = min(size[0], maps.shape[-2]), min(size[1], maps.shape[-1])
    return maps if (height, width) == tuple(maps.shape[-2:]) else F.adaptive_avg_pool2d(maps, (height, width))


def check_each(values: Tensor, maps: Tensor, what: str, over: str) -> None:
    """Raise a ValueError unless what was made of maps [B, ...] is one value per sample, [B].

    Args:
        what, over: what made it, and what it is to reduce over, for the message.
    """
    if values.shape != maps.shape[:1]:
        raise ValueError(
            f"Expected a {what} that returns one value per sample, [{len(maps)}], but it returned "
            f"{shape(values.shape)}. Reduce over {over}, not over the batch."
        )


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are maps [B, C, h, w] of one batch with equal channels."""
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "Expected maps [B, C, h, w] with the same B and C, but the student's are "
            f"{shape(student.shape)} and the teacher's {shape(teacher.shape)}. "
            "Use explainers that give the same number of channels for both models: beside GradCAM(), "
            "BcosContributions() for a B-cos network, whose W(x) has the channels of its images."
        )


def _unit_peak(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps scaled to a largest magnitude of 1, flattened to [B, n], and which of them are not all zero."""
    flat = at_least_float32(maps).flatten(1)
    peak = flat.detach().abs().amax(1, keepdim=True)
    alive = peak != 0  # of NaN as well, which is not to be taken for a map without evidence
    return flat / torch.where(alive, peak, torch.ones_like(peak)), alive.squeeze(1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine similarity of explanation maps (e²KD, Eq. 3), in [-1, 1]; 0 with no gradient for an all-zero map.

    Computed in at least float32 and exactly invariant to the scale of either map, however small:
    there is no absolute epsilon. NaN for a map with values that are not finite. Maps of different grids are compared on
    the student's grid.

    Args:
        student: maps [B, C, H, W].
        teacher: maps [B, C, h, w]; resized bilinearly to the student's grid.

    Returns:
        Similarity of each sample, [B].

    Raises:
        ValueError: when batch or channels differ.

    >>> a = torch.tensor([[[[1., 0.], [0., 0.]]], [[[0., 0.], [0., 0.]]]])
    >>> cosine(a, a)
    tensor([1., 0.])
    """
    check_maps(student, teacher)
    a, alive_a = _unit_peak(student)
    b, alive_b = _unit_peak(resize(teacher, (student.shape[-2], student.shape[-1])))
    alive = alive_a & alive_b
    dtype = torch.promote_types(a.dtype, b.dtype)
    # A dead row is replaced before the norm, so that no 0/0 reaches value or gradient.
    a, b = (torch.where(alive[:, None], t.to(dtype), torch.ones((), dtype=dtype, device=t.device)) for t in (a, b))
    similarity = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return torch.where(alive, similarity, torch.zeros_like(similarity))


def is_zero(maps: Tensor) -> Tensor:
    """Which maps [B, ...] are zero everywhere: bool [B].

    >>> is_zero(torch.tensor([[0., 1.], [0., 0.]]))
    tensor([False,  True])
    """
    return ~maps.detach().flatten(1).any(1)
