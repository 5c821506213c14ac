"""A complete cache, read: rows by number, each verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from e2kd.errors import shape
from e2kd.frozen.checksums import damaged, new_rows
from e2kd.frozen.encoding import Array
from e2kd.frozen.errors import CacheError, listed
from e2kd.frozen.fingerprints import digest
from e2kd.frozen.manifest import read_manifest, rows_of, shard_count
from e2kd.frozen.opening import REPAIR, complete_manifest, stamp
from e2kd.frozen.records import Record, Rows
from e2kd.frozen.settings import Plan, fingerprint
from e2kd.frozen.shards import Shard, shard_name


class Store:
    """A complete cache, opened.

    It may be pickled and forked: a process maps a shard into memory, and checks it, when it first reads from it.
    Should the cache be frozen anew while it is open, the next read says so.

    Args:
        path: the folder.

    Raises:
        CacheError: for a folder with no cache, an unfinished or damaged one, or one of a later version.

    >>> import tempfile, torch
    >>> from e2kd.frozen.writer import Writer
    >>> folder, record = tempfile.mkdtemp(), Record(num_classes=3)
    >>> writer = Writer(folder, {"dataset": {"samples": 4}, "shard_rows": 2}, record)
    >>> for index in writer.todo():
    ...     ids = np.array(writer.rows(index), dtype=np.uint64)
    ...     writer.write(index, record.encode(torch.zeros(2, 3), None, torch.tensor([0, 1]), ids))
    >>> writer.finish()
    True
    >>> Store(folder).rows([3, 0, 0]).classes
    tensor([1, 0, 0])
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path).absolute()  # or it would be elsewhere after os.chdir
        self._stamp = stamp(self.folder)
        self.manifest: dict[str, Any] = complete_manifest(self.folder)
        self.plan: Plan = self.manifest["plan"]
        self.record = Record.from_json(self.plan["record"])
        self._cache = fingerprint(self.plan)
        self._wide = [name for name, kind in self.record.columns.items() if kind.shape]  # many numbers in each row
        self._shards: dict[int, Shard] = {}
        self._narrow: dict[str, Array] = {}  # what is small of every row, [N], of the shards that are open
        self._ids: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return int(self.plan["dataset"]["samples"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_narrow": {}, "_ids": None}

    @property
    def zero_maps(self) -> int:
        """How many maps are zero everywhere."""
        return int(self.manifest["counts"]["zero_maps"])

    def rows(self, indices: ArrayLike | Tensor) -> Rows:
        """Rows by their numbers, in the order asked for, each verified.

        Args:
            indices: whole numbers [B] in [0, len - 1]; repeats are welcome.

        Raises:
            IndexError: for a row that does not exist.
            TypeError: for indices that are no whole numbers [B].
            CacheError: for a damaged row; it names the file and the row.
        """
        numbers = self._numbers(indices)
        self._check_current()
        memory = new_rows(self.record, self._cache, numbers)
        shards, local = np.divmod(numbers, self.plan["shard_rows"])
        for index, where in _groups(numbers, shards):
            self._shard(index).fill(memory, where, local[where], self._wide)
        for name, whole in self._narrow.items():
            memory[name] = whole[numbers]
        bad = damaged(memory, self.record)
        if len(bad):
            place = int(bad[0])
            raise CacheError(f"{self._shard(int(shards[place])).damage(int(numbers[place]))} {REPAIR}")
        return self.record.decode({name: memory[name] for name in self.record.columns})

    def ids(self) -> NDArray[np.uint64]:
        """Hashes of all sample ids [N], verified."""
        self._check_current()
        if self._ids is None:
            self._ids = np.concatenate([self._shard_ids(index) for index in range(shard_count(self.plan))])
        return np.array(self._ids)

    def check(self, progress: Callable[[int], None] | None = None) -> None:
        """Verify every byte of every shard.

        Args:
            progress: called after each shard with the number of its rows.

        Raises:
            CacheError: naming the damaged shards.
        """
        self._check_current()
        problems = []
        for index in range(shard_count(self.plan)):
            try:
                self._verify(index)
            except CacheError as error:
                problems.append(str(error).removesuffix(f" {REPAIR}"))
            if progress is not None:
                progress(len(rows_of(self.plan, index)))
        if problems:
            count = f"{len(problems)} of {shard_count(self.plan)} shards in {self.folder} are damaged."
            raise CacheError(f"{count} {' '.join(problems)} {REPAIR}")

    def _verify(self, index: int) -> None:
        shard = self._shard(index)
        shard.verify()
        if shard.entry() != self.manifest["shards"][index]:
            raise CacheError(f"{shard.name} is not the file that the manifest describes.")

    def _shard(self, index: int) -> Shard:
        if index not in self._shards:
            rows, entry = rows_of(self.plan, index), self.manifest["shards"][index]
            try:
                shard = Shard(self.folder, index, rows, self.record, self._cache, entry)
            except FileNotFoundError as error:
                raise CacheError(f"{shard_name(index)} is missing in {self.folder}. {REPAIR}") from error
            except CacheError as error:
                raise CacheError(f"{error} {REPAIR}") from error
            self._keep_narrow(shard)
            self._shards[index] = shard
        return self._shards[index]

    def _keep_narrow(self, shard: Shard) -> None:
        """Copy what is small of a shard's rows, 20 bytes of each: reading a page for each number would cost more."""
        for name, column in shard.columns.items():
            if name not in self._wide:
                whole = self._narrow.setdefault(name, np.empty(len(self), column.dtype))
                whole[shard.rows.start : shard.rows.stop] = column

    def _shard_ids(self, index: int) -> NDArray[np.uint64]:
        shard = self._shard(index)
        if digest(shard.columns["ids"]) != self.manifest["shards"][index]["ids"]:
            raise CacheError(f"{shard.name} has other sample ids than the manifest says: it is damaged. {REPAIR}")
        return np.array(shard.columns["ids"], dtype=np.uint64)

    def _numbers(self, indices: ArrayLike | Tensor) -> NDArray[np.int64]:
        found = indices.detach().cpu().numpy() if isinstance(indices, Tensor) else np.asarray(indices)
        if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
            raise TypeError(f"Expected row numbers, whole numbers [B], but got {found.dtype} {shape(found.shape)}.")
        if found.size and (found.min() < 0 or found.max() >= len(self)):
            outside = found[(found < 0) | (found >= len(self))].tolist()
            raise IndexError(f"Expected row numbers in [0, {len(self) - 1}], but got {listed(outside)}.")
        return found.astype(np.int64)

    def _check_current(self) -> None:
        """Raise if the folder holds another cache by now, or none."""
        now = stamp(self.folder)
        if now == self._stamp:
            return
        fresh = None if now is None else read_manifest(self.folder)
        if fresh is None or fingerprint(fresh["plan"]) != self._cache:
            raise CacheError(
                f"The cache in {self.folder} was removed or frozen anew since it was opened. Open it again, in every "
                "process: data loaders with persistent workers have to be built anew."
            )
        self._stamp, self.manifest = now, fresh  # the same cache, of which a shard was repaired
        self._shards.clear()


def _groups(numbers: NDArray[np.int64], shards: NDArray[np.int64]) -> list[tuple[int, NDArray[np.intp]]]:
    """Each shard that occurs in [B], and where, in the order of its rows, in which a disk reads fastest."""
    order = np.argsort(numbers, kind="stable")
    found = shards[order]
    starts = [0, *(np.flatnonzero(found[1:] != found[:-1]) + 1).tolist()] if len(found) else []
    ends = [*starts[1:], len(found)]
    return [(int(found[i]), order[i:k]) for i, k in zip(starts, ends, strict=bool(starts))]
