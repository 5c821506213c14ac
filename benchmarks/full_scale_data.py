"""A split as one list of files, and parts of it: few images of each class, and those that are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import default_loader

from benchmarks.cifar_data import places

SPLIT_SEED = 0  # of images that are held out: the same ones for every seed of a student


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
        image = read_image(path)
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
        crop: what cuts the image that is classified.
        whole: what shrinks the image that is explained, and the objects' masks [K, H, W] in [0, 1], which it blurs
            likewise.
        encode: what else either image goes through.
    """

    def __init__(
        self,
        split: Split,
        crop: Callable[[Any], Any],
        whole: Callable[[Any], Any],
        encode: Callable[[Any], Any],
    ) -> None:
        self.split, self.crop, self.whole, self.encode = split, crop, whole, encode

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, target = self.split[index]
        found = {"image": self.encode(self.crop(image)), "target": target}
        if self.split.groups is not None:
            found["group"] = self.split.groups[index]
        if self.split.boxes is not None:
            masks = object_masks(self.split.boxes[index], len(self.split.classes), image.height, image.width)
            found["whole"], found["masks"] = self.encode(self.whole(image)), self.whole(masks.float())
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


def read_image(path: str) -> Any:
    """An RGB image of PIL.

    Raises:
        OSError: for a file that is none, or is damaged; says which.
    """
    try:
        return default_loader(path)
    except Exception as error:  # PIL has many for a damaged file
        raise OSError(f"Expected an image in {path}, but reading it failed: {error}") from error


def held_out(split: Split, per_class: int) -> tuple[Split, Split]:
    """The training images, and those of each class that are kept from all students, to choose settings on.

    Where images show several classes it is as many images in all.

    Raises:
        ValueError: when that leaves a class without an image to train on.
    """
    if not split.multilabel:
        _check_each_class(split, per_class + 1, f"to hold out {per_class} of them")
    elif per_class * len(split.classes) >= len(split):
        raise ValueError(f"Expected more than the {len(split)} images of {split.root} to hold out {per_class} a class.")
    if split.multilabel:
        kept = _shuffled(split, SPLIT_SEED)[: per_class * len(split.classes)]
    else:
        kept = _of_each_class(split, per_class, SPLIT_SEED)
    return split.some(_others(split, kept)), split.some(sorted(kept.tolist()))


def few(split: Split, per_class: int, seed: int) -> Split:
    """So many images of each class, chosen by the seed.

    Raises:
        ValueError: when images show several classes, or a class has fewer images.
    """
    if split.multilabel:
        raise ValueError("Expected images of one class each to take few of every class. Leave out --per-class.")
    _check_each_class(split, per_class, "to train on")
    return split.some(sorted(_of_each_class(split, per_class, seed).tolist()))


def _check_each_class(split: Split, count: int, use: str) -> None:
    """Raise unless every class has so many images."""
    found = Counter(target for _, target in split.samples)
    label = min(range(len(split.classes)), key=lambda label: found[label])
    if found[label] < count:
        raise ValueError(
            f"Expected at least {count} images of each class {use}, but {split.root} has {found[label]} of "
            f"{split.classes[label]}."
        )


def _of_each_class(split: Split, count: int, seed: int) -> Tensor:
    order = _shuffled(split, seed)
    labels = torch.tensor([target for _, target in split.samples])
    return order[places(labels[order], 0, count)]


def _shuffled(split: Split, seed: int) -> Tensor:
    return torch.randperm(len(split), generator=Generator().manual_seed(seed))


def _others(split: Split, chosen: Tensor) -> list[int]:
    without = set(chosen.tolist())
    return [i for i in range(len(split)) if i not in without]
