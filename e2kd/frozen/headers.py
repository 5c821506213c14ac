"""The header of a shard's safetensors file: whose shard it is, and where its tensors lie. Nothing in it is trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from e2kd.frozen.encoding import Array
from e2kd.frozen.errors import CacheError
from e2kd.frozen.fingerprints import canonical

TAGS = {"<f2": "F16", "<f4": "F32", "<i4": "I32", "<u2": "U16", "<u4": "U32", "<u8": "U64", "|i1": "I8", "|u1": "U8"}
LONGEST = 2**20


def origin(cache: int, index: int) -> dict[str, str]:
    """What a file says of itself: the cache's fingerprint and which of its shards it is."""
    # One entry alone: safetensors does not keep the order of several, and the bytes shall be the same every time.
    return {"e2kd": canonical({"cache": f"{cache:016x}", "shard": index})}


def header_size(data: Array) -> int:
    """Where the tensors start in a file's bytes.

    Raises:
        CacheError: when it has no whole header.
    """
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(len(data) - 8, LONGEST):
        raise CacheError("has no whole header: it was cut short or is damaged")
    return 8 + length


def parsed(data: Array) -> dict[str, Any]:
    """The header of a file's bytes.

    Raises:
        CacheError: when it is no JSON object.
    """
    try:
        header = json.loads(data[8 : header_size(data)].tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise CacheError(f"has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise CacheError("has a damaged header: it is no JSON object")
    return header


def check_origin(header: Mapping[str, Any], cache: int, index: int) -> None:
    """Raise a CacheError unless the file says that it is this shard of this cache."""
    wanted = json.loads(origin(cache, index)["e2kd"])
    try:
        found = json.loads(header["__metadata__"]["e2kd"])
        other, place = found["cache"], found["shard"]
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError("does not say which cache it belongs to: it is damaged or no file of e2kd") from error
    if other != wanted["cache"]:
        raise CacheError(f"belongs to another cache, {other}, and not to this one, {wanted['cache']}")
    if place != index:
        raise CacheError(f"is shard {place} under another name: files were renamed")


def tensors(data: Array, header: Mapping[str, Any], kinds: Mapping[str, np.dtype[Any]], rows: int) -> dict[str, Array]:
    """Views [rows, ...] of a file's bytes, if its tensors are those wanted and fill it to the last byte.

    Raises:
        CacheError: for other tensors, or a file that is longer or shorter.
    """
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    wanted = {name: [TAGS[kind.base.str], [rows, *kind.shape]] for name, kind in kinds.items()}
    found = {name: _kind(entry) for name, entry in entries.items()}
    if found != wanted:
        raise CacheError(f"has the tensors {canonical(found)} where the plan says {canonical(wanted)}")
    start, spans = header_size(data), {name: _span(name, entry) for name, entry in entries.items()}
    place = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != place or end - begin != rows * kinds[name].itemsize:
            raise CacheError(f"has a damaged header: {name} can't lie in bytes {begin} to {end}")
        place = end
    if start + place != len(data):
        raise CacheError(f"has {len(data):,} bytes but its header says {start + place:,}: it was cut short or extended")
    return {
        name: data[start + begin : start + end].view(kinds[name].base).reshape(rows, *kinds[name].shape)
        for name, (begin, end) in spans.items()
    }


def _kind(entry: Any) -> list[Any]:
    return [entry.get("dtype"), entry.get("shape")] if isinstance(entry, dict) else []


def _span(name: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    span = entry.get("data_offsets")
    if not (isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)):
        raise CacheError(f"has a damaged header: {name} lies at {span!r}")
    return span[0], span[1]
