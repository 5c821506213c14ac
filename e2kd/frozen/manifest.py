"""plan.json, written first: what is to be frozen. manifest.json, written last: the plan and all shards, complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from e2kd.errors import warn_user
from e2kd.frozen.errors import CacheError, listed
from e2kd.frozen.files import publish
from e2kd.frozen.fingerprints import canonical
from e2kd.frozen.records import Record
from e2kd.frozen.sealing import sealed, unsealed
from e2kd.frozen.settings import Plan, check_same, differences
from e2kd.frozen.shards import shard_name
from e2kd.version import __version__

PLAN, MANIFEST = "plan.json", "manifest.json"
ENTRY = {"bytes": int, "file": str, "header": str, "ids": str, "rows": int, "zero_maps": int}


def complete_plan(settings: Mapping[str, Any], record: Record) -> Plan:
    """A plan as it is stored: settings with the rows' layout and the versions at work, as JSON reads it back.

    Args:
        settings: everything that decides the bytes; `["dataset"]["samples"]` and `["shard_rows"]` are needed.
        record: the layout of a row.

    Raises:
        ValueError, TypeError: for settings that are no plan or no JSON.
    """
    versions = {"e2kd": __version__, "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"safetensors": safetensors.__version__, **settings.get("versions", {})}
    plan: Plan = json.loads(canonical({**settings, "record": record.to_json(), "versions": versions}))
    if not _has_counts(plan):
        raise ValueError(
            'Expected a plan with whole numbers >= 1 as ["dataset"]["samples"] and ["shard_rows"], but got '
            f"{plan.get('dataset')!r} and {plan.get('shard_rows')!r}."
        )
    return plan


def _has_counts(plan: Mapping[str, Any]) -> bool:
    dataset = plan.get("dataset")
    counts = [dataset.get("samples") if isinstance(dataset, dict) else None, plan.get("shard_rows")]
    return all(type(count) is int and count >= 1 for count in counts)


def shard_count(plan: Plan) -> int:
    """How many shards the cache has when it is complete."""
    return -(-int(plan["dataset"]["samples"]) // int(plan["shard_rows"]))


def rows_of(plan: Plan, index: int) -> range:
    """The numbers of the rows of a shard.

    >>> rows_of({"dataset": {"samples": 10}, "shard_rows": 4}, 2)
    range(8, 10)
    """
    start = index * int(plan["shard_rows"])
    return range(start, min(start + int(plan["shard_rows"]), int(plan["dataset"]["samples"])))


def missing_shards(folder: Path, plan: Plan) -> list[str]:
    """Names of the shards that are not in the folder."""
    there = {path.name for path in folder.iterdir()}
    return [name for name in map(shard_name, range(shard_count(plan))) if name not in there]


def publish_plan(folder: Path, plan: Plan) -> Plan:
    """Put the plan into the folder, or join the pass that already has it there: the first writer's plan holds.

    Raises:
        CacheError: when the folder has a cache with other settings; it names each.
    """
    lost = (folder / MANIFEST).exists() and not (folder / PLAN).exists()  # the plan alone: the manifest has it too
    publish(folder / PLAN, sealed(read_manifest(folder)["plan"] if lost else plan), first_wins=True)
    there = read_plan(folder)
    begun = any(folder.glob("shard-*")) or (folder / MANIFEST).exists()
    advice = "Use another folder." if begun else f"Nothing of it was computed: delete {PLAN}, or use another folder."
    check_same(there, plan, f"The folder {folder} has a cache", "what is to be frozen now", advice)
    other = differences(there, plan, informative=True)
    if other:
        warn_user(f"The cache in {folder} was begun under other conditions: {listed(other)}.", UserWarning)
    return there


def read_plan(folder: Path) -> Plan:
    """The plan in a folder.

    Raises:
        FileNotFoundError: when there is none.
        CacheError: for one that is damaged or of a later version.
    """
    return _checked(unsealed(folder / PLAN), folder / PLAN)


def _checked(plan: Any, path: Path) -> Plan:
    if not isinstance(plan, dict) or not _has_counts(plan):
        raise CacheError(f"{path} holds no plan of a cache. Was it written by e2kd?")
    Record.from_json(plan.get("record"))
    return plan


def write_manifest(folder: Path, plan: Plan, entries: Sequence[Mapping[str, Any]]) -> None:
    """Complete a cache: `entries` are those of all shards, in order. A manifest that says so already is left alone."""
    counts = {"rows": plan["dataset"]["samples"], "zero_maps": sum(entry["zero_maps"] for entry in entries)}
    data, path = sealed({"plan": plan, "counts": counts, "shards": list(entries)}), folder / MANIFEST
    if not path.exists() or path.read_bytes() != data:
        publish(path, data)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder.

    Raises:
        FileNotFoundError: when there is none.
        CacheError: for one that is damaged or of a later version.
    """
    path = folder / MANIFEST
    manifest = unsealed(path)
    plan, entries = _checked(manifest.get("plan"), path), manifest.get("shards")
    fits = isinstance(entries, list) and len(entries) == shard_count(plan) and all(map(_is_entry, entries))
    if not fits or not isinstance(manifest.get("counts"), dict):
        raise CacheError(
            f"{path} does not describe the {shard_count(plan)} shards of its plan. Was it written by e2kd?"
        )
    return manifest


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == ENTRY
