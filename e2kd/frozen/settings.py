"""Whether two plans give the same rows, and what differs if not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from e2kd.frozen.errors import CacheError, listed
from e2kd.frozen.fingerprints import canonical, digest
from e2kd.frozen.sealing import SCHEMA

Plan = dict[str, Any]
# They change rows in their last bits at most, so a pass may be resumed with others.
INFORMATIVE = ("versions", "batch_size", "first_image")
LONGEST = 80


def fingerprint(plan: Plan) -> int:
    """64 bits that differ between caches with different rows; every row's checksum contains them.

    >>> fingerprint({"classes": "teacher", "batch_size": 8}) == fingerprint({"classes": "teacher", "batch_size": 64})
    True
    """
    identity = {**_part(plan, informative=False), "schema": SCHEMA}
    return int(digest(canonical(identity).encode())[:16], 16)


def check_same(one: Plan, other: Plan, first: str, second: str, advice: str = "Use another folder.") -> None:
    """Raise a CacheError that names what differs between two plans, unless they give the same rows."""
    if fingerprint(one) != fingerprint(other):
        raise CacheError(f"{first} with other settings than {second}: {listed(differences(one, other), 8)}. {advice}")


def differences(one: Plan, other: Plan, *, informative: bool = False) -> list[str]:
    """Each setting that differs, in words; of those that decide the rows, or of those that are informative.

    >>> differences({"explainer": {"layer": "layer4"}}, {"explainer": {"layer": "layer3"}})
    ["explainer.layer is 'layer4' there but 'layer3' here"]
    """
    there, here = (dict(_flat(_part(plan, informative=informative))) for plan in (one, other))
    keys = sorted(key for key in there | here if (key in there, there.get(key)) != (key in here, here.get(key)))
    return [f"{key} is {_shown(there, key)} there but {_shown(here, key)} here" for key in keys]


def _part(plan: Plan, *, informative: bool) -> Plan:
    return {key: value for key, value in plan.items() if (key in INFORMATIVE) == informative}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(settings: Mapping[str, Any], key: str) -> str:
    text = repr(settings[key]) if key in settings else "missing"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
