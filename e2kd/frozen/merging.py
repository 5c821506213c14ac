"""One cache from the folders that processes on different machines wrote."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from e2kd.errors import warn_user
from e2kd.frozen.errors import CacheError, listed
from e2kd.frozen.files import link_or_copy
from e2kd.frozen.fingerprints import digest
from e2kd.frozen.manifest import (
    missing_shards,
    read_plan,
    rows_of,
    shard_count,
)
from e2kd.frozen.records import Record
from e2kd.frozen.settings import Plan, check_same, differences, fingerprint
from e2kd.frozen.shards import Shard, shard_name
from e2kd.frozen.store import Store
from e2kd.frozen.writer import Writer


def merge(folders: Iterable[str | Path], out: str | Path) -> Store:
    """Bring the shards of several folders together and complete the cache.

    Every shard is verified, then linked, or copied where the file system can't link. The folders stay as they are.

    Args:
        folders: what the processes wrote, all with the same settings.
        out: the cache's folder; may be one of them.

    Raises:
        CacheError: for folders with different settings, damaged shards, a shard that two folders have with different
            rows, or shards that none has; it names them.

    >>> import tempfile, numpy, torch
    >>> plan, record = {"dataset": {"samples": 2}, "shard_rows": 1}, Record(num_classes=3)
    >>> folders = [tempfile.mkdtemp() for _ in range(2)]
    >>> for rank, folder in enumerate(folders):
    ...     writer = Writer(folder, plan, record, rank=rank, world=2)
    ...     ids = numpy.array([rank], dtype=numpy.uint64)
    ...     writer.write(rank, record.encode(torch.zeros(1, 3), None, torch.tensor([rank]), ids))
    >>> merge(folders, tempfile.mkdtemp()).rows([0, 1]).classes
    tensor([0, 1])
    """
    sources = [Path(folder) for folder in folders]
    if not sources:
        raise ValueError("Expected the folders of at least one process, but got none.")
    plan = _common_plan(sources)
    writer = Writer(out, plan, Record.from_json(plan["record"]))
    for source in dict.fromkeys([Path(out), *sources]):  # what lies there already is verified as well
        _take(source, Path(out), plan)
    if not writer.finish():
        missing = missing_shards(Path(out), plan)
        raise CacheError(
            f"No folder has {listed(missing)} ({len(missing)} of {shard_count(plan)} shards). Add the folders that do, "
            "or let freeze write them: run it again with the same arguments."
        )
    return Store(out)


def _common_plan(sources: list[Path]) -> Plan:
    plans = [_plan(source) for source in sources]
    for source, plan in zip(sources[1:], plans[1:], strict=True):
        check_same(plans[0], plan, f"{sources[0]} has a cache", f"the one in {source}")
        other = differences(plans[0], plan, informative=True)
        if other:
            warn_user(
                f"{sources[0]} and {source} were written under different conditions: {listed(other)}.", UserWarning
            )
    return plans[0]


def _plan(source: Path) -> Plan:
    try:
        return read_plan(source)
    except FileNotFoundError as error:
        raise CacheError(f"Expected a folder that freeze wrote, but {source} has no plan.json.") from error


def _take(source: Path, out: Path, plan: Plan) -> None:
    """Bring the shards of one folder to another."""
    record, cache = Record.from_json(plan["record"]), fingerprint(plan)
    for index in range(shard_count(plan)):
        here, there = source / shard_name(index), out / shard_name(index)
        if not here.exists():
            continue
        try:
            shard = Shard(source, index, rows_of(plan, index), record, cache)
            shard.verify()
        except CacheError as error:
            raise CacheError(f"In {source}: {error} Freeze it again, or delete it if another folder has it.") from error
        if not there.exists():
            link_or_copy(here, there)
        elif not there.samefile(here) and digest(there.read_bytes()) != digest(shard.data):
            raise CacheError(
                f"{here} has other rows than {there}: the shard was computed twice, with different results. Delete the "
                "one that you trust less, and merge again."
            )
