"""Opening a cache: whether it is complete, and what is the matter if not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from e2kd.frozen.errors import CacheError, listed
from e2kd.frozen.manifest import MANIFEST, PLAN, missing_shards, read_manifest, read_plan, shard_count
from e2kd.frozen.settings import Plan, differences

REPAIR = "Run freeze again with the same arguments: it computes what is damaged or missing and keeps the rest."
MISSING = (FileNotFoundError, NotADirectoryError)
UNFINISHED = (
    "{folder} holds no complete cache: {what}. Either freeze has not finished: run it again with the same arguments, "
    "and it goes on where it stopped. Or processes wrote into folders of their own: bring these together with "
    "e2kd.frozen.merge(folders, out)."
)


def complete_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete cache.

    Raises:
        CacheError: for a folder without a cache, or with one that is unfinished, damaged, changed or of a later
            version.
    """
    try:
        manifest = read_manifest(folder)
    except MISSING as error:
        raise _unfinished(folder) from error
    _check_plan_file(folder, manifest["plan"])
    missing = missing_shards(folder, manifest["plan"])
    if missing:
        raise CacheError(f"{folder} lacks {listed(missing)}, which belong to the cache. {REPAIR}")
    return manifest


def stamp(folder: Path) -> tuple[int, ...] | None:
    """What changes when the manifest is written again; None without a manifest."""
    try:
        found = os.stat(folder / MANIFEST)
    except MISSING:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _unfinished(folder: Path) -> CacheError:
    """The error for a folder without a manifest."""
    try:
        plan = read_plan(folder)
    except MISSING:
        return CacheError(f"Expected a cache in {folder}, but it has neither {MANIFEST} nor {PLAN}. Was freeze run?")
    missing, count = missing_shards(folder, plan), shard_count(plan)
    what = f"{listed(missing)} ({len(missing)} of {count} shards) are missing" if missing else f"{MANIFEST} is missing"
    return CacheError(UNFINISHED.format(folder=folder, what=what))


def _check_plan_file(folder: Path, plan: Plan) -> None:
    """Raise if plan.json is there and is not what was frozen."""
    try:
        there = read_plan(folder)
    except FileNotFoundError:
        return
    if there != plan:
        found = differences(there, plan) + differences(there, plan, informative=True)
        raise CacheError(
            f"{folder / PLAN} was changed after the cache was complete: {listed(found)}. What was frozen is in "
            f"{MANIFEST}: restore {PLAN}, or delete it."
        )
