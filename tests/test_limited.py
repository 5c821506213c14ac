"""Students of few images: those of one seed differ in their criterion alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import e2kd
from benchmarks import limited_training
from benchmarks.cifar import ResNet
from benchmarks.cifar_data import Images
from benchmarks.cifar_families import FAMILIES
from benchmarks.limited_training import ARMS, Data, Settings, train
from benchmarks.paired import Case

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::e2kd.errors.NoEffectWarning"),  # networks of random weights
]


def test_every_arm_of_a_seed_sees_the_same_augmentations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms whose rival has layers of its own too, which are drawn at random."""
    seen: list[torch.Tensor] = []

    class Spied(e2kd.JointAugmentation):
        def forward(self, images: torch.Tensor, taught: e2kd.Taught) -> tuple[torch.Tensor, e2kd.Taught]:
            found = super().forward(images, taught)
            seen.append(found[0])
            return found

    monkeypatch.setattr(e2kd, "JointAugmentation", Spied)
    monkeypatch.setattr(limited_training, "BATCH", 10)
    pool = Images(torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8), torch.arange(10))
    data = Data(replace(FAMILIES["standard"], student=lambda: ResNet(1)), ResNet(1).eval(), pool, {}, {})
    batches = {}
    for arm in ARMS:
        seen.clear()
        train(Case("test", arm, 3, 4.0, 1.0), data, Settings(1, epochs=2))
        batches[arm] = torch.stack(seen)
    assert batches["kd"].shape == (2, 10, 3, 32, 32)
    assert [arm for arm in ARMS if not torch.equal(batches[arm], batches["kd"])] == []
