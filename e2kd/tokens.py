"""Whether tokens [B, L, C] are patches of the images; those of a pooling only count up to a square."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from e2kd.layout import Layout, grid_of
from e2kd.probe import Call, Trace
from e2kd.shapes import Shape, Shapes

Grid = tuple[int, int]


def are_patches(layout: Layout, call: Call, found: Trace, model: nn.Module, known: int | None = None) -> bool:
    """Whether the tokens that a call returns lie on the grid of a layout.

    Clusters, parts, queries and the channels of a bilinear pooling may be a square number as well. Patches get fewer
    with smaller images, so the network is shown some, once. Where it takes none, or resizes them, the grid must be one
    that its convolutions have, or one to which tokens of such a grid are merged.

    Args:
        known: tokens before the patch tokens, as the network says.
    """
    assert layout.found is not None
    grid = layout.found[:2]
    smaller = found.at_half_size(model)
    returned = smaller.of(call.name, call.index)
    other = None if returned is None else _grid(returned, layout.prefix, smaller.image_size)
    if other is not None and other[0] * other[1] < grid[0] * grid[1]:
        return True
    if returned is None or _resizes(found.shapes, smaller):
        return _is_convolved(grid, found.shapes, may_be_merged=layout.prefix in (0, known))
    return other == grid and _is_made_of_any(grid, found.shapes, smaller)


def _grid(shape: Shape, prefix: int, image_size: Grid) -> Grid | None:
    return grid_of(shape[1] - prefix, image_size) if len(shape) == 3 else None


def _resizes(shapes: Shapes, smaller: Shapes) -> bool:
    """Whether a network brings all images to one size before it looks at them, so that smaller ones tell nothing."""
    made, again = ({shape[1:] for shape in some.convolved} for some in (shapes, smaller))  # of fewer images
    return bool(made) and made == again


def _is_convolved(grid: Grid, shapes: Shapes, *, may_be_merged: bool) -> bool:
    """Whether convolutions made such a grid, or one that halves to it; any grid counts where none made one."""
    images = shapes.image_size
    made = {(h, w) for *_, h, w in shapes.convolved if h * w > 1 and (h < images[0] or w < images[1])}
    return not made or grid in made or (may_be_merged and any(grid in _merged(larger) for larger in made))


def _merged(grid: Grid) -> Iterator[Grid]:
    """The grids that come of merging 2 x 2 cells to one, again and again.

    >>> list(_merged((14, 14)))
    [(7, 7), (4, 4), (2, 2), (1, 1)]
    """
    while max(grid) > 1:
        grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        yield grid


def _is_made_of_any(grid: Grid, shapes: Shapes, smaller: Shapes) -> bool:
    """Whether a module makes this very grid of images of any size, as adaptive pools do."""
    return any(
        _has_grid(shape, grid) and _has_grid(other, grid)
        for name, returned in shapes.returned.items()
        for shape, other in zip(returned, smaller.returned.get(name, ()), strict=False)
    )


def _has_grid(shape: Shape, grid: Grid) -> bool:
    return len(shape) == 4 and shape[2:] == grid
