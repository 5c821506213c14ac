"""Pipelines of torchvision and timm in a loader's workers: images as without e2kd, maps where their pixels went."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data.transforms as timm_transforms
import torch
import torch.nn.functional as F
import torchvision.transforms as v1
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform
from timm.data.auto_augment import AugmentOp, augment_and_mix_transform, rand_augment_transform
from timm.data.dataset import AugMixDataset
from timm.data.mixup import FastCollateMixup, Mixup
from timm.data.random_erasing import RandomErasing as TimmErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import e2kd
from e2kd.frozen import AppearanceOnly
from e2kd.frozen.geometry import composed, follow, framed, size_of
from e2kd.frozen.operations import FOLLOWED, Follow
from e2kd.frozen.packing import MAGIC
from e2kd.frozen.ramps import positions
from e2kd.frozen.recording import Recorder
from e2kd.taught import Taught

Shared = Callable[[str], Path]
SMOOTH = v1.InterpolationMode.BILINEAR
HEIGHT, WIDTH = 90, 120
FILLED = -1.0  # below any coordinate: what is filled with it is told from what is not
HPARAMS = {"interpolation": Image.Resampling.BILINEAR, "img_mean": 0, "translate_const": 30, "magnitude_std": 0.5}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def photo(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Something to look at, without any symmetry."""
    noise = np.random.default_rng(0).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def seeded(seed: int, function: Callable[..., Any], *args: Any) -> Any:
    """A result, and the next random number of every generator."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm draws from it)
    torch.manual_seed(seed)
    return function(*args), (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and np.array_equal(np.asarray(one), np.asarray(other))


BOTH: list[tuple[str, dict[str, Any]]] = [
    ("CenterCrop", {"size": 51}),
    ("CenterCrop", {"size": (131, 40)}),
    ("Pad", {"padding": 7}),
    ("Pad", {"padding": (3, 9)}),
    ("Pad", {"padding": (3, 9, 4, 11), "padding_mode": "reflect"}),
    ("RandomCrop", {"size": 60}),
    ("RandomCrop", {"size": (HEIGHT, WIDTH)}),
    ("RandomCrop", {"size": 80, "padding": (3, 9, 4, 11)}),
    ("RandomCrop", {"size": (100, 150), "pad_if_needed": True}),
    ("RandomCrop", {"size": (100, 150), "pad_if_needed": True, "padding": 5}),
    ("RandomHorizontalFlip", {}),
    ("RandomVerticalFlip", {}),
    ("RandomResizedCrop", {"size": 70}),
    ("RandomRotation", {"degrees": 40, "interpolation": SMOOTH}),
    ("RandomRotation", {"degrees": 40, "interpolation": SMOOTH, "expand": True}),
    ("RandomRotation", {"degrees": 40, "interpolation": SMOOTH, "center": (30, 50)}),
    ("RandomRotation", {"degrees": (90, 90)}),
    ("RandomRotation", {"degrees": (90, 90), "expand": True}),
    ("RandomAffine", {"degrees": 30, "translate": (0.1, 0.2), "scale": (0.7, 1.3), "interpolation": SMOOTH}),
    ("RandomAffine", {"degrees": 30, "shear": (-10, 10, -20, 20), "center": (30, 50), "interpolation": SMOOTH}),
    ("RandomPerspective", {"p": 0.8}),
    ("Resize", {"size": 61}),
    ("Resize", {"size": (50, 140)}),
]
GEOMETRIC: list[Any] = [getattr(v, name)(**settings) for name, settings in BOTH for v in (v1, v2)] + [
    v2.RandomZoomOut(side_range=(1, 2)),
    v2.RandomResize(50, 99),
    v2.RandomShortestSize([50, 70, 99], max_size=120),
    v2.ScaleJitter((100, 100), scale_range=(0.5, 1.5)),
]
TIMM: list[Any] = [
    timm_transforms.CenterCropOrPad((120, 60)),
    timm_transforms.RandomCropOrPad((120, 60), padding_mode="reflect"),
    timm_transforms.RandomPad((100, 150)),
    timm_transforms.RandomResizedCropAndInterpolation(70, interpolation="random"),
    timm_transforms.ResizeKeepRatio(70, random_scale_prob=0.5, random_aspect_prob=0.5, interpolation="random"),
    timm_transforms.TrimBorder(9),
] + [
    AugmentOp(name, prob=0.8, magnitude=9, hparams=HPARAMS)
    for name in ("ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel", "Rotate")
]
COLOURS: list[Any] = [
    v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    v1.RandomGrayscale(0.5),
    v2.GaussianBlur(5),
    v2.RandomEqualize(),
    v1.RandomPosterize(4),
    v2.RandomPhotometricDistort(),
    AppearanceOnly(lambda image: image.point(lambda value: 255 - value)),
    AugmentOp("SolarizeAdd", prob=0.8, magnitude=9, hparams=HPARAMS),
]
CONTAINERS: list[Any] = [
    v1.Compose([v1.RandomResizedCrop(70), v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(MEAN, STD)]),
    v2.Compose([v2.RandomResizedCrop(70), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, True)]),
    v1.RandomApply([v1.RandomRotation(20), v1.ColorJitter(0.3)], p=0.6),
    v1.RandomApply(nn.ModuleList([v1.RandomRotation(20)]), p=0.6),
    v2.RandomApply([v2.RandomRotation(20), v2.ColorJitter(0.3)], p=0.6),
    v1.RandomChoice([v1.RandomCrop(60), v1.RandomHorizontalFlip(1.0)]),
    v2.RandomChoice([v2.RandomCrop(60), v2.RandomHorizontalFlip(1.0)], p=[0.3, 0.7]),
    v1.RandomOrder([v1.RandomCrop(60), v1.RandomRotation(20), v1.RandomHorizontalFlip()]),
    v2.RandomOrder([v2.RandomCrop(60), v2.RandomRotation(20), v2.RandomHorizontalFlip()]),
    nn.Sequential(v1.RandomCrop(60), v1.RandomHorizontalFlip()),
    v2.AutoAugment(),
    v2.RandAugment(magnitude=15),
    v2.TrivialAugmentWide(),
    rand_augment_transform("rand-m9-mstd0.5-inc1", {}),
    create_transform(70, is_training=True, auto_augment="original-mstd0.5"),
    create_transform(70, is_training=True, auto_augment="3a", grayscale_prob=0.3, gaussian_blur_prob=0.3),
    create_transform(70, is_training=True, re_prob=1, re_mode="pixel", re_count=3),
    create_transform(70, is_training=True, train_crop_mode="rkrr"),
    create_transform(70, is_training=True, train_crop_mode="rkrc", use_prefetcher=True),
    create_transform(70),
    v2.Compose([v2.PILToTensor(), v2.RandomErasing(1.0), v2.RandomHorizontalFlip()]),
    v1.Compose([v1.ToTensor(), v1.RandomErasing(1.0, value="random")]),
]


def named(operation: Any) -> str:
    return f"{type(operation).__module__.split('.')[-1]}.{type(operation).__name__}"


# The image is the one that the bare transform gives


@pytest.mark.parametrize("operation", GEOMETRIC + TIMM + COLOURS + CONTAINERS, ids=named)
def test_recording_changes_neither_image_nor_random_numbers(operation: Any) -> None:
    image = photo()
    recorder = Recorder(operation)
    for seed in range(4):
        bare, after = seeded(seed, operation if callable(operation) else nn.Sequential(operation), image)
        (recorded, _), after_recording = seeded(seed, recorder, image)
        assert same(bare, recorded)
        assert after == after_recording


def test_timms_separate_transforms_run_one_after_the_other() -> None:
    parts = create_transform(70, is_training=True, separate=True, auto_augment="rand-m9-inc1")
    together = v1.Compose([operation for part in parts for operation in part.transforms])
    for seed in range(4):
        assert same(seeded(seed, together, photo())[0], seeded(seed, Recorder(parts), photo())[0][0])


# Pixels come from where the geometry says


def ramps(image_like: Any) -> tuple[Any, Any]:
    """Images of x and of y, a PIL image or a tensor, [1, H, W]."""
    height, width = size_of(image_like)
    x, y = np.broadcast_arrays(np.arange(width) + 0.5, (np.arange(height) + 0.5)[:, None])
    if isinstance(image_like, Tensor):
        return torch.from_numpy(x.copy())[None].float(), torch.from_numpy(y.copy())[None].float()
    return Image.fromarray(x.astype(np.float32)), Image.fromarray(y.astype(np.float32))


@pytest.mark.parametrize(
    ("operation", "tensor"),
    [(operation, tensor) for operation in GEOMETRIC for tensor in (False, True)] + [(op, False) for op in TIMM],
    ids=lambda value: named(value) if callable(value) else "tensor" if value else "PIL",
)
def test_pixels_come_from_where_they_are_said_to(operation: Any, tensor: bool) -> None:
    recorder, seen, size = Recorder(operation), [], np.array([WIDTH, HEIGHT])[:, None, None]
    for seed in range(5):
        moved = []
        for ramp in ramps(torch.zeros(1, HEIGHT, WIDTH) if tensor else photo()):
            (image, steps), _ = seeded(seed, recorder, ramp)
            moved.append(np.asarray(image, dtype=np.float64).reshape(size_of(image)))
        expected = positions(composed(steps, np.eye(3)).matrix, size_of(image)) * size
        scale = max(1.0, np.abs(np.diff(expected, axis=2)).max(), np.abs(np.diff(expected, axis=1)).max())
        inner = (np.abs(expected - size / 2) < size / 2 - 3 * scale - 1).all(0)
        seen.append(np.abs(np.stack(moved) - expected).max(0)[inner])
    errors = np.concatenate(seen)
    assert len(errors) > 1000
    assert errors.max() < 0.5
    assert np.median(errors) < 0.05


# Maps follow, as if they had gone through the transform at full resolution


def reference(transform: Any, seed: int, maps: Tensor, view: e2kd.CanonicalView) -> tuple[Tensor, Tensor]:
    """Maps [C, h, w] drawn into the original image, augmented as an image, averaged per cell; and the same of ones."""
    top, left, high, wide = (int(v) for v in view.placement(HEIGHT, WIDTH))
    drawn = F.interpolate(maps[None], (high, wide), mode="bilinear", align_corners=False)[0]
    inside = torch.cat([drawn, torch.ones(1, high, wide)])
    canvas = F.pad(inside, (left, WIDTH - left - wide, top, HEIGHT - top - high))
    image, _ = seeded(seed, transform, F.interpolate(canvas[None], scale_factor=2, mode="nearest")[0])
    averaged = F.interpolate(image[None], maps.shape[-2:], mode="area")[0]
    return averaged[:-1], averaged[-1:]


LARGE = 112  # of which 7 and 14 are parts, so that means over cells are exact
PIPELINES = {
    "crop and flip": v2.Compose([v2.RandomResizedCrop(LARGE), v2.RandomHorizontalFlip()]),
    "as on CIFAR": v2.Compose([v2.Resize(LARGE), v2.RandomCrop(LARGE, padding=24), v2.RandomVerticalFlip()]),
    "rotated crop": v2.Compose([v2.RandomResizedCrop(LARGE), v2.RandomRotation(30, SMOOTH)]),
    "crop of a rotation": v2.Compose([v2.RandomRotation(30, SMOOTH), v2.RandomResizedCrop(LARGE)]),
    "affine crop, mirrored": v1.Compose(
        [v1.RandomResizedCrop(LARGE), v1.RandomAffine(20, (0.1, 0.1), (0.8, 1.2), 10, SMOOTH), v1.RandomVerticalFlip()]
    ),
    "perspective of a crop": v2.Compose([v2.RandomResizedCrop(LARGE), v2.RandomPerspective(p=1.0)]),
    "twice": v2.Compose(
        [v2.RandomRotation(30, SMOOTH), v2.CenterCrop(140), v2.RandomRotation(30, SMOOTH), v2.Resize(LARGE)]
    ),
    "now and then": v2.Compose([
        v2.RandomOrder([
            v2.RandomApply([v2.RandomAffine(20, (0.1, 0.1), interpolation=SMOOTH)]),
            v2.RandomChoice([v2.Pad(8), v2.RandomHorizontalFlip(1.0)]),
        ]),
        v2.RandomResizedCrop(LARGE),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_maps_follow_their_image(pipeline: str, fit: str) -> None:
    transform, view = PIPELINES[pipeline], e2kd.CanonicalView((32, 32), fit)
    generator = torch.Generator().manual_seed(3)
    recorder, apart, count = Recorder(transform), [], 6
    for seed in range(count):
        maps = torch.rand(1, *((7, 7), (14, 14))[seed % 2], generator=generator)
        expected, known = reference(transform, seed, maps, view)
        image = torch.zeros(2, 2 * HEIGHT, 2 * WIDTH)
        (_, steps), _ = seeded(seed, recorder, image)
        found, valid = follow(maps[None], [composed(steps, framed(view, image))])
        assert (valid[0] - known).abs().max() < 0.1
        if known.mean() > 0.1:
            apart.append(1 - F.cosine_similarity(found.flatten(), expected.flatten(), 0).item())
    assert len(apart) > count / 2
    assert max(apart) < 2e-3


def test_what_leaves_the_canonical_frame_is_not_known() -> None:
    view, image = e2kd.CanonicalView((32, 32)), torch.zeros(3, 100, 200)
    _, steps = Recorder(v2.Pad(0))(image)
    maps, valid = follow(torch.ones(1, 1, 4, 8), [composed(steps, framed(view, image))])
    assert torch.equal(valid[0, 0], torch.tensor([0, 0, 1, 1, 1, 1, 0, 0.0]).expand(4, 8))
    assert torch.equal(maps, valid)


@pytest.mark.parametrize("erasing", [v2.RandomErasing(1.0), v1.RandomErasing(1.0), TimmErasing(1.0, device="cpu")])
def test_what_was_erased_is_not_known(erasing: Any) -> None:
    for seed in range(3):
        (image, steps), _ = seeded(seed, Recorder(v2.Compose([v2.CenterCrop(64), erasing])), torch.ones(3, 64, 80))
        _, valid = follow(torch.ones(1, 1, 8, 8), [composed(steps, np.eye(3))])
        assert valid.mean() < 1
        assert torch.allclose(valid, F.avg_pool2d(image[None, :1], 8), atol=1e-6)


def test_mirrored_padding_is_not_known() -> None:
    _, steps = Recorder(v2.Pad((8, 0, 0, 0), padding_mode="reflect"))(torch.ones(3, 16, 16))
    _, valid = follow(torch.ones(1, 1, 2, 3), [composed(steps, np.eye(3))])
    assert torch.allclose(valid[0, 0], torch.tensor([0.0, 1.0, 1.0]).expand(2, 3))


# What can't be followed is refused


def mirrored(image: Any) -> Any:
    return image


class Mine(v2.RandomHorizontalFlip):
    """Might do anything."""


@pytest.mark.parametrize(
    ("operation", "sentence"),
    [
        (mirrored, r"can't follow mirrored: where it moves pixels is not known.*AppearanceOnly\(mirrored\)"),
        (v2.Lambda(mirrored), r"AppearanceOnly\(Lambda\)"),
        (Mine(), r"can't follow Mine: where it moves pixels is not known"),
        (v2.FiveCrop(5), "several images of one"),
        (v1.TenCrop(5), "several images of one"),
        (v2.ElasticTransform(), "no homography"),
        (v2.AugMix(), "blends"),
        (augment_and_mix_transform("augmix-m5", {}), "blends"),
        (v1.RandAugment(), r"Take torchvision.transforms.v2.RandAugment"),
        (v1.AutoAugment(), r"Take torchvision.transforms.v2.AutoAugment"),
        (v2.MixUp(num_classes=3), "is not known"),
        (create_transform(64, is_training=True, auto_augment="augmix-m5"), "AugMixAugment: it blends"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_operations_that_cannot_be_followed_are_refused_at_once(operation: Any, sentence: str) -> None:
    for transform in (operation, v2.Compose([v2.RandomApply([v2.RandomChoice([operation])])])):
        with pytest.raises(ValueError, match=sentence):
            Recorder(transform)


def test_an_operation_that_moves_pixels_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = FOLLOWED["torchvision.RandomVerticalFlip"].formula
    monkeypatch.setitem(FOLLOWED, "torchvision.RandomHorizontalFlip", Follow("", wrong))
    for image in (photo(), torch.zeros(3, 40, 40), torch.zeros(1, 40, 40, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match=r"RandomHorizontalFlip.*moves pixels otherwise.*JointAugmentation"):
            Recorder(v2.RandomHorizontalFlip(1.0))(image)


def test_a_promise_of_appearance_only_is_kept_to() -> None:
    with pytest.raises(ValueError, match=r"said to keep every pixel.*\(40, 40\)"):
        Recorder(AppearanceOnly(v2.CenterCrop(40)))(photo())


# Loaders


def net(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 4, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def photos(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 real photographs of cats and dogs, an image folder."""
    root = tmp_path_factory.mktemp("photos")
    for kind in ("cat", "dog"):
        (root / kind).mkdir()
        for path in sorted(shared(f"data/catsdogs1400/val/{kind}").glob("*.jpg"))[:12]:
            shutil.copy(path, root / kind / path.name)
    return root


