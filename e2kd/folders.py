"""Where e2kd keeps on disk what it need not make or download again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$E2KD_CACHE, else $XDG_CACHE_HOME/e2kd, else ~/.cache/e2kd; it may not exist yet."""
    own, everybodys = os.environ.get("E2KD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path(everybodys or "~/.cache") / "e2kd").expanduser()
