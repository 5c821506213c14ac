"""Caches with a map for each class, and what `freeze` and `verify` say about any cache."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import e2kd
from e2kd.frozen import forecast
from e2kd.frozen.errors import CacheError
from e2kd.frozen.forecast import check_space
from e2kd.frozen.inspecting import describe
from e2kd.frozen.records import Record
from e2kd.frozen.writing import LARGEST_SHARD, _shard_rows
from e2kd.trainers.timm.launching import parser, settings

UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLASSES = 4


def net(seed: int = 0, width: int = 8, classes: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    )  # fmt: skip


def pixels(count: int = 16, shift: int = 0) -> TensorDataset:
    images = torch.randint(0, 256, (count, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images, (torch.arange(count) + shift) % CLASSES)


def frozen(path: Path, teacher: nn.Module | None = None, dataset: Any = None, **options: Any) -> e2kd.FrozenTeacher:
    options = {"normalization": UNIT, "batch_size": 8, "progress": False} | options
    done = e2kd.freeze(teacher or net(), pixels() if dataset is None else dataset, path, **options)
    assert done is not None
    return done


def every(path: Path, teacher: nn.Module | None = None, **options: Any) -> e2kd.FrozenTeacher:
    return frozen(path, teacher, **{"explainer": e2kd.CAM(), "classes": "all"} | options)


# Each map has its own scale


@pytest.mark.parametrize("map_type", ["int8", "float16"])
def test_maps_of_weak_classes_keep_their_precision(tmp_path: Path, map_type: str) -> None:
    teacher = net()
    with torch.no_grad():
        teacher[-1].weight[0] *= 1e4
    cache, dataset = every(tmp_path, teacher, map_type=map_type), pixels()
    stored = cache.rows(range(16)).maps
    for k in range(CLASSES):
        live = e2kd.explain(teacher, dataset.tensors[0] / 255, torch.full((16,), k), e2kd.CAM()).maps
        assert e2kd.cosine(stored[:, k : k + 1], live).min() > 0.999
    assert cache.verify(teacher, dataset, rows=16, augmentations={}).ok
    assert cache.store.record.row_bytes == Record(CLASSES, None, (CLASSES, 6, 6), map_type).row_bytes + 4 * (
        CLASSES - 1
    )


def test_a_layout_of_one_map_is_written_as_before_and_read_from_earlier_caches() -> None:
    record = Record(CLASSES, map_shape=(4, 2, 2))
    assert "map_count" not in record.to_json()
    assert Record.from_json(record.to_json()) == record
    several = Record(CLASSES, map_shape=(4, 2, 2), map_count=4)
    assert Record.from_json(several.to_json()) == several
    maps = torch.randn(3, 4, 2, 2) * torch.tensor([1.0, 1e-6, 0.0, 1e6])[:, None, None]
    found = several.encode(torch.zeros(3, CLASSES), maps, torch.zeros(3, dtype=torch.long), np.zeros(3, np.uint64))
    assert found["scales"].shape == (3, 4)
    torch.testing.assert_close(several.decode(found).maps, maps, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="map_count >= 1 that divides 4 channels, but got 3"):
        Record(CLASSES, map_shape=(4, 2, 2), map_count=3)


def test_zero_maps_are_counted_class_by_class(tmp_path: Path) -> None:
    teacher = net()
    with torch.no_grad():
        teacher[-1].weight.abs_()[1:] *= -1
    with pytest.warns(e2kd.NoEffectWarning, match=r"48 of 64 cached maps are zero .* CAM\(\)"):
        cache = frozen(tmp_path, teacher, classes="all")
    assert cache.store.zero_maps == 48
    assert "48 of 64 zero everywhere" in describe(cache)


# Verify


def test_labels_that_changed_are_a_problem(tmp_path: Path) -> None:
    cache = frozen(tmp_path, classes="labels")
    assert cache.verify(net(), pixels(), rows=16, augmentations={}).ok
    report = cache.verify(net(), pixels(shift=1), rows=16, augmentations={})
    assert report.problems == ["16 of 16 labels are others than those that the maps explain"]


def test_maps_of_another_teacher_are_told_apart_whatever_its_top_classes(tmp_path: Path) -> None:
    report = every(tmp_path).verify(net(seed=1), pixels(), rows=8, augmentations={})
    assert report.maps < 0.9
    assert "the live maps differ from the stored ones" in report.problems


@pytest.mark.parametrize("classes", ["teacher", "all"])
def test_a_teacher_of_other_classes_is_a_problem_in_words(tmp_path: Path, classes: str) -> None:
    report = frozen(tmp_path, explainer=e2kd.CAM(), classes=classes).verify(net(classes=5), pixels(), rows=8)
    assert "the teacher has 5 classes, the cache 4" in report.problems
    assert not report.fidelity


class Noisy(nn.Module):
    """The same weights on another device, as it were."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        return logits + 1e-3 * (logits.amax() - logits.amin()) * noise

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)


