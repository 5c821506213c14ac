"""A teacher that was asked once: its logits and explanations of a whole data set, on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from e2kd.choosing import KNOWN
from e2kd.classes import Name
from e2kd.errors import shape
from e2kd.explainers import Explainer
from e2kd.frozen.packing import Packing, is_packed, labels_in
from e2kd.frozen.planning import explainer_said
from e2kd.frozen.records import Rows
from e2kd.frozen.remote import brought_here
from e2kd.frozen.store import Store
from e2kd.frozen.verifying import Augmentation, Verification, verification
from e2kd.frozen.views import CanonicalView
from e2kd.taught import Taught

NOT_TAUGHT = (
    "A frozen teacher has no lesson for this batch: expected targets of type e2kd.Taught, but got {came}. Train on "
    "FrozenDataset(dataset, frozen), whose samples are (image, Taught)."
)


class FrozenTeacher:
    """What a teacher says about every image of a data set, computed once by `freeze`.

    Give it to `E2KDLoss` in the teacher's place and train on `FrozenDataset(dataset, frozen)`: the teacher itself is
    never called. Rows are read through memory maps and verified one by one.

    >>> import tempfile, torch
    >>> from e2kd.frozen import freeze
    >>> net = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    ...     torch.nn.Linear(4, 5))
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 5)
    >>> folder = tempfile.mkdtemp()
    >>> _ = freeze(net, data, folder, progress=False)
    >>> frozen = FrozenTeacher.open(folder)
    >>> len(frozen), frozen.num_classes, frozen.explains, frozen.explainer
    (8, 5, True, GradCAM(layer=None))
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.plan: dict[str, Any] = store.plan
        self.view = CanonicalView.from_json(self.plan["view"])

    @classmethod
    def open(cls, path: str | Path, *, download_to: str | Path | None = None) -> FrozenTeacher:
        """Open a finished cache.

        Args:
            path: a folder, or the URL of one that fsspec knows (`s3://`, `gs://`, `hf://`, `https://`): it is first
                brought to local disk and verified.
            download_to: where to; a folder in $E2KD_CACHE, else in e2kd of $XDG_CACHE_HOME or ~/.cache, if None.

        Raises:
            ValueError, FileNotFoundError: for a cache that is unfinished, damaged or of a later version.
        """
        return cls(Store(brought_here(path, download_to)))

    def __len__(self) -> int:
        return len(self.store)

    def __repr__(self) -> str:
        teacher, record = self.plan["teacher"]["name"], self.store.record
        maps = f", maps {shape(record.map_shape)} {record.map_type}" if record.map_shape else ", no maps"
        return f"FrozenTeacher({teacher}, {len(self)} images, {self.num_classes} classes{maps})"

    @property
    def num_classes(self) -> int:
        """K, of the logits [B, K]."""
        return self.store.record.num_classes

    @property
    def explains(self) -> bool:
        """Whether there are maps beside the logits."""
        return self.store.record.map_shape is not None

    @property
    def explainer(self) -> Explainer | None:
        """What made the maps, with the layer left to be found for the student; None where that is not one of e2kd's."""
        explainer = self.plan["explainer"]
        if explainer is None or explainer["name"] not in KNOWN:
            return None
        return explainer_said({**explainer, "layer": None})

    @property
    def complete(self) -> bool:
        """Whether every logit is stored, and not the `top` largest alone."""
        return self.store.record.top is None

    @property
    def choice(self) -> Name:
        """Which class the maps explain: "teacher" (its top class), "labels" or "all"."""
        return cast(Name, self.plan["classes"])

    @property
    def class_names(self) -> list[str] | None:
        """The data set's classes in the order of the logits, where they were known."""
        names = self.plan["dataset"]["class_names"]
        return None if names is None else list(names)

    @property
    def named(self) -> bool:
        """Whether samples are known by names; by their pixels if not."""
        return str(self.plan["dataset"]["ids"]) != "pixels"

    def ids(self) -> np.ndarray:
        """Hashes of the samples' names or pixels, [N] uint64."""
        return self.store.ids()

    def rows(self, indices: Any) -> Rows:
        """Verified rows [B]: logits, maps, classes and ids.

        Raises:
            IndexError: for a row that does not exist.
            ValueError: for a damaged row; says which.
        """
        return self.store.rows(indices)

    @cached_property
    def packing(self) -> Packing:
        """How this cache's lessons travel where labels must be whole numbers."""
        return Packing(self.store.record, self.plan)

    def taught(self, targets: Any, images: Tensor | None = None) -> Taught:
        """The lessons that came with a batch, checked against this cache.

        Args:
            targets: `Taught`, or what `FrozenDataset(..., pack=True)` packed.
            images: what the student was given; a warning says if they are not those that were packed.
        """
        packed = is_packed(targets)
        if packed:
            targets = self.packing.unpack(targets, images)
        if not isinstance(targets, Taught):
            came = f"a tensor {shape(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(NOT_TAUGHT.format(came=came))
        record = self.store.record
        channels = record.map_shape[0] if record.map_shape else 0
        if targets.logits.shape[1:] != (self.num_classes,) or targets.maps.shape[1:2] != (channels,):
            raise ValueError(
                f"The lessons have logits {shape(targets.logits.shape)} and maps {shape(targets.maps.shape)}, but this "
                f"cache has {self.num_classes} classes and maps {shape(record.map_shape or (0, 0, 0))}. They come from "
                "another cache than the criterion's."
            )
        return targets if packed else self.packing.checked(targets)

    def labels(self, targets: Any) -> Any:
        """The labels alone, of targets with lessons or without."""
        return labels_in(targets)

    def verify(
        self,
        teacher: nn.Module,
        dataset: Any,
        *,
        rows: int = 64,
        seed: int = 0,
        augmentations: Mapping[str, Augmentation] | None = None,
        ids: Sequence[str] | None = None,
        explainer: Explainer | None = None,
    ) -> Verification:
        """Compare random rows with the live teacher, as they are and augmented.

        A cached map is the map of the image as it was frozen. How well it stands for the map of an augmented image
        depends on teacher, data and augmentation: the report gives the mean cosine of both, that of another image's
        map, and a verdict for each augmentation.

        Args:
            teacher: the live teacher, on its device.
            dataset: the data set that was frozen.
            rows: how many rows are computed again; augmentations are rated where there are two or more.
            seed: of the choice of rows and of the augmentations.
            augmentations: by name, `JointAugmentation`s that return images in the range they were given, so without
                Normalize; None tries a usual set, an empty mapping none.
            ids: names of the samples, if `freeze` was given names.
            explainer: of the maps, where it is not one of e2kd's own.

        Returns:
            A printable report; `.ok` is whether the rows agree.
        """
        if augmentations is None:
            from e2kd.augment import usual_augmentations

            height, width = self.plan["view"]["image"][-2:]
            augmentations = usual_augmentations((height, width))
        return verification(
            self,
            teacher,
            dataset,
            rows=rows,
            seed=seed,
            augmentations=augmentations,
            ids=ids,
            explainer=explainer,
        )
