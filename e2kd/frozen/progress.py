"""A bar with throughput and time left, where there is a terminal to show it; a line elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(name: str, total: int, *, shown: bool, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of units that were done."""
    if not shown:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    if not sys.stderr.isatty():  # tqdm would say nothing
        print(f"{name}: {total:,} {unit}", file=sys.stderr, flush=True)
    with tqdm(total=total, desc=name, unit=unit, smoothing=0.1, disable=None) as bar:
        yield bar.update
