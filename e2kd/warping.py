"""Maps moved to where an augmentation moved their image: bilinear, zero where the image was filled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2kd.regions import Flags, Floats, Region, Sight, along, array, interval, project, visible

SPECK = 1e-3  # share of a cell that is nothing: what rounding leaves of an erased map must not look like a map


def warp(maps: Tensor, points: Tensor, inside: Tensor, supersample: int = 1) -> tuple[Tensor, Tensor]:
    """Read maps at points and average them per cell.

    Args:
        maps: [B, C, h, w].
        points: where each part of an output cell lies in the maps' frame, (x, y) with the frame's edges at -1 and 1,
            [B, n * s, m * s, 2]; `supersample` s parts per cell and axis.
        inside: share in [0, 1] of each part that is no fill, [B, n * s, m * s].

    Returns:
        Maps [B, C, n, m], mean over the cell with zero where the image was filled, and the share of each cell
        that was not, [B, 1, n, m].

    >>> ramp = torch.tensor([[[[1., 2.]]]])
    >>> warp(ramp, torch.tensor([[[[0.5, 0.], [-0.5, 0.]]]]), torch.tensor([[[1., 0.5]]]))
    (tensor([[[[2.0000, 0.5000]]]]), tensor([[[[1.0000, 0.5000]]]]))
    """
    read = F.grid_sample(maps, points, mode="bilinear", padding_mode="border", align_corners=False)
    weight = inside[:, None]
    return F.avg_pool2d(read * weight, supersample), F.avg_pool2d(weight, supersample)


def warp_by_matrix(
    maps: Tensor,
    matrices: Tensor,
    image_size: tuple[int, int],
    canonical_size: tuple[int, int],
    *,
    frames: Sequence[Region] | None = None,
    holes: Sequence[Region] = (),
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Warp maps of the canonical image into the frame of the augmented image.

    Pixel coordinates are those of edges: pixel (i, j) covers [j, j + 1] x [i, i + 1], an image [0, W] x [0, H].
    Samples that are only flipped, scaled and shifted are averaged in closed form, others over 2 to 4 points per map
    cell and axis. A whole map that is only flipped or turned by quarters, to half a pixel, is moved, not averaged.

    Args:
        maps: over the whole canonical image, [B, C, h, w].
        matrices: augmented pixels (x, y, 1) -> canonical pixels, up to scale, [B, 3, 3]; best in float64 (float32
            matrices of upright boxes may take the longer way) and on the CPU, where looking at them waits for nothing.
        image_size: (H, W) of the augmented image.
        canonical_size: (H, W) of the canonical image.
        frames: outside of any of these the augmented image was filled: the canonical image and, for example, the crop
            that was rotated afterwards, each with its own matrices. None: the canonical image alone.
        holes: inside of these the image was erased.
        size: grid (n, m) of the result. None: that of the maps.

    Returns:
        Maps [B, C, n, m], mean over each cell with zero where the image was filled, and the share of each cell that
        was not, [B, 1, n, m]; a share below 1/1000 is 0. float64 for float64 maps, else float32.

    >>> mirror = torch.tensor([[[-1., 0, 4], [0, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    >>> warp_by_matrix(torch.tensor([[[[1., 2.]]]]), mirror, (2, 4), (2, 4))
    (tensor([[[[2., 1.]]]]), tensor([[[[1., 1.]]]]))
    """
    maps = maps if maps.dtype == torch.float64 else maps.float()
    cells = (maps.shape[-2], maps.shape[-1])
    out = size or cells
    if frames is None:
        frames = [Region.frame(matrices, canonical_size)]
    from_cells = _scaling(matrices, image_size[1] / out[1], image_size[0] / out[0])
    to_cells = _scaling(matrices, cells[1] / canonical_size[1], cells[0] / canonical_size[0])
    frames, holes = ([region.after(from_cells) for region in regions] for regions in (frames, holes))
    near = max(n / min(pair) for n, *pair in zip(cells, image_size, canonical_size, strict=True)) / 2
    warped, valid = _warp_seen(maps, Sight(to_cells @ matrices @ from_cells, frames, holes, cells, out, near))
    return warped * (valid > SPECK), valid * (valid > SPECK)


def _scaling(like: Tensor, x: float, y: float) -> Tensor:
    return torch.diag(like.new_tensor([x, y, 1.0]))


