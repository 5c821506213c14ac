"""256 COCO photos with boxes, from the shared data, as a multi-label problem of seven groups of objects."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from benchmarks.cifar_data import SHARED
from benchmarks.pets import cut

FOLDER = SHARED / "data" / "coco256"
GROUPS = {  # first and last class of COCO's super-categories; others are in too few photos, or too small to see
    "person": (0, 0), "vehicle": (1, 8), "animal": (14, 23), "sports": (29, 38), "kitchen": (39, 45),
    "food": (46, 55), "furniture": (56, 61),
}  # fmt: skip
PARTS = {"train": ("train2017", (0, 1, 2)), "validation": ("val2017", (0,)), "test": ("val2017", (1, 2))}  # of three


class Photos(NamedTuple):
    """Photos [N, 3, S, S] uint8, which groups they show [N, K], bool, and where, [N, K, S, S], bool."""

    images: Tensor
    labels: Tensor
    masks: Tensor


def photos(part: str, side: int) -> Photos:
    """The photos of a part ("train", "validation", "test") with any object of the groups, squashed to squares."""
    folder, chosen = PARTS[part]
    found = []
    for k, path in enumerate(sorted((FOLDER / "images" / folder).glob("*.jpg"))):
        masks = boxes(FOLDER / "object_detection" / "labels" / folder / f"{path.stem}.txt", side)
        if k % 3 in chosen and masks.any():
            photo = Image.open(path).convert("RGB")
            found.append((cut(photo, (0, 0, *photo.size), side).permute(2, 0, 1), masks))
    images, masks = (torch.stack(tensors) for tensors in zip(*found, strict=True))
    return Photos(images, masks.flatten(2).any(2), masks)


def boxes(path: Path, side: int) -> Tensor:
    """Every group's boxes, filled: [K, S, S], bool. Of a file with a class, a centre and a size in each line."""
    masks = torch.zeros(len(GROUPS), side, side, dtype=torch.bool)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        kind, *numbers = line.split()
        x, y, width, height = (side * float(number) for number in numbers)
        rows = slice(int(y - height / 2), max(round(y + height / 2), int(y - height / 2) + 1))
        columns = slice(int(x - width / 2), max(round(x + width / 2), int(x - width / 2) + 1))
        for group, (first, last) in enumerate(GROUPS.values()):
            if first <= int(kind) <= last:
                masks[group, rows, columns] = True
    return masks
