"""The frozen teacher of a seed, and what students are fed: one augmentation for images and frozen maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

import e2kd
from e2kd.demo.data import Scenes
from e2kd.demo.train import Feed

SHIFT = 0.1  # of the canvas: how far along each axis a training image moves at most; what leaves the canvas is lost
MOVED = 0.5  # share of the training images that move


@dataclass(frozen=True)
class Lessons:
    """A frozen teacher with the images [N, 3, h, w] it was asked about and what it said of each."""

    frozen: e2kd.FrozenTeacher
    images: Tensor
    taught: e2kd.Taught

    def feed(self, *, frozen: bool) -> Feed:
        """Augmented images, with the lessons or with the labels alone; the same images for the same random state."""
        from kornia.augmentation import RandomAffine

        augmentation = e2kd.JointAugmentation(RandomAffine(0.0, translate=(SHIFT, SHIFT), p=MOVED))

        def feed(batch: Tensor) -> tuple[Tensor, Tensor | e2kd.Taught]:
            images, taught = augmentation(self.images[batch], e2kd.Taught(*(field[batch] for field in self.taught)))
            return images, taught if frozen else taught.labels

        return feed


@contextmanager
def frozen_lessons(teacher: nn.Module, scenes: Scenes) -> Iterator[Lessons]:
    """Asks the teacher once about every image and reads it all back; the cache is gone afterwards."""
    dataset = TensorDataset(scenes.images, scenes.labels)
    with TemporaryDirectory() as folder:
        frozen = e2kd.freeze(teacher, dataset, folder, progress=False)
        assert frozen is not None  # one process writes all of it
        samples = e2kd.FrozenDataset(dataset, frozen).__getitems__(list(range(len(dataset))))
        yield Lessons(frozen, *default_collate(samples))
