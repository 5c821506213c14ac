"""Warping of maps: exact moves, exact means, frames and holes, independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from e2kd.regions import Region, project, visible
from e2kd.warping import warp, warp_by_matrix

SIZE = (48, 64)  # of canonical and augmented images here


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def matrix(rows: list[list[float]], batch: int = 1) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).repeat(batch, 1, 1)


def identity(batch: int = 1) -> Tensor:
    return torch.eye(3, dtype=torch.float64).repeat(batch, 1, 1)


def flip(width: int) -> Tensor:
    return matrix([[-1, 0, width], [0, 1, 0], [0, 0, 1]])


def about_centre(batch: int, seed: int = 0, turn: float = 0.6, tilt: float = 0.0) -> Tensor:
    """Random zooms, shifts and turns about the centre of images of SIZE; `tilt` makes them homographies."""
    r = noise(batch, 7, seed=seed) * 2 - 1
    angle, zoom = r[:, 0] * turn, torch.exp(0.5 * r[:, 1:3])
    made = identity(batch)
    made[:, 0, :2] = torch.stack([zoom[:, 0] * angle.cos(), -zoom[:, 1] * angle.sin()], 1)
    made[:, 1, :2] = torch.stack([zoom[:, 0] * angle.sin(), zoom[:, 1] * angle.cos()], 1)
    made[:, :2, 2] = r[:, 3:5] * 8
    made[:, 2, :2] = r[:, 5:7] * tilt / max(SIZE)
    centre, back = identity(), identity()
    centre[:, :2, 2], back[:, :2, 2] = (
        torch.tensor([SIZE[1] / 2, SIZE[0] / 2]),
        -torch.tensor([SIZE[1] / 2, SIZE[0] / 2]),
    )
    return centre @ made @ back


def dense(maps: Tensor, matrices: Tensor, frames: list[Region], holes: list[Region], parts: int = 32) -> Tensor:
    """The mean over each cell, slowly: many points, each inside or not."""
    n, m = maps.shape[-2:]
    y = ((torch.arange(n * parts, dtype=torch.float64) + 0.5) * SIZE[0] / n / parts)[None, :, None]
    x = ((torch.arange(m * parts, dtype=torch.float64) + 0.5) * SIZE[1] / m / parts)[None, None]
    weight = torch.ones_like(x + y)
    for regions, outside in ((frames, False), (holes, True)):
        for region in regions:
            u, v, _ = project(region.matrices, x, y)
            left, top, right, bottom = region.box[:, :, None, None].unbind(1)
            weight = weight * (((u > left) & (u < right) & (v > top) & (v < bottom)) != outside)
    u, v, _ = project(matrices, x, y)
    points = torch.stack([2 * u / SIZE[1] - 1, 2 * v / SIZE[0] - 1], 3)
    read = F.grid_sample(maps, points, padding_mode="border", align_corners=False)
    return F.avg_pool2d(read * weight[:, None], parts)


def box(*sides: float, batch: int = 1) -> Tensor:
    return torch.tensor(sides, dtype=torch.float64).expand(batch, 4)


@pytest.mark.parametrize("shape", [(2, 1, 7, 7), (2, 6, 56, 56), (2, 3, 5, 9)])
def test_moves_of_whole_maps_are_exact(shape: tuple[int, ...]) -> None:
    """Identity, flips and quarter turns return the very cells, however rough the map."""
    maps, (height, width) = noise(*shape), SIZE
    everything = torch.ones(2, 1, *shape[2:], dtype=torch.float64)
    upside_down = matrix([[1, 0, 0], [0, -1, height], [0, 0, 1]])
    for matrices, expected in (
        (identity(2), maps),
        (flip(width).repeat(2, 1, 1), maps.flip(3)),
        (upside_down.repeat(2, 1, 1), maps.flip(2)),
        ((flip(width) @ upside_down).repeat(2, 1, 1), maps.rot90(2, (2, 3))),
    ):
        moved, valid = warp_by_matrix(maps, matrices, SIZE, SIZE)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(valid, everything, rtol=0, atol=1e-12)
    turned, valid = warp_by_matrix(
        maps, matrix([[0, -1, width], [1, 0, 0], [0, 0, 1]], 2), (width, height), SIZE, size=(shape[3], shape[2])
    )
    torch.testing.assert_close(turned, maps.rot90(1, (2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(valid, everything.mT, rtol=0, atol=1e-12)


def test_an_image_scaled_as_a_whole_keeps_its_map() -> None:
    maps = noise(1, 1, 7, 7)
    half = matrix([[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]])
    moved, valid = warp_by_matrix(maps, half, (96, 128), SIZE)
    torch.testing.assert_close(moved, maps, rtol=0, atol=1e-12)
    assert valid.min() > 1 - 1e-12


@pytest.mark.parametrize("holes", [0, 1])
def test_upright_boxes_are_averaged_exactly(holes: int) -> None:
    """The closed form equals dense sampling, up to the sampling's own error, for zooms, flips, frames and holes."""
    maps, matrices = noise(8, 2, 7, 9), about_centre(8, turn=0.0)
    matrices[::2] = matrices[::2] @ flip(SIZE[1])
    frames = [Region.frame(matrices, SIZE), Region(identity(8), box(3, 5, 60.5, 40, batch=8))]
    erased = [Region(identity(8), box(20, 10, 41, 33.3, batch=8))][:holes]
    moved, valid = warp_by_matrix(maps, matrices, SIZE, SIZE, frames=frames, holes=erased)
    torch.testing.assert_close(moved, dense(maps, matrices, frames, erased), rtol=0, atol=0.02)
    coarse = (moved - dense(maps, matrices, frames, erased, 12)).abs().mean()
    assert (moved - dense(maps, matrices, frames, erased, 48)).abs().mean() < 0.5 * coarse < 0.01
    torch.testing.assert_close(valid, dense(torch.ones_like(valid), matrices, frames, erased), rtol=0, atol=0.04)