@pytest.fixture(scope="module")
def frozen(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> e2kd.FrozenTeacher:
    settings: dict[str, Any] = {"view": 64, "normalization": (MEAN, STD), "progress": False, "map_size": 7}
    done = e2kd.freeze(net(), ImageFolder(str(photos)), tmp_path_factory.mktemp("cache"), **settings)
    assert done is not None
    return done


class Bare(Dataset[Any]):
    """What people have without e2kd."""

    def __init__(self, dataset: Any, transform: Any) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        image, label = self.dataset[index]
        return self.transform(image), label


TRAINING = v2.Compose([
    v2.RandomResizedCrop(56), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4), v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
])  # fmt: skip


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_the_images_they_gave_before(photos: Path, frozen: e2kd.FrozenTeacher, start: str) -> None:
    def batches(dataset: Any, start: str) -> list[Any]:
        settings = {"num_workers": 2, "multiprocessing_context": start, "shuffle": True, "persistent_workers": True}
        loader = DataLoader(dataset, 6, generator=torch.Generator().manual_seed(5), **settings)
        return [batch for _ in range(1 if start == "spawn" else 2) for batch in loader]

    folder = ImageFolder(str(photos))
    taught = batches(e2kd.FrozenDataset(folder, frozen, transform=TRAINING), start)
    bare = batches(Bare(folder, TRAINING), "fork")
    for (images, lessons), (expected, labels) in zip(taught, bare, strict=start == "fork"):
        assert torch.equal(images, expected)
        assert torch.equal(lessons.labels, labels)
    assert isinstance(lessons, Taught)
    assert lessons.maps.shape == (6, 1, 7, 7)
    assert 0 < torch.cat([lessons.valid for _, lessons in taught]).mean() < 1


