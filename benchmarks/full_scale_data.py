"""ImageNet, SUN397, Waterbirds, VOC and PlantVillage as they are unpacked: every split as one list of files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder, VOCDetection
from torchvision.datasets.folder import default_loader, is_image_file

from benchmarks.cifar_data import places

SPLIT_SEED = 0  # of images that are held out: the same ones for every seed of a student
BACKGROUNDS = ("land", "water")
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_SPLITS = {"2012": ("train", "val"), "2007": ("trainval", "test")}  # 2012's test annotations are not public


class Box(NamedTuple):
    """An object: its class, and pixels from left and top up to, without, right and bottom."""

    label: int
    left: int
    top: int
    right: int
    bottom: int


@dataclass(eq=False)
class Split(Dataset[tuple[Any, Any]]):
    """(image, target) of one split; the image as PIL reads it, unless there is a transform.

    Attributes:
        root: below which the files are; their paths from there are their names in a frozen teacher's cache.
        samples: (path, target), the target a class or, where images show several, multi-hot [K].
        classes: names.
        groups: of each sample, if they are to be told apart.
        boxes: of each sample, if objects are marked.
        transform: of the images.
    """

    root: Path
    samples: list[tuple[str, Any]]
    classes: list[str]
    groups: list[int] | None = None
    boxes: list[list[Box]] | None = None
    transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, target = self.samples[index]
        image = default_loader(path)
        return image if self.transform is None else self.transform(image), target

    def some(self, chosen: Sequence[int]) -> Split:
        """Samples at some places."""
        groups = None if self.groups is None else [self.groups[i] for i in chosen]
        boxes = None if self.boxes is None else [self.boxes[i] for i in chosen]
        return replace(self, samples=[self.samples[i] for i in chosen], groups=groups, boxes=boxes)

    @property
    def multilabel(self) -> bool:
        """Whether an image may show several classes."""
        return bool(self.samples) and isinstance(self.samples[0][1], Tensor)


class Measured(Dataset[dict[str, Any]]):
    """What a network is measured on: images with their targets, groups and objects.

    Args:
        split: the images, without a transform.
        geometry: what moves pixels; the objects' masks [K, H, W] in [0, 1] are moved and blurred as the image is.
        encode: what else the image goes through.
    """

    def __init__(self, split: Split, geometry: Callable[[Any], Any], encode: Callable[[Any], Any]) -> None:
        self.split, self.geometry, self.encode = split, geometry, encode

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, target = self.split[index]
        found = {"image": self.encode(self.geometry(image)), "target": target}
        if self.split.groups is not None:
            found["group"] = self.split.groups[index]
        if self.split.boxes is not None:
            masks = object_masks(self.split.boxes[index], len(self.split.classes), image.height, image.width)
            found["masks"] = self.geometry(masks.float())
        return found


class Layout(NamedTuple):
    """The splits of a data set; without one for validation, that is held out of the training images."""

    train: Split
    test: Split
    validation: Split | None = None
    groups: tuple[str, ...] = ()


def object_masks(boxes: Sequence[Box], classes: int, height: int, width: int) -> Tensor:
    """Where the objects of each class are, bool [K, H, W].

    >>> object_masks([Box(1, 0, 0, 1, 2)], 2, 2, 2).int()
    tensor([[[0, 0],
             [0, 0]],
    <BLANKLINE>
            [[1, 0],
             [1, 0]]], dtype=torch.int32)
    """
    masks = torch.zeros(classes, height, width, dtype=torch.bool)
    for label, left, top, right, bottom in boxes:
        masks[label, top:bottom, left:right] = True
    return masks


def image_folder(path: Path) -> Split:
    """A folder with one folder of images for each class."""
    found = ImageFolder(str(path))
    return Split(path, found.samples, found.classes)


def imagenet(path: Path) -> Layout:
    """`train/CLASS` and `val/CLASS`."""
    return _same_classes(image_folder(path / "train"), image_folder(path / "val"))


def plantvillage(path: Path) -> Layout:
    """`train/CLASS` and `val/CLASS` or `valid/CLASS`; or classes alone, a fifth of each of which is for the test."""
    test = next((path / name for name in ("val", "valid", "test") if (path / name).is_dir()), None)
    if (path / "train").is_dir() and test is not None:
        return _same_classes(image_folder(path / "train"), image_folder(test))
    whole = image_folder(path)
    labels = [label for _, label in whole.samples]
    parts = train_test_split(range(len(whole)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    return Layout(*(whole.some(sorted(part)) for part in parts))


def sun397(path: Path) -> Layout:
    """`a/abbey/*.jpg` ..., `ClassName.txt`, and the first of the official partitions."""
    classes = [line[len("/a/") :] for line in _lines(path / "ClassName.txt")]
    numbers = {name: label for label, name in enumerate(classes)}

    def part(name: str) -> Split:
        names = [PurePosixPath(line.lstrip("/")) for line in _lines(path / "Partitions" / f"{name}_01.txt")]
        return Split(path, [(str(path / n), numbers[str(PurePosixPath(*n.parts[1:-1]))]) for n in names], classes)

    return Layout(part("Training"), part("Testing"))


def waterbirds(path: Path) -> Layout:
    """`metadata.csv` with img_filename, y, split and place; a group is a class on a background, number 2 y + place."""
    with _existing(path / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    classes = [f"{background}bird" for background in BACKGROUNDS]

    def part(number: int) -> Split:
        mine = [row for row in rows if int(row["split"]) == number]
        samples = [(str(path / row["img_filename"]), int(row["y"])) for row in mine]
        return Split(path, samples, classes, groups=[2 * int(row["y"]) + int(row["place"]) for row in mine])

    groups = tuple(f"{bird} on {background}" for bird in classes for background in BACKGROUNDS)
    return Layout(part(0), part(2), part(1), groups)


def voc(path: Path) -> Layout:
    """`VOCdevkit/VOC2012`, or VOC2007 where that is not there, as `torchvision.datasets.VOCDetection` reads it."""
    year = next((year for year in VOC_SPLITS if (path / "VOCdevkit" / f"VOC{year}").is_dir()), None)
    if year is None:
        raise FileNotFoundError(f"Expected VOCdevkit/VOC2012 or VOCdevkit/VOC2007 in {path}, but there is neither.")
    return Layout(*(_voc_part(VOCDetection(str(path), year, part)) for part in VOC_SPLITS[year]))


def _voc_part(found: VOCDetection) -> Split:
    boxes = [list(_voc_boxes(Path(file))) for file in found.annotations]
    targets = [_multi_hot([box.label for box in some], len(VOC_CLASSES)) for some in boxes]
    samples = list(zip(found.images, targets, strict=True))
    return Split(Path(found.root), samples, list(VOC_CLASSES), boxes=boxes)


def _voc_boxes(annotation: Path) -> Iterator[Box]:
    """All objects, difficult ones too. VOC counts pixels from 1, and right and bottom belong to the object."""
    tree = VOCDetection.parse_voc_xml(ElementTree.parse(annotation).getroot())
    for thing in tree["annotation"]["object"]:
        left, top, right, bottom = (round(float(thing["bndbox"][side])) for side in ("xmin", "ymin", "xmax", "ymax"))
        yield Box(VOC_CLASSES.index(thing["name"]), left - 1, top - 1, right, bottom)


READERS: dict[str, Callable[[Path], Layout]] = {
    "imagenet": imagenet, "sun397": sun397, "waterbirds": waterbirds, "voc": voc, "plantvillage": plantvillage,
}  # fmt: skip


def unrelated(path: Path) -> Split:
    """All images below a folder, whatever they show: the folder each is in stands for its class."""
    files = sorted(file for file in path.rglob("*") if is_image_file(file.name))
    if not files:
        raise FileNotFoundError(f"Expected images in {path} or folders below it, but found none.")
    folders = sorted({file.parent.relative_to(path).as_posix() for file in files})
    numbers = {name: label for label, name in enumerate(folders)}
    return Split(path, [(str(file), numbers[file.parent.relative_to(path).as_posix()]) for file in files], folders)


def held_out(split: Split, per_class: int) -> tuple[Split, Split]:
    """The training images, and those of each class that are kept from all students, to choose settings on.

    Where images show several classes it is as many images in all.
    """
    if split.multilabel:
        kept = _shuffled(split, SPLIT_SEED)[: per_class * len(split.classes)]
    else:
        kept = _of_each_class(split, per_class, SPLIT_SEED)
    return split.some(_others(split, kept)), split.some(sorted(kept.tolist()))


def few(split: Split, per_class: int, seed: int) -> Split:
    """So many images of each class, chosen by the seed.

    Raises:
        ValueError: when images show several classes, or a class has no image.
    """
    if split.multilabel:
        raise ValueError("Expected images of one class each to take few of every class. Leave out --per-class.")
    return split.some(sorted(_of_each_class(split, per_class, seed).tolist()))


def _of_each_class(split: Split, count: int, seed: int) -> Tensor:
    order = _shuffled(split, seed)
    labels = torch.tensor([target for _, target in split.samples])
    return order[places(labels[order], 0, count)]


def _shuffled(split: Split, seed: int) -> Tensor:
    return torch.randperm(len(split), generator=Generator().manual_seed(seed))


def _others(split: Split, chosen: Tensor) -> list[int]:
    without = set(chosen.tolist())
    return [i for i in range(len(split)) if i not in without]


def _same_classes(train: Split, test: Split) -> Layout:
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))[:5]
        raise ValueError(f"Expected the same classes in {train.root} and {test.root}, but not in both are {different}.")
    return Layout(train, test)


def _multi_hot(labels: Sequence[int], classes: int) -> Tensor:
    return torch.zeros(classes).index_fill(0, torch.tensor(labels, dtype=torch.long), 1.0)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _existing(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"Expected the file {path}, which comes with the data set, but it is not there.")
    return path
