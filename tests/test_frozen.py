"""Freezing a teacher, and training from the cache: the public face of it, on real photographs where it matters."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import e2kd
from e2kd.cli import main
from e2kd.frozen.errors import CacheError
from e2kd.frozen.planning import settings_of
from e2kd.frozen.samples import names_of, transformed
from e2kd.probing import example_images
from e2kd.taught import labels_of

Shared = Callable[[str], Path]
UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLASSES = 4


def net(seed: int = 0, width: int = 8) -> nn.Module:
    """A small classifier of any image size."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES),
    )  # fmt: skip


def bcos_net() -> nn.Module:
    """A small B-cos network that adds the inverse itself."""
    torch.manual_seed(0)
    return nn.Sequential(
        e2kd.bcos.AddInverse(), e2kd.bcos.BcosResNet(e2kd.bcos.BasicBlock, (1, 1), CLASSES, width=4, small_images=True)
    )


def pixels(count: int = 40, seed: int = 1) -> TensorDataset:
    """Images of uint8, labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 24, 24), dtype=torch.uint8, generator=generator)
    return TensorDataset(images, torch.arange(count) % CLASSES)


def frozen(path: Path, dataset: Any = None, teacher: nn.Module | None = None, **settings: Any) -> e2kd.FrozenTeacher:
    settings = {"normalization": UNIT, "batch_size": 8, "progress": False} | settings
    done = e2kd.freeze(teacher or net(), pixels() if dataset is None else dataset, path, **settings)
    assert done is not None
    return done


def batch(dataset: Any, cache: e2kd.FrozenTeacher, size: int = 16, **settings: Any) -> tuple[Tensor, e2kd.Taught]:
    images, taught = next(iter(DataLoader(e2kd.FrozenDataset(dataset, cache), size, **settings)))
    assert isinstance(taught, e2kd.Taught)
    return images, taught


# What is frozen is what the teacher says


@pytest.mark.parametrize(
    "explainer", [e2kd.GradCAM(), e2kd.CAM(), e2kd.LayerCAM(), e2kd.HiResCAM(), e2kd.InputGradient()], ids=repr
)
@pytest.mark.parametrize("classes", ["teacher", "labels"])
def test_rows_are_the_live_explanations(tmp_path: Path, explainer: e2kd.Explainer, classes: str) -> None:
    teacher, dataset = net(), pixels()
    cache = frozen(tmp_path, dataset, teacher, explainer=explainer, classes=classes)
    images, labels = dataset.tensors
    live = e2kd.explain(teacher, images / 255, labels if classes == "labels" else None, explainer)
    rows = cache.rows(torch.arange(40))
    torch.testing.assert_close(rows.logits, live.logits, rtol=1e-3, atol=1e-4)
    assert torch.equal(rows.classes, live.classes)
    alive = live.maps.flatten(1).any(1)
    assert (e2kd.cosine(rows.maps, live.maps)[alive] > 0.9999).all()
    assert torch.equal(rows.maps.flatten(1).any(1), alive)
    assert cache.explainer == type(explainer)()
    assert cache.choice == classes


@pytest.mark.parametrize("explainer", [e2kd.CAM(), e2kd.InputGradient(), e2kd.BcosWeights(resolution=6)], ids=repr)
def test_a_cache_of_all_classes_holds_a_map_for_each(tmp_path: Path, explainer: e2kd.Explainer) -> None:
    """One channel after another: those of class 0 first."""
    bcos = isinstance(explainer, e2kd.BcosWeights)
    teacher, dataset = bcos_net() if bcos else net(), pixels()
    cache = frozen(tmp_path, dataset, teacher, explainer=explainer, classes="all", normalization=None if bcos else UNIT)
    images, rows = dataset.tensors[0] / 255, cache.rows(torch.arange(40))
    live = [e2kd.explain(teacher, images, torch.full((40,), k), explainer).maps for k in range(CLASSES)]
    channels = live[0].shape[1]
    assert rows.maps.shape == (40, CLASSES * channels, *live[0].shape[2:])
    for k, maps in enumerate(live):
        stored = rows.maps[:, k * channels : (k + 1) * channels]
        assert e2kd.cosine(stored, maps).min() > 0.999
        torch.testing.assert_close(stored, maps, rtol=0, atol=0.01 * float(maps.abs().amax()))
    assert torch.equal(rows.classes, rows.logits.argmax(1))
    assert cache.choice == "all"
    assert cache.store.record.map_count == CLASSES


def test_maps_of_all_classes_follow_the_image_into_the_loss(tmp_path: Path) -> None:
    """Flipped as the image is, packed or not; the loss is the mean over classes."""
    teacher, dataset = net(), pixels()
    cache = frozen(tmp_path, dataset, teacher, explainer=e2kd.CAM(), classes="all")
    images, taught = batch(dataset, cache)
    augmented, moved = e2kd.JointAugmentation(K.RandomHorizontalFlip(p=1.0))(images, taught)
    torch.testing.assert_close(moved.maps, taught.maps.flip(3), rtol=0, atol=1e-5 * float(taught.maps.abs().amax()))
    student = net(seed=3)
    student[3].eval()  # normalises as it will when it is explained
    criterion = e2kd.E2KDLoss(student, cache, classes="all")
    criterion(student(augmented), moved)
    own = [e2kd.explain(student, augmented, torch.full((16,), k), e2kd.CAM()).maps for k in range(CLASSES)]
    wanted = [e2kd.cosine(mine, moved.maps[:, k : k + 1]) for k, mine in enumerate(own)]
    assert criterion.parts["cosine"].item() == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-3)
    packed = torch.stack(
        [cache.packing.pack(e2kd.Taught(*one), image) for image, *one in zip(images, *taught, strict=True)]
    )
    assert torch.equal(cache.taught(packed).maps, taught.maps)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_a_cache_of_all_classes_is_asked_for_all(tmp_path: Path, fraction: float) -> None:
    dataset, student = pixels(), net(seed=3)
    cache = frozen(tmp_path / "all", dataset, explainer=e2kd.CAM(), classes="all")
    one = frozen(tmp_path / "one", dataset, explainer=e2kd.CAM())
    with pytest.raises(ValueError, match="explain classes='all', but the criterion was asked for 'teacher'"):
        e2kd.E2KDLoss(student, cache, classes="teacher")
    with pytest.raises(ValueError, match="explain classes='teacher', but the criterion was asked for 'all'"):
        e2kd.E2KDLoss(student, one, classes="all")
    images, taught = batch(dataset, one)
    criterion = e2kd.E2KDLoss(student, cache, fraction=fraction)
    assert criterion.classes == "all"
    with pytest.raises(ValueError, match="They come from another cache"):
        criterion(student(images / 255), taught)
    images, taught = batch(dataset, cache)
    criterion(student(images / 255), taught).backward()
    assert 0 < criterion.parts["explanation"] < 2
    assert cache.verify(net(), dataset, rows=8).ok


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("explainer", [e2kd.CAM(), e2kd.InputGradient()], ids=repr)
def test_classes_are_drawn_from_a_cache_as_from_a_live_teacher(
    tmp_path: Path, explainer: e2kd.Explainer, fraction: float
) -> None:
    teacher, dataset, student = net(), pixels(), net(seed=3)
    cache = frozen(tmp_path, dataset, teacher, explainer=explainer, classes="all")
    images, taught = batch(dataset, cache)
    seen: list[torch.Tensor] = []

    def recorded(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        seen.append(theirs)
        return e2kd.cosine(mine, theirs)

    settings: dict[str, Any] = {"classes": "all", "max_classes": 2, "fraction": fraction, "similarity": recorded}
    for source, targets in ((teacher, taught.labels), (cache, taught)):
        own = {"explainer": explainer} if source is teacher else {}
        criterion = e2kd.E2KDLoss(student, source, **settings, **own)
        criterion.seed = 0
        criterion(student(images / 255), targets)
    live, cached = seen
    assert len(live) == fraction * len(images) * 2
    if live.shape != cached.shape:  # cached maps of images are averaged over cells
        live = torch.nn.functional.adaptive_avg_pool2d(live, cached.shape[-2:])
    assert e2kd.cosine(cached, live).min() > 0.999


LIVE = [("teacher", None), ("labels", None), ("all", e2kd.CAM()), ("all", e2kd.InputGradient())]


@pytest.mark.parametrize(("classes", "explainer"), LIVE, ids=repr)
@pytest.mark.filterwarnings("ignore::e2kd.NoEffectWarning")
def test_a_frozen_step_is_the_live_step_to_the_storage_precision(tmp_path: Path, classes: Any, explainer: Any) -> None:
    teacher, dataset = net(), pixels()
    cache = frozen(tmp_path, dataset, teacher, classes=classes, explainer=explainer)
    images, taught = batch(dataset, cache)
    results = []
    for source, targets in ((teacher, taught.labels), (cache, taught)):
        student = net(seed=3, width=6)
        criterion = e2kd.E2KDLoss(
            student, source, nn.CrossEntropyLoss(), classes=classes, explainer=explainer, temperature=2.0
        )
        loss = criterion(student(images / 255), targets)
        loss.backward()
        results.append((criterion.parts, [p.grad for p in student.parameters()]))
    (live, live_gradients), (cold, cold_gradients) = results
    for name in live:
        torch.testing.assert_close(cold[name], live[name], rtol=2e-3, atol=2e-4, msg=name)
    for a, b in zip(live_gradients, cold_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)


def test_the_teacher_is_never_called_in_a_frozen_step(tmp_path: Path) -> None:
    teacher, dataset = net(), pixels()
    cache = frozen(tmp_path, dataset, teacher)
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    student = net(seed=3)
    criterion = e2kd.E2KDLoss(student, cache)
    images, taught = batch(dataset, cache)
    criterion(student(images / 255), taught).backward()
    assert not calls
    assert not criterion.state_dict()
    assert not list(criterion.parameters())


def test_freezing_leaves_the_teacher_as_it_was(tmp_path: Path) -> None:
    teacher = net().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    frozen(tmp_path, teacher=teacher)
    assert teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(p.grad is not None for p in teacher.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_logits_alone_are_frozen_for_plain_kd(tmp_path: Path) -> None:
    dataset = pixels()
    cache = frozen(tmp_path, dataset, maps=False)
    images, taught = batch(dataset, cache)
    assert not taught.explains
    student = net(seed=3)
    with pytest.raises(ValueError, match="weight=0"):
        e2kd.E2KDLoss(student, cache)
    criterion = e2kd.E2KDLoss(student, cache, weight=0)
    criterion(student(images / 255), taught).backward()
    assert criterion.parts["kd"] > 0
    assert criterion.parts["explanation"] == 0


def test_top_logits_keep_the_probabilities(tmp_path: Path) -> None:
    teacher, dataset = net(), pixels()
    cache = frozen(tmp_path, dataset, teacher, top=2)
    with torch.no_grad():
        live = teacher.eval()(dataset.tensors[0] / 255).softmax(1)
    stored = cache.rows(torch.arange(40)).logits.softmax(1)
    top = live.topk(2).indices
    torch.testing.assert_close(stored.gather(1, top), live.gather(1, top), rtol=1e-2, atol=1e-3)


def test_the_largest_logits_alone_are_refused_where_classes_dont_exclude_one_another(tmp_path: Path) -> None:
    cache = frozen(tmp_path / "top", top=2)
    for distillation in (e2kd.MultiLabelKDLoss(), e2kd.multilabel_kd_loss):
        with pytest.raises(ValueError, match="the cache holds the largest alone"):
            e2kd.E2KDLoss(net(), cache, distillation=distillation)
    e2kd.E2KDLoss(net(), frozen(tmp_path / "all"), distillation=e2kd.MultiLabelKDLoss())


class Power:
    """An explainer as the protocol allows it, no dataclass."""

    layer = None

    def __init__(self, exponent: int, formula: Callable[[Tensor], Tensor] = torch.relu) -> None:
        self.exponent, self.formula = exponent, formula

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        return self.formula((features * gradient).sum(1, keepdim=True)) ** self.exponent


def test_a_cache_knows_the_settings_of_ones_own_explainer(tmp_path: Path) -> None:
    frozen(tmp_path, explainer=Power(1))
    frozen(tmp_path, explainer=Power(1))
    with pytest.raises(ValueError, match=r"other settings .*exponent=1.*exponent=3"):
        frozen(tmp_path, explainer=Power(3))


def test_settings_of_ones_own_explainer_are_the_same_in_every_process() -> None:
    formula = lambda maps: maps.abs()  # noqa: E731
    assert settings_of(Power(1, formula)).count("0x") == 0


def test_ones_own_explainer_of_a_known_name_is_not_taken_for_that(tmp_path: Path) -> None:
    own = type("GradCAM", (Power,), {})(2)
    cache = frozen(tmp_path, explainer=own)
    assert cache.explainer is None
    with pytest.raises(ValueError, match="explainer of your own"):
        e2kd.E2KDLoss(net(), cache)
    e2kd.E2KDLoss(net(), cache, explainer=own)


@pytest.mark.parametrize("map_type", ["float16", "int8", "uint8"])
def test_maps_of_any_type_keep_their_direction(tmp_path: Path, map_type: str) -> None:
    dataset = pixels()
    exact = frozen(tmp_path / "a", dataset).rows(torch.arange(40)).maps
    coarse = frozen(tmp_path / "b", dataset, map_type=map_type).rows(torch.arange(40)).maps
    alive = exact.flatten(1).any(1)
    assert (e2kd.cosine(coarse, exact)[alive] > 0.9998).all()


def test_fine_maps_are_averaged_and_compared_on_their_grid(tmp_path: Path) -> None:
    dataset = pixels()
    cache = frozen(tmp_path, dataset, explainer=e2kd.InputGradient(), map_size=6)
    images, taught = batch(dataset, cache)
    assert taught.maps.shape == (16, 3, 6, 6)
    seen = []

    def similarity(student: Tensor, teacher: Tensor) -> Tensor:
        seen.append((student.shape, teacher.shape))
        return e2kd.cosine(student, teacher)

    student = net(seed=3)
    criterion = e2kd.E2KDLoss(student, cache, similarity=similarity)
    criterion(student(images / 255), taught).backward()
    assert seen == [((16, 3, 6, 6), (16, 3, 6, 6))]
    alike = e2kd.E2KDLoss(net().train(), cache, kd_weight=0)
    alike.student.apply(lambda m: m.eval() if isinstance(m, nn.BatchNorm2d) else None)
    assert alike(alike.student(images / 255), taught) < 1e-3


# Data sets


class Photos(Dataset[Any]):
    """What torchvision's ImageFolder looks like, without the files."""

    def __init__(self, names: list[str], classes: list[str] | None = None) -> None:
        self.root = "/data"
        self.samples = [(f"/data/{name}", k % 2) for k, name in enumerate(names)]
        self.classes = classes or ["cat", "dog"]
        self.change: Callable[[Any], Any] = lambda image: image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        generator = np.random.default_rng(sum(map(ord, path)))
        return self.change(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)), label


