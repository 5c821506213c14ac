"""Where cells of an augmented image come from: homographies, and boxes outside of which there is nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Flags = NDArray[np.bool_]
Floats = NDArray[Any]


class Region(NamedTuple):
    """A box in an image on the way from the canonical to the augmented one.

    Attributes:
        matrices: augmented pixels -> pixels of the image with the box, [B, 3, 3].
        box: left, top, right, bottom in those pixels, [B, 4].
    """

    matrices: Tensor
    box: Tensor

    @classmethod
    def frame(cls, matrices: Tensor, size: tuple[int, int]) -> Region:
        """All of an image of size (H, W)."""
        return cls(matrices, matrices.new_tensor([0, 0, size[1], size[0]]).expand(len(matrices), 4))

    def at(self, rows: Tensor) -> Region:
        """The region of some samples."""
        return Region(self.matrices[rows], self.box[rows])

    def after(self, matrix: Tensor) -> Region:
        """The region for points that go through a matrix [3, 3] first."""
        return Region(self.matrices @ matrix, self.box)

    def like(self, tensor: Tensor) -> Region:
        """The region on the device and in the type of a tensor."""
        return Region(self.matrices.to(tensor), self.box.to(tensor))

    def coverage(self, x: Tensor, y: Tensor, side: float) -> Tensor:
        """Share of squares around points that lies in the region, to first order in their side."""
        share = torch.ones_like(x + y)
        for axis, (centre, width) in enumerate(project_squares(self.matrices, x, y)):
            low, high = (self.box[:, k, None, None] for k in (axis, axis + 2))
            whole, reach = width * side, width * side / 2
            outside = (centre + reach - high).clamp(0) + (low - centre + reach).clamp(0)  # exactly 0 for what is inside
            share = share * ((whole - outside) / whole).clamp(0, 1)
        return share


class Sight(NamedTuple):
    """What the cells of an augmented image see of maps of the canonical one.

    Attributes:
        grid: output cells -> map cells, [B, 3, 3].
        frames: outside of any of them the image was filled; their matrices start from output cells.
        holes: inside of them it was erased.
        cells: grid (h, w) of the maps.
        out: grid (n, m) of the output.
        near: how many cells count as no distance.
    """

    grid: Tensor
    frames: list[Region]
    holes: list[Region]
    cells: tuple[int, int]
    out: tuple[int, int]
    near: float

    def at(self, rows: Tensor) -> Sight:
        """What some samples see."""
        frames, holes = ([r.at(rows) for r in part] for part in (self.frames, self.holes))
        return self._replace(grid=self.grid[rows], frames=frames, holes=holes)

    def like(self, tensor: Tensor) -> Sight:
        """The same on the device and in the type of a tensor."""
        frames, holes = ([r.like(tensor) for r in part] for part in (self.frames, self.holes))
        return self._replace(grid=self.grid.to(tensor), frames=frames, holes=holes)

    def upright(self) -> Flags:
        """Which samples see upright boxes, at most one of them a hole (two may overlap): bool [B]."""
        upright = keeps_axes(self.grid)
        for region in (*self.frames, *self.holes):
            upright = upright & keeps_axes(region.matrices)
        return upright & (self._reaching() < 2) if len(self.holes) > 1 else upright

    def _reaching(self) -> NDArray[np.int64]:
        """How many holes reach into the output, where boxes are upright, [B]; others are there for the batch's sake."""
        count = np.zeros(len(self.grid), np.int64)
        with np.errstate(all="ignore"):  # boxes that are not upright have no interval
            for hole in self.holes:
                ends = [interval([hole], axis) for axis in (0, 1)]
                within = [(low < n) & (high > 0) for (low, high), n in zip(ends, reversed(self.out), strict=True)]
                count += (within[0] & within[1])[:, 0]
        return count

    def moved(self) -> Flags:
        """Which samples see the whole map cell by cell: as it is, flipped, in quarter turns: bool [B]."""
        grid = array(self.grid)
        grid = grid / grid[:, 2:, 2:]
        turn, offset = grid[:, :2, :2], grid[:, :2, 2]
        out, cells = (np.array([n[1], n[0]], grid.dtype) for n in (self.out, self.cells))
        whole = turn.round()
        fits = (np.abs(whole).sum(1) == 1).all(1) & (np.abs(whole) @ out == cells).all(1)
        drift = np.abs(turn - whole).max((1, 2)) * out.max() / 2 + np.abs(turn @ out / 2 + offset - cells / 2).max(1)
        moved: Flags = fits & (drift + np.abs(grid[:, 2, :2]).max(1) * out.max() ** 2 < self.near)
        return moved

    def zoom(self) -> Tensor:
        """How many map cells an output cell is wide, where it is widest within the maps, [B]."""
        y, x = (torch.linspace(0, n, 5, dtype=self.grid.dtype, device=self.grid.device) for n in self.out)
        (u, width), (v, height) = project_squares(self.grid, x[None, None], y[None, :, None])
        within = (u >= 0) & (u <= self.cells[1]) & (v >= 0) & (v <= self.cells[0])
        return (torch.maximum(width, height) * within).amax((1, 2))


