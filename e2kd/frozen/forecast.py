"""How much room a cache needs, said before it is computed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import NamedTuple

from e2kd.errors import warn_user
from e2kd.frozen.records import Record


class Forecast(NamedTuple):
    """Bytes of a cache, known from the layout of its rows.

    >>> print(Forecast.of(Record(1000, map_shape=(1, 7, 7)), 1_281_167))
    1,281,167 rows x 2,118 bytes = 2.7 GB
    """

    rows: int
    row_bytes: int

    @classmethod
    def of(cls, record: Record, rows: int) -> Forecast:
        """The forecast for so many rows."""
        return cls(rows, record.row_bytes)

    @property
    def total(self) -> int:
        """Bytes in total; headers and manifest add about a kilobyte for each shard."""
        return self.rows * self.row_bytes

    def __str__(self) -> str:
        return f"{self.rows:,} rows x {self.row_bytes:,} bytes = {readable(self.total)}"


def readable(size: int) -> str:
    """A number of bytes for people.

    >>> readable(999), readable(21_180), readable(26_700_000_000), readable(771_000_000_000)
    ('999 B', '21.2 kB', '26.7 GB', '771 GB')
    """
    if size < 1000:
        return f"{size} B"
    power = min(int(math.log10(size)) // 3, 5)
    value = size / 1000**power
    return f"{value:,.{0 if value >= 100 else 1}f} {'kMGTP'[power - 1]}B"


def check_space(record: Record, rows: int, folder: str | Path, world: int = 1) -> Forecast:
    """The forecast, if the disk has room for what of it is not there yet.

    Several processes may write to one disk or each to its own: then a warning says if it is too small for all, and
    an error if it is too small for one.

    Args:
        record: the layout of a row.
        rows: of the whole cache.
        folder: the cache's; need not be there.
        world: how many processes write it.

    Raises:
        OSError: when it does not fit; says how much is needed and how to need less.
    """
    forecast, folder = Forecast.of(record, rows), Path(folder).absolute()
    there = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    home = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(home).free
    needed = forecast.total - there
    if needed > free:
        said = (
            f"The cache needs {readable(needed)} ({forecast}"
            + (f", of which {readable(there)} are there" if there else "")
            + f"), but {home} has {readable(free)} free. "
        )
        if forecast.total / world - there > free or world == 1:
            raise OSError(
                f'{said}Free some space or use another disk; top=100 stores fewer logits, map_type="int8" smaller maps.'
            )
        warn_user(f"{said}That is enough for one of {world} processes alone, on a disk of its own.", UserWarning)
    return forecast