NAMES = [f"cat/{k}.jpg" for k in range(20)]


def test_a_subset_finds_its_rows_by_name_or_place(tmp_path: Path) -> None:
    for k, dataset in enumerate((Photos(NAMES), pixels())):
        cache = frozen(tmp_path / str(k), dataset)
        few = e2kd.FrozenDataset(Subset(dataset, [7, 3, 11]), cache)
        whole = e2kd.FrozenDataset(dataset, cache)
        assert len(few) == 3
        for place, row in enumerate((7, 3, 11)):
            assert torch.equal(few[place][0], whole[row][0])
            assert torch.equal(few[place][1].logits, whole[row][1].logits)
        nested = e2kd.FrozenDataset(Subset(Subset(dataset, [7, 3, 11]), [2]), cache)
        assert torch.equal(nested[0][1].logits, whole[11][1].logits)


def test_a_data_set_that_changed_is_an_error_that_says_how(tmp_path: Path) -> None:
    cache = frozen(tmp_path, Photos(NAMES))
    swapped = [NAMES[1], NAMES[0], *NAMES[2:]]
    for names, words in (
        ([*NAMES, "cat/new.jpg"], "1 samples are new, the first being 'cat/new.jpg'"),
        (NAMES[:-2], "2 that were frozen are gone"),
        (swapped, "in another order than the cache, first at 0"),
        ([*NAMES[:-1], "cat/other.jpg"], "'cat/other.jpg'.*1 that were frozen are gone"),
    ):
        with pytest.raises(ValueError, match=words):
            e2kd.FrozenDataset(Photos(names), cache)
    with pytest.raises(ValueError, match="class 0 is 'dog' but was 'cat'"):
        e2kd.FrozenDataset(Photos(NAMES, ["dog", "cat"]), cache)
    with pytest.raises(ValueError, match="comes more than once"):
        e2kd.FrozenDataset(Photos([NAMES[0], NAMES[0]]), cache, match="id")
    by_name = e2kd.FrozenDataset(Photos(swapped), cache, match="id")
    assert torch.equal(by_name[0][1].logits, cache.rows([1]).logits[0])