def test_a_flip_flips_the_stored_map(photos: Path, tmp_path: Path) -> None:
    folder, view = ImageFolder(str(photos)), e2kd.CanonicalView((64, 64), "squash")
    cache = e2kd.freeze(net(), folder, tmp_path, view=view, normalization=(MEAN, STD), map_size=7, progress=False)
    assert cache is not None
    moved, stored = (e2kd.FrozenDataset(folder, cache, transform=t) for t in (v2.RandomHorizontalFlip(), None))
    flips = []
    for k in range(12):
        image, lesson = moved[k]
        expected = stored[k][1]
        flips.append(not same(image, folder[k][0]))
        assert same(image, v2.functional.horizontal_flip(folder[k][0])) == flips[-1]
        assert torch.allclose(lesson.maps, expected.maps.flip(2) if flips[-1] else expected.maps)
        assert torch.allclose(lesson.valid, torch.ones(1, 7, 7))
        assert torch.equal(lesson.logits, expected.logits)
        assert torch.equal(lesson.classes, expected.classes)
    assert 0 < sum(flips) < 12


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_samples_without_names_are_still_known_by_their_pixels(tmp_path: Path, dtype: torch.dtype) -> None:
    levels = torch.randint(0, 256, (8, 3, 24, 30), generator=torch.Generator().manual_seed(1))
    images = levels.byte() if dtype == torch.uint8 else levels / 255
    data = TensorDataset(images, torch.arange(8) % 2)
    normalization = (MEAN, STD) if dtype == torch.uint8 else None
    cache = e2kd.freeze(net(), data, tmp_path, view=16, normalization=normalization, progress=False)
    assert cache is not None
    crop = v2.RandomResizedCrop(16)
    image, lesson = e2kd.FrozenDataset(data, cache, transform=crop)[2]
    assert image.shape == (3, 16, 16)
    assert lesson.maps.shape == lesson.valid.shape
    swapped = TensorDataset(data.tensors[0].flip(0), data.tensors[1])
    with pytest.raises(ValueError, match="Sample 2 is not the one"):
        e2kd.FrozenDataset(swapped, cache, transform=crop)[2]


