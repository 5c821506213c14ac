"""What looks at a network leaves it as it was, and sees what the network sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import e2kd
from e2kd.metrics import EnergyPointingGame, ExplanationSimilarity
from e2kd.objects import box_masks
from e2kd.perturb import road_curves
from e2kd.transfer import read


class Counting(nn.Module):
    """Takes bytes, and counts its images in a buffer, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        self.seen += len(x)
        logits: Tensor = self.head(self.trunk(x))
        return logits


BYTES = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FLOATS = BYTES.float() / 255
LOOKS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "explain": e2kd.explain,
    "read": lambda model, x: read(model, x, ["trunk.1", "trunk.3"]),
    "unicam": lambda model, x: e2kd.unicam(model, Counting(), x, layers=["trunk.3"]),
    "road_curves": lambda model, x: road_curves(model, x, torch.rand(len(x), 1, 8, 8), percentages=[50]),
}


@pytest.mark.parametrize("name", LOOKS)
def test_buffers_stay_what_they_are(name: str) -> None:
    model = Counting()
    LOOKS[name](model, FLOATS)
    assert int(model.seen) == 0


def test_a_network_that_counts_in_its_forward_is_taught() -> None:
    student = Counting()
    criterion = e2kd.E2KDLoss(student, Counting(), kd_weight=0)
    criterion(student(FLOATS)).backward()
    assert criterion.explained.way != "graph"
    assert int(student.seen) == 8


def test_bytes_are_read_as_the_network_reads_them() -> None:
    found, wanted = (read(Counting(), x, ["trunk.3"]) for x in (BYTES, FLOATS))
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.layers[0].maps, wanted.layers[0].maps)
    with pytest.raises(ValueError, match=r"floating-point images.*torch\.uint8"):
        road_curves(Counting(), BYTES, torch.rand(8, 1, 8, 8))


def test_boxes_in_shares_of_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match="shares of the image"):
        box_masks([[[0.1, 0.2, 0.5, 0.9]], []], (64, 64))
    assert box_masks([[[0, 0, 1, 1]]], (4, 4)).sum() == 1


def test_boxes_in_half_precision_cover_what_they_say() -> None:
    assert box_masks([torch.tensor([[3.0, 3.0, 300.0, 300.0]], dtype=torch.bfloat16)], (512, 512)).sum() == 297**2


def test_a_score_that_was_asked_for_is_that_of_all_after_merging() -> None:
    metrics = [EnergyPointingGame(), EnergyPointingGame()]
    for metric, value in zip(metrics, (1.0, 0.0), strict=True):
        mask = torch.zeros(1, 4, 4)
        mask[:, :2] = value
        mask[:, 2:] = 1 - value
        maps = torch.zeros(1, 1, 4, 4)
        maps[:, :, 0] = 1
        metric.update(maps, mask)
    assert float(metrics[0].compute()) == 1
    metrics[0].merge_state(metrics[1])
    assert float(metrics[0].compute()) == 0.5


def test_maps_in_half_precision_on_two_grids() -> None:
    metric, maps = ExplanationSimilarity(), torch.rand(2, 1, 14, 14).half()
    metric.update(maps, torch.rand(2, 1, 7, 7).half())
    assert 0 < float(metric.compute()) <= 1
