"""Samples of any data set: image and label, and a name by which a sample is known again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from e2kd.frozen.fingerprints import id_hash

IMAGE_KEYS = ("image", "img", "pixel_values")
LABEL_KEYS = ("label", "labels", "fine_label")


def image_and_label(sample: Any) -> tuple[Any, Any]:
    """The two things needed of a sample: (image, label, ...) or a dict with them.

    >>> image_and_label({"img": "pixels", "label": 3})
    ('pixels', 3)
    """
    if isinstance(sample, dict):
        images = [key for key in IMAGE_KEYS if key in sample]
        if len(images) > 1:
            raise TypeError(
                f"Expected samples with one image, but got {' and '.join(map(repr, images))}. If a transform made one "
                "of the other and is random, take it off the data set and give it to FrozenDataset, transform=. Else "
                "remove one of the columns."
            )
        image = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
        label = next((sample[key] for key in LABEL_KEYS if key in sample), None)
        if image is not None and label is not None:
            return image, label
        raise TypeError(
            f"Expected samples with {' or '.join(IMAGE_KEYS)}, and {' or '.join(LABEL_KEYS)}, but got "
            f"{sorted(sample)}. Rename the data set's columns, or wrap it so that it gives (image, label)."
        )
    if isinstance(sample, (tuple, list)) and len(sample) >= 2:
        return sample[0], sample[1]
    raise TypeError(
        f"Expected samples (image, label) or a dict with them, but the data set gave {type(sample).__name__}. Wrap it "
        "so that it gives (image, label)."
    )


def names_of(dataset: Any) -> list[str] | None:
    """The samples' names, in order, where the data set knows all of them: paths below its root. None where it does not.

    Knows torchvision's ImageFolder, timm's data sets, and Subset and ConcatDataset of those.
    """
    if isinstance(dataset, Subset):
        names = names_of(dataset.dataset)
        return None if names is None else [names[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [names_of(part) for part in dataset.datasets]
        return [f"{k}/{name}" for k, part in enumerate(parts) for name in part or []] if all(parts) else None
    samples, root = getattr(dataset, "samples", None), getattr(dataset, "root", None)
    if isinstance(samples, list) and root is not None and all(isinstance(s, tuple) for s in samples):
        return _below(root, [path for path, *_ in samples])
    listing = getattr(getattr(dataset, "reader", None), "filenames", None)
    return _below("", listing()) if callable(listing) else None


def _below(root: str | os.PathLike[str], paths: Sequence[Any]) -> list[str] | None:
    """Paths as names: what of them lies below the root, the whole of others. None unless all of them are paths."""
    if not all(isinstance(path, (str, os.PathLike)) for path in paths):
        return None
    found = map(PurePath, paths)
    return [(path.relative_to(root) if path.is_relative_to(root) else path).as_posix() for path in found]


def class_names_of(dataset: Any) -> list[str] | None:
    """The names of the classes in the order of the labels, where the data set knows them."""
    if isinstance(dataset, Subset):
        return class_names_of(dataset.dataset)
    names = getattr(dataset, "classes", None)
    if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
        return list(names)
    mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if isinstance(mapping, dict):
        return sorted(map(str, mapping), key=lambda name: int(mapping[name]))
    features = getattr(dataset, "features", None) or {}
    names = next((getattr(features[key], "names", None) for key in LABEL_KEYS if key in features), None)
    return None if names is None else list(names)


def transformed(dataset: Any) -> bool | None:
    """Whether images go through a transform of the data set's own, as torchvision and timm name it; None if unknown."""
    if isinstance(dataset, Subset):
        return transformed(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        parts = [transformed(part) for part in dataset.datasets]
        return True if True in parts else None if None in parts else False
    if not hasattr(dataset, "transform"):
        return None
    joint = getattr(dataset, "transforms", None)  # of image and label; torchvision puts the two of them together there
    return dataset.transform is not None or getattr(joint, "transform", joint) is not None


def transforms_of(dataset: Any) -> tuple[Any, ...]:
    """What a data set and its parts put images through, as torchvision and timm name it: to see whether it changed."""
    if isinstance(dataset, Subset):
        return transforms_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return tuple(found for part in dataset.datasets for found in transforms_of(part))
    return getattr(dataset, "transform", None), getattr(dataset, "transforms", None)


def hashes_of(names: Sequence[str], *, repeats: bool = False) -> np.ndarray:
    """64-bit hashes of names, [N] uint64; `repeats` is whether one may come twice, meaning the same sample.

    Raises:
        ValueError: for a name that comes twice where it could not be told which is meant.
    """
    hashes = np.fromiter(map(id_hash, names), np.uint64, len(names))
    if repeats:
        return hashes
    values, counts = np.unique(hashes, return_counts=True)
    if len(values) < len(names):
        double = names[int(np.flatnonzero(hashes == values[counts > 1][0])[0])]
        raise ValueError(f"Expected every sample to have its own name, but {double!r} comes more than once.")
    return hashes


def pixel_hash(image: Tensor) -> int:
    """A 64-bit hash of an image's type, size and pixels: its name where the data set gives none.

    >>> import torch
    >>> pixel_hash(torch.zeros(3, 2, 2)) == pixel_hash(torch.zeros(3, 2, 2)), pixel_hash(torch.zeros(3, 1, 4)) == 0
    (True, False)
    """
    pixels = hashlib.blake2b(f"{image.dtype} {tuple(image.shape)}".encode(), digest_size=8)
    pixels.update(image.contiguous().view(torch.uint8).numpy().data)  # NumPy has no bfloat16
    return int.from_bytes(pixels.digest(), "little")
