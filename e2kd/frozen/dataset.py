"""A data set whose labels carry what the frozen teacher says about each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from e2kd.frozen.exact import exact
from e2kd.frozen.geometry import composed, follow, framed
from e2kd.frozen.looks import COMPARED
from e2kd.frozen.matching import check_labels, check_looks, check_unchanged, match_rows
from e2kd.frozen.recording import Recorder
from e2kd.frozen.samples import image_and_label, pixel_hash, transforms_of
from e2kd.frozen.sources import Sample, Source, check_numbered, spread, unsteady
from e2kd.frozen.teacher import FrozenTeacher
from e2kd.taught import Taught, all_known

UNSTEADY = (
    "The data set gives another image each time it is asked for sample {row}, so it has a random transform of its own, "
    "which the maps could not follow. Take that off the data set, and give it to FrozenDataset: transform=."
)
SET_LATER = (
    "The transform of the data set is another one than when FrozenDataset was built: it was set since, perhaps by way "
    "of another part of one random_split, and the maps would not fit the images. Give each part a data set of its own, "
    "and FrozenDataset what is to augment its images, transform=."
)
NOT_RECORDED = (
    "pack=True needs the whole transform here, where it is followed: {came}. Give FrozenDataset transform=, up to a "
    "tensor or an array, or let timm's create_loader set it (without aug_splits and input_size_choices, which change "
    "images elsewhere)."
)


class FrozenDataset(Dataset[tuple[Any, Any]]):
    """(image, `Taught`) for every sample: read, verified against its crc and matched by the sample's name.

    Without a transform, images come as they were frozen, deterministic and of one size: [C, H, W], uint8 unless the
    data set has floating-point tensors. What is random, `JointAugmentation` then does to the whole batch, image and
    map alike. With a transform of torchvision or timm the data set's own images are augmented one by one, in
    the loader's workers, just as the transform alone would, and the maps follow them: cells from outside of the
    canonical view, or from what was filled or erased, are not valid. If samples have names, images are compared with
    what was frozen: a few of them on construction with a transform, each one when it is read without.

    Args:
        dataset: the data set that was frozen, or a `Subset` of it, without random transforms.
        frozen: the teacher.
        ids: names of the samples, if `freeze` was given names.
        match: "position" wants the data set as it was frozen (a `Subset` finds its rows through its
            indices, repeats too); "id" finds rows by the samples' names, so that a shorter or re-ordered list works.
        transform: what would be the data set's own transform; see `e2kd.frozen.recording.Recorder`. May be set later,
            as timm's `create_loader` does.
        pack: give the lessons as int64 [L], for loaders that carry whole numbers alone in the labels' place, as
            timm's do. `E2KDLoss` unpacks them.

    Raises:
        ValueError: for a data set with other samples, another order, other classes, other pictures, and for a transform
            that can't be followed; says which.
        TypeError: for a stream.

    >>> import tempfile, torch
    >>> from e2kd.frozen import freeze
    >>> net = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    ...     torch.nn.Linear(4, 5))
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 5)
    >>> frozen = freeze(net, data, tempfile.mkdtemp(), progress=False)
    >>> image, taught = FrozenDataset(data, frozen)[3]
    >>> image.shape, taught.logits.shape, taught.maps.shape
    (torch.Size([3, 16, 16]), torch.Size([5]), torch.Size([1, 14, 14]))
    """

    def __init__(
        self,
        dataset: Any,
        frozen: FrozenTeacher,
        *,
        ids: Sequence[str] | None = None,
        match: str = "position",
        transform: Any = None,
        pack: bool = False,
    ) -> None:
        check_numbered(dataset)
        self.dataset, self.frozen, self.pack = dataset, frozen, pack
        self._exact, self._transforms = exact(dataset), transforms_of(dataset)
        self.matched = match_rows(dataset, frozen, ids, match)
        if len(dataset):
            self._check_images()
        self.transform = transform

    def _check_images(self) -> None:
        """Raise a ValueError for a data set with a transform of its own."""
        source = Source(self.dataset, self.frozen.view, self.matched.names)
        if (row := unsteady(source)) is not None:
            raise ValueError(UNSTEADY.format(row=row))
        frozen_first = np.flatnonzero(self.matched.rows == 0)
        if len(frozen_first) and self.matched.names is not None:  # pixels that are the name are compared at every read
            place = int(frozen_first[0])
            check_unchanged(self.frozen.view(image_and_label(self._exact[place])[0]), place, self.frozen)
        if self.frozen.store.record.looks:
            self._check_looks([found for k in spread(len(self), COMPARED) if isinstance(found := source[k], Sample)])

    def _check_looks(self, samples: list[Sample]) -> None:
        """Raise a ValueError for samples that don't look as they did; where there is a transform, no read shows it."""
        places = [sample.row for sample in samples]
        stored = self.frozen.rows(self.matched.rows[places]).looks
        check_looks([sample.image for sample in samples], stored, places, self.dataset)

    @property
    def transform(self) -> Any:
        """What images go through; None gives canonical images."""
        return self._transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self._recorder = None if transform is None else Recorder(transform)
        self._transform = transform

    def __len__(self) -> int:
        return len(self.matched.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, Any]]:
        """Several samples with one read of the cache; what `DataLoader` calls."""
        if transforms_of(self.dataset) != self._transforms:
            raise ValueError(SET_LATER)
        places = [self._place(int(i)) for i in indices]
        pairs = [image_and_label(self._exact[i]) for i in places]
        originals, labels = [image for image, _ in pairs], [label for _, label in pairs]
        names = self.matched.names
        views = [] if names is not None and self._recorder else [self.frozen.view(image) for image in originals]
        lessons = self.frozen.rows(self.matched.rows[places])
        found = np.array([pixel_hash(i) for i in views], np.uint64) if names is None else names[places]
        self.matched.check(found, lessons.ids, places)
        if views:
            check_looks(views, lessons.looks, places, self.dataset)
        if self.frozen.choice == "labels" and self.frozen.explains:
            check_labels(labels, lessons.classes, places)
        images, maps, valid = self._augmented(originals, views, lessons.maps)
        cache = torch.full_like(lessons.classes, self.frozen.packing.cache)
        taught = map(Taught, labels, lessons.logits, maps, valid, lessons.classes, cache)
        return [
            (image, self._packed(one, image) if self.pack else one) for image, one in zip(images, taught, strict=True)
        ]

    def _place(self, index: int) -> int:
        """An index as lists have it, from 0."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected a sample of a data set of {len(self)}, but got the index {index}.")
        return index % len(self)

    def _augmented(self, originals: list[Any], views: list[Tensor], maps: Tensor) -> tuple[list[Any], Tensor, Tensor]:
        """The images, their maps and what of them is known."""
        if self._recorder is None:
            return views, maps, all_known(maps)
        frames = [framed(self.frozen.view, image) for image in originals]
        images, steps = zip(*map(self._recorder, originals), strict=True)
        if not maps.numel():
            return list(images), maps, all_known(maps)
        return list(images), *follow(maps, list(map(composed, steps, frames)))

    def _packed(self, taught: Taught, image: Any) -> Tensor:
        if self._recorder is None or not isinstance(image, (Tensor, np.ndarray)):
            came = "there is none" if self._recorder is None else f"this one gives {type(image).__name__}"
            raise ValueError(NOT_RECORDED.format(came=came))
        return self.frozen.packing.pack(taught, image)