def test_a_transform_that_was_added_later_is_noticed(tmp_path: Path) -> None:
    """Names stay the same then, but maps would not follow."""
    photos = Photos(NAMES)
    cache = frozen(tmp_path, photos)
    changes: list[Callable[[Any], Any]] = [np.fliplr, lambda image: image[2:-2, 2:-2], lambda image: image / 255 - 0.5]
    for change in changes:
        changed = Photos(NAMES)
        changed.change = change
        with pytest.raises(ValueError, match="Sample 0 has the name of one that was frozen but does not look like it"):
            e2kd.FrozenDataset(changed, cache)
        with pytest.raises(ValueError, match="Sample 1 has the name"):
            e2kd.FrozenDataset(Subset(changed, [3, 0]), cache)
        with pytest.raises(ValueError, match=r"Sample 0 \('cat/3.jpg'\) has the name"):
            e2kd.FrozenDataset(Subset(changed, [3]), cache)
    noisy = Photos(NAMES)
    noisy.change = lambda image: image.clip(1, 254) + 1  # as other decoders differ
    e2kd.FrozenDataset(noisy, cache)


@pytest.mark.parametrize("added", ["transform", "transforms"])
def test_a_transform_that_was_added_later_is_noticed_whatever_the_samples(tmp_path: Path, added: str) -> None:
    """Where the data set says whether it has one, as those of torchvision and timm do."""

    def photos(**given: Any) -> Photos:
        found = Photos(NAMES)
        vars(found).update({"transform": None, "transforms": None} | given)
        return found

    def flipped(*sample: Any) -> Any:
        return sample

    cache, late = frozen(tmp_path / "plain", photos()), frozen(tmp_path / "late", photos(transform=flipped))
    labels = type("StandardTransform", (), {"transform": None, "target_transform": flipped})()
    for same in (photos(), photos(transforms=labels), Photos(NAMES)):
        e2kd.FrozenDataset(Subset(same, [3]), cache)
    with pytest.raises(ValueError, match="The data set has a transform, but it had none when it was frozen"):
        e2kd.FrozenDataset(Subset(photos(**{added: flipped}), [3]), cache)
    with pytest.raises(ValueError, match="The data set has no transform, but it had one when it was frozen"):
        e2kd.FrozenDataset(photos(), late)
    e2kd.FrozenDataset(photos(transform=flipped), late)
    with pytest.raises(CacheError, match="transformed is False there but True here"):
        frozen(tmp_path / "plain", photos(transform=flipped))