def test_a_random_transform_of_the_data_set_itself_is_refused(photos: Path, frozen: e2kd.FrozenTeacher) -> None:
    with pytest.raises(ValueError, match=r"has a transform, but it had none when it was frozen.* as transform="):
        e2kd.FrozenDataset(ImageFolder(str(photos), v2.RandomResizedCrop(56)), frozen)


def test_a_cache_of_logits_alone_takes_transforms_too(photos: Path, tmp_path: Path) -> None:
    folder = ImageFolder(str(photos))
    cache = e2kd.freeze(net(), folder, tmp_path, view=64, normalization=(MEAN, STD), maps=False, progress=False)
    assert cache is not None
    images, lessons = next(iter(DataLoader(e2kd.FrozenDataset(folder, cache, transform=TRAINING), 4)))
    assert images.shape == (4, 3, 56, 56)
    assert not lessons.explains
    packed = next(iter(DataLoader(e2kd.FrozenDataset(folder, cache, transform=TRAINING, pack=True), 4)))[1]
    assert torch.equal(cache.taught(packed).logits, lessons.logits)


def test_mixing_on_lessons_fails_loudly(photos: Path, frozen: e2kd.FrozenTeacher) -> None:
    folder = ImageFolder(str(photos))
    for mix in (v2.MixUp(num_classes=2), v2.CutMix(num_classes=2), v2.MixUp()):
        with pytest.raises((ValueError, TypeError)):
            mix(*next(iter(DataLoader(e2kd.FrozenDataset(folder, frozen, transform=TRAINING), 4))))
        images, packed = next(iter(DataLoader(e2kd.FrozenDataset(folder, frozen, transform=TRAINING, pack=True), 4)))
        with pytest.raises((ValueError, TypeError)):
            frozen.taught(mix(images, packed)[1])


