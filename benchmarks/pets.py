"""Photos of three breeds with trimaps, from the shared data (Oxford-IIIT Pet)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.cifar_data import SHARED

FOLDER = SHARED / "data" / "pets600"
BREEDS = ("Abyssinian", "Bengal", "american_bulldog")
DOG = 2
VALIDATION = 40  # images of each breed of the folder `val` to choose settings on; the others of it are the test part
PARTS = {
    "train": ("train", slice(None)),
    "validation": ("val", slice(VALIDATION)),
    "test": ("val", slice(VALIDATION, None)),
}
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; may leave the photo


class Pets(NamedTuple):
    """Photos [N, 3, S, S] uint8, the animals' masks [N, S, S] in [0, 1], breeds [N]."""

    images: Tensor
    masks: Tensor
    breeds: Tensor


@cache
def squares(part: str, side: int, *, animals: bool) -> Pets:
    """The photos of a part ("train", "validation", "test"), cut to squares of `side` pixels.

    One, Abyssinian_34, has a trimap without an animal and is left out.

    Args:
        animals: whether squares are drawn around the animals, else in the middle of the photos, as large as fits.
    """
    folder, chosen = PARTS[part]
    found = []
    for label, breed in enumerate(BREEDS):
        for path in sorted((FOLDER / "images" / folder / breed).glob("*.jpg"))[chosen]:
            trimap = Image.open((FOLDER / "masks" / folder / breed / path.stem).with_suffix(".png"))
            animal = Image.fromarray((np.asarray(trimap) == 1).astype(np.uint8) * 255)
            if animal.getbbox() is None:
                continue
            photo = Image.open(path).convert("RGB")
            box = around(animal) if animals else middle(photo.size)
            found.append((cut(photo, box, side).permute(2, 0, 1), cut(animal, box, side) / 255, label))
    images, masks, labels = zip(*found, strict=True)
    return Pets(torch.stack(images), torch.stack(masks), torch.tensor(labels))


def around(mask: Image.Image) -> Box:
    """The smallest square with all of a mask that is not empty, its centre that of the mask's box."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    side = max(right - left, bottom - top)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return x, y, x + side, y + side


def middle(size: tuple[int, int]) -> Box:
    """The largest square in the middle of a photo of this width and height."""
    side = min(size)
    x, y = ((n - side) // 2 for n in size)
    return x, y, x + side, y + side


def cut(photo: Image.Image, box: Box, side: int) -> Tensor:
    """A square of a photo, averaged to `side` pixels, uint8; black where it leaves the photo."""
    small = photo.crop(box).resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small))