def test_whether_parts_of_a_data_set_are_transformed() -> None:
    plain, changed, unknown = Photos(NAMES), Photos(NAMES), Photos(NAMES)
    plain.transform, changed.transform = None, np.fliplr
    for parts, known in (((plain, changed), True), ((plain, unknown), None), ((plain, plain), False)):
        assert transformed(ConcatDataset(parts)) is known


def test_labels_that_the_maps_explain_must_not_change(tmp_path: Path) -> None:
    """Maps of the teacher's own class don't depend on them."""
    dataset = pixels()
    other = TensorDataset(dataset.tensors[0], (dataset.tensors[1] + (torch.arange(40) == 3)) % CLASSES)
    caches = {classes: frozen(tmp_path / classes, dataset, classes=classes) for classes in ("labels", "teacher")}
    e2kd.FrozenDataset(dataset, caches["labels"])[3]
    e2kd.FrozenDataset(other, caches["teacher"])[3]
    changed = e2kd.FrozenDataset(other, caches["labels"])
    changed[2]
    with pytest.raises(ValueError, match=r"Sample 3 has the label 0, but its map explains 3"):
        changed.__getitems__([2, 3])
    alone = frozen(tmp_path / "alone", dataset, classes="labels", maps=False)
    e2kd.FrozenDataset(other, alone)[3]  # no map, nothing to explain


def test_samples_without_names_are_known_by_their_pixels(tmp_path: Path) -> None:
    dataset = pixels()
    cache = frozen(tmp_path, dataset)
    changed = TensorDataset(dataset.tensors[0].clone(), dataset.tensors[1])
    changed.tensors[0][5, 0, 0, 0] ^= 1
    data = e2kd.FrozenDataset(changed, cache)
    assert len(data[4]) == 2
    with pytest.raises(ValueError, match="Sample 5 is not the one that row 5"):
        data[5]
    for other in (pixels(39), ConcatDataset([dataset, pixels(1)])):
        with pytest.raises(ValueError, match="grown or shrunk"):
            e2kd.FrozenDataset(other, cache)
    shuffled = TensorDataset(
        *(t[torch.randperm(40, generator=torch.Generator().manual_seed(0))] for t in dataset.tensors)
    )
    with pytest.raises(ValueError, match="is not the one that row"):
        list(e2kd.FrozenDataset(shuffled, cache))


def test_given_ids_are_kept_to(tmp_path: Path) -> None:
    dataset, ids = pixels(), [f"id-{k}" for k in range(40)]
    cache = frozen(tmp_path, dataset, ids=ids)
    with pytest.raises(ValueError, match="Pass ids="):
        e2kd.FrozenDataset(dataset, cache)
    assert torch.equal(e2kd.FrozenDataset(dataset, cache, ids=ids)[9][1].logits, cache.rows([9]).logits[0])
    with pytest.raises(ValueError, match="another order"):
        e2kd.FrozenDataset(dataset, cache, ids=ids[::-1])


def test_names_come_from_the_hosts_data_sets(shared: Shared) -> None:
    timm_data = pytest.importorskip("timm.data")
    folders = pytest.importorskip("torchvision.datasets")
    root = str(shared("data/catsdogs1400/val"))
    ours, theirs = names_of(folders.ImageFolder(root)), names_of(timm_data.create_dataset("", root))
    assert ours is not None
    assert theirs is not None
    assert sorted(ours) == sorted(theirs)
    assert all(name.startswith(("cat/", "dog/")) for name in ours)


def test_names_are_all_there_or_none_are(tmp_path: Path) -> None:
    photos = Photos(["cat/0.jpg", "cat/1.jpg"])
    photos.samples[1] = ("cat/1.jpg", 0)  # relative to the root already
    assert names_of(photos) == ["cat/0.jpg", "cat/1.jpg"]
    photos.samples = [(Path("/data/cat/0.jpg"), 0), ("/elsewhere/1.jpg", 1)]
    assert names_of(photos) == ["cat/0.jpg", "/elsewhere/1.jpg"]
    photos.samples = [("/data/cat/0.jpg", 0), (None, 1)]
    assert names_of(photos) is None
    unnamed = pixels(4)
    unnamed.reader = SimpleNamespace(filenames=lambda: [None] * 4)  # as timm's of images without a path
    assert names_of(unnamed) is None
    assert not frozen(tmp_path, unnamed).named