@pytest.mark.parametrize("top", [None, 50])
def test_rounding_that_swaps_classes_at_the_border_of_the_stored_ones_is_none(tmp_path: Path, top: int | None) -> None:
    teacher = net(width=16, classes=200)
    cache = frozen(tmp_path, teacher, top=top, maps=False)
    assert cache.verify(Noisy(teacher), pixels(), rows=16, augmentations={}).ok
    assert not cache.verify(net(seed=1, width=16, classes=200), pixels(), rows=16, augmentations={}).ok


def test_augmentations_are_rated_by_what_the_loss_compares(tmp_path: Path) -> None:
    """The mean over classes: one of large maps that survive does not speak for the others."""
    teacher = net()
    with torch.no_grad():
        teacher[-1].weight[0] *= 1000
    cache = every(tmp_path, teacher)

    def spoils_weak_classes(images: Tensor, taught: e2kd.Taught) -> tuple[Tensor, e2kd.Taught]:
        maps = taught.maps.clone()
        maps[:, 1:] = maps[:, 1:].flip(3)
        return images / 255, taught._replace(maps=maps)

    found = cache.verify(teacher, pixels(), rows=16, augmentations={"spoiled": spoils_weak_classes}).fidelity["spoiled"]
    assert found.same < 0.99
    assert found.images == 16


# Freeze


def test_what_can_not_be_stored_leaves_no_plan_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='Use map_type="int8"'):
        every(tmp_path, map_type="uint8")
    assert not list(tmp_path.iterdir())
    every(tmp_path, map_type="int8")
    with pytest.raises(CacheError, match=r"map_type is 'int8' there but 'float16' here\. Use another folder"):
        every(tmp_path)


def test_a_plan_without_rows_says_that_it_may_be_deleted(tmp_path: Path) -> None:
    images, labels = pixels().tensors
    labels[9] = 7  # is met in the second batch
    with pytest.raises(ValueError, match='use classes="teacher"'):
        frozen(tmp_path, dataset=TensorDataset(images, labels), classes="labels")
    with pytest.raises(CacheError, match=r"Nothing of it was computed: delete plan\.json"):
        frozen(tmp_path)
    (tmp_path / "plan.json").unlink()
    frozen(tmp_path)


@pytest.mark.parametrize("label", [None, "cat", [0.0, 1.0]])
def test_labels_that_are_no_class_indices_are_named(tmp_path: Path, label: Any) -> None:
    dataset = [(image, label) for image in pixels(8).tensors[0]]
    with pytest.raises(ValueError, match='classes="labels" needs class indices as labels, but got'):
        frozen(tmp_path, dataset=dataset, classes="labels")


def test_classes_of_no_maps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are to be none"):
        frozen(tmp_path, maps=False, classes="all")


