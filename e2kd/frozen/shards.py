"""One shard: consecutive rows in one standard safetensors file, written whole or not at all, read through a map."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from e2kd.frozen.checksums import CRC, checksums, damaged, new_rows
from e2kd.frozen.encoding import Array
from e2kd.frozen.errors import CacheError
from e2kd.frozen.files import publish
from e2kd.frozen.fingerprints import digest
from e2kd.frozen.headers import check_origin, header_size, origin, parsed, tensors
from e2kd.frozen.records import Record

CHUNK = 1024  # rows that are verified at once


def shard_name(index: int) -> str:
    """The file name of a shard; names are computed, never read from a file.

    >>> shard_name(123)
    'shard-000123.safetensors'
    """
    return f"shard-{index:06d}.safetensors"


def write_shard(folder: Path, index: int, rows: range, record: Record, cache: int, fields: Mapping[str, Array]) -> None:
    """Write the rows of a shard. The file's bytes are a function of the arguments.

    Raises:
        ValueError: for fields that are not those of the record, or not as many as rows.
        OSError: when it can't be written.
    """
    _check_fields(fields, record, len(rows))
    memory = new_rows(record, cache, rows)
    for name in record.columns:
        memory[name] = fields[name]
    columns = {name: np.ascontiguousarray(fields[name]) for name in record.columns}
    columns["crc"] = checksums(memory, record)
    publish(folder / shard_name(index), save(columns, metadata=origin(cache, index)))


def _check_fields(fields: Mapping[str, Array], record: Record, count: int) -> None:
    wanted = {name: (kind.base, (count, *kind.shape)) for name, kind in record.columns.items()}
    found = {name: (array.dtype, array.shape) for name, array in fields.items()}
    if wanted != found:
        raise ValueError(
            f"Expected the fields of {count} encoded rows, {_described(wanted)}, but got {_described(found)}. "
            "Join what Record.encode gives with np.concatenate."
        )


def _described(fields: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {kind} {list(extent)}" for name, (kind, extent) in sorted(fields.items()))


class Shard:
    """A shard opened for reading: its size, header and origin are checked, its rows are not yet.

    Args:
        folder: the cache's.
        index: which shard.
        rows: the numbers of its rows in the cache.
        record: the layout of a row.
        cache: the fingerprint of the plan.
        entry: what the manifest says of it, where there is one.

    Raises:
        FileNotFoundError: when there is none.
        CacheError: for a file that is truncated, damaged, in another's place or of another cache.
    """

    def __init__(
        self, folder: Path, index: int, rows: range, record: Record, cache: int, entry: Mapping[str, Any] | None = None
    ) -> None:
        self.name, self.rows, self.record, self.cache = shard_name(index), rows, record, cache
        self.data = _mapped(folder / self.name)
        try:
            header = parsed(self.data)
            check_origin(header, cache, index)
            self.columns = tensors(self.data, header, {**record.columns, "crc": CRC}, len(rows))
            if entry is not None and self._header() != entry["header"]:
                raise CacheError("has another header than the manifest says: it is damaged or was replaced")
        except CacheError as error:
            raise CacheError(f"{self.name} {error}.") from error

    def fill(self, rows: Array, where: Any, local: Array, names: Sequence[str] | None = None) -> None:
        """Put this shard's rows at `local` to the places `where` in memory, not verified; some columns, or all."""
        for name, column in self.columns.items():
            if names is None or name in names:
                rows[name][where] = column.take(local, 0, mode="clip")  # twice as fast as column[local]

    def verify(self) -> None:
        """Raise a CacheError that names the first damaged row, if there is one."""
        for start in range(0, len(self.rows), CHUNK):
            numbers = self.rows[start : start + CHUNK]
            rows = new_rows(self.record, self.cache, numbers)
            self.fill(rows, slice(None), np.arange(start, start + len(numbers)))
            bad = damaged(rows, self.record)
            if len(bad):
                raise self.damage(self.rows[start + int(bad[0])])

    def damage(self, row: int) -> CacheError:
        """The error for a row whose bytes don't have its checksum."""
        return CacheError(
            f"{self.name} is damaged at row {row} (row {row - self.rows.start} of the file): the bytes are not those "
            "that were written there."
        )

    def entry(self) -> dict[str, Any]:
        """What a manifest says of the shard."""
        zero = int((self.columns["scales"] == 0).sum()) if self.record.map_shape else 0
        return {
            "bytes": len(self.data),
            "file": digest(self.data),
            "header": self._header(),
            "ids": digest(self.columns["ids"]),
            "rows": len(self.rows),
            "zero_maps": zero,
        }

    def _header(self) -> str:
        return digest(self.data[: header_size(self.data)])


def _mapped(path: Path) -> Array:
    """A file's bytes, mapped into memory: no more than it has, for reading past its end would kill the process."""
    size = os.stat(path).st_size
    if size == 0:
        raise CacheError(f"{path.name} is empty: it was cut short.")
    # Unlike np.memmap it holds no file handle (there may be more shards than handles), so it outlives a fork as well.
    mapped: Array = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
    return mapped