def test_indices_are_those_of_a_list(tmp_path: Path) -> None:
    dataset = pixels()
    cache = frozen(tmp_path, dataset)
    few = e2kd.FrozenDataset(Subset(dataset, [7, 3, 11]), cache)
    assert torch.equal(few[-1][0], few[2][0])
    assert torch.equal(few.__getitems__([-3])[0][1].logits, few[0][1].logits)
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"data set of 3, but got the index {index}"):
            few[index]
        with pytest.raises(IndexError, match=f"data set of 3, but got the index {index}"):
            few.__getitems__([0, index])


def test_hugging_face_data_sets_are_frozen_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [np.random.default_rng(k).integers(0, 256, (24, 24, 3), dtype=np.uint8) for k in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"image": images, "label": [k % 2 for k in range(12)]}, features=features)
    cache = frozen(tmp_path, data)
    assert cache.class_names == ["a", "b"]
    image, taught = e2kd.FrozenDataset(data, cache)[4]
    assert torch.equal(image, torch.from_numpy(images[4]).permute(2, 0, 1))
    assert taught.labels == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_with_workers_give_the_same_batches(tmp_path: Path, workers: int) -> None:
    dataset = pixels()
    cache = frozen(tmp_path, dataset)
    images, taught = batch(dataset, cache, 40, num_workers=workers)
    assert torch.equal(images, dataset.tensors[0])
    assert torch.equal(taught.logits, cache.rows(torch.arange(40)).logits)
    assert torch.equal(taught.labels, dataset.tensors[1])


def test_a_view_covers_the_frame_that_it_says() -> None:
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    cut = e2kd.CanonicalView((50, 50))(ramp).float()[0, 0]
    assert e2kd.CanonicalView((50, 50)).placement(100, 200) == (0.0, 50.0, 100.0, 100.0)
    torch.testing.assert_close(cut, 50.5 + 2 * torch.arange(50.0), rtol=0, atol=1.5)
    squashed = e2kd.CanonicalView((50, 50), "squash")(ramp).float()[0, 0]
    torch.testing.assert_close(squashed, 1.5 + 4 * torch.arange(50.0), rtol=0, atol=1.5)


def test_pil_and_tensors_of_one_photo_give_one_view(shared: Shared) -> None:
    image = (
        pytest.importorskip("PIL.Image").open(next(shared("data/catsdogs1400/val/cat").glob("*.jpg"))).convert("RGB")
    )
    view = e2kd.CanonicalView((64, 64))
    difference = (view(image).float() - view(np.asarray(image)).float()).abs()
    assert difference.mean() < 2


# Bad input


def test_what_cannot_be_frozen_is_refused_in_words(tmp_path: Path) -> None:
    dataset = pixels()
    for settings, words in (
        ({"classes": "positives"}, "a map of one class for each image, or of every class"),
        ({"normalization": None}, "It is not known how Sequential expects"),
        ({"ids": ["a"]}, "one id for each of the 40 samples"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"top": 4}, "top in"),
    ):
        with pytest.raises(ValueError, match=words):
            frozen(tmp_path, dataset, **settings)
    with pytest.raises(ValueError, match="at least one sample"):
        frozen(tmp_path, Subset(dataset, []))
    floats = TensorDataset(torch.rand(4, 3, 24, 24), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="go to the teacher as they are"):
        frozen(tmp_path, floats)
    sizes = [(torch.zeros(3, 24, 24 + k, dtype=torch.uint8), 0) for k in range(3)]
    with pytest.raises(ValueError, match="view=256"):
        frozen(tmp_path, sizes)
    with pytest.raises(TypeError, match=r"\(image, label\)"):
        frozen(tmp_path, [torch.zeros(3, 24, 24)])
    assert not list(tmp_path.glob("shard-*"))


def test_a_random_transform_is_found_before_it_does_harm(tmp_path: Path) -> None:
    class Jittering(Photos):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return np.roll(image, int(torch.randint(1, 1000, ())), 1), label

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="random transform"):
        frozen(tmp_path, Jittering(NAMES))


def test_a_random_flip_hardly_ever_passes(tmp_path: Path) -> None:
    class Flipping(Photos):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return (np.fliplr(image) if torch.rand(()) < 0.5 else image), label

    cache, passed = frozen(tmp_path / "cache", Photos(NAMES)), 0
    for seed in range(100):
        torch.manual_seed(seed)
        with suppress(ValueError):
            e2kd.FrozenDataset(Flipping(NAMES), cache)
            passed += 1
        with suppress(ValueError):
            frozen(tmp_path / str(seed), Flipping(NAMES))
            passed += 1
    assert not passed


def test_a_random_transform_of_some_samples_is_found(tmp_path: Path) -> None:
    class Partly(Photos):
        asked = 0

        def __getitem__(self, index: int) -> Any:
            self.asked += 1
            image, label = super().__getitem__(index)
            return (np.roll(image, self.asked, 1) if index == 19 else image), label

    with pytest.raises(ValueError, match="sample 19, so it has a random transform"):
        frozen(tmp_path, Partly(NAMES))


def test_unreadable_images_are_listed_and_finished_shards_kept(tmp_path: Path) -> None:
    class Torn(Photos):
        torn = True

        def __getitem__(self, index: int) -> Any:
            if self.torn and index in (9, 17):
                raise OSError(f"image file {self.samples[index][0]} is truncated")
            return super().__getitem__(index)

    dataset = Torn(NAMES)
    with pytest.raises(ValueError, match=r"2 samples could not be read: sample 9: OSError.*3 of 5 shards are finished"):
        frozen(tmp_path, dataset, shard_rows=4, batch_size=2)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert len(kept) == 3
    with pytest.raises(ValueError, match="freeze has not finished"):
        e2kd.FrozenTeacher.open(tmp_path)
    dataset.torn = False
    cache = frozen(tmp_path, dataset, shard_rows=4, batch_size=2)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    assert len(cache) == 20