def test_cells_of_a_finer_result_average_to_those_of_a_coarser() -> None:
    maps, matrices = noise(4, 1, 7, 7), about_centre(4, turn=0.0)
    coarse, valid = warp_by_matrix(maps, matrices, SIZE, SIZE, size=(5, 6))
    fine, fine_valid = warp_by_matrix(maps, matrices, SIZE, SIZE, size=(15, 18))
    torch.testing.assert_close(F.avg_pool2d(fine, 3), coarse)
    torch.testing.assert_close(F.avg_pool2d(fine_valid, 3), valid)


@pytest.mark.parametrize("tilt", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(8, 2, 7, 7), (3, 2, 24, 24)])
def test_turned_maps_are_averaged_closely(shape: tuple[int, ...], tilt: float) -> None:
    """The few points of the other way give the direction of the dense mean, with an inner frame and two holes."""
    maps, matrices = noise(*shape), about_centre(shape[0], tilt=tilt)
    inner = about_centre(shape[0], seed=1, turn=0.3)
    frames = [Region.frame(matrices, SIZE), Region(inner, box(6, 6, 58, 42, batch=shape[0]))]
    holes = [Region(identity(shape[0]), box(*b, batch=shape[0])) for b in ((20, 10, 41, 33), (30, 4, 50, 20))]
    moved, valid = warp_by_matrix(maps, matrices, SIZE, SIZE, frames=frames, holes=holes)
    expected = dense(maps, matrices, frames, holes)
    assert (1 - F.cosine_similarity(moved.flatten(1), expected.flatten(1))).mean() < 5e-4
    torch.testing.assert_close(valid, dense(torch.ones_like(valid), matrices, frames, holes), rtol=0, atol=0.12)
    assert (valid - dense(torch.ones_like(valid), matrices, frames, holes)).abs().mean() < 0.01


def test_one_for_all_ways_a_map_of_ones_becomes_its_own_validity() -> None:
    matrices = torch.cat([about_centre(4), about_centre(4, turn=0.0), identity(1)])
    ones, valid = warp_by_matrix(torch.ones(9, 1, 7, 7, dtype=torch.float64), matrices, SIZE, SIZE)
    torch.testing.assert_close(ones, valid)
    assert valid.min() >= 0
    assert valid.max() <= 1 + 1e-12
    assert valid.min() < 0.5 < valid.mean() < 1


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """A batch of turned and upright samples equals as many batches of one."""
    matrices = torch.cat([about_centre(3, tilt=0.3), about_centre(2, turn=0.0), identity(1), flip(SIZE[1])])
    maps = noise(7, 2, 7, 7)
    frames = [Region.frame(matrices, SIZE), Region(identity(7), box(2, 2, 60, 44, batch=7))]
    whole = warp_by_matrix(maps, matrices, SIZE, SIZE, frames=frames)
    for k in range(7):
        row = torch.tensor([k])
        one = warp_by_matrix(maps[row], matrices[row], SIZE, SIZE, frames=[frame.at(row) for frame in frames])
        for a, b in zip(one, whole, strict=True):
            torch.testing.assert_close(a, b[row], rtol=0, atol=1e-12)


