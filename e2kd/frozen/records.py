"""The layout of one row of a cache: what is kept of an image, in which types, and how it is read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2kd.errors import shape
from e2kd.frozen.encoding import MAP_TYPES, Array, finite, read_logits, read_maps, stored_logits, stored_maps
from e2kd.frozen.errors import CacheError, listed
from e2kd.frozen.looks import LOOK, Looks

ADDED = {"map_count", "looks"}  # later on: caches of earlier versions don't say them, nor do those that have the usual


class Rows(NamedTuple):
    """Rows of a cache, read back.

    Attributes:
        logits: [B, K] float32.
        maps: [B, C, h, w] float32; [B, 0, 0, 0] without explanations.
        classes: the explained class, [B] int64.
        ids: hashes of the sample ids, uint64 [B] of NumPy.
        looks: what the images look like, float16 [B, 16] of NumPy; [B, 0] where that is not kept.
    """

    logits: Tensor
    maps: Tensor
    classes: Tensor
    ids: NDArray[np.uint64]
    looks: Looks


@dataclass(frozen=True)
class Record:
    """What is stored of one image.

    Logits are kept in float16 (11 significant bits): all of them, or the `top` largest and the logsumexp of the
    others, whose probability is shared out evenly when they are read. Every map has a scale of its own, so that
    maps of any magnitude keep their precision: float16 relative to a power of two near the map's peak, 8 bits
    relative to the peak.

    Attributes:
        num_classes: K >= 1.
        top: how many logits, in [1, K - 1]; None keeps all.
        map_shape: (C, h, w); None keeps no explanations.
        map_count: n, how many maps that is, of C / n channels; each has its own scale.
        map_type: "float16", "int8" (signed maps) or "uint8" (maps >= 0).
        looks: whether what an image looks like is kept, where its name does not say that.

    Raises:
        ValueError: for a layout that does not exist.

    >>> record = Record(num_classes=1000, map_shape=(1, 7, 7))
    >>> record.row_bytes
    2118
    >>> maps = torch.arange(98.0).reshape(2, 1, 7, 7)
    >>> fields = record.encode(torch.zeros(2, 1000), maps, torch.tensor([3, 4]), np.array([1, 2], dtype=np.uint64))
    >>> torch.equal(record.decode(fields).maps, maps)
    True
    """

    num_classes: int
    top: int | None = None
    map_shape: tuple[int, int, int] | None = None
    map_type: str = "float16"
    map_count: int = 1
    looks: bool = False

    def __post_init__(self) -> None:
        if not _positive(self.num_classes):
            raise ValueError(f"Expected num_classes >= 1, but got {self.num_classes!r}.")
        if self.top is not None and not (_positive(self.top) and self.top < self.num_classes):
            raise ValueError(
                f"Expected top in [1, {self.num_classes - 1}] for {self.num_classes} classes, but got {self.top!r}. "
                "None keeps all logits."
            )
        if self.map_shape is not None and not (len(self.map_shape) == 3 and all(map(_positive, self.map_shape))):
            raise ValueError(f"Expected map_shape (C, h, w), all >= 1, but got {self.map_shape!r}.")
        channels = self.map_shape[0] if self.map_shape else 1
        if not _positive(self.map_count) or channels % self.map_count:
            raise ValueError(f"Expected map_count >= 1 that divides {channels} channels, but got {self.map_count!r}.")
        if self.map_type not in MAP_TYPES:
            raise ValueError(f"Expected map_type to be one of {', '.join(MAP_TYPES)}, but got {self.map_type!r}.")

    @cached_property
    def columns(self) -> dict[str, np.dtype[Any]]:
        """The type of each field of a row, in the order of the row's bytes: wide types first, so all are aligned."""
        types: dict[str, Any] = {"ids": "<u8", "classes": "<i4"}
        if self.top is None:
            types["logits"] = ("<f2", (self.num_classes,))
        else:
            index = "<u2" if self.num_classes <= 2**16 else "<i4"
            types |= {"rest": "<f4", "top_logits": ("<f2", (self.top,)), "top_classes": (index, (self.top,))}
        if self.map_shape is not None:
            scales = "<f4" if self.map_count == 1 else ("<f4", (self.map_count,))
            types |= {"scales": scales, "maps": (MAP_TYPES[self.map_type][0], self.map_shape)}
        if self.looks:
            types["looks"] = ("<f2", (LOOK,))
        found = {name: np.dtype(kind) for name, kind in types.items()}
        return dict(sorted(found.items(), key=lambda column: -column[1].base.itemsize))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk, checksum included."""
        return sum(column.itemsize for column in self.columns.values()) + 4

    def to_json(self) -> dict[str, Any]:
        """The record as JSON holds it.

        >>> Record(10, map_shape=(1, 7, 7)).to_json()
        {'num_classes': 10, 'top': None, 'map_shape': [1, 7, 7], 'map_type': 'float16'}
        """
        found = asdict(self) | {"map_shape": None if self.map_shape is None else list(self.map_shape)}
        usual = {field.name: field.default for field in fields(self)}
        return {key: value for key, value in found.items() if key not in ADDED or value != usual[key]}

    @classmethod
    def from_json(cls, found: Any) -> Record:
        """The record that `to_json` described.

        Raises:
            CacheError: for anything else.

        >>> Record.from_json(Record(10, top=3).to_json()) == Record(10, top=3)
        True
        """
        names = {field.name for field in fields(cls)}
        try:
            if not isinstance(found, dict) or set(found) | ADDED != names:
                raise TypeError(f"Expected the keys {', '.join(sorted(names))}.")
            return cls(**found | {"map_shape": found["map_shape"] and tuple(found["map_shape"])})
        except (TypeError, ValueError) as error:
            raise CacheError(f"The layout of the rows, {found!r}, is none that this e2kd knows: {error}") from error

    def encode(
        self,
        logits: Tensor,
        maps: Tensor | None,
        classes: Tensor,
        ids: NDArray[np.uint64],
        looks: Looks | None = None,
    ) -> dict[str, Array]:
        """Rows as they are stored.

        Args:
            logits: [B, K].
            maps: [B, C, h, w] of `map_shape`; None where the record has none.
            classes: the explained class, [B], in [0, K - 1].
            ids: hashes of the sample ids, uint64 [B].
            looks: of the images, [B, 16]; None where the record has none.

        Returns:
            One array [B, ...] for each of `columns`.

        Raises:
            ValueError: for other shapes, NaN or infinity, logits beyond float16, negative maps as uint8; it names
                the first bad row.
        """
        self._check(logits, maps, classes, ids, looks)
        found: dict[str, Array] = {"ids": ids, "classes": classes.detach().cpu().numpy()}
        found |= stored_logits(finite(logits, "logits"), self.top)
        if maps is not None:
            found |= stored_maps(finite(maps, "maps"), self.map_type, self.map_count)
        if looks is not None:
            found["looks"] = looks
        return {name: np.ascontiguousarray(found[name], dtype=kind.base) for name, kind in self.columns.items()}

    def decode(self, stored: Mapping[str, Array]) -> Rows:
        """What `encode` stored, within the precision of the types."""
        logits = read_logits(stored, self.num_classes, self.top)
        none = torch.zeros(len(logits), 0, 0, 0)
        maps = none if self.map_shape is None else read_maps(stored, self.map_type)
        classes = torch.from_numpy(stored["classes"]).long()
        looks = stored["looks"] if self.looks else np.empty((len(logits), 0), np.float16)
        return Rows(logits, maps, classes, np.array(stored["ids"], dtype=np.uint64), np.array(looks, np.float16))

    def _check(self, logits: Tensor, maps: Tensor | None, classes: Tensor, ids: Array, looks: Looks | None) -> None:
        batch = len(logits)
        _expect("logits", logits, (batch, self.num_classes))
        _expect("classes", classes, (batch,))
        _expect("ids", ids, (batch,))
        if (maps is None) != (self.map_shape is None):
            raise ValueError(
                f"Expected maps of map_shape {self.map_shape}, but got {maps if maps is None else shape(maps.shape)}."
            )
        if maps is not None and self.map_shape is not None:
            _expect("maps", maps, (batch, *self.map_shape))
        if (looks is None) == self.looks:
            raise ValueError(f"Expected {'looks of the images' if self.looks else 'no looks'} for a record {self}.")
        if looks is not None:
            _expect("looks", looks, (batch, LOOK))
        if ids.dtype != np.uint64:
            raise ValueError(f"Expected ids as uint64, the numbers of `id_hash`, but got {ids.dtype}.")
        outside = classes[(classes < 0) | (classes >= self.num_classes)].tolist()
        if outside or classes.is_floating_point():
            found = listed(outside) if outside else classes.dtype
            raise ValueError(f"Expected whole numbers in [0, {self.num_classes - 1}] as classes, but got {found}.")


def _positive(value: Any) -> bool:
    return type(value) is int and value >= 1


def _expect(name: str, value: Any, wanted: tuple[int, ...]) -> None:
    if tuple(value.shape) != wanted:
        raise ValueError(f"Expected {name} {shape(wanted)}, but got {shape(value.shape)}.")
