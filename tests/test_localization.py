"""Where explanations lie: energy on the object, and intersection over union."""

from __future__ import annotations

import math

import pytest
import torch

from e2kd.localization import energy_on_mask, intersection_over_union


def test_epg_of_maps_on_the_masks_grid() -> None:
    maps = torch.tensor([[[[3.0, 1.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]], [[[0.0, 2.0], [0.0, 0.0]]]])
    masks = torch.tensor([[True, False], [False, False]]).expand(3, 2, 2)
    torch.testing.assert_close(energy_on_mask(maps, masks), torch.tensor([0.75, math.nan, 0.0]), equal_nan=True)


def test_epg_of_a_map_brought_to_the_masks_size() -> None:
    """Bilinear from 2 to 4 cells weighs (1, 3/4, 1/4, 0): inside (7/4)^2 of 2^2."""
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = True
    assert energy_on_mask(torch.tensor([[[[5.0, 0.0], [0.0, 0.0]]]]), mask).item() == pytest.approx(49 / 64)


def test_only_positive_evidence_has_energy() -> None:
    mask = torch.tensor([[[True, False]]])
    assert energy_on_mask(torch.tensor([[[[1.0, -9.0]]]]), mask).item() == 1


def test_iou_of_the_object_itself_is_one_whatever_its_size() -> None:
    masks = torch.rand(5, 6, 6, generator=torch.Generator().manual_seed(0)) > torch.linspace(0.1, 0.9, 5)[:, None, None]
    torch.testing.assert_close(intersection_over_union(masks[:, None].float() + 1, masks), torch.ones(5))


def test_iou_by_hand() -> None:
    maps = torch.tensor([[[[4.0, 3.0, 2.0, 1.0]]]] * 4)
    masks = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 1, 0]], [[0, 0, 0, 1]], [[0, 0, 0, 0]]])
    expected = torch.tensor([1, 1 / 3, 0, math.nan])
    torch.testing.assert_close(intersection_over_union(maps, masks), expected, equal_nan=True)
    ties = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    assert intersection_over_union(ties, torch.tensor([[[1, 0, 0, 0]]])).item() == 0.5
    assert intersection_over_union(ties, torch.tensor([[[1, 1, 1, 1]]])).item() == 0.5  # zeros never belong to a map
    assert intersection_over_union(0 * ties, torch.tensor([[[1, 0, 0, 0]]])).isnan().all()


def test_shapes_that_do_not_fit() -> None:
    for maps, masks in ((torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4)), (torch.rand(2, 1, 4, 4), torch.ones(3, 4, 4))):
        with pytest.raises(ValueError, match="of the same images"):
            energy_on_mask(maps, masks)
