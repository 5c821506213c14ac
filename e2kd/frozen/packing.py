"""Lessons as a row of whole numbers, for loaders that carry nothing else in the labels' place (timm's)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from e2kd.errors import shape, warn_user
from e2kd.frozen.fingerprints import hash_json
from e2kd.frozen.records import Record
from e2kd.taught import Taught, labels_of

MAGIC = 0x65326B64_7061636B  # in the first column; as a class number it is out of any range
MAGIC_AT, CACHE_AT, LABEL_AT, CLASS_AT, HEAD = range(5)
GRID = 4  # witnesses per axis
WATCHED = 4  # batches whose values are looked at, where looking waits for the device
ALIKE = 0.999  # correlation from which images are those that left the loader: rounding keeps above, erasing does not

UNPACKED = (
    "A frozen teacher has no lesson for this batch: expected targets of type e2kd.Taught, or packed ones, but got a "
    "tensor {came}. Train on FrozenDataset(dataset, frozen)."
)
FOREIGN = (
    "The lessons in these targets {came} are of another cache than the criterion's. Give E2KDLoss and FrozenDataset "
    "one and the same FrozenTeacher."
)
NO_LABEL = "pack=True takes class numbers as labels, but the data set gave {came}. Without it labels may be anything."
CHANGED = (
    "The images were changed between data loader and student, and the teacher's maps did not follow. timm's "
    "PrefetchLoader erases on the device: give create_loader re_prob=0, and put torchvision's RandomErasing, which is "
    "followed, into the transform. If you change colours alone on the device, ignore this."
)


class Packing:
    """How lessons of one cache are packed.

    A row is [magic, cache, label, class, bits of float32 ...]: a few of the image's pixels, logits, map and valid.
    Looked at as labels, by Mixup for example, it is out of range and raises.

    Args:
        record: the layout of the cache's rows.
        plan: what was frozen; tells caches apart.

    >>> packing = Packing(Record(num_classes=5, map_shape=(1, 2, 2)), {})
    >>> one = Taught(3, torch.arange(5.), torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.tensor(2))
    >>> packed = packing.pack(one, torch.rand(3, 8, 8))
    >>> packed.dtype, packed.shape
    (torch.int64, torch.Size([19]))
    >>> packing.unpack(packed[None]).logits
    tensor([[0., 1., 2., 3., 4.]])
    """

    def __init__(self, record: Record, plan: Any) -> None:
        self.cache = int(hash_json(plan)[:15], 16)
        self.map_shape = record.map_shape or (0, 0, 0)
        channels, height, width = self.map_shape
        self.sizes = GRID * GRID, record.num_classes, channels * height * width, height * width
        self.watched = 0

    def pack(self, taught: Taught, image: Any) -> Tensor:
        """One sample's lessons, with the image [C, H, W] they come with, as int64 [L]."""
        head = torch.tensor([MAGIC, self.cache, _number(taught.labels), int(taught.classes)])
        witnesses = _witnesses(torch.as_tensor(image)[None])[0]
        values = torch.cat([witnesses, *(part.flatten() for part in (taught.logits, taught.maps, taught.valid))])
        bits = torch.cat([values, values.new_zeros(len(values) % 2)]).view(torch.int64)
        return torch.cat([head, bits])

    def unpack(self, targets: Tensor, images: Tensor | None = None) -> Taught:
        """The lessons in targets int64 [B, L], on their device.

        Whether they are of this cache is looked at in every batch on the CPU and in the first ones elsewhere; what
        is not, later on, is NaN.

        Args:
            targets: for which `is_packed`.
            images: what the student was given, [B, C, H, W]; a warning says if they were changed on the way.

        Raises:
            ValueError: for lessons of another cache, and for other whole numbers.
        """
        fits, watches = targets.shape[1] == HEAD + (sum(self.sizes) + 1) // 2, self.watched < WATCHED
        ours = (targets[:, MAGIC_AT] == MAGIC) & (targets[:, CACHE_AT] == self.cache)
        if not fits or ((watches or targets.device.type == "cpu") and not ours.all()):
            told = FOREIGN if (targets[:, MAGIC_AT] == MAGIC).all() else UNPACKED
            raise ValueError(told.format(came=shape(targets.shape)))
        values = targets[:, HEAD:].contiguous().view(torch.float32)[:, : sum(self.sizes)]
        witnesses, logits, maps, valid = values.split(self.sizes, 1)
        if watches:
            self.watched += 1
            if images is not None and not _alike(witnesses, _witnesses(images)):
                warn_user(CHANGED, UserWarning)
        _, height, width = self.map_shape
        return Taught(
            targets[:, LABEL_AT],
            torch.where(ours[:, None], logits, torch.nan),
            maps.reshape(len(targets), *self.map_shape),
            valid.reshape(len(targets), 1, height, width),
            targets[:, CLASS_AT],
            targets[:, CACHE_AT],
        )

    def checked(self, taught: Taught) -> Taught:
        """Lessons that were not packed, if they are of this cache; looked at as in `unpack`.

        Raises:
            ValueError: for lessons of another cache.
        """
        ours = (taught.cache == self.cache) | (taught.cache == 0)
        if taught.cache.device.type == "cpu" or self.watched < WATCHED:
            self.watched += 1
            if not ours.all():
                raise ValueError(FOREIGN.format(came=shape(taught.logits.shape)))
            return taught
        return taught._replace(logits=torch.where(ours[:, None], taught.logits, torch.nan))


def is_packed(targets: Any) -> bool:
    """Whether targets have the form of packed lessons; whether they are any, `Packing.unpack` sees.

    >>> is_packed(torch.tensor([3, 1]))
    False
    """
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 2:
        return False
    return targets.shape[1] > HEAD


def labels_in(targets: Any) -> Any:
    """The labels alone, of targets with lessons, packed or not, or without.

    >>> labels_in(torch.tensor([[MAGIC, 0, 3, 1, 0, 1]]))
    tensor([3])
    """
    if is_packed(targets) and (targets[:, MAGIC_AT] == MAGIC).all():
        return targets[:, LABEL_AT]
    return labels_of(targets)


def _number(label: Any) -> int:
    try:
        number = int(label)
    except (TypeError, ValueError) as error:
        came = f"a tensor {shape(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
        raise TypeError(NO_LABEL.format(came=came)) from error
    if number != label:
        raise TypeError(NO_LABEL.format(came=repr(label)))
    return number


def _witnesses(images: Tensor) -> Tensor:
    """A few pixels of the first channel, [B, GRID * GRID] float32."""
    rows, columns = (((torch.arange(GRID) + 0.5) * n / GRID).long() for n in images.shape[-2:])
    return images[:, 0, rows[:, None], columns].detach().flatten(1).float()


def _alike(before: Tensor, after: Tensor) -> bool:
    """Whether pixels are the same up to a scale and an offset, as after a normalisation."""
    pixels = torch.stack([before.flatten(), after.flatten()])
    return bool(torch.corrcoef(pixels)[0, 1].nan_to_num(1.0) > ALIKE)
