"""What is read from a data set is the sample that was asked for, as it was frozen; else it is said what is not."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    random_split,
)
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import e2kd
from e2kd.frozen.looks import looks_of
from e2kd.frozen.records import Record
from e2kd.frozen.samples import image_and_label, names_of

PLAIN = ((0.5,) * 3, (0.5,) * 3)
AUGMENT = v2.Compose([v2.RandomHorizontalFlip(0.0), v2.PILToTensor()])


def net() -> nn.Module:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def picture(seed: int, height: int = 24, width: int = 32) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def folder(root: Path, count: int = 9, seed: int = 0) -> Path:
    """Photos of three classes: root/a/0.png, root/a/1.png, ..."""
    for k in range(count):
        path = root / "abc"[k % 3] / f"{k // 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(100 * seed + k).save(path)
    return root


def frozen(dataset: Any, path: Path, **settings: Any) -> e2kd.FrozenTeacher:
    settings = {"view": 16, "normalization": PLAIN, "progress": False, **settings}
    cache = e2kd.freeze(net(), dataset, path, **settings)
    assert cache is not None
    return cache


# timm's data sets


def cut_short(root: Path, name: str) -> None:
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("transform", [None, AUGMENT])
def test_a_photo_that_timm_can_not_read_is_not_replaced_by_the_next(
    tmp_path: Path, transform: Any, nested: bool
) -> None:
    root = folder(tmp_path / "photos")
    photos = create_dataset("", root)
    dataset = Subset(ConcatDataset([photos]), range(9)) if nested else photos
    cache = frozen(dataset, tmp_path / "cache")
    taught, name = e2kd.FrozenDataset(dataset, cache, transform=transform), photos.filename(4)
    assert torch.equal(taught[4][1].logits, cache.rows([4]).logits[0])
    cut_short(root, name)
    with pytest.raises((ValueError, OSError), match=rf"sample 4 \('{name}'\)|truncated"):
        taught[4]
    assert torch.equal(taught[5][1].logits, cache.rows([5]).logits[0])


def test_a_photo_that_timm_can_not_read_is_told_of_when_frozen(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos")
    (root / "b" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 samples could not be read: sample 4: .*\('b/1.png'\)"):
        frozen(create_dataset("", root), tmp_path / "cache")


# Images of more than 8 bits


class Scans(Dataset[Any]):
    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        grey = np.asarray(picture(index).convert("L")).astype(np.uint16) * 257
        return Image.fromarray(grey).convert(self.mode) if self.mode != "I;16" else Image.fromarray(grey), 0


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_refused(tmp_path: Path, mode: str) -> None:
    with pytest.raises(TypeError, match=f'8 bits, but the data set gave one of mode "{mode}"'):
        frozen(Scans(mode), tmp_path)


# Transforms that are set later


@pytest.mark.parametrize("transform", [None, AUGMENT])
def test_a_transform_that_another_part_of_a_split_is_given_is_noticed(tmp_path: Path, transform: Any) -> None:
    root = folder(tmp_path / "photos")
    cache = frozen(ImageFolder(root), tmp_path / "cache")
    train, held_out = random_split(ImageFolder(root), [6, 3], torch.Generator().manual_seed(0))
    taught = e2kd.FrozenDataset(ConcatDataset([train]), cache, ids=names_of(train), match="id", transform=transform)
    copied = pickle.loads(pickle.dumps(taught))
    assert torch.equal(copied[0][1].maps, taught[0][1].maps)
    held_out.dataset.transform = v2.RandomVerticalFlip(1.0)
    with pytest.raises(ValueError, match=r"another one than when FrozenDataset was built.*transform="):
        taught[0]
    held_out.dataset.transform = None
    assert len(taught.__getitems__([0, 1])) == 2


# Pictures that were replaced under their names


def parts(root: Path, order: str) -> ConcatDataset[Any]:
    return ConcatDataset([ImageFolder(root / name) for name in order])


@pytest.mark.parametrize("transform", [None, AUGMENT])
def test_other_pictures_with_the_same_names_are_refused(tmp_path: Path, transform: Any) -> None:
    for seed, name in enumerate("xyz"):
        folder(tmp_path / name, seed=seed)
    cache = frozen(parts(tmp_path, "xyz"), tmp_path / "cache")
    e2kd.FrozenDataset(parts(tmp_path, "xyz"), cache, transform=transform)
    with pytest.raises(ValueError, match=r"Sample \d+ \('1/[abc]/\d.png'\) has the name of one .* not look like it"):
        e2kd.FrozenDataset(parts(tmp_path, "xzy"), cache, transform=transform)
    cache = frozen(ImageFolder(tmp_path / "x"), tmp_path / "another")
    with pytest.raises(ValueError, match=r"Sample 0 \('a/1.png'\) has the name of one .* not look like it"):
        e2kd.FrozenDataset(Subset(ImageFolder(tmp_path / "y"), range(1, 9)), cache, transform=transform)


def turned(path: str) -> Image.Image:
    return Image.open(path).transpose(Image.Transpose.ROTATE_180)


def test_pictures_that_a_loader_turns_now_are_refused(tmp_path: Path) -> None:
    cache = frozen(ImageFolder(folder(tmp_path / "photos")), tmp_path / "cache")
    with pytest.raises(ValueError, match="not look like it"):
        e2kd.FrozenDataset(Subset(ImageFolder(tmp_path / "photos", loader=turned), [4, 5]), cache)


def test_a_picture_that_was_replaced_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", count=60)
    cache = frozen(ImageFolder(root), tmp_path / "cache")
    taught = e2kd.FrozenDataset(ImageFolder(root), cache)
    picture(1000).save(root / "a" / "1.png")
    with pytest.raises(ValueError, match=r"Sample 1 \('a/1.png'\) has the name"):
        taught.__getitems__([0, 1])
    assert torch.equal(taught[2][1].logits, cache.rows([2]).logits[0])
    with pytest.raises(ValueError, match=r"Sample 1 \('a/1.png'\) has the name"):
        cache.verify(net(), ImageFolder(root), augmentations={})


def test_pictures_that_are_decoded_a_little_differently_are_the_same(tmp_path: Path) -> None:
    def decoded(path: str) -> Image.Image:
        pixels = np.asarray(Image.open(path)).astype(np.int16)
        noise = np.random.default_rng(len(path)).integers(-3, 4, pixels.shape)
        return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))

    cache = frozen(ImageFolder(folder(tmp_path / "photos")), tmp_path / "cache")
    taught = e2kd.FrozenDataset(ImageFolder(tmp_path / "photos", loader=decoded), cache)
    assert len(taught.__getitems__(list(range(9)))) == 9


def test_floating_point_images_with_names_are_known_by_their_looks(tmp_path: Path) -> None:
    def dataset(seed: int) -> ImageFolder:
        as_tensors = v2.Compose([v2.Resize(16), v2.CenterCrop(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        return ImageFolder(folder(tmp_path / str(seed), seed=seed), transform=as_tensors)

    cache = frozen(dataset(0), tmp_path / "cache", view=None, normalization=None)
    assert len(e2kd.FrozenDataset(dataset(0), cache).__getitems__([0, 8])) == 2
    with pytest.raises(ValueError, match="not look like it"):
        e2kd.FrozenDataset(Subset(dataset(1), [5]), cache)


def test_samples_without_names_keep_no_looks(tmp_path: Path) -> None:
    data = TensorDataset(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), torch.arange(4) % 3)
    assert frozen(data, tmp_path / "cache").rows([0, 1]).looks.shape == (2, 0)


def test_records_without_looks_are_written_and_read_as_before() -> None:
    with_looks, without = Record(5, looks=True), Record(5)
    assert with_looks.row_bytes == without.row_bytes + 32
    assert "looks" not in without.to_json()
    for record in (with_looks, without):
        assert Record.from_json(record.to_json()) == record
    rows = torch.zeros(2, 5), None, torch.zeros(2).long(), np.zeros(2, np.uint64)
    looks = looks_of(torch.rand(2, 3, 8, 8))
    assert np.array_equal(with_looks.decode(with_looks.encode(*rows, looks)).looks, looks)
    with pytest.raises(ValueError, match="Expected looks of the images"):
        with_looks.encode(*rows)
    with pytest.raises(ValueError, match="Expected no looks"):
        without.encode(*rows, looks)


# Freezing again into a folder that has rows


@pytest.mark.parametrize("replaced", ["a/0.png", "a/1.png"])
def test_freezing_again_does_not_keep_rows_of_pictures_that_were_replaced(tmp_path: Path, replaced: str) -> None:
    root = folder(tmp_path / "photos")
    cache = frozen(ImageFolder(root), tmp_path / "cache", shard_rows=2)
    (tmp_path / "cache" / "manifest.json").unlink()
    (tmp_path / "cache" / "shard-000003.safetensors").unlink()
    assert len(frozen(ImageFolder(root), tmp_path / "cache", shard_rows=2)) == len(cache)
    picture(1000).save(root / replaced)
    with pytest.raises(ValueError, match=r"Sample [01] is not the picture that it was .* Delete the folder"):
        frozen(ImageFolder(root), tmp_path / "cache", shard_rows=2)


def test_freezing_pixels_again_does_not_keep_rows_of_others(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    frozen(TensorDataset(images, torch.arange(6) % 3), tmp_path / "cache")
    images[4] = 255 - images[4]
    with pytest.raises(ValueError, match="Sample 4 is not the picture that it was"):
        frozen(TensorDataset(images, torch.arange(6) % 3), tmp_path / "cache")


# Lessons of another cache


@pytest.mark.parametrize("pack", [False, True])
def test_lessons_of_another_cache_are_refused(tmp_path: Path, pack: bool) -> None:
    data = TensorDataset(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8), torch.arange(6) % 3)
    cam, grad = (frozen(data, tmp_path / str(k), explainer=how) for k, how in enumerate((e2kd.CAM(), e2kd.GradCAM())))
    student = net().train()
    criterion = e2kd.E2KDLoss(student, cam, nn.CrossEntropyLoss())
    for cache, refused in ((cam, False), (grad, True)):
        to_float = v2.ToDtype(torch.float32, scale=True)
        samples = e2kd.FrozenDataset(data, cache, transform=to_float, pack=pack).__getitems__([0, 1, 2])
        images, taught = default_collate(samples)
        if refused:
            with pytest.raises(ValueError, match="of another cache than the criterion's"):
                criterion(student(images), taught)
        else:
            assert criterion(student(images), taught).isfinite()


def test_lessons_that_do_not_say_their_cache_are_taken(tmp_path: Path) -> None:
    data = TensorDataset(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8), torch.arange(6) % 3)
    cache = frozen(data, tmp_path)
    _, taught = default_collate(e2kd.FrozenDataset(data, cache).__getitems__([0, 1]))
    assert taught.cache.tolist() == [cache.packing.cache] * 2
    own = e2kd.Taught(*taught[:5])
    assert cache.taught(own) is own
    assert own.cache.tolist() == [0, 0]
    assert e2kd.Taught(iter(taught)).cache.tolist() == taught.cache.tolist()


def test_labels_that_are_several_move_with_their_lessons() -> None:
    rest = torch.zeros(2, 5), torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.zeros(2).long()
    for labels in ([torch.zeros(2), "name"], (torch.zeros(2), "name"), {0: torch.zeros(2), 1: "name"}):
        moved = e2kd.Taught(labels, *rest).to("meta")
        assert type(moved.labels) is type(labels)
        assert moved.labels[0].device.type == "meta"
        assert moved.labels[1] == "name"


# Samples in another order, more than once, and others that are read in words


def noise(count: int = 8, dtype: torch.dtype = torch.uint8) -> TensorDataset:
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return TensorDataset(pixels.to(dtype), torch.arange(count) % 3)


@pytest.mark.parametrize("order", [[3, 0, 7, 2, 5, 1, 6, 4], [0, 2, 1, 3, 4, 5, 6, 7]])
def test_a_shuffled_subset_of_all_samples_without_names_finds_its_rows(tmp_path: Path, order: list[int]) -> None:
    data = noise()
    cache = frozen(data, tmp_path / "whole")
    for dataset, rows in ((Subset(data, order), order), (Subset(Subset(data, order), [1, 1, 4]), None)):
        taught = e2kd.FrozenDataset(dataset, cache).__getitems__(list(range(len(dataset))))
        rows = rows or [order[1], order[1], order[4]]
        assert torch.equal(torch.stack([lesson.logits for _, lesson in taught]), cache.rows(rows).logits)
    cache = frozen(Subset(data, order), tmp_path / "shuffled")
    _, lesson = e2kd.FrozenDataset(Subset(data, order), cache)[1]
    assert torch.equal(lesson.logits, cache.rows([1]).logits[0])


def test_a_subset_may_list_a_named_sample_twice(tmp_path: Path) -> None:
    photos = ImageFolder(folder(tmp_path / "photos"))
    cache = frozen(photos, tmp_path / "cache")
    taught = e2kd.FrozenDataset(Subset(photos, [4, 4, 1]), cache).__getitems__([0, 1, 2])
    assert torch.equal(torch.stack([lesson.logits for _, lesson in taught]), cache.rows([4, 4, 1]).logits)
    with pytest.raises(ValueError, match="comes more than once"):
        e2kd.FrozenDataset(photos, cache, ids=["a"] * 9)


def test_a_stream_is_refused_in_words(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(TypeError, match="Stream is a stream"):
        e2kd.FrozenDataset(Stream(), frozen(noise(), tmp_path))


@pytest.mark.parametrize("view", [None, 12])
def test_images_in_bfloat16_are_known_by_their_pixels(view: int | None, tmp_path: Path) -> None:
    data = noise(dtype=torch.bfloat16)
    cache = e2kd.freeze(net().bfloat16(), data, tmp_path, view=view, progress=False)
    assert cache is not None
    assert len(e2kd.FrozenDataset(data, cache).__getitems__([0, 7])) == 2


def test_a_picture_beside_what_a_transform_made_of_it_is_refused() -> None:
    with pytest.raises(TypeError, match="one image, but got 'image' and 'pixel_values'"):
        image_and_label({"image": 1, "pixel_values": 2, "label": 3})
