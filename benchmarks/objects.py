"""Photos whose objects' places are known, pets with trimaps and COCO with boxes; what networks are worth on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import e2kd
from benchmarks import coco, pets
from benchmarks.small_networks import SIDE
from e2kd.demo.measure import CHUNK, share
from e2kd.demo.train import Feed
from e2kd.localization import energy_on_mask, intersection_over_union
from e2kd.similarity import is_zero

AREA = (0.5, 1.0)  # of a photo, that a training image shows


@dataclass(frozen=True)
class Objects:
    """Images [N, 3, S, S] in [0, 1], labels [N] or multi-hot [N, K], masks [N, S, S] or of each class [N, K, S, S]."""

    images: Tensor
    labels: Tensor
    masks: Tensor

    def feed(self) -> Feed:
        """Crops, half of them mirrored, with their labels and masks; the same for the same random state."""
        size = (self.images.shape[2], self.images.shape[3])
        augmentation = K.AugmentationSequential(
            K.RandomResizedCrop(size, AREA), K.RandomHorizontalFlip(), data_keys=["input", "mask"]
        )

        def feed(batch: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            masks = self.masks[batch]
            images, moved = augmentation(self.images[batch], masks.float().reshape(len(batch), -1, *size))
            return images, (self.labels[batch], moved.reshape(masks.shape))

        return feed


@dataclass(frozen=True)
class Task:
    """A data set with what it asks for.

    Args:
        load: a part's objects.
        classes: how many.
        loss: of logits and labels.
        worth: of logits and labels, as a share; `measure` is its name.
        distilled: settings of `E2KDLoss` beside weight and temperature.
        temperatures: to choose from; multi-label distillation has none.
        epochs: of teachers and students; some 180 steps of either task.
        peak: of their schedules.
    """

    title: str
    load: Callable[[str], Objects]
    classes: int
    loss: Callable[[Tensor, Tensor], Tensor]
    measure: str
    worth: Callable[[Tensor, Tensor], float]
    distilled: dict[str, Any]
    temperatures: tuple[float | None, ...]
    epochs: int
    peak: float

    def scores(self, model: nn.Module, objects: Objects) -> dict[str, float]:
        """What a network is worth, with EPG and IoU of its explanations of the classes that are there."""
        with torch.no_grad():
            logits = torch.cat([model(images) for images in objects.images.split(CHUNK)])
        rows, classes = shown(objects.labels)
        masks = objects.masks[rows] if objects.masks.ndim == 3 else objects.masks[rows, classes]
        parts = zip(objects.images[rows].split(CHUNK), classes.split(CHUNK), strict=True)
        maps = torch.cat([e2kd.explain(model, images, chosen).maps for images, chosen in parts])
        found = {"epg": energy_on_mask(maps, masks), "iou": intersection_over_union(maps, masks)}
        return {
            self.measure: self.worth(logits, objects.labels),
            **{name: values.nanmean().item() for name, values in found.items()},
            "zero_maps": int(is_zero(maps).sum()),
        }


def shown(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of an image and a class that it shows, as indices.

    >>> shown(torch.tensor([2, 0])), shown(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    ((tensor([0, 1]), tensor([2, 0])), (tensor([0, 1, 1]), tensor([1, 0, 1])))
    """
    if labels.ndim == 1:
        return torch.arange(len(labels)), labels
    rows, classes = labels.nonzero(as_tuple=True)
    return rows, classes


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose top class is the label."""
    return share(logits.argmax(1) == labels)


def f1(logits: Tensor, labels: Tensor) -> float:
    """F1 score of all decisions together, at a probability of 1/2."""
    from torchmetrics.functional.classification import multilabel_f1_score

    return float(multilabel_f1_score(logits.sigmoid(), labels.int(), logits.shape[1], average="micro"))


def load_pets(part: str) -> Objects:
    """Squares from the middle of the photos of three breeds, with the animals."""
    images, masks, breeds = pets.squares(part, SIDE, animals=False)
    return Objects(images / 255, breeds, masks > 0.5)


def load_coco(part: str) -> Objects:
    """Photos of seven groups of objects, with their boxes."""
    images, labels, masks = coco.photos(part, SIDE)
    return Objects(images / 255, labels.float(), masks)


TASKS = {
    "pets": Task(
        "Pets, 3 breeds", load_pets, len(pets.BREEDS), F.cross_entropy, "accuracy", accuracy, {}, (1.0, 4.0), 30,
        peak=1e-3,
    ),
    "coco": Task(
        "COCO, 7 groups", load_coco, len(coco.GROUPS), F.binary_cross_entropy_with_logits, "f1", f1,
        {"classes": "positives", "distillation": e2kd.MultiLabelKDLoss()}, (None,), 90,
        peak=3e-3,
    ),
}  # fmt: skip