# timm's own loader


def timm_loader(photos: Path, frozen: e2kd.FrozenTeacher, **settings: Any) -> Any:
    """`create_dataset` and `create_loader` as timm's train.py calls them, with one line in between."""
    dataset = create_dataset("", str(photos))
    dataset = e2kd.FrozenDataset(dataset, frozen, match="id", pack=True)
    settings = {
        "input_size": (3, 56, 56), "batch_size": 8, "is_training": True, "num_workers": 0, "mean": MEAN, "std": STD,
        "device": torch.device("cpu"), "persistent_workers": False,
    } | settings  # fmt: skip
    return create_loader(dataset, **settings)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1"])
def test_timms_loader_carries_lessons(
    photos: Path, frozen: e2kd.FrozenTeacher, prefetch: bool, policy: str | None
) -> None:
    settings: dict[str, Any] = {"use_prefetcher": prefetch, "auto_augment": policy}
    bare = create_loader(
        create_dataset("", str(photos)), (3, 56, 56), 8, is_training=True, num_workers=0, mean=MEAN, std=STD,
        device=torch.device("cpu"), persistent_workers=False, **settings,
    )  # fmt: skip
    loader = timm_loader(photos, frozen, **settings)
    (images, packed), _ = seeded(3, lambda: next(iter(loader)))
    (expected, labels), _ = seeded(3, lambda: next(iter(bare)))
    assert torch.equal(images, expected)
    assert packed.dtype == torch.int64
    lessons = frozen.taught(packed, images)
    assert torch.equal(lessons.labels, labels)
    assert torch.equal(frozen.labels(packed), labels)
    assert lessons.maps.shape == (8, 1, 7, 7)
    unpacked = timm_loader(photos, frozen, **settings).dataset
    unpacked.pack = False
    random.seed(9)
    one, _ = seeded(4, lambda: unpacked[5])
    unpacked.pack = True
    two, _ = seeded(4, lambda: unpacked[5])
    for field, again in zip(one[1], frozen.taught(two[1][None]), strict=True):
        assert torch.equal(torch.as_tensor(field), again[0])