def test_nan_is_refused_and_dead_maps_are_counted(tmp_path: Path) -> None:
    sick = net()
    with torch.no_grad():
        sick[-1].bias[1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        frozen(tmp_path / "nan", teacher=sick)
    dead = net()
    with torch.no_grad():
        dead[-1].weight.abs_().neg_()
    with pytest.warns(e2kd.NoEffectWarning, match="40 of 40 cached maps are zero"):
        cache = frozen(tmp_path / "dead", teacher=dead)
    assert cache.store.zero_maps == 40


SLOW = """
import sys, time, torch, e2kd
sys.path.insert(0, {tests!r})
from test_frozen import NAMES, UNIT, Photos, net

class Slow(Photos):
    def __getitem__(self, index):
        time.sleep({pause})
        return super().__getitem__(index)

done = e2kd.freeze(net(), Slow(NAMES), {path!r}, normalization=UNIT, batch_size=2, shard_rows=2, progress=False)
print(len(done))
"""


def test_killed_and_started_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def start(path: Path, pause: float) -> subprocess.Popen[str]:
        code = SLOW.format(tests=str(Path(__file__).parent), path=str(path), pause=pause)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)

    def shards(path: Path) -> int:
        return len(list(path.glob("shard-*.safetensors")))

    torn, whole = tmp_path / "torn", tmp_path / "whole"
    for wanted in (1, 4):
        process = start(torn, pause=0.1)
        while shards(torn) < wanted and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert wanted <= shards(torn) < 10
        with pytest.raises(ValueError, match="freeze has not finished"):
            e2kd.FrozenTeacher.open(torn)
    for path in (torn, whole):
        assert start(path, pause=0).communicate()[0].strip() == "20"
    assert {p.name: p.read_bytes() for p in torn.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_folder_keeps_its_settings(tmp_path: Path) -> None:
    frozen(tmp_path)
    for settings, words in (
        ({"teacher": net(seed=9)}, "teacher.weights"),
        ({"explainer": e2kd.LayerCAM()}, "explainer.name"),
        ({"top": 2}, "record.top"),
        ({"classes": "labels"}, "classes is 'teacher' there but 'labels' here"),
        ({"normalization": ((0.5,) * 3, (0.5,) * 3)}, "teacher.normalization"),
        ({"dataset": pixels(41)}, "dataset.samples"),
    ):
        with pytest.raises(ValueError, match=words):
            frozen(tmp_path, **settings)
    assert len(frozen(tmp_path)) == 40


def test_criterion_and_cache_must_fit(tmp_path: Path) -> None:
    dataset, student = pixels(), net(seed=3)
    cache = frozen(tmp_path / "a", dataset)
    images, taught = batch(dataset, cache)
    with pytest.raises(ValueError, match="explain classes='teacher'"):
        e2kd.E2KDLoss(student, cache, classes="labels")
    with pytest.raises(ValueError, match="settled when the teacher was frozen"):
        e2kd.E2KDLoss(student, cache, teacher_size=224)
    criterion = e2kd.E2KDLoss(student, cache)
    with pytest.raises(ValueError, match=r"targets of type e2kd\.Taught, but got a tensor \[16\]"):
        criterion(student(images / 255), taught.labels)
    with pytest.raises(ValueError, match="a frozen teacher"):
        e2kd.E2KDLoss(student, net())(student(images / 255), taught)
    other = frozen(tmp_path / "b", dataset, explainer=e2kd.InputGradient())
    with pytest.raises(ValueError, match="another cache"):
        criterion(student(images / 255), batch(dataset, other)[1])
    wide = nn.Sequential(*net(), nn.Linear(CLASSES, 7))
    criterion = e2kd.E2KDLoss(wide, cache)
    with pytest.raises(ValueError, match="same classes"):
        criterion(wide(images / 255), taught)


# Cells that left the frame


def half_known(dataset: Any, cache: e2kd.FrozenTeacher) -> tuple[Tensor, e2kd.Taught]:
    images, taught = batch(dataset, cache)
    valid = taught.valid.clone()
    valid[..., valid.shape[-1] // 2 :] = 0
    return images, taught._replace(valid=valid, maps=taught.maps * valid)


def test_unknown_cells_teach_nothing(tmp_path: Path) -> None:
    """Whatever the teacher's map says there, and the gradient of the student's map is zero there."""
    dataset = pixels()
    cache = frozen(tmp_path, dataset)
    images, taught = half_known(dataset, cache)
    student = net(seed=3)
    criterion = e2kd.E2KDLoss(student, cache, kd_weight=0)
    first = criterion(student(images / 255), taught)
    noise = taught.maps + torch.rand_like(taught.maps) * (taught.valid == 0)
    assert torch.equal(first, criterion(student(images / 255), taught._replace(maps=noise)))
    maps = torch.rand(16, 1, 6, 6, requires_grad=True)
    from e2kd.comparing import compare

    compare(e2kd.cosine, maps, taught.maps, valid=taught.valid)[0].sum().backward()
    assert maps.grad is not None
    assert not maps.grad[..., 3:].any()
    assert maps.grad[..., :3].any()


def test_a_sample_counts_by_its_known_share(tmp_path: Path) -> None:
    dataset = pixels()
    cache = frozen(tmp_path, dataset)
    images, taught = batch(dataset, cache)
    student = net(seed=3)
    criterion = e2kd.E2KDLoss(student, cache)
    for unknown in range(0, 17, 8):
        valid = taught.valid.clone()
        valid[:unknown] = 0
        criterion(student(images / 255), taught._replace(valid=valid)).backward()
        alone = e2kd.explain(student.train(), images / 255)
        assert alone.maps.shape[0] == 16
        if unknown == 16:
            assert criterion.parts["explanation"] == 0
            assert criterion.parts["zero_maps"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


# Hosts


def test_lessons_move_with_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    dataset = pixels()
    cache = frozen(tmp_path, dataset)
    student = net(seed=3)
    criterion = e2kd.E2KDLoss(student, cache, nn.CrossEntropyLoss())
    accelerator = accelerate.Accelerator(cpu=True)
    loader = DataLoader(e2kd.FrozenDataset(dataset, cache), 8, shuffle=True)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    for images, taught in loader:
        assert isinstance(taught, e2kd.Taught)
        optimizer.zero_grad()
        accelerator.backward(criterion(model(images / 255), taught))
        optimizer.step()
    assert criterion.parts["explanation"] > 0


def test_lessons_move_with_the_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)  # a student of which most maps are not zero: random ones may be
    configuration = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    student = transformers.ResNetForImageClassification(configuration)
    dataset = pixels()
    cache = frozen(tmp_path / "cache", dataset)
    samples = [{"pixel_values": i / 255, "labels": t} for i, t in e2kd.FrozenDataset(dataset, cache)]
    seen: list[float] = []

    class Watching(e2kd.E2KDLoss):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().forward(*args, **kwargs)
            seen.append(float(self.parts["explanation"]))
            return loss

    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=8, max_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    criterion = Watching(student, cache, nn.CrossEntropyLoss(), example=torch.rand(2, 3, 24, 24))
    trainer = transformers.Trainer(
        student, arguments, train_dataset=samples, compute_loss_func=criterion,
        data_collator=torch.utils.data.default_collate,
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 2
    assert max(seen) > 0


def test_evaluation_takes_lessons_or_plain_labels(tmp_path: Path) -> None:
    dataset = pixels()
    cache = frozen(tmp_path, dataset)
    images, taught = batch(dataset, cache)
    student = net(seed=3).eval()
    criterion = e2kd.E2KDLoss(student, cache, nn.CrossEntropyLoss())
    with torch.no_grad():
        expected = nn.CrossEntropyLoss()(student(images / 255), taught.labels)
        assert torch.equal(criterion(student(images / 255), taught), expected)
        assert torch.equal(criterion(student(images / 255), labels_of(taught)), expected)


# Verification


def test_verify_says_whether_the_cache_is_the_teachers(tmp_path: Path) -> None:
    dataset, teacher = pixels(), net()
    cache = frozen(tmp_path, dataset, teacher)
    report = cache.verify(teacher, dataset, rows=20, augmentations={})
    assert report.ok, str(report)
    assert report.rows == 20
    assert "ok" in str(report)
    other = cache.verify(net(seed=5), dataset, augmentations={})
    assert not other.ok
    assert "other weights" in str(other)
    assert "logits differ" in str(other)
    with pytest.raises(ValueError, match="grown or shrunk"):
        cache.verify(teacher, pixels(39), augmentations={})


def test_verify_rates_every_augmentation(tmp_path: Path) -> None:
    """What leaves the image alone is faithful; what moves the image but not the map is not."""
    dataset, teacher = pixels(), net()
    cache = frozen(tmp_path, dataset, teacher)

    def still(images: Tensor, taught: e2kd.Taught) -> tuple[Tensor, e2kd.Taught]:
        return images / 255, taught

    def astray(images: Tensor, taught: e2kd.Taught) -> tuple[Tensor, e2kd.Taught]:
        return images.flip(3) / 255, taught

    report = cache.verify(teacher, dataset, augmentations={"still": still, "astray": astray})
    assert report.fidelity["still"].same > 0.9999
    assert report.fidelity["still"].verdict == "faithful"
    assert report.fidelity["astray"].verdict == "misleading"
    assert "faithful" in str(report)
    with pytest.raises(ValueError, match="Leave Normalize out"):
        cache.verify(teacher, dataset, augmentations={"wrong": lambda i, t: (i / 64 - 2, t)})


def test_a_teacher_whose_configuration_is_not_timms_is_one_without(tmp_path: Path) -> None:
    """`pretrained_cfg` is an attribute that other networks may have for something of their own."""
    teacher: Any = net()
    teacher.pretrained_cfg = "resnet.yaml"
    cache = frozen(tmp_path, teacher=teacher)
    assert cache.plan["teacher"]["name"] == type(teacher).__name__
    assert example_images(teacher) is not None


@dataclass(frozen=True)
class Energy:
    """An explainer that is not one of e2kd's."""

    layer: str | None = None

    def __call__(self, features: Tensor, gradient: Tensor) -> Tensor:
        return features.square().sum(1, keepdim=True)


def test_verify_takes_the_names_and_the_explainer_that_freeze_was_given(tmp_path: Path) -> None:
    dataset, teacher = pixels(), net()
    names = [f"photo {i}" for i in range(len(dataset))]
    cache = frozen(tmp_path, dataset, teacher, ids=names, explainer=Energy())
    asked: dict[str, Any] = {"augmentations": {}, "ids": names, "explainer": Energy()}
    report = cache.verify(teacher, dataset, **asked)
    assert report.ok, str(report)
    with pytest.raises(ValueError, match=r"no names to find their rows by\. Pass ids="):
        cache.verify(teacher, dataset, **asked | {"ids": None})
    with pytest.raises(ValueError, match="same 40 samples in another order"):
        cache.verify(teacher, dataset, **asked | {"ids": names[::-1]})
    with pytest.raises(ValueError, match=r"made by Energy\. Pass it as explainer="):
        cache.verify(teacher, dataset, **asked | {"explainer": None})
    assert "live maps differ" in str(cache.verify(teacher, dataset, **asked | {"explainer": e2kd.GradCAM()}))


def test_channels_that_are_refused_are_those_that_the_sentence_leaves_out() -> None:
    for channels in range(1, 9):
        image = torch.zeros(channels, 4, 4)
        if channels in (1, 3, 4, 6):
            assert e2kd.CanonicalView()(image).shape == image.shape
        else:
            with pytest.raises(ValueError, match=r"C one of \(1, 3, 4, 6\)"):
                e2kd.CanonicalView()(image)


def test_verify_takes_a_single_row_and_leaves_random_numbers_alone(tmp_path: Path) -> None:
    dataset, teacher = pixels(), net()
    cache = frozen(tmp_path, dataset, teacher)

    def drawing(images: Tensor, taught: e2kd.Taught) -> tuple[Tensor, e2kd.Taught]:
        torch.rand(())
        return images / 255, taught

    torch.manual_seed(5)
    expected = torch.rand(3)
    for rows in (1, 4):
        torch.manual_seed(5)
        report = cache.verify(teacher, dataset, rows=rows, augmentations={"drawing": drawing})
        assert torch.equal(torch.rand(3), expected)
        assert report.ok, str(report)
        assert bool(report.fidelity) == (rows > 1)  # a map is rated against another image's
    with pytest.raises(ValueError, match="rows >= 1 to compute again, but got 0"):
        cache.verify(teacher, dataset, rows=0)


@pytest.mark.filterwarnings("ignore:Corrupt")
def test_a_url_is_brought_here_once_and_only_what_belongs_to_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.delenv("E2KD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    local = frozen(tmp_path / "cache")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "cache"), "/somewhere/cache", recursive=True)
    memory.pipe("/somewhere/cache/evil.py", b"raise SystemExit")
    cache = e2kd.FrozenTeacher.open("memory://somewhere/cache")
    assert torch.equal(cache.rows([3, 1]).logits, local.rows([3, 1]).logits)
    brought = cache.store.folder
    assert brought.parent == tmp_path / "home" / "e2kd"
    assert {p.name for p in brought.iterdir()} == {p.name for p in (tmp_path / "cache").iterdir()}
    stamp = {p.name: p.stat().st_mtime_ns for p in brought.glob("shard-*")}
    e2kd.FrozenTeacher.open("memory://somewhere/cache")
    assert {p.name: p.stat().st_mtime_ns for p in brought.glob("shard-*")} == stamp
    memory.rm("/somewhere/cache/manifest.json")
    with pytest.raises(FileNotFoundError, match="finished cache"):
        e2kd.FrozenTeacher.open("memory://somewhere/cache")


def memory_with(folder: Path) -> Any:
    """fsspec's files in memory with a cache at /there alone."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    if memory.exists("/there"):
        memory.rm("/there", recursive=True)
    memory.put(str(folder), "/there", recursive=True)
    return memory


def test_what_a_url_brings_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen(tmp_path / "cache")
    memory_with(tmp_path / "cache")
    monkeypatch.setenv("E2KD_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "everybodys"))
    assert e2kd.FrozenTeacher.open("memory://there").store.folder.parent == tmp_path / "own"
    assert not (tmp_path / "everybodys").exists()


@pytest.mark.filterwarnings("ignore::e2kd.NoEffectWarning")
def test_a_cache_of_another_teacher_at_the_same_url_is_brought_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files have the sizes of the first one's; also where the download was cut off in between."""
    caches = [frozen(tmp_path / str(seed), teacher=net(seed)) for seed in range(3)]

    def brought() -> Tensor:
        return e2kd.FrozenTeacher.open("memory://there", download_to=tmp_path / "here").rows(range(40)).logits

    for k in (0, 1):
        memory_with(tmp_path / str(k))
        assert torch.equal(brought(), caches[k].rows(range(40)).logits)
    memory = memory_with(tmp_path / "2")
    get = type(memory).get_file

    def torn(self: Any, source: str, *args: Any, **kwargs: Any) -> Any:
        if "shard" in source:
            raise ConnectionError
        return get(self, source, *args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(type(memory), "get_file", torn)
        with pytest.raises(ConnectionError):
            brought()
    assert torch.equal(brought(), caches[2].rows(range(40)).logits)
    assert {p.name for p in (tmp_path / "here").iterdir()} == {p.name for p in (tmp_path / "2").iterdir()}


def test_servers_that_list_no_sizes_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = frozen(tmp_path / "cache")
    memory = memory_with(tmp_path / "cache")
    listed, get, got = type(memory).ls, type(memory).get_file, []

    def without_sizes(self: Any, *args: Any, **kwargs: Any) -> Any:
        return [entry | {"size": None} for entry in listed(self, *args, **kwargs)]

    def counted(self: Any, source: str, *args: Any, **kwargs: Any) -> Any:
        got.append(source)
        return get(self, source, *args, **kwargs)

    monkeypatch.setattr(type(memory), "ls", without_sizes)
    monkeypatch.setattr(type(memory), "get_file", counted)
    for _ in range(2):
        cache = e2kd.FrozenTeacher.open("memory://there", download_to=tmp_path / "here")
    assert torch.equal(cache.rows([3]).logits, local.rows([3]).logits)
    assert len(got) == len(set(got))  # and not a second time


# The command line, as a stranger uses it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), path)
    return path


def test_freeze_verify_and_inspect_on_a_folder_of_photographs(
    shared: Shared, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(shared("data/catsdogs1400/val"))
    teacher = ["--teacher", "test_resnet", "--teacher-checkpoint", str(checkpoint), "--data", data, "--workers", "0"]
    cache = str(tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", e2kd.NoEffectWarning)  # the teacher's weights are random
        assert main(["freeze", *teacher, "--out", cache, "--view", "96"]) == 0
    assert "279 images, 2 classes" in capsys.readouterr().out
    assert main(["inspect", cache, "--all"]) == 0
    said = capsys.readouterr().out
    assert "GradCAM at" in said
    assert "'cat', 'dog'" in said
    assert "all 279 rows are as they were written" in said
    assert main(["verify", cache, *teacher, "--rows", "16"]) == 0
    said = capsys.readouterr().out
    assert "the cache is what the teacher says" in said
    assert "verdict" in said
    assert main(["freeze", *teacher, "--out", cache, "--view", "64"]) == 2
    assert "view.size" in capsys.readouterr().err
    assert main(["freeze", *teacher, "--out", cache, "--explainer", "inputgradient", "--layer", "x"]) == 2
    assert "reads no layer" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "Was freeze run?" in capsys.readouterr().err


def test_processes_under_a_launcher_share_the_work(shared: Shared, tmp_path: Path, checkpoint: Path) -> None:
    data = str(shared("data/catsdogs1400/val"))
    words = ["--teacher", "test_resnet", "--teacher-checkpoint", str(checkpoint), "--data", data, "--view", "64"]
    words += ["--workers", "0", "--shard-rows", "32", "--batch-size", "16", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "e2kd.cli"]
    one = [sys.executable, "-m", "e2kd.cli"]
    for command, folder in ((launch, "two"), (one, "one")):
        done = subprocess.run(
            [*command, "freeze", *words, "--out", str(tmp_path / folder)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 11
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
