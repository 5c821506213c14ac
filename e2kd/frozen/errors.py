"""The error of a cache that can't be trusted, in sentences."""

from __future__ import annotations

from collections.abc import Sequence


class CacheError(ValueError):
    """A folder of frozen explanations that can't be used as it is; the message names the cause and what to do."""


def listed(names: Sequence[object], most: int = 4) -> str:
    """The first few names, and how many more there are.

    >>> listed(["a", "b"]), listed(range(9))
    ('a, b', '0, 1, 2, 3 and 5 more')
    """
    rest = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {rest:,} more" if rest > 0 else "")