def test_timms_workers_carry_lessons(photos: Path, frozen: e2kd.FrozenTeacher) -> None:
    loader = timm_loader(photos, frozen, num_workers=2)
    batches = [frozen.taught(packed, images) for images, packed in loader]
    assert len(batches) == 3
    assert sorted(torch.cat([lessons.labels for lessons in batches]).tolist()) == [0] * 12 + [1] * 12


def test_images_that_changed_after_the_loader_are_told_of_in_training(photos: Path, frozen: e2kd.FrozenTeacher) -> None:
    """timm's prefetcher erases on the device, where no map can follow: the criterion itself says so."""
    images, packed = next(iter(timm_loader(photos, frozen, re_prob=1.0)))
    student, fresh = net(1, 4), e2kd.FrozenTeacher.open(frozen.store.folder)
    criterion = e2kd.E2KDLoss(student, fresh, example=images)
    with pytest.warns(UserWarning, match="erases on the device"):
        criterion(student(images), packed)


def test_packed_lessons_are_labels_to_an_evaluation(photos: Path, frozen: e2kd.FrozenTeacher) -> None:
    images, packed = next(iter(timm_loader(photos, frozen)))
    student = net(1, 4).eval()
    criterion = e2kd.E2KDLoss(student, frozen, nn.CrossEntropyLoss(), example=images)
    with torch.no_grad():
        outputs = student(images)
        assert torch.equal(criterion(outputs, packed), nn.CrossEntropyLoss()(outputs, frozen.labels(packed)))