def test_the_frame_of_an_image_on_the_way_leaves_zero_around_it() -> None:
    """A crop that was turned afterwards: what the crop cut off is fill, although the canonical image goes on there."""
    turned = about_centre(1, turn=0.6)
    maps = torch.ones(1, 1, 12, 16, dtype=torch.float64)
    small = identity()
    small[:, :2, 2] = 20.0  # the crop starts here
    crop = Region.frame(turned, (16, 16))
    alone, valid_alone = warp_by_matrix(maps, small @ turned, SIZE, SIZE)
    both, valid = warp_by_matrix(maps, small @ turned, SIZE, SIZE, frames=[Region.frame(small @ turned, SIZE), crop])
    assert valid.sum() < 0.5 * valid_alone.sum()
    torch.testing.assert_close(both, valid)
    assert (alone > 0).sum() > (both > 0).sum()


@pytest.mark.parametrize("turn", [0.0, 0.6])
def test_what_was_erased_altogether_is_exactly_zero(turn: float) -> None:
    """A cosine knows no scale: 1e-6 of a map that rounding left would count as much as a map."""
    matrices = about_centre(64, turn=turn)
    all_of_it = Region(identity(64), box(-0.5, -0.5, SIZE[1] + 0.25, SIZE[0] + 0.25, batch=64))
    for holes in ([all_of_it], [all_of_it, Region(identity(64), box(3.3, 5.1, 30.7, 20.9, batch=64))]):
        maps, valid = warp_by_matrix(noise(64, 1, 7, 7).float(), matrices, SIZE, SIZE, holes=holes)
        assert not maps.any()
        assert not valid.any()


def test_scale_of_a_homography_does_not_matter() -> None:
    maps = noise(4, 1, 7, 7)
    for turn in (0.0, 0.6):
        matrices = about_centre(4, turn=turn)
        for factor in (-3.0, 0.2):
            for a, b in zip(
                warp_by_matrix(maps, matrices, SIZE, SIZE),
                warp_by_matrix(maps, factor * matrices, SIZE, SIZE),
                strict=True,
            ):
                torch.testing.assert_close(a, b)


def test_a_horizon_in_the_image_gives_numbers() -> None:
    """Points at infinity are outside, not NaN."""
    row = 24.75  # where a part of a cell has its centre
    steep = matrix([[row, 0, 0], [0, row, 0], [0, -1, row]])
    maps, valid = warp_by_matrix(noise(1, 1, 8, 8), steep, SIZE, SIZE)
    assert maps.isfinite().all()
    assert valid.isfinite().all()
    assert valid.max() <= 1


def test_types_of_maps() -> None:
    turned = about_centre(2)
    exact, _ = warp_by_matrix(noise(2, 1, 7, 7), turned, SIZE, SIZE)
    for dtype, expected in ((torch.float16, torch.float32), (torch.float32, torch.float32)):
        maps, valid = warp_by_matrix(noise(2, 1, 7, 7).to(dtype), turned, SIZE, SIZE)
        assert maps.dtype == valid.dtype == expected
        torch.testing.assert_close(maps.double(), exact, rtol=0, atol=1e-3)
    assert exact.dtype == torch.float64


def test_warp_averages_what_it_reads_with_its_weights() -> None:
    maps = torch.tensor([[[[1.0, 3.0]]]])
    points = torch.tensor([[[[-0.5, 0.0], [0.5, 0.0]], [[-0.5, 0.0], [-0.5, 0.0]]]])
    inside = torch.tensor([[[1.0, 1.0], [0.0, 0.5]]])
    read, valid = warp(maps, points, inside, 2)
    assert read.item() == pytest.approx((1 + 3 + 0 + 0.5) / 4)
    assert valid.item() == pytest.approx(2.5 / 4)


def test_coverage_of_turned_squares_has_the_right_mean() -> None:
    """Along a straight edge, whatever its angle, half of what lies on it is inside."""
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)[None, None]
    for degrees in (0, 20, 45, 70):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        edge = Region(matrix([[c, -s, 0], [s, c, 0], [0, 0, 1]]), box(-1e6, -1e6, 0, 1e6))
        share = visible([edge], [], x / c if c > 0.5 else x, torch.zeros_like(x), 1.0)
        assert share.mean().item() == pytest.approx(0.5, abs=1e-3)
        assert share[0, 0, 0] == 1
        assert share[0, 0, -1] == 0
