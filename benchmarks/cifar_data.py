"""The parts of CIFAR-10 that a comparison needs, decoded, and how they are drawn and augmented."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import kornia.augmentation as K
import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn

from benchmarks.cifar import CLASSES, labels_of, pixels
from benchmarks.common import ROOT

SHARED = Path(os.environ.get("E2KD_SHARED", ROOT.parent / "shared"))
TRAIN, TEST = (SHARED / "data" / "cifar10" / f"{part}_jpeg.safetensors" for part in ("train", "test"))
# images of each class of the train part that we train neither teacher nor students on; the weights that a ResNet-32
# teacher begins with were trained on the whole train part
HELD_OUT = 500


PHOTOS = ("imagenet-samples/all", "catsdogs1400", "pets600/images", "coco256/images")
UNKNOWN = -1  # the label of an image of another data set
TURNS = 4  # by quarters


class Images(NamedTuple):
    """Images [N, 3, 32, 32] uint8 and their labels [N]."""

    pixels: Tensor
    labels: Tensor

    def some(self, places: Tensor) -> Images:
        """The images at some places."""
        return Images(self.pixels[places], self.labels[places])


def places(labels: Tensor, start: int, stop: int | None) -> Tensor:
    """Where the images of each class stand, from its `start`-th to before its `stop`-th.

    >>> places(torch.tensor([0, 0, 1, 0, 1]), 0, 1)
    tensor([0, 2])
    """
    return torch.cat([(labels == c).nonzero().flatten()[start:stop] for c in labels.unique()])


def part(path: Path, start: int, stop: int | None) -> Images:
    """Decoded images of a file: those of each class from its `start`-th to before its `stop`-th."""
    labels = labels_of(path)
    chosen = places(labels, start, stop)
    return Images(pixels(path, chosen.tolist()), labels[chosen])


def photos() -> Images:
    """The shared photographs of other data sets, made as small as CIFAR's; their labels are UNKNOWN."""
    paths = [path for folder in PHOTOS for path in sorted((SHARED / "data" / folder).rglob("*.jp*g"))]
    small = [np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BOX)) for path in paths]
    made = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()
    return Images(made, torch.full((len(made),), UNKNOWN))


def turned(images: Images) -> Images:
    """Each image turned by a quarter more than the one before; a class is what is shown and how it is turned.

    After *Self-supervised Label Augmentation via Input Transformations* (Lee et al. 2020).

    >>> turned(Images(torch.rand(5, 3, 32, 32), torch.tensor([0, 0, 0, 1, 1]))).labels
    tensor([0, 1, 2, 7, 4])
    """
    quarters = torch.arange(len(images.labels)) % TURNS
    pixels = images.pixels.clone()
    for k in range(1, TURNS):
        pixels[quarters == k] = torch.rot90(pixels[quarters == k], k, (2, 3))
    return Images(pixels, TURNS * images.labels + quarters)


def few(pool: Images, per_class: int, seed: int) -> Images:
    """So many images of each class, chosen by the seed; of images without labels as many in all."""
    generator = Generator().manual_seed(seed)
    order = torch.randperm(len(pool.labels), generator=generator)
    if (pool.labels == UNKNOWN).all():
        return pool.some(order[: per_class * CLASSES])
    return pool.some(order[places(pool.labels[order], 0, per_class)])


def shifts() -> tuple[nn.Module, ...]:
    """A shift by up to 4 pixels."""
    return (K.RandomCrop((32, 32), padding=4),)


def shifts_and_flips() -> tuple[nn.Module, ...]:
    """Shifts, and a mirror in half of the images. Not for turned images, whose mirror images are turned otherwise."""
    return *shifts(), K.RandomHorizontalFlip()


def orders(count: int, batch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of each batch of a whole training: full batches alone, a new order every epoch."""
    generator = Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator)[: count - count % batch].split(batch)