def test_a_step_with_packed_lessons_is_the_step_with_lessons(photos: Path, frozen: e2kd.FrozenTeacher) -> None:
    images, packed = next(iter(timm_loader(photos, frozen)))
    gradients = []
    for targets in (packed, frozen.taught(packed)):
        student = net(1, 4)
        criterion = e2kd.E2KDLoss(student, frozen, nn.CrossEntropyLoss(), example=images)
        loss = criterion(student(images), targets)
        loss.backward()
        assert criterion.parts["explanation"] > 0
        gradients.append([parameter.grad for parameter in student.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_mixup_on_packed_lessons_fails_loudly(photos: Path, frozen: e2kd.FrozenTeacher) -> None:
    images, packed = next(iter(timm_loader(photos, frozen)))
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        Mixup(0.8, num_classes=2)(images, packed)
    batches = iter(timm_loader(photos, frozen, collate_fn=FastCollateMixup(0.8, num_classes=2)))
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        next(batches)
    assert packed[:, 0].unique().tolist() == [MAGIC]


def test_foreign_and_plain_targets_are_refused(photos: Path, frozen: e2kd.FrozenTeacher, tmp_path: Path) -> None:
    other = e2kd.freeze(net(2), ImageFolder(str(photos)), tmp_path, view=64, normalization=(MEAN, STD), map_size=7,
                        progress=False)  # fmt: skip
    assert other is not None
    _, packed = next(iter(timm_loader(photos, frozen)))
    with pytest.raises(ValueError, match=r"lessons in these targets \[8, .*are of another cache"):
        other.taught(packed)
    both = torch.cat([packed, next(iter(timm_loader(photos, other)))[1]])
    with pytest.raises(ValueError, match="are of another cache"):
        frozen.taught(both)
    with pytest.raises(ValueError, match=r"no lesson for this batch.*\[8, 20\]"):
        frozen.taught(torch.ones(8, 20, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"no lesson for this batch.*\[8\]"):
        frozen.taught(packed[:, 2])
    with pytest.raises(ValueError, match="no lesson for this batch"):
        frozen.taught(packed.float())


def test_erasing_on_the_device_is_told(photos: Path, frozen: e2kd.FrozenTeacher) -> None:
    cache = e2kd.FrozenTeacher.open(frozen.store.folder)
    loader = timm_loader(photos, cache, re_prob=0.5, re_mode="pixel")
    images, packed = next(iter(loader))
    with pytest.warns(UserWarning, match=r"changed between data loader and student.*re_prob=0"):
        cache.taught(packed, images)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The images were changed")
        images, packed = next(iter(timm_loader(photos, cache)))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            cache.taught(packed, images.to(dtype))


def test_a_transform_that_runs_elsewhere_is_refused(photos: Path, frozen: e2kd.FrozenTeacher) -> None:
    dataset = e2kd.FrozenDataset(create_dataset("", str(photos)), frozen, match="id", pack=True)
    with pytest.raises(ValueError, match=r"needs the whole transform here.*there is none"):
        dataset[0]
    settings: dict[str, Any] = {"num_aug_splits": 2, "is_training": True, "num_workers": 0}
    split = create_loader(AugMixDataset(dataset), (3, 56, 56), 4, device=torch.device("cpu"), **settings)
    with pytest.raises(ValueError, match=r"needs the whole transform here.*gives Image"):
        next(iter(split))


def test_packing_wants_class_numbers(photos: Path, frozen: e2kd.FrozenTeacher) -> None:
    folder = ImageFolder(str(photos), target_transform=lambda label: torch.eye(2)[label])
    with pytest.raises(TypeError, match=r"class numbers as labels.*a tensor \[2\]"):
        e2kd.FrozenDataset(folder, frozen, transform=TRAINING, pack=True)[0]
    _, lesson = e2kd.FrozenDataset(folder, frozen, transform=TRAINING)[0]
    assert torch.equal(lesson.labels, torch.tensor([1.0, 0.0]))