def project(matrices: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points (x, y) through homographies [B, 3, 3]: where they come to lie, and the depth they were divided by.

    Args:
        x: broadcastable with `y` to [B, n, m].

    >>> one = torch.ones(1, 1, 1)
    >>> x, y, depth = project(torch.diag(torch.tensor([4.0, 2.0, 2.0]))[None], one, one)
    >>> x.item(), y.item(), depth.item()
    (2.0, 1.0, 2.0)
    """
    rows = [matrices[:, k, :, None, None] for k in range(3)]
    x, y, depth = (row[:, 0] * x + row[:, 1] * y + row[:, 2] for row in rows)
    depth = torch.where(depth.abs() < 1e-6, torch.full_like(depth, 1e-6), depth)  # the horizon
    return x / depth, y / depth, depth


def project_squares(matrices: Tensor, x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Unit squares around points through homographies: centre and width along x, centre and width along y.

    To first order; a turned square is as wide as a box of the same variance.
    """
    u, v, depth = project(matrices, x, y)
    across, down = (
        torch.hypot(*((matrices[:, axis, k, None, None] - c * matrices[:, 2, k, None, None]) / depth for k in (0, 1)))
        for axis, c in enumerate((u, v))
    )
    return (u, across), (v, down)


def visible(frames: Sequence[Region], holes: Sequence[Region], x: Tensor, y: Tensor, side: float) -> Tensor:
    """Share in [0, 1] of squares around points that lies in all frames and in no hole.

    Args:
        x: broadcastable with `y` to [B, n, m]; so is the result.
        side: of the squares, in the units of the points.
    """
    share = torch.ones_like(x + y)
    for frame in frames:
        share = share * frame.coverage(x, y, side)
    for hole in holes:
        share = share * (1 - hole.coverage(x, y, side))
    return share


def keeps_axes(matrices: Tensor) -> Flags:
    """Which homographies [B, 3, 3] leave horizontals horizontal and verticals vertical: bool [B]."""
    sizes = np.abs(array(matrices))
    off = sizes[:, (0, 1, 2, 2), (1, 0, 0, 1)].max(1)
    kept: Flags = off <= 1e-9 * sizes[:, :2, :2].max((1, 2))
    return kept


def interval(regions: list[Region], axis: int) -> tuple[Floats, Floats]:
    """Where along one axis, in output cells, all regions have something: from, to, each [B, 1]."""
    low, high = np.array([[-math.inf]]), np.array([[math.inf]])
    for region in regions:
        scale, offset = along(region.matrices, axis)
        ends = np.sort((array(region.box)[:, axis::2] - offset) / scale, 1)
        low, high = np.maximum(low, ends[:, :1]), np.minimum(high, ends[:, 1:])
    return low, high


def along(matrices: Tensor, axis: int) -> tuple[Floats, Floats]:
    """Scale and offset along one axis of homographies that keep axes, each [B, 1]."""
    found = array(matrices)
    return found[:, axis, axis, None] / found[:, 2, 2:], found[:, axis, 2:] / found[:, 2, 2:]


def array(tensor: Tensor) -> Floats:
    """For arithmetic on a few numbers, of which NumPy does three in the time torch needs for one."""
    found: Floats = tensor.detach().cpu().numpy()
    return found