def _warp_seen(maps: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    """Each sample the way it needs, so that no sample depends on its batch."""
    parts = _parts(sight)
    kinds = sorted(set(parts.tolist()))
    if len(kinds) == 1:
        return _warp_alike(maps, sight, kinds[0])
    warped = maps.new_empty(*maps.shape[:2], *sight.out), maps.new_empty(len(maps), 1, *sight.out)
    for kind in kinds:
        rows = torch.from_numpy(np.flatnonzero(parts == kind))
        index = rows.to(maps.device)
        for whole, some in zip(warped, _warp_alike(maps[index], sight.at(rows), kind), strict=True):
            whole[index] = some
    return warped


def _parts(sight: Sight) -> NDArray[np.int64]:
    """How many parts per axis stand for an output cell, [B]; 0 where the mean has a closed form.

    4 for each cell of a coarse map, 2 for each of a fine one, unless it zooms out.
    """
    upright = sight.upright()
    if upright.all():
        return np.zeros(len(upright), np.int64)
    ratio = max(1.0, *(n / m for n, m in zip(sight.cells, sight.out, strict=True)))
    many = (array(sight.zoom()) > 1.3 * ratio) | (max(sight.cells) <= 20)
    return np.where(upright, 0, np.where(many, math.ceil(4 * ratio), math.ceil(2 * ratio)))


def _warp_alike(maps: Tensor, sight: Sight, parts: int) -> tuple[Tensor, Tensor]:
    return _by_sampling(maps, sight, parts) if parts else _in_closed_form(maps, sight)


def _by_sampling(maps: Tensor, sight: Sight, s: int) -> tuple[Tensor, Tensor]:
    """Means over s x s parts of cells, each read at its centre and weighted with what of it is no fill."""
    (height, width), out = sight.cells, sight.out
    spread = torch.from_numpy(~sight.moved()).to(maps)[:, None]
    sight = sight.like(maps)
    parts = [(torch.arange(n * s, device=maps.device, dtype=maps.dtype) + 0.5) / s for n in out]
    inside = visible(sight.frames, sight.holes, parts[1][None, None], parts[0][None, :, None], 1 / s)
    centres = [part.floor() + 0.5 for part in parts]
    y, x = (centre + (part - centre) * spread for centre, part in zip(centres, parts, strict=True))
    u, v, _ = project(sight.grid, x[:, None], y[:, :, None])
    points = torch.stack([2 * u / width - 1, 2 * v / height - 1], 3).clamp(-2, 2)
    return warp(maps, points, inside.expand(len(maps), -1, -1), s)


def _in_closed_form(maps: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    """Exact means: the average of a bilinear map over an upright box is a product of one matrix per axis."""
    moved = sight.moved()

    def product(regions: list[Region]) -> tuple[Tensor, Tensor]:
        columns, rows = (_means(sight, axis, regions, moved, maps.shape[3 - axis]) for axis in (0, 1))
        valid = rows.sum(2)[:, None, :, None] * columns.sum(2)[:, None, None]
        means = _both_sides(torch.from_numpy(rows).to(maps), maps, torch.from_numpy(columns).to(maps))
        return means, torch.from_numpy(valid).to(maps)

    warped, valid = product(sight.frames)
    for hole in sight.holes:
        erased, share = product([*sight.frames, hole])
        warped, valid = warped - erased, valid - share
    return warped, valid


def _both_sides(rows: Tensor, maps: Tensor, columns: Tensor) -> Tensor:
    """rows [B, n, h] times each map [B, C, h, w] times columns [B, m, w] transposed; twice as fast as broadcasting."""
    (batch, channels, height, width), n, m = maps.shape, rows.shape[1], columns.shape[1]
    side_by_side = rows @ maps.transpose(1, 2).reshape(batch, height, channels * width)
    stacked = side_by_side.view(batch, n * channels, width) @ columns.mT
    return stacked.view(batch, n, channels, m).transpose(1, 2)


def _means(sight: Sight, axis: int, regions: list[Region], moved: Flags, cells: int) -> Floats:
    """Means along one axis of linear interpolation between cell centres, as matrices [B, n, cells].

    Interpolation is a sum of ramps, one between each two neighbouring centres; a ramp's integral is a parabola. Rows
    sum to the share of the output cell that lies in all regions. Where a map is moved, its centres are read.
    """
    scale, offset = along(sight.grid, axis)
    edges = np.tile(np.arange(sight.out[1 - axis] + 1, dtype=scale.dtype), (len(scale), 1))
    low, high = (part.clip(*interval(regions, axis)) for part in (edges[:, :-1], edges[:, 1:]))
    share = (high - low)[:, :, None]
    starts = np.arange(cells - 1, dtype=scale.dtype) + 0.5

    def into(position: Floats) -> Floats:
        return (scale * position + offset)[:, :, None] - starts

    def integral(t: Floats) -> Floats:
        found: Floats = t.clip(0, 1) ** 2 / 2 + (t - 1).clip(0)
        return found

    averaged = (integral(into(high)) - integral(into(low))) / scale[:, :, None]
    read = into(edges[:, :-1] + 0.5).clip(0, 1) * share
    ramps = np.where(moved[:, None, None], read, averaged)
    steps: Floats = np.concatenate([share, ramps, np.zeros_like(share)], 2)
    return -np.diff(steps, axis=2)
