"""Where pixels came from: what a recorded transform did to one image, and maps that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2kd.regions import Region
from e2kd.warping import warp_by_matrix

if TYPE_CHECKING:
    from e2kd.frozen.views import CanonicalView

Matrix = NDArray[np.float64]

SIDE = 256  # pixels; unit squares are given to `warp_by_matrix` as images of a usual size
EVERYWHERE = np.array([[0.5, 0, 0.25], [0, 0.5, 0.25], [0, 0, 1]])  # takes any image into the middle of the unit square
NOWHERE = np.array([[1.0, 0, 2], [0, 1, 2], [0, 0, 1]])  # and this one out of it


class Step(NamedTuple):
    """One operation: result -> input [3, 3] in unit squares; for an eraser result -> the box it erased."""

    back: Matrix
    erases: bool = False

    @property
    def fills(self) -> bool:
        """Whether some of the result came from outside of the input."""
        *corners, depth = self.back @ np.array([[0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
        if depth.min() <= 0:
            return True
        places = np.stack(corners) / depth
        return bool(places.min() < -1e-9 or places.max() > 1 + 1e-9)


class Geometry(NamedTuple):
    """How one augmented image lies in its canonical image; all matrices are [3, 3] between unit squares.

    Attributes:
        matrix: augmented -> canonical image.
        frames: augmented image -> images on the way, outside of which it was filled; the canonical one is the last.
        holes: augmented image -> boxes that were erased.
    """

    matrix: Matrix
    frames: list[Matrix]
    holes: list[Matrix]


def box(left: float, top: float, width: float, height: float) -> Matrix:
    """Unit square -> a box."""
    return np.array([[width, 0, left], [0, height, top], [0, 0, 1]], dtype=np.float64)


def in_units(matrix: Matrix, size: tuple[int, int]) -> Matrix:
    """A matrix to pixels of an image of size (H, W), to its unit square instead."""
    found: Matrix = matrix / np.array([[size[1]], [size[0]], [1.0]])
    return found


def inverse(matrix: Matrix) -> Matrix:
    """From there to here."""
    return np.linalg.inv(matrix).astype(np.float64)


def framed(view: CanonicalView, image: Any) -> Matrix:
    """An original image -> its canonical view, between unit squares.

    >>> from e2kd.frozen.views import CanonicalView
    >>> framed(CanonicalView((4, 4)), torch.zeros(3, 4, 8)).tolist()
    [[2.0, 0.0, -0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    height, width = size_of(image)
    placed = view.placement(height, width)
    top, left, high, wide = placed if hasattr(image, "convert") else map(round, placed)  # tensors are cut at pixels
    return inverse(in_units(box(left, top, wide, high), (height, width)))


def size_of(image: Any) -> tuple[int, int]:
    """(H, W) of a PIL image, a tensor [C, H, W] or an array [H, W, C]."""
    if hasattr(image, "convert"):
        return image.height, image.width
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.shape[-2:]
    return int(height), int(width)


def composed(steps: Sequence[Step], frame: Matrix) -> Geometry:
    """The geometry of all steps together.

    Args:
        steps: in the order in which they ran.
        frame: the original image -> canonical image, between unit squares.

    >>> mirror = Step(box(1, 0, -1, 1))
    >>> composed([mirror, mirror], np.eye(3)).matrix.tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    matrix, frames, holes = np.eye(3), [], []
    for step in reversed(steps):
        if step.erases:
            holes.append(step.back @ matrix)
            continue
        matrix = step.back @ matrix
        if step.fills:
            frames.append(matrix)
    matrix = frame @ matrix
    if frames and np.allclose(frames[-1], matrix):
        frames.pop()  # the same frame twice would count its edge twice
    return Geometry(matrix, [*frames, matrix], holes)


def follow(maps: Tensor, geometries: Sequence[Geometry]) -> tuple[Tensor, Tensor]:
    """Maps [B, C, h, w] of canonical images in the frames of augmented images, with what is known of each cell.

    Returns:
        Maps [B, C, h, w] and shares [B, 1, h, w], as `warp_by_matrix` gives them.

    >>> mirror = composed([Step(box(1, 0, -1, 1))], np.eye(3))
    >>> follow(torch.tensor([[[[1., 2.]]]]), [mirror])[0]
    tensor([[[[2., 1.]]]])
    """
    size = (SIDE, SIDE)
    frames = _stacked([g.frames for g in geometries], EVERYWHERE)
    holes = _stacked([g.holes for g in geometries], NOWHERE)
    return warp_by_matrix(maps, _pixels([g.matrix for g in geometries]), size, size, frames=frames, holes=holes)


def _stacked(matrices: Sequence[list[Matrix]], missing: Matrix) -> list[Region]:
    longest = max(map(len, matrices))
    filled: Any = [[*found, *[missing] * (longest - len(found))] for found in matrices]
    return [Region.frame(_pixels(same), (SIDE, SIDE)) for same in zip(*filled, strict=True)]


def _pixels(matrices: Sequence[Matrix]) -> Tensor:
    """Between images of `SIDE` instead of unit squares, [B, 3, 3]."""
    return torch.from_numpy(np.stack(matrices) * np.array([[1, 1, SIDE], [1, 1, SIDE], [1 / SIDE, 1 / SIDE, 1]]))