def test_shards_have_no_more_bytes_than_memory_is_for() -> None:
    assert _shard_rows(1_281_167, Record(1000, map_shape=(1, 7, 7))) == 4096
    wide = Record(1000, map_shape=(1000, 14, 14), map_count=1000)
    assert 64 <= _shard_rows(1_281_167, wide) < 4096
    assert _shard_rows(1_281_167, wide) * wide.row_bytes <= LARGEST_SHARD


def test_a_disk_has_to_hold_what_its_own_processes_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, record = namedtuple("usage", "total used free"), Record(1000)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda path: usage(0, 0, 60 * record.row_bytes))
    check_space(record, 60, tmp_path)
    with pytest.raises(OSError, match="The cache needs"):
        check_space(record, 100, tmp_path)
    with pytest.warns(UserWarning, match="enough for one of 2 processes alone"):
        check_space(record, 100, tmp_path, world=2)
    with pytest.raises(OSError, match="The cache needs"):
        check_space(record, 200, tmp_path, world=2)


def test_the_room_that_a_cache_takes_is_said_without_a_terminal_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = frozen(tmp_path, progress=True)
    assert f"freezing 16 rows x {cache.store.record.row_bytes} bytes" in capfd.readouterr().err


# Students of such caches


def test_a_layer_alone_is_one_of_the_caches_explainer(tmp_path: Path) -> None:
    cache = every(tmp_path)
    said = parser().parse_args(["train.py", "--frozen-cache", "x", "--e2kd-layer", "1"])
    assert settings(said, cache)["explainer"] == e2kd.CAM("1")
    said = parser().parse_args(["train.py", "--frozen-cache", "x", "--e2kd-teacher-layer", "1"])
    with pytest.raises(SystemExit, match="leave --e2kd-teacher-layer out"):
        settings(said, cache)


def test_explainers_whose_signs_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"made by CAM, which is signed, but .* by GradCAM, which is >= 0"):
        e2kd.E2KDLoss(net(1), every(tmp_path / "cam"), explainer=e2kd.GradCAM())
    with pytest.raises(ValueError, match="made by GradCAM, which is >= 0"):
        e2kd.E2KDLoss(net(1), frozen(tmp_path / "gradcam"), explainer=e2kd.CAM())


def test_a_bcos_student_of_signed_maps_is_explained_by_signed_maps(tmp_path: Path) -> None:
    layers = e2kd.bcos.BcosResNet(e2kd.bcos.BasicBlock, (1,), CLASSES, width=4, small_images=True)
    student = nn.Sequential(e2kd.bcos.AddInverse(), layers)
    cam, gradcam = every(tmp_path / "cam"), frozen(tmp_path / "gradcam")
    assert e2kd.E2KDLoss(student, cam).explainer == e2kd.CAM()
    assert isinstance(e2kd.E2KDLoss(student, gradcam).explainer, e2kd.BcosContributions)


def test_a_weight_that_is_raised_later_is_checked_as_well(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The cached maps explain classes='all'"):
        e2kd.E2KDLoss(net(1), every(tmp_path / "all"), weight=0, classes="teacher")
    dataset, cache, student = pixels(), frozen(tmp_path / "logits", maps=False), net(1)
    criterion = e2kd.E2KDLoss(student, cache, weight=0)
    images, taught = next(iter(DataLoader(e2kd.FrozenDataset(dataset, cache), 8)))
    criterion(student(images / 255), taught)
    criterion.weight = 1.0
    with pytest.raises(ValueError, match="the cache holds logits alone"):
        criterion(student(images / 255), taught)


def test_labels_of_any_whole_type_are_explained() -> None:
    student = net(1)
    criterion = e2kd.E2KDLoss(student, net(), classes="labels", explainer=e2kd.CAM())
    images = pixels().tensors[0] / 255
    found = [criterion(student(images), (torch.arange(16) % CLASSES).to(kind)) for kind in (torch.uint8, torch.int64)]
    assert found[0] == found[1]
