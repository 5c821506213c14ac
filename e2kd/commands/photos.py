"""Photographs from a folder, as the models of a command expect them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from e2kd.normalization import Normalization, expected_normalization

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Found(NamedTuple):
    """Files, the label of each and the names of the classes; without classes no label and no name."""

    paths: list[Path]
    labels: list[int]
    classes: list[str]


def find_photos(folder: Path, count: int) -> Found:
    """At most `count` images: as many of every class, if the folder has one folder for each, in the names' order.

    Raises:
        FileNotFoundError: when there are none.
    """
    classes = (
        sorted(path.name for path in folder.iterdir() if path.is_dir() and _images(path)) if folder.is_dir() else []
    )
    if not classes:
        return Found(_some(folder, _images(folder), count), [], [])
    sorted_by_class = [_images(folder / name) for name in classes]
    turns = [(path, label) for turn in zip_longest(*sorted_by_class) for label, path in enumerate(turn) if path]
    chosen = sorted(turns[:count], key=lambda each: (each[1], each[0]))
    return Found([path for path, _ in chosen], [label for _, label in chosen], classes)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _some(folder: Path, paths: list[Path], count: int) -> list[Path]:
    if not paths:
        raise FileNotFoundError(f"Expected images ({', '.join(SUFFIXES)}) in {folder}, but found none.")
    return paths[:count]


def read_photos(paths: Sequence[Path], side: int) -> Tensor:
    """Images [n, 3, side, side] in [0, 1], cut to a square as validation transforms do."""
    from e2kd.frozen.views import CanonicalView

    view = CanonicalView((side, side))
    return torch.stack([_read(path, view) for path in paths]).float() / 255


def _read(path: Path, view: Callable[[Any], Tensor]) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return view(image)
    except (OSError, TypeError) as error:  # PIL names no file where one is cut short, the view none of 16 bits
        raise OSError(f"{path} could not be read: {error}") from error


def read_masks(folder: Path, photos: Path, paths: Sequence[Path], side: int, value: int | None) -> Tensor:
    """The objects in the photos, bool [n, side, side], from images of the same names in another folder.

    Args:
        photos: the folder the paths lie in.
        value: of the object's pixels; None is everything above 0.

    Raises:
        FileNotFoundError: when a photo has no mask.
        OSError: when a mask can't be read.
    """
    import numpy as np
    from PIL import Image

    from e2kd.frozen.views import CanonicalView

    view = CanonicalView((side, side))

    def inside(image: Any) -> Tensor:
        pixels = np.asarray(image if image.mode in ("L", "P", "1", "I", "I;16") else image.convert("L"))
        chosen = pixels > 0 if value is None else pixels == value
        return view(Image.fromarray(chosen.astype(np.uint8) * 255))[0] >= 128

    shared = {stem for stem, count in Counter(path.stem for path in paths).items() if count > 1}
    files = [_mask_of(folder, path.relative_to(photos), flat=path.stem not in shared) for path in paths]
    return torch.stack([_read(file, inside) for file in files])


def _mask_of(folder: Path, name: Path, *, flat: bool) -> Path:
    """The file of a photo's mask: under the photo's name in the folder, or `flat`, without the photo's own folder."""
    for suffix in (name.suffix, *SUFFIXES):
        for place in (folder / name.with_suffix(suffix), *([folder / f"{name.stem}{suffix}"] if flat else [])):
            if place.is_file():
                return place
    several = "" if flat else f" Several photos are called {name.stem}: put masks into folders as the photos are."
    raise FileNotFoundError(f"Expected the mask of {name} in {folder}, named like the photo, but found none.{several}")


def add_normalization(parser: argparse.ArgumentParser) -> None:
    """The options that say how networks expect images."""
    for name in ("mean", "std"):
        parser.add_argument(f"--{name}", type=float, nargs="+", help="of images, for networks that don't say theirs")


def normalization_of(model: nn.Module, args: argparse.Namespace) -> Normalization:
    """What a model says of itself, as those of timm and B-cos networks do, else what was said in `add_normalization`.

    Raises:
        ValueError: when neither is known.
    """
    found = expected_normalization(model, None)
    if found is None and None not in (args.mean, args.std):
        found = args.mean, args.std
    if found is None:
        raise ValueError(
            f"{type(model).__name__} doesn't say how it expects images to be normalised. Pass --mean and --std, a "
            "number for each colour: 0 0 0 and 1 1 1 where it takes images in [0, 1]."
        )
    return found


def normalized(images: Tensor, how: Normalization) -> Tensor:
    """Images [n, 3, H, W] in [0, 1] with this mean and standard deviation taken out.

    Raises:
        ValueError: when they are not a number for each colour, or one for all.
    """
    lengths = [len(values) for values in how]
    if not set(lengths) <= {1, images.shape[1]}:
        raise ValueError(
            f"Expected a mean and a standard deviation for each of the {images.shape[1]} colours, but got {lengths[0]} "
            f"and {lengths[1]}. Pass --mean and --std with {images.shape[1]} numbers each."
        )
    mean, std = (torch.tensor(values)[:, None, None] for values in how)
    return (images - mean) / std
