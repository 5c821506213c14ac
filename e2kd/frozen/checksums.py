"""A checksum for each row: of its bytes, its place and the cache it belongs to."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2kd.frozen.encoding import Array
from e2kd.frozen.records import Record

CRC = np.dtype("<u4")
START = 8  # where a row's checksummed bytes begin in memory


@lru_cache
def row_layout(record: Record) -> np.dtype[Any]:
    """A row in memory: its checksum, then what the checksum is of: the cache, the row's number, the stored fields."""
    kinds = {"cache": np.dtype("<u8"), "row": np.dtype("<u8"), **record.columns}
    ends = START + np.cumsum([kind.itemsize for kind in kinds.values()])
    offsets = [0, START, *ends[:-1].tolist()]
    size = _end(record) + 7 & ~7  # so that every field of every row is aligned
    formats = [CRC, *kinds.values()]
    return np.dtype({"names": ["crc", *kinds], "formats": formats, "offsets": offsets, "itemsize": size})


def new_rows(record: Record, cache: int, numbers: Array | range) -> Array:
    """Memory for the rows with these numbers of a cache, [B] of `row_layout`; the fields are still to be filled."""
    rows = np.empty(len(numbers), row_layout(record))
    rows["cache"], rows["row"] = cache, numbers
    return rows


def checksums(rows: Array, record: Record) -> NDArray[np.uint32]:
    """CRC-32 of each row, [B]: a flipped bit, another place or another cache changes it."""
    data, step, end = rows.view(np.uint8).data, rows.dtype.itemsize, _end(record)
    return np.array([zlib.crc32(data[i + START : i + end]) for i in range(0, len(data), step)], CRC)


def damaged(rows: Array, record: Record) -> NDArray[np.intp]:
    """Which rows do not have the checksum that is stored with them."""
    return np.flatnonzero(checksums(rows, record) != rows["crc"])


def _end(record: Record) -> int:
    """Where a row's checksummed bytes end in memory."""
    return START + 16 + record.row_bytes - CRC.itemsize
