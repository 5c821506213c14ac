"""A sample's lesson is the same in every batch: what other samples went through is nothing to it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2

import e2kd
from e2kd.frozen.geometry import EVERYWHERE, SIDE, Geometry, composed, follow, framed
from e2kd.frozen.recording import Recorder
from e2kd.regions import Region

VIEW = e2kd.CanonicalView((48, 48), "squash")
COUNT = 24
PIPELINES = {
    "torchvision's RandAugment": v2.Compose([v2.RandomResizedCrop(48), v2.RandAugment()]),
    "timm's": create_transform(48, is_training=True, auto_augment="rand-m9-mstd0.5-inc1"),
    "erased now and then": v2.Compose([v2.ToImage(), v2.RandomErasing(0.5), v2.RandomErasing(0.5)]),
    "now and then": v2.Compose([v2.RandomApply([v2.RandomAffine(20)], 0.5)] * 2),
}  # fmt: skip


def drawn(transform: Any) -> list[Geometry]:
    """What happened to each image of a batch."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (timm draws from it)
    torch.manual_seed(0)
    recorder, image = Recorder(transform), Image.new("RGB", (96, 72))
    return [composed(recorder(image)[1], framed(VIEW, image)) for _ in range(COUNT)]


def alone(maps: Tensor, geometries: list[Geometry]) -> tuple[Tensor, Tensor]:
    """Maps and shares of samples that are followed one at a time."""
    each = [follow(maps[k : k + 1], [geometry]) for k, geometry in enumerate(geometries)]
    return torch.cat([found for found, _ in each]), torch.cat([valid for _, valid in each])


@pytest.mark.parametrize("cells", [7, 14])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_lesson_does_not_depend_on_its_batch(pipeline: str, cells: int) -> None:
    geometries = drawn(PIPELINES[pipeline])
    assert len({(len(geometry.frames), len(geometry.holes)) for geometry in geometries}) > 1
    maps = torch.rand(COUNT, 1, cells, cells, generator=torch.Generator().manual_seed(0))
    for together, single in zip(follow(maps, geometries), alone(maps, geometries), strict=True):
        torch.testing.assert_close(together, single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cells", [1, 7, 56, 224])
def test_a_frame_that_stands_for_none_covers_every_cell(cells: int) -> None:
    pixels = torch.from_numpy(EVERYWHERE) * torch.tensor([[1.0, 1, SIDE], [1, 1, SIDE], [1, 1, 1]])
    to_pixels = torch.diag(torch.tensor([SIDE / cells, SIDE / cells, 1.0]).double())
    region = Region.frame((pixels @ to_pixels)[None], (SIDE, SIDE)).like(torch.zeros(()))
    centres = (torch.arange(cells * 2) + 0.5) / 2
    share = region.coverage(centres[None, None], centres[None, :, None], 0.5)
    assert torch.equal(share, torch.ones_like(share))
