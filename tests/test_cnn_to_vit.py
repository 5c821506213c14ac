"""A convolutional teacher and a transformer student on real photographs, each pair in one line, live and frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

import e2kd

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def photos(shared: Callable[[str], Path]) -> Tensor:
    """Four cats and dogs, [4, 3, 224, 224] in [0, 1]."""
    paths = sorted(shared("data/catsdogs1400/val").rglob("*.jp*g"))[::80][:4]
    images = [center_crop(resize(pil_to_tensor(Image.open(path).convert("RGB")), 224), 224) for path in paths]
    return torch.stack(images) / 255


def standard() -> tuple[nn.Module, nn.Module]:
    return timm.create_model("vit_tiny_patch16_224"), timm.create_model("resnet50")


def bcos() -> tuple[nn.Module, nn.Module]:
    with_encoding = lambda model: nn.Sequential(e2kd.bcos.AddInverse(), model)  # noqa: E731
    return with_encoding(e2kd.bcos.vit_ti()), with_encoding(e2kd.bcos.densenet121())


def cosines(student: nn.Module, teacher: nn.Module | e2kd.FrozenTeacher, batches: DataLoader) -> list[float]:  # type: ignore[type-arg]
    """Similarity of the explanations at each step, with the explanation term alone."""
    criterion = e2kd.E2KDLoss(student, teacher, kd_weight=0)
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    seen = []
    for _ in range(STEPS):
        for images, targets in batches:
            optimizer.zero_grad()
            criterion(student.train()(images), targets).backward()
            optimizer.step()
            seen.append(criterion.parts["cosine"].item())
    return seen


@pytest.mark.parametrize("pair", [standard, bcos], ids=lambda pair: pair.__name__)
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_a_transformer_comes_to_look_where_its_convolutional_teacher_looks(
    pair: Callable[[], tuple[nn.Module, nn.Module]], frozen: bool, photos: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student, teacher = pair()
    data = TensorDataset(photos, torch.zeros(4, dtype=torch.long))
    if not frozen:
        seen = cosines(student, teacher.eval(), DataLoader(data, 4))
    else:
        cache = e2kd.freeze(teacher.eval(), data, tmp_path, progress=False)
        assert cache is not None
        seen = cosines(student, cache, DataLoader(e2kd.FrozenDataset(data, cache), 4))
    assert seen[-1] > seen[0] + 0.02
