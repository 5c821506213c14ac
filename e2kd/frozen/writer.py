"""One process's share of writing a cache: which shards are left, writing them, completing the whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from e2kd.errors import warn_user
from e2kd.frozen.encoding import Array
from e2kd.frozen.errors import CacheError
from e2kd.frozen.files import remove_leftovers
from e2kd.frozen.fingerprints import hash_ids
from e2kd.frozen.manifest import (
    complete_plan,
    missing_shards,
    publish_plan,
    rows_of,
    shard_count,
    write_manifest,
)
from e2kd.frozen.records import Record
from e2kd.frozen.settings import fingerprint
from e2kd.frozen.shards import Shard, shard_name, write_shard


class Writer:
    """Writes every `world`-th shard of a cache, beginning with number `rank`.

    Processes need not know each other: a shard is a file that is there whole or not at all, and whoever ends last
    completes the cache. Killed at any moment and begun again, by as many processes as you like, the bytes are the
    same.

    Args:
        path: the cache's folder; made if it is not there.
        plan: everything that decides the rows, as JSON holds it. `["dataset"]["samples"]` and `["shard_rows"]` are
            needed; `["dataset"]["ids_hash"]` is held against the rows if it is there and not None.
        record: the layout of a row.
        rank: of this process, from 0.
        world: how many processes there are.

    Raises:
        CacheError: for a folder with a cache of other settings; it names each that differs.
        ValueError: for a plan or rank that can't be.

    >>> import tempfile
    >>> plan = {"dataset": {"samples": 10}, "shard_rows": 2}
    >>> Writer(tempfile.mkdtemp(), plan, Record(num_classes=3), rank=1, world=2).todo()
    [1, 3]
    """

    def __init__(
        self, path: str | Path, plan: Mapping[str, Any], record: Record, rank: int = 0, world: int = 1
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"Expected a rank from 0 to world - 1, but got rank {rank} of {world}.")
        self.folder, self.record, self.rank, self.world = Path(path), record, rank, world
        self.folder.mkdir(parents=True, exist_ok=True)
        self.plan = publish_plan(self.folder, complete_plan(plan, record))
        self.shards = shard_count(self.plan)
        self._cache = fingerprint(self.plan)
        self._entries: dict[int, dict[str, Any]] = {}  # of shards that were verified

    def rows(self, index: int) -> range:
        """The numbers of the rows of a shard."""
        return rows_of(self.plan, index)

    def mine(self) -> range:
        """The shards that are this process's to write."""
        return range(self.rank, self.shards, self.world)

    def stored(self, row: int) -> dict[str, Array]:
        """What a shard that is there has of a row, [1, ...] for each column; not verified."""
        index, local = divmod(row, int(self.plan["shard_rows"]))
        return {name: column[local : local + 1] for name, column in self._open(index).columns.items()}

    def todo(self) -> list[int]:
        """This process's shards that are not there yet, or damaged: of these it warns."""
        return [index for index in self.mine() if not self._is_whole(index)]

    def done(self) -> list[int]:
        """All shards that are there, of every process."""
        missing = set(missing_shards(self.folder, self.plan))
        return [index for index in range(self.shards) if shard_name(index) not in missing]

    def write(self, index: int, fields: Mapping[str, Array]) -> None:
        """Write a shard.

        Args:
            index: which, in [0, shards - 1].
            fields: what `Record.encode` gave for its rows, joined along the batch.

        Raises:
            IndexError: for a shard that the cache does not have.
            ValueError: for fields that are not those of the shard.
            OSError: when it can't be written; what was written before is kept.
        """
        if not 0 <= index < self.shards:
            raise IndexError(f"Expected a shard in [0, {self.shards - 1}], but got {index}.")
        self._entries.pop(index, None)
        write_shard(self.folder, index, self.rows(index), self.record, self._cache, fields)

    def finish(self) -> bool:
        """Complete the cache if all shards of all processes are there and whole: whether it is complete now.

        Raises:
            CacheError: when the rows are not those of the plan's samples.
        """
        if missing_shards(self.folder, self.plan) or not all(map(self._is_whole, range(self.shards))):
            return False
        self._check_ids()
        write_manifest(self.folder, self.plan, [self._entries[index] for index in range(self.shards)])
        remove_leftovers(self.folder)
        return True

    def _open(self, index: int) -> Shard:
        return Shard(self.folder, index, self.rows(index), self.record, self._cache)

    def _is_whole(self, index: int) -> bool:
        """Whether a shard is there and every row of it verified."""
        if index in self._entries:
            return True
        try:
            shard = self._open(index)
            shard.verify()
        except FileNotFoundError:
            return False
        except CacheError as error:
            warn_user(f"A shard in {self.folder} has to be computed again: {error}", UserWarning)
            return False
        self._entries[index] = shard.entry()
        return True

    def _check_ids(self) -> None:
        wanted = self.plan["dataset"].get("ids_hash")
        if wanted is None:
            return
        ids = np.concatenate([self._open(index).columns["ids"] for index in range(self.shards)])
        if hash_ids(ids) != wanted:
            raise CacheError(
                f"The rows in {self.folder} are not those of the plan's samples, or in another order: their ids do not "
                "have the hash dataset.ids_hash. Freeze into a new folder."
            )
